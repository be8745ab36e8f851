"""SavedModels that call the sparse kernels."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import keras
import tensorflow as tf

from rigl_keras import kernels
from rigl_keras.exporting.base_format import (
    Format,
    Runner,
    WriteOptions,
    numpy_runner,
)
from rigl_keras.exporting.fusion import Fused
from rigl_keras.exporting.signatures import Signature, named_outputs

__all__ = ["LOADER", "SparseSavedModel"]

LOADER = "load.py"
# Where a SavedModel keeps what is not its own.
_LIBRARY = Path("assets.extra", "rigl_keras_kernels.so")


class SparseSavedModel(Format):
    """A SavedModel that computes with sparse kernels.

    It needs their operations: the op library, and a file that loads both, lie
    in its folder. It has the signature `serving_default`.
    """

    def write(
        self,
        model: keras.Model,
        signature: Signature,
        folder: Path,
        options: WriteOptions,
    ) -> None:
        fused = Fused(model, batch_size=signature.batch_size or 128)
        try:
            # Into the cache, where the process has its operations from
            # elsewhere.
            built = kernels.build()
        except kernels.BuildError as error:
            raise ValueError(
                f"There is no library to put beside the model: {error}."
            ) from error
        if not any(layer.choice.sparse for layer in fused.layers):
            reasons = [f"{x.name} ({x.choice.reason})" for x in fused.layers]
            raise ValueError(
                f"no layer of model {model.name!r} is faster by sparse kernels "
                f"here: {', '.join(reasons) or 'it has none'}. Pass "
                "format='saved_model'."
            )

        @tf.function(autograph=False)
        def serve(**inputs):
            return named_outputs(fused(signature.pack(inputs)))

        function = serve.get_concrete_function(**signature.inputs)
        tf.saved_model.save(
            _Function(function), str(folder), signatures=function
        )
        library = Path(folder, _LIBRARY)
        library.parent.mkdir(exist_ok=True)
        shutil.copyfile(built, library)
        loader = _LOADER.format(library=_LIBRARY.as_posix())
        Path(folder, LOADER).write_text(loader)

    def load(
        self, folder: Path, signature: Signature, outputs: Sequence[str]
    ) -> Runner:
        if kernels.load() is None:
            raise ValueError(
                f"Sparse kernels are not available: {kernels.unavailable()}."
            )
        loaded = tf.saved_model.load(str(folder))
        return numpy_runner(loaded.signatures["serving_default"])

    def why_unavailable(self) -> str | None:
        if kernels.load() is not None:
            return None
        return (
            "the op library of the sparse kernels: "
            f"{kernels.unavailable()}. Pass format='saved_model'."
        )


class _Function(tf.Module):
    """A concrete function with the variables that it reads."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.kept = list(function.variables)


_LOADER = '''"""Loads the model here, and the operations that it needs.

    import load
    serve = load.model().signatures["serving_default"]

Elsewhere one line before tf.saved_model.load does it:

    tf.load_op_library("FOLDER/{library}")
"""

from pathlib import Path

import tensorflow as tf

_HERE = Path(__file__).resolve().parent


def model():
    """Returns what tf.saved_model.load does."""
    try:
        return tf.saved_model.load(str(_HERE))
    except (FileNotFoundError, RuntimeError, tf.errors.NotFoundError):
        # Not known yet; a process can load them only once.
        tf.load_op_library(str(_HERE / "{library}"))
        return tf.saved_model.load(str(_HERE))
'''
