"""Loads weights into masked models, or says why it cannot."""

import contextlib
import os
import warnings
from collections.abc import Callable

import keras
import numpy as np

from rigl_keras._text import first_line, telling_line
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
    """Loads weights into a masked model from a masked or a dense one.

    A file of a masked model brings its masks. Weights of a dense model are
    masked by the model's masks, and a warning says how many this removes. The
    whole file is loaded, or nothing.

    Args:
        model: A masked model.
        path: A file written by `save_weights` (`.weights.h5`), or a `.keras`
            file.

    Raises:
        ValueError: The model is dense, or the file is from another network or
            cannot be read. Then the model is unchanged.

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
            # Keras warns about each layer that does not fit before it fails.
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                # The class's method: copies made by `sparsify` have this
                # function.
                type(model).load_weights(model, path)
    except ImportError:
        raise
    # With a damaged file, the readers of zip files, HDF5 and arrays raise many
    # types of errors: BadZipFile, RuntimeError, zlib.error, MemoryError, ...
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
        # Files of this package hold no weights outside masks.
        for masked in masked_layers(model):
            masked.assign_mask(masked.mask)
        for warning in said:
            warn(
                str(warning.message),
                warning.category,
            )
        return
    _load_dense(model, plain, path)


def _load_dense(model, plain, path):
    """Loads a file of dense weights, through the model's plain copy."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain.load_weights(path)
        _check_no_masks(model, plain)
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} holds the weights of a network other than "
            f"{model.name!r}, masked or dense, or cannot be read: "
            f"{telling_line(error)} The model is unchanged."
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
    """Restores a model's variables if the context ends in an error.

    This includes its optimizer and metrics, which a file may hold.
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

    In a file of a subclassed model, a mask lies where the dense layer has its
    first weight. If the layer has no bias and the kernel in the file is
    damaged, the file looks like that of a dense model.
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
    """Returns the `load_weights` method of a masked model."""

    def loading(filepath, *arguments, **options):
        if arguments or options:  # of Keras, unknown here
            return type(model).load_weights(
                model, filepath, *arguments, **options
            )
        return load_weights(model, filepath)

    return loading
