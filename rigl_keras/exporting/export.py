"""A finished model to an artefact that is small, checked and measured."""

import functools
import os
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import _files, compaction
from rigl_keras._checks import boolean, choice, number
from rigl_keras.exporting import formats, saved_model, signatures
from rigl_keras.exporting.comparison import (
    DisagreesError,
    advice,
    comparison_inputs,
    usual_tolerance,
    write_and_compare,
)
from rigl_keras.exporting.export_report import (
    ExportReport,
    foreign_files,
    size_of,
    write_report,
)
from rigl_keras.exporting.measurement import (
    accounts,
    measure_artefact,
    variable_bytes,
)
from rigl_keras.masking.masked_layers import masked_layers

__all__ = ["export"]


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
    signature = signatures.signature_of(model, inputs)
    examples = comparison_inputs(signature, inputs, quantization)
    try:
        wanted = [signatures.outputs_of(model, signature, x) for x in examples]
    except tf.errors.OpError as error:
        raise ValueError(
            f"Model {model.name!r} fails on the inputs that outputs are "
            f"compared on: {str(error.message).splitlines()[0]} Received: "
            f"inputs of shape {[x.shape for x in examples[-1].values()]}. "
            "Pass inputs that it takes."
        ) from error
    if not all(signatures.is_finite(y) for w in wanted for y in w.values()):
        raise ValueError(
            f"Model {model.name!r} computes NaN or infinite outputs: a model "
            "like this is not exported."
        )
    if tolerance is None:
        tolerance = usual_tolerance(model, quantization)
    small, compacted = _compacted(model, fold_batch_norm, remove_dead_units)
    with (
        _files.set_aside(target, replace=overwrite) as folder,
        tempfile.TemporaryDirectory() as scratch,
    ):

        def write(**concession):
            formats.write(
                small,
                signature,
                folder,
                format,
                quantization=quantization,
                calibration=examples[-1] if quantization == "int8" else None,
                **concession,
            )
            return functools.partial(
                formats.load, folder, format, signature, list(wanted[0])
            )

        try:
            difference, notes = write_and_compare(
                write,
                formats.FORMATS[format].concessions,
                examples,
                wanted,
                tolerance,
            )
        except ValueError as error:
            way_out = ""
            if isinstance(error, DisagreesError):
                way_out = advice(fold_batch_norm, quantization)
            raise ValueError(
                f"Model {model.name!r} cannot be exported as {format}: {error}"
                f"{way_out} Nothing was written to {os.fspath(path)!r}."
            ) from error
        measured = {}
        if measure:
            dense = Path(scratch) / "dense"
            formats.write(model, signature, dense, "saved_model", sparse=False)
            measured = measure_artefact(
                folder, dense, format, signature, wanted[0]
            )
        report = ExportReport(
            path=str(Path(path)),
            format=format,
            quantization=quantization,
            bytes=size_of(folder),
            variable_bytes=variable_bytes(folder, format),
            **accounts(model, small),
            max_difference=difference,
            tolerance=tolerance,
            **measured,
            **compacted,
            notes=tuple(notes),
        )
        write_report(report, folder)
    return report


def _check_format(format, quantization, inputs):
    choice("format", format, tuple(formats.FORMATS))
    choice("quantization", quantization, (None, *formats.QUANTIZATIONS))
    formats.check_installed(format)
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
    if file in formats.FORMATS:
        raise ValueError(
            f"path is the folder that is written, and the file in it is named "
            f"{formats.FORMATS[file].file}. Received: path={named!r}. "
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
        if not signatures.is_finite(variable.numpy()):
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
    if not masked_layers(model) and not saved_model.served_kernels(model):
        raise ValueError(
            f"Model {model.name!r} has no masked layer, and no kernel with "
            "zeros enough to leave out. Keras exports a dense model: "
            "model.export(path)."
        )


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
