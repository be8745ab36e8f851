"""A small network with sparse products, and what its layers have chosen."""

import keras
import pytest

from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from support.small_models import compiled, small_model

# The fixture `loaded` of a module skips its tests where there is no library.
needs_library = pytest.mark.usefixtures("loaded")

# What `small` chooses if it may.
ALL_BUT_DEPTHWISE = {"conv1": True, "conv2": True, "head": True}


def chosen(model):
    """Returns `{layer: whether its last call was sparse}`."""
    return {
        name: list(layer.chosen_products().values())[-1].sparse
        for name, layer in masked_layers(model).named.items()
        if layer.chosen_products()
    }


def losses_of(model, data, callbacks, *, epochs, batch_size=16):
    """Trains; returns the running mean of the loss at each step."""
    losses = []
    log = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.append(logs["loss"])
    )
    model.fit(
        *data,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        callbacks=[*callbacks, log],
        verbose=0,
    )
    return losses


def small(product, **options):
    """Returns a masked and compiled network, the same in each call."""
    keras.utils.set_random_seed(0)
    return compiled(sparsify(small_model(), 0.2, product=product), **options)
