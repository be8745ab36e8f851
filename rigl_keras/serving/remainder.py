"""The parts of a graph that TensorFlow computes, between its networks."""

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from rigl_keras.serving.frozen_graph import FrozenGraph, captured
from rigl_keras.serving.partition import Segment

__all__ = ["Remainder", "RunSegment", "operations_until"]

# Runs the segment with a number on its inputs, and returns its outputs.
RunSegment = Callable[[int, Sequence[tf.Tensor]], Sequence[tf.Tensor]]


def operations_until(
    graph: FrozenGraph, wanted: Iterable[str], given: Container[str]
) -> list[tf.Operation]:
    """Returns the operations that compute some tensors, in order.

    Args:
        graph: The graph.
        wanted: Names of tensors.
        given: Names of tensors that are known besides the inputs.
    """
    waiting, found = list(wanted), set()
    while waiting:
        name = waiting.pop()
        operation = graph.graph.get_tensor_by_name(name).op
        if name in given or operation.name in found:
            continue
        if operation.type != "Placeholder":
            found.add(operation.name)
            waiting += [source.name for source in operation.inputs]
    return [x for x in graph.graph.get_operations() if x.name in found]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Operations that run after a segment and before the next one."""

    definition: tf.compat.v1.GraphDef
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Remainder:
    """A graph in pieces, with segments computed by others between them.

    Args:
        graph: The graph.
        segments: The segments, each after the segments that it reads.
    """

    def __init__(self, graph: FrozenGraph, segments: Sequence[Segment]):
        self._graph, self._segments = graph, segments
        self._made_by: dict[str, int] = {
            name: number
            for number, segment in enumerate(segments, 1)
            for name in segment.outputs
        }
        wanted = {tensor.name for tensor in graph.outputs.values()}
        for segment in segments:
            wanted.update(segment.inputs)
        self._wanted = wanted
        self._operations = operations_until(graph, wanted, self._made_by)
        self._piece_of = self._places(self._operations)
        self._check_order()

    def constants(self) -> dict[str, np.ndarray]:
        """Returns the constants that the pieces read.

        Returns:
            `{name of a tensor: array}`.
        """
        known = self._graph.constants
        return {
            source.name: known[source.name]
            for operation in self._operations
            if operation.name in self._piece_of
            for source in operation.inputs
            if source.name in known
        }

    def compute(
        self,
        inputs: Mapping[str, tf.Tensor],
        run: RunSegment,
        constants: Mapping[str, tf.Tensor],
    ) -> dict[str, tf.Tensor]:
        """Returns the graph's results. Must be called within a graph.

        Args:
            inputs: Tensors by the names of the graph's inputs.
            run: Runs a segment on tensors.
            constants: Tensors to read in place of some of `constants()`, by
                the same names. The result does not hold these.

        Returns:
            Tensors by the names of the graph's outputs.
        """
        graph = self._graph
        pieces = self._cut(constants)
        values = {
            tensor.name: inputs[name] for name, tensor in graph.inputs.items()
        }
        values |= constants
        values |= captured(
            {
                name: tensor
                for name, tensor in graph.captures.items()
                # A variable and its constant have one name.
                if name not in constants
                and any(name in piece.inputs for piece in pieces)
            }
        )
        for number, piece in enumerate(pieces):
            if number:
                segment = self._segments[number - 1]
                fed = [values[name] for name in segment.inputs]
                made = list(run(number - 1, fed))
                values |= zip(segment.outputs, made, strict=True)
            if piece.outputs:
                made = tf.graph_util.import_graph_def(
                    piece.definition,
                    input_map={name: values[name] for name in piece.inputs},
                    return_elements=list(piece.outputs),
                    name=f"piece_{number}",
                )
                values |= zip(piece.outputs, made, strict=True)
        return {
            name: values[tensor.name] for name, tensor in graph.outputs.items()
        }

    def _places(self, operations):
        """Returns `{operation: number of its piece}`, without constants."""
        places = {}
        for operation in operations:
            if operation.name not in self._graph.constant_operations:
                places[operation.name] = max(
                    (self._made(source, places) for source in operation.inputs),
                    default=0,
                )
        return places

    def _made(self, tensor, places):
        """Returns the number of the piece that makes a tensor."""
        if tensor.name in self._made_by:
            return self._made_by[tensor.name]
        return places.get(tensor.op.name, 0)

    def _check_order(self):
        for number, segment in enumerate(self._segments, 1):
            for name in segment.inputs:
                tensor = self._graph.graph.get_tensor_by_name(name)
                if self._made(tensor, self._piece_of) >= number:
                    raise ValueError(
                        f"{name} is read by segment {number - 1} and computed "
                        "after it."
                    )

    def _cut(self, given):
        """Returns the pieces: one more than segments.

        Args:
            given: Names of constants that are not in the pieces.
        """
        definition = self._graph.graph.as_graph_def()
        nodes = {node.name: node for node in definition.node}
        groups = [[] for _ in range(len(self._segments) + 1)]
        constants = self._graph.constant_operations
        for operation in self._operations:
            if operation.name not in constants:
                groups[self._piece_of[operation.name]].append(operation)
        read = set(self._wanted)
        pieces = []
        for group in reversed(groups):
            within = {operation.name for operation in group}
            # Constants that it reads. Constant outputs are removed first.
            ends = [
                source.name
                for operation in group
                for source in operation.inputs
                if source.op.name in constants and source.name not in given
            ]
            if len(pieces) == len(self._segments):
                ends += [
                    name for name in self._wanted if _of(name) in constants
                ]
            own = operations_until(self._graph, ends, ())
            within.update(operation.name for operation in own)
            inputs = {
                source.name: None
                for operation in group
                for source in operation.inputs
                if source.name in self._made_by
                or source.name in given
                or source.op.name not in within
            }
            outputs = tuple(
                tensor.name
                for operation in (*own, *group)
                for tensor in operation.outputs
                if tensor.name in read
                and tensor.name not in self._made_by
                and tensor.name not in given
            )
            read.update(inputs)
            part = tf.compat.v1.GraphDef()
            part.versions.CopyFrom(definition.versions)
            part.library.CopyFrom(definition.library)
            for operation in (*own, *group):
                node = part.node.add()
                node.CopyFrom(nodes[operation.name])
                _cut_off(node, within)
            pieces.append(_Piece(part, tuple(inputs), outputs))
        return pieces[::-1]


def _of(name):
    return name.split(":")[0]


def _cut_off(node, within):
    """Removes a node's control inputs and colocation outside a piece."""
    kept = [
        name
        for name in node.input
        if not name.startswith("^") or name[1:] in within
    ]
    del node.input[:]
    node.input.extend(kept)
    node.attr.pop("_class", None)
