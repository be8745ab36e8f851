"""Layers with sparse products: results, and the choice of products."""

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import random
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.methods import METHODS
from support.small_models import compiled, examples, masks, small_model

import rigl_keras
from rigl_keras import _timing
from rigl_keras.kernels import choice, layer_products, library
from rigl_keras.kernels.choice import Choice
from rigl_keras.kernels.problems import Problem, Recurrence
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import choose_kernels, masked_layers
from rigl_keras.masking.sparsify import sparsify, with_masks
from rigl_keras.masking.stripping import strip
from rigl_keras.masking.tracing import dense_gradients
from rigl_keras.methods.rigl import RigL

# A warning of TensorFlow when Keras saves with NumPy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning"
)


@pytest.fixture
def loaded():
    if library.load() is None:
        pytest.skip(f"no sparse kernels: {library.unavailable()}")


needs_library = pytest.mark.usefixtures("loaded")


@pytest.fixture
def unavailable(monkeypatch):
    monkeypatch.setattr(library, "_module", None)
    monkeypatch.setattr(library, "_reason", "there is no compiler")


def chosen(model):
    """Returns `{layer: whether its last call was sparse}`."""
    return {
        name: list(layer.chosen_products().values())[-1].sparse
        for name, layer in masked_layers(model).named.items()
        if layer.chosen_products()
    }


ALL_BUT_DEPTHWISE = {"conv1": True, "conv2": True, "head": True}


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


def assert_same(one, two, rtol=1e-4):
    """Checks that masks are equal, and other variables up to rounding."""
    start = masks(one)
    for name, mask in masks(two).items():
        np.testing.assert_array_equal(mask, start[name])
    for ours, theirs in zip(one.variables, two.variables, strict=True):
        np.testing.assert_allclose(
            ours.numpy(), theirs.numpy(), rtol=rtol, atol=1e-5
        )
    for layer in masked_layers(one):
        assert not layer.kernel.numpy()[layer.mask.numpy() == 0].any()


def small(product, **options):
    keras.utils.set_random_seed(0)
    return compiled(sparsify(small_model(), 0.2, product=product), **options)


# These train sparse products in graphs: methods with dense gradients at
# updates, always, and never. The others run eagerly.
IN_GRAPHS = ("RigL", "SNFS", "MagnitudePruning")


def both(method, *, epochs=3, **options):
    """Trains small models, with dense products (eager) and sparse ones."""
    models, losses, found = [], [], []
    for product in ("dense", "sparse"):
        eager = product == "dense" or method not in IN_GRAPHS
        how = options | ({"run_eagerly": True} if eager else {})
        models.append(small(product, **how))
        callbacks = METHODS[method](frequency=3, end_step=14)
        losses.append(
            losses_of(models[-1], examples(), callbacks, epochs=epochs)
        )
        found.append([callback.trajectory for callback in callbacks])
    assert found[0] == found[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert_same(*models)
    return models


# Training.


@pytest.mark.slow_but("RigL")
@needs_library
@pytest.mark.parametrize("method", METHODS)
def test_trains_as_with_dense_products(method):
    start = masks(small("dense"))
    dense, sparse = both(method)
    assert chosen(dense) == {}
    assert chosen(sparse) == ALL_BUT_DEPTHWISE
    moved = any((m != start[n]).any() for n, m in masks(sparse).items())
    assert moved == (method != "static")


@pytest.mark.slow
@needs_library
def test_a_wide_resnet_trains_the_same():
    """Trains for 50 steps with four updates."""
    draw = np.random.default_rng(0)
    data = (
        draw.standard_normal((160, 32, 32, 3)).astype(np.float32),
        draw.integers(0, 10, 160),
    )
    losses, found = [], []
    for product in ("dense", "sparse"):
        keras.utils.set_random_seed(0)
        model = rigl_keras.models.wide_resnet(10, 1)
        model = compiled(
            sparsify(model, 0.1, product=product),
            keras.optimizers.SGD(0.01, momentum=0.9),
        )
        method = RigL(frequency=10, end_step=50)
        losses.append(losses_of(model, data, [method], epochs=5))
        found.append((masks(model), method.trajectory))
        if product == "sparse":
            every = masked_layers(model).named
            assert chosen(model) == dict.fromkeys(every, True)
    assert len(losses[0]) == 50
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert found[0][1] == found[1][1]  # counts
    assert [step for step, _ in found[0][1]] == [0, 10, 20, 30, 40]
    same = [
        (mask == found[1][0][name]).ravel()
        for name, mask in found[0][0].items()
    ]
    # Rounding may decide between nearly equal scores: 12 of 77,000 entries
    # differ, as many as between dense runs whose images differ in the last
    # bit.
    assert np.mean(np.concatenate(same)) > 0.999


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize(
    "options", [dict(steps_per_execution=4), dict(run_eagerly=True)]
)
def test_however_steps_are_run(options):
    _, sparse = both("RigL", epochs=2, **options)
    assert chosen(sparse) == ALL_BUT_DEPTHWISE


@pytest.mark.slow
@needs_library
def test_xla_has_dense_products():
    """XLA supports only TensorFlow's operations."""
    x = np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32)
    losses = []
    for product in ("dense", "sparse"):
        keras.utils.set_random_seed(0)
        dense = keras.Sequential(
            [keras.Input((6,)), layers.Dense(4, name="d")], name="net"
        )
        model = sparsify(dense, 0.5, product=product)
        model.compile("sgd", "mse", jit_compile=True)
        method = RigL(frequency=2, end_step=9)
        data = x, x[:, :4]
        losses.append(losses_of(model, data, [method], epochs=3))
        model.predict(x, verbose=0)
        assert chosen(model) == {}
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    model(x)
    assert chosen(model) == {"d": True}


