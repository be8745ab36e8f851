"""The formats of an exported model: how each is written, and run again."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import fusion, kernels, serving
from rigl_keras.graphs import plain_copy
from rigl_keras.layers import masks_applied
from rigl_keras.maskable import is_graph
from rigl_keras.serving import Signature
from rigl_keras.sparsify import (
    first_line,
    input_structure,
    masked_layers,
    strip,
)

__all__ = [
    "FORMATS",
    "QUANTIZATIONS",
    "Format",
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
        serving.save(model, signature, path, sparse=sparse)
    elif format == "sparse_saved_model":
        fusion.save(model, signature, path)
    elif format == "tflite":
        path.write_bytes(
            _tflite(
                model,
                signature.with_batch_size(batch_size),
                sparse,
                quantization,
                calibration,
            )
        )
    elif format == "onnx":
        _write_onnx(model, path, sparse)
    else:
        _plain(model).save(path)


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
        loaded = (fusion.load if sparse else tf.saved_model.load)(str(path))
        served = loaded.signatures["serving_default"]
        return lambda arrays: _arrays(
            served(**{n: tf.constant(array) for n, array in arrays.items()})
        )
    if format == "tflite":
        return _load_tflite(path)
    if format == "onnx":
        return _load_onnx(path, signature, outputs)
    model = keras.models.load_model(path, compile=False)
    serve = tf.function(
        lambda arrays: serving.named_outputs(
            serving.call_model(model, signature.pack(arrays))
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


def _plain(model):
    """Returns a model without masks; the given one stays as it is."""
    if is_graph(model):
        return plain_copy(model)  # and without an optimizer
    if not masked_layers(model):
        return model
    # Stripping would change a subclassed model in place: a copy is stripped.
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.keras"
        model.save(path)
        try:
            copy = keras.models.load_model(path, compile=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Model {model.name!r} is subclassed, and Keras cannot make a "
                "copy of it to strip: its class needs a get_config, and "
                "@keras.saving.register_keras_serializable(). Keras says: "
                f"{first_line(error)}"
            ) from error
    return strip(copy)


# LiteRT.


def _tflite(model, signature, sparse, quantization, calibration):
    served = serving.Served(model, signature, sparse=False)
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [served.function], served
    )
    converter.experimental_enable_resource_variables = True
    converter.optimizations = []
    if sparse:
        converter.optimizations.append(tf.lite.Optimize.EXPERIMENTAL_SPARSITY)
    if quantization is not None:
        converter.optimizations.append(tf.lite.Optimize.DEFAULT)
    if quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantization == "int8":
        _check_no_loop(served.function)
        converter.representative_dataset = lambda: _examples(calibration)
    try:
        with _quiet_interpreter():
            return converter.convert()
    except Exception as error:  # the converter's own classes are private
        # Where it was traced comes first, and then what is wrong.
        reasons = re.findall(r"error: (.*)", str(error)) or [str(error)]
        raise ValueError(
            f"LiteRT's converter fails: {reasons[0][:200]}"
        ) from error


def _check_no_loop(function):
    """Refuses what ends the process when LiteRT calibrates it."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node]
    for inner in graph.library.function:
        nodes += inner.node_def
    if any(node.op in ("While", "StatelessWhile") for node in nodes):
        raise ValueError(
            "LiteRT cannot calibrate the loops of recurrent layers. Pass "
            "quantization='float16'."
        )


def _examples(arrays):
    """Yields the examples one by one, by name."""
    for i in range(len(next(iter(arrays.values())))):
        yield {name: array[i : i + 1] for name, array in arrays.items()}


@contextlib.contextmanager
def _quiet_interpreter():
    """Keeps TensorFlow from saying that its interpreter will move."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter")
        yield


def _load_tflite(path):
    with _quiet_interpreter():
        interpreter = tf.lite.Interpreter(str(path), num_threads=os.cpu_count())
    runner = interpreter.get_signature_runner("serving_default")
    one_by_one = any(
        detail["shape_signature"][:1].tolist() == [1]
        for detail in runner.get_input_details().values()
    )

    def call(arrays):
        try:
            outputs = runner(**arrays)
        except RuntimeError as error:
            raise ValueError(
                f"LiteRT's interpreter fails: {first_line(error)}"
            ) from error
        # What it returns is its own memory, which the next call overwrites.
        return {name: np.array(output) for name, output in outputs.items()}

    def call_one_by_one(arrays):
        outputs = [call(example) for example in _examples(arrays)]
        return {
            name: np.concatenate([output[name] for output in outputs])
            for name in outputs[0]
        }

    return call_one_by_one if one_by_one else call


# ONNX.

_SPARSE_ENTRY = 12  # bytes of a float32 value and its index of 64 bits


def _write_onnx(model, path, sparse):
    import onnx

    plain = _plain(model) if is_graph(model) else model
    serving.call_model(plain, input_structure(plain))  # Keras wants it called
    with warnings.catch_warnings(), masks_applied():
        # Keras looks whether NumPy still has the names that tf2onnx uses.
        warnings.simplefilter("ignore")
        try:
            plain.export(path, format="onnx", verbose=False)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"Keras's ONNX exporter fails: {first_line(error)}"
            ) from error
    if sparse:
        written = onnx.load(path)
        _make_sparse(written.graph)
        onnx.save(written, path)


def _make_sparse(graph):
    """Makes constants sparse where their values and indices are smaller."""
    from onnx import helper, numpy_helper

    for constant in list(graph.initializer):
        array = numpy_helper.to_array(constant)
        at = np.flatnonzero(array)
        if array.dtype != np.float32 or _SPARSE_ENTRY * len(at) >= array.nbytes:
            continue
        graph.sparse_initializer.append(
            helper.make_sparse_tensor(
                numpy_helper.from_array(array.ravel()[at], constant.name),
                numpy_helper.from_array(at.astype(np.int64)),
                array.shape,
            )
        )
        graph.initializer.remove(constant)


def _load_onnx(path, signature, outputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    given = [node.name for node in session.get_inputs()]
    # Keras's exporter keeps names of some inputs, and the order of all.
    named = dict(zip(given, signature.inputs, strict=True))
    if set(given) == set(signature.inputs):
        named = dict(zip(given, given, strict=True))

    def run(arrays):
        feed = {node: arrays[named[node]] for node in given}
        return dict(zip(outputs, session.run(None, feed), strict=True))

    return run
