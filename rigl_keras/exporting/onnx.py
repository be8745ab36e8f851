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
from rigl_keras.exporting.signatures import Signature, named_outputs
from rigl_keras.masking.model_tree import call_model, input_structure, is_graph
from rigl_keras.masking.tracing import masks_applied

__all__ = ["Onnx"]

_SPARSE_ENTRY = 12  # bytes of a float32 value and its index of 64 bits


class Onnx(Format):
    """A file for ONNX runtimes, made by Keras's exporter."""

    file = "model.onnx"
    packages = ("tf2onnx", "onnx", "onnxruntime")
    loading = (
        'session = onnxruntime.InferenceSession("{path}/model.onnx")',
        "outputs = session.run(None, {feed})",
    )

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
        called = call_model(plain, input_structure(plain))  # Keras wants that
        with warnings.catch_warnings(), masks_applied():
            # Keras checks whether NumPy has the names that tf2onnx uses.
            warnings.simplefilter("ignore")
            try:
                plain.export(path, format="onnx", verbose=False)
            except (NotImplementedError, TypeError, ValueError) as error:
                raise ValueError(
                    f"Keras's ONNX exporter fails: {first_line(error)}"
                ) from error
        written = onnx.load(path)
        _replace_erfc(written.graph)
        _check_known(written)
        _rename(written.graph, list(signature.inputs), [*named_outputs(called)])
        if options.sparse:
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


def _replace_erfc(graph):
    """Replaces erfc(x), which ONNX lacks, by 1 - erf(x), as in GELU."""
    from onnx import helper, numpy_helper

    for i, node in reversed([*enumerate(graph.node)]):
        if node.op_type != "Erfc":
            continue
        one, erf = f"{node.name}/one", f"{node.name}/erf"
        value = np.ones([], np.float32)
        graph.initializer.append(numpy_helper.from_array(value, one))
        graph.node.remove(node)
        graph.node.insert(i, helper.make_node("Sub", [one, erf], node.output))
        graph.node.insert(i, helper.make_node("Erf", node.input, [erf]))


def _check_known(written):
    """Refuses operations of TensorFlow that tf2onnx left as they are."""
    from onnx import defs

    unknown = [
        f"{node.op_type} ({node.name})"
        for node in written.graph.node
        if not node.domain and not defs.has(node.op_type)
    ]
    if unknown:
        raise ValueError(
            f"ONNX has no operation for {', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}. A grouped convolution is "
            "such a StatefulPartitionedCall. Pass format='tflite' or "
            "'saved_model'."
        )


def _rename(graph, inputs, outputs):
    """Gives inputs and outputs the names that a SavedModel has.

    Keras's exporter keeps the order of all, and the names of some.
    """
    from onnx import helper

    taken = {i.name for i in (*graph.input, *graph.output, *graph.initializer)}
    taken |= {name for node in graph.node for name in node.output}
    for ends, names in ((graph.input, inputs), (graph.output, outputs)):
        if {end.name for end in ends} == set(names) or taken & set(names):
            continue
        for end, name in zip(ends, names, strict=True):
            before, end.name = end.name, name
            if ends is graph.input:
                node = helper.make_node("Identity", [name], [before])
                graph.node.insert(0, node)
            else:
                node = helper.make_node("Identity", [before], [name])
                graph.node.append(node)


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