# Calls and gradients.


@needs_library
def test_inference_agrees():
    x, _ = examples(20)
    dense, sparse = small("dense"), small("sparse")
    want = dense(x).numpy()
    assert np.abs(want).max() > 0.02
    for got in (
        sparse(x),
        sparse.predict(x, batch_size=7, verbose=0),
        sparse.predict_on_batch(x),
        tf.function(sparse)(tf.constant(x)),
        sparse.stateless_call(
            sparse.trainable_variables, sparse.non_trainable_variables, x
        )[0],
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert chosen(sparse) == ALL_BUT_DEPTHWISE


@needs_library
def test_weights_that_a_stateless_call_is_given():
    """It uses the given kernels, masks and biases instead of variables."""
    model, (x, _) = small("sparse"), examples(4)
    draw = np.random.default_rng(3)

    def other(variable):
        if "mask" in variable.path:
            return tf.cast(draw.random(variable.shape) < 0.5, tf.float32)
        if variable.dtype != "float32":
            return tf.convert_to_tensor(variable)  # a generator's state
        return tf.cast(draw.random(variable.shape), tf.float32)

    state = [
        [other(variable) for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
        )
    ]
    got = model.stateless_call(*state, x)[0]
    assert chosen(model) == ALL_BUT_DEPTHWISE
    choose_kernels(model, "dense")
    want = model.stateless_call(*state, x)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert np.abs(want - model(x)).max() > 0.1


def gradients(model, x, *, dense):
    x = tf.constant(x)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        if dense:
            with dense_gradients():
                loss = tf.reduce_sum(tf.sin(model(x)))
        else:
            loss = tf.reduce_sum(tf.sin(model(x)))
    return tape.gradient(
        loss, [x, *(v.value for v in model.trainable_variables)]
    )


@pytest.mark.slow_but("True")
@needs_library
@pytest.mark.parametrize("dense", [False, True])
def test_gradients_agree(dense):
    x, _ = examples(20)
    model = small("sparse")
    got = gradients(model, x, dense=dense)
    want = gradients(small("dense"), x, dense=dense)
    for ours, theirs in zip(got, want, strict=True):
        theirs = theirs.numpy()
        atol = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=atol)
    names = [v.path for v in model.trainable_variables]
    for layer in masked_layers(model):
        gradient = got[1 + names.index(layer.kernel.path)].numpy()
        assert gradient[layer.mask.numpy() == 0].any() == dense
        assert gradient[layer.mask.numpy() == 1].any()


@needs_library
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_dense_layer(shape, activation, use_bias):
    x = np.random.default_rng(0).standard_normal((5, *shape)).astype("f")
    layer = Masked(
        layers.Dense(
            3,
            activation=activation,
            use_bias=use_bias,
            bias_initializer="normal",
        ),
        product="sparse",
    )
    layer.build((None, *shape))
    layer.assign_mask(np.random.default_rng(1).random((6, 3)) < 0.5)
    got = layer(x)
    assert layer.chosen_products() == {x.shape: Choice(True, "as asked")}
    layer.product = "dense"
    np.testing.assert_allclose(got, layer(x), rtol=1e-5, atol=1e-6)


