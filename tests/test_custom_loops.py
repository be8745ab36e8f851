"""Training steps and loops of the user's own: the same masks as with `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.methods import METHODS
from support.regressions import (
    Applies,
    assert_close,
    assert_sparse,
    equal_masks,
    examples,
    fit,
    momentum,
    network,
)
from support.small_models import masks

from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.tracing import dense_gradients
from rigl_keras.methods.rigl import SET, RigL

every_method = pytest.mark.parametrize("method", METHODS)
EVERY_STEP = dict(frequency=1, end_step=99, decay="constant")


# Custom training steps of models.


class AppliesGradients(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        pairs = zip(gradients, self.trainable_variables, strict=True)
        self.optimizer.apply_gradients(pairs)
        return {"loss": loss}


class AppliesWithoutVariables(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables))
        return {"loss": loss}


class Compiled(keras.Model):
    @tf.function
    def train_step(self, data):
        return Applies.train_step(self, data)


@pytest.mark.slow_but("AppliesGradients")
@pytest.mark.parametrize(
    "cls", [Applies, AppliesGradients, AppliesWithoutVariables, Compiled]
)
def test_a_train_step_of_ones_own(cls):
    after = []
    for kind in (keras.Model, cls):
        model = network(momentum(), cls=kind, run_eagerly=cls is not Compiled)
        assert type(model).train_step is kind.train_step
        fit(model, [RigL(frequency=2, end_step=9)])
        after.append((masks(model), model.get_weights()))
    assert equal_masks(after[0][0], after[1][0])
    assert_close(after[0][1], after[1][1])


# A custom loop, where `update` replaces `optimizer.apply`.


def by_hand(
    model, updater, data, *, dense=dense_gradients, values=False, eager=False
):
    """Trains batch by batch with `update`, like `fit`."""
    loss = keras.losses.MeanSquaredError()
    optimizer = model.optimizer
    updater.attach(model, optimizer)

    def train_step(x, y):
        with dense(), tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
            scaled = optimizer.scale_loss(value)
        variables = model.trainable_variables
        if values:
            variables = [v.value for v in variables]
        updater.update(tape.gradient(scaled, variables), variables)
        return value

    if not eager:
        train_step = tf.function(train_step)
    for start in range(0, len(data[0]), 4):
        train_step(*(part[start : start + 4] for part in data))
    updater.fetch()


@pytest.mark.slow_but("RigL-SG")
@every_method
def test_update_in_place_of_apply(method):
    """The loop ends with the same model as `fit`."""
    options = dict(frequency=2, end_step=9)
    want, got = network(momentum()), network(momentum())
    callbacks = METHODS[method](**options)
    if not callbacks:  # static masks need no update
        callbacks = [RigL(frequency=50, end_step=99)]
    else:
        fit(want, METHODS[method](**options), examples(40))
    if method == "static":
        fit(want, [], examples(40))
    # test_matrix.py has loops of the other methods in graphs.
    eager = method not in ("RigL-SG", "SNFS", "MagnitudePruning", "GraNet")
    by_hand(got, callbacks[0], examples(40), eager=eager)
    assert_close(got.get_weights(), want.get_weights())
    memory = [[v.numpy() for v in m.optimizer.variables] for m in (got, want)]
    assert_close(*memory)
    assert len(callbacks[0].trajectory) > 1 or method == "static"


@pytest.mark.slow
def test_update_with_the_variables_that_keras_holds():
    models = [network(momentum()) for _ in range(2)]
    for model, values in zip(models, (False, True), strict=True):
        method = RigL(frequency=2, end_step=9)
        by_hand(model, method, examples(24), values=values)
        assert_sparse(model)
    assert equal_masks(*map(masks, models))


@pytest.mark.slow
def test_update_of_scaled_gradients():
    x, y = examples()
    y[8:12] = np.inf
    model = network(keras.optimizers.LossScaleOptimizer(momentum(), 16.0))
    method = RigL(frequency=2, end_step=4, decay="constant")
    by_hand(model, method, (x, y))
    assert [step for step, _ in method.trajectory] == [0, 2, 4]
    assert method.skipped_updates == 1
    assert int(model.optimizer.iterations) == 11
    plain = network(momentum())
    others = np.r_[0:8, 12:48]
    method = RigL(frequency=2, end_step=4, decay="constant")
    by_hand(plain, method, (x[others], y[others]))
    assert_close(model.get_weights(), plain.get_weights())


class Nothing:
    def __enter__(self):
        return None

    def __exit__(self, *error):
        return None


def test_forgotten_dense_gradients_are_noticed():
    model = network(momentum())
    before = masks(model)
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match="every gradient of one of hidden, d was ",
    ):
        by_hand(model, RigL(frequency=2, end_step=9), examples(), dense=Nothing)
    assert equal_masks(before, masks(model))
    # No error if they are not needed, or if masks have no zeros.
    by_hand(model, SET(frequency=2, end_step=99), examples(), dense=Nothing)
    assert not equal_masks(before, masks(model))
    for layer in masked_layers(model):
        layer.assign_mask(np.ones(layer.mask.shape))
    with pytest.warns(UserWarning, match="can move no connection"):
        by_hand(
            model, RigL(frequency=2, end_step=99), examples(), dense=Nothing
        )


def test_update_needs_to_know():
    model = network()
    kernel = masked_layers(model)[0].kernel
    with pytest.raises(ValueError, match="call attach"):
        RigL().update([tf.zeros(kernel.shape)], [kernel])
    updater = RigL()
    updater.attach(model, model.optimizer)
    with pytest.raises(ValueError, match="or end_step"):
        updater.update([tf.zeros(kernel.shape)], [kernel])
    bias = model.trainable_variables[1]
    updater = RigL(**EVERY_STEP)
    updater.attach(model, model.optimizer)
    model.optimizer.iterations.assign(1)
    with pytest.raises(ValueError, match="does the loss depend"):
        updater.update([tf.zeros(bias.shape)], [bias])


class TracedByItself(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4, name="inner")

    @tf.function
    def call(self, x):
        return self.dense(x)


def test_what_is_traced_once_for_both_kinds_of_step_is_refused():
    """Its gradients would be those of the first trace."""
    model = TracedByItself()
    x = np.ones((8, 3), np.float32)
    model(x)
    model = sparsify(model, 0.5)
    model.compile("sgd", "mse")
    y = np.ones((8, 4), np.float32)
    with pytest.raises(ValueError, match="inner are traced only once"):
        model.fit(x, y, batch_size=2, callbacks=[RigL(frequency=2, end_step=9)])
    model.fit(x, y, verbose=0)  # it is allowed without a method
