"""A finished model to an artefact that is small, checked and measured."""

import functools
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import artefacts, compaction, serving, timing, writing
from rigl_keras.arguments import boolean, choice, number
from rigl_keras.export_report import (
    ExportReport,
    foreign_files,
    size_of,
    write_report,
)
from rigl_keras.flops import count
from rigl_keras.sparsify import masked_layers, named_kernels, trained_weights

__all__ = ["TOLERANCES", "export"]

# By how much outputs may differ, in units of `_spread`, by the precision that
# is computed in. What int8 loses depends on the network: a few hundredths in
# convolutional ones.
TOLERANCES = {"float32": 1e-5, "float16": 2e-2, "int8": 0.1}

_BATCHES = (1, 32)  # of which the latency is measured
_SECONDS = 4.0  # that each of these measurements may take
_TURN = 0.05  # seconds of calls, before the other side has its turn


def export(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    format: str = "saved_model",
    fold_batch_norm: bool = False,
    remove_dead_units: bool = False,
    quantization: str | None = None,
    inputs=None,
    tolerance: float | None = None,
    measure: bool = True,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a model for inference, small on disk and checked.

    1. The model is refused if it holds NaNs, or weights outside its masks.
    2. Batch norms are folded and dead units removed, where asked for
       (`compaction`).
    3. The artefact is written beside `path`, loaded back, and compared with
       the model on random inputs, and on those given.
    4. It is measured against a dense SavedModel of the same model: size,
       time to load, and latency, by calls that alternate.
    5. It takes its place at `path`, with the report as `export.json`. An
       error at any point leaves `path` as it was.

    A SavedModel loads with TensorFlow alone and has the signature
    `serving_default`, with the inputs of the model by name, any batch size,
    and its outputs: by the keys of a dict, else `output_0`, `output_1`, ...
    Its kernels become dense again when it is loaded, so that a call costs
    what it costs in the dense model; under `"sparse_saved_model"` they stay
    sparse, and a call costs less. The other formats are those of
    `artefacts.write`.

    Args:
        model: A masked model of any kind, or one that `strip` returned.
        path: Folder to write. Of a link to a folder, that folder; the link
            stays. What `..` leads to is for the system to say.
        format: `"saved_model"`; `"sparse_saved_model"`, whose layers compute
            with sparse kernels wherever these are faster on this machine, and
            which needs their op library: it is in the folder, with a
            `load.py`; `"tflite"`, `"onnx"` or `"keras"`, of which the folder
            holds a file `model.tflite`, `model.onnx` or `model.keras`.
        fold_batch_norm: Whether batch norms become part of the layer before
            them, where the graph allows.
        remove_dead_units: Whether units without a connection to the input or
            the output are removed, and layers get smaller.
        quantization: Of `"tflite"`: `"float16"`, or `"int8"`, which needs
            `inputs`. None: float32.
        inputs: Examples on which the outputs are compared too, in the
            structure on which the model is called. Under `"int8"` they
            calibrate the ranges of activations, and a hundred or more should
            be typical of what is served.
        tolerance: By how much outputs may differ, in units of how far they
            spread around their mean. None: `TOLERANCES`, by the precision.
        measure: Whether sizes, load time and latency of the dense SavedModel
            are measured. False is quicker.
        overwrite: Whether an earlier export at `path` may be replaced.

    Returns:
        An `ExportReport`, whose path is the one that was passed.

    Raises:
        ValueError: An argument is wrong, `path` exists, or the model cannot
            be exported or disagrees with what was written.
        DiskFullError: There is no room.

    Example:

    >>> print(export(model, "exported/"))
    >>> tf.saved_model.load("exported/").signatures["serving_default"]
    """
    _check_format(format, quantization, inputs)
    for name, value in (
        ("fold_batch_norm", fold_batch_norm),
        ("remove_dead_units", remove_dead_units),
        ("measure", measure),
        ("overwrite", overwrite),
    ):
        boolean(name, value)
    if tolerance is not None:
        tolerance = number(
            "tolerance", tolerance, above=0, rule="must be a positive number"
        )
    target = _checked_target(path, overwrite)
    _check_weights(model)
    if tf.distribute.has_strategy():
        raise ValueError(
            "export loads what it writes, which TensorFlow cannot in the scope "
            f"of a {type(tf.distribute.get_strategy()).__name__}. Call it "
            "outside of strategy.scope()."
        )
    signature = serving.signature_of(model, inputs)
    examples = _examples(signature, inputs, quantization)
    try:
        wanted = [serving.outputs_of(model, signature, x) for x in examples]
    except tf.errors.OpError as error:
        raise ValueError(
            f"Model {model.name!r} fails on the inputs that outputs are "
            f"compared on: {str(error.message).splitlines()[0]} Received: "
            f"inputs of shape {[x.shape for x in examples[-1].values()]}. "
            "Pass inputs that it takes."
        ) from error
    if not all(serving.is_finite(y) for w in wanted for y in w.values()):
        raise ValueError(
            f"Model {model.name!r} computes NaN or infinite outputs: a model "
            "like this is not exported."
        )
    if tolerance is None:
        tolerance = _tolerance(model, quantization)
    small, compacted = _compacted(model, fold_batch_norm, remove_dead_units)
    with (
        writing.set_aside(target, replace=overwrite) as folder,
        tempfile.TemporaryDirectory() as scratch,
    ):

        def write(**concession):
            artefacts.write(
                small,
                signature,
                folder,
                format,
                quantization=quantization,
                calibration=examples[-1] if quantization == "int8" else None,
                **concession,
            )
            return functools.partial(
                artefacts.load, folder, format, signature, list(wanted[0])
            )

        try:
            difference, notes = _write_and_compare(
                write,
                artefacts.FORMATS[format].concessions,
                examples,
                wanted,
                tolerance,
            )
        except ValueError as error:
            way_out = ""
            if isinstance(error, _DisagreesError):
                way_out = _way_out(fold_batch_norm, quantization)
            raise ValueError(
                f"Model {model.name!r} cannot be exported as {format}: {error}"
                f"{way_out} Nothing was written to {os.fspath(path)!r}."
            ) from error
        measured = {}
        if measure:
            dense = Path(scratch) / "dense"
            artefacts.write(
                model, signature, dense, "saved_model", sparse=False
            )
            measured = _measured(folder, dense, format, signature, wanted[0])
        report = ExportReport(
            path=str(Path(path)),
            format=format,
            quantization=quantization,
            bytes=size_of(folder),
            variable_bytes=_variable_bytes(folder, format),
            **_accounts(model, small),
            max_difference=difference,
            tolerance=tolerance,
            **measured,
            **compacted,
            notes=tuple(notes),
        )
        write_report(report, folder)
    return report


def _check_format(format, quantization, inputs):
    choice("format", format, tuple(artefacts.FORMATS))
    choice("quantization", quantization, (None, *artefacts.QUANTIZATIONS))
    artefacts.check_installed(format)
    if quantization is not None and format != "tflite":
        raise ValueError(
            f"quantization={quantization!r} is of format='tflite'. Received: "
            f"format={format!r}."
        )
    if quantization == "int8" and inputs is None:
        raise ValueError(
            "quantization='int8' reads the ranges of activations from typical "
            "examples. Pass inputs, a hundred or more."
        )


def _checked_target(path, overwrite):
    """Returns the folder to write, without links, if it may be written."""
    named = isinstance(path, (str, os.PathLike)) and os.fspath(path)
    if not isinstance(named, str) or not named:
        raise ValueError(
            "path must be that of the folder to write. Received: "
            f"path={path!r}."
        )
    try:
        os.fsencode(named).decode()
        # As the system does: a folder's `..` is where the folder is, and not
        # where the link is that led to it.
        target = Path(named).resolve()
        there = os.path.lexists(target)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"path must be one that can be written. Received: path={named!r} "
            f"({error})."
        ) from error
    path = Path(named)
    file = path.suffix.removeprefix(".")
    if file in artefacts.FORMATS:
        raise ValueError(
            f"path is the folder that is written, and the file in it is named "
            f"{artefacts.FORMATS[file].file}. Received: path={named!r}. "
            f"Pass {str(path.with_suffix(''))!r}."
        )
    if any(character in str(target) for character in "*?[]"):
        raise ValueError(
            "path may not hold *, ?, [ or ], which TensorFlow takes for a "
            f"pattern. Received: path={named!r}, which is {str(target)!r}."
        )
    if not there and os.path.islink(path):
        raise ValueError(
            f"{named!r} is a link to {str(target)!r}, which does not exist. "
            "Make that folder's path the one you pass, or remove the link."
        )
    if not there:
        return target
    if not overwrite:
        raise ValueError(
            f"{named!r} exists. Pass overwrite=True (--overwrite) to "
            "replace it, or another path."
        )
    foreign = foreign_files(target)
    if foreign:
        raise ValueError(
            "overwrite=True replaces what an export has written, and "
            f"{named!r} holds something else: {foreign[0]}. Delete it "
            f"yourself, or pass another path. Received: path={named!r}."
        )
    return target


def _check_weights(model):
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            "export takes a built Keras model. Received: "
            f"{getattr(model, 'name', model)!r}."
        )
    for variable in model.weights:
        if not serving.is_finite(variable.numpy()):
            raise ValueError(
                f"Weight {variable.path!r} holds NaN or infinite values: a "
                "model like this is not exported."
            )
    for layer in masked_layers(model):
        mask = layer.mask.numpy()
        if not np.isin(mask, [0, 1]).all():
            raise ValueError(
                f"The mask of layer {layer.name!r} holds other values than "
                "zeros and ones: it is damaged."
            )
        outside = layer.kernel.numpy()[mask == 0]
        if outside.any():
            raise ValueError(
                f"Layer {layer.name!r} holds {np.count_nonzero(outside)} "
                "weights outside its mask. layer.assign_mask(layer.mask) "
                "removes them."
            )
    if not masked_layers(model) and not serving.served_kernels(model):
        raise ValueError(
            f"Model {model.name!r} has no masked layer, and no kernel with "
            "zeros enough to leave out. Keras exports a dense model: "
            "model.export(path)."
        )


def _examples(signature, inputs, quantization):
    """Returns what outputs are compared on: inputs by name, those given last.

    Random inputs are of two batch sizes, to see that both can be served. An
    int8 model knows the ranges of what it was calibrated on, and nothing else.
    """
    given = [] if inputs is None else [signature.named(inputs)]
    if quantization == "int8":
        return given
    try:
        drawn = [signature.random(n, seed=n) for n in (1, 3)]
    except ValueError:
        if not given:
            raise
        return given
    return [*drawn[signature.batch_size is not None :], *given]


def _compacted(model, fold_batch_norm, remove_dead_units):
    """Returns what is exported of a model, and what went, for the report."""
    went = {}
    if remove_dead_units:
        model, removal = compaction.remove_dead_units(model)
        went["removed"] = removal.layers
    if fold_batch_norm:
        model, folding = compaction.fold_batch_norm(model)
        went |= {"folded": folding.folded, "not_folded": folding.kept}
    return model, went


def _tolerance(model, quantization):
    if quantization is not None:
        return TOLERANCES[quantization]
    half = any(
        "16" in (layer.compute_dtype or "") for layer in model._flatten_layers()
    )
    return TOLERANCES["float16" if half else "float32"]


class _DisagreesError(ValueError):
    """What was written computes something else than the model."""


def _write_and_compare(write, concessions, examples, wanted, tolerance):
    """Writes an artefact whose outputs, loaded back, are those wanted.

    Args:
        write: Writes it, given a concession, and returns how to load it.
        concessions: What may be given up, and how that is said.
        examples, wanted: Inputs and outputs by name, a pair for each batch.
        tolerance: By how much outputs may differ.

    Returns:
        `(difference, notes)`: the largest difference, and what was given up
        to get there.

    Raises:
        ValueError: No way of writing it agrees; why the first does not.
    """
    failures = []
    for concession, said in [({}, ""), *concessions]:
        try:
            load = write(**concession)
            # Loaded anew, states begin where those of the model are.
            # Not Python's max, which may pass over a NaN.
            difference = float(
                np.max(
                    [
                        _difference(load()(arrays), outputs)
                        for arrays, outputs in zip(
                            examples, wanted, strict=True
                        )
                    ]
                )
            )
            if not difference <= tolerance:
                raise _DisagreesError(
                    "the artefact, loaded back, disagrees with the model: its "
                    f"outputs differ by {difference:.1e} of their spread, "
                    f"more than {tolerance:.0e}."
                )
        except ValueError as error:
            failures.append(error)
        else:
            notes = [f"{said}: otherwise {failures[0]}"] if failures else []
            return difference, notes
    raise failures[0]


def _difference(got, wanted):
    """Returns how far outputs are from others, in units of `_spread`."""
    differences = []
    for name, want in wanted.items():
        if name not in got or got[name].shape != want.shape:
            return math.inf
        if want.dtype.kind in "SUO":
            differences.append(0.0 if (got[name] == want).all() else math.inf)
        elif want.size:
            want = want.astype(np.float64)
            difference = np.abs(got[name].astype(np.float64) - want)
            differences.append(float(np.max(difference) / _spread(want)))
    # Not Python's max, which may pass over a NaN.
    return float(np.max(differences, initial=0.0))


def _spread(output):
    """Returns how far an output is from its mean, at most.

    Against that a constant is as wrong as it is. Rounding is relative to the
    size of numbers, so that it counts as a tenth of the largest at least, and
    as a thousandth where all are next to nothing.
    """
    spread = np.max(np.abs(output - np.mean(output)))
    return max(spread, np.max(np.abs(output)) / 10, 1e-3)


def _way_out(folded, quantization):
    if quantization == "int8":
        return (
            " Pass more, and more typical, inputs, quantization='float16', or "
            "a tolerance."
        )
    return " Pass fold_batch_norm=False." if folded else ""


def _measured(folder, dense, format, signature, wanted):
    """Returns sizes and times of an artefact and of the dense SavedModel."""
    sides = {
        "ours": lambda: artefacts.load(folder, format, signature, list(wanted)),
        "dense": lambda: artefacts.load(
            dense, "saved_model", signature, list(wanted)
        ),
    }
    loading = timing.interleaved(
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
        seconds = timing.interleaved(
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
        "dense_variable_bytes": _variable_bytes(dense, "saved_model"),
        "load_seconds": loading["ours"],
        "dense_load_seconds": loading["dense"],
        "latency": latency,
        "dense_latency": dense_latency,
    }


def _rounds(sides: dict[str, Callable[[], object]], **bounds):
    return timing.rounds_within(_SECONDS, sides, **bounds)


def _variable_bytes(folder, format):
    if format == "saved_model":
        folder = folder / "variables"
    return size_of(folder)


def _accounts(model, small):
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
