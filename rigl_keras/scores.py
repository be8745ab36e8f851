"""Scores: what each connection is worth. Higher is better.

A method drops the active connections with the lowest scores and grows the
inactive ones with the highest.
"""

from collections.abc import Sequence

import tensorflow as tf

from rigl_keras._checks import integer
from rigl_keras._random import random_bits
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.layouts import Layout

__all__ = [
    "gradient_magnitude",
    "magnitude",
    "of_units",
    "random",
    "saliency",
]


def magnitude(kernel: tf.Tensor) -> tf.Tensor:
    """Returns |w|, by which every method here drops.

    Args:
        kernel: Float tensor of weights.

    Returns:
        Tensor of the same shape and dtype, non-negative.
    """
    return tf.abs(_floats("kernel", kernel))


def gradient_magnitude(gradient: tf.Tensor) -> tf.Tensor:
    """Returns |dL/dw|, by which RigL grows.

    Evci et al., 2020, arXiv:1911.11134, section 3, grow criterion. The gradient
    is dense, and averaged over the batch before the absolute value is taken.

    Args:
        gradient: Float tensor, gradient of the loss with respect to the
            masked kernel, at inactive entries too.

    Returns:
        Tensor of the same shape and dtype, non-negative.
    """
    return tf.abs(_floats("gradient", gradient))


def of_units(
    tensor: tf.Tensor, layout: Layout, *, conventions: Conventions = ORIGINAL
) -> tf.Tensor:
    """Returns |x|, or for each weight |mean x| of its unit.

    Where a mask keeps or removes several weights as one, an update reads the
    mean of the scores of each unit: mean |x|, or |mean x| of what is the same
    for all of it. Both are |x| where a unit is a single weight.

    Args:
        tensor: Float tensor of weights or gradients, of the kernel's shape.
        layout: The units of the kernel.
        conventions: `unit_score` decides which of the two it is.

    Returns:
        Tensor of the same shape and dtype, non-negative.

    Example:

    >>> layout = patterns.Kernel().layout((1, 2, 1, 1))
    >>> x = tf.reshape([3.0, -1.0], (1, 2, 1, 1))
    >>> layout.by_unit(of_units(x, layout)).numpy().item()
    2.0
    >>> layout.by_unit(of_units(x, layout, conventions=REPORT)).numpy().item()
    1.0
    """
    tensor = _floats("tensor", tensor)
    if conventions.unit_score == "magnitude_of_mean":
        tensor = layout.by_element(layout.by_unit(tensor))
    return tf.abs(tensor)


def saliency(kernel: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    """Returns |w dL/dw|, SNIP's score.

    To first order, it is the change of the loss when w is removed. Lee et al.,
    2019, arXiv:1810.02340, section 4.

    Args:
        kernel: Float tensor of weights.
        gradient: Float tensor of the same shape, gradient of the loss.

    Returns:
        Tensor of the same shape and dtype, non-negative.
    """
    kernel, gradient = _floats("kernel", kernel), _floats("gradient", gradient)
    if not kernel.shape.is_compatible_with(gradient.shape):
        raise ValueError(
            "kernel and gradient must have one shape. Received shapes "
            f"{kernel.shape} and {gradient.shape}."
        )
    return tf.abs(kernel * tf.cast(gradient, kernel.dtype))


def random(
    shape: tf.TensorShape | Sequence[int], *, key: int, step: int | tf.Tensor
) -> tf.Tensor:
    """Returns uniform draws, by which SET grows.

    Mocanu et al., 2018. The draws depend only on `key` and `step`: runs repeat,
    resumed runs continue and replicas agree.

    Args:
        shape: Shape of the kernel.
        key: Int that separates this kernel's draws from those of others.
        step: Optimizer step, an int or an integer scalar tensor.

    Returns:
        float32 tensor of `shape`, in [0, 1).
    """
    if not isinstance(step, (tf.Tensor, tf.Variable)):
        step = integer("step", step)
    elif not step.dtype.is_integer:
        raise ValueError(
            f"step must be an int or an integer scalar. Received: {step!r}."
        )
    shape = [integer("A dimension", n, at_least=0) for n in shape]
    key = integer("key", key)
    seed = tf.stack([tf.constant(key, tf.int64), tf.cast(step, tf.int64)])
    # TensorFlow's conversion to floats differs under XLA.
    bits = random_bits(shape, seed, dtype=tf.uint32)
    return tf.cast(tf.bitwise.right_shift(bits, 8), tf.float32) * 2.0**-24


def _floats(name, value):
    value = tf.convert_to_tensor(value)
    if not value.dtype.is_floating:
        raise ValueError(f"{name} must be a float tensor. Received: {value!r}.")
    return value
