"""A model as networks, for the formats that serve them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import tensorflow as tf

from rigl_keras.exporting.saved_model import Served
from rigl_keras.exporting.signatures import Signature
from rigl_keras.kernels import library
from rigl_keras.kernels.toolchain import BuildError
from rigl_keras.serving.importer import (
    LEAST_WORK,
    Imported,
    Unknown,
    import_function,
)
from rigl_keras.serving.network import Network
from rigl_keras.serving.network_file import to_bytes
from rigl_keras.serving.partition import SMALL
from rigl_keras.serving.runtime import Network as Runtime
from rigl_keras.serving.shapes import Shape, shape_of

__all__ = [
    "import_model",
    "library_to_copy",
    "lines_about",
    "networks_within",
    "output_shapes",
    "tuned",
    "whole_network",
]

# Seconds for comparing the plans of one batch size.
_SECONDS = 2.0
# Density of a recurrent layer above which TensorFlow's loop may be faster.
_DENSEST_LOOPS = 1 / 3
_MOST_LINES = 8  # about operations that no network computes


def import_model(
    model: keras.Model,
    signature: Signature,
    *,
    least_work: int = LEAST_WORK,
    densest_loops: float = 1.0,
) -> Imported:
    """Returns the networks in a model's inference.

    Args:
        model: A built model of any kind, masked or not. Its weights keep their
            current values; kernels of a masked one must be zero outside their
            masks.
        signature: The model's inputs.
        least_work: As in `import_function`.
        densest_loops: Networks compute recurrent layers of at most this
            density, where they can. TensorFlow keeps others, as operations of
            the op library where these are faster.

    Raises:
        ValueError: The model is more than a function of its inputs.
    """
    served = Served(model, signature, sparse=False, marked_loops=densest_loops)
    return import_function(served.function, least_work=least_work)


def whole_network(model: keras.Model, signature: Signature) -> Network:
    """Returns a model as one network, or raises an error that says why not.

    Args:
        model, signature: As in `import_model`.

    Raises:
        ValueError: Parts of it need TensorFlow; it names them and a way out.
    """
    served = Served(model, signature, sparse=False, marked_loops=1.0)
    imported = import_function(served.function)
    if imported.network is not None:
        return imported.network
    # Small known parts would be in one network with the rest.
    needed = [one for one in imported.unknown if one.reason != SMALL]
    has_networks = imported.segments or imported.has_sparse_loops
    other = "sparse_saved_model" if has_networks else "saved_model"
    way_out = f"Pass format={other!r}, where TensorFlow computes them."
    layers = [f"{layer}, because {reason}" for layer, reason in served.unmarked]
    if layers:  # their operations would say less
        raise ValueError(
            f"these layers need TensorFlow: {'; '.join(layers)}. {way_out}"
        )
    raise ValueError(
        "these operations need TensorFlow: "
        f"{_listed(needed) or 'a value is not float32'}. {way_out}"
    )


def networks_within(model: keras.Model, signature: Signature) -> Imported:
    """Returns the networks in a model, and its sparse recurrent layers.

    Args:
        model, signature: As in `import_model`.

    Raises:
        ValueError: It has neither. The error says why, and what to pass.
    """
    imported = import_model(model, signature, densest_loops=_DENSEST_LOOPS)
    if imported.segments or imported.has_sparse_loops:
        return imported
    raise ValueError(
        f"no part of model {model.name!r} is a network that sparse kernels "
        f"compute: {_listed(imported.unknown) or 'it has no layer'}. Pass "
        "format='saved_model'."
    )


def _listed(unknown):
    return "; ".join(lines_about(unknown))


def library_to_copy(build: Callable[[], Path]) -> Path:
    """Returns a library to put beside a model.

    Args:
        build: Builds it if necessary.

    Raises:
        ValueError: It cannot be built.
    """
    try:
        return build()
    except BuildError as error:
        raise ValueError(
            f"There is no library to put beside the model: {error}."
        ) from error


def lines_about(unknown: Sequence[Unknown]) -> list[str]:
    """Returns a line for each kind of operation that no network computes.

    Args:
        unknown: The operations.

    Returns:
        `"Einsum (2) in attention: two operands that are not constant"`; the
        first of many. Those that compute shapes come last.
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    for one in unknown:
        kinds.setdefault((one.operation, one.reason), []).append(one.name)
    lines = [
        f"{operation} ({len(names)}){_places(names)}: {reason}"
        for (operation, reason), names in sorted(
            kinds.items(), key=lambda kind: "computes int" in kind[0][1]
        )
    ]
    more = len(lines) - _MOST_LINES
    if more > 1:  # one more line takes no more room than saying so
        lines[_MOST_LINES:] = [f"and {more} more kinds"]
    return lines


def _places(names):
    """Returns " in LAYER" for names such as "model/layer/MatMul"."""
    layers = [name.split("/")[1] for name in names if name.count("/") > 1]
    found = list(dict.fromkeys(layers))
    if not found:
        return ""
    return f" in {found[0]}" + (", ..." if len(found) > 1 else "")


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
    """Returns the file of a network, tuned for this machine.

    Another machine, or another batch size, uses the measurements as far as
    possible.

    Args:
        network: The network. If an axis of an input is free, nothing is
            measured.
        batch_sizes: Batch sizes whose plans are compared, some seconds each.

    Raises:
        BuildError: The library cannot be built.
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
