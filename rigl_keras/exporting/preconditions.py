"""Checks before an export writes anything."""

import os
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from rigl_keras.exporting.export_report import foreign_files
from rigl_keras.exporting.formats import FORMATS
from rigl_keras.exporting.saved_model import kernels_to_store_sparse
from rigl_keras.exporting.signatures import is_finite
from rigl_keras.masking.masked_layers import masked_layers

__all__ = ["check_model", "checked_target"]


def checked_target(path: str | os.PathLike, overwrite: bool) -> Path:
    """Returns the folder to write, with links followed.

    Args:
        path: As it was passed to `export`.
        overwrite: Whether an earlier export there may be replaced.

    Raises:
        ValueError: It is not a path, or nothing may be written there.
    """
    named = isinstance(path, (str, os.PathLike)) and os.fspath(path)
    if not isinstance(named, str) or not named:
        raise ValueError(
            "path must be the path of the folder to write. Received: "
            f"path={path!r}."
        )
    try:
        os.fsencode(named).decode()
        # As the system does: `..` in a folder is relative to the folder, not to
        # the link that led to it.
        target = Path(named).resolve()
        there = os.path.lexists(target)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"path must be one that can be written. Received: path={named!r} "
            f"({error})."
        ) from error
    path = Path(named)
    file = path.suffix.removeprefix(".")
    if file in FORMATS:
        raise ValueError(
            f"path is the folder to write, and the file in it is named "
            f"{FORMATS[file].file}. Received: path={named!r}. "
            f"Pass {str(path.with_suffix(''))!r}."
        )
    if any(character in str(target) for character in "*?[]"):
        raise ValueError(
            "path may not hold *, ?, [ or ], which TensorFlow takes for a "
            f"pattern. Received: path={named!r}, which is {str(target)!r}."
        )
    if not there and os.path.islink(path):
        raise ValueError(
            f"{named!r} is a link to {str(target)!r}, which does not exist. "
            "Pass that folder's path, or remove the link."
        )
    if not there:
        return target
    if not overwrite:
        raise ValueError(
            f"{named!r} exists. Pass overwrite=True (--overwrite) to "
            "replace it, or another path."
        )
    foreign = foreign_files(target)
    if foreign:
        raise ValueError(
            "overwrite=True replaces an earlier export, but "
            f"{named!r} holds something else: {foreign[0]}. Delete it "
            f"yourself, or pass another path. Received: path={named!r}."
        )
    return target


def check_model(model: keras.Model) -> None:
    """Raises ValueError unless a model can be exported.

    It must be built, sparse and finite, and zero outside its masks. No scope of
    a strategy may be open.

    Args:
        model: The model.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            "export takes a built Keras model. Received: "
            f"{getattr(model, 'name', model)!r}."
        )
    for variable in model.weights:
        if not is_finite(variable.numpy()):
            raise ValueError(
                f"Weight {variable.path!r} holds NaN or infinite values, and "
                "cannot be exported."
            )
    for layer in masked_layers(model):
        outside = layer.kernel.numpy()[~layer.mask.numpy()]
        if outside.any():
            raise ValueError(
                f"Layer {layer.name!r} holds {np.count_nonzero(outside)} "
                "weights outside its mask. layer.assign_mask(layer.mask) "
                "removes them."
            )
    if not masked_layers(model) and not kernels_to_store_sparse(model):
        raise ValueError(
            f"Model {model.name!r} has no masked layer, and no kernel with "
            "enough zeros to leave out. Keras exports a dense model: "
            "model.export(path)."
        )
    if tf.distribute.has_strategy():
        raise ValueError(
            "export loads the model that it writes, which TensorFlow cannot do "
            f"in the scope of a {type(tf.distribute.get_strategy()).__name__}. "
            "Call it outside of strategy.scope()."
        )
