"""Arguments that are tensors: masks, scores and counts."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from rigl_keras._checks import fraction, integer

__all__ = [
    "Number",
    "TensorLike",
    "as_mask",
    "as_scores",
    "as_tensor",
    "check_defined",
    "check_one_shape",
    "checked_count",
    "checked_fraction",
    "count_kept",
    "count_nan",
    "count_true",
    "no_nan_within",
]


# What TensorFlow converts to a tensor, and to a scalar tensor.
TensorLike = tf.Tensor | tf.Variable | np.ndarray | Sequence | float
Number = tf.Tensor | tf.Variable | float


def count_true(selected: tf.Tensor) -> tf.Tensor:
    """Returns how many entries of a bool tensor are True, as int32."""
    return tf.reduce_sum(tf.cast(selected, tf.int32))


def count_kept(mask: tf.Tensor) -> tf.Tensor:
    """Returns how many entries of a mask hold, as `count_true` does.

    In bytes, of which as many are added as a byte can count: a number for each
    entry would take four times the memory of the mask, or eight.
    """
    size = mask.shape.num_elements() or 1
    each = next(n for n in range(min(size, 255), 0, -1) if size % n == 0)
    rows = tf.reshape(tf.cast(mask, tf.uint8), [-1, each])
    some = tf.reduce_sum(rows, axis=1)
    return tf.reduce_sum(tf.cast(some, tf.int64))


def no_nan_within(scores: tf.Tensor, where: tf.Tensor) -> tf.Tensor:
    """Returns whether no score is NaN where a bool tensor is True."""
    return ~tf.reduce_any(where & tf.math.is_nan(scores))


def count_nan(scores: tf.Tensor, where: tf.Tensor) -> int:
    """Returns how many scores are NaN where a bool tensor is True."""
    return int(count_true(where & tf.math.is_nan(scores)))


def as_mask(name: str, mask: TensorLike) -> tf.Tensor:
    """Returns a mask as a bool tensor.

    Args:
        name: What the argument is called.
        mask: Tensor of zeros and ones, or of bools.

    Returns:
        Bool tensor.

    Raises:
        ValueError: It cannot be a mask. Within a graph values are unknown and
            only its dtype is checked.
    """
    mask = as_tensor(name, mask)
    if mask.dtype == tf.bool:
        return mask
    values = as_scores(name, mask)
    if tf.executing_eagerly():
        other = values[(values != 0) & (values != 1)]
        if other.shape[0]:
            raise ValueError(
                f"{name} must hold zeros and ones only. Received "
                f"{other[0].numpy()} among its entries."
            )
    return tf.cast(values, tf.bool)


def as_scores(name: str, scores: TensorLike) -> tf.Tensor:
    """Returns scores as a float tensor; whole numbers become float64.

    Args:
        name: What the argument is called.
        scores: Tensor of real numbers.

    Returns:
        float32 or float64 tensor.

    Raises:
        ValueError: They are not numbers.
    """
    scores = as_tensor(name, scores)
    dtype = scores.dtype
    if dtype in (tf.float32, tf.float64):
        return scores
    if dtype.is_floating:
        return tf.cast(scores, tf.float32)
    if not (dtype.is_integer or dtype.is_bool) or dtype.is_quantized:
        raise ValueError(
            f"{name} must be a tensor of numbers. Received: {name}={scores!r}."
        )
    return tf.cast(scores, tf.float64)


def as_tensor(name: str, value: TensorLike) -> tf.Tensor:
    """Returns an argument as a tensor, or raises ValueError."""
    try:
        return tf.convert_to_tensor(value)
    except (TypeError, ValueError, OverflowError, tf.errors.OpError) as error:
        raise ValueError(
            f"{name} must be a tensor, or an array. Received: {name}={value!r}."
        ) from error


def check_one_shape(**tensors: tf.Tensor) -> None:
    """Raises ValueError unless all tensors have one shape."""
    shapes = [tensor.shape for tensor in tensors.values()]
    if not all(shape.is_compatible_with(shapes[0]) for shape in shapes):
        *names, last = tensors
        *others, shape = [str(shape) for shape in shapes]
        raise ValueError(
            f"{', '.join(names)} and {last} must have one shape. Received "
            f"shapes {', '.join(others)} and {shape}."
        )


def check_defined(name: str, scores: tf.Tensor, where: tf.Tensor) -> None:
    """Refuses NaN in scores that are ranked, when called eagerly."""
    if tf.executing_eagerly() and not bool(no_nan_within(scores, where)):
        raise ValueError(
            f"NaN cannot be ranked. Received: {name} with "
            f"{count_nan(scores, where)} NaN."
        )


def checked_fraction(value: Number) -> tf.Tensor:
    """Returns a fraction as a float64 scalar tensor."""
    rule = "is a fraction of the active connections and must be in [0, 1]"
    if not (tf.is_tensor(value) or isinstance(value, tf.Variable)):
        return tf.constant(
            fraction("drop_fraction", value, rule=rule), tf.float64
        )
    value = tf.convert_to_tensor(value)
    if not value.dtype.is_floating or value.shape.rank not in (0, None):
        raise ValueError(f"drop_fraction {rule}. Received: {value!r}.")
    value = tf.cast(value, tf.float64)
    if tf.executing_eagerly():
        fraction("drop_fraction", float(value), rule=rule)
    return value


def checked_count(name: str, value: Number) -> tf.Tensor:
    """Returns a number of connections as an int32 scalar tensor."""
    if tf.is_tensor(value) or isinstance(value, tf.Variable):
        value = tf.convert_to_tensor(value)
        if not value.dtype.is_integer or value.shape.rank not in (0, None):
            raise ValueError(
                f"{name} must be a whole number. Received: {name}={value!r}."
            )
        if not tf.executing_eagerly():
            return tf.cast(value, tf.int32)
        value = int(value)
    whole = integer(name, value, at_least=0)
    return tf.constant(min(whole, tf.int32.max), tf.int32)
