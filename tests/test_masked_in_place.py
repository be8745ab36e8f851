"""Models that are masked in place, or within others."""

import keras
import numpy as np
import pytest
from keras import layers
from support.copied_kinds import Backbone, Task, X, encoder, networks
from support.small_models import masks

import rigl_keras
from rigl_keras.flops.counting import count
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.stripping import strip
from rigl_keras.masking.weight_files import load_weights
from rigl_keras.methods.rigl import RigL


def densities(model):
    return {m.name: m.density for m in masked_layers(model)}


# Models masked in place: subclassed, or with custom constructors.


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


@keras.saving.register_keras_serializable("test_masked_in_place")
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


class Hidden(keras.Model):
    """A model that keeps a layer where it cannot be replaced."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(8, name="first")
        self.others = {layers.Dense(8, name="second")}

    def call(self, x):
        x = self.first(x)
        for layer in self.others:
            x = layer(x)
        return x


def test_a_refused_model_is_left_as_it_was():
    model = Hidden()
    model(np.zeros((1, 4)))
    for _ in range(2):
        with pytest.raises(ValueError, match="'second'.* Make it an attribute"):
            sparsify(model, 0.5)
    assert model.first.kernel.constraint is None
    assert not masked_layers(model)


def test_quantization_is_refused_before_any_layer_is_changed():
    def made():
        inputs = keras.Input((6,), dtype="int32")
        x = layers.Embedding(30, 8, name="table")(inputs)
        x = layers.GlobalAveragePooling1D()(x)
        return keras.Model(inputs, layers.Dense(16, name="head")(x))

    model = sparsify(made(), 0.3)
    with pytest.raises(ValueError, match="'head', which is masked"):
        model.quantize("int8")
    assert model.get_layer("table").quantization_mode is None
    model.quantize("int8", filters="table")
    assert model.get_layer("table").quantization_mode == "int8"


class Matrix(layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 8), name="w")
        self.scale = self.add_weight(shape=(8,), name="scale")

    def call(self, x):
        return x @ self.w * self.scale


class Absent(layers.Layer):
    pass


@pytest.mark.parametrize(
    "kernels, said",
    [
        ({Matrix: "wieght"}, "'wieght' of Matrix.*It has: w \\(6x8\\)"),
        ({Matrix: ["w", "wieght"]}, "'wieght' of Matrix"),
        ({Matrix: "scale"}, "'scale' of Matrix.*two axes"),
        ({Absent: "w"}, "Absent, which fits no layer"),
    ],
)
def test_kernels_that_fit_nothing(kernels, said):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(3)(Matrix(name="m")(inputs)))
    with pytest.raises(ValueError, match=said):
        sparsify(model, 0.5, kernels=kernels)
    with pytest.raises(ValueError, match=said):
        rigl_keras.with_masks(
            model, {"dense": np.ones((8, 3))}, kernels=kernels
        )
    assert len(masked_layers(sparsify(model, 0.5, kernels={Matrix: "w"}))) == 2
