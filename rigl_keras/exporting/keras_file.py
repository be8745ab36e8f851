"""`.keras` files of the plain model."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import keras
import tensorflow as tf

from rigl_keras._text import as_sentence
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
    loading = (
        'model = keras.models.load_model("{path}/model.keras")',
        "outputs = model.predict(inputs)",
    )

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
        try:
            loaded = keras.models.load_model(self.path(folder), compile=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Keras cannot load it back: {as_sentence(error)} Register "
                "each custom class with "
                "@keras.saving.register_keras_serializable(), or pass "
                "format='saved_model', which needs none."
            ) from error
        model = cast(keras.Model, loaded)

        @tf.function(reduce_retracing=True)
        def serve(**arrays):
            return named_outputs(call_model(model, signature.pack(arrays)))

        return numpy_runner(serve)
