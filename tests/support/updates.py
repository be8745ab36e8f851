"""Small models, and functions that train them with mask updates."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from rigl_keras.masking.sparsify import sparsify
from support.small_models import examples, kernels, masks


class Steps(keras.callbacks.Callback):
    """Records masks, kernels and logs after every step, one in each epoch."""

    def __init__(self):
        super().__init__()
        self.masks, self.kernels, self.logs = [], [], []

    def on_epoch_end(self, epoch, logs=None):
        self.masks.append(masks(self.model))
        self.kernels.append(kernels(self.model))
        self.logs.append(dict(logs))


def step_by_step(model, callbacks, steps=14, **options):
    """Trains with one step in each epoch; returns the record of steps."""
    record = Steps()
    data = tf.data.Dataset.from_tensor_slices(examples(8 * steps)).batch(8)
    model.fit(
        data,
        epochs=steps,
        steps_per_epoch=1,
        shuffle=False,
        callbacks=[*callbacks, record],
        verbose=0,
        **options,
    )
    return record


def changed(one, two):
    """Returns whether any of the masks differ."""
    return any((one[name] != two[name]).any() for name in one)


def train(model, callbacks, **options):
    """Trains with callbacks for 8 steps in each epoch; returns the history."""
    return model.fit(
        *examples(),
        batch_size=8,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
        **options,
    )


def two_layers(dropout=0.2):
    """Returns a network that is quick to trace, for tests of every method."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, strides=2, name="conv")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Dropout(dropout, seed=1)(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(10, name="head")(x))


def one_layer(l2=None):
    """Returns a dense layer of 24 weights, as a model."""
    inputs = keras.Input((6,))
    dense = layers.Dense(4, name="d", kernel_regularizer=l2)
    return keras.Model(inputs, dense(inputs))


def small_regression(optimizer="sgd", kernel_regularizer=None, **options):
    """Returns a masked two-layer network, run eagerly, and data of 6 steps."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((24, 6)).astype(np.float32)
    y = draw.standard_normal((24, 4)).astype(np.float32)
    inputs = keras.Input((6,))
    x_ = layers.Dense(
        8,
        activation="tanh",
        kernel_regularizer=kernel_regularizer,
        name="hidden",
    )(inputs)
    x_ = layers.BatchNormalization(name="norm")(x_)
    model = sparsify(keras.Model(inputs, layers.Dense(4, name="d")(x_)), 0.5)
    model.compile(optimizer, "mse", run_eagerly=True, **options)
    return model, lambda callbacks, **more: model.fit(
        x,
        y,
        batch_size=4,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
        **more,
    )


EVERY_STEP = dict(frequency=1, end_step=99, decay="constant")
