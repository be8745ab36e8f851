"""A method that remembers the first number of connections of its layers."""

import dataclasses

import keras
import tensorflow as tf

from rigl_keras._tensor_checks import count_true
from rigl_keras.masking.masked import KernelMask
from rigl_keras.methods.mask_update import MaskUpdate

__all__ = ["FirstCounts"]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FirstCounts(MaskUpdate):
    """Keeps the counts of the beginning of a run, in `variables`.

    It is for methods whose layers may temporarily have more or fewer
    connections. A run that resumes without its `variables` starts from the
    present counts.

    Args, Raises: as in `MaskUpdate`.
    """

    def __post_init__(self):
        super().__post_init__()
        self._first: tf.Variable | None = None  # until it is attached
        self._first_of: list[keras.Variable] = []

    def first_count(self, layer: KernelMask) -> tf.Tensor:
        """Returns the number of units in a mask when the run began.

        Args:
            layer: A masked layer.

        Returns:
            An int32 scalar.
        """
        (index,) = [i for i, m in enumerate(self.masked) if m is layer]
        return self._counts_of_start()[index]

    def _counts_of_start(self) -> tf.Variable:
        if self._first is None:
            raise ValueError(f"{self.name} is not attached to a model yet.")
        return self._first

    @property
    def variables(self) -> list[tf.Variable]:
        first = [] if self._first is None else [self._first]
        return [*first, *super().variables]

    def set_up(self) -> None:
        super().set_up()
        if not self._attached.has_kernels(self._first_of):
            self._first_of = [m.kernel for m in self.masked]
            self._first = tf.Variable(self._counts_now(), trainable=False)

    def forget(self) -> None:
        super().forget()
        self._counts_of_start().assign(self._counts_now())

    def _counts_now(self):
        return tf.stack([unit_count(layer) for layer in self.masked])


def unit_count(layer: KernelMask) -> tf.Tensor:
    """Returns the number of units that a mask keeps, an int32 scalar.

    Args:
        layer: A masked layer.
    """
    return count_true(layer.units(tf.convert_to_tensor(layer.mask.value)))
