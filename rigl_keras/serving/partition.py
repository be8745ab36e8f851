"""Splits a graph into networks and parts that TensorFlow keeps.

A part must be convex: it could never run if it read what TensorFlow computes
from one of its own outputs. So each step has a stage: how often, at most, a
path to it leaves the known steps. The stage never falls along a path, and rises
when the path leaves the known steps. So connected steps of one stage are
convex.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from rigl_keras.serving.network import Network, Node, Operation
from rigl_keras.serving.passes import simplify
from rigl_keras.serving.steps import Step, network_of, sorted_steps
from rigl_keras.serving.translation import Translation

__all__ = ["SMALL", "Part", "Segment", "parts_of", "segment_of"]

# Why TensorFlow computes an operation that a network could.
SMALL = "the known part around it is small"
_FREE = 32  # length of a free axis, for estimates of work


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a graph that one network computes.

    Attributes:
        network: The network.
        inputs: Names of the tensors that it reads, in the order of the
            network's inputs.
        outputs: Names of the tensors that it computes, in the order of the
            network's outputs.
    """

    network: Network
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(eq=False)
class Part:
    """Steps that may become a network.

    Attributes:
        steps: The steps, each after the steps that it reads.
        inputs: The outside steps that they read.
        outputs: The steps that are read outside, by the names of their tensors.
            The caller fills them in.
    """

    steps: list[Step]
    inputs: list[Step]
    outputs: dict[str, Step] = dataclasses.field(default_factory=dict)


def parts_of(
    translation: Translation, ends: Sequence[Step], least_work: int
) -> list[Part]:
    """Returns the parts of a graph that are worth a network.

    TensorFlow keeps all other steps.

    Args:
        translation: The graph's steps.
        ends: The results.
        least_work: Fewest products of a weight and a value, for one example,
            that make a part.

    Returns:
        The parts, each after the parts that it reads.
    """
    while True:
        parts = _connected(translation, ends)
        small = [part for part in parts if _work(part) < least_work]
        if not small:
            return parts
        for part in small:
            for step in part.steps:
                # TensorFlow's operation may read more than the step, such as a
                # shape.
                translation.give_up(step, SMALL)


def _connected(translation, ends):
    steps = sorted_steps(ends)
    stages = _stages(translation, steps)
    owner = {}

    def root(step):
        while owner[id(step)] is not step:
            step = owner[id(step)]
        return step

    known = [step for step in steps if _is_known(step)]
    for step in known:
        owner[id(step)] = step
        for read in step.reads:
            if id(read) in owner and stages[id(read)] == stages[id(step)]:
                owner[id(root(read))] = root(step)
    groups: dict[int, list[Step]] = {}
    for step in known:
        groups.setdefault(id(root(step)), []).append(step)
    parts = []
    for group in groups.values():
        within = {id(step) for step in group}
        inputs = {
            id(read): read
            for step in group
            for read in step.reads
            if id(read) not in within
        }
        parts.append(Part(group, list(inputs.values())))
    return sorted(parts, key=lambda part: stages[id(part.steps[0])])


def _is_known(step):
    return step.node is not None and not step.is_a(Operation.INPUT)


def _stages(translation, steps):
    stages = {}
    for step in steps:
        leaves = not _is_known(step)
        stages[id(step)] = max(
            (
                stages[id(read)] + (leaves and _is_known(read))
                for read in step.reads
            ),
            default=0,
        )
    # Steps between the inputs and the result of one operation are read only by
    # it, and have no tensor to pass from part to part.
    named = {id(step) for step in translation.steps.values()}
    for step in reversed(steps):
        for read in step.reads:
            if _is_known(read) and id(read) not in named:
                stages[id(read)] = stages[id(step)]
    return stages


def _work(part):
    total = 0
    for step in part.steps:
        if step.is_a(
            Operation.CONVOLUTION, Operation.DENSE, Operation.RECURRENT
        ):
            # A recurrent node multiplies at each step that it reads.
            recurrent = step.is_a(Operation.RECURRENT)
            shape = step.reads[0].shape if recurrent else step.shape
            places = [
                _FREE if length == -1 else length
                for length in (shape or ())[:-1]
            ]
            total += np.count_nonzero(step.node.kernel) * math.prod(places)
    return total


def segment_of(part: Part) -> Segment:
    """Returns a part with outputs as a network."""
    fed = {
        id(step): Step(Node(Operation.INPUT), [], step.shape, step.tensor)
        for step in part.inputs
    }
    for step in part.steps:
        step.reads = [fed.get(id(read), read) for read in step.reads]
    inputs = tuple(step.tensor for step in part.inputs)
    outputs = tuple(part.outputs)
    network = network_of(
        list(zip(inputs, fed.values(), strict=True)),
        list(zip(outputs, simplify(part.outputs.values()), strict=True)),
    )
    return Segment(network, inputs, outputs)
