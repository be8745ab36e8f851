"""TensorFlow Lite files."""

import contextlib
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from rigl_keras._text import as_sentence, first_line
from rigl_keras.exporting.base_format import (
    Concession,
    Format,
    Quantization,
    Runner,
    WriteOptions,
)
from rigl_keras.exporting.saved_model import Served
from rigl_keras.exporting.signatures import Signature

__all__ = ["TFLite"]


class TFLite(Format):
    """A file for LiteRT (formerly TensorFlow Lite), for phones and others."""

    file = "model.tflite"
    loading = (
        'interpreter = tf.lite.Interpreter("{path}/model.tflite")',
        "outputs = interpreter.get_signature_runner()({inputs})",
    )
    quantizations = {
        "float16": Quantization(),
        "int8": Quantization(
            calibrated=True,
            advice="Pass more, and more typical, inputs, "
            "quantization='float16', or a tolerance.",
        ),
    }
    concessions = (
        Concession({"sparse": False}, "kernels are stored dense"),
        Concession({"batch_size": 1}, "the batch size is 1"),
        Concession(
            {"sparse": False, "batch_size": 1},
            "kernels are stored dense and the batch size is 1",
        ),
    )

    def write(
        self,
        model: keras.Model,
        signature: Signature,
        folder: Path,
        options: WriteOptions,
    ) -> list[str]:
        served = Served(
            model, signature.with_batch_size(options.batch_size), sparse=False
        )
        self.path(folder).write_bytes(_converted(served, options))
        return []

    def load(
        self, folder: Path, signature: Signature, outputs: Sequence[str]
    ) -> Runner:
        with _quiet_interpreter():
            interpreter = tf.lite.Interpreter(
                str(self.path(folder)), num_threads=os.cpu_count()
            )
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
            # The next call overwrites the memory that it returns.
            return {name: np.array(output) for name, output in outputs.items()}

        def call_one_by_one(arrays):
            outputs = [call(example) for example in _examples(arrays)]
            return {
                name: np.concatenate([output[name] for output in outputs])
                for name in outputs[0]
            }

        return call_one_by_one if one_by_one else call


def _converted(served, options):
    """Returns a `Served` model as bytes, made by LiteRT's converter."""
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [served.function], served
    )
    converter.experimental_enable_resource_variables = True
    converter.optimizations = []
    if options.sparse:
        converter.optimizations.append(tf.lite.Optimize.EXPERIMENTAL_SPARSITY)
    if options.quantization is not None:
        converter.optimizations.append(tf.lite.Optimize.DEFAULT)
    if options.quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if options.calibration is not None:
        _check_no_loop(served.function)
        converter.representative_dataset = lambda: _examples(
            options.calibration
        )
    try:
        with _quiet_interpreter():
            return converter.convert()
    except Exception as error:  # the converter's classes are private
        # The traceback comes first, then the error.
        reasons = re.findall(r"error: (.*)", str(error)) or [str(error)]
        reason = as_sentence(ValueError(reasons[0]))
        raise ValueError(f"LiteRT's converter fails: {reason}") from error


def _check_no_loop(function):
    """Refuses models that crash the process when LiteRT calibrates them."""
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
    """Yields examples one at a time, by name."""
    for i in range(len(next(iter(arrays.values())))):
        yield {name: array[i : i + 1] for name, array in arrays.items()}


@contextlib.contextmanager
def _quiet_interpreter():
    """Hides TensorFlow's warning that its interpreter will move."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter")
        yield
