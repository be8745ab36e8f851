"""The product that is asked for: saved, changed, refused, and in a table."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.small_models import examples, masks, small_model
from support.small_products import (
    ALL_BUT_DEPTHWISE,
    chosen,
    needs_library,
    small,
)

from rigl_keras.kernels import layer_products, library
from rigl_keras.kernels.choice import Choice
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import choose_kernels, masked_layers
from rigl_keras.masking.sparsify import sparsify, with_masks
from rigl_keras.masking.stripping import strip

# A warning of TensorFlow when Keras saves with NumPy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning"
)


@pytest.fixture
def loaded():
    if library.load() is None:
        pytest.skip(f"no sparse kernels: {library.unavailable()}")


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
