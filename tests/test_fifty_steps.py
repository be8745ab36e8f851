"""Networks that train for fifty steps as they do with dense products."""

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
FREQUENCY = 10  # of updates


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    """Batch norm and dropout are ours, however small images are."""
    monkeypatch.setattr(fast_calls, "_LEAST_NUMBERS", 0)


def wide_resnet():
    return models.wide_resnet(
        10, 1, num_classes=CLASSES, input_shape=(8, 8, 3), dropout=0.2
    )


def vision_transformer():
    """Tokens, a block of attention and two layers, and their mean."""
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


def state_of(model):
    return [*model.variables, *model.optimizer.variables]


class Compared(keras.callbacks.Callback):
    """Keeps the numbers after each step, or compares with those kept.

    Then both models continue with the same numbers. Rounding chooses which of
    two almost equal connections an update drops or grows, and the gradient of
    a ReLU at zero: whatever follows would be another path. `apart` has the
    steps after which numbers differ by more than rounding.
    """

    def __init__(self, states, losses):
        super().__init__()
        self.kept, self.states, self.losses = [], states, losses
        self.apart = []

    def on_train_batch_end(self, batch, logs=None):
        step = len(self.losses)
        self.losses.append(logs["loss"])
        found = [np.asarray(v) for v in state_of(self.model)]
        self.kept.append(found)
        if not self.states:
            return
        pairs = list(zip(found, self.states[step], strict=True))
        masks = [one != other for one, other in pairs if one.dtype == bool]
        if step % FREQUENCY:
            assert not any(differs.any() for differs in masks)
            if not all(are_close(*pair) for pair in pairs):
                self.apart.append(step)
        else:  # masks were just updated
            assert all(differs.mean() < 2e-3 for differs in masks)
        for variable, (_, value) in zip(
            state_of(self.model), pairs, strict=True
        ):
            variable.assign(value)


def are_close(found, want):
    if want.dtype != np.float32:  # masks, steps, seeds
        return np.array_equal(found, want)
    return np.abs(found - want).max() <= 2e-5 * max(1e-3, np.abs(want).max())


def trained(dense, product, states=()):
    """Returns a model, its losses, what updates have grown, and `Compared`."""
    keras.utils.set_random_seed(4)
    model = sparsify(dense, 0.3, product=product)
    model.compile(
        keras.optimizers.SGD(0.02, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    draw = np.random.default_rng(0)
    x = draw.standard_normal((5 * BATCH, *model.input_shape[1:]), np.float32)
    y = draw.integers(0, CLASSES, len(x))
    losses, method = [], RigL(frequency=FREQUENCY, end_step=STEPS)
    compared = Compared(states, losses)
    model.fit(
        *(x, y),
        batch_size=BATCH,
        epochs=STEPS * BATCH // len(x),
        shuffle=False,
        callbacks=[method, compared],
        verbose=0,
    )
    return model, losses, method.trajectory, compared


@pytest.mark.slow_but("recurrent", "vision_transformer")
@pytest.mark.parametrize("make", [wide_resnet, vision_transformer, recurrent])
def test_as_with_dense_products(make):
    keras.utils.set_random_seed(3)
    model = make()  # whose layers have the names that masks are drawn by
    dense, want, of_dense, first = trained(model, "dense")
    sparse, got, of_sparse, compared = trained(model, "sparse", first.kept)
    assert len(got) == len(want) == STEPS
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # Of a hundred thousand numbers, one meets the kink of a ReLU now and then.
    assert len(compared.apart) <= (5 if make is wide_resnet else 0)
    assert [step for step, _ in of_sparse] == [0, 10, 20, 30, 40]
    assert of_sparse == of_dense  # how many connections each has grown
    for one, other in zip(
        masked_layers(dense), masked_layers(sparse), strict=True
    ):
        (chosen,) = set(other.chosen_products().values())
        assert chosen.sparse
        assert not one.chosen_products()
