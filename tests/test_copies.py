"""Copies of models, and models that are masked within others."""

import copy
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.copied_kinds import Backbone, Encoder, Task, X
from support.small_models import masks

from rigl_keras.flops.counting import count
from rigl_keras.masking import layer_state
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.stripping import strip
from rigl_keras.masking.weight_files import load_weights
from rigl_keras.methods.rigl import RigL

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


def networks():
    def mlp():
        inputs = keras.Input((6,))
        x = layers.Dense(12, name="hidden")(inputs)
        return keras.Model(inputs, layers.Dense(3, name="head")(x)), {}

    def convolutions():
        inputs = keras.Input((8, 8, 3))
        x = layers.Conv2D(9, 3, name="conv1")(inputs)
        x = layers.Conv2D(9, 3, name="conv2")(x)
        return keras.Model(inputs, x), {"granularity": "kernel"}

    def several_kernels():
        inputs = keras.Input((4, 5))
        x = layers.LSTM(4, name="lstm")(inputs)
        return keras.Sequential(
            [
                keras.Model(inputs, x),
                keras.layers.Dense(7, name="head"),
            ]
        ), {}

    return [mlp, convolutions, several_kernels]


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


# Models masked in place: subclassed, or with custom constructors.


def encoder():
    model = Encoder(name="encoder")
    model(X)
    model.scale.adapt(X + 3)
    return model


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


