"""SavedModels that need TensorFlow alone."""

import os
from pathlib import Path

import keras
import tensorflow as tf

from rigl_keras import _keras
from rigl_keras.exporting.signatures import Signature, named_outputs
from rigl_keras.exporting.sparse_storage import SparseKernels, cheapest_encoding
from rigl_keras.masking.leaves import trained_weights
from rigl_keras.masking.model_tree import call_model
from rigl_keras.masking.tracing import KernelScope, masks_applied

__all__ = ["Served", "save", "served_kernels"]


def served_kernels(model: keras.Model) -> list[keras.Variable]:
    """Returns the weights that take less space if their zeros are left out.

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


class Served(tf.Module):
    """A model as one `tf.function` of its named inputs, and its weights.

    Args:
        model: A built model. Kernels of a masked one must be zero outside
            their masks.
        signature: What it is called on.
        sparse: Whether kernels that take less space so are stored sparse.

    Attributes:
        function: The concrete function.
    """

    def __init__(
        self, model: keras.Model, signature: Signature, *, sparse: bool
    ):
        super().__init__()
        replaced = served_kernels(model) if sparse else []
        self._kernels = None
        if replaced:
            self._kernels = SparseKernels([v.numpy() for v in replaced])
            self._stored = self._kernels.variables

        # The model is held by the function alone: as an attribute it would be
        # saved, with its masks and its dense kernels.
        @tf.function
        def serve(**inputs):
            kernels = self._kernels.read() if replaced else []
            with KernelScope() as scope, masks_applied():
                for variable, kernel in zip(replaced, kernels, strict=True):
                    scope.give(variable, kernel)
                outputs = call_model(model, signature.pack(inputs))
            return named_outputs(outputs)

        self.function = serve.get_concrete_function(**signature.inputs)
        self._weights = list(self.function.variables)
        self._tables = [
            layer.lookup_table
            for layer in _keras.flatten_layers(model)
            if hasattr(layer, "lookup_table")
        ]


def save(
    model: keras.Model,
    signature: Signature,
    path: str | os.PathLike,
    *,
    sparse: bool = True,
) -> None:
    """Writes a SavedModel that plain TensorFlow loads.

    It has the signature `serving_default`.

    Args:
        model, signature, sparse: As in `Served`.
        path: Folder to write.
    """
    served = Served(model, signature, sparse=sparse)
    tf.saved_model.save(served, str(Path(path)), signatures=served.function)
