"""The units of one kernel, and the groups in which they compete.

`patterns` says which there are; a `Layout` is what a pattern makes of a
kernel, and how tensors of one value for each weight become tensors of one for
each unit, and these matrices of a row for each group.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

__all__ = ["Axes", "BlockLayout", "KernelLayout", "Layout"]


class Axes(NamedTuple):
    """The shape of a kernel, and what its axes are.

    Args:
        shape: Of the kernel.
        inputs: Axes that tell inputs (channels) apart, in order.
        outputs: Axes that tell output units apart, each of which sums over
            the other axes.
        convolved: Whether axes that are neither are positions of a
            convolution.
    """

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    convolved: bool

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Axes":
        """Returns those of Dense and convolutions: inputs, outputs last.

        Args:
            shape: Kernel shape in Keras order, of two axes or more.

        Example:

        >>> Axes.of((3, 3, 16, 32)).inputs
        (2,)
        """
        last = len(shape) - 1
        if last < 1:
            raise ValueError(
                "A kernel has two axes or more, input and output channels "
                f"last. Received: shape={shape!r}."
            )
        return cls(tuple(shape), (last - 1,), (last,), last > 1)

    @property
    def is_depthwise(self) -> bool:
        """Whether each output unit reads one input channel only."""
        return set(self.inputs) <= set(self.outputs)

    @property
    def weights(self) -> int:
        """How many weights the kernel has."""
        return math.prod(self.shape)

    def rest(self, *others: int) -> tuple[int, ...]:
        """Returns the axes that are none of the others, in order."""
        return tuple(i for i in range(len(self.shape)) if i not in others)

    def size(self, axes: Sequence[int]) -> int:
        """Returns the product of the sizes of some axes."""
        return math.prod(self.shape[axis] for axis in axes)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The units of one kernel, and the groups in which they compete.

    Here a unit is a weight. Tensors of a value for each unit have
    `unit_shape`; `grouped` turns one into a matrix of a row for each group.
    Every method takes NumPy arrays as well, but `by_unit` and `units`.

    Args:
        shape: Of the kernel.
        order: The axes of `unit_shape`, those along a group last.
        size: How many units a group has.
        reason: What keeps density from moving to other layers, as in "the
            mask keeps whole kernels". "": nothing.
        fixed: How many units each group keeps, where the pattern says it.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    size: int
    reason: str = ""
    fixed: int | None = None

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of tensors that have a value for each unit."""
        return self.shape

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return math.prod(self.unit_shape) // self.size

    @property
    def is_apart(self) -> bool:
        """Whether each group keeps a number of units of its own."""
        return self.groups > 1 or self.fixed is not None

    def by_unit(self, tensor: tf.Tensor) -> tf.Tensor:
        """Returns the mean over the weights of each unit.

        Args:
            tensor: Float tensor of the kernel's shape.

        Returns:
            Tensor of `unit_shape`.
        """
        return tensor

    def units(self, mask: tf.Tensor) -> tf.Tensor:
        """Returns whether anything of each unit is kept.

        Args:
            mask: Bool tensor of the kernel's shape.

        Returns:
            Bool tensor of `unit_shape`.
        """
        return mask

    def by_element(self, tensor: Any) -> Any:
        """Returns for each weight the value of its unit.

        Args:
            tensor: Tensor of `unit_shape`.

        Returns:
            Tensor of the kernel's shape.
        """
        return tensor

    def grouped(self, tensor: Any) -> Any:
        """Returns the values of units as a matrix.

        Args:
            tensor: Tensor of `unit_shape`.

        Returns:
            Tensor (groups, size), a row for each group.
        """
        ordered = _transposed(tensor, self.order)
        return _of(tensor).reshape(ordered, (self.groups, self.size))

    def ungrouped(self, rows: Any) -> Any:
        """Returns what `grouped` was given.

        Args:
            rows: Tensor (groups, size).

        Returns:
            Tensor of `unit_shape`.
        """
        shape = [self.unit_shape[axis] for axis in self.order]
        back = tuple(int(axis) for axis in np.argsort(self.order))
        return _transposed(_of(rows).reshape(rows, shape), back)

    def count_of(self, ones: int) -> int:
        """Returns how many units of each group make up so many weights.

        Args:
            ones: Number of weights of the kernel.

        Returns:
            The nearest number that there can be.
        """
        return round(ones * self.size / max(math.prod(self.shape), 1))

    def breach(self, mask: np.ndarray) -> str | None:
        """Returns what of a mask breaks the pattern, or None.

        Args:
            mask: Array of zeros and ones, of the kernel's shape.
        """
        if not self.is_apart:
            return None
        counts = np.count_nonzero(self.grouped(np.asarray(mask)), axis=1)
        low, high = counts.min(), counts.max()
        allowed = (self.fixed, self.size) if self.fixed else (low,)
        if low == high and low in allowed:
            return None
        kept = f"{low}" if low == high else f"{low} to {high}"
        wanted = f"{self.fixed}" if self.fixed else "the same number"
        return f"keeps {kept} weights of a group, and not {wanted} of each"


