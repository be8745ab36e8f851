"""Networks with sparse products train like with dense ones for 50 steps."""

import keras
import numpy as np
import pytest
from keras import layers

from rigl_keras import kernels, models
from rigl_keras.kernels import fast_calls
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.methods.rigl import RigL

pytestmark = pytest.mark.skipif(
    kernels.load() is None, reason=f"no op library: {kernels.unavailable()}"
)

STEPS, BATCH, CLASSES = 50, 20, 4


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    """Uses our batch norm and dropout, however small images are."""
    monkeypatch.setattr(fast_calls, "_LEAST_NUMBERS", 0)


def wide_resnet():
    return models.wide_resnet(
        10, 1, num_classes=CLASSES, input_shape=(8, 8, 3), dropout=0.2
    )


def vision_transformer():
    """Returns a small vision transformer with one block."""
    inputs = keras.Input((9, 12))
    x = layers.Dense(16)(inputs)
    y = layers.LayerNormalization()(x)
    y = layers.MultiHeadAttention(2, 8)(y, y)
    x = layers.Add()([x, y])
    y = layers.LayerNormalization()(x)
    y = layers.Dense(32, activation="gelu")(y)
    x = layers.Add()([x, layers.Dense(16)(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def recurrent():
    inputs = keras.Input((11, 12))
    x = layers.LSTM(16, return_sequences=True)(inputs)
    x = layers.LSTM(16)(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def trained(dense, product):
    """Returns a model, the loss of each step, and the growth of updates."""
    keras.utils.set_random_seed(4)
    model = sparsify(dense, 0.3, product=product)
    model.compile(
        keras.optimizers.SGD(0.02, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    draw = np.random.default_rng(0)
    x = draw.standard_normal((5 * BATCH, *model.input_shape[1:]), np.float32)
    y = draw.integers(0, CLASSES, len(x))
    sums, method = [], RigL(frequency=10, end_step=STEPS)
    log = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda _, logs: sums.append(logs["loss"])
    )
    model.fit(
        *(x, y),
        batch_size=BATCH,
        epochs=STEPS * BATCH // len(x),
        shuffle=False,
        callbacks=[method, log],
        verbose=0,
    )
    return model, sums, method.trajectory


@pytest.mark.slow_but("recurrent", "vision_transformer")
@pytest.mark.parametrize("make", [wide_resnet, vision_transformer, recurrent])
def test_as_with_dense_products(make):
    keras.utils.set_random_seed(3)
    model = make()  # fixed names of layers, as masks depend on names
    dense, want, of_dense = trained(model, "dense")
    sparse, got, of_sparse = trained(model, "sparse")
    assert len(got) == STEPS
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert [step for step, _ in of_sparse] == [0, 10, 20, 30, 40]
    assert of_sparse == of_dense  # numbers of grown connections
    theirs, ours = masked_layers(dense), masked_layers(sparse)
    for one, other in zip(theirs, ours, strict=True):
        (chosen,) = set(other.chosen_products().values())
        assert chosen.sparse
        assert not one.chosen_products()
        np.testing.assert_array_equal(one.mask.numpy(), other.mask.numpy())
    for one, other in zip(dense.weights, sparse.weights, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        largest = max(1e-3, np.abs(one).max())
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-3 * largest)
