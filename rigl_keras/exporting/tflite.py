"""TensorFlow Lite files."""

import contextlib
import os
import re
import warnings

import numpy as np
import tensorflow as tf

from rigl_keras._text import first_line
from rigl_keras.exporting import saved_model

__all__ = ["load_tflite", "tflite"]

# LiteRT.


def tflite(model, signature, sparse, quantization, calibration):
    served = saved_model.Served(model, signature, sparse=False)
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


def load_tflite(path):
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
