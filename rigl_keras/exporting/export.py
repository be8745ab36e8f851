"""Exports a model to an artefact that is small, checked and measured."""

import dataclasses
import functools
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import keras
import tensorflow as tf

from rigl_keras import _files, compaction
from rigl_keras._checks import boolean, choice, number
from rigl_keras.exporting.base_format import WriteOptions
from rigl_keras.exporting.comparison import (
    DisagreesError,
    comparison_inputs,
    usual_tolerance,
    write_and_compare,
)
from rigl_keras.exporting.export_report import (
    ExportReport,
    size_of,
    write_report,
)
from rigl_keras.exporting.formats import (
    FORMATS,
    QUANTIZATIONS,
    check_available,
    formats_with,
)
from rigl_keras.exporting.measurement import (
    BATCH_SIZES,
    Artefact,
    checked_sizes,
    compare_artefacts,
    costs,
)
from rigl_keras.exporting.preconditions import check_model, checked_target
from rigl_keras.exporting.signatures import (
    is_finite,
    outputs_of,
    signature_of,
)

__all__ = ["export"]

_Arguments = ParamSpec("_Arguments")
# Locks of the models being exported, and of this table.
_turns, _turn = weakref.WeakKeyDictionary(), threading.Lock()


def _in_turn(
    function: Callable[_Arguments, ExportReport],
) -> Callable[_Arguments, ExportReport]:
    """Returns a function that threads run one after the other for a model.

    Comparing, counting and writing a model change state that threads cannot
    share.
    """

    @functools.wraps(function)
    def in_turn(*args: _Arguments.args, **kwargs: _Arguments.kwargs):
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, keras.Model):  # it is refused
            return function(*args, **kwargs)
        with _turn:
            turn = _turns.setdefault(model, threading.RLock())
        with turn:
            return function(*args, **kwargs)

    return in_turn


