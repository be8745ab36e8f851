"""SavedModels that call the sparse kernels."""

import os
import shutil
from pathlib import Path

import keras
import tensorflow as tf

from rigl_keras import kernels
from rigl_keras.exporting.fusion import Fused
from rigl_keras.exporting.signatures import Signature, named_outputs

__all__ = ["LOADER", "load", "save"]

LOADER = "load.py"
# Where a SavedModel keeps what is not its own.
_LIBRARY = Path("assets.extra", "rigl_keras_kernels.so")


def save(
    model: keras.Model, signature: Signature, path: str | os.PathLike
) -> None:
    """Writes a SavedModel that computes with sparse kernels.

    It needs their operations, so that the op library and a file that loads
    both are put beside it. It has the signature `serving_default`.

    Args:
        model: As in `Fused`.
        signature: What it is called on.
        path: Folder to write.

    Raises:
        ValueError: As in `Fused`, or no layer is faster by sparse kernels.
    """
    fused = Fused(model, batch_size=signature.batch_size or 128)
    try:
        # Into the cache, where the process has its operations from elsewhere.
        built = kernels.build()
    except kernels.BuildError as error:
        raise ValueError(
            f"There is no library to put beside the model: {error}."
        ) from error
    if not any(layer.choice.sparse for layer in fused.layers):
        told = [f"{one.name} ({one.choice.reason})" for one in fused.layers]
        raise ValueError(
            f"no layer of model {model.name!r} is faster by sparse kernels "
            f"here: {', '.join(told) or 'it has none'}. Pass "
            "format='saved_model'."
        )

    @tf.function(autograph=False)
    def serve(**inputs):
        return named_outputs(fused(signature.pack(inputs)))

    module = tf.Module()
    module.function = serve.get_concrete_function(**signature.inputs)
    module.kept = list(module.function.variables)
    tf.saved_model.save(module, str(path), signatures=module.function)
    library = Path(path, _LIBRARY)
    library.parent.mkdir(exist_ok=True)
    shutil.copyfile(built, library)
    Path(path, LOADER).write_text(_LOADER.format(library=_LIBRARY.as_posix()))


def load(path: str | os.PathLike):
    """Returns the SavedModel that `save` has written.

    Args:
        path: Its folder.

    Raises:
        ValueError: There is no op library.
    """
    if kernels.load() is None:
        raise ValueError(
            f"Sparse kernels are not available: {kernels.unavailable()}."
        )
    return tf.saved_model.load(str(path))


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
