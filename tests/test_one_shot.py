"""SNIP: by hand on one layer, and what it leaves alone."""

import keras
import numpy as np
import pytest
from keras import layers
from support.small_models import compiled, examples, masks, small_model

from rigl_keras import models
from rigl_keras.flops.counting import count
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.methods import one_shot

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def test_one_layer_by_hand():
    """The gradient of a mean square, times the weights."""
    inputs = keras.Input((2,))
    outputs = layers.Dense(2, name="d", use_bias=False)(inputs)
    model = keras.Model(inputs, outputs)
    kernel = np.array([[1.0, -3.0], [2.0, 0.5]])
    model.get_layer("d").kernel.assign(kernel)
    x, y = np.array([[1.0, 2.0]]), np.array([[0.0, 0.0]])
    # Outputs 5 and -2; dL/dw = x (output) for the mean of two squares.
    saliency = np.abs(kernel * np.outer(x[0], [5.0, -2.0]))
    assert saliency.tolist() == [[5, 6], [20, 2]]
    snipped = one_shot.snip(model, 0.5, (x, y), keras.losses.MeanSquaredError())
    assert masks(snipped)["d"].tolist() == [[0, 1], [1, 0]]
    kept = snipped.get_layer("d").kernel.numpy()
    assert kept.tolist() == [[0, -3], [2, 0]]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_counts(scope):
    model = small_model()
    snipped = one_shot.snip(model, 0.2, examples(), LOSS, scope=scope)
    found = masks(snipped)
    size = sum(mask.size for mask in found.values())
    assert sum(mask.sum() for mask in found.values()) == round(0.2 * size)
    again = masks(one_shot.snip(model, 0.2, examples(), LOSS, scope=scope))
    for name, mask in found.items():
        np.testing.assert_array_equal(mask, again[name])


def test_layer_scope_has_the_densities_of_the_distribution():
    from rigl_keras.masking.sparsify import sparsify

    model = small_model()
    for distribution in ("uniform", "erk"):
        snipped = one_shot.snip(
            model, 0.2, examples(), LOSS, scope="layer",
            distribution=distribution,
        )  # fmt: skip
        drawn = masks(sparsify(model, 0.2, distribution=distribution))
        assert {n: m.sum() for n, m in masks(snipped).items()} == {
            n: m.sum() for n, m in drawn.items()
        }
    assert "conv1" not in drawn or drawn["conv1"].sum()


def test_the_model_stays_as_it_was():
    """Batch statistics, weights and dropout's state included."""
    model = small_model()
    before = [v.numpy() for v in model.variables]
    one_shot.snip(model, 0.2, examples(), LOSS)
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, variable.numpy())


def test_it_trains_and_keeps_its_masks():
    model = one_shot.snip(small_model(), 0.2, examples(), LOSS)
    before = masks(model)
    compiled(model).fit(*examples(), verbose=0)
    for layer in masked_layers(model):
        np.testing.assert_array_equal(layer.mask, before[layer.name])
    assert count(model).density == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(density=0.0), "density"),
        (dict(density=0.1, scope="all"), "scope must be"),
        (dict(density=0.1, densities={"head": 1.0}), "Pass\\s+scope='layer'"),
    ],
)
def test_bad_arguments(arguments, message):
    density = arguments.pop("density")
    with pytest.raises(ValueError, match=message):
        one_shot.snip(small_model(), density, examples(), LOSS, **arguments)


def test_bad_batches():
    x, y = examples()
    with pytest.raises(ValueError, match="batch must be"):
        one_shot.snip(small_model(), 0.1, x[:3], LOSS)
    with pytest.raises(ValueError, match="NaN or infinite"):
        one_shot.snip(small_model(), 0.1, (x * np.nan, y), LOSS)
    with pytest.raises(ValueError, match="no gradient.*conv1, depthwise"):
        one_shot.snip(
            small_model(), 0.1, (x, y), lambda targets, outputs: targets * 0.0
        )
    masked = one_shot.snip(small_model(), 0.5, (x, y), LOSS)
    with pytest.raises(ValueError, match="masked already"):
        one_shot.snip(masked, 0.1, (x, y), LOSS)


def test_blocks_that_start_at_nothing_are_refused():
    """The first gradient of a residual block whose last scale is 0 is 0."""
    model = models.resnet18(10, (8, 8, 3))
    with pytest.raises(ValueError, match="conv2_0_conv1.*zero_init_residual"):
        one_shot.snip(model, 0.1, examples(8), LOSS)
    model = models.resnet18(10, (8, 8, 3), zero_init_residual=False)
    found = masks(one_shot.snip(model, 0.1, examples(8), LOSS))
    assert all(mask.any() for mask in found.values())


def test_too_few_connections():
    with pytest.raises(ValueError, match="rounds to no connection"):
        one_shot.snip(small_model(), 1e-9, examples(), LOSS)
    with pytest.warns(UserWarning, match="SNIP keeps no connection of"):
        one_shot.snip(small_model(), 0.001, examples(), LOSS)
    inputs = keras.Input((2,))
    one = keras.Model(inputs, layers.Dense(2)(inputs))
    batch, options = (np.ones((1, 2)), np.zeros((1, 2))), dict(scope="layer")
    with pytest.raises(ValueError, match="nothing to mask"):
        one_shot.snip(
            one, 0.5, batch, keras.losses.MeanSquaredError(),
            distribution="uniform", **options,
        )  # fmt: skip