@needs_library
def test_padding_that_layers_call_otherwise():
    """Keras writes `"valid"`, TensorFlow `"VALID"`."""
    x, _ = examples(5)
    for options in (
        dict(padding="valid", strides=(2, 2)),
        dict(padding="same", dilation_rate=(2, 1)),
    ):
        layer = Masked(layers.Conv2D(4, (3, 2), **options), product="sparse")
        layer.build((None, 8, 8, 3))
        layer.assign_mask(np.arange(72).reshape(3, 2, 3, 4) % 3 == 0)
        got = layer(x)
        assert list(layer.chosen_products()) == [x.shape]
        layer.product = "dense"
        np.testing.assert_allclose(got, layer(x), rtol=1e-4, atol=1e-6)


# Layers without a sparse product.


class MyConv(layers.Conv2D):
    def call(self, inputs):
        return super().call(inputs) + 1


IMAGES = (8, 8, 4)
FALL_BACK = {
    "a subclass": (
        lambda: MyConv(4, 3),
        IMAGES,
        "no sparse kernels for MyConv",
    ),
    "depthwise": (
        lambda: layers.DepthwiseConv2D(3),
        IMAGES,
        "no sparse kernels for DepthwiseConv2D",
    ),
    "lstm": (lambda: layers.LSTM(4), (8, 4), "its kernels have other names"),
    "channels first": (
        lambda: layers.Conv2D(4, 3, data_format="channels_first"),
        (4, 8, 8),
        "sparse kernels are channels_last, not channels_first",
    ),
    "mixed": (
        lambda: layers.Conv2D(4, 3, dtype="mixed_float16"),
        IMAGES,
        "sparse kernels are float32, not float16",
    ),
    "float64": (
        lambda: layers.Dense(4, dtype="float64"),
        (6,),
        "sparse kernels are float32, not float64",
    ),
    "activity": (
        lambda: layers.Dense(4, activity_regularizer="l2"),
        (6,),
        "its activity is regularised",
    ),
}


@pytest.mark.parametrize("kind", FALL_BACK)
def test_layers_without_a_sparse_product_are_dense(kind):
    make, shape, why = FALL_BACK[kind]
    plain = make()
    layer = Masked(plain, product="sparse")
    layer.build((None, *shape))
    assert layer.why_dense() == why
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype("f")
    for masked in layer.masked_kernels():
        some = np.arange(np.prod(masked.kernel.shape)) % 2
        masked.assign_mask(some.reshape(masked.kernel.shape))
    try:
        wanted = plain(x)
    except tf.errors.UnimplementedError as error:
        # With oneDNN, which depends on the CPU, TensorFlow has channels first.
        with pytest.raises(type(error)):
            layer(x)
    else:
        np.testing.assert_allclose(layer(x), wanted, rtol=1e-5, atol=1e-6)
    assert layer.chosen_products() == {}


def test_layers_with_a_sparse_product():
    for make, shape in (
        (lambda: layers.Conv2D(4, 3), IMAGES),
        (lambda: layers.Dense(4), (6,)),
    ):
        layer = Masked(make())
        layer.build((None, *shape))
        assert layer.why_dense() is None


# The requested product.


def asked(model):
    return {
        layer.product for layer in model.layers if isinstance(layer, Masked)
    }


@pytest.mark.slow_but("sparse")
@pytest.mark.parametrize("product", ["auto", "dense", "sparse"])
def test_what_was_asked_for_is_saved(product, tmp_path):
    model = small(product)
    assert asked(model) == {product}
    model.fit(*examples(), batch_size=16, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert asked(loaded) == {product}
    assert asked(keras.models.clone_model(model)) == {product}
    config = model.get_layer("conv1").get_config()
    assert config["product"] == product
    assert Masked.from_config(config).get_config()["product"] == product
    x, _ = examples(4)
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5
    )


def test_files_from_before_there_was_a_choice():
    config = small("dense").get_layer("conv1").get_config()
    del config["product"]
    assert Masked.from_config(config).product == "auto"


