"""Scores of connections, and random draws that repeat anywhere."""

import numpy as np
import pytest
import tensorflow as tf

from rigl_keras import scores

# Fixed numbers: draws must not change with the device or the release, so that
# recorded runs can be repeated.
DRAWS = {
    (7, 3): [0.18746442, 0.44999164, 0.32367653],
    (2**32 - 1, 3): [0.9913908, 0.87945443, 0.13019991],  # the largest crc32
}


@pytest.mark.parametrize("score", [scores.magnitude, scores.gradient_magnitude])
def test_magnitudes(score):
    for dtype in ("float16", "float32", "float64"):
        got = score(tf.constant([[-3.0, 0.5], [0.0, -np.inf]], dtype))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, [[3.0, 0.5], [0.0, np.inf]])
    assert np.isnan(score(tf.constant([np.nan]))).all()  # refused later


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("key, step", DRAWS)
def test_random_is_the_same_everywhere(key, step, mode):
    def draw(step):
        return scores.random((3,), key=key, step=step)

    if mode != "eager":
        draw = tf.function(draw, jit_compile=mode == "xla")
    tf.random.set_seed(123)  # the global seed has no effect
    for number in (step, tf.constant(step, tf.int64), tf.constant(step)):
        np.testing.assert_allclose(draw(number), DRAWS[key, step], rtol=1e-6)


def test_random_differs_between_keys_and_steps():
    draws = [
        scores.random((20, 20), key=key, step=step).numpy()
        for key in (0, 1, 2**31)
        for step in (0, 1, 2**31)
    ]
    assert all(0 <= d.min() and d.max() < 1 for d in draws)
    assert len({d.tobytes() for d in draws}) == len(draws)
    # Key and step differ: (0, 1) and (1, 0) are among the draws above.


def test_random_is_the_same_in_another_process(fresh):
    """Unlike `hash` of strings, draws are the same in each process."""
    code = (
        "from rigl_keras import scores;"
        "print(scores.random((50,), key=7, step=3).numpy().tobytes().hex())"
    )
    other = fresh("-c", code)
    here = scores.random((50,), key=7, step=3).numpy()
    assert other.stdout.strip() == here.tobytes().hex(), other.stderr


def test_saliency():
    got = scores.saliency(
        tf.constant([2.0, -3.0, 0.0]), tf.constant([-1.0, 2.0, 9.0])
    )
    assert got.numpy().tolist() == [2.0, 6.0, 0.0]