@_in_turn
def export(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    format: str = "saved_model",
    fold_batch_norm: bool = False,
    remove_dead_units: bool = False,
    quantization: str | None = None,
    inputs: Any = None,
    tolerance: float | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    measure: bool = True,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a model for inference, small on disk and checked.

    1. The model is refused if it holds NaNs, or weights outside its masks.
    2. Batch norms are folded and dead units removed, if requested
       (`compaction`).
    3. The artefact is written beside `path`, loaded back, and compared with the
       model on random inputs, and on `inputs`.
    4. It is measured against a dense SavedModel of the same model: size, time
       to load, and latency, by alternating calls.
    5. It is moved to `path`, with the report as `export.json`. After an error
       at any point, `path` is unchanged.

    Threads that export the same model take turns.

    A SavedModel loads with TensorFlow alone. It has the signature
    `serving_default`, with the inputs of the model by name, any batch size, and
    its outputs: by the keys of a dict, or as `output_0`, `output_1`, ... Its
    kernels become dense when it is loaded, and a call costs as much as in the
    dense model. With `"sparse_saved_model"` and `"native"` they stay sparse,
    and a call costs less. `exporting.formats` describes how each format stores
    them.

    Args:
        model: A masked model of any kind, or one that `strip` returned.
        path: Folder to write. A link to a folder is followed and kept.
        format: `"saved_model"`; `"sparse_saved_model"`, where the model is one
            operation, or several with operations of TensorFlow between them
            (the folder holds the library that they need, and a `load.py`);
            `"native"`, which needs no TensorFlow (the folder holds a file
            `network.rigl`, a library with its C header, and a `network.py`); or
            `"tflite"`, `"onnx"` or `"keras"`, where the folder holds a file
            `model.tflite`, `model.onnx` or `model.keras`.
        fold_batch_norm: Whether to fold batch norms into the layers before
            them, where the graph allows it.
        remove_dead_units: Whether to remove units without a connection to the
            input or the output, which makes layers smaller.
        quantization: For `"tflite"`: `"float16"`, or `"int8"`, which needs
            `inputs`. None: float32.
        inputs: Examples on which the outputs are compared too, in the structure
            of the model's call. For `"int8"` they calibrate the ranges of
            activations: pass at least a hundred, typical of what is served.
        tolerance: By how much outputs may differ, in units of how far they
            spread around their mean. None: `usual_tolerance`, from the
            precision and the depth.
        batch_sizes: Batch sizes, each at least 1, for which latency is
            measured, and for which `"sparse_saved_model"` and `"native"`
            compare what is fastest on this machine. Any other size can be
            served, too. A model with a fixed batch size uses that one.
        measure: Whether to compare what is fastest, and to measure sizes, load
            time and latency of the dense SavedModel. False is quicker.
        overwrite: Whether an earlier export at `path` may be replaced.

    Returns:
        An `ExportReport`, with the path as it was passed.

    Raises:
        ValueError: An argument is wrong, `path` exists, or the model cannot be
            exported or disagrees with the artefact.
        DiskFullError: The disk is full.

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
    batch_sizes = checked_sizes(batch_sizes)
    target = checked_target(path, overwrite)
    check_model(model)
    writer = FORMATS[format]
    calibrated = _is_calibrated(writer, quantization)
    signature = signature_of(model, inputs)
    examples = comparison_inputs(signature, inputs, calibrated=calibrated)
    wanted = _outputs_to_match(model, signature, examples)
    small, compacted = _compacted(model, fold_batch_norm, remove_dead_units)
    if tolerance is None:
        tolerance = usual_tolerance(
            model,
            quantization,
            folded=None if writer.folds else len(compacted.get("folded", ())),
        )
    if signature.batch_size is not None:
        batch_sizes = (signature.batch_size,)
    options = WriteOptions(
        quantization=quantization,
        calibration=examples[-1] if calibrated else None,
        batch_sizes=batch_sizes if measure else (),
    )
    told: list[str] = []
    with _files.set_aside(target, replace=overwrite) as folder:
        artefact = Artefact(writer, folder, signature, list(wanted[0]))

        def write(**changes):
            changed = dataclasses.replace(options, **changes)
            told[:] = writer.write(small, signature, folder, changed)
            return artefact.load

        try:
            largest, notes = write_and_compare(
                write, writer.concessions, examples, wanted, tolerance
            )
        except ValueError as error:
            way_out = ""
            if isinstance(error, DisagreesError):
                way_out = _advice(writer, quantization, fold_batch_norm)
            raise ValueError(
                f"Model {model.name!r} cannot be exported as {format}: {error}"
                f"{way_out} Nothing was written to {os.fspath(path)!r}."
            ) from error
        report = ExportReport(
            path=str(Path(path)),
            format=format,
            quantization=quantization,
            bytes=size_of(folder),
            variable_bytes=artefact.weight_bytes(),
            **costs(model, small),
            max_difference=largest,
            tolerance=tolerance,
            **(_measured(artefact, model, batch_sizes) if measure else {}),
            **compacted,
            notes=(*notes, *told),
        )
        write_report(report, folder)
    return report


def _measured(artefact, model, batch_sizes):
    """Returns sizes and times, compared with a dense SavedModel."""
    with tempfile.TemporaryDirectory() as scratch:
        dense = dataclasses.replace(
            artefact, format=FORMATS["saved_model"], folder=Path(scratch)
        )
        dense.format.write(
            model, dense.signature, dense.folder, WriteOptions(sparse=False)
        )
        return compare_artefacts(artefact, dense, batch_sizes)


def _check_format(format, quantization, inputs):
    choice("format", format, tuple(FORMATS))
    choice("quantization", quantization, (None, *QUANTIZATIONS))
    check_available(format)
    if quantization is None:
        return
    if quantization not in FORMATS[format].quantizations:
        offered = " or ".join(map(repr, formats_with(quantization)))
        raise ValueError(
            f"quantization={quantization!r} needs format={offered}. Received: "
            f"format={format!r}."
        )
    if _is_calibrated(FORMATS[format], quantization) and inputs is None:
        raise ValueError(
            f"quantization={quantization!r} reads the ranges of activations "
            "from typical examples. Pass inputs, at least a hundred."
        )


def _is_calibrated(writer, quantization):
    return bool(quantization) and writer.quantizations[quantization].calibrated


def _outputs_to_match(model, signature, examples):
    """Returns a model's outputs for each batch of examples, by name."""
    try:
        outputs = [outputs_of(model, signature, x) for x in examples]
    except tf.errors.OpError as error:
        raise ValueError(
            f"Model {model.name!r} fails on the inputs that outputs are "
            f"compared on: {str(error.message).splitlines()[0]} Received: "
            f"inputs of shape {[x.shape for x in examples[-1].values()]}. "
            "Pass inputs that it accepts."
        ) from error
    if not all(is_finite(y) for one in outputs for y in one.values()):
        raise ValueError(
            f"Model {model.name!r} computes NaN or infinite outputs, and "
            "cannot be exported."
        )
    return outputs


def _compacted(model, fold_batch_norm, remove_dead_units):
    """Returns a compacted model, and the changes for the report."""
    went = {}
    if remove_dead_units:
        model, removal = compaction.remove_dead_units(model)
        went["removed"] = removal.layers
    if fold_batch_norm:
        model, folding = compaction.fold_batch_norm(model)
        went |= {"folded": folding.folded, "not_folded": folding.kept}
    return model, went


def _advice(writer, quantization, folded):
    """Returns what to pass if outputs disagree, as text after an error."""
    advice = quantization and writer.quantizations[quantization].advice
    if not advice and folded:
        advice = "Pass fold_batch_norm=False."
    return f" {advice}" if advice else ""