@needs_library
def test_stripped():
    model = small("sparse")
    x, _ = examples(4)
    plain = strip(model)
    assert not masked_layers(plain)
    np.testing.assert_allclose(plain(x), model(x), rtol=1e-4, atol=1e-5)
    assert chosen(model) == ALL_BUT_DEPTHWISE


@pytest.mark.parametrize("product", ["fast", "", None, True])
def test_what_cannot_be_asked_for(product):
    with pytest.raises(ValueError) as caught:
        sparsify(small_model(), 0.2, product=product)
    assert repr(product) in str(caught.value)
    if isinstance(product, str):
        for option in ("auto", "dense", "sparse"):
            assert repr(option) in str(caught.value)
        with pytest.raises(ValueError, match="product must be one of"):
            Masked(layers.Dense(3), product=product)
        layer = Masked(layers.Dense(3))
        with pytest.raises(ValueError, match="product must be one of"):
            layer.product = product
        assert layer.product == "auto"


@pytest.mark.parametrize("product", ["auto", "dense", "sparse"])
def test_a_string_as_kernels_is_deprecated(product):
    dense = small_model()
    drawn = masks(sparsify(dense, 0.2))
    for call in (
        lambda: sparsify(dense, 0.2, kernels=product),
        lambda: with_masks(dense, drawn, kernels=product),
    ):
        with pytest.warns(
            DeprecationWarning, match=f"Write product='{product}'"
        ) as warned:
            model = call()
        assert [w.filename for w in warned] == [__file__]
        assert asked(model) == {product}
    with pytest.warns(DeprecationWarning, match="product='sparse'"):
        choose_kernels(model, kernels="sparse")
    assert asked(model) == {"sparse"}
    with pytest.raises(ValueError, match="both say how.*product='dense'"):
        sparsify(dense, 0.2, kernels="sparse", product="dense")
    with pytest.raises(ValueError, match="must be one of.*'sparse'.*'fast'"):
        choose_kernels(model, kernels="fast")


def test_names_of_ones_own_kernels_as_before():
    class Scaled(layers.Layer):
        def build(self, input_shape):
            self.w = self.add_weight(shape=(input_shape[-1], 4), name="w")

        def call(self, inputs):
            return inputs @ self.w

    dense = keras.Sequential([keras.Input((6,)), Scaled(name="s")])
    model = sparsify(dense, 0.5, kernels={Scaled: "w"})
    (layer,) = masked_layers(model)
    assert layer.mask.numpy().sum() == 12
    assert model.layers[0].product == "auto"
    assert model.layers[0].why_dense() == "its kernels have other names"
    x = np.ones((2, 6), np.float32)
    np.testing.assert_allclose(model(x), x @ layer.kernel.numpy(), rtol=1e-5)


@needs_library
def test_the_table():
    model = small("sparse")
    assert "product" not in str(masked_layers(model))
    model.fit(*examples(), batch_size=16, verbose=0)
    head, *rows = str(masked_layers(model)).splitlines()
    assert head.split()[-1] == "product"
    rows = {row.split()[0]: row for row in rows}
    for name, sparse in chosen(model).items():
        assert sparse
        assert rows[name].endswith("  sparse: as asked")
    assert "sparse" not in rows["depthwise"]
    assert "sparse" not in rows["all"]


@pytest.mark.slow
@needs_library
def test_chosen_anew_after_a_fit():
    """Functions are traced again after the choice."""
    model = small("dense")
    x, y = examples()
    model.fit(x, y, batch_size=16, verbose=0)
    want = model.predict(x, verbose=0)
    model.evaluate(x, y, verbose=0)
    assert "product" not in str(masked_layers(model))
    for run in (
        lambda: model.predict(x, verbose=0),
        lambda: model.evaluate(x, y, verbose=0),
        lambda: model.fit(x, y, batch_size=16, verbose=0),
    ):
        table = choose_kernels(model, "sparse")
        assert table is not None and len(table) == 4
        assert chosen(model) == {}
        run()
        assert chosen(model) == ALL_BUT_DEPTHWISE
        assert "sparse: as asked" in str(table)
    choose_kernels(model, "dense")
    assert "product" not in str(masked_layers(model))
    before = model.predict(x, verbose=0)
    assert np.abs(before - want).max() > 1e-4  # training changed it
    choose_kernels(model, "sparse")
    np.testing.assert_allclose(
        model.predict(x, verbose=0), before, rtol=1e-4, atol=1e-5
    )


