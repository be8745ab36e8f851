"""The shapes of a network's values, without their batch."""

import math
from collections.abc import Sequence

from rigl_keras.serving.network import Node, Operation, Padding

__all__ = ["Shape", "shape_of"]

Shape = tuple[int, ...]  # -1: a length that is free


def shape_of(node: Node, shapes: Sequence[Shape]) -> Shape:
    """Returns the shape of a node's value.

    Args:
        node: The node.
        shapes: Shapes of its inputs, -1 where a length is free.

    Raises:
        ValueError: It cannot read such inputs.
    """
    rule = _RULES.get(node.operation)
    return rule(node, *shapes) if rule else shapes[0]


def _image(node, shape):
    if len(shape) != 3:
        raise ValueError(
            f"{node.operation.name} reads images [rows, columns, channels]. "
            f"Received: {list(shape)}."
        )
    return shape


def _length(
    length: int, size: int, stride: int, padding: tuple[bool, int]
) -> int:
    """Returns the number of positions of a window along an axis."""
    same, around = padding
    if length == -1:
        return -1
    if same:
        return -(-length // stride)
    places = (length + around - size) // stride + 1
    if places < 1:
        raise ValueError(
            f"A window of {size} does not fit into {length} + {around}."
        )
    return places


def _windows(shape, size, strides, padding: Padding):
    around = (padding.top + padding.bottom, padding.left + padding.right)
    return tuple(
        _length(shape[i], size[i], strides[i], (padding.same, around[i]))
        for i in range(2)
    )


def _convolution(node, shape):
    rows, columns, channels, filters = node.kernel.shape
    if _image(node, shape)[2] != channels * node.groups:
        raise ValueError(
            f"A convolution reads {channels * node.groups} channels. "
            f"Received: {list(shape)}."
        )
    size = tuple(
        (length - 1) * dilation + 1
        for length, dilation in zip(
            (rows, columns), node.dilations, strict=True
        )
    )
    return *_windows(shape, size, node.strides, node.padding), filters


def _dense(node, shape):
    if not shape or shape[-1] != node.kernel.shape[0]:
        raise ValueError(
            f"A dense layer reads {node.kernel.shape[0]} numbers. Received: "
            f"{list(shape)}."
        )
    return *shape[:-1], node.kernel.shape[1]


def _affine(node, shape):
    channels = max(len(node.scale), len(node.shift))
    if not shape or channels not in (1, shape[-1]):
        raise ValueError(
            f"An affine step reads {channels} channels. Received: "
            f"{list(shape)}."
        )
    return shape


def _last_axis(node, shape):
    if not shape:
        raise ValueError(f"{node.operation.name} reads at least one axis.")
    return shape


def _both(node, one, other):
    """Shapes are equal, or one has no rows and columns."""
    if one == other:
        return one
    if len(one) == len(other) == 3 and one[2] == other[2]:
        if one[:2] == (1, 1):
            return other
        if other[:2] == (1, 1):
            return one
    raise ValueError(
        f"{node.operation.name} reads values of one shape, or one without rows "
        f"and columns. Received: {list(one)} and {list(other)}."
    )


def _concatenate(node, *shapes):
    if not all(shapes) or len({shape[:-1] for shape in shapes}) != 1:
        raise ValueError(
            "Concatenated values have equal shapes except for the last axis. "
            f"Received: {list(map(list, shapes))}."
        )
    last = [shape[-1] for shape in shapes]
    return *shapes[0][:-1], -1 if -1 in last else sum(last)


def _pool(node, shape):
    places = _windows(
        _image(node, shape), node.size, node.strides, node.padding
    )
    return *places, shape[2]


def _global_pool(node, shape):
    channels = _image(node, shape)[2]
    return (1, 1, channels) if node.keep_axes else (channels,)


def _pad(node, shape):
    top, bottom, left, right = node.padding.numbers()
    *lengths, channels = _image(node, shape)
    padded = []
    for length, before, after in zip(
        lengths, (top, left), (bottom, right), strict=True
    ):
        # Some of the image itself must remain, even with padding.
        if 0 <= length <= max(-before, 0) + max(-after, 0):
            raise ValueError(
                f"{node.padding} crops all rows or columns of an image "
                f"{list(shape)}."
            )
        padded.append(-1 if length == -1 else length + before + after)
    return *padded, channels


def _upsample(node, shape):
    rows, columns, channels = _image(node, shape)
    by_rows, by_columns = node.factors
    return (
        rows if rows == -1 else rows * by_rows,
        columns if columns == -1 else columns * by_columns,
        channels,
    )


def _reshape(node, shape):
    known = math.prod(n for n in node.shape if n != -1)
    if -1 in shape:
        return node.shape
    size = math.prod(shape)
    if size % known or (-1 not in node.shape and size != known):
        raise ValueError(
            f"A value of shape {list(shape)} cannot have that of "
            f"{list(node.shape)}."
        )
    return tuple(size // known if n == -1 else n for n in node.shape)


def _recurrent(node, shape):
    units, products = node.kernel.shape
    if len(shape) != 2 or shape[1] != products:
        raise ValueError(
            f"A recurrent node reads sequences [steps, {products}]. Received: "
            f"{list(shape)}."
        )
    return (shape[0], units) if node.sequences else (units,)


_RULES = {
    Operation.INPUT: lambda node: node.shape,
    Operation.CONVOLUTION: _convolution,
    Operation.DENSE: _dense,
    Operation.AFFINE: _affine,
    Operation.ADD: _both,
    Operation.SUBTRACT: _both,
    Operation.MULTIPLY: _both,
    Operation.CONCATENATE: _concatenate,
    Operation.POOL: _pool,
    Operation.GLOBAL_POOL: _global_pool,
    Operation.PAD: _pad,
    Operation.UPSAMPLE: _upsample,
    Operation.RESHAPE: _reshape,
    Operation.SOFTMAX: _last_axis,
    Operation.RECURRENT: _recurrent,
}
