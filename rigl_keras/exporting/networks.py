"""A model as networks, for the formats that serve them."""

import collections
import dataclasses
from collections.abc import Sequence

import keras
import tensorflow as tf

from rigl_keras.exporting.saved_model import Served
from rigl_keras.exporting.signatures import Signature
from rigl_keras.kernels import library
from rigl_keras.serving.importer import (
    LEAST_WORK,
    Imported,
    Unknown,
    import_function,
)
from rigl_keras.serving.network import Network
from rigl_keras.serving.network_file import to_bytes
from rigl_keras.serving.runtime import Network as Runtime
from rigl_keras.serving.shapes import Shape, shape_of

__all__ = ["import_model", "output_shapes", "told", "tuned"]

# Seconds in which plans of one batch size are compared.
_SECONDS = 2.0
_TOLD = 8  # lines about what is not known


def import_model(
    model: keras.Model, signature: Signature, *, least_work: int = LEAST_WORK
) -> Imported:
    """Returns the networks in what a model computes in inference.

    Args:
        model: A built model of any kind, masked or not. Its weights are taken
            as they are now; kernels of a masked one must be zero outside
            their masks.
        signature: What it is called on.
        least_work: As in `import_function`.

    Raises:
        ValueError: The model is more than a function of its inputs.
    """
    served = Served(model, signature, sparse=False)
    return import_function(served.function, least_work=least_work)


def told(unknown: Sequence[Unknown]) -> list[str]:
    """Returns what no network computes, a line for each kind of operation.

    Args:
        unknown: The operations.

    Returns:
        `"Einsum (2): two operands that are not constant"`, the first ones of
        many.
    """
    kinds = collections.Counter((one.operation, one.reason) for one in unknown)
    lines = [
        f"{operation} ({count}): {reason}"
        for (operation, reason), count in kinds.items()
    ]
    if len(lines) > _TOLD:
        lines[_TOLD:] = [f"and {len(lines) - _TOLD} more kinds"]
    return lines


def output_shapes(network: Network) -> list[tf.TensorShape]:
    """Returns the shapes of a network's outputs, the batch first."""
    shapes: list[Shape] = []
    for node in network.nodes:
        shapes.append(shape_of(node, [shapes[read] for read in node.inputs]))
    return [
        tf.TensorShape(
            [None, *(None if n == -1 else n for n in shapes[o.node])]
        )
        for o in network.outputs
    ]


def tuned(network: Network, batch_sizes: Sequence[int]) -> bytes:
    """Returns the file of a network, with what is fastest on this machine.

    Another machine, or a batch of another size, goes by what was measured as
    far as it can.

    Args:
        network: The network. Where an axis of an input is free, nothing is
            measured.
        batch_sizes: For each of them plans are compared, some seconds long.

    Raises:
        BuildError: There is no library.
    """
    data = to_bytes(network)
    shapes = [node.shape for node in network.inputs()]
    if not batch_sizes or any(-1 in shape for shape in shapes):
        return data
    runtime = Runtime.from_bytes(data, library=library.build_network())
    with runtime:
        for size in batch_sizes:
            runtime.tune(
                *((size, *shape) for shape in shapes), seconds=_SECONDS
            )
        hints = runtime.hints()
    return to_bytes(dataclasses.replace(network, hints=hints))
