"""A small model that resumes bit for bit."""

import keras
import numpy as np
from keras import layers

from rigl_keras.masking.sparsify import sparsify


def tiny(**options):
    """Returns a model with batch norm and momentum, which resuming restores.

    No dropout: Keras does not save the state of its random layers.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(8, name="hidden")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU()(x)
    model = sparsify(keras.Model(inputs, layers.Dense(3, name="d")(x)), 0.5)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)
    model.compile(optimizer, "mse", **options)
    return model


def fit(model, callbacks, epochs, initial_epoch=0):
    draw = np.random.default_rng(0)
    model.fit(
        draw.standard_normal((20, 6)).astype(np.float32),
        draw.standard_normal((20, 3)).astype(np.float32),
        batch_size=4,
        shuffle=False,
        epochs=epochs,
        initial_epoch=initial_epoch,
        callbacks=callbacks,
        verbose=0,
    )
