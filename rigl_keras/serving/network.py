"""A network as data: what it computes, not how.

`csrc/network.h` has the same in C++. Both read and write the same files
(`network_file`).
"""

import dataclasses
import enum
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = [
    "Activation",
    "Cell",
    "Network",
    "Node",
    "Operation",
    "Output",
    "Padding",
    "check_network",
]


class Operation(enum.IntEnum):
    """What a node computes. Files hold the numbers: they never change."""

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
    RECURRENT = 15  # the loop of an LSTM or a GRU over a sequence


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


class Cell(enum.IntEnum):
    """The gates of a recurrent step, in the order of their columns.

    The numbers never change. Gates are sigmoids, and the activation is tanh.
    """

    LSTM = 0  # input, forget, candidate, output
    GRU = 1  # update, reset, candidate: its product with the state is reset
    GRU_BEFORE = 2  # the same, but the state is reset before the product

    @property
    def gates(self) -> int:
        """How many there are."""
        return 4 if self == Cell.LSTM else 3


@dataclasses.dataclass(frozen=True)
class Padding:
    """Zeros beyond the edges of an image.

    Attributes:
        same: As many as with TensorFlow's `"SAME"`. The numbers are then 0.
        top: Rows above. In a `Pad`, negative numbers crop.
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
    """A step of a network. Its operation determines which fields it uses.

    Images are [rows, columns, channels], all numbers are float32, and shapes do
    not include the batch.

    Attributes:
        operation: What it computes.
        name: For people. For an input, the name by which it is fed.
        inputs: Indices of earlier nodes.
        size: For a pool: rows and columns of its window.
        strides: For a convolution or pool: rows and columns.
        dilations: For a convolution: rows and columns.
        groups: For a convolution. Filter f belongs to group
            f // (filters // groups).
        padding: For a convolution, a pool, and a pad (not `same`).
        kernel: For a convolution, [rows, columns, channels / groups, filters];
            for a dense layer, [inputs, units]; for a recurrent node, which
            reads inputs that are multiplied already, [units, gates * units].
        bias: For the same, [filters] or [units]; empty: none. For a recurrent
            node only with `Cell.GRU`: of the candidate's product with the
            state.
        scale: For an affine step, [channels], or [1] for all of them.
        shift: Likewise.
        activation: The activation.
        a: Its first number, or the value of a pad.
        b: Its second number.
        maximum: For a pool or global pool: the maximum instead of the average.
            Averages are over the pixels of the window that lie in the image.
        keep_axes: For a global pool: returns [1, 1, channels] instead of
            [channels].
        factors: For an upsampling: rows and columns.
        bilinear: For an upsampling: by half-pixel centers, instead of the
            nearest pixel.
        cell: For a recurrent node.
        sequences: For a recurrent node: all outputs, instead of the last.
        backwards: For a recurrent node: from the last step to the first.
        reversed: For a recurrent node: outputs in the opposite order of inputs.
        shape: For an input, -1 where a length is free; for a reshape, -1 for
            the rest.
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
    cell: Cell = Cell.LSTM
    sequences: bool = False
    backwards: bool = False
    reversed: bool = False
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Output:
    """A named result of a network: the value of a node."""

    name: str
    node: int


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Nodes, each after the nodes that it reads.

    Attributes:
        nodes: All nodes. Those with `Operation.INPUT` are the inputs, in order.
        outputs: The results, by name.
        hints: Measurements of a planner. May be empty.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]
    hints: str = ""

    def inputs(self) -> tuple[Node, ...]:
        """Returns the input nodes, in order."""
        return tuple(n for n in self.nodes if n.operation == Operation.INPUT)


_READS_TWO = (Operation.ADD, Operation.SUBTRACT, Operation.MULTIPLY)
_MOST = 2**31 - 1


def check_network(network: Network) -> None:
    """Raises ValueError unless a network is valid.

    Nodes must read earlier nodes, as many as they need; weights must agree with
    each other; numbers must be in range. Shapes of inputs are not checked.

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
                f"{what} must have different names. Used twice: {twice[0]!r}."
            )


def _reads_wrong(node, index):
    if node.operation == Operation.INPUT:
        fits, wanted = not node.inputs, "no nodes"
    elif node.operation in _READS_TWO:
        fits, wanted = len(node.inputs) == 2, "two nodes"
    elif node.operation == Operation.CONCATENATE:
        fits, wanted = len(node.inputs) > 0, "at least one node"
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
            "must have lengths of at least 1, or -1 where one is free. "
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
            "must have equally many filters in each group. Received: "
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
            "must be padded by 0 or more, and by 0 if its padding is "
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
            "must have as many scales as shifts, or one of them. Received: "
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
            "must have lengths of at least 1, or -1 at most once. Received: "
            f"{list(node.shape)}."
        )
    return ""


def _at_least_one(node, *fields):
    for field in fields:
        numbers: Sequence[int] = getattr(node, field)
        if len(numbers) != 2 or not all(0 < n <= _MOST for n in numbers):
            return (
                f"must have two {field} of at least 1. Received: "
                f"{list(numbers)}."
            )
    return ""


def _recurrent(node):
    shape, gates = node.kernel.shape, node.cell.gates
    if len(shape) != 2 or 0 in shape or shape[1] != gates * shape[0]:
        return (
            f"must have a kernel [units, {gates} * units]. Received: "
            f"{list(shape)}."
        )
    allowed = [(0,), shape[:1]] if node.cell == Cell.GRU else [(0,)]
    if node.bias.shape not in allowed:
        return (
            f"must have a bias of one of the shapes {allowed}. Received: "
            f"{node.bias.shape}."
        )
    return ""


def _activation(node):
    if node.activation == Activation.CLIP:
        if not node.a <= node.b:  # or one of them is NaN
            return f"must clip to a <= b. Received: {node.a} and {node.b}."
    elif not (math.isfinite(node.a) and math.isfinite(node.b)):
        return f"must have finite numbers. Received: {node.a} and {node.b}."
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
    Operation.RECURRENT: _recurrent,
}
