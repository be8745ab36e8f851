"""One-shot methods, by hand on small models."""

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
    """Saliency is the gradient of a mean square, times the weights."""
    inputs = keras.Input((2,))
    outputs = layers.Dense(2, name="d", use_bias=False)(inputs)
    model = keras.Model(inputs, outputs)
    kernel = np.array([[1.0, -3.0], [2.0, 0.5]])
    model.get_layer("d").kernel.assign(kernel)
    x, y = np.array([[1.0, 2.0]]), np.array([[0.0, 0.0]])
    # Outputs are 5 and -2; for the mean of two squares, dL/dw = x (output).
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
    """Weights, batch statistics and dropout's state do not change."""
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
    """Gradients of a residual block with a last scale of 0 are 0 at first."""
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


# GraSP, SynFlow and magnitude.


def linear(kernel):
    """Returns a dense model with a kernel and no bias."""
    kernel = np.asarray(kernel, np.float32)
    inputs = keras.Input(kernel.shape[:1])
    outputs = layers.Dense(kernel.shape[1], use_bias=False, name="d")(inputs)
    model = keras.Model(inputs, outputs)
    model.get_layer("d").kernel.assign(kernel)
    return model


def half_square(targets, outputs):
    return outputs**2 / 2


def test_grasp_by_hand():
    """L = w'Hw / 2 with H = diag(3, 1): w (H g) = (9, 4) at w = (1, 2)."""
    model = linear([[1], [2]])
    batch = np.array([[np.sqrt(3), 0], [0, 1]]), np.zeros((2, 1))
    kept = one_shot.grasp(model, 0.5, batch, half_square)
    assert masks(kept)["d"].ravel().tolist() == [1, 0]
    # SNIP's |w g| = (3, 4) keeps the other weight.
    other = one_shot.snip(model, 0.5, batch, half_square)
    assert masks(other)["d"].ravel().tolist() == [0, 1]


def test_grasp_ranks_with_the_sign():
    """H = (1, 2; 2, 1): g = (5, 4), H g = (13, 14) at w = (1, 2). With the
    second weight -1: g = (-1, 1), H g = (1, -1), and w H g = (1, 1)."""
    draw = np.array([[1.0, 0.0], [1.0, 1.0]])
    for weights in ([1, 2], [1, -3], [-2, 1]):
        model = linear(np.reshape(weights, (2, 1)))
        kept = one_shot.grasp(model, 0.5, (draw, np.zeros((2, 1))), half_square)
        hessian = draw.T @ draw
        score = np.array(weights) * (hessian @ (hessian @ weights))
        want = (score == score.max()).astype(int).tolist()
        assert masks(kept)["d"].ravel().tolist() == want


def test_grasp_needs_a_curve():
    batch = np.ones((1, 2)), np.zeros((1, 1))
    with pytest.raises(ValueError, match="no second derivative"):
        one_shot.grasp(linear([[1], [2]]), 0.5, batch, lambda y, x: x)
    with pytest.raises(ValueError, match="temperature must be positive"):
        one_shot.grasp(linear([[1]]), 0.5, batch, half_square, temperature=0)


def test_synflow_by_hand():
    """x -> (2, 1) -> (3, 4) -> y: R = 10, and scores 6, 4 in each layer."""
    inputs = keras.Input((1,))
    x = layers.Dense(2, use_bias=False, name="a")(inputs)
    outputs = layers.Dense(1, use_bias=False, name="b")(x)
    model = keras.Model(inputs, outputs)
    model.get_layer("a").kernel.assign([[-2, 1]])
    model.get_layer("b").kernel.assign([[3], [-4]])
    for rounds in (1, 100):
        kept = one_shot.synflow(model, 0.5, rounds=rounds)
        assert masks(kept)["a"].ravel().tolist() == [1, 0]
        assert masks(kept)["b"].ravel().tolist() == [1, 0]
        # The weights keep their signs.
        assert kept.get_layer("a").kernel.numpy().tolist() == [[-2, 0]]


def deep(depth=30):
    inputs = x = keras.Input((16,))
    for i in range(depth):
        x = layers.Dense(
            64,
            name=f"d{i}",
            kernel_initializer=keras.initializers.RandomNormal(0, 1, seed=i),
        )(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def test_synflow_is_finite_in_deep_networks():
    """64 weights of mean magnitude 0.8 give a factor of 51 in each layer. In
    thirty layers this overflows float32."""
    model = deep()
    before = [v.numpy() for v in model.variables]
    policies = [layer.dtype_policy for layer in model.layers]
    kept = masks(one_shot.synflow(model, 0.02, rounds=3))
    assert all(mask.any() for mask in kept.values())
    size = sum(mask.size for mask in kept.values())
    assert sum(mask.sum() for mask in kept.values()) == round(0.02 * size)
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, variable.numpy())
    assert [layer.dtype_policy for layer in model.layers] == policies


def test_many_rounds_keep_every_layer():
    """In one round, some layers would lose all their weights."""
    model = small_model()
    kept = masks(one_shot.synflow(model, 0.02, rounds=30))
    assert all(mask.any() for mask in kept.values())


def test_magnitude_by_hand():
    model = linear([[3, -5], [1, 4]])
    kept = one_shot.magnitude(model, 0.5)
    assert masks(kept)["d"].tolist() == [[0, 1], [0, 1]]
    assert kept.get_layer("d").kernel.numpy().tolist() == [[0, -5], [0, 4]]
    small = small_model()
    by_layer = one_shot.magnitude(
        small, 0.3, scope="layer", distribution="uniform"
    )
    found = masks(by_layer)
    assert found["conv2"].sum() == pytest.approx(0.3 * 1152, abs=1)
    kernel = np.abs(small.get_layer("conv2").kernel.numpy())
    on = found["conv2"] == 1
    assert kernel[on].min() >= kernel[~on].max()
    small.get_layer("conv2").kernel.assign(kernel * np.nan)
    with pytest.raises(ValueError, match="magnitude cannot rank.*NaN"):
        one_shot.magnitude(small, 0.3)


@pytest.mark.parametrize("make", ["grasp", "synflow", "magnitude"])
def test_others_leave_the_model_as_it_was(make):
    model = small_model()
    before = [v.numpy() for v in model.variables]
    batch = (examples(), LOSS) if make == "grasp" else ()
    options = {"rounds": 3} if make == "synflow" else {}
    kept = getattr(one_shot, make)(model, 0.2, *batch, **options)
    found = masks(kept)
    size = sum(mask.size for mask in found.values())
    assert sum(mask.sum() for mask in found.values()) == round(0.2 * size)
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, variable.numpy())
    for layer in masked_layers(kept):
        assert (layer.kernel.numpy() != 0).sum() == found[layer.name].sum()
