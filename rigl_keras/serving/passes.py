"""Passes that make a network smaller.

Each pass changes how steps compute their values, never the values. Products of
weights are computed in float64.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np

from rigl_keras.serving.network import Activation, Node, Operation, Padding
from rigl_keras.serving.steps import Step, readers, sorted_steps

__all__ = ["simplify"]

_LINEAR = (Operation.CONVOLUTION, Operation.DENSE)
_ELEMENTWISE = (Operation.AFFINE, Operation.ACTIVATION)
_BINARY = (Operation.ADD, Operation.SUBTRACT, Operation.MULTIPLY)


def simplify(ends: Iterable[Step]) -> list[Step]:
    """Simplifies the steps that results need.

    Args:
        ends: The results.

    Returns:
        The results; other steps with the same values may replace some.
    """
    ends = list(ends)
    changed = True
    while changed:
        ends = _without_identities(ends)
        steps = sorted_steps(ends)
        read_by = readers(steps, ends)

        def is_read_once(step, read_by=read_by):
            return len(read_by[id(step)]) == 1

        changed = False
        for step in steps:
            for rule in _RULES:
                if step.node is not None and rule(step, is_read_once):
                    # Readers have changed: only the next round knows them.
                    changed = True
                    break
    return ends


def _without_identities(ends):
    """Returns ends, without steps that return what they read."""

    def source(step):
        while step.node is not None and _is_identity(step):
            step = step.reads[0]
        return step

    for step in sorted_steps(ends):
        step.reads = [source(read) for read in step.reads]
    _share_equal_steps(ends)
    return [source(step) for step in ends]


def _is_identity(step):
    node = step.node
    if node.operation == Operation.RESHAPE:
        return step.shape == step.reads[0].shape
    if node.operation == Operation.PAD:
        return not any(node.padding.numbers())
    if node.operation == Operation.AFFINE:
        return bool((node.scale == 1).all() and (node.shift == 0).all())
    return node.operation == Operation.UPSAMPLE and node.factors == (1, 1)


def _share_equal_steps(ends):
    """Merges steps that compute the same from the same inputs."""
    found, same = {}, {}
    for step in sorted_steps(ends):
        step.reads = [same.get(id(read), read) for read in step.reads]
        if step.node is None or step.is_a(
            Operation.INPUT, *_LINEAR, Operation.RECURRENT
        ):
            continue
        fields = dataclasses.asdict(dataclasses.replace(step.node, name=""))
        key = (
            tuple(id(read) for read in step.reads),
            *(
                field.tobytes() if isinstance(field, np.ndarray) else str(field)
                for field in fields.values()
            ),
        )
        same[id(step)] = found.setdefault(key, step)


# Affine steps.


def _affine_of_affine(step, is_read_once):
    if not step.is_a(Operation.AFFINE):
        return False
    (inner,) = step.reads
    if not (inner.is_a(Operation.AFFINE) and is_read_once(inner)):
        return False
    scale, shift = step.node.scale, step.node.shift
    node = dataclasses.replace(
        step.node,
        scale=inner.node.scale * scale,
        shift=inner.node.shift * scale + shift,
    )
    step.become(node, inner.reads[0])
    return True


def _affine_of_linear(step, is_read_once):
    """A batch norm after a convolution becomes part of it."""
    if not step.is_a(Operation.AFFINE):
        return False
    (inner,) = step.reads
    if not (inner.is_a(*_LINEAR) and is_read_once(inner)):
        return False
    kernel, bias = _weights(inner.node)
    scale, shift = step.node.scale, step.node.shift
    step.become(
        _with_weights(inner.node, kernel * scale, bias * scale + shift),
        *inner.reads,
    )
    return True


def _linear_of_affine(step, is_read_once):
    """Exact without padding: the affine step does not shift padded zeros."""
    if not step.is_a(*_LINEAR):
        return False
    (inner,) = step.reads
    if not (inner.is_a(Operation.AFFINE) and is_read_once(inner)):
        return False
    scale, shift = inner.node.scale, inner.node.shift
    if _pads(step.node) and (shift != 0).any():
        return False
    kernel, bias = _weights(step.node)
    channels = inner.shape[-1]
    filters, groups = kernel.shape[-1], step.node.groups
    # For each filter, those of the channels that it reads.
    scale, shift = (
        np.repeat(
            np.broadcast_to(vector, channels).reshape(groups, -1),
            filters // groups,
            axis=0,
        ).T
        for vector in (scale, shift)
    )
    axes = tuple(range(kernel.ndim - 1))
    bias = bias + (kernel * shift).sum(axis=axes)
    step.become(_with_weights(step.node, kernel * scale, bias), *inner.reads)
    return True


def _weights(node):
    """Returns kernel and bias in float64; a missing bias is zero."""
    kernel = node.kernel.astype(np.float64)
    bias = np.zeros(kernel.shape[-1])
    return kernel, bias + node.bias if len(node.bias) else bias


def _with_weights(node, kernel, bias):
    if not bias.any():
        bias = np.zeros(0)
    return dataclasses.replace(node, kernel=kernel, bias=bias)


def _pads(node):
    """Returns whether a layer may read zeros beyond an image."""
    if node.operation == Operation.DENSE:
        return False
    if node.padding.same:
        return node.kernel.shape[:2] != (1, 1)
    return any(node.padding.numbers())


# Padding.


def _windows_of_pad(step, is_read_once):
    """Zeros around an image become padding of the reading step."""
    if not step.is_a(Operation.CONVOLUTION, Operation.POOL):
        return False
    (inner,) = step.reads
    if not inner.is_a(Operation.PAD) or min(inner.node.padding.numbers()) < 0:
        return False
    (source,) = inner.reads
    if step.node.operation == Operation.CONVOLUTION:
        may = inner.node.a == 0
    else:  # padding of a maximum is below every number
        may = step.node.maximum and (
            inner.node.a <= -np.finfo(np.float32).max
            or (inner.node.a == 0 and _is_never_negative(source))
        )
    own = _explicit(step.node, inner.shape)
    if not may or own is None:
        return False
    around = [
        one + other
        for one, other in zip(inner.node.padding.numbers(), own, strict=True)
    ]
    if step.node.operation == Operation.POOL and (
        max(around[:2]) >= step.node.size[0]
        or max(around[2:]) >= step.node.size[1]
    ):
        return False
    padding = Padding(False, *around)
    step.become(dataclasses.replace(step.node, padding=padding), source)
    return True


def _explicit(node, shape):
    """Returns the padding of a convolution or pool for an image shape."""
    if not node.padding.same:
        return node.padding.numbers()
    sizes = node.size
    if node.operation == Operation.CONVOLUTION:
        sizes = node.kernel.shape[:2]
    numbers = []
    for axis, size in enumerate(sizes):
        length, stride = shape[axis], node.strides[axis]
        dilation = node.dilations[axis]
        total = (size - 1) * dilation
        if stride > 1:
            if length == -1:
                return None
            places = -(-length // stride)
            total = max((places - 1) * stride + total + 1 - length, 0)
        numbers += [total // 2, total - total // 2]
    return tuple(numbers)


_NEVER_NEGATIVE = {
    Activation.RELU,
    Activation.SIGMOID,
    Activation.HARD_SIGMOID,
    Activation.SOFTPLUS,
    Activation.EXPONENTIAL,
}


def _is_never_negative(step):
    if step.is_a(Operation.SOFTMAX):
        return True
    return step.is_a(Operation.ACTIVATION) and (
        step.node.activation in _NEVER_NEGATIVE
        or (step.node.activation == Activation.CLIP and step.node.a >= 0)
    )


def _pad_of_pad(step, is_read_once):
    if not step.is_a(Operation.PAD) or not step.reads[0].is_a(Operation.PAD):
        return False
    (inner,) = step.reads
    numbers = [n.node.padding.numbers() for n in (step, inner)]
    if step.node.a != inner.node.a or min(map(min, numbers)) < 0:
        return False
    padding = Padding(False, *map(sum, zip(*numbers, strict=True)))
    step.become(dataclasses.replace(step.node, padding=padding), *inner.reads)
    return True


# Activations, upsampling and pools.


def _clip_of_clip(step, is_read_once):
    limits = _limits(step)
    if limits is None:
        return False
    a, b = limits
    (source,) = step.reads
    inner = _limits(source)
    if inner is not None:
        a, b = (min(max(n, a), b) for n in inner)
        (source,) = source.reads
    kind = Activation.CLIP
    if a == 0 and b == math.inf:
        kind, b = Activation.RELU, 0.0
    node = dataclasses.replace(step.node, activation=kind, a=a, b=b)
    if inner is None and kind == step.node.activation:
        return False
    step.become(node, source)
    return True


def _limits(step):
    """Returns the least and the largest value of a ReLU or clipped value."""
    if not step.is_a(Operation.ACTIVATION):
        return None
    if step.node.activation == Activation.RELU:
        return 0.0, math.inf
    if step.node.activation == Activation.CLIP:
        return step.node.a, step.node.b
    return None


def _upsample_of_upsample(step, is_read_once):
    """Repetition of rows, then of columns."""
    if not step.is_a(Operation.UPSAMPLE) or step.node.bilinear:
        return False
    (inner,) = step.reads
    if not inner.is_a(Operation.UPSAMPLE) or inner.node.bilinear:
        return False
    factors = tuple(
        one * other
        for one, other in zip(
            step.node.factors, inner.node.factors, strict=True
        )
    )
    step.become(dataclasses.replace(step.node, factors=factors), *inner.reads)
    return True


def _reshape_of_global_pool(step, is_read_once):
    if not step.is_a(Operation.RESHAPE):
        return False
    (inner,) = step.reads
    if not (inner.is_a(Operation.GLOBAL_POOL) and is_read_once(inner)):
        return False
    channels = inner.shape[-1]
    if step.shape not in ((channels,), (1, 1, channels)):
        return False
    keep = len(step.shape) == 3
    step.become(dataclasses.replace(inner.node, keep_axes=keep), *inner.reads)
    return True


# Reshapes move down, where they meet and cancel.


def _reshape_of_reshape(step, is_read_once):
    if not step.is_a(Operation.RESHAPE):
        return False
    (inner,) = step.reads
    if not inner.is_a(Operation.RESHAPE):
        return False
    step.become(step.node, *inner.reads)
    return True


def _moved_before_reshapes(step, is_read_once):
    """Computes a step before its inputs are reshaped."""
    if not step.is_a(
        *_ELEMENTWISE,
        *_BINARY,
        Operation.DENSE,
        Operation.SOFTMAX,
        Operation.CONCATENATE,
    ):
        return False
    if not all(read.is_a(Operation.RESHAPE) for read in step.reads):
        return False
    sources = [read.reads[0] for read in step.reads]
    shapes = [source.shape for source in sources]
    if step.is_a(*_BINARY):
        may = shapes[0] == shapes[1] and -1 not in shapes[0]
        may = may and step.reads[0].shape == step.reads[1].shape
    elif step.is_a(Operation.CONCATENATE):
        may = all(_last_is_kept(read) for read in step.reads)
        may = may and len({shape[:-1] for shape in shapes}) == 1
    else:
        (read,) = step.reads
        by_channel = not step.is_a(Operation.ACTIVATION) and not (
            step.is_a(Operation.AFFINE)
            and len(step.node.scale) == len(step.node.shift) == 1
        )
        may = not by_channel or _last_is_kept(read)
    if not may:
        return False
    inner = Step.of(step.node, sources, step.tensor)
    step.become(_reshape_to(step), inner)
    return True


def _last_is_kept(reshape):
    return reshape.shape[-1:] == reshape.reads[0].shape[-1:] != (-1,)


def _reshape_to(step):
    name = f"{step.node.name}/reshaped"
    return Node(Operation.RESHAPE, name, shape=step.shape)


def _dense_of_image(step, is_read_once):
    """A dense layer on a flat image is a convolution with one position."""
    if not step.is_a(Operation.DENSE):
        return False
    (inner,) = step.reads
    if not inner.is_a(Operation.RESHAPE) or len(inner.shape) != 1:
        return False
    (source,) = inner.reads
    if len(source.shape) != 3 or source.shape[:2] == (1, 1):
        return False
    if -1 in source.shape:
        return False
    node = dataclasses.replace(
        step.node,
        operation=Operation.CONVOLUTION,
        kernel=step.node.kernel.reshape(*source.shape, -1),
    )
    step.become(_reshape_to(step), Step.of(node, [source], step.tensor))
    return True


_RULES: tuple[Callable[[Step, Callable[[Step], bool]], bool], ...] = (
    _affine_of_affine,
    _affine_of_linear,
    _linear_of_affine,
    _windows_of_pad,
    _pad_of_pad,
    _clip_of_clip,
    _upsample_of_upsample,
    _reshape_of_global_pool,
    _reshape_of_reshape,
    _moved_before_reshapes,
    _dense_of_image,
)
