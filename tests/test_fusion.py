"""Models for inference by sparse kernels, and exports that carry them."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import rigl_keras
from rigl_keras import kernels
from rigl_keras.exporting import fusion

pytestmark = pytest.mark.skipif(
    kernels.load() is None, reason=f"no op library: {kernels.unavailable()}"
)


def with_statistics(model, seed=0):
    """Returns a model whose batch norms have seen something."""
    draw = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            for variable in layer.variables:
                variable.assign(draw.uniform(0.5, 1.5, variable.shape))
    return model


def check(model, *, shape=(8, 8, 3), batches=(1, 5), product="sparse"):
    """Sees that a fused model computes what the model does; returns it."""
    fused = fusion.Fused(model, product=product)
    run = tf.function(fused, autograph=False)
    for batch in batches:
        draw = np.random.default_rng(batch)
        x = tf.constant(draw.standard_normal((batch, *shape)), tf.float32)
        want = model(x, training=False)
        got = run(x)
        largest = max(1.0, float(tf.reduce_max(tf.abs(want))))
        np.testing.assert_allclose(got, want, atol=2e-5 * largest)
    return fused


def masked(inputs, outputs):
    model = with_statistics(keras.Model(inputs, outputs))
    return rigl_keras.sparsify(model, 0.3, product="dense")


def conv(filters, name, **options):
    options = {"padding": "same", "use_bias": False, **options}
    return layers.Conv2D(filters, 3, name=name, **options)


def told(fused):
    return {layer.name: layer.after for layer in fused.layers}


def test_what_comes_after_a_convolution():
    inputs = keras.Input((8, 8, 3))
    x = conv(16, "one", use_bias=True)(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dropout(0.5)(x)
    x = conv(16, "two", activation="relu")(x)
    x = layers.BatchNormalization(name="not_after_relu")(x)
    x = conv(8, "three", activation="tanh")(x)  # what is left to Keras
    assert told(check(masked(inputs, x))) == {
        "one": ("norm", "relu"),
        "two": (),
        "three": (),
    }


def test_a_residual_block_before_and_after_its_activation():
    inputs = keras.Input((8, 8, 16))
    x = layers.BatchNormalization(name="norm1")(inputs)
    x = layers.Activation("relu", name="relu1")(x)
    x = conv(16, "one")(x)
    x = layers.BatchNormalization(name="norm2")(x)
    x = layers.Activation("relu", name="relu2")(x)
    x = conv(16, "two")(x)
    x = layers.Add(name="add1")([inputs, x])
    y = conv(16, "three")(x)
    y = layers.BatchNormalization(name="norm3")(y)
    y = layers.Add(name="add2")([y, x])
    y = layers.ReLU(name="relu3")(y)
    fused = check(masked(inputs, y), shape=(8, 8, 16))
    assert told(fused) == {
        "one": ("norm2", "relu2"),
        "two": ("add1",),
        "three": ("norm3", "add2", "relu3"),
    }


def test_what_is_read_twice_is_written():
    inputs = keras.Input((8, 8, 3))
    x = conv(16, "one")(inputs)
    y = layers.ReLU(name="relu")(x)
    z = layers.BatchNormalization(name="norm")(y)
    both = layers.Concatenate()([x, conv(16, "two")(z), z])
    summed = layers.Add()([both, both])
    fused = check(masked(inputs, [summed, y][0]))
    assert told(fused) == {"one": (), "two": ()}


def test_several_outputs_and_a_sum_of_two_convolutions():
    inputs = keras.Input((8, 8, 3))
    one, two = conv(16, "one")(inputs), conv(16, "two")(inputs)
    total = one + two
    model = with_statistics(keras.Model(inputs, {"a": total, "b": inputs * 2}))
    model = rigl_keras.sparsify(model, 0.3, product="dense")
    x = tf.random.stateless_normal((3, 8, 8, 3), seed=(0, 0))
    fused = fusion.Fused(model, product="sparse")
    got, want = fused(x), model(x, training=False)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("pads", [None, 1, ((2, 0), (1, 3))])
def test_strides_and_zeros_around(padding, strides, pads):
    inputs = keras.Input((9, 8, 5))
    x = layers.BatchNormalization()(inputs)
    x = layers.ReLU()(x)
    if pads is not None:
        x = layers.ZeroPadding2D(pads)(x)
    x = conv(7, "one", padding=padding, strides=strides)(x)
    check(masked(inputs, x), shape=(9, 8, 5))


def test_padding_between_norm_and_relu():
    """A norm of what is padded would not be zero there; a relu of zero is."""
    inputs = keras.Input((6, 6, 4))
    x = layers.ZeroPadding2D(1)(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.ZeroPadding2D(1)(x)
    x = layers.ReLU()(x)
    x = layers.ZeroPadding2D(1)(x)
    x = conv(6, "one", padding="valid", dilation_rate=2)(x)
    check(masked(inputs, x), shape=(6, 6, 4))


def test_dense_layers_with_what_follows():
    inputs = keras.Input((5, 12))
    x = layers.Dense(20, name="one")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dense(12, activation="relu", name="two")(x)
    x = layers.Add(name="add")([layers.Dense(12, name="three")(x), inputs])
    fused = check(masked(inputs, x), shape=(5, 12))
    assert told(fused)["one"] == ("norm", "relu")
    assert told(fused)["three"] == ("add",)


def test_a_layer_that_is_called_twice():
    inputs = keras.Input((8, 8, 3))
    shared = conv(3, "shared")
    model = rigl_keras.sparsify(
        keras.Model(inputs, shared(shared(inputs))), 0.3, product="dense"
    )
    fused = check(model)
    assert "more than once" in fused.layers[0].choice.reason


@pytest.mark.slow_but("lenet5", "wide_resnet")
@pytest.mark.parametrize(
    "network",
    [
        lambda: rigl_keras.models.wide_resnet(10, 1),
        lambda: rigl_keras.models.resnet18(),
        lambda: rigl_keras.models.lenet5(input_shape=(32, 32, 3)),
    ],
    ids=["wide_resnet", "resnet18", "lenet5"],
)
def test_networks(network):
    model = rigl_keras.sparsify(with_statistics(network()), 0.1)
    fused = check(model, shape=(32, 32, 3), batches=(2, 17))
    sparse = [layer for layer in fused.layers if layer.choice.sparse]
    assert len(sparse) > len(fused.layers) / 2


def test_what_cannot_be_fused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4)

        def call(self, x):
            return self.dense(x)

    model = Own()
    model(tf.ones((1, 3)))
    with pytest.raises(ValueError, match="subclassed"):
        fusion.Fused(model)


def test_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "load", lambda: None)
    monkeypatch.setattr(kernels, "unavailable", lambda: "no compiler")
    model = rigl_keras.sparsify(rigl_keras.models.lenet5(), 0.1)
    with pytest.raises(ValueError, match="not available: no compiler"):
        fusion.Fused(model)
    with pytest.raises(ValueError, match="no compiler.*format='saved_model'"):
        rigl_keras.export(model, tmp_path / "e", format="sparse_saved_model")
    assert not list(tmp_path.iterdir())


LOAD = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
import load
assert "rigl_keras" not in sys.modules
for _ in range(2):  # the second finds the operations known
    serve = load.model().signatures["serving_default"]
x = np.load(sys.argv[2])
(name,) = serve.structured_input_signature[1]
np.save(sys.argv[3], serve(**{name: x})["output_0"])
"""