@needs_library
def test_chosen_before_a_call():
    """The choice is for the given batch, not for that of the call."""
    model = small("auto")
    table = choose_kernels(model, "sparse", batch_size=32)
    assert chosen(model) == ALL_BUT_DEPTHWISE
    assert list(table[0].chosen_products()) == [(32, 8, 8, 3)]
    assert list(model.get_layer("head").chosen_products()) == [(32, 16 * 4)]


def test_auto_is_decided_by_the_batch(monkeypatch):
    asked_of = []

    def answer(layer, shape, density, *, backward, in_lanes, projected):
        asked_of.append((layer.name, tuple(shape), round(density, 3)))
        return Choice(False, "a test")

    monkeypatch.setattr(layer_products, "faster_product", answer)
    model = small("auto")
    choose_kernels(model, batch_size=32)
    conv1 = model.get_layer("conv1")
    assert ("conv1", (32, 8, 8, 3), round(conv1.density, 3)) in asked_of
    assert "depthwise" not in {name for name, *_ in asked_of}
    assert "dense: a test" in str(masked_layers(model))
    asked_of.clear()
    x, _ = examples(8)
    model.predict(x, batch_size=4, verbose=0)
    model.predict(tf.data.Dataset.from_tensors(x).unbatch().batch(3), verbose=0)
    shapes = {shape for name, shape, _ in asked_of if name == "conv1"}
    assert shapes == {(4, 8, 8, 3), (None, 8, 8, 3)}


@needs_library
def test_the_table_asks_as_layers_are_called_in_training(monkeypatch):
    """It includes lanes and attention, and leaves losses unchanged."""
    asked_of = set()

    def answer(layer, shape, density, *, backward, in_lanes, projected):
        asked_of.add((layer.name, tuple(shape), in_lanes))
        return Choice(in_lanes, "a test")

    monkeypatch.setattr(layer_products, "faster_product", answer)
    inputs = keras.Input((6, 6, 4))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv")(inputs)
    x = layers.Reshape((36, 8))(x)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.Dense(3, activity_regularizer="l2")(x)
    model = sparsify(keras.Model(inputs, x), 0.5)
    before = len(model.losses)
    table = choose_kernels(model, batch_size=32)
    assert len(model.losses) == before
    assert ("conv", (32, 6, 6, 4), False) in asked_of  # as in evaluation
    assert ("conv", (32, 6, 6, 4), True) in asked_of
    assert ("query", (32, 36, 8), False) in asked_of
    assert "sparse: a test" in str(table).splitlines()[1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(product="fast"), "'auto', 'dense', 'sparse'.*'fast'"),
        (dict(product={layers.Dense: "w"}), "'auto', 'dense', 'sparse'"),
        (dict(batch_size=0), "batch_size.*0"),
        (dict(batch_size=2.5), "batch_size.*2.5"),
    ],
)
def test_what_cannot_be_chosen(arguments, words):
    model = small("sparse")
    with pytest.raises(ValueError, match=words):
        choose_kernels(model, **arguments)
    assert asked(model) == {"sparse"}


def test_a_dense_model_has_nothing_to_choose():
    with pytest.raises(ValueError, match="no masked layer.*sparsify"):
        choose_kernels(small_model(), "sparse")


# The faster product.

BIG = Problem((3, 3, 16, 16), (16, 12, 12))


def big_model(**options):
    keras.utils.set_random_seed(0)
    dense = keras.Sequential(
        [
            keras.Input((12, 12, 16)),
            layers.Conv2D(16, 3, padding="same", name="big"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, name="head"),
        ],
        name="net",  # masks are drawn from it
    )
    return compiled(sparsify(dense, 0.1, **options))


def big_examples():
    draw = np.random.default_rng(0)
    x = draw.standard_normal((32, 12, 12, 16)).astype(np.float32)
    return x, draw.integers(0, 3, 32)


@pytest.fixture
def cache(tmp_path, monkeypatch, timed_kernels, loaded):
    """Returns an empty cache of choices for this test."""
    path = tmp_path / "choices.json"
    monkeypatch.setattr(choice, "_path", lambda: path)
    monkeypatch.setattr(choice, "_known", {})
    return path


