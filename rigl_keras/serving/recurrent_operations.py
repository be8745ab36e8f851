"""The loops of LSTM and GRU layers, translated.

TensorFlow's graph of such a loop is long, and differs from version to version.
So the exporter puts it into a function, whose mark says what it computes.
"""

import dataclasses
import json

import numpy as np
import tensorflow as tf

from rigl_keras.serving.network import Cell, Operation
from rigl_keras.serving.steps import Step
from rigl_keras.serving.translation import Translation, UnknownError

__all__ = ["RECURRENT", "Loop"]

_MARK = "rigl_keras.recurrent"


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a marked function computes.

    It takes the inputs [batch, steps, inputs], each state before the first
    step, the kernel, the recurrent kernel and, if the layer has one, the bias.
    It returns one tensor.

    Attributes:
        cell: The gates.
        sequences: Whether it returns all outputs, in the order in which they
            are computed, or the last.
        backwards: Whether the last step comes first.
    """

    cell: Cell
    sequences: bool
    backwards: bool

    @property
    def mark(self) -> str:
        """The mark of the function."""
        return f"{_MARK} {json.dumps(dataclasses.astuple(self))}"

    @classmethod
    def of(cls, mark: str) -> "Loop":
        """Returns what a function with a mark computes.

        Args:
            mark: The mark.

        Raises:
            UnknownError: It is another mark.
        """
        name, _, fields = mark.partition(" ")
        if name != _MARK:
            raise UnknownError("no network computes it")
        cell, sequences, backwards = json.loads(fields)
        return cls(Cell(cell), sequences, backwards)


def _call(t: Translation, operation: tf.Operation) -> Step:
    loop = Loop.of(t.graph.marks.get(operation.name, ""))
    x, *tensors = operation.inputs
    states, weights = tensors[:1], tensors[1:]
    if loop.cell == Cell.LSTM:
        states, weights = tensors[:2], tensors[2:]
    for state in states:
        _check_zeros(t, state)
    kernel, recurrent, *biases = (t.weights(w) for w in weights)
    bias = of_state = np.zeros(0, np.float32)
    if biases:
        bias, of_state = _biases(loop.cell, *biases)
    products = t.make(Operation.DENSE, t.read(x), kernel=kernel, bias=bias)
    return t.make(
        Operation.RECURRENT,
        products,
        cell=loop.cell,
        kernel=recurrent,
        bias=of_state,
        sequences=loop.sequences,
        backwards=loop.backwards,
        reversed=loop.sequences and loop.backwards,
    )


def _biases(cell, bias):
    """Returns the bias of the inputs' products, and of the state's."""
    if cell != Cell.GRU:
        return bias, np.zeros(0, np.float32)
    # Gates add both. The candidate's second one is reset with its product.
    of_inputs, of_state = bias
    gates = len(of_inputs) // 3 * 2
    together = of_inputs.copy()
    together[:gates] += of_state[:gates]
    return together, of_state[gates:]


def _check_zeros(t, state):
    """Raises UnknownError unless a state is zero before the first step."""
    array = t.constant(state)
    while array is None and state.op.type in ("Identity", "Fill"):
        if state.op.type == "Fill":
            array = t.constant(state.op.inputs[1])
            break
        state = state.op.inputs[0]
    if array is None or array.any():
        raise UnknownError("it begins with a state that is not zero")


def _reverse(t: Translation, operation: tf.Operation) -> Step:
    """The outputs of a loop, the other way round, as in Bidirectional."""
    x = t.read(operation.inputs[0])
    rank = len(x.shape or ()) + 1
    axes = [axis % rank for axis in t.numbers(operation.inputs[1])]
    node = x.node
    if node is None or node.operation != Operation.RECURRENT or axes != [1]:
        raise UnknownError("it reverses something else than recurrent outputs")
    return t.make(
        Operation.RECURRENT,
        *x.reads,
        cell=node.cell,
        kernel=node.kernel,
        bias=node.bias,
        sequences=node.sequences,
        backwards=node.backwards,
        reversed=not node.reversed,
    )


RECURRENT = {
    "PartitionedCall": _call,
    "StatefulPartitionedCall": _call,
    "ReverseV2": _reverse,
}
