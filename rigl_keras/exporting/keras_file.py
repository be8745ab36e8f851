"""`.keras` files of the plain model."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import keras
import tensorflow as tf

from rigl_keras.compaction.graphs import unmasked_copy
from rigl_keras.exporting.base_format import (
    Format,
    Runner,
    WriteOptions,
    numpy_runner,
)
from rigl_keras.exporting.signatures import Signature, named_outputs
from rigl_keras.masking.model_tree import call_model

__all__ = ["KerasFile"]


class KerasFile(Format):
    """The plain Keras model, with dense kernels."""

    file = "model.keras"

    def write(
        self,
        model: keras.Model,
        signature: Signature,
        folder: Path,
        options: WriteOptions,
    ) -> list[str]:
        unmasked_copy(model).save(self.path(folder))
        return []

    def load(
        self, folder: Path, signature: Signature, outputs: Sequence[str]
    ) -> Runner:
        model = cast(
            keras.Model,
            keras.models.load_model(self.path(folder), compile=False),
        )

        @tf.function(reduce_retracing=True)
        def serve(**arrays):
            return named_outputs(call_model(model, signature.pack(arrays)))

        return numpy_runner(serve)