@pytest.fixture
def forgotten(monkeypatch):
    """Returns a function that clears what this process remembers."""
    return lambda: monkeypatch.setattr(choice, "_known", {})


@pytest.fixture
def timings(monkeypatch):
    """Records the problems that are timed, and sets their times."""
    timed = []

    def seconds(problem, density, backward, in_lanes):
        assert backward
        timed.append((problem, density))
        return 3.0, 2.0, False

    monkeypatch.setattr(choice, "_seconds", seconds)
    return timed


def test_timed_once_and_kept(cache, forgotten, monkeypatch):
    monkeypatch.setattr(_timing, "_QUIET", math.inf)  # on a busy machine too
    model = big_model()
    choose_kernels(model, batch_size=16)
    big = model.get_layer("big")
    ((shape, found),) = big.chosen_products().items()
    assert shape == (16, 12, 12, 16)
    assert found.batch == 16
    assert 0 < found.sparse_seconds < 1
    assert 0 < found.dense_seconds < 1
    assert found.sparse == (found.sparse_seconds <= 1.05 * found.dense_seconds)
    assert re.fullmatch(r"\d+\.\dx at batch 16", found.reason)
    kind = "sparse" if found.sparse else "dense"
    assert f"{kind}: {found.reason}" in str(masked_layers(model))
    assert "dense: density above 0.75" in str(masked_layers(model))
    ((key, kept),) = json.loads(cache.read_text()).items()
    assert kept == [found.dense_seconds, found.sparse_seconds, 16]
    for part in ("3x3x16x16", "16x12x12", "SAME"):
        assert part in key.split()

    def fail(*_):
        raise AssertionError("It is timed again.")

    monkeypatch.setattr(choice, "_seconds", fail)
    assert choice.choose(BIG, big.density) == found
    forgotten()
    assert choice.choose(BIG, big.density) == found


def test_auto_trains(cache, timings):
    """Products are timed when the step is traced."""
    losses = []
    for product in ("auto", "dense"):
        model = big_model(product=product)
        method = RigL(frequency=2, end_step=9)
        losses.append(losses_of(model, big_examples(), [method], epochs=3))
        if product == "auto":
            assert chosen(model) == {"big": True, "head": False}
            assert "sparse: 1.5x at batch 16" in str(masked_layers(model))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert len(timings) == 1
    assert timings[0][0] == BIG


def test_a_change_in_training_shows_after_an_evaluation(monkeypatch):
    """Training uses lanes and evaluation does not, with separate choices."""
    wins = True
    monkeypatch.setattr(
        layer_products,
        "faster_product",
        lambda *_, in_lanes, **_options: Choice(in_lanes and wins, "a test"),
    )
    layer = layers.Conv2D(4, 3)
    layer.build((None, 8, 8, 3))
    choices = layer_products.ProductChoices(layer, "auto")
    shape = tf.TensorShape((5, 8, 8, 3))
    mask = keras.Variable(np.ones((3, 3, 3, 4), bool), trainable=False)
    assert choices.choose(shape, [mask], in_lanes=True).sparse
    assert not choices.choose(shape, [mask]).sparse
    assert choices.by_shape == {(5, 8, 8, 3): Choice(False, "a test")}
    assert not choices.changes()
    wins = False
    assert choices.changes()
    assert not choices.changes()


def test_batches_of_any_size_are_timed_at_128(cache, timings):
    layer = big_model().get_layer("big")
    layer.choose_product(tf.TensorShape((None, 12, 12, 16)))
    assert [problem.images for problem, _ in timings] == [(128, 12, 12)]


def test_a_dense_layer_is_timed_as_a_matrix(cache, timings):
    layer = Masked(layers.Dense(500))
    layer.build((None, 7, 400))
    layer.assign_mask(np.arange(200_000).reshape(400, 500) % 50 == 0)
    layer.choose_product(tf.TensorShape((3, 7, 400)))
    (found,) = timings
    problem = Problem((1, 1, 400, 500), (21, 1, 1), matrix=True)
    assert found == (problem, 0.02)


