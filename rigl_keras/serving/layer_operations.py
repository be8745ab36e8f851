"""Convolutions, dense layers, pools and changes of shape, translated."""

import math

import numpy as np
import tensorflow as tf

from rigl_keras.serving.network import Operation, Padding
from rigl_keras.serving.steps import Step
from rigl_keras.serving.translation import Rows, Translation, UnknownError

__all__ = ["LAYERS"]


def _alias(t: Translation, operation: tf.Operation) -> Step | Rows:
    tensor = operation.inputs[0]
    return t.rows(tensor) or t.read(tensor)


def _cast(t, operation):
    if operation.get_attr("DstT") != tf.float32:
        raise UnknownError("it computes something other than float32")
    return _alias(t, operation)


# Convolutions.


def _conv2d(t, operation):
    x = t.read(operation.inputs[0])
    kernel = t.weights(operation.inputs[1])
    _check_images(operation, x)
    return t.make(
        Operation.CONVOLUTION,
        x,
        kernel=kernel,
        groups=_groups(x, kernel),
        **_windows(operation),
        dilations=_pair(operation, "dilations"),
    )


def _groups(x, kernel):
    channels = x.shape[-1]
    if channels == -1 or channels % kernel.shape[2]:
        raise UnknownError("it does not read as many channels as it has")
    return channels // kernel.shape[2]


def _depthwise(t, operation):
    x = t.read(operation.inputs[0])
    kernel = t.weights(operation.inputs[1])
    _check_images(operation, x)
    return t.make(
        Operation.CONVOLUTION,
        x,
        kernel=_as_grouped(kernel),
        groups=kernel.shape[2],
        **_windows(operation),
        dilations=_pair(operation, "dilations"),
    )


def _as_grouped(kernel):
    """Returns [rows, columns, 1, channels * multiplier]."""
    return kernel.reshape(*kernel.shape[:2], 1, -1)


def _check_images(operation, x):
    if operation.get_attr("data_format") != b"NHWC":
        raise UnknownError("its channels do not come last")
    if len(x.shape) != 3:
        raise UnknownError("it does not read images")


def _windows(operation):
    """Returns strides and padding of a convolution or a pool."""
    return {
        "strides": _pair(operation, "strides"),
        "padding": _padding(operation),
    }


def _pair(operation, attribute):
    batch, rows, columns, channels = operation.get_attr(attribute)
    if batch != 1 or channels != 1:
        raise UnknownError(f"it has {attribute} of the batch or of channels")
    return rows, columns


def _padding(operation):
    kind = operation.get_attr("padding")
    if kind == b"SAME":
        return Padding(same=True)
    if kind == b"VALID":
        return Padding()
    return _around_images(operation.get_attr("explicit_paddings"))


def _around_images(numbers):
    """Returns the padding from eight numbers, two for each axis."""
    if len(numbers) != 8:
        raise UnknownError("it pads or crops neither images nor sequences")
    *batch, top, bottom, left, right, before, after = numbers
    if any(batch) or before or after:
        raise UnknownError("it pads or crops more than rows and columns")
    return Padding(False, top, bottom, left, right)


def _batch_to_space(t, operation):
    """A dilated convolution, as TensorFlow computes it on the CPU.

    TensorFlow makes images of each d-th row and column, convolves them, and
    joins them again: space to batch, (expand an axis), convolution, (squeeze
    it), batch to space.
    """
    block = t.numbers(operation.inputs[1])
    crops = t.numbers(operation.inputs[2])
    inner = operation.inputs[0].op
    squeezed = inner.type == "Squeeze"
    if squeezed:
        inner = inner.inputs[0].op
    if inner.type not in ("Conv2D", "DepthwiseConv2dNative"):
        raise UnknownError("no convolution comes before it")
    outer = inner.inputs[0].op
    expanded = outer.type == "ExpandDims"
    if expanded:
        outer = outer.inputs[0].op
    plain = _windows(inner) == {"strides": (1, 1), "padding": Padding()}
    if (
        outer.type != "SpaceToBatchND"
        or t.numbers(outer.inputs[1]) != block
        or not plain
        or _pair(inner, "dilations") != (1, 1)
        or inner.get_attr("data_format") != b"NHWC"
    ):
        raise UnknownError("it is not the end of a dilated convolution")
    paddings = t.numbers(outer.inputs[2])
    around = [more - less for more, less in zip(paddings, crops, strict=True)]
    x = t.read(outer.inputs[0])
    kernel = t.weights(inner.inputs[1])
    if len(block) == 1:  # a sequence, as an image of one row
        x = _as_row(t, x)
        block, around = [1, *block], [0, 0, *around]
    if inner.type == "Conv2D":
        groups = _groups(x, kernel)
    else:
        groups, kernel = kernel.shape[2], _as_grouped(kernel)
    padded = t.make(Operation.PAD, x, padding=Padding(False, *around))
    y = t.make(
        Operation.CONVOLUTION,
        padded,
        kernel=kernel,
        groups=groups,
        dilations=tuple(block),
    )
    if squeezed and expanded and len(operation.inputs[0].shape) == 3:
        return t.reshaped(y, y.shape[1:])
    return y


