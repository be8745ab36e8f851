"""Random data for tests of sparse products, and comparisons."""

import numpy as np
import tensorflow as tf

__all__ = ["assert_close", "random_mask"]


def random_mask(draw, shape, density):
    return tf.constant((draw.random(shape) < density).astype(np.float32))


def assert_close(got, want, relative=2e-5):
    """Compares arrays, relative to the largest expected number or 1."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    scale = max(1.0, np.abs(want).max(initial=0))
    np.testing.assert_allclose(got, want, rtol=0, atol=relative * scale)
