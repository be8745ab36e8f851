"""A masked regression in two layers, and what watches or checks training."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.training.optimizer_state import slots
from support.small_models import masks


def network(optimizer="sgd", *, cls=keras.Model, l2=None, **options):
    """Returns a masked two-layer regression, the same in each call."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(
        8, activation="tanh", kernel_regularizer=l2, name="hidden"
    )(inputs)
    model = cls(inputs, layers.Dense(4, name="d")(x))
    model = sparsify(model, 0.5)
    options = {"loss": "mse", "run_eagerly": True, **options}
    model.compile(optimizer, **options)
    return model


def examples(n=48, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, 6)).astype(np.float32)
    return x, draw.standard_normal((n, 4)).astype(np.float32)


def fit(model, callbacks, data=None, batch_size=4, **options):
    return model.fit(
        *(data or examples()),
        batch_size=batch_size,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
        **options,
    )


def momentum(**options):
    return keras.optimizers.SGD(0.1, momentum=0.9, **options)


def equal_masks(one, two):
    return all((one[name] == two[name]).all() for name in one)


def assert_sparse(model):
    """Checks that weights and averages are zero outside the masks."""
    for layer in masked_layers(model):
        off = layer.mask.numpy() == 0
        assert off.any() and not layer.kernel.numpy()[off].any()
        average = slots(model.optimizer, layer.kernel).get("average")
        assert average is None or not average.numpy()[off].any()


def assert_equal(one, two):
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def assert_close(one, two):
    """Checks that arrays of two lists are equal up to rounding."""
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


class Batches(keras.callbacks.Callback):
    """Records logs, masks and step after every batch."""

    def __init__(self, method=None):
        super().__init__()
        self.method = method
        self.logs, self.masks, self.steps = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        if self.method is not None:
            self.logs.append(self.method.last_logs())
        self.masks.append(masks(self.model))
        self.steps.append(int(self.model.optimizer.iterations))


class Applies(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def updates(method):
    """Returns the steps of all updates that a method has made."""
    return [step for step, _ in method.trajectory[1:]]


class At(keras.callbacks.Callback):
    """Acts on the model once, in the nth call of a hook."""

    def __init__(self, hook, action, nth=1):
        super().__init__()
        self.left = nth
        setattr(self, hook, self.count)
        self.action = action

    def count(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.action(self.model)


def stopped(model):
    """Interrupts training, as an action of `At`."""
    raise KeyboardInterrupt
