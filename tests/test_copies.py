"""Copies of models: what is frozen, state beyond weights, clones, pickles."""

import copy
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.copied_kinds import X, encoder, networks
from support.small_models import masks

from rigl_keras.masking import layer_state
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.stripping import strip

WORDS = tf.constant([["a b"], ["b c"], ["d"]])


def densities(model):
    return {m.name: m.density for m in masked_layers(model)}


def same(one, other, x=X):
    np.testing.assert_array_equal(one(x), other(x))


# Frozen layers.


def base(depth):
    inputs = keras.Input((6,))
    x = layers.Dense(6, name=f"one{depth}")(inputs)
    x = layers.BatchNormalization(name=f"norm{depth}")(x)
    if depth:
        x = base(depth - 1)(x)
    x = layers.Dense(6, name=f"two{depth}")(x)
    return keras.Model(inputs, x, name=f"base{depth}")


def frozen_models():
    def whole(model):
        model.get_layer("base2").trainable = False

    def thawed_within(model):
        whole(model)
        deep = model.get_layer("base2").get_layer("base1")
        deep.trainable = True  # but the layers above it stay frozen
        deep.get_layer("one1").trainable = False

    def one_variable(model):
        model.get_layer("base2").get_layer("two2").bias.trainable = False

    def all_of_it(model):
        model.trainable = False

    return [whole, thawed_within, one_variable, all_of_it]


def plain_flags(model):
    """Returns the `trainable` flag of every layer and model, by path."""
    found = {}

    def walk(layer, path):
        path = f"{path}/{layer.name}"
        if isinstance(layer, Masked):
            assert layer.trainable == layer.layer.trainable
            layer = layer.layer
        if not isinstance(layer, layers.InputLayer):
            found[path] = layer.trainable
        for inner in layer._layers:
            walk(inner, path)

    for layer in model.layers:
        walk(layer, "")
    return found, model.trainable


@pytest.mark.parametrize("freeze", frozen_models(), ids=lambda f: f.__name__)
def test_what_is_frozen_is_frozen_in_copies_and_can_be_thawed(freeze):
    inputs = keras.Input((6,))
    dense = keras.Model(inputs, layers.Dense(3, name="head")(base(2)(inputs)))
    all_weights = len(dense.trainable_variables)
    freeze(dense)
    sparse = sparsify(dense, 0.5)
    models = [sparse, strip(sparse)]
    if "variable" not in freeze.__name__:  # Keras's files do not keep it
        models.append(pickle.loads(pickle.dumps(sparse)))
    frozen, some = plain_flags(dense), len(dense.trainable_variables)
    assert some < all_weights
    for model in models:
        assert plain_flags(model) == frozen
        assert len(model.trainable_variables) == some
    for model in [dense, *models]:
        model.trainable = True
        model.get_layer("base2").trainable = True
    thawed = len(dense.trainable_variables)
    assert thawed > some or freeze.__name__ == "one_variable"
    for model in models:
        assert len(model.trainable_variables) == thawed


# State beyond weights.


def adapted(layer, values):
    layer.adapt(values)
    return layer


def looked_up(kind, values, **options):
    return lambda: adapted(kind(**options), np.array(values))


