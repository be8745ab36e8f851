"""Writes a network to the files that engines read."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import rigl_keras
from rigl_keras._text import first_line
from rigl_keras.compaction.folding import fold_batch_norm
from rigl_keras.experiments.benchmarks.engines.catalogue import Engine
from rigl_keras.experiments.benchmarks.engines.processes import (
    EngineError,
    Process,
)
from rigl_keras.experiments.benchmarks.inference_command import (
    outputs_in_parts,
    set_batch_norms,
)
from rigl_keras.experiments.benchmarks.networks import (
    MODELS as SMALL_MODELS,
)
from rigl_keras.exporting.base_format import WriteOptions
from rigl_keras.exporting.formats import FORMATS, check_available
from rigl_keras.exporting.signatures import Signature, signature_of

__all__ = [
    "FILES",
    "MODELS",
    "Network",
    "TOLERANCE",
    "Writing",
    "network_of",
    "written",
]


def _mobilenet_v2():
    # Any: its annotations do not allow None.
    build: Any = keras.applications.MobileNetV2
    return build(weights=None, classifier_activation=None)


MODELS: Mapping[str, Callable[[], keras.Model]] = {
    **SMALL_MODELS,
    "mobilenet_v2": _mobilenet_v2,
}
TOLERANCE = 1e-4  # difference of outputs, in units of their spread
_CALIBRATION = 64  # examples for the calibration of int8
_LONGEST = 1800.0  # seconds that a conversion may take


@dataclasses.dataclass(frozen=True)
class Network:
    """A sparse network and its signature.

    Attributes:
        masked: The model with its masks.
        plain: The model without wrappers, zero outside the masks.
        signature: The signature of both.
    """

    masked: keras.Model
    plain: keras.Model
    signature: Signature

    def inputs(self, batch: int, *, seed: int = 0) -> np.ndarray:
        """Returns random images."""
        (array,) = self.signature.random(batch, seed=seed).values()
        return array

    def outputs(self, images: np.ndarray) -> np.ndarray:
        """Returns the outputs of the Keras model."""
        (name,) = self.signature.inputs
        return outputs_in_parts(self.plain, self.signature, {name: images})


def network_of(name: str, distribution: str, density: float) -> Network:
    """Returns a sparse network with values like those of a trained one.

    Args:
        name: One of `MODELS`.
        distribution: How density is spread over layers.
        density: Fraction of the masked weights kept.
    """
    keras.utils.set_random_seed(0)
    masked = rigl_keras.sparsify(
        MODELS[name](), density, distribution=distribution
    )
    set_batch_norms(masked)
    plain = rigl_keras.strip(masked)
    return Network(masked, plain, signature_of(plain))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """How and for which engine a file is written.

    Attributes:
        folder: The folder to write to.
        batches: Batch sizes for which the file will be loaded.
        engine: The engine that reads it.
        python: The Python of the engine's environment.
        variables: Environment variables of the engine's process.
    """

    folder: Path
    batches: Sequence[int]
    engine: Engine
    python: str
    variables: Mapping[str, str]


def _saved_model(network, writing):
    return _written("saved_model", network.plain, network, writing.folder)


def _folded_saved_model(network, writing):
    folded, _ = fold_batch_norm(network.plain)
    return _written("saved_model", folded, network, writing.folder)


def _tflite(network, writing):
    return _written("tflite", network.plain, network, writing.folder)


def _onnx(network, writing):
    # Dense: only ONNX Runtime reads sparse initializers.
    return _written("onnx", network.plain, network, writing.folder)


def _written(format, model, network, folder):
    """Writes a model with dense kernels, and returns its path."""
    check_available(format)
    target = folder / "model"
    target.mkdir()
    options = WriteOptions(sparse=False)
    FORMATS[format].write(model, network.signature, target, options)
    return FORMATS[format].path(target)


def _exported(format):
    """Returns a function that writes one of our sparse formats."""

    def write(network, writing):
        target = writing.folder / "model"
        rigl_keras.export(
            network.masked,
            target,
            format=format,
            tolerance=TOLERANCE,
            batch_sizes=tuple(writing.batches),
            measure=False,
        )
        return target

    return write


def _openvino_int8(network, writing):
    onnx = _onnx(network, writing)
    examples = writing.folder / "examples.npy"
    np.save(examples, network.inputs(_CALIBRATION, seed=1))
    target = writing.folder / "int8.xml"
    process = Process(
        [writing.python, str(writing.engine.script), writing.engine.loader],
        environment=writing.variables,
        log=writing.folder / "log",
    )
    try:
        process.ask(
            "prepare",
            limit=_LONGEST,
            path=str(onnx),
            to=str(target),
            inputs=str(examples),
        )
    finally:
        process.close()
    return target


def _pytorch(network, writing):
    path = writing.folder / "network.keras"
    network.plain.save(path)
    sizes = [str(batch) for batch in writing.batches]
    # TensorFlow comes from this process's path, PyTorch from the environment.
    variables = {
        **os.environ,
        **writing.variables,
        "PYTHONPATH": ":".join(filter(None, sys.path)),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    module = f"{__package__}.torch_files"
    with tempfile.TemporaryFile() as printed:
        done = subprocess.run(
            [writing.python, "-m", module, str(path), *sizes],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            timeout=_LONGEST,
            check=False,
        )
        printed.seek(0)
        lines = printed.read().decode(errors="replace").strip().splitlines()
    if done.returncode:
        raise EngineError(f"PyTorch's export fails: {lines[-1][:200]}")
    return {
        batch: path.with_name(f"network-{batch}.pt2")
        for batch in writing.batches
    }


_WRITERS: Mapping[str, Callable[[Network, Writing], Path | dict]] = {
    "native": _exported("native"),
    "sparse_saved_model": _exported("sparse_saved_model"),
    "onnx": _onnx,
    "tflite": _tflite,
    "saved_model": _saved_model,
    "folded_saved_model": _folded_saved_model,
    "pytorch": _pytorch,
    "openvino_int8": _openvino_int8,
}
FILES = tuple(_WRITERS)


def written(kind: str, network: Network, writing: Writing) -> dict[int, Path]:
    """Returns the files of a network, by batch size.

    Args:
        kind: One of `FILES`.
        network: The network.
        writing: How and for which engine to write.

    Raises:
        EngineError: The network cannot be written in this format.
    """
    writing.folder.mkdir()
    try:
        path = _WRITERS[kind](network, writing)
    except (ImportError, ValueError, subprocess.TimeoutExpired) as error:
        raise EngineError(first_line(error)) from error
    if isinstance(path, dict):
        return path
    return dict.fromkeys(writing.batches, path)