@needs_library
def test_timing_many_kinds_of_layers_is_no_retracing_to_tensorflow(caplog):
    for size in range(1, 7):
        problem = Problem((1, 1, size, 1), (1, 1, 1), matrix=True)
        for side in problem.sides(1.0, backward=False, in_lanes=False).values():
            side()
    assert "retracing" not in caplog.text


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "{",
        "[]",
        "3",
        '{"a": 3}',
        '{"a": [1, 2]}',
        '{"a": [1, "2", 3]}',
        '{"a": [1, 0, 3]}',
        '{"a": null}',
        '{"a": [-1, 2, 3]}',
        '{"a": [1, NaN, 3]}',
        b"\xff\xfe\x00",
        b"[" * 200_000,
    ],
)
def test_a_damaged_cache_is_written_anew(cache, timings, damaged):
    if isinstance(damaged, str):
        damaged = damaged.encode()
    cache.write_bytes(damaged)
    found = choice.choose(BIG, 0.1)
    assert (found.sparse, found.reason) == (True, "1.5x at batch 16")
    assert len(timings) == 1
    assert list(json.loads(cache.read_text()).values()) == [[3, 2, 16]]


def test_choices_of_others_are_kept(cache, timings, forgotten):
    choice.choose(BIG, 0.1)
    forgotten()
    choice.choose(dataclasses.replace(BIG, kernel=(3, 3, 16, 17)), 0.1)
    assert len(timings) == 2
    assert len(json.loads(cache.read_text())) == 2


def test_a_cache_that_cannot_be_written(cache, timings, monkeypatch):
    monkeypatch.setattr(choice, "_path", lambda: cache / "no" / "folder")
    for _ in range(2):
        assert choice.choose(BIG, 0.1).sparse
    assert len(timings) == 1


def test_what_the_choice_depends_on(cache, timings, monkeypatch):
    for problem in (
        BIG,
        dataclasses.replace(BIG, strides=(2, 1)),
        dataclasses.replace(BIG, padding="VALID"),
        dataclasses.replace(BIG, dilations=(2, 2)),
        dataclasses.replace(BIG, images=(17, 12, 12)),
        dataclasses.replace(BIG, kernel=(3, 3, 16, 17)),
    ):
        for density in (0.09, 0.1, 0.076):  # in one range
            choice.choose(problem, density)
    assert len(timings) == 6
    assert {density for _, density in timings} == {0.1}
    choice.choose(BIG, 0.11)
    assert len(timings) == 7
    assert timings[-1] == (BIG, 0.15)
    # Another machine with the same home folder, and another program.
    for name in ("dense_library", "_processor", "_cores", "_program"):
        before = len(timings)
        monkeypatch.setattr(choice, name, lambda: "another")
        choice.choose(BIG, 0.11)
        assert len(timings) == before + 1, name
    assert len(json.loads(cache.read_text())) == len(timings)


def test_what_a_machine_and_a_program_are():
    name = choice._processor()
    assert name and len(name.split()) == 1
    assert 1 <= choice._cores() <= os.cpu_count()
    assert re.fullmatch("[0-9a-f]{12}", choice._program())


def test_it_is_said_once_what_takes_its_time(cache, timings, caplog):
    choice._announce.cache_clear()
    choice.choose(BIG, 0.1)
    choice.choose(BIG, 0.2)
    assert len(timings) == 2
    assert caplog.text.count("Timing dense and sparse products") == 1


def test_several_threads_time_once(cache, timings):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: choice.choose(BIG, 0.1), range(8)))
    assert len(timings) == 1
    assert len(set(found)) == 1


def test_images_that_do_not_fit_are_timed_in_smaller_batches(cache, timings):
    huge = dataclasses.replace(BIG, images=(1000, 512, 512))
    assert choice.choose(huge, 0.1).batch == 16
    assert timings[0][0].images == (16, 512, 512)


@pytest.mark.parametrize(
    "dense, sparse, wins",
    [(2, 1, True), (1, 1, True), (1, 1.04, True), (1, 1.06, False)],
)
def test_a_near_tie_goes_to_the_fewer_flops(dense, sparse, wins):
    found = Choice.timed(dense, sparse, 8)
    assert found.sparse == wins
    assert found.reason == f"{dense / sparse:.1f}x at batch 8"


def test_what_a_busy_machine_takes_is_not_kept(cache, forgotten, monkeypatch):
    times = iter([(3.0, 2.0, True), (2.0, 3.0, False)])
    monkeypatch.setattr(choice, "_seconds", lambda *_: next(times))
    found = choice.choose(BIG, 0.1)
    assert found.reason == "1.5x at batch 16, on a busy machine"
    assert choice.choose(BIG, 0.1) == found  # this process remembers it
    assert not cache.exists()
    forgotten()
    assert choice.choose(BIG, 0.1) == Choice.timed(2.0, 3.0, 16)
    assert list(json.loads(cache.read_text()).values()) == [[2, 3, 16]]