STATEFUL = {
    **{
        f"StringLookup, {mode}": (
            looked_up(layers.StringLookup, ["b", "a", "b"], output_mode=mode),
            tf.constant([["a", "b"], ["b", "z"]]),
        )
        for mode in ("int", "one_hot", "multi_hot", "count", "tf_idf")
    },
    "IntegerLookup": (
        looked_up(layers.IntegerLookup, [7, 9, 7], output_mode="multi_hot"),
        tf.constant([[7, 5], [9, 9]]),
    ),
    "padded tf_idf": (
        looked_up(
            layers.StringLookup,
            ["b", "a", "b"],
            output_mode="tf_idf",
            max_tokens=7,
            pad_to_max_tokens=True,
        ),
        tf.constant([["a", "b"], ["b", "z"]]),
    ),
    "no text": (  # a vocabulary that no text file can hold
        looked_up(
            layers.StringLookup, [b"\xff\xfe", b"a\nb"], output_mode="one_hot"
        ),
        tf.constant([[b"\xff\xfe"], [b"a\nb"]]),
    ),
    "TextVectorization": (
        looked_up(
            layers.TextVectorization, ["a b", "b c"], output_mode="multi_hot"
        ),
        WORDS,
    ),
    "TextVectorization, tf_idf": (
        looked_up(
            layers.TextVectorization, ["a b", "b c"], output_mode="tf_idf"
        ),
        WORDS,
    ),
    "TextVectorization, int": (
        looked_up(
            layers.TextVectorization, ["a b", "b"], output_sequence_length=3
        ),
        WORDS,
    ),
    "vocabulary given": (
        lambda: layers.StringLookup(
            vocabulary=["a", "b"], output_mode="one_hot"
        ),
        tf.constant([["a"], ["z"]]),
    ),
    "Discretization": (
        looked_up(
            layers.Discretization,
            np.arange(40.0)[:, None],
            num_bins=4,
            output_mode="one_hot",
        ),
        np.array([[3.0], [33.0]], np.float32),
    ),
    "Normalization": (looked_up(layers.Normalization, 5 + 2 * X), X),
    "Normalization given": (
        lambda: layers.Normalization(mean=3.0, variance=4.0),
        X,
    ),
}


def on_top_of(layer, x):
    inputs = keras.Input(x.shape[1:], dtype=getattr(x.dtype, "name", x.dtype))
    y = layer(inputs)
    if "int" in y.dtype:
        y = layers.Embedding(9, 4, name="table")(y)
        y = layers.Flatten()(y)
    return keras.Model(inputs, layers.Dense(3, name="head")(y))


@pytest.mark.parametrize("name", STATEFUL)
def test_what_a_layer_has_learned_travels(name):
    make, x = STATEFUL[name]
    dense = on_top_of(make(), x)
    want = dense(x).numpy()
    sparse = sparsify(dense, 1.0)
    np.testing.assert_array_equal(sparse(x), want)
    np.testing.assert_array_equal(strip(sparse)(x), want)
    assert not np.array_equal(want[0], want[1])


def test_a_copy_of_a_lookup_is_one_of_its_own():
    make, x = STATEFUL["StringLookup, int"]
    dense = on_top_of(make(), x)
    want = dense(x).numpy()
    sparse = sparsify(dense, 1.0)
    lookup = sparse.layers[1]
    assert lookup.get_vocabulary() == ["[UNK]", "b", "a"]
    lookup.adapt(np.array(["z", "z", "a"]))
    assert lookup.get_vocabulary() == ["[UNK]", "z", "a"]
    np.testing.assert_array_equal(dense(x), want)
    assert not np.array_equal(sparse(x), want)


def test_a_vocabulary_from_a_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("b\na\n")
    x = tf.constant([["a"], ["z"]])
    dense = on_top_of(
        layers.StringLookup(vocabulary=str(file), output_mode="one_hot"), x
    )
    sparse = sparsify(dense, 1.0)
    same(dense, sparse, x)
    with pytest.raises(ValueError, match="static vocabulary"):
        sparse.layers[1].adapt(["c"])  # as for the dense model


def test_counts_that_are_not_used_yet_travel():
    lookup = layers.StringLookup()
    lookup.update_state(np.array(["a", "b", "b"]))
    other = layers.StringLookup.from_config(lookup.get_config())
    layer_state.copy_state(lookup, other)
    other.finalize_state()
    assert other.get_vocabulary() == ["[UNK]", "b", "a"]


