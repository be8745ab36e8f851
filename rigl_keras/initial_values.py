"""Initial values of grown connections."""

import re
from typing import Literal

import tensorflow as tf

from rigl_keras import _warn, scores
from rigl_keras._checks import choice, number

__all__ = ["GROW_INITS", "checked_grow_init", "grown_values"]

_POSITIVE = "must be a positive number"

GROW_INITS = (
    "zeros",
    "initial_dist",
    "random_normal",
    "random_uniform",
    "grad_scale",
    "grad_sign",
)


def checked_grow_init(
    grow_init: str,
    divisor: float = 1.0,
    *,
    dense_gradients: Literal["never", "updates", "always"] = "updates",
) -> tuple[str, float]:
    """Returns the checked kind and divisor of the values of grown weights.

    Args:
        grow_init: One of `GROW_INITS`. A name that ends with its divisor, such
            as `"random_normal_10"`, is deprecated.
        divisor: Positive number. 1 for `"zeros"`.
        dense_gradients: When the method needs gradients at inactive entries. A
            method that never does cannot start from gradients.

    Returns:
        `(grow_init, divisor)`, with a name of `GROW_INITS`.

    Raises:
        ValueError: The method cannot use it, or the divisor is wrong.
        DeprecationWarning: The name ends with its divisor.
    """
    grow_init, divisor = _without_divisor(grow_init, divisor)
    divisor = number("grow_divisor", divisor, above=0, rule=_POSITIVE)
    if grow_init == "zeros" and divisor != 1:
        raise ValueError(
            "grow_divisor divides what newly grown weights start with, and "
            "zeros stay zeros. Pass another grow_init, or leave grow_divisor "
            f"out. Received: grow_init='zeros', grow_divisor={divisor}."
        )
    if grow_init.startswith("grad") and dense_gradients == "never":
        raise ValueError(
            "Weights can start from their gradient only where a method needs "
            f"dense gradients, and this one does not. Received: "
            f"grow_init={grow_init!r}. Use RigL, or 'random_normal'."
        )
    return grow_init, divisor


def grown_values(
    grow_init: str,
    kernel: tf.Tensor,
    mask: tf.Tensor,
    *,
    divisor: float = 1.0,
    gradient: tf.Tensor,
    initial: tf.Tensor | None,
    key: int,
    step: int | tf.Tensor,
) -> tf.Tensor | None:
    """Returns the initial value of each entry of a kernel if it is grown.

    With s and m the standard deviation and the mean magnitude of the active
    weights, g the gradient and d the divisor:

        zeros:          0
        initial_dist:   one of the weights that training started from / d
        random_normal:  a draw from N(0, s^2) / d
        random_uniform: a draw from (-m, m) / d
        grad_scale:     g / d
        grad_sign:      sign(g) / d

    These are the choices of the authors' code (sparse_optimizers_base.py,
    `get_grow_tensor`). There s and m include the stale values of inactive
    weights; here those are zero and left out.

    Args:
        grow_init: One of `GROW_INITS`.
        kernel: Float tensor, zero outside the mask.
        mask: Tensor of its shape, 1 where active.
        divisor: Positive number.
        gradient: dL/d(masked kernel), of its shape.
        initial: Vector of weights that `initial_dist` draws from.
        key: Int that separates this kernel's draws from those of others.
        step: Optimizer step, an integer scalar.

    Returns:
        Tensor of the kernel's shape and dtype, or None for zeros.
    """
    kind, divisor = checked_grow_init(grow_init, divisor)
    if kind == "zeros":
        return None
    if kind == "grad_scale":
        values = gradient
    elif kind == "grad_sign":
        values = tf.sign(gradient)
    else:
        uniform = scores.random(kernel.shape, key=key, step=step)
        if kind == "initial_dist":
            size = tf.cast(tf.size(initial), tf.float64)
            index = tf.cast(tf.cast(uniform, tf.float64) * size, tf.int32)
            values = tf.gather(initial, index)
        else:
            values = _drawn(kind, uniform, kernel, mask)
    return tf.cast(values, kernel.dtype) / tf.cast(divisor, kernel.dtype)


def _drawn(kind, uniform, kernel, mask):
    kernel = tf.cast(kernel, tf.float32)
    active = tf.cast(mask, tf.float32)
    count = tf.maximum(tf.reduce_sum(active), 1.0)
    # Symmetric in (-1, 1), in steps that float32 holds exactly.
    centred = 2 * uniform - 1 + 2.0**-24
    if kind == "random_uniform":
        return centred * tf.reduce_sum(tf.abs(kernel) * active) / count
    mean = tf.reduce_sum(kernel * active) / count
    variance = tf.reduce_sum(active * tf.square(kernel - mean)) / count
    # TensorFlow's own normal draws differ under XLA.
    normal = tf.math.erfinv(centred) * 2**0.5
    return normal * tf.sqrt(variance)


def _without_divisor(grow_init, divisor):
    """Splits a divisor from a name such as `"random_normal_10"`."""
    pattern = rf"({'|'.join(GROW_INITS[1:])})_(\d+\.?\d*|\.\d+)"
    match = isinstance(grow_init, str) and re.fullmatch(pattern, grow_init)
    if not match:
        choice("grow_init", grow_init, GROW_INITS)
        return grow_init, divisor
    if divisor != 1:
        raise ValueError(
            f"There are two divisors. Received: grow_init={grow_init!r}, "
            f"grow_divisor={divisor!r}. Pass grow_init={match[1]!r}."
        )
    divisor = number("grow_divisor", float(match[2]), above=0, rule=_POSITIVE)
    _warn.deprecated(
        f"grow_init={grow_init!r} is deprecated. Write "
        f"grow_init={match[1]!r}, grow_divisor={match[2]}."
    )
    return match[1], divisor
