"""Convolutions in dense TensorFlow, with which sparse ones are compared."""

import numpy as np
import tensorflow as tf


def reference(
    images, kernel, *, strides=(1, 1), padding="SAME", dilations=(1, 1)
):
    """Computes a convolution in TensorFlow, differentiable for all dilations.

    It has a matrix product for each position of the kernel, of the shifted
    images.
    """
    pads, counts = [(0, 0)], []
    for axis in (0, 1):
        length, stride = images.shape[axis + 1], strides[axis]
        extent = (kernel.shape[axis] - 1) * dilations[axis] + 1
        if padding == "SAME":
            count = -(-length // stride)
            missing = max(0, (count - 1) * stride + extent - length)
        else:
            count, missing = (length - extent) // stride + 1, 0
        pads.append((missing // 2, missing - missing // 2))
        counts.append(count)
    images = tf.pad(images, [*pads, (0, 0)])

    def seen(axis, position):
        begin = position * dilations[axis]
        end = begin + (counts[axis] - 1) * strides[axis] + 1
        return slice(begin, end, strides[axis])

    return sum(
        images[:, seen(0, row), seen(1, column)] @ kernel[row, column]
        for row, column in np.ndindex(*kernel.shape[:2])
    )


def assert_close(got, want, relative=1e-5):
    """Compares arrays, relative to the largest expected number."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    if want.size:
        apart = np.abs(got.astype(np.float64) - want).max()
        assert apart <= relative * np.abs(want).max()


def normal(draw, *shape):
    """Returns normal numbers of a shape."""
    return draw.standard_normal(shape).astype(np.float32)


def mask_of(draw, shape, density):
    """Returns a random mask; without a density, of a single weight."""
    if density is None:  # a single weight
        kept = np.arange(np.prod(shape)) == draw.integers(np.prod(shape))
        return kept.reshape(shape).astype(np.float32)
    return (draw.random(shape) < density).astype(np.float32)


def passes(product, images, kernel):
    """Returns outputs, and both gradients of their weighted sum."""
    with tf.GradientTape() as tape:
        tape.watch([images, kernel])
        outputs = product(images, kernel)
        upstream = tf.random.stateless_normal(tf.shape(outputs), [7, 8])
        upstream = tf.cast(upstream, outputs.dtype)
    gradients = tape.gradient(
        outputs, [images, kernel], output_gradients=upstream
    )
    return outputs, *gradients


def wanted(images, kernel, mask, **options):
    """Returns the `passes` of the reference, in float64."""
    return passes(
        lambda images, kernel: reference(
            images, kernel * tf.constant(mask, tf.float64), **options
        ),
        tf.cast(images, tf.float64),
        tf.cast(kernel, tf.float64),
    )
