"""Loads weights into masked models, or says why it cannot."""

import contextlib
import os
import warnings
from collections.abc import Callable

import keras
import numpy as np

from rigl_keras._text import first_line, last_line
from rigl_keras._warn import warn
from rigl_keras.masking.layer_kernels import kernel_at
from rigl_keras.masking.layer_state import copy_state
from rigl_keras.masking.leaves import leaf_layers
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.model_tree import is_graph
from rigl_keras.masking.stripping import strip_copy
from rigl_keras.masking.surgery import CannotCopy

__all__ = ["load_weights", "weight_loader"]


def load_weights(model: keras.Model, path: str | os.PathLike) -> None:
    """Loads weights into a masked model: of a masked one, or of a dense one.

    A file of a masked model brings its masks. One of the dense model is
    masked by those that the model has, and how many weights that removes is
    said. Either the whole file is loaded or nothing.

    Args:
        model: A masked model.
        path: A file that `save_weights` has written (`.weights.h5`), or a
            `.keras` file.

    Raises:
        ValueError: The model is dense, or the file is of another network or
            cannot be read. The model is unchanged then.

    Example:

    >>> dense.save_weights("dense.weights.h5")
    >>> load_weights(sparsify(dense, 0.1), "dense.weights.h5")
    """
    if not masked_layers(model):
        raise ValueError(
            f"Model {model.name!r} has no masked layer. Keras loads weights "
            "into a dense model: model.load_weights(path)."
        )
    try:
        with _unchanged_by_errors(model):
            # Keras warns of each layer that does not fit, before it fails.
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                # That of the class: a copy that `sparsify` makes has this one.
                type(model).load_weights(model, path)
    except ImportError:
        raise
    # A damaged file ends in whatever the readers of zip files, of HDF5 and of
    # arrays run into: BadZipFile, RuntimeError, zlib.error, MemoryError, ...
    except Exception as error:
        try:
            plain = strip_copy(model) if is_graph(model) else None
        except CannotCopy:
            plain = None
        if plain is None:
            raise ValueError(
                f"{str(path)!r} does not hold masked weights of this model "
                f"({first_line(error)}). The weights of a dense model are "
                "loaded into a dense one of its class, and "
                "with_masks(dense, masked_layers(model).masks) masks them."
            ) from error
    else:
        # No file of ours holds weights outside its masks.
        for masked in masked_layers(model):
            masked.assign_mask(masked.mask)
        for warning in said:
            warn(
                str(warning.message),
                warning.category,
            )
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain.load_weights(path)
        _check_no_masks(model, plain)
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} holds the weights of another network than "
            f"{model.name!r}, masked or dense, or cannot be read: "
            f"{last_line(error)} The model is unchanged."
        ) from error
    removed = 0
    for layer, loaded in zip(
        leaf_layers(model), leaf_layers(plain), strict=True
    ):
        copy_state(loaded, layer)
        if not isinstance(layer, Masked):
            continue
        for masked in layer.masked_kernels():
            kernel, mask = masked.kernel.numpy(), masked.mask.numpy()
            removed += np.count_nonzero(kernel[mask == 0])
            masked.assign_mask(mask)
    warn(
        f"{str(path)!r} holds dense weights: the masks of model "
        f"{model.name!r} were applied, and set {removed:,} of them to zero.",
    )


@contextlib.contextmanager
def _unchanged_by_errors(model):
    """Puts a model's variables back if the context ends in an error.

    Those of its optimizer and metrics as well, which a file may hold.
    """
    variables = [*model.variables]
    if getattr(model, "optimizer", None) is not None:
        variables += model.optimizer.variables
    for metric in model.metrics:
        variables += metric.variables
    before = [variable.numpy() for variable in variables]
    try:
        yield
    except BaseException:  # Ctrl-C as well
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        raise


def _check_no_masks(model, plain):
    """Refuses masks that were read as kernels.

    Within a model of the user's own class a mask lies in a file where the dense
    layer has its first weight. If that has no bias, and the kernel in the file
    is damaged, what is left looks like the file of a dense model.
    """
    for layer, loaded in zip(
        leaf_layers(model), leaf_layers(plain), strict=True
    ):
        for path in layer.kernels if isinstance(layer, Masked) else ():
            values = np.unique(kernel_at(loaded, path).variable.numpy())
            if np.array_equal(values, [0, 1]):
                raise ValueError(
                    f"The kernel {path!r} of layer {layer.name!r} holds zeros "
                    "and ones alone, as masks do: the file is damaged."
                )


def weight_loader(model: keras.Model) -> Callable[..., None]:
    """Returns what a masked model has for its method `load_weights`."""

    def loading(filepath, **options):
        if options:  # of Keras's own, which this knows nothing of
            return type(model).load_weights(model, filepath, **options)
        return load_weights(model, filepath)

    return loading
