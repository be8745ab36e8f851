"""A function of TensorFlow as networks, and what is left of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from rigl_keras._checks import integer
from rigl_keras.serving.elementwise_operations import ELEMENTWISE
from rigl_keras.serving.frozen_graph import freeze
from rigl_keras.serving.layer_operations import LAYERS
from rigl_keras.serving.network import Network, Operation, Output
from rigl_keras.serving.partition import Segment, parts_of, segment_of
from rigl_keras.serving.passes import simplify
from rigl_keras.serving.remainder import (
    Remainder,
    RunSegment,
    operations_until,
)
from rigl_keras.serving.steps import network_of, sorted_steps
from rigl_keras.serving.translation import Translation

__all__ = ["LEAST_WORK", "Imported", "Unknown", "import_function"]

LEAST_WORK = 10_000


@dataclasses.dataclass(frozen=True)
class Unknown:
    """An operation that stays TensorFlow's.

    Attributes:
        name: Its name in the graph.
        operation: Its type.
        reason: Why no network computes it.
    """

    name: str
    operation: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Imported:
    """What `import_function` found.

    Attributes:
        network: The whole function, its inputs and outputs named as the
            function's. None where TensorFlow must compute a part of it.
        unknown: What no network computes.
        segments: The networks in it, in the order in which they run.
    """

    network: Network | None
    unknown: tuple[Unknown, ...]
    segments: tuple[Segment, ...]
    _remainder: Remainder

    def rebuild(
        self, inputs: Mapping[str, tf.Tensor], run: RunSegment
    ) -> dict[str, tf.Tensor]:
        """Returns what the function computes. Must be called within a graph.

        Args:
            inputs: The function's arguments by name.
            run: Given the number of a segment, 0 the first, and tensors for
                its inputs, returns its outputs, both in their order.

        Returns:
            The function's results by name.

        Example:

        >>> @tf.function
        ... def serve(**inputs):
        ...     return imported.rebuild(inputs, run_network)
        """
        return self._remainder.compute(inputs, run)


def import_function(function: Any, *, least_work: int = LEAST_WORK) -> Imported:
    """Returns the networks in a function.

    Its variables are taken as they are now. Convolutions, dense layers, batch
    norms, pools, upsampling, padding, sums, products and activations of
    float32 become networks, channels last; anything else, as attention,
    recurrent layers and what is done to integers, stays TensorFlow's, with
    the largest networks between. A part that is all known is one network if
    it holds enough work.

    Args:
        function: A concrete function with named arguments, as one made of
            `serve(**inputs)`, which returns a dict.
        least_work: How many products of a weight that is not zero and a value
            a part must hold for one example, at least 1. A function of which
            all is known is a network in any case.

    Returns:
        The networks, and what is left.
    """
    least_work = integer("least_work", least_work, at_least=1)
    graph = freeze(function)
    translation = Translation(graph, {**LAYERS, **ELEMENTWISE})
    graph.session.close()
    ends = [translation.step(tensor) for tensor in graph.outputs.values()]
    if all(step.node is not None for step in sorted_steps(ends)):
        network, segments = _whole(graph, translation, ends)
    else:
        network = None
        segments = _parts(graph, translation, ends, least_work)
    return Imported(
        network=network,
        unknown=_unknown(graph, translation, segments) if not network else (),
        segments=segments,
        _remainder=Remainder(graph, segments),
    )


def _whole(graph, translation, ends):
    """Returns a graph as a network, and as the one segment of it, if any."""
    fed = {
        name: translation.step(tensor)
        for name, tensor in graph.inputs.items()
        if translation.step(tensor).is_a(Operation.INPUT)
    }
    network = network_of(
        list(fed.items()),
        list(zip(graph.outputs, simplify(ends), strict=True)),
    )
    # What is an output as it was fed is there already.
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


def _unknown(graph, translation, segments):
    made = {name for segment in segments for name in segment.outputs}
    wanted = [tensor.name for tensor in graph.outputs.values()]
    wanted += [name for segment in segments for name in segment.inputs]
    found = []
    for operation in operations_until(graph, wanted, made):
        reason = translation.reasons.get(operation.name)
        if reason is not None:
            found.append(Unknown(operation.name, operation.type, reason))
    return tuple(found)