class Owner(keras.Model):
    """A subclassed model that owns a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, layers.Dense(3, name="head")

    def call(self, x):
        return self.head(self.backbone(x))


def owner():
    model = Owner(Backbone(name="backbone"))
    model(X)
    return model


OF_BACKBONE = ["embed", "b0", "b1", "deep"]
MADE = {
    "backbone": (lambda: Backbone(name="backbone"), OF_BACKBONE),
    "task": (lambda: Task(Backbone(name="backbone")), [*OF_BACKBONE, "head"]),
    "owner": (owner, [*OF_BACKBONE, "head"]),
}


@pytest.mark.slow_but("task")
@pytest.mark.parametrize("name", MADE)
def test_models_with_constructors_of_their_own_are_masked_in_place(
    name, tmp_path
):
    make, kernels = MADE[name]
    dense = make()
    kind, want, variables = type(dense), dense(X).numpy(), dense.weights
    model = sparsify(dense, 1.0)
    assert model is dense and isinstance(model, kind)
    np.testing.assert_allclose(model(X), want, rtol=1e-6)
    assert sorted(densities(model)) == sorted(kernels)
    assert {id(v) for v in variables} < {id(v) for v in model.weights}
    plain = strip(model)
    assert plain is model and type(plain) is kind
    np.testing.assert_allclose(plain(X), want, rtol=1e-6)
    assert [id(v) for v in plain.weights] == [id(v) for v in variables]

    model = sparsify(plain, 0.3)
    model.compile("sgd", "mse")
    before = masks(model)
    y = np.zeros((8, model(X).shape[-1]), np.float32)
    model.fit(X, y, epochs=3, verbose=0, callbacks=[RigL(frequency=1)])
    assert any((m != before[n]).any() for n, m in masks(model).items())
    for masked in masked_layers(model):
        assert not masked.kernel.numpy()[masked.mask.numpy() == 0].any()
    if name != "owner":  # `owner` has no config
        model.save(tmp_path / "m.keras")
        loaded = keras.models.load_model(tmp_path / "m.keras")
        np.testing.assert_allclose(loaded(X), model(X), rtol=1e-5)
        assert isinstance(loaded, kind)
        assert densities(loaded) == densities(model)
        fresh = type(model).from_config(model.get_config())
        assert densities(fresh) == densities(model)
        assert count(model).density == pytest.approx(0.3, abs=0.01)


def test_layers_are_masked_wherever_a_model_keeps_them():
    task = Task(Backbone())
    before = task.through(X).numpy()
    inner = keras.Model(task.input, task.backbone.between[-1])
    sparsify(task, 1.0)
    np.testing.assert_allclose(task.through(X), before, rtol=1e-6)
    assert isinstance(task.backbone.embed, Masked)
    assert all(isinstance(b, Masked) for b in task.backbone.blocks)
    # A model made later from a tensor of the masked one.
    later = keras.Model(task.backbone.input, task.backbone.between[-1])
    np.testing.assert_allclose(later(X), before, rtol=1e-6)
    assert [m.name for m in masked_layers(later)] == ["embed", "b0", "b1"]
    np.testing.assert_allclose(inner(X), before, rtol=1e-6)


def test_a_plain_model_is_masked_in_place_only_where_it_must_be():
    inputs = keras.Input((6,))
    plain = keras.Model(
        inputs, layers.Dense(3, name="head")(Backbone()(inputs))
    )
    want = plain(X).numpy()
    with pytest.warns(UserWarning, match="in place, because it cannot be"):
        model = sparsify(plain, 1.0)
    assert model is plain and len(masked_layers(model)) == 5
    np.testing.assert_allclose(model(X), want, rtol=1e-6)


class Unreadable(layers.Layer):
    """Has no usable config, and a property that cannot be read."""

    def __init__(self, units):
        super().__init__()
        self.units = units

    def get_config(self):
        raise RuntimeError("no config")

    @property
    def kernel(self):
        raise RuntimeError("no kernel yet")

    def call(self, x):
        return x * self.units


def test_one_layer_that_cannot_be_read_does_not_end_all():
    inputs = keras.Input((6,))
    x = layers.Dense(6, name="hidden")(Unreadable(2)(inputs))
    dense = keras.Model(inputs, layers.Dense(3, name="head")(x))
    want = dense(X).numpy()
    with pytest.warns(UserWarning, match="Unreadable, cannot be copied"):
        model = sparsify(dense, 1.0)
    assert list(densities(model)) == ["hidden", "head"]
    np.testing.assert_allclose(model(X), want, rtol=1e-6)


def test_dense_weights_into_a_model_masked_in_place(tmp_path):
    dense = Backbone()
    dense.save_weights(tmp_path / "dense.weights.h5")
    model = sparsify(dense, 0.5)
    want = model(X).numpy()
    before = masks(model)
    for masked in masked_layers(model):
        masked.kernel.assign(masked.kernel * 2)
    with pytest.warns(UserWarning, match="holds dense weights: the masks"):
        load_weights(model, tmp_path / "dense.weights.h5")
    assert model is dense and isinstance(model.embed, Masked)
    np.testing.assert_allclose(model(X), want, rtol=1e-6)
    for name, mask in masks(model).items():
        np.testing.assert_array_equal(mask, before[name])


# Masked models within others.


@keras.saving.register_keras_serializable("test_copies")
class Around(layers.Layer):
    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return self.inner(x) * 2.0

    def get_config(self):
        inner = keras.saving.serialize_keras_object(self.inner)
        return {**super().get_config(), "inner": inner}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(config.pop("inner"))
        return cls(inner, **config)


@keras.saving.register_keras_serializable("tests")
class Classifier(Around, keras.Model):
    pass


def within_functional(inner):
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Dense(3, name="o")(inner(inputs)))


PARENTS = {
    "Functional": within_functional,
    "Sequential": lambda inner: keras.Sequential(
        [keras.Input((6,)), inner, layers.Dense(3, name="o")]
    ),
    "subclassed": lambda inner: Classifier(inner),
    "a layer of a Functional": lambda inner: within_functional(
        Around(inner, name="around")
    ),
    "two deep": lambda inner: within_functional(
        keras.Sequential([keras.Input((6,)), Around(inner)])
    ),
}


@pytest.mark.parametrize("name", PARENTS)
def test_a_masked_model_within_another_is_found(name, tmp_path):
    inner = sparsify(encoder(), 0.3)
    model = PARENTS[name](inner)
    want = model(X).numpy()
    assert [m.name for m in masked_layers(model)] == ["a", "b"]
    assert masked_layers(model).masks.keys() == {"a", "b"}
    assert count(model).density == pytest.approx(0.3, abs=0.01)
    with pytest.raises(ValueError, match="masked already"):
        sparsify(model, 0.5)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded(X), want, rtol=1e-5)
    assert masks(loaded).keys() == masks(model).keys()
    plain = strip(model)
    np.testing.assert_allclose(plain(X), want, rtol=1e-5)
    assert not masked_layers(plain)
    assert len(plain.trainable_variables) == len(model.trainable_variables)
    if plain is not model:
        assert len(masked_layers(model)) == 2


def test_rigl_moves_masks_within_another_model():
    model = PARENTS["two deep"](sparsify(encoder(), 0.3))
    before = masks(model)
    model.compile("sgd", "mse")
    model.fit(
        X,
        np.zeros((8, 3), np.float32),
        epochs=3,
        verbose=0,
        callbacks=[RigL(frequency=1)],
    )
    assert (masks(model)["a"] != before["a"]).any()


# Layers with unmasked weights, and what would change these.


def test_matrices_that_nobody_masks_are_listed():
    ids = keras.Input((4,), dtype="int32")
    table = layers.ReversibleEmbedding(9, 6, tie_weights=False, name="table")
    x = layers.Dense(6, name="hidden")(table(ids))
    dense = keras.Model(ids, table(x, reverse=True))
    model = sparsify(dense, 0.5)
    ((layer, why),) = masked_layers(model).skipped
    assert layer.name == "table" and "reverse_embeddings (6x9)" in why
    assert "reverse_embeddings (6x9)" in " ".join(
        str(masked_layers(model)).split()
    )
    with pytest.raises(ValueError, match=r"table.*reverse_embeddings \(6x9\)"):
        sparsify(dense, 0.5, strict=True)
    both = {layers.ReversibleEmbedding: ["embeddings", "reverse_embeddings"]}
    model = sparsify(dense, 0.5, strict=True, kernels=both)
    assert len(masked_layers(model)) == 3 and not masked_layers(model).skipped


class Two(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 5), name="kernel")
        self.second = self.add_weight(shape=(5, 5), name="second")

    def call(self, x):
        return x @ self.kernel @ self.second


class Positions(keras.Model):
    def __init__(self):
        super().__init__()
        self.two = Two(name="two")
        self.place = self.add_weight(shape=(8, 6), name="place")

    def call(self, x):
        return self.two(x + self.place)


def test_a_masked_layer_with_more_matrices_is_listed():
    model = Positions()
    model(X)
    with pytest.raises(ValueError, match=r"(?s)second \(5x5\).*place \(8x6\)"):
        sparsify(model, 0.5, strict=True)
    table = masked_layers(sparsify(model, 0.5))
    assert [(layer.name, why.split(": ")[1]) for layer, why in table.skipped][
        0
    ] == ("two", "second (5x5)")
    assert "its own weights, never masked: place (8x6)" in str(table)


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have")
def test_quantization_and_lora_are_refused():
    model = sparsify(networks()[0]()[0], 0.5)
    want = model(X).numpy()
    for change in (
        lambda: model.quantize("int8"),
        lambda: model.quantize("int4"),
        lambda: model.get_layer("hidden").quantize("int8"),
        lambda: model.get_layer("hidden").enable_lora(2),
        lambda: keras.models.clone_model(model).quantize("int8"),
    ):
        with pytest.raises(ValueError, match="which is masked.*strip"):
            change()
    np.testing.assert_array_equal(model(X), want)
    plain = strip(model)
    plain.quantize("int8")
    np.testing.assert_allclose(plain(X), want, atol=0.1)
    in_place = strip(sparsify(encoder(), 0.5))
    in_place.a.enable_lora(2)
    with pytest.raises(ValueError, match="a: LoRA computes its kernel"):
        sparsify(in_place, 0.5)
    in_place.b.quantize("int8")
    with pytest.raises(ValueError, match=r"b: the kernel is quantized \(int8"):
        sparsify(in_place, 0.5, layers=[in_place.b])
    assert not masked_layers(in_place)


# Models of keras_hub, if it is installed.


def test_keras_hub(tmp_path):
    hub = pytest.importorskip("keras_hub").models
    tokens = {
        "token_ids": np.arange(24).reshape(2, 12) % 40,
        "padding_mask": np.ones((2, 12), "int32"),
    }
    gpt = hub.GPT2Backbone(40, 1, 2, 16, 32, max_sequence_length=12)
    task = hub.GPT2CausalLM(backbone=gpt, preprocessor=None)
    want = task(tokens).numpy()
    assert sparsify(task, 1.0) is task
    np.testing.assert_allclose(task(tokens), want, rtol=1e-5, atol=1e-6)
    assert len(masked_layers(task)) == 6
    assert strip(task) is task and type(task) is hub.GPT2CausalLM
    model = sparsify(task, 0.3)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert densities(loaded) == densities(model)
    np.testing.assert_allclose(
        loaded(tokens), model(tokens), rtol=1e-5, atol=1e-6
    )
