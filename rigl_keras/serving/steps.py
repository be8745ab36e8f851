"""Steps: a network under construction."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from rigl_keras.serving.network import (
    Network,
    Node,
    Operation,
    Output,
    check_network,
)
from rigl_keras.serving.shapes import Shape, shape_of

__all__ = ["Step", "network_of", "readers", "sorted_steps"]


@dataclasses.dataclass(eq=False)
class Step:
    """A value, and how it is computed.

    Passes change how it is computed, never the value: all readers of a step
    keep reading the same value.

    Attributes:
        node: The node that computes it, with empty `inputs`. None: TensorFlow
            computes it.
        reads: The steps that it reads.
        shape: Its shape, without the batch. None: a network cannot read it.
        tensor: Name of the tensor in the graph.
    """

    node: Node | None
    reads: list["Step"]
    shape: Shape | None
    tensor: str

    @classmethod
    def of(cls, node: Node, reads: Sequence["Step"], tensor: str) -> "Step":
        """Returns a step for a node, with its shape.

        Args:
            node: The node that computes the step.
            reads: The steps that it reads.
            tensor: Name of the tensor in the graph.

        Raises:
            ValueError: The node cannot read these steps.
        """
        shapes = [_known(step) for step in reads]
        return cls(node, list(reads), shape_of(node, shapes), tensor)

    def become(self, node: Node, *reads: "Step") -> None:
        """Computes the same value in another way.

        Args:
            node: The new node that computes it.
            reads: The steps that the node reads.

        Raises:
            ValueError: The shape would change.
        """
        shape = shape_of(node, [_known(step) for step in reads])
        if shape != self.shape and -1 not in shape:
            raise ValueError(
                f"{self.tensor} has shape {self.shape}. Received: {shape}."
            )
        self.node, self.reads = node, list(reads)

    def is_a(self, *operations: Operation) -> bool:
        """Returns whether the step computes one of these operations."""
        return self.node is not None and self.node.operation in operations


def _known(step):
    if step.shape is None:
        raise ValueError(f"{step.tensor} is not a value of a network.")
    return step.shape


def sorted_steps(
    ends: Iterable[Step], given: Iterable[Step] = ()
) -> list[Step]:
    """Returns steps and all that they read, each after what it reads.

    Args:
        ends: The last steps.
        given: Steps to leave out, with what only they need.
    """
    order: list[Step] = []
    seen = {id(step) for step in given}
    path: list[Step] = []  # without recursion: networks are deep
    stack = [iter(list(ends))]
    while stack:
        step = next(stack[-1], None)
        if step is None:
            stack.pop()
            if path:
                order.append(path.pop())
        elif id(step) not in seen:
            seen.add(id(step))
            path.append(step)
            stack.append(iter(step.reads))
    return order


def readers(steps: Iterable[Step], ends: Iterable[Step]) -> dict[int, list]:
    """Returns the readers of each step.

    Args:
        steps: The steps.
        ends: The steps that are results.

    Returns:
        `{id of a step: steps that read it}`. For a result, one is None.
    """
    found: dict[int, list] = {}
    for step in steps:
        for read in step.reads:
            found.setdefault(id(read), []).append(step)
    for step in ends:
        found.setdefault(id(step), []).append(None)
    return found


def network_of(
    inputs: Sequence[tuple[str, Step]], outputs: Sequence[tuple[str, Step]]
) -> Network:
    """Returns the network of steps, with weights in float32.

    Args:
        inputs: Input steps, by name.
        outputs: Results, by name.

    Raises:
        ValueError: A step is TensorFlow's, or the network is not valid
            (`check_network`).
    """
    index, nodes = {}, []
    for name, step in inputs:
        index[id(step)] = len(nodes)
        nodes.append(Node(Operation.INPUT, name, shape=_known(step)))
    ends, given = ([step for _, step in x] for x in (outputs, inputs))
    for step in sorted_steps(ends, given):
        if step.node is None:
            raise ValueError(f"{step.tensor} is not a value of a network.")
        index[id(step)] = len(nodes)
        arrays = {
            field: np.asarray(getattr(step.node, field), np.float32)
            for field in ("kernel", "bias", "scale", "shift")
        }
        nodes.append(
            dataclasses.replace(
                step.node,
                inputs=tuple(index[id(read)] for read in step.reads),
                **arrays,
            )
        )
    network = Network(
        tuple(nodes),
        tuple(Output(name, index[id(step)]) for name, step in outputs),
    )
    check_network(network)
    return network
