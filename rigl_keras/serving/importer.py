"""A function of TensorFlow as networks, and the rest of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from rigl_keras._checks import integer
from rigl_keras.serving.elementwise_operations import ELEMENTWISE
from rigl_keras.serving.frozen_graph import freeze
from rigl_keras.serving.layer_operations import LAYERS
from rigl_keras.serving.network import Network, Operation, Output
from rigl_keras.serving.partition import (
    SMALL,
    Segment,
    parts_of,
    segment_of,
)
from rigl_keras.serving.passes import simplify
from rigl_keras.serving.recurrent_operations import RECURRENT
from rigl_keras.serving.remainder import (
    Remainder,
    RunSegment,
    operations_until,
)
from rigl_keras.serving.steps import network_of, sorted_steps
from rigl_keras.serving.translation import Translation, UnknownError

__all__ = ["LEAST_WORK", "Imported", "Unknown", "import_function"]

LEAST_WORK = 10_000
# The operation of the op library for the loop of an LSTM or a GRU.
_SPARSE_LOOP = "RiglKerasRecurrent"


@dataclasses.dataclass(frozen=True)
class Unknown:
    """An operation that TensorFlow keeps.

    Attributes:
        name: Its name in the graph.
        operation: Its type.
        reason: Why a network cannot compute it.
    """

    name: str
    operation: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Imported:
    """The result of `import_function`.

    Attributes:
        network: The whole function; inputs and outputs have the function's
            names. None if TensorFlow must compute a part of it.
        unknown: The operations that no network computes.
        segments: The networks in it, in the order in which they run.
        has_sparse_loops: Whether TensorFlow keeps a recurrent layer as an
            operation of the op library.
    """

    network: Network | None
    unknown: tuple[Unknown, ...]
    segments: tuple[Segment, ...]
    has_sparse_loops: bool
    _remainder: Remainder

    def constants(self) -> dict[str, np.ndarray]:
        """Returns the constants that TensorFlow's parts read.

        Returns:
            `{name of a tensor: array}`.
        """
        return self._remainder.constants()

    def rebuild(
        self,
        inputs: Mapping[str, tf.Tensor],
        run: RunSegment,
        constants: Mapping[str, tf.Tensor] | None = None,
    ) -> dict[str, tf.Tensor]:
        """Returns the function's results. Must be called within a graph.

        Args:
            inputs: The function's arguments by name.
            run: Called with the number of a segment, 0 for the first, and
                tensors for its inputs. It returns the outputs. Both are in
                order.
            constants: Tensors to read in place of some of `constants()`, by
                the same names. None: the graph holds all constants.

        Returns:
            The function's results by name.

        Example:

        >>> @tf.function
        ... def serve(**inputs):
        ...     return imported.rebuild(inputs, run_network)
        """
        return self._remainder.compute(inputs, run, constants or {})


def import_function(function: Any, *, least_work: int = LEAST_WORK) -> Imported:
    """Returns the networks in a function.

    Variables keep their current values. Convolutions, dense layers, batch
    norms, pools, upsampling, padding, sums, products and activations in
    float32, channels last, become networks, and so do marked loops of LSTM and
    GRU layers (`recurrent_operations`). TensorFlow keeps everything else, such
    as attention and integer operations, with the largest possible networks
    between. A part whose operations are all known becomes a
    network if it holds enough work.

    Args:
        function: A concrete function with named arguments that returns a dict,
            such as one made from `serve(**inputs)`.
        least_work: Smallest number of products of a nonzero weight and a value,
            for one example, that makes a part a network, at least 1. A function
            whose operations are all known is always a network.

    Returns:
        The networks, and the rest.
    """
    least_work = integer("least_work", least_work, at_least=1)
    graph = freeze(function)
    translation = Translation(
        graph,
        {**LAYERS, **ELEMENTWISE, **RECURRENT, _SPARSE_LOOP: _sparse_loop},
    )
    graph.session.close()
    ends = [translation.step(tensor) for tensor in graph.outputs.values()]
    # Before small parts are given up: what is within their patterns, such as
    # the Erfc of a GELU, would be known with the rest.
    foreign = {
        step.tensor.partition(":")[0]
        for step in sorted_steps(ends)
        if step.node is None
    }
    if not foreign:
        network, segments = _whole(graph, translation, ends)
    else:
        network = None
        segments = _parts(graph, translation, ends, least_work)
    return Imported(
        network=network,
        unknown=_unknown(graph, translation, segments, foreign),
        segments=segments,
        # A graph is large as a message: it holds its weights.
        has_sparse_loops=network is None
        and _has(graph.graph.as_graph_def(), _SPARSE_LOOP),
        _remainder=Remainder(graph, segments),
    )


def _has(definition, operation):
    """Returns whether a graph, or a branch of it, has a kind of operation."""
    functions = definition.library.function
    nodes = [definition.node, *(function.node_def for function in functions)]
    return any(node.op == operation for each in nodes for node in each)


def _sparse_loop(translation, operation):
    raise UnknownError("a sparse operation computes the whole sequence")


def _whole(graph, translation, ends):
    """Returns a graph as a network, and as its only segment, if any."""
    fed = {
        name: translation.step(tensor)
        for name, tensor in graph.inputs.items()
        if translation.step(tensor).is_a(Operation.INPUT)
    }
    network = network_of(
        list(fed.items()),
        list(zip(graph.outputs, simplify(ends), strict=True)),
    )
    # Inputs that are outputs need no computation.
    outputs = {
        tensor.name: output.node
        for tensor, step, output in zip(
            graph.outputs.values(), ends, network.outputs, strict=True
        )
        if not step.is_a(Operation.INPUT)
    }
    if not outputs:
        return network, ()
    segment = Segment(
        dataclasses.replace(
            network, outputs=tuple(Output(*pair) for pair in outputs.items())
        ),
        tuple(step.tensor for step in fed.values()),
        tuple(outputs),
    )
    return network, (segment,)


def _parts(graph, translation, ends, least_work):
    parts = parts_of(translation, ends, least_work)
    part_of = {id(step): part for part in parts for step in part.steps}
    made_in = {
        name: part_of[id(step)]
        for name, step in translation.steps.items()
        if id(step) in part_of
    }
    waiting = [tensor.name for tensor in graph.outputs.values()]
    waiting += [step.tensor for part in parts for step in part.inputs]
    read = dict.fromkeys(waiting)
    for operation in operations_until(graph, waiting, made_in):
        read |= dict.fromkeys(source.name for source in operation.inputs)
    for name in read:
        if name in made_in:
            made_in[name].outputs[name] = translation.steps[name]
    return tuple(segment_of(part) for part in parts if part.outputs)


def _unknown(graph, translation, segments, foreign):
    """Returns foreign operations, and the last ones of small known parts."""
    made = {name for segment in segments for name in segment.outputs}
    wanted = [tensor.name for tensor in graph.outputs.values()]
    wanted += [name for segment in segments for name in segment.inputs]
    found = []
    for operation in operations_until(graph, wanted, made):
        reason = translation.reasons.get(operation.name)
        if reason == SMALL or (reason and operation.name in foreign):
            found.append(Unknown(operation.name, operation.type, reason))
    return tuple(found)
