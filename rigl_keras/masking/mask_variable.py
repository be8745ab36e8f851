"""The variable that holds a mask, with one byte for each entry."""

import warnings
from typing import Any

import numpy as np
import tensorflow as tf

from rigl_keras import _keras

__all__ = ["MaskVariable", "check_read"]


class MaskVariable(_keras.CheckpointedAsFloats):
    """A bool variable, True where a mask keeps.

    Any assigned value that is not zero counts as True. If a model is assigned
    the average of two models' weights, as target networks and federated models
    are, its mask keeps what either mask keeps, and the averaged kernel loses
    nothing. Keras's files hold bools. Files of earlier versions hold float32
    zeros and ones, and can be read. `tf.train.Checkpoint` reads only values of
    the variable's type: there masks remain float32.

    Raises:
        UserWarning: An assigned value is neither zero nor one, or a graph
            assigns values that may not be.
    """

    def assign(self, value: Any) -> Any:
        value = tf.convert_to_tensor(value)
        if value.dtype != tf.bool:
            known = tf.get_static_value(value)
            value = value != 0
            if known is None:
                given = "is assigned values that a graph computes"
            elif np.isin(known, [0, 1]).all():
                return super().assign(value)
            else:
                given = "was assigned values that are neither 0 nor 1"
            warnings.warn(
                f"The mask {self.path!r} {given}. What is not 0 counts as 1: "
                "an average of two models keeps the connections of both, and "
                "its density may be above theirs (masked_layers shows it). "
                "To keep masks as they are, average trainable_variables of "
                "models with equal masks. To reduce them again: "
                "rigl_keras.with_masks(strip(model), masks).",
                stacklevel=2,
            )
        return super().assign(value)

    @property
    def value(self) -> tf.Tensor | tf.Variable:
        value = super().value
        if value is _keras.stored_value(self):
            return value
        # A scope of the caller gives the value (stateless_call).
        return tf.cast(tf.convert_to_tensor(value), tf.bool)


def check_read(mask: Any, layer_name: str) -> None:
    """Checks that a file's value for a mask is a mask.

    Args:
        mask: An array, or a data set of the file.
        layer_name: Name of the masked layer.

    Raises:
        ValueError: It holds other values than zeros and ones.
    """
    values = np.asarray(mask)
    if values.dtype == bool:  # damage may have changed the bytes
        values = values.view(np.uint8)
    values = np.unique(values)
    others = values[~np.isin(values, [0, 1])]
    if others.size:
        raise ValueError(
            f"The mask of layer {layer_name!r} in this file holds "
            f"{others[0]}, but masks are zeros and ones: the file is damaged, "
            "or not from rigl_keras."
        )
