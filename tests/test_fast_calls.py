"""Batch norm and dropout of the op library give Keras's numbers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.small_models import compiled, examples, small_model

import rigl_keras
from rigl_keras import kernels
from rigl_keras.kernels import fast_calls, operations

pytestmark = pytest.mark.skipif(
    kernels.load() is None, reason=f"no op library: {kernels.unavailable()}"
)


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    """Removes the size below which Keras computes layers."""
    monkeypatch.setattr(fast_calls, "_LEAST_NUMBERS", 0)


def test_what_is_small_is_left_to_keras(monkeypatch):
    monkeypatch.setattr(fast_calls, "_LEAST_NUMBERS", 1 << 17)
    called = []
    batch_norm = operations.batch_norm
    monkeypatch.setattr(
        operations,
        "batch_norm",
        lambda x, *rest, **how: (
            called.append(x.shape) or batch_norm(x, *rest, **how)
        ),
    )
    layer = layers.BatchNormalization()
    layer.build((None, 32))
    fast_calls.use_fast_calls(layer)
    layer(tf.zeros((4095, 32)), training=True)
    assert called == []
    layer(tf.zeros((4096, 32)), training=True)
    assert called == [(4096, 32)]


def normed(x, *, fast, **options):
    """Returns outputs, first and second gradients, and moving statistics."""
    layer = layers.BatchNormalization(epsilon=0.01, **options)
    layer.build(x.shape)
    draw = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(draw.uniform(0.5, 2, variable.shape))
    if fast:
        fast_calls.use_fast_calls(layer)
    watched = [x, *[v.value for v in layer.trainable_variables]]
    with tf.GradientTape() as second:
        second.watch(x)
        with tf.GradientTape() as first:
            first.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(tf.sin(y) * y)
        gradients = first.gradient(loss, watched)
        steepness = tf.add_n([tf.reduce_sum(g**2) for g in gradients])
    again = second.gradient(steepness, watched)
    return [y, *gradients, *again, *layer.non_trainable_variables]


@pytest.mark.parametrize(
    "shape", [(4, 3), (130, 17), (7, 5, 3, 32), (33, 9, 9, 20), (16, 2)]
)
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}])
def test_batch_norm_is_that_of_keras(shape, options):
    draw = np.random.default_rng(0)
    x = tf.constant(draw.standard_normal(shape, np.float32) * 3 + 1)
    ours = normed(x, fast=True, **options)
    for got, want in zip(ours, normed(x, fast=False, **options), strict=True):
        largest = np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * largest)


def test_a_mean_that_is_far_from_zero():
    """A mean square less the squared mean would lose all digits."""
    x = tf.constant(np.linspace(1e4, 1e4 + 1, 8000), tf.float32)[:, None]
    _, mean, variance = kernels.batch_norm(
        tf.tile(x, [1, 16]), tf.ones(16), tf.zeros(16), epsilon=1e-3
    )
    np.testing.assert_allclose(mean, np.float64(x).mean(), rtol=1e-6)
    np.testing.assert_allclose(variance, np.float64(x).var(), rtol=1e-3)


@pytest.mark.parametrize("shape", [(1,), (31, 1), (32,), (5, 7, 3), (99, 512)])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5])
def test_dropout_has_the_numbers_of_tensorflow(shape, rate):
    x = tf.constant(np.random.default_rng(0).standard_normal(shape), tf.float32)
    seed = tf.constant([-7, 2**30], tf.int32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        ours = kernels.dropout(x, rate, seed)
        theirs = tf.nn.experimental.stateless_dropout(x, rate=rate, seed=seed)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(
        tape.gradient(ours, x), tape.gradient(theirs, x)
    )


def test_a_layer_drops_what_that_of_keras_drops():
    x = tf.ones((64, 100))
    plain, fast = layers.Dropout(0.4, seed=3), layers.Dropout(0.4, seed=3)
    fast_calls.use_fast_calls(fast)
    for _ in range(3):  # each call draws a new mask
        y = plain(x, training=True)
        np.testing.assert_array_equal(fast(x, training=True), y)
        assert 0.3 < np.mean(y == 0) < 0.5
    np.testing.assert_array_equal(fast(x, training=False), x)
    np.testing.assert_array_equal(fast(x), x)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (layers.BatchNormalization(axis=1), (4, 3, 5)),
        (layers.BatchNormalization(renorm=True), (4, 3)),
        (layers.BatchNormalization(trainable=False), (4, 3)),
        (layers.BatchNormalization(dtype="mixed_float16"), (4, 3)),
        (layers.Dropout(0.0), (4, 3)),
        (layers.Dropout(0.5, noise_shape=(4, 1), seed=1), (4, 3)),
        (layers.Dense(3), (4, 3)),
    ],
    ids=["axis", "renorm", "frozen", "half", "none", "noise", "dense"],
)
def test_what_is_left_to_keras(monkeypatch, layer, shape):
    monkeypatch.setattr(operations, "batch_norm", None)  # must not be called
    monkeypatch.setattr(operations, "dropout", None)
    layer.build(shape)
    call = layer.call
    fast_calls.use_fast_calls(layer)
    assert (layer.call == call) == isinstance(layer, layers.Dense)
    layer(tf.ones(shape), training=True)
    fast_calls.use_usual_calls(layer)
    assert layer.call == call


def test_models_train_alike():
    x, y = examples()
    losses = {}
    for product in ("dense", "sparse"):
        keras.utils.set_random_seed(0)
        model = rigl_keras.sparsify(small_model(), 0.3, product=product)
        history = compiled(model).fit(x, y, epochs=3, verbose=0)
        losses[product] = history.history["loss"]
        norm = model.get_layer("norm")
        assert ("call" in vars(norm)) == (product == "sparse")
    np.testing.assert_allclose(losses["sparse"], losses["dense"], rtol=2e-4)


def test_files_know_nothing_of_it(tmp_path):
    model = rigl_keras.sparsify(small_model(), 0.3, product="sparse")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("norm")) is layers.BatchNormalization
    assert "call" not in vars(loaded.get_layer("norm"))
    rigl_keras.choose_kernels(loaded, "sparse")
    assert "call" in vars(loaded.get_layer("norm"))
    rigl_keras.choose_kernels(loaded, "dense")
    assert "call" not in vars(loaded.get_layer("norm"))
    assert "call" not in vars(rigl_keras.strip(model).get_layer("norm"))


@pytest.mark.slow
@pytest.mark.parametrize("product", ["dense", "sparse"])
def test_a_loaded_model_trains_as_the_one_that_was_saved(product, tmp_path):
    x, y = examples()
    model = compiled(
        rigl_keras.sparsify(small_model(dropout=0), 0.3, product=product)
    )
    model.fit(x, y, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    losses = [
        one.fit(
            *(x, y),
            callbacks=[rigl_keras.RigL(frequency=3, end_step=9)],
            shuffle=False,
            verbose=0,
            epochs=3,
        ).history["loss"]
        for one in (model, loaded)
    ]
    assert losses[0] == losses[1]
    norm = loaded.get_layer("norm")
    assert ("call" in vars(norm)) == (product == "sparse")
