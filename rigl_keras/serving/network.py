"""A network as data: what is computed, and nothing of how.

`csrc/network.h` has the same in C++, and a file (`network_file`) is what both
read and write.
"""

import dataclasses
import enum
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = [
    "Activation",
    "Network",
    "Node",
    "Operation",
    "Output",
    "Padding",
    "check_network",
]


class Operation(enum.IntEnum):
    """What a node computes. The numbers stand in files: they never change."""

    INPUT = 0
    CONVOLUTION = 1  # also depthwise (as many groups as channels)
    DENSE = 2  # over the last axis
    AFFINE = 3  # x * scale + shift, by the last axis
    ACTIVATION = 4
    ADD = 5
    SUBTRACT = 6
    MULTIPLY = 7
    CONCATENATE = 8  # along the last axis
    POOL = 9
    GLOBAL_POOL = 10
    PAD = 11
    UPSAMPLE = 12
    RESHAPE = 13
    SOFTMAX = 14  # over the last axis


class Activation(enum.IntEnum):
    """What an activation computes. The numbers never change."""

    RELU = 0
    CLIP = 1  # min(max(x, a), b): relu6 is 0 and 6
    LEAKY_RELU = 2  # x < 0 ? a x : x
    ELU = 3  # x < 0 ? a (exp(x) - 1) : x
    SIGMOID = 4
    TANH = 5
    SILU = 6  # x sigmoid(x)
    GELU = 7  # by the error function
    GELU_TANH = 8  # by tanh
    HARD_SIGMOID = 9  # min(max(x / 6 + 1 / 2, 0), 1)
    HARD_SILU = 10  # x hard_sigmoid(x)
    SOFTPLUS = 11
    SELU = 12
    EXPONENTIAL = 13


@dataclasses.dataclass(frozen=True)
class Padding:
    """Zeros beyond the edges of an image.

    Attributes:
        same: As many as TensorFlow's `"SAME"`. The numbers are 0 then.
        top: Rows above, and so on. Of a `Pad` a negative number crops.
        bottom: Rows below.
        left: Columns on the left.
        right: Columns on the right.
    """

    same: bool = False
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def numbers(self) -> tuple[int, int, int, int]:
        """Returns top, bottom, left and right."""
        return self.top, self.bottom, self.left, self.right


