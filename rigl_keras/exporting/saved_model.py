"""SavedModels that need only TensorFlow."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from rigl_keras import _keras
from rigl_keras._text import as_sentence
from rigl_keras.exporting.base_format import (
    Format,
    Runner,
    WriteOptions,
    numpy_runner,
)
from rigl_keras.exporting.recurrent_loops import loops_marked
from rigl_keras.exporting.signatures import Signature, named_outputs
from rigl_keras.exporting.sparse_storage import SparseKernels, cheapest_encoding
from rigl_keras.masking.leaves import trained_weights
from rigl_keras.masking.model_tree import call_model
from rigl_keras.masking.tracing import KernelScope, masks_applied

__all__ = [
    "SavedModel",
    "Served",
    "kernels_to_store_sparse",
    "lookup_tables",
]


class SavedModel(Format):
    """A SavedModel for plain TensorFlow, with kernels stored sparse.

    It has the signature `serving_default`.
    """

    weights = "variables"
    loading = (
        'model = tf.saved_model.load("{path}")',
        'outputs = model.signatures["serving_default"]({inputs})',
    )

    def write(
        self,
        model: keras.Model,
        signature: Signature,
        folder: Path,
        options: WriteOptions,
    ) -> list[str]:
        served = Served(model, signature, sparse=options.sparse)
        tf.saved_model.save(served, str(folder), signatures=served.function)
        return []

    def load(
        self, folder: Path, signature: Signature, outputs: Sequence[str]
    ) -> Runner:
        loaded = tf.saved_model.load(str(folder))
        return numpy_runner(loaded.signatures["serving_default"])


def kernels_to_store_sparse(model: keras.Model) -> list[keras.Variable]:
    """Returns the weights that take less space without their zeros.

    Args:
        model: A built model, masked or not.
    """
    return [
        variable
        for variable in trained_weights(model)
        if len(variable.shape) > 1
        and keras.backend.is_float_dtype(variable.dtype)
        and cheapest_encoding(variable.numpy()) != "dense"
    ]


def lookup_tables(model: keras.Model) -> list[Any]:
    """Returns a model's lookup tables, which a SavedModel must hold."""
    return [
        layer.lookup_table
        for layer in _keras.flatten_layers(model)
        if hasattr(layer, "lookup_table")
    ]


class Served(tf.Module):
    """A model as one `tf.function` of its named inputs, with its weights.

    Args:
        model: A built model. Kernels of a masked one must be zero outside
            their masks.
        signature: The model's inputs.
        sparse: Whether to store kernels sparse if that takes less space.
        marked_loops: Recurrent layers of at most this density are marked, as in
            `loops_marked`, and others are operations of the op library where
            these are faster. None: TensorFlow computes all of them.

    Attributes:
        function: The concrete function.
        unmarked: Recurrent layers without a mark, and why.
    """

    def __init__(
        self,
        model: keras.Model,
        signature: Signature,
        *,
        sparse: bool,
        marked_loops: float | None = None,
    ):
        super().__init__()
        unmarked: dict[str, str] = {}
        replaced = kernels_to_store_sparse(model) if sparse else []
        self._kernels = None
        if replaced:
            self._kernels = SparseKernels([v.numpy() for v in replaced])
            self._stored = self._kernels.variables

        # Only the function holds the model: an attribute would be saved, with
        # its masks and dense kernels.
        @tf.function
        def serve(**inputs):
            kernels = self._kernels.read() if self._kernels else []
            with (
                KernelScope() as scope,
                masks_applied(sparse_loops=marked_loops is not None),
                contextlib.ExitStack() as stack,
            ):
                if marked_loops is not None:
                    reasons = stack.enter_context(
                        loops_marked(model, highest_density=marked_loops)
                    )
                    stack.callback(lambda: unmarked.update(reasons))
                for variable, kernel in zip(replaced, kernels, strict=True):
                    scope.give(variable, kernel)
                outputs = call_model(model, signature.pack(inputs))
            return named_outputs(outputs)

        try:
            self.function = serve.get_concrete_function(**signature.inputs)
        except (TypeError, ValueError) as error:  # of Keras, in a user's model
            raise ValueError(
                f"TensorFlow cannot trace it: {as_sentence(error)}"
                f"{_advice_about_free_axes(signature)}"
            ) from error
        self.unmarked = tuple(unmarked.items())
        self._weights = list(self.function.variables)
        self._tables = lookup_tables(model)


def _advice_about_free_axes(signature):
    free = [n for n, spec in signature.inputs.items() if None in spec.shape[1:]]
    if not free:
        return ""
    return (
        f" The axes of {', '.join(free)} are free: give keras.Input a fixed "
        "shape if a layer needs it."
    )
