"""Which parts of a graph are networks, and which stay TensorFlow's.

A part must be convex: it could never run if it read what TensorFlow computes
from one of its own outputs. So each step has a stage: how often a path to it
leaves the known steps, at most. The stage never falls along a path, and rises
where the path leaves what is known. Connected steps of one stage are therefore
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

# Why TensorFlow computes what a network could.
SMALL = "what is known around it is small"
_FREE = 32  # length of an axis that is free, where work is estimated


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a graph that one network computes.

    Attributes:
        network: What it computes.
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
        steps: What is read comes first.
        inputs: What they read from outside.
        outputs: Those that are read outside, by the names of their tensors,
            The caller fills them in.
    """

    steps: list[Step]
    inputs: list[Step]
    outputs: dict[str, Step] = dataclasses.field(default_factory=dict)


def parts_of(
    translation: Translation, ends: Sequence[Step], least_work: int
) -> list[Part]:
    """Returns the parts of a graph that are worth making networks.

    All other steps become TensorFlow's.

    Args:
        translation: The graph's steps.
        ends: What is computed.
        least_work: Products of a weight and a value, for one example, below
            which a part is none.

    Returns:
        The parts, one that reads another after it.
    """
    while True:
        parts = _connected(translation, ends)
        small = [part for part in parts if _work(part) < least_work]
        if not small:
            return parts
        for part in small:
            for step in part.steps:
                # TensorFlow's operation may read more than the step does: the
                # shape of something.
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
    # Steps between the inputs and the result of one operation are read by it
    # alone, and have no tensor that could be passed from part to part.
    named = {id(step) for step in translation.steps.values()}
    for step in reversed(steps):
        for read in step.reads:
            if _is_known(read) and id(read) not in named:
                stages[id(read)] = stages[id(step)]
    return stages


def _work(part):
    total = 0
    for step in part.steps:
        if step.is_a(Operation.CONVOLUTION, Operation.DENSE):
            places = [
                _FREE if length == -1 else length
                for length in (step.shape or ())[:-1]
            ]
            total += np.count_nonzero(step.node.kernel) * math.prod(places)
    return total


def segment_of(part: Part) -> Segment:
    """Returns a part, its outputs filled in, as a network."""
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
