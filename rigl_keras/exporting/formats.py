"""The formats of an exported model: how each is written, and run again."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import kernels
from rigl_keras.compaction.graphs import unmasked_copy
from rigl_keras.exporting import saved_model, signatures, sparse_saved_model
from rigl_keras.exporting.onnx import load_onnx, write_onnx
from rigl_keras.exporting.signatures import Signature
from rigl_keras.exporting.tflite import load_tflite, tflite
from rigl_keras.masking import model_tree

__all__ = [
    "FORMATS",
    "Format",
    "QUANTIZATIONS",
    "Runner",
    "check_installed",
    "load",
    "write",
]

QUANTIZATIONS = ("float16", "int8")
# From named inputs to named outputs.
Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        file: Name of the file in the folder that is written. None: the folder
            itself is what is loaded.
        needs: Packages that it needs besides TensorFlow.
        concessions: What is given up, in this order, for a model that the
            format otherwise cannot hold, or runs wrongly: each some arguments
            of `write`, and in words.
    """

    file: str | None
    needs: tuple[str, ...] = ()
    concessions: tuple[tuple[Mapping[str, object], str], ...] = ()


FORMATS = {
    "saved_model": Format(None),
    "sparse_saved_model": Format(None),
    "tflite": Format(
        "model.tflite",
        concessions=(
            ({"sparse": False}, "kernels are stored dense"),
            ({"batch_size": 1}, "the batch size is 1"),
            (
                {"sparse": False, "batch_size": 1},
                "kernels are stored dense and the batch size is 1",
            ),
        ),
    ),
    "onnx": Format("model.onnx", needs=("tf2onnx", "onnx", "onnxruntime")),
    "keras": Format("model.keras"),
}


def check_installed(format: str) -> None:
    """Raises ValueError unless what a format needs is installed.

    Args:
        format: One of `FORMATS`.
    """
    missing = [
        package
        for package in FORMATS[format].needs
        if importlib.util.find_spec(package) is None
    ]
    if format == "sparse_saved_model" and kernels.load() is None:
        raise ValueError(
            f"format={format!r} needs the op library of the sparse kernels: "
            f"{kernels.unavailable()}. Pass format='saved_model'."
        )
    if missing:
        raise ValueError(
            f"format={format!r} needs packages that are not installed. pip "
            f"install {' '.join(missing)}"
        )


def write(
    model: keras.Model,
    signature: Signature,
    folder: str | os.PathLike,
    format: str,
    *,
    sparse: bool = True,
    quantization: str | None = None,
    calibration: Mapping[str, np.ndarray] | None = None,
    batch_size: int | None = None,
) -> None:
    """Writes a model in one format.

        saved_model  kernels as values and positions (`sparse_storage`)
        sparse_saved_model
                     the same weights, computed with sparsely (`fusion`)
        tflite       LiteRT's sparse encoding (EXPERIMENTAL_SPARSITY)
        onnx         sparse initializers, through Keras's exporter
        keras        the plain Keras model, kernels dense

    Args:
        model: A built model. Kernels of a masked one must be zero outside
            their masks.
        signature: What it is called on.
        folder: An empty folder.
        format: One of `FORMATS`.
        sparse: Whether kernels that take less space so are stored sparse.
        quantization: Of a tflite file: `"float16"` weights, or `"int8"`
            weights and activations. None: float32.
        calibration: Named inputs from which the ranges of activations are
            read, for `"int8"`.
        batch_size: Batch size of a tflite file. None: free.

    Raises:
        ValueError: The format cannot hold this model.
    """
    path = _path(folder, format)
    if format == "saved_model":
        saved_model.save(model, signature, path, sparse=sparse)
    elif format == "sparse_saved_model":
        sparse_saved_model.save(model, signature, path)
    elif format == "tflite":
        path.write_bytes(
            tflite(
                model,
                signature.with_batch_size(batch_size),
                sparse,
                quantization,
                calibration,
            )
        )
    elif format == "onnx":
        write_onnx(model, path, sparse)
    else:
        unmasked_copy(model).save(path)


def load(
    folder: str | os.PathLike,
    format: str,
    signature: Signature,
    outputs: Sequence[str],
) -> Runner:
    """Loads what `write` has written.

    Args:
        folder: Where it was written.
        format: One of `FORMATS`.
        signature: Of the model.
        outputs: Names of its outputs, in order (`serving.named_outputs`).

    Returns:
        A function from named inputs to named outputs.
    """
    path = _path(folder, format)
    if format in ("saved_model", "sparse_saved_model"):
        sparse = format == "sparse_saved_model"
        loaded = (sparse_saved_model.load if sparse else tf.saved_model.load)(
            str(path)
        )
        served = loaded.signatures["serving_default"]
        return lambda arrays: _arrays(
            served(**{n: tf.constant(array) for n, array in arrays.items()})
        )
    if format == "tflite":
        return load_tflite(path)
    if format == "onnx":
        return load_onnx(path, signature, outputs)
    model = keras.models.load_model(path, compile=False)
    serve = tf.function(
        lambda arrays: signatures.named_outputs(
            model_tree.call_model(model, signature.pack(arrays))
        ),
        reduce_retracing=True,
    )
    return lambda arrays: _arrays(
        serve({n: tf.constant(array) for n, array in arrays.items()})
    )


def _path(folder, format):
    file = FORMATS[format].file
    return Path(folder) if file is None else Path(folder) / file


def _arrays(tensors):
    return {name: tensor.numpy() for name, tensor in tensors.items()}