class KernelLayout(Layout):
    """Units are the weights between two channels, the last two axes."""

    @property
    def unit_shape(self):
        return self.shape[-2:]

    def by_unit(self, tensor):
        return tf.reduce_mean(tensor, axis=range(len(self.shape) - 2))

    def units(self, mask):
        return tf.reduce_any(mask, axis=range(len(self.shape) - 2))

    def by_element(self, tensor):
        return _of(tensor).broadcast_to(tensor, self.shape)

    def breach(self, mask):
        spatial = tuple(range(np.ndim(mask) - 2))
        if (np.max(mask, axis=spatial) != np.min(mask, axis=spatial)).any():
            return "keeps a part of some kernels, and not whole ones"
        return None


@dataclasses.dataclass(frozen=True)
class BlockLayout(Layout):
    """Units are blocks of matrices (positions, inputs, outputs).

    Those at the edge of a matrix may be smaller.
    """

    axes: tuple[int, ...] = ()  # of the kernel: positions, inputs, outputs
    matrices: tuple[int, int, int] = (1, 1, 1)
    block: tuple[int, int] = (1, 1)

    @property
    def unit_shape(self):
        positions, inputs, outputs = self.matrices
        rows, columns = self.block
        return positions, -(-inputs // rows), -(-outputs // columns)

    def by_unit(self, tensor):
        whole = tf.cast(self._cut(np.ones(self.shape, bool)), tensor.dtype)
        weights = tf.reduce_sum(whole, axis=(2, 4))
        return tf.reduce_sum(self._cut(tensor), axis=(2, 4)) / weights

    def units(self, mask):
        # TensorFlow pads no bools on a GPU.
        return tf.reduce_any(self._cut(tf.cast(mask, tf.float32)) > 0, (2, 4))

    def by_element(self, tensor):
        xp, (_, inputs, outputs) = _of(tensor), self.matrices
        rows, columns = self.block
        whole = xp.repeat(xp.repeat(tensor, rows, 1), columns, 2)
        shape = [self.shape[axis] for axis in self.axes]
        back = tuple(int(axis) for axis in np.argsort(self.axes))
        return _transposed(xp.reshape(whole[:, :inputs, :outputs], shape), back)

    def _cut(self, tensor):
        """Returns (positions, blocks, rows, blocks, columns), zeros added."""
        xp, (positions, down, across) = _of(tensor), self.unit_shape
        rows, columns = self.block
        _, inputs, outputs = self.matrices
        below, beside = down * rows - inputs, across * columns - outputs
        whole = xp.pad(
            xp.reshape(_transposed(tensor, self.axes), self.matrices),
            [(0, 0), (0, below), (0, beside)],
        )
        return xp.reshape(whole, (positions, down, rows, across, columns))

    def breach(self, mask):
        mask = tf.convert_to_tensor(np.asarray(mask) != 0)
        if tf.reduce_all(self.by_element(self.units(mask)) == mask):
            return None
        return "keeps a part of some blocks, and not whole ones"


def _of(tensor):
    """Returns NumPy for its arrays, and else TensorFlow."""
    return np if isinstance(tensor, np.ndarray) else tf


def _transposed(tensor, order):
    if order == tuple(range(len(order))):
        return tensor
    return _of(tensor).transpose(tensor, order)
