"""Operations of TensorFlow, one by one, as steps of a network.

`Translation` goes through a graph in the order of its operations. Operations
that a translator knows become steps; TensorFlow keeps the others.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from rigl_keras.serving.frozen_graph import FrozenGraph
from rigl_keras.serving.network import Node, Operation
from rigl_keras.serving.steps import Step

__all__ = ["Rows", "Translation", "Translator", "UnknownError"]

# Batches to try for tensors that hold shapes, unless the batch is fixed.
_BATCHES = (3, 5)
_FREE, _APART = (101, 211), (2, 6)  # lengths of free axes, likewise


class UnknownError(ValueError):
    """A network cannot compute an operation; the message says why."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """A value whose batch and all axes except the last have become one.

    TensorFlow makes a matrix of a value before it multiplies it. What it
    computes on each row is computed on the value.
    """

    step: Step


# Returns the value of an operation, or raises UnknownError.
Translator = Callable[["Translation", tf.Operation], "Step | Rows"]


class Translation:
    """The steps of a graph.

    Args:
        graph: The graph.
        translators: Translators, by the type of operation.

    Attributes:
        graph: The graph.
        reasons: `{name of an operation: why it is unknown}`.
        steps: `{name of a tensor: step}`.
    """

    def __init__(
        self, graph: FrozenGraph, translators: Mapping[str, Translator]
    ):
        self.graph = graph
        self.reasons: dict[str, str] = {}
        self.steps: dict[str, Step] = {}
        self._rows: dict[str, Rows] = {}
        self._free: dict[tuple[int, int], int] = {}
        self._operation: tf.Operation
        named = {tensor.name: name for name, tensor in graph.inputs.items()}
        fixed = {
            tensor.shape[0]
            for tensor in graph.inputs.values()
            if tensor.shape.rank
        } - {None}
        self._batch = fixed | {None}
        self._batches = 2 * tuple(fixed) if len(fixed) == 1 else _BATCHES
        for operation in graph.graph.get_operations():
            self._operation = operation
            if operation.name in graph.constant_operations:
                continue
            if operation.type == "Placeholder":
                self._feed(operation.outputs[0], named)
                continue
            self._translate(operation, translators)

    def _feed(self, tensor, named):
        step = self._foreign(tensor, [])
        if tensor.name in named and step.shape:
            name = named[tensor.name]
            node = Node(Operation.INPUT, name, shape=step.shape)
            step = Step(node, [], step.shape, tensor.name)
        self.steps[tensor.name] = step

    def _translate(self, operation, translators):
        translator = translators.get(operation.type)
        try:
            if operation.outputs and operation.outputs[0].dtype != tf.float32:
                raise UnknownError(
                    f"it computes {operation.outputs[0].dtype.name}"
                )
            if translator is None:
                raise UnknownError("no network computes it")
            made = translator(self, operation)
        except ValueError as error:  # including shapes that do not fit
            self.reasons[operation.name] = str(error)
            for tensor in operation.outputs:
                self.step(tensor)
            return
        tensor = operation.outputs[0]
        if isinstance(made, Rows):
            self._rows[tensor.name] = made
        else:
            if self.steps.get(made.tensor) is not made:
                made.tensor = tensor.name  # not the tensor of rows
            self.steps[tensor.name] = made

    def give_up(self, step: Step, reason: str) -> None:
        """Leaves a step to TensorFlow."""
        operation = self.graph.graph.get_tensor_by_name(step.tensor).op
        self.reasons[operation.name] = reason
        step.node, step.reads = None, self._reads(operation)

    def _reads(self, operation):
        return [
            self.step(source)
            for source in operation.inputs
            if source.op.name not in self.graph.constant_operations
        ]

    # For translators: reading.

    def step(self, tensor: tf.Tensor) -> Step:
        """Returns a tensor's step; TensorFlow's if no other computes it."""
        if tensor.name not in self.steps:
            reads = self._reads(tensor.op)
            self.steps[tensor.name] = self._foreign(tensor, reads)
        return self.steps[tensor.name]

    def read(self, tensor: tf.Tensor) -> Step:
        """Returns a step that a network can read.

        Raises:
            UnknownError: There is no such step.
        """
        if tensor.op.name in self.graph.constant_operations:
            raise UnknownError("it reads a constant where a value is expected")
        step = self.step(tensor)
        if step.shape is None:
            raise UnknownError(
                "it reads a value that is not float32, or has no known shape "
                "after the batch"
            )
        return step

    def rows(self, tensor: tf.Tensor) -> Rows | None:
        """Returns the rows that a tensor holds, or None."""
        return self._rows.get(tensor.name)

    def each(
        self, tensor: tf.Tensor, make: Callable[[Step], Step]
    ) -> Step | Rows:
        """Returns the result for a value, or for each of its rows."""
        rows = self.rows(tensor)
        if rows is not None:
            return Rows(make(rows.step))
        return make(self.read(tensor))

    def constant(self, tensor: tf.Tensor) -> np.ndarray | None:
        """Returns the value of a constant tensor, or None."""
        return self.graph.constants.get(tensor.name)

    def weights(self, tensor: tf.Tensor) -> np.ndarray:
        """Returns the value of a constant tensor.

        Raises:
            UnknownError: It is not constant, or not float32.
        """
        array = self.constant(tensor)
        if array is None or array.dtype != np.float32:
            raise UnknownError("its weights are not constant, or not float32")
        return array

    def numbers(self, tensor: tf.Tensor) -> list[int]:
        """Returns the value of a constant tensor of integers, as a list.

        Raises:
            UnknownError: It is not constant.
        """
        array = self.constant(tensor)
        if array is None:
            raise UnknownError("one of its arguments depends on its input")
        return [int(number) for number in np.ravel(array)]

    def contents(self, tensor: tf.Tensor) -> list[list[int]]:
        """Returns the value of a tensor of integers, for two batches.

        Raises:
            UnknownError: It depends on more than shapes.
        """
        found = []
        for i in range(len(self._batches)):

            def shape(name, i=i):
                step = self.steps.get(name)
                if step is None or step.shape is None:
                    return None
                return self.lengths(step)[i]

            array = self.graph.contents(tensor, shape)
            if array is None:
                raise UnknownError("one of its shapes depends on values")
            found.append([int(number) for number in np.ravel(array)])
        return found

    def lengths(self, step: Step) -> list[tuple[int, ...]]:
        """Returns a step's shape with its batch, for two batches.

        Each free axis has a different length.
        """
        found = []
        for i, batch in enumerate(self._batches):
            shape = [batch]
            for axis, length in enumerate(step.shape or ()):
                if length == -1:
                    number = self._free.setdefault(
                        (id(step), axis), len(self._free)
                    )
                    length = _FREE[i] + number * _APART[i]
                shape.append(length)
            found.append(tuple(shape))
        return found

    # For translators: making steps.

    def make(self, operation: Operation, *reads: Step, **fields: Any) -> Step:
        """Returns a step of the operation being translated."""
        tensor = self._operation.outputs[0].name
        node = Node(operation, self._operation.name, **fields)
        return Step.of(node, reads, tensor)

    def reshaped(self, step: Step, shape: tuple[int, ...]) -> Step:
        """Returns a step with another shape."""
        if shape == step.shape:
            return step
        return self.make(Operation.RESHAPE, step, shape=shape)

    def _foreign(self, tensor, reads):
        """Returns a step of TensorFlow."""
        shape = None
        if tensor.dtype == tf.float32 and tensor.shape.rank:
            first, *rest = tensor.shape.as_list()
            rest = tuple(-1 if n is None else n for n in rest)
            if first in self._batch and all(rest) and rest:
                shape = rest
        return Step(None, reads, shape, tensor.name)
