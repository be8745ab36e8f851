"""Costs of an exported model: seconds, bytes and FLOPs."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np

from rigl_keras import _timing
from rigl_keras._checks import integer
from rigl_keras.exporting.base_format import Format, Runner
from rigl_keras.exporting.export_report import size_of
from rigl_keras.exporting.signatures import Signature
from rigl_keras.flops.counting import count
from rigl_keras.masking.leaves import trained_weights
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.selection import named_kernels

__all__ = [
    "Artefact",
    "BATCH_SIZES",
    "checked_sizes",
    "compare_artefacts",
    "costs",
]

BATCH_SIZES = (1, 32, 128)

_SECONDS = 4.0  # most seconds of each measurement
_TURN = 0.05  # seconds of calls in a turn of each side


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A model as a format has written it.

    Attributes:
        format: The format.
        folder: The folder that was written.
        signature: The model's inputs.
        outputs: Names of its outputs, in order.
    """

    format: Format
    folder: Path
    signature: Signature
    outputs: Sequence[str]

    def load(self) -> Runner:
        """Returns the loaded artefact, a function of named arrays."""
        return self.format.load(self.folder, self.signature, self.outputs)

    def weight_bytes(self) -> int:
        """Returns the size of the weights, or of all if not separate."""
        return size_of(self.folder / (self.format.weights or ""))


def checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns valid batch sizes, each once.

    Args:
        sizes: At least one int, each at least 1.

    Raises:
        ValueError: They are not such sizes.
    """
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
        raise ValueError(
            "batch_sizes must be a list of sizes, such as [1, 32]. Received: "
            f"batch_sizes={sizes!r}."
        )
    return tuple(
        dict.fromkeys(integer("batch_sizes", n, at_least=1) for n in sizes)
    )


def compare_artefacts(
    ours: Artefact, dense: Artefact, batch_sizes: Sequence[int]
) -> dict[str, object]:
    """Returns sizes and times of an artefact and the dense SavedModel.

    Args:
        ours: The artefact.
        dense: The dense SavedModel of the same model.
        batch_sizes: Batch sizes for the latency. The model must accept them.

    Returns:
        Fields of an `ExportReport`. Calls of both sides alternate. There are no
        times if an input is of strings, which cannot be drawn.
    """
    sides = {"ours": ours.load, "dense": dense.load}
    signature = ours.signature
    loading = _timing.interleaved(
        sides, rounds=_rounds(sides, at_least=3, at_most=9)
    )
    run, run_dense = sides["ours"](), sides["dense"]()
    latency, dense_latency = {}, {}
    for batch in batch_sizes:
        try:
            x = signature.random(batch)
        except ValueError:  # strings cannot be drawn
            continue
        calls = {"ours": lambda: run(x), "dense": lambda: run_dense(x)}  # noqa: B023
        seconds = _timing.interleaved(
            calls,
            rounds=_rounds(calls, at_least=5, at_most=50, turn=_TURN),
            turn=_TURN,
        )
        latency[batch] = seconds["ours"]
        dense_latency[batch] = seconds["dense"]
    return {
        "gzip_bytes": size_of(ours.folder, compressed=True),
        "dense_bytes": size_of(dense.folder),
        "dense_gzip_bytes": size_of(dense.folder, compressed=True),
        "dense_variable_bytes": dense.weight_bytes(),
        "load_seconds": loading["ours"],
        "dense_load_seconds": loading["dense"],
        "latency": latency,
        "dense_latency": dense_latency,
    }


def _rounds(sides: Mapping[str, Callable[[], object]], **bounds):
    return _timing.rounds_within(_SECONDS, sides, **bounds)


def costs(model: keras.Model, small: keras.Model) -> dict[str, object]:
    """Returns the costs of a model, and of its exported form.

    Args:
        model: The model.
        small: The same model, or its compacted form.

    Returns:
        Fields of an `ExportReport`. FLOPs are None if an axis of the input is
        free.
    """
    masked = masked_layers(model)
    kernels = [m.kernel.numpy() for m in masked] or [
        kernel.variable.numpy() for kernel in named_kernels(model).values()
    ]
    weights = sum(kernel.size for kernel in kernels)
    ones = sum(
        int(np.count_nonzero(array))
        for array in [m.mask.numpy() for m in masked] or kernels
    )
    try:
        cost = count(model)
        small_cost = cost if small is model else count(small)
        dense_flops = float(cost.dense_inference_flops)
        flops = float(_flops(small, small_cost))
    except ValueError:  # an axis of the input is free
        dense_flops = flops = None
    return {
        "density": ones / weights,
        "parameters": sum(math.prod(v.shape) for v in trained_weights(model)),
        "nonzeros": sum(
            int(np.count_nonzero(v.numpy()))
            if len(v.shape) > 1
            else math.prod(v.shape)
            for v in trained_weights(small)
        ),
        "inference_flops": flops,
        "dense_inference_flops": dense_flops,
    }


def _flops(model, cost):
    """Returns the cost of one sample from the nonzero weights."""
    kernels = {n: m.kernel for n, m in masked_layers(model).named.items()}
    kernels |= {n: k.variable for n, k in named_kernels(model).items()}
    return sum(
        layer.flops_at(
            np.count_nonzero(kernels[layer.name].numpy())
            / math.prod(layer.shape)
            # A kernel of a masked layer that is not masked has no name.
            if layer.name in kernels
            else layer.density
        )
        for layer in cost.layers
    )
