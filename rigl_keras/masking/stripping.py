"""Models without their masks: `strip`."""

import functools

import keras

from rigl_keras import replicas
from rigl_keras.kernels import fast_calls
from rigl_keras.masking.layer_state import copy_state
from rigl_keras.masking.leaves import leaf_layers
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.surgery import exchange, exchange_in_copy, release

__all__ = ["strip", "strip_copy"]


def strip(model: keras.Model) -> keras.Model:
    """Returns the plain model of a masked one, with the same outputs.

    The wrapped layers replace the `Masked` ones; their kernels are zero outside
    the masks. The result is a copy or, for a subclassed model, the model
    itself, as in `sparsify`. It loads without this package.

    Args:
        model: A model that `sparsify` returned, trained or not.

    Returns:
        A model of the same kind without masks, not compiled.

    Raises:
        ValueError: The model has no masked layer.
    """
    if not masked_layers(model):
        raise ValueError(
            f"Model {model.name!r} has no masked layer: there is nothing to "
            "strip."
        )
    plain = _stripped(model, exchange)
    if plain is model:
        fast_calls.use_usual_calls(model)
    return plain


def strip_copy(model: keras.Model) -> keras.Model:
    """Like `strip`, but never changes the model itself.

    Args:
        model: A masked Sequential or Functional model.

    Returns:
        A copy without masks. If the constructor of the model's class does not
        take (inputs, outputs), the copy has Keras's class.

    Raises:
        ValueError: A layer cannot be copied.
    """
    return _stripped(
        model, functools.partial(exchange_in_copy, keep_class=False)
    )


def _stripped(model, exchange):
    kept = {
        id(masked.kernel): masked.masked_kernel()
        for layer in leaf_layers(model)
        if isinstance(layer, Masked)
        for masked in layer.masked_kernels()
    }

    def unmask(layer, fresh):
        if not isinstance(fresh, Masked):
            return fresh
        return release(fresh) if fresh.built else fresh.layer

    with replicas.scope(model):
        model, pairs = exchange(model, unmask)
        for layer, new in pairs:
            copy_state(layer, new, values=kept)
    return model