def test_kept_choices_can_be_forgotten(cache, timings):
    for density in (0.1, 0.2):
        choice.choose(BIG, density)
    assert choice.forget() == 2
    assert not cache.exists()
    choice.choose(BIG, 0.1)
    assert len(timings) == 3
    assert choice.forget() == 1
    assert choice.forget() == 0


@pytest.mark.parametrize(
    "problem",
    [
        dataclasses.replace(BIG, dilations=(2, 2)),
        dataclasses.replace(BIG, strides=(1, 2), images=(32, 12, 12)),
        dataclasses.replace(BIG, kernel=(3, 3, 8, 16), groups=2),
        Problem((1, 1, 400, 500), (16, 1, 1), matrix=True),
        Recurrence("lstm", (16, 6, 32), 64),
        Recurrence("gru", (16, 6, 64), 64, projected=True, returns=True),
    ],
)
def test_what_else_is_timed(cache, problem):
    before = random.getstate()
    found = choice.choose(problem, 0.1)
    assert 0 < found.sparse_seconds < 1
    assert 0 < found.dense_seconds < math.inf
    assert random.getstate() == before  # the user's generator


def plans_made(*, backward, density, traced):
    """Returns the number of plans that a timing makes."""
    count = library.load().rigl_keras_plans_made
    before = int(count())

    def ask():
        choice.choose(BIG, density, backward=backward)

    if traced:
        with tf.GradientTape():
            tf.function(ask, autograph=False)()
    else:
        ask()
    return int(count()) - before


@needs_library
@pytest.mark.parametrize("traced", [False, True])
def test_gradients_are_timed_as_well(cache, traced):
    """Each of three passes has its own plan; one call is eager."""
    made = functools.partial(plans_made, traced=traced)
    assert made(backward=False, density=0.1) == 2
    assert made(backward=True, density=0.2) == 4


@pytest.fixture
def not_loaded(monkeypatch, timed_kernels):
    def fail():
        raise AssertionError("The library is loaded.")

    monkeypatch.setattr(library, "load", fail)
    monkeypatch.setattr(choice, "_known", {})


def test_dense_without_loading_anything(not_loaded):
    found = choice.choose(BIG, 0.76)
    assert found == Choice(False, "density above 0.75")
    with pytest.raises(AssertionError, match="is loaded"):
        choice.choose(BIG, 0.5)
    tiny = Problem((3, 3, 3, 8), (128, 8, 8))
    assert choice.choose(tiny, 0.1) == Choice(False, "too small to matter")


@pytest.mark.slow
def test_models_that_are_dense_or_small_load_nothing(not_loaded):
    model = small("auto")
    model.fit(*examples(), batch_size=16, verbose=0)
    assert "sparse" not in str(masked_layers(model))
    model = compiled(
        sparsify(small_model(), 0.2, product="dense"),
    )
    model.fit(*examples(), batch_size=16, verbose=0)


def test_images_of_any_size_are_dense(not_loaded):
    inputs = keras.Input((None, None, 16))
    outputs = layers.Conv2D(16, 3, name="big")(inputs)
    model = sparsify(keras.Model(inputs, outputs), 0.1)
    tf.function(model)(tf.zeros((1, 9, 9, 16)))  # a known shape
    traced = tf.function(
        model, input_signature=[tf.TensorSpec([None, None, None, 16])]
    )
    traced(tf.zeros((1, 9, 9, 16)))
    assert "dense: images of any size" in str(masked_layers(model))


# Without a library.


@pytest.mark.slow
@pytest.mark.parametrize("product", ["auto", "sparse"])
def test_without_a_library_as_before(unavailable, timed_kernels, product):
    losses = []
    for each in (product, "dense"):
        model = big_model(product=each)
        method = RigL(frequency=2, end_step=9)
        losses.append(losses_of(model, big_examples(), [method], epochs=3))
        if each == product:
            table = str(masked_layers(model))
            assert "dense: there is no compiler" in table
            assert not any(chosen(model).values())
    assert losses[0] == losses[1]