@keras.saving.register_keras_serializable("tests")
class Remembering(layers.Layer):
    """Has a layer with statistics, and state that only its methods save."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm, self.dense = layers.Normalization(), layers.Dense(6)
        self.factor, self.words = 1.0, ""

    def build(self, shape):
        self.norm.build(shape)
        self.dense.build(shape)

    def call(self, x):
        return self.dense(self.norm(x)) * self.factor + len(self.words)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["factor"] = np.float32(self.factor)

    def load_own_variables(self, store):
        self.factor = float(np.asarray(store["factor"]))

    def save_assets(self, folder):
        with open(f"{folder}/words", "w") as file:
            file.write(self.words)

    def load_assets(self, folder):
        with open(f"{folder}/words") as file:
            self.words = file.read()


def test_state_within_layers_of_ones_own_travels(tmp_path):
    inputs = keras.Input((6,))
    layer = Remembering(name="own")
    dense = keras.Model(inputs, layers.Dense(3)(layer(inputs)))
    layer.norm.adapt(5 + 2 * X)
    layer.factor, layer.words = 3.0, "some"
    sparse = sparsify(dense, 1.0)
    assert [m.name for m in masked_layers(sparse)][0] == "own/dense/kernel"
    same(dense, sparse)
    same(dense, strip(sparse))


def test_inputs_stay_sparse_and_optional():
    inputs = keras.Input((6,), sparse=True, name="x")
    other = keras.Input((6,), optional=True, name="other")
    dense = keras.Model([inputs, other], layers.Dense(3)(inputs))
    sequential = keras.Sequential(
        [keras.Input((6,), sparse=True), layers.Dense(3)]
    )
    for model in (sparsify(dense, 0.5), sparsify(sequential, 0.5)):
        assert model.inputs[0].sparse
    copied = sparsify(dense, 0.5)
    assert copied.inputs[1]._keras_history.operation.optional


# Clones.


CLONES = {
    "clone_model": keras.models.clone_model,
    "from_config": lambda model: type(model).from_config(model.get_config()),
    "model_from_json": lambda m: keras.models.model_from_json(m.to_json()),
}


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
@pytest.mark.parametrize("make", networks(), ids=lambda f: f.__name__)
def test_clones_are_as_sparse(make, clone):
    dense, options = make()
    if not dense.built:
        dense.build(dense.layers[0].input_shape)
    model = sparsify(dense, 0.3, **options)
    cloned = clone(model)
    assert densities(cloned) == densities(model)
    assert all(d < 1 for d in densities(model).values())
    keys = {m.name: m.draw_key for m in masked_layers(model)}
    assert keys == {m.name: m.draw_key for m in masked_layers(cloned)}
    for masked in masked_layers(cloned):
        kernel, mask = masked.kernel.numpy(), masked.mask.numpy()
        assert not kernel[mask == 0].any() and kernel[mask == 1].any()
        if options:
            assert (mask == mask[:1, :1]).all()
        if masked.name in ("hidden", "conv1"):  # drawn from the same key
            np.testing.assert_array_equal(mask, masks(model)[masked.name])
    cloned.set_weights(model.get_weights())
    for name, mask in masks(model).items():
        np.testing.assert_array_equal(mask, masks(cloned)[name])
    again = masks(clone(model))
    for name, mask in masks(clone(model)).items():
        np.testing.assert_array_equal(mask, again[name])


def test_a_config_without_the_number_of_ones_still_loads():
    layer = sparsify(networks()[0]()[0], 0.3).get_layer("hidden")
    config = layer.get_config()
    assert config.pop("nonzeros") == [int(layer.mask.numpy().sum())]
    old = Masked.from_config(copy.deepcopy(config))
    old(X)
    assert old.density == 1.0
    with pytest.raises(ValueError, match=r"nonzeros must be in \[0, 72\]"):
        Masked.from_config({**config, "nonzeros": [73]})(X)


@pytest.mark.parametrize("copied", [copy.deepcopy, None], ids=["copy", "bytes"])
def test_pickles(copied):
    copied = copied or (lambda model: pickle.loads(pickle.dumps(model)))
    functional = networks()[0]()[0]
    for dense in (encoder(), functional):
        want = dense(X).numpy()
        np.testing.assert_allclose(copied(dense)(X), want, rtol=1e-6)
        model = sparsify(dense, 0.3)
        again = copied(model)
        np.testing.assert_allclose(again(X), model(X), rtol=1e-6)
        assert densities(again) == densities(model)
        assert isinstance(again, type(dense).__mro__[1])
