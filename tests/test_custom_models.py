"""Custom layers and models, and which of their kernels are masked."""

import collections
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support import kinds
from support.kinds import assert_same, make, masked, outputs

from rigl_keras.flops.counting import count
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.stripping import strip


def test_a_layer_within_is_chosen_or_left_out():
    dense = make("custom layers")
    model = sparsify(dense, 0.5, layers=layers.Dense)
    assert list(masked_layers(model).masks) == [
        "block/dense/0/kernel",
        "block/dense/1/kernel",
        "block/heads/one/kernel",
        "head",
    ]
    one = dense.get_layer("block").dense[1]
    model = sparsify(dense, 0.5, layers=one)
    assert list(masked_layers(model).masks) == ["block/dense/1/kernel"]
    model = sparsify(
        dense, 0.5, kernels={kinds.Linear: ["w"]}, densities={"block": 0.6}
    )
    densities = {n: m.density for n, m in masked_layers(model).named.items()}
    assert densities["block/heads/one/kernel"] == pytest.approx(0.6, abs=0.02)
    assert densities["linear/w"] < 0.5
    report = " ".join(str(masked_layers(sparsify(dense, 0.5))).split())
    assert "linear: Linear has no kernel that can be masked" in report
    assert "pass kernels={Linear: name}" in report


def test_embeddings_are_left_out_by_default():
    dense = make("Embedding")
    model = sparsify(dense, 0.5)
    assert "embedding/embeddings" not in masked_layers(model).masks
    text = " ".join(str(masked_layers(model)).split())
    assert "embedding: an Embedding is masked only if" in text
    for options in (
        {"layers": layers.Embedding},
        {"layers": dense.get_layer("embedding")},
        {"kernels": {layers.Embedding: "embeddings"}},
    ):
        model = sparsify(dense, 0.5, **options)
        assert "embedding/embeddings" in masked_layers(model).masks


def test_strict():
    dense = make("custom layers")
    with pytest.raises(
        ValueError, match="(?s)strict=True.*linear: Linear has no"
    ):
        sparsify(dense, 0.5, strict=True)
    sparsify(dense, 0.5, strict=True, kernels={kinds.Linear: "w"})
    sparsify(make("Embedding"), 0.5, strict=True)  # left out by rule
    sparsify(make("Functional"), 0.5, strict=True)


@pytest.mark.parametrize(
    "kernels", [3, "kernel", ["w"], {"Linear": "w"}, {kinds.Linear: 3}]
)
def test_kernels_of_a_wrong_type(kernels):
    with pytest.raises(ValueError, match="kernels must be {layer or layer"):
        sparsify(make("custom layers"), 0.5, kernels=kernels)


def test_what_a_masked_layer_assigns_reaches_its_variables():
    """Statistics and random states of layers within a layer."""
    model = masked("custom layers")
    block = model.get_layer("block").layer
    x, _ = kinds.data(model, n=64)
    mean = block.norm.moving_mean.numpy()
    seeds = block.drop.seed_generator.state.numpy()
    model(x, training=False)
    np.testing.assert_array_equal(block.norm.moving_mean.numpy(), mean)
    model(x, training=True)
    assert (block.norm.moving_mean.numpy() != mean).all()
    assert (block.drop.seed_generator.state.numpy() != seeds).any()
    # The same as the plain layer, except for the masks.
    plain = strip(model)
    model(x, training=True)
    plain(x, training=True)
    np.testing.assert_allclose(
        plain.get_layer("block").norm.moving_mean.numpy(),
        block.norm.moving_mean.numpy(),
        rtol=1e-5,
    )


FRESH = """
import sys, keras, numpy as np
sys.path.insert(0, sys.argv[2])
import rigl_keras
from support import kinds
model = keras.models.load_model(sys.argv[1])
print(type(model).__name__, len(rigl_keras.masked_layers(model)))
np.save(sys.argv[1] + ".npy", model(np.ones((2, 5), np.float32)))
"""


def test_a_subclassed_model_loads_in_another_process(tmp_path, fresh):
    model = masked("subclassed")
    path = tmp_path / "m.keras"
    model.save(path)
    done = fresh("-c", FRESH, path, pathlib.Path(__file__).parent)
    assert done.stdout.split() == ["Subclassed", "8"], done.stderr
    want = model(np.ones((2, 5), np.float32))
    np.testing.assert_allclose(np.load(f"{path}.npy"), want, rtol=1e-5)


class Wrapping(keras.Model):
    """A Functional model with a custom constructor."""

    def __init__(self, units):
        inputs = keras.Input((4,))
        super().__init__(inputs, layers.Dense(units)(inputs))

    def train_step(self, data):
        raise NotImplementedError


def test_a_model_of_which_a_copy_would_lose_methods_is_masked_in_place():
    dense = Wrapping(3)
    model = sparsify(dense, 0.5)
    assert model is dense and len(masked_layers(model)) == 1
    with pytest.raises(NotImplementedError):
        model.train_step(None)
    assert strip(model) is dense and type(dense) is Wrapping


class Doubled(keras.Sequential):
    """Does not compute its layers one after the other."""

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


def test_a_model_within_that_would_lose_its_call_is_masked_in_place():
    inputs = keras.Input((4,))
    inner = Doubled([keras.Input((4,)), layers.Dense(3)])
    dense, x = keras.Model(inputs, inner(inputs)), np.ones((2, 4), np.float32)
    want = dense(x).numpy()
    with pytest.warns(UserWarning, match="in place, because it cannot be"):
        model = sparsify(dense, 1.0)
    assert isinstance(model.layers[1], Doubled) and masked_layers(model)
    np.testing.assert_allclose(model(x), want, rtol=1e-6)


