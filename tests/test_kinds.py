"""Models of every kind: masked, saved, loaded, counted and stripped."""

import keras
import kinds
import numpy as np
import pytest
from keras import layers

from rigl_keras import Masked, count, masked_layers, sparsify, strip

every_kind = pytest.mark.parametrize("kind", kinds.KINDS)


def make(kind):
    keras.utils.set_random_seed(0)
    return kinds.KINDS[kind]()


def masked(kind, density=0.4, **options):
    return sparsify(
        make(kind), density, **kinds.OPTIONS.get(kind, {}), **options
    )


def outputs(model, x):
    return [np.asarray(y) for y in keras.tree.flatten(model(x, training=False))]


def assert_same(one, two):
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


KERNELS = {
    "Sequential": ["hidden", "head"],
    "Functional": ["conv1", "depthwise", "conv2", "head"],
    "nested": ["outer", "inner", "head"],
    "subclassed": [
        "first",
        "b0/dense/0/kernel",
        "b0/dense/1/kernel",
        "b0/heads/one/kernel",
        "b1",
        "p0",
        "deep",
        "last",
    ],
    "shared layer": ["twice", "head"],
    "several inputs and outputs": ["d1", "d2", "a", "b"],
    "MultiHeadAttention, EinsumDense": [
        "attention/query_dense/kernel",
        "attention/key_dense/kernel",
        "attention/value_dense/kernel",
        "attention/output_dense/kernel",
        "einsum",
        "head",
    ],
    "SeparableConv2D": [
        "separable/depthwise_kernel",
        "separable/pointwise_kernel",
        "head",
    ],
    "Conv2DTranspose": ["transposed", "head"],
    "LSTM, GRU, Bidirectional": [
        "lstm/cell/kernel",
        "lstm/cell/recurrent_kernel",
        "both/forward_layer/cell/kernel",
        "both/forward_layer/cell/recurrent_kernel",
        "both/backward_layer/cell/kernel",
        "both/backward_layer/cell/recurrent_kernel",
        "head",
    ],
    "Embedding": [
        "embedding/embeddings",
        "lstm/cell/kernel",
        "lstm/cell/recurrent_kernel",
        "head",
    ],
    "custom layers": [
        "block/dense/0/kernel",
        "block/dense/1/kernel",
        "block/heads/one/kernel",
        "linear/w",
        "head",
    ],
    "own train_step": ["hidden", "head"],
}


@pytest.mark.parametrize("kind", KERNELS)
def test_which_kernels(kind):
    model = masked(kind)
    assert list(masked_layers(model).masks) == KERNELS[kind]


@every_kind
def test_masks_and_weights(kind):
    """An exact total, zeros outside the masks, all else as it was."""
    dense = make(kind)
    x, _ = kinds.data(dense)
    before = outputs(dense, x)
    variables = [v.numpy() for v in dense.weights]
    whole = sparsify(dense, 1.0, **kinds.OPTIONS.get(kind, {}))
    assert_same(outputs(whole, x), before)
    assert (whole is dense) == (kind == "subclassed")
    if whole is not dense:
        for old, variable in zip(variables, dense.weights, strict=True):
            np.testing.assert_array_equal(old, variable.numpy())

    model = masked(kind)
    found = masked_layers(model)
    size = sum(m.mask.numpy().size for m in found)
    assert sum(m.mask.numpy().sum() for m in found) == round(0.4 * size)
    for m in found:
        mask, kernel = m.mask.numpy(), m.kernel.numpy()
        assert set(np.unique(mask)) <= {0, 1}
        assert not kernel[mask == 0].any() and kernel[mask == 1].any()
        assert m.density == pytest.approx(mask.mean())
    with pytest.raises(ValueError, match="masked already"):
        sparsify(model, 0.4)


@every_kind
def test_strip(kind):
    model = masked(kind)
    x, _ = kinds.data(model)
    want = outputs(model, x)
    kernels = {
        n: m.kernel.numpy() for n, m in masked_layers(model).named.items()
    }
    plain = strip(model)
    assert not masked_layers(plain)
    assert not any(isinstance(part, Masked) for part in plain._flatten_layers())
    assert_same(outputs(plain, x), want)
    again = sparsify(plain, 1.0, **kinds.OPTIONS.get(kind, {}))
    for name, m in masked_layers(again).named.items():
        np.testing.assert_array_equal(m.kernel.numpy(), kernels[name])


@every_kind
def test_save_and_load(kind, tmp_path):
    model = masked(kind)
    x, y = kinds.data(model)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded).__name__ == type(model).__name__
    assert_same(outputs(loaded, x), outputs(model, x))
    for (name, ours), theirs in zip(
        masked_layers(model).named.items(), masked_layers(loaded), strict=True
    ):
        np.testing.assert_array_equal(
            ours.mask.numpy(), theirs.mask.numpy(), err_msg=name
        )
        assert ours.draw_key == theirs.draw_key
    loaded.fit(x, y, verbose=0)  # and trains on
    model.fit(x, y, verbose=0)
    if kind not in ("MultiHeadAttention, EinsumDense",):
        assert_zeros(loaded)

    other = masked(kind, seed=3)
    other.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    other.fit(x, y, verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    other.load_weights(tmp_path / "m.weights.h5")
    assert_same(outputs(other, x), outputs(model, x))
    plain = strip(loaded)
    plain.save(tmp_path / "plain.keras")
    assert_same(
        outputs(keras.models.load_model(tmp_path / "plain.keras"), x),
        outputs(plain, x),
    )


def assert_zeros(model):
    for m in masked_layers(model):
        assert not m.kernel.numpy()[m.mask.numpy() == 0].any()


@every_kind
def test_count(kind):
    dense = count(make(kind))
    cost = count(masked(kind))
    assert not [name for name, _ in cost.uncounted if name != "embedding"] or (
        kind in ("custom layers", "subclassed, nested")
    )
    assert cost.dense_inference_flops == dense.inference_flops > 0
    assert cost.inference_flops < dense.inference_flops
    assert cost.parameters == dense.parameters
    assert cost.density == pytest.approx(0.4, abs=0.02)
