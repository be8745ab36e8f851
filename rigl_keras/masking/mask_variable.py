"""The variable that holds a mask: a byte an entry, whatever it is assigned."""

from typing import Any

import numpy as np
import tensorflow as tf

from rigl_keras import _keras
from rigl_keras._warn import warn

__all__ = ["MaskVariable", "check_read"]


class MaskVariable(_keras.CheckpointedAsFloats):
    """A bool variable, whatever it is assigned: True where a mask keeps.

    What is not zero counts as True. So the mask of a model that is given the
    average of two models' weights, as a target network or a federated one is,
    keeps what either of them keeps, and the averaged kernel is whole. Keras's
    files hold bools; those of earlier versions hold float32 zeros and ones,
    and are read as well. `tf.train.Checkpoint` reads what has the type of the
    variable alone: there masks are float32, as they always were.

    Raises:
        UserWarning: What it was assigned is neither zero nor one, or may be,
            where a graph assigns it.
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
            warn(
                f"The mask {self.path!r} {given}. What is not 0 counts as 1: "
                "an average of two models keeps the connections of both, and "
                "its density may be above theirs (masked_layers shows it). "
                "To keep masks as they are, average trainable_variables of "
                "models with equal masks. To have fewer connections again: "
                "rigl_keras.with_masks(strip(model), masks).",
            )
        return super().assign(value)

    @property
    def value(self) -> tf.Tensor | tf.Variable:
        value = super().value
        if value is _keras.stored_value(self):
            return value
        # Given by a scope of the caller's (stateless_call).
        return tf.cast(tf.convert_to_tensor(value), tf.bool)


def check_read(mask: Any, layer_name: str) -> None:
    """Checks that what a file holds as a mask is one.

    Args:
        mask: An array, or a data set of the file.
        layer_name: Of the layer that is masked.

    Raises:
        ValueError: It holds other values than zeros and ones.
    """
    values = np.asarray(mask)
    if values.dtype == bool:  # as bytes, which damage may have changed
        values = values.view(np.uint8)
    values = np.unique(values)
    others = values[~np.isin(values, [0, 1])]
    if others.size:
        raise ValueError(
            f"The mask of layer {layer_name!r} in this file holds "
            f"{others[0]}, and masks are zeros and ones: the file is damaged, "
            "or not ours."
        )