def _no_array():
    return np.zeros(0, np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A step of a network. Which fields it has depends on its operation.

    Images are [rows, columns, channels], all numbers float32, and shapes have
    no batch.

    Attributes:
        operation: What it computes.
        name: For people. Of an input, what it is fed by.
        inputs: Indices of nodes before this one.
        size: Of a pool, rows and columns of its window.
        strides: Of a convolution or pool, rows and columns.
        dilations: Of a convolution, rows and columns.
        groups: Of a convolution. Filter f belongs to group
            f // (filters // groups).
        padding: Of a convolution, a pool, and a pad (not `same`).
        kernel: Of a convolution, [rows, columns, channels / groups, filters];
            of a dense layer [inputs, units].
        bias: Of those, [filters] or [units]; empty: none.
        scale: Of an affine step, [channels], or [1] for all of them.
        shift: The same.
        activation: Which one.
        a: Its first number; what a pad pads with.
        b: Its second one.
        maximum: Of a pool or global pool: the maximum, not the average. An
            average is that of the window's pixels that lie in the image.
        keep_axes: Of a global pool: returns [1, 1, channels], not [channels].
        factors: Of an upsampling, rows and columns.
        bilinear: Of an upsampling: by half-pixel centers, not the nearest.
        shape: Of an input, -1 where a length is free; of a reshape, -1 for
            what is left.
    """

    operation: Operation
    name: str = ""
    inputs: tuple[int, ...] = ()
    size: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    padding: Padding = Padding()
    kernel: np.ndarray = dataclasses.field(default_factory=_no_array)
    bias: np.ndarray = dataclasses.field(default_factory=_no_array)
    scale: np.ndarray = dataclasses.field(default_factory=_no_array)
    shift: np.ndarray = dataclasses.field(default_factory=_no_array)
    activation: Activation = Activation.RELU
    a: float = 0.0
    b: float = 0.0
    maximum: bool = False
    keep_axes: bool = False
    factors: tuple[int, int] = (1, 1)
    bilinear: bool = False
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Output:
    """What a network returns by a name: the value of a node."""

    name: str
    node: int


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Nodes, each after those that it reads.

    Attributes:
        nodes: The inputs are those of `Operation.INPUT`, in this order.
        outputs: What is returned, by name.
        hints: What a planner has measured. May be empty.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]
    hints: str = ""

    def inputs(self) -> tuple[Node, ...]:
        """Returns the nodes that are fed, in their order."""
        return tuple(n for n in self.nodes if n.operation == Operation.INPUT)


_READS_TWO = (Operation.ADD, Operation.SUBTRACT, Operation.MULTIPLY)
_MOST = 2**31 - 1


def check_network(network: Network) -> None:
    """Raises ValueError unless a network is one.

    Nodes read earlier ones, as many as they need; weights agree with one
    another; numbers are in their range. What depends on the shapes of inputs
    is not checked.

    Args:
        network: The network.
    """
    for i, node in enumerate(network.nodes):
        wrong = _reads_wrong(node, i) or _CHECKS.get(node.operation, _right)(
            node
        )
        if wrong:
            raise ValueError(
                f"Node {i} ({node.operation.name}, {node.name!r}) {wrong}"
            )
    if not network.outputs:
        raise ValueError("A network must have an output. It has none.")
    for output in network.outputs:
        if not 0 <= output.node < len(network.nodes):
            raise ValueError(
                f"Output {output.name!r} must be one of "
                f"{len(network.nodes)} nodes. Received: {output.node}."
            )
    for what, names in (
        ("Inputs", [node.name for node in network.inputs()]),
        ("Outputs", [output.name for output in network.outputs]),
    ):
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise ValueError(
                f"{what} must have different names. Twice there: {twice[0]!r}."
            )


def _reads_wrong(node, index):
    if node.operation == Operation.INPUT:
        fits, wanted = not node.inputs, "no nodes"
    elif node.operation in _READS_TWO:
        fits, wanted = len(node.inputs) == 2, "two nodes"
    elif node.operation == Operation.CONCATENATE:
        fits, wanted = len(node.inputs) > 0, "one node or more"
    else:
        fits, wanted = len(node.inputs) == 1, "one node"
    if not fits:
        return f"must read {wanted}. It reads {len(node.inputs)}."
    if not all(0 <= i < index for i in node.inputs):
        return f"must read nodes before it. It reads {list(node.inputs)}."
    return ""


def _right(node):
    return ""


def _input(node):
    if not all(n == -1 or 0 < n <= _MOST for n in node.shape):
        return (
            "must have lengths of 1 or more, or -1 where one is free. "
            f"Received: {list(node.shape)}."
        )
    return ""


def _convolution(node):
    shape = node.kernel.shape
    if len(shape) != 4 or 0 in shape:
        return (
            "must have a kernel [rows, columns, channels / groups, filters]. "
            f"Received: {list(shape)}."
        )
    wrong = _at_least_one(node, "strides", "dilations")
    if wrong:
        return wrong
    if not 0 < node.groups <= shape[3] or shape[3] % node.groups:
        return (
            "must have as many filters in each group. Received: "
            f"{shape[3]} filters and {node.groups} groups."
        )
    return _bias(node) or _padding(node)


def _dense(node):
    shape = node.kernel.shape
    if len(shape) != 2 or 0 in shape:
        return f"must have a kernel [inputs, units]. Received: {list(shape)}."
    return _bias(node)


def _bias(node):
    if node.bias.shape not in ((0,), node.kernel.shape[-1:]):
        return (
            f"must have a bias [{node.kernel.shape[-1]}], or an empty one. "
            f"Received: {list(node.bias.shape)}."
        )
    return ""


def _padding(node):
    numbers = node.padding.numbers()
    if min(numbers) < 0 or (node.padding.same and any(numbers)):
        return (
            "must be padded by 0 or more, and by 0 where its padding is "
            f"'same'. Received: {node.padding}."
        )
    return ""


def _affine(node):
    scale, shift = node.scale.shape, node.shift.shape
    if len(scale) != 1 or len(shift) != 1 or 0 in scale + shift:
        return (
            "must have a vector of scales and one of shifts. Received: "
            f"{list(scale)} and {list(shift)}."
        )
    if scale != shift and (1,) not in (scale, shift):
        return (
            "must have as many scales as shifts, or one of either. Received: "
            f"{scale[0]} and {shift[0]}."
        )
    return ""


def _pool(node):
    wrong = _at_least_one(node, "size", "strides") or _padding(node)
    if wrong:
        return wrong
    top, bottom, left, right = node.padding.numbers()
    if max(top, bottom) >= node.size[0] or max(left, right) >= node.size[1]:
        return (
            "must be padded by less than its window, so that each window holds "
            f"a pixel. Received: {node.padding} and {list(node.size)}."
        )
    return ""


def _pad(node):
    if node.padding.same:
        return "must be padded by numbers. Received: 'same'."
    return ""


def _upsample(node):
    return _at_least_one(node, "factors")


def _reshape(node):
    free = sum(n == -1 for n in node.shape)
    if free > 1 or not all(n == -1 or 0 < n <= _MOST for n in node.shape):
        return (
            "must have lengths of 1 or more, or -1 at most once. Received: "
            f"{list(node.shape)}."
        )
    return ""


def _at_least_one(node, *fields):
    for field in fields:
        numbers: Sequence[int] = getattr(node, field)
        if len(numbers) != 2 or not all(0 < n <= _MOST for n in numbers):
            return (
                f"must have two {field} of 1 or more. Received: "
                f"{list(numbers)}."
            )
    return ""


def _activation(node):
    if not (math.isfinite(node.a) and math.isfinite(node.b)):
        return f"must have finite numbers. Received: {node.a} and {node.b}."
    if node.activation == Activation.CLIP and node.a > node.b:
        return f"must clip to a <= b. Received: {node.a} and {node.b}."
    return ""


_CHECKS = {
    Operation.INPUT: _input,
    Operation.CONVOLUTION: _convolution,
    Operation.DENSE: _dense,
    Operation.AFFINE: _affine,
    Operation.ACTIVATION: _activation,
    Operation.POOL: _pool,
    Operation.PAD: _pad,
    Operation.UPSAMPLE: _upsample,
    Operation.RESHAPE: _reshape,
}
