"""ONNX files."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from rigl_keras._text import first_line
from rigl_keras.compaction.graphs import unmasked_copy
from rigl_keras.exporting.base_format import (
    Format,
    Runner,
    WriteOptions,
)
from rigl_keras.exporting.signatures import Signature
from rigl_keras.masking.model_tree import call_model, input_structure, is_graph
from rigl_keras.masking.tracing import masks_applied

__all__ = ["Onnx"]

_SPARSE_ENTRY = 12  # bytes of a float32 value and its index of 64 bits


class Onnx(Format):
    """A file for ONNX runtimes, made by Keras's exporter."""

    file = "model.onnx"
    packages = ("tf2onnx", "onnx", "onnxruntime")

    def write(
        self,
        model: keras.Model,
        signature: Signature,
        folder: Path,
        options: WriteOptions,
    ) -> list[str]:
        import onnx

        path = self.path(folder)
        plain = unmasked_copy(model) if is_graph(model) else model
        call_model(plain, input_structure(plain))  # Keras needs a call before
        with warnings.catch_warnings(), masks_applied():
            # Keras checks whether NumPy has the names that tf2onnx uses.
            warnings.simplefilter("ignore")
            try:
                plain.export(path, format="onnx", verbose=False)
            except (NotImplementedError, TypeError, ValueError) as error:
                raise ValueError(
                    f"Keras's ONNX exporter fails: {first_line(error)}"
                ) from error
        if options.sparse:
            written = onnx.load(path)
            _make_sparse(written.graph)
            onnx.save(written, path)
        return []

    def load(
        self, folder: Path, signature: Signature, outputs: Sequence[str]
    ) -> Runner:
        import onnxruntime

        session = onnxruntime.InferenceSession(
            str(self.path(folder)), providers=["CPUExecutionProvider"]
        )
        given = [node.name for node in session.get_inputs()]
        # Keras's exporter keeps the names of some inputs, and all their order.
        named = dict(zip(given, signature.inputs, strict=True))
        if set(given) == set(signature.inputs):
            named = dict(zip(given, given, strict=True))

        def run(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
            feed = {node: arrays[named[node]] for node in given}
            return dict(zip(outputs, session.run(None, feed), strict=True))

        return run


def _make_sparse(graph):
    """Makes constants sparse if their values and indices are smaller."""
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