def _as_row(t, x):
    """Returns a sequence [length, channels] as an image of one row."""
    if len(x.shape) != 2:
        raise UnknownError("it reads neither images nor sequences")
    return t.reshaped(x, (1, *x.shape))


# Dense layers.


def _matmul(t, operation):
    if operation.get_attr("transpose_a"):
        raise UnknownError("it reads a transposed matrix")
    kernel = t.weights(operation.inputs[1])
    if operation.get_attr("transpose_b"):
        kernel = kernel.T
    return t.each(
        operation.inputs[0],
        lambda x: t.make(Operation.DENSE, x, kernel=kernel),
    )


def _batch_matmul(t, operation):
    kernel = t.weights(operation.inputs[1])
    if operation.get_attr("adj_x") or math.prod(kernel.shape[:-2]) != 1:
        raise UnknownError("it multiplies by more than one matrix")
    kernel = kernel.reshape(kernel.shape[-2:])
    if operation.get_attr("adj_y"):
        kernel = kernel.T
    x = t.read(operation.inputs[0])
    return t.make(Operation.DENSE, x, kernel=kernel)


def _einsum(t, operation):
    """`abc,cde->abde`: a product of the last axes of x and a constant."""
    equation = operation.get_attr("equation").decode().replace(" ", "")
    reads, result = equation.split("->")
    if len(operation.inputs) != 2 or reads.count(",") != 1 or "." in equation:
        raise UnknownError("it is not a product of a value and a kernel")
    x = t.read(operation.inputs[0])
    kernel = t.weights(operation.inputs[1])
    of_x, of_kernel = reads.split(",")
    left = [axis for axis in of_x if axis in result]
    summed = [axis for axis in of_x if axis not in result]
    new = [axis for axis in result if axis not in of_x]
    if (
        of_x != "".join(left + summed)
        or result != "".join(left + new)
        or sorted(of_kernel) != sorted(summed + new)
        or len(set(of_x)) < len(of_x)
        or not (left and summed and new)
    ):
        raise UnknownError(f"it computes {equation}")
    kernel = np.transpose(
        kernel, [of_kernel.index(axis) for axis in summed + new]
    )
    units = kernel.shape[len(summed) :]
    inputs = math.prod(kernel.shape[: len(summed)])
    kept = x.shape[: len(left) - 1]
    x = t.reshaped(x, (*kept, inputs))
    y = t.make(Operation.DENSE, x, kernel=kernel.reshape(inputs, -1))
    return t.reshaped(y, (*kept, *units))


# Pools.


def _max_pool(t, operation):
    return _pool(t, operation, True)


def _average_pool(t, operation):
    return _pool(t, operation, False)


def _pool(t, operation, maximum):
    x = t.read(operation.inputs[0])
    _check_images(operation, x)
    return t.make(
        Operation.POOL,
        x,
        maximum=maximum,
        size=_pair(operation, "ksize"),
        **_windows(operation),
    )


def _mean(t, operation):
    return _global_pool(t, operation, False)


def _maximum(t, operation):
    return _global_pool(t, operation, True)


def _global_pool(t, operation, maximum):
    x = t.read(operation.inputs[0])
    rank = len(x.shape) + 1
    axes = sorted({n % rank for n in t.numbers(operation.inputs[1])})
    keep = operation.get_attr("keep_dims")
    if rank == 3 and axes == [1]:
        pooled = t.make(Operation.GLOBAL_POOL, _as_row(t, x), maximum=maximum)
        return t.reshaped(pooled, (1, x.shape[1])) if keep else pooled
    if rank != 4 or axes != [1, 2]:
        raise UnknownError(f"it reduces the axes {axes} of {rank}")
    return t.make(Operation.GLOBAL_POOL, x, maximum=maximum, keep_axes=keep)


