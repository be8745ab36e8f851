"""What the tests share: small models and their training."""

import gc

import keras
import numpy as np
import pytest
from keras import layers
from support.disk import disk  # noqa: F401 - a fixture
from support.fresh import Server
from tensorflow.python.framework.ops import gradient_registry

import gin
import rigl_keras
from rigl_keras.kernels import fast_calls, layer_products
from rigl_keras.kernels.choice import Choice


def small_model(dropout=0.2, **kernel):
    """Returns a dense convolutional network with named layers."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", name="conv1", **kernel)(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU()(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Conv2D(16, 3, strides=2, name="conv2", **kernel)(x)
    x = layers.Flatten()(x)
    x = layers.Dropout(dropout, seed=1)(x)
    return keras.Model(inputs, layers.Dense(10, name="head", **kernel)(x))


def small_network(
    num_classes=10,
    input_shape=(8, 8, 1),
    channel_scale=1.0,
    width=1,
    dropout=0.0,
    weight_decay=5e-4,
):
    """Returns what runs of tests train, in a third of a wide ResNet's time.

    gin has it under its name.
    """
    penalty = keras.regularizers.L2(weight_decay) if weight_decay else None
    x = inputs = keras.Input(input_shape)
    for name, channels, strides in (("conv1", 16, 1), ("conv2", 32, 2)):
        x = layers.Conv2D(
            int(channels * width * channel_scale),
            3,
            strides=strides,
            padding="same",
            use_bias=False,
            kernel_regularizer=penalty,
            name=name,
        )(x)
        x = layers.BatchNormalization(name=f"{name}_norm")(x)
        x = layers.ReLU()(x)
    x = layers.Dropout(dropout)(layers.GlobalAveragePooling2D()(x))
    head = layers.Dense(
        num_classes, kernel_regularizer=penalty, name="classifier"
    )
    return keras.Model(inputs, head(x), name="small_network")


gin.external_configurable(small_network, name="small_network")


def examples(n=64, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, 8, 8, 3)).astype(np.float32)
    return x, draw.integers(0, 10, n)


def compiled(model, optimizer=None, **options):
    model.compile(
        optimizer or keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **options,
    )
    return model


def masks(model):
    return {m.name: m.mask.numpy() for m in rigl_keras.masked_layers(model)}


def kernels(model):
    return {m.name: m.kernel.numpy() for m in rigl_keras.masked_layers(model)}


_timed = layer_products.chosen


def _never_timed(*_, backward=True):
    return Choice(False, "tests")


@pytest.fixture(autouse=True, scope="session")
def untimed_kernels():
    """`kernels="auto"` is dense, and nothing is built, loaded or timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_products, "chosen", _never_timed)
        # Batch norm and dropout are Keras's; test_fast_calls.py has the others.
        patch.setattr(fast_calls, "_LEAST_NUMBERS", float("inf"))
        yield


@pytest.fixture
def timed_kernels(monkeypatch):
    """`kernels="auto"` is what it is outside tests."""
    monkeypatch.setattr(layer_products, "chosen", _timed)


@pytest.fixture
def always_sparse(monkeypatch):
    """`kernels="auto"` is sparse: layers of tests are too small to win."""
    monkeypatch.setattr(
        layer_products, "chosen", lambda *_, **__: Choice(True, "test")
    )


@pytest.fixture(scope="session")
def fresh():
    """Runs commands as `python` does, in processes that know TensorFlow."""
    server = Server()
    yield server.run
    server.close()


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def pytest_collection_finish():
    # A million objects of what has been imported stay: no collection of garbage
    # need look at them again. A twentieth of the time of all tests.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True, scope="module")
def no_graphs_left():
    """Frees the graphs of a module's models once its tests are done.

    TensorFlow registers each custom gradient of a graph for as long as the
    process lives, and the graph with it: gigabytes after some hundred models.
    """
    yield
    gradients = gradient_registry._registry
    for name in [n for n in gradients if n.startswith("CustomGradient")]:
        del gradients[name]
    gc.collect()


def pytest_addoption(parser):
    parser.addoption(
        "--every-combination",
        action="store_true",
        help="Kinds of models x methods x set-ups, not only each pair.",
    )
    parser.addoption(
        "--every-kill",
        action="store_true",
        help="Runs are killed at many random moments, not only at a few.",
    )