@keras.saving.register_keras_serializable("tests")
class Watched(layers.Layer):
    """Has a metric and a float32 layer, under half precision."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(1, use_bias=False, dtype="float32")
        self.mean = keras.metrics.Mean(name="watched")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        self.mean.update_state(keras.ops.mean(x))
        return self.dense(x)

    def double(self, x):
        return 2 * self(x)


def test_metrics_precision_and_methods_of_a_masked_layer():
    inputs = keras.Input((4,))
    watched = Watched(name="w", dtype="mixed_float16")
    dense = keras.Model(inputs, watched(inputs))
    watched.dense.kernel.assign(np.full((4, 1), 1.0003))
    model = sparsify(dense, 1.0)
    x = np.eye(4, dtype=np.float32)[:2]
    np.testing.assert_array_equal(model(x), dense(x))
    assert abs(float(model(x)[0, 0]) - 1.0003) < 1e-6
    masked = model.get_layer("w")
    assert float(masked.mean.result()) == float(watched.mean.result()) > 0
    np.testing.assert_array_equal(masked.double(x), 2 * model(x))
    masked_model = sparsify(make("Embedding"), 0.5)
    with pytest.raises(AttributeError, match="no single `kernel`"):
        _ = masked_model.get_layer("lstm").kernel
    with pytest.raises(AttributeError, match="neither"):
        _ = masked.neither


@keras.saving.register_keras_serializable("tests")
class Around(layers.Layer):
    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return self.inner(x)


class Odd(keras.Model):
    """Has layers in every kind of container."""

    def __init__(self):
        super().__init__()
        pair = collections.namedtuple("pair", "one two")
        self.numbered = {0: layers.Dense(4), 1: layers.Dense(4)}
        self.dotted = {"conv1.a": layers.Dense(4, name="dotted")}
        self.pair = pair(layers.Dense(4), [(layers.Dense(4), "text")])
        self.checkpointed = True
        self.out = layers.Dense(4, name="out")

    def call(self, x):
        x = self.numbered[1](self.numbered[0](x))
        x = self.pair.two[0][0](self.pair.one(self.dotted["conv1.a"](x)))
        return self.out(x) * (1.0 if self.checkpointed is True else 0.0)


def test_layers_in_every_kind_of_container():
    model = Odd()
    x = np.ones((2, 4), np.float32)
    want = outputs(model, x)
    parameters = model.count_params()
    model = sparsify(model, 1.0, strict=True)
    assert len(masked_layers(model)) == 6
    assert_same(outputs(model, x), want)
    assert count(model).parameters == parameters
    assert_same(outputs(strip(model), x), want)


class Tied(keras.Model):
    """Uses a layer within two other layers, and by itself."""

    def __init__(self):
        super().__init__()
        dense = layers.Dense(20, name="d")
        self.one, self.two = (
            Around(dense, name="one"),
            Around(dense, name="two"),
        )

    def call(self, x):
        return self.two(self.one(x))


def test_a_kernel_that_layers_share_has_one_mask():
    model = Tied()
    x = np.ones((2, 20), np.float32)
    model(x)
    model = sparsify(model, 0.5)
    (masked,) = masked_layers(model)
    assert np.count_nonzero(masked.kernel.numpy()) == 200
    assert count(model).nonzeros == 200 + 20
    # Masked in place, as a copy would have two layers instead of one.
    dense = layers.Dense(8, name="d")
    inputs = keras.Input((4, 8))
    tied = keras.Model(inputs, dense(layers.TimeDistributed(dense)(inputs)))
    before = len(tied.trainable_variables)
    with pytest.warns(UserWarning, match="share the weights"):
        model = sparsify(tied, 0.5)
    assert len(masked_layers(model)) == 1
    assert len(model.trainable_variables) == before


class Sharing(keras.Model):
    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def call(self, x):
        return self.dense(x)


def test_a_layer_that_another_model_has_masked_is_refused():
    dense = layers.Dense(8, name="d")
    one, two = Sharing(dense), Sharing(dense)
    for model in (one, two):
        model(np.zeros((1, 5), np.float32))
    sparsify(one, 0.5)
    with pytest.raises(ValueError, match="already masked in another model"):
        sparsify(two, 0.5)


def test_what_is_frozen_stays_frozen():
    dense = make("custom layers")
    dense.get_layer("block").dense[0].trainable = False
    dense.get_layer("head").trainable = False
    for model in (sparsify(dense, 0.5), strip(sparsify(dense, 0.5))):
        names = [v.path for v in model.trainable_variables]
        assert len(names) == len(dense.trainable_variables)
    model = sparsify(dense, 0.5)
    frozen = model.get_layer("block").layer.dense[0].kernel
    before = frozen.numpy()
    model.compile("sgd", "mse")
    model.fit(*kinds.data(model), verbose=0)
    np.testing.assert_array_equal(frozen.numpy(), before)


class Named(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.rnn = layers.LSTM(3)

    def call(self, inputs):
        return self.dense(inputs["a"]) + self.rnn(sequences=inputs["b"])


class Whole(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, ids):
        return self.dense(tf.one_hot(ids, 7))


def test_counting_what_is_called_in_other_ways():
    model = Named()
    model({"a": np.ones((1, 2)), "b": np.ones((1, 5, 4))})
    cost = count(sparsify(model, 1.0), convention="macs")
    assert cost.inference_flops == 2 * 3 + 5 * (4 * 12 + 3 * 12)
    whole = Whole()
    whole(np.ones((2,), np.int32))
    with pytest.raises(ValueError, match="FLOPs of model .* cannot be counted"):
        count(whole)