@pytest.mark.slow
def test_an_export_and_its_loader(tmp_path, always_sparse):
    model = with_statistics(rigl_keras.models.wide_resnet(10, 1))
    model = rigl_keras.sparsify(model, 0.1, product="dense")
    folder = tmp_path / "exported"
    options = {"format": "sparse_saved_model", "measure": False}
    report = rigl_keras.export(model, folder, **options)
    assert report.max_difference < 1e-5
    assert (folder / "assets.extra" / "rigl_keras_kernels.so").exists()
    # Again, over what is there, and nothing of it is foreign.
    rigl_keras.export(model, folder, overwrite=True, **options)
    rigl_keras.check_export(folder)

    # Elsewhere, where TensorFlow is and this package is not.
    x = np.random.default_rng(0).standard_normal((3, 32, 32, 3), np.float32)
    np.save(tmp_path / "x.npy", x)
    arguments = [folder, tmp_path / "x.npy", tmp_path / "y.npy"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    got, want = np.load(tmp_path / "y.npy"), model(x, training=False)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_nothing_to_win(tmp_path, timed_kernels):
    model = rigl_keras.sparsify(
        rigl_keras.models.mlp(input_shape=(8, 8, 1)), 0.9
    )
    with pytest.raises(ValueError, match="no layer.*above 0.75.*saved_"):
        rigl_keras.export(model, tmp_path / "e", format="sparse_saved_model")
    assert not list(tmp_path.iterdir())
