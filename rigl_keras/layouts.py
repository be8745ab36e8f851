"""The units of one kernel, and the groups in which they compete.

A `Layout` is what a pattern (`patterns`) makes of one kernel. It turns tensors
with a value for each weight into tensors with a value for each unit, and those
into matrices with a row for each group.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

__all__ = ["Axes", "BlockLayout", "KernelLayout", "Layout"]


class Axes(NamedTuple):
    """The shape of a kernel, and the meaning of its axes.

    Args:
        shape: Shape of the kernel.
        inputs: Axes of the inputs (channels), in order.
        outputs: Axes of the output units. Each unit sums over the other axes.
        convolved: Whether the remaining axes are positions of a convolution.
    """

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    convolved: bool

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Axes":
        """Returns the axes of Dense and convolutions: inputs, outputs last.

        Args:
            shape: Kernel shape in Keras order, with at least two axes.

        Example:

        >>> Axes.of((3, 3, 16, 32)).inputs
        (2,)
        """
        last = len(shape) - 1
        if last < 1:
            raise ValueError(
                "A kernel has at least two axes, input and output channels "
                f"last. Received: shape={shape!r}."
            )
        return cls(tuple(shape), (last - 1,), (last,), last > 1)

    @property
    def is_depthwise(self) -> bool:
        """Whether each output unit reads one input channel only."""
        return set(self.inputs) <= set(self.outputs)

    @property
    def weights(self) -> int:
        """The number of weights of the kernel."""
        return math.prod(self.shape)

    def rest(self, *others: int) -> tuple[int, ...]:
        """Returns all axes except `others`, in order."""
        return tuple(i for i in range(len(self.shape)) if i not in others)

    def size(self, axes: Sequence[int]) -> int:
        """Returns the product of the sizes of some axes."""
        return math.prod(self.shape[axis] for axis in axes)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The units of one kernel, and the groups in which they compete.

    Here a unit is a weight. Tensors with a value for each unit have
    `unit_shape`; `grouped` turns one into a matrix with a row for each group.
    All methods except `by_unit` and `units` also take NumPy arrays.

    Args:
        shape: Shape of the kernel.
        order: The axes of `unit_shape`, those along a group last.
        size: Number of units in a group.
        reason: Why density cannot move to other layers, as in "the mask keeps
            whole kernels". "": it can.
        fixed: How many units each group keeps, if the pattern fixes it.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    size: int
    reason: str = ""
    fixed: int | None = None

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """The shape of tensors with a value for each unit."""
        return self.shape

    @property
    def groups(self) -> int:
        """The number of groups."""
        return math.prod(self.unit_shape) // self.size

    @property
    def is_apart(self) -> bool:
        """Whether each group has a separate number of units to keep."""
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
        """Returns which units keep at least one weight.

        Args:
            mask: Bool tensor of the kernel's shape.

        Returns:
            Bool tensor of `unit_shape`.
        """
        return mask

    def by_element(self, tensor: Any) -> Any:
        """Returns the value of its unit for each weight.

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
        """Returns the values of units from the matrix of `grouped`.

        Args:
            rows: Tensor (groups, size).

        Returns:
            Tensor of `unit_shape`.
        """
        shape = [self.unit_shape[axis] for axis in self.order]
        back = tuple(int(axis) for axis in np.argsort(self.order))
        return _transposed(_of(rows).reshape(rows, shape), back)

    def count_of(self, ones: int) -> int:
        """Returns how many units of each group hold a number of weights.

        Args:
            ones: Number of weights of the kernel.

        Returns:
            The nearest possible number.
        """
        return round(ones * self.size / max(math.prod(self.shape), 1))

    def breach(self, mask: np.ndarray) -> str | None:
        """Returns how a mask breaks the pattern, or None.

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
        return f"keeps {kept} weights of a group instead of {wanted} of each"


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
            return "keeps parts of some kernels instead of whole ones"
        return None


@dataclasses.dataclass(frozen=True)
class BlockLayout(Layout):
    """Units are blocks of matrices (positions, inputs, outputs).

    Blocks at the edge of a matrix may be smaller.
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
        # On a GPU, TensorFlow cannot pad bools.
        return tf.reduce_any(self._cut(tf.cast(mask, tf.float32)) > 0, (2, 4))

    def by_element(self, tensor):
        xp, (_, inputs, outputs) = _of(tensor), self.matrices
        rows, columns = self.block
        whole = xp.repeat(xp.repeat(tensor, rows, 1), columns, 2)
        shape = [self.shape[axis] for axis in self.axes]
        back = tuple(int(axis) for axis in np.argsort(self.axes))
        return _transposed(xp.reshape(whole[:, :inputs, :outputs], shape), back)

    def _cut(self, tensor):
        """Returns (positions, blocks, rows, blocks, columns), zero-padded."""
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
        return "keeps parts of some blocks instead of whole ones"


def _of(tensor):
    """Returns NumPy for its arrays, otherwise TensorFlow."""
    return np if isinstance(tensor, np.ndarray) else tf


def _transposed(tensor, order):
    if order == tuple(range(len(order))):
        return tensor
    return _of(tensor).transpose(tensor, order)