# Changes of shape.


def _pad(t, operation):
    x = t.read(operation.inputs[0])
    numbers = t.numbers(operation.inputs[1])
    value = 0.0
    if len(operation.inputs) > 2:
        value = float(t.weights(operation.inputs[2]))
    return _padded(t, x, numbers, value)


def _padded(t, x, numbers, value=0.0):
    """Returns an image or sequence, padded by two numbers for each axis."""
    if not any(numbers):
        return x
    if len(x.shape) == 2:
        before, after = numbers[2:4]
        around = [*numbers[:2], 0, 0, before, after, *numbers[4:]]
        y = _padded(t, _as_row(t, x), around, value)
        return t.reshaped(y, y.shape[1:])
    return t.make(Operation.PAD, x, padding=_around_images(numbers), a=value)


def _strided_slice(t, operation):
    """Cropping: one piece of each axis is left."""
    x = t.read(operation.inputs[0])
    begin, end, strides = (t.numbers(operation.inputs[i]) for i in (1, 2, 3))
    masks = ("ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    if any(operation.get_attr(m) for m in masks) or set(strides) != {1}:
        raise UnknownError("it takes more than a piece out of an image")
    numbers = []
    for axis, length in enumerate((None, *x.shape)):
        first, last = 0, 0
        in_begin = not operation.get_attr("begin_mask") >> axis & 1
        in_end = not operation.get_attr("end_mask") >> axis & 1
        free = length in (None, -1)
        if axis < len(begin) and in_begin:
            first = begin[axis]
            if first < 0:
                raise UnknownError("it counts from the end")
        if axis < len(end) and in_end:
            last = -end[axis]
            if end[axis] >= 0:
                if free:
                    raise UnknownError("it crops an axis of unknown length")
                last = max(length - end[axis], 0)
        numbers += [-first, -last]
    return _padded(t, x, numbers)


def _transpose(t, operation):
    order = t.numbers(operation.inputs[1])
    if order == sorted(order):
        return _alias(t, operation)
    x = t.read(operation.inputs[0])
    # An axis of length 1 may go anywhere.
    lengths = (None, *x.shape)
    longer = [axis for axis in order if lengths[axis] != 1]
    if longer != sorted(longer) or order[0] != 0:
        raise UnknownError("it moves axes")
    return t.reshaped(x, tuple(x.shape[axis - 1] for axis in order[1:]))


def _expand_dims(t, operation):
    x = t.read(operation.inputs[0])
    (axis,) = t.numbers(operation.inputs[1])
    axis %= len(x.shape) + 2
    if axis == 0:
        raise UnknownError("it adds an axis before the batch")
    return t.reshaped(x, (*x.shape[: axis - 1], 1, *x.shape[axis - 1 :]))


def _squeeze(t, operation):
    x = t.read(operation.inputs[0])
    rank = len(x.shape) + 1
    axes = {n % rank for n in operation.get_attr("squeeze_dims")}
    if not axes or 0 in axes:
        raise UnknownError("it may remove the batch")
    shape = tuple(n for i, n in enumerate(x.shape, 1) if i not in axes)
    if not shape:
        raise UnknownError("it leaves no axis except the batch")
    return t.reshaped(x, shape)


def _reshape(t, operation):
    source = operation.inputs[0]
    targets = t.contents(operation.inputs[1])
    rows = t.rows(source)
    x = rows.step if rows else t.read(source)
    totals = [math.prod(lengths) for lengths in t.lengths(x)]
    for target, total in zip(targets, totals, strict=True):
        if -1 in target:
            known = -math.prod(target)
            target[target.index(-1)] = total // known
    lengths = t.lengths(x)
    if targets == [list(one) for one in lengths]:
        return x
    if _are_rows(targets, lengths) and targets[0][0] != lengths[0][0]:
        return Rows(x)
    upsampled = _upsampled_by_tiles(t, operation, targets)
    if upsampled is not None:
        return upsampled
    if [target[0] for target in targets] != [one[0] for one in lengths]:
        raise UnknownError("it changes the batch")
    shape = tuple(
        one if one == other else -1
        for one, other in zip(targets[0][1:], targets[1][1:], strict=True)
    )
    if not shape or shape.count(-1) > 1:
        raise UnknownError("its shape is unknown")
    return t.reshaped(x, shape)


def _are_rows(targets, lengths):
    return all(
        len(target) == 2 and target == [math.prod(one[:-1]), one[-1]]
        for target, one in zip(targets, lengths, strict=True)
    )


def _upsampled_by_tiles(t, operation, targets):
    """Returns repeated rows or columns: expand, tile, reshape."""
    tile = operation.inputs[0].op
    if tile.type != "Tile" or tile.inputs[0].op.type != "ExpandDims":
        return None
    expand = tile.inputs[0].op
    x = t.read(expand.inputs[0])
    rank = len(x.shape) + 1
    (axis,) = (n % (rank + 1) for n in t.numbers(expand.inputs[1]))
    multiples = t.contents(tile.inputs[1])
    factor = multiples[0][axis]
    repeats = [factor if i == axis else 1 for i in range(rank + 1)]
    wanted = [
        [n * factor if i == axis - 1 else n for i, n in enumerate(one)]
        for one in t.lengths(x)
    ]
    if multiples != [repeats] * 2 or targets != wanted or factor < 1:
        return None
    if rank == 4 and axis in (2, 3):
        factors = (factor, 1) if axis == 2 else (1, factor)
        return t.make(Operation.UPSAMPLE, x, factors=factors)
    if rank == 3 and axis == 2:
        y = t.make(Operation.UPSAMPLE, _as_row(t, x), factors=(1, factor))
        return t.reshaped(y, y.shape[1:])
    return None


def _nearest(t, operation):
    return _resize(t, operation, False)


def _bilinear(t, operation):
    if not operation.get_attr("half_pixel_centers"):
        raise UnknownError("its pixels have no half-pixel centers")
    return _resize(t, operation, True)


def _resize(t, operation, bilinear):
    x = t.read(operation.inputs[0])
    if operation.get_attr("align_corners") or len(x.shape) != 3:
        raise UnknownError("it aligns corners, or does not read images")
    sizes = t.contents(operation.inputs[1])
    factors = {
        tuple(new / old for new, old in zip(size, one[1:3], strict=True))
        for size, one in zip(sizes, t.lengths(x), strict=True)
    }
    if len(factors) > 1 or any(
        n != int(n) or n < 1 for n in next(iter(factors))
    ):
        raise UnknownError("it does not enlarge by whole factors")
    rows, columns = map(int, factors.pop())
    return t.make(
        Operation.UPSAMPLE,
        x,
        factors=(int(rows), int(columns)),
        bilinear=bilinear,
    )


def _concatenate(t, operation):
    *tensors, last = operation.inputs
    steps = [t.read(tensor) for tensor in tensors]
    (axis,) = t.numbers(last)
    rank = len(steps[0].shape) + 1
    if axis % rank != rank - 1:
        raise UnknownError(f"it joins axis {axis} of {rank}")
    if len(steps) == 1:
        return steps[0]
    return t.make(Operation.CONCATENATE, *steps)


LAYERS = {
    "Identity": _alias,
    "IdentityN": _alias,
    "StopGradient": _alias,
    "PreventGradient": _alias,
    "Snapshot": _alias,
    "EnsureShape": _alias,
    "Cast": _cast,
    "Conv2D": _conv2d,
    "DepthwiseConv2dNative": _depthwise,
    "BatchToSpaceND": _batch_to_space,
    "MatMul": _matmul,
    "BatchMatMul": _batch_matmul,
    "BatchMatMulV2": _batch_matmul,
    "BatchMatMulV3": _batch_matmul,
    "Einsum": _einsum,
    "MaxPool": _max_pool,
    "AvgPool": _average_pool,
    "Mean": _mean,
    "Max": _maximum,
    "Pad": _pad,
    "PadV2": _pad,
    "StridedSlice": _strided_slice,
    "Transpose": _transpose,
    "ExpandDims": _expand_dims,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "ResizeNearestNeighbor": _nearest,
    "ResizeBilinear": _bilinear,
    "ConcatV2": _concatenate,
}
