"""What an exported model costs: seconds, bytes and FLOPs."""

import math
from collections.abc import Callable

import numpy as np

from rigl_keras import _timing
from rigl_keras.exporting import formats
from rigl_keras.exporting.export_report import size_of
from rigl_keras.flops.counting import count
from rigl_keras.masking.leaves import trained_weights
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.selection import named_kernels

__all__ = ["accounts", "measure_artefact", "variable_bytes"]

_BATCHES = (1, 32)  # of which the latency is measured
_SECONDS = 4.0  # that each of these measurements may take
_TURN = 0.05  # seconds of calls, before the other side has its turn


def measure_artefact(folder, dense, format, signature, wanted):
    """Returns sizes and times of an artefact and of the dense SavedModel."""
    sides = {
        "ours": lambda: formats.load(folder, format, signature, list(wanted)),
        "dense": lambda: formats.load(
            dense, "saved_model", signature, list(wanted)
        ),
    }
    loading = _timing.interleaved(
        sides, rounds=_rounds(sides, at_least=3, at_most=9)
    )
    run, run_dense = sides["ours"](), sides["dense"]()
    latency, dense_latency = {}, {}
    for batch in _BATCHES:
        if signature.batch_size not in (None, batch):
            continue
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
        "gzip_bytes": size_of(folder, compressed=True),
        "dense_bytes": size_of(dense),
        "dense_gzip_bytes": size_of(dense, compressed=True),
        "dense_variable_bytes": variable_bytes(dense, "saved_model"),
        "load_seconds": loading["ours"],
        "dense_load_seconds": loading["dense"],
        "latency": latency,
        "dense_latency": dense_latency,
    }


def _rounds(sides: dict[str, Callable[[], object]], **bounds):
    return _timing.rounds_within(_SECONDS, sides, **bounds)


def variable_bytes(folder, format):
    if format == "saved_model":
        folder = folder / "variables"
    return size_of(folder)


def accounts(model, small):
    """Returns what a model costs, and what it costs as it is exported."""
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
    """Returns the cost of one sample by the weights that are not zero."""
    kernels = {n: m.kernel for n, m in masked_layers(model).named.items()}
    kernels |= {n: k.variable for n, k in named_kernels(model).items()}
    return sum(
        layer.flops_at(
            np.count_nonzero(kernels[layer.name].numpy())
            / math.prod(layer.shape)
            # A kernel beside masked ones of its layer has no name of its own.
            if layer.name in kernels
            else layer.density
        )
        for layer in cost.layers
    )
