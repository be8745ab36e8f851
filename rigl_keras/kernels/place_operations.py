"""Some places of tensors: what is looked at, read and written there alone."""

import tensorflow as tf

from rigl_keras.kernels import library

__all__ = ["look_at", "places_of", "with_values"]


def look_at(mask: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """Returns a mask in bytes, for gradients at some places beside its own.

    Args:
        mask: Bool tensor of any shape.
        places: int64 vector of flat positions. Some may come twice.

    Returns:
        uint8 tensor of the mask's shape: 1 where the mask is True, and 2 more
        at the places.

    Raises:
        RuntimeError: There is no op library (`library.unavailable`).
        tf.errors.InvalidArgumentError: A place is outside.
    """
    return library.required().rigl_keras_look_at(mask=mask, places=places)


def places_of(marked: tf.Tensor) -> tf.Tensor:
    """Returns where a tensor is not zero.

    Args:
        marked: Bool or uint8 tensor of any shape.

    Returns:
        int64 vector of flat positions, rising.
    """
    return library.required().rigl_keras_places(marked=marked)


def with_values(
    dense: tf.Tensor, places: tf.Tensor, values: tf.Tensor
) -> tf.Tensor:
    """Returns a tensor with other values at some places.

    Args:
        dense: Bool or float32 tensor of any shape.
        places: int64 vector of flat positions, no two the same.
        values: A value for each, of the type of `dense`.

    Raises:
        RuntimeError: There is no op library (`library.unavailable`).
        tf.errors.InvalidArgumentError: Sizes do not fit, or a place is
            outside.
    """
    return library.required().rigl_keras_with_values(
        dense=dense, places=places, values=values
    )
