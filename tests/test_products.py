"""Layers with sparse products: results, and layers that have none."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.methods import METHODS
from support.small_models import compiled, examples, masks
from support.small_products import (
    ALL_BUT_DEPTHWISE,
    chosen,
    losses_of,
    needs_library,
    small,
)

import rigl_keras
from rigl_keras.kernels import library
from rigl_keras.kernels.choice import Choice
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import choose_kernels, masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.tracing import dense_gradients
from rigl_keras.methods.rigl import RigL


@pytest.fixture
def loaded():
    if library.load() is None:
        pytest.skip(f"no sparse kernels: {library.unavailable()}")


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
