"""Models of every kind: masked, saved, loaded, counted and stripped."""

import functools
import math

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support import kinds
from support.kinds import assert_same, make, masked, outputs
from support.patterns import group_counts

from rigl_keras.flops.counting import count
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify, with_masks
from rigl_keras.masking.stripping import strip
from rigl_keras.masking.weight_files import load_weights
from rigl_keras.patterns import as_pattern

every_kind = pytest.mark.parametrize("kind", kinds.KINDS)


@functools.cache
def how_many_masked(kind):
    return len(masked_layers(masked(kind)))


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
    """The total is exact, and only weights outside the masks change."""
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


@pytest.mark.parametrize("pattern", ["1:2", "fan_in", "3x2"])
@every_kind
def test_masks_of_every_pattern(kind, pattern):
    """Masks have the pattern, and the config draws the same masks."""
    nm = pattern == "1:2"
    try:
        model = masked(kind, None if nm else 0.4, granularity=pattern)
    except ValueError as error:
        # The model has only 5 inputs, 3 channels or depthwise kernels.
        assert nm and "No kernel is left to mask" in str(error)
        return
    found = masked_layers(model)
    assert {m.granularity for m in found} == {pattern}
    for m in found:
        kept = group_counts(as_pattern(pattern), m.found.axes, m.mask.numpy())
        assert len(set(kept)) == 1 and (set(kept) == {1} or not nm)
        assert not m.kernel.numpy()[m.mask.numpy() == 0].any()
    # A kernel that does not fit the pattern is reported.
    assert len(found) == how_many_masked(kind) or (
        f"{pattern!r} does not fit: " in " ".join(str(found).split())
    )
    again = model.__class__.from_config(model.get_config())
    for one, two in zip(found, masked_layers(again), strict=True):
        assert two.granularity == pattern
        assert one.layout == two.layout
        if pattern != "3x2":  # blocks at edges differ in size
            assert one.mask.numpy().sum() == two.mask.numpy().sum()


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


IN_GRAPHS = ("Sequential", "shared layer", "subclassed")


@pytest.mark.slow_but("Sequential", "shared layer")
@every_kind
def test_save_and_load(kind, tmp_path):
    model = masked(kind)
    x, y = kinds.data(model)
    eager = kind not in IN_GRAPHS  # test_matrix.py has graphs of all
    sgd = keras.optimizers.SGD(0.01, momentum=0.9)
    model.compile(sgd, "mse", run_eagerly=eager)
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.run_eagerly = eager
    assert type(loaded).__name__ == type(model).__name__
    assert_same(outputs(loaded, x), outputs(model, x))
    for (name, ours), theirs in zip(
        masked_layers(model).named.items(), masked_layers(loaded), strict=True
    ):
        np.testing.assert_array_equal(
            ours.mask.numpy(), theirs.mask.numpy(), err_msg=name
        )
        assert ours.draw_key == theirs.draw_key
    loaded.fit(x, y, verbose=0)  # it trains
    model.fit(x, y, verbose=0)
    assert_zeros(loaded)

    other = masked(kind, seed=3)  # eager, to save a trace
    sgd = keras.optimizers.SGD(0.01, momentum=0.9)
    other.compile(sgd, "mse", run_eagerly=True)
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
def test_checkpoints_of_tensorflow(kind, tmp_path):
    def compiled(seed):
        model = masked(kind, seed=seed)
        model.compile(keras.optimizers.Adam(), "mse")
        model.optimizer.build(model.trainable_variables)
        return model

    one, two = compiled(0), compiled(1)
    for model, value in ((one, 1.0), (two, 2.0)):
        for variable in model.optimizer.variables[2:]:
            variable.assign(np.full(variable.shape, value))
    paths = [
        tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        for model in (one, two)
    ]
    saved = paths[0].save(str(tmp_path / "at"))
    paths[1].restore(saved).assert_consumed()
    for ours, theirs in zip(
        one.variables + one.optimizer.variables,
        two.variables + two.optimizer.variables,
        strict=True,
    ):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), ours.path)
    assert_zeros(two)


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


APPLICATIONS = {
    "MobileNetV2": (keras.applications.MobileNetV2, 53),
    "ResNet50": (keras.applications.ResNet50, 54),
    "EfficientNetB0": (keras.applications.EfficientNetB0, 82),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_applications(name):
    make, kernels = APPLICATIONS[name]
    dense = make(weights=None, input_shape=(32, 32, 3), classes=10)
    model = sparsify(dense, 0.2)
    found = masked_layers(model)
    assert len(found) == kernels
    size = sum(math.prod(m.kernel.shape) for m in found)
    ones = sum(np.count_nonzero(m.mask.numpy()) for m in found)
    assert ones == round(0.2 * size)
    cost = count(model)
    assert not cost.uncounted
    assert cost.dense_inference_flops == count(dense).inference_flops
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3))
    plain = strip(model)
    assert_same(outputs(plain, x), outputs(model, x))
    assert isinstance(plain, type(dense))


def test_a_masked_layer_passes_masks_of_time_steps_on():
    model = masked("Embedding")
    x = np.array([[1, 2, 0, 0], [3, 4, 5, 6]])
    assert_same(outputs(model, x), outputs(strip(model), x))
    lstm = model.get_layer("lstm")
    states = model.get_layer("embedding")(x)
    np.testing.assert_allclose(
        lstm(states)[0], lstm(states[:1, :2])[0], rtol=1e-5
    )


def test_scaled_to_the_fan_in_by_hand():
    inputs = keras.Input((4,))
    head = layers.Dense(2, kernel_initializer="ones", name="d")
    dense = keras.Model(inputs, head(inputs))
    mask = np.array([[1, 1], [0, 1], [0, 1], [0, 1]])
    model = with_masks(dense, {"d": mask}, scale_to_fan_in=True)
    np.testing.assert_allclose(
        masked_layers(model)[0].kernel.numpy(), mask * [2.0, 1.0]
    )


@pytest.mark.parametrize(
    "layer, shape, units",
    [
        (layers.Conv2D(64, 3, name="d"), (9, 9, 32), (0, 1, 2)),
        (layers.Conv2DTranspose(64, 3, name="d"), (9, 9, 32), (0, 1, 3)),
        (layers.DepthwiseConv2D(15, name="d"), (20, 20, 64), (0, 1)),
        (layers.Dense(64, name="d"), (288,), (0,)),
        (
            layers.EinsumDense("abc,cde->abde", (None, 8, 8), name="d"),
            (3, 288),
            (0,),
        ),
    ],
    ids=lambda v: type(v).__name__,
)
def test_scaling_restores_the_size_of_each_unit(layer, shape, units):
    """The sum of squares of a unit is the same as before."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape)
    dense = keras.Model(inputs, layer(inputs))
    plain = sparsify(dense, 0.3)
    scaled = sparsify(dense, 0.3, scale_to_fan_in=True)
    (
        (one,),
        (two,),
    ) = masked_layers(plain), masked_layers(scaled)
    mask = one.mask.numpy()
    np.testing.assert_array_equal(mask, two.mask.numpy())
    want = (layer.kernel.numpy() ** 2).sum(axis=units)
    before = (one.kernel.numpy() ** 2).sum(axis=units)
    after = (two.kernel.numpy() ** 2).sum(axis=units)
    assert np.mean(before / want) == pytest.approx(0.3, abs=0.02)
    assert np.mean(after / want) == pytest.approx(1.0, abs=0.05)


@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_dense_weights_into_a_masked_model(tmp_path):
    dense, model = make("Functional"), masked("Functional", 0.3)
    for variable in dense.variables:
        variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    path = tmp_path / "dense.weights.h5"
    dense.save_weights(path)
    masks = masked_layers(model).masks
    removed = sum(int((1 - mask).sum()) for mask in masks.values())
    for load in (model.load_weights, functools.partial(load_weights, model)):
        with pytest.warns(
            UserWarning, match=f"set {removed:,} of them to zero"
        ):
            load(path)
        for m, name in zip(masked_layers(model), masks, strict=True):
            np.testing.assert_array_equal(m.mask.numpy(), masks[name])
            np.testing.assert_array_equal(
                m.kernel.numpy(),
                dense.get_layer(name).kernel.numpy() * masks[name],
            )
        np.testing.assert_array_equal(
            model.get_layer("norm").gamma, dense.get_layer("norm").gamma
        )
    dense.save(tmp_path / "dense.keras")
    with pytest.warns(UserWarning, match="dense weights"):
        load_weights(model, tmp_path / "dense.keras")
    # The error for a loaded model says what to do.
    model.save(tmp_path / "masked.keras")
    loaded = keras.models.load_model(tmp_path / "masked.keras")
    with pytest.raises(
        ValueError, match=r"rigl_keras.load_weights\(model, path"
    ):
        loaded.load_weights(path)
    load_weights(loaded, tmp_path / "masked.keras")  # no warning


@pytest.mark.parametrize("kind", ["Functional", "subclassed"])
def test_weights_of_another_network_change_nothing(kind, tmp_path):
    model = masked(kind)
    before = [v.numpy() for v in model.variables]
    other = make("several inputs and outputs")
    other.save_weights(tmp_path / "other.weights.h5")
    (tmp_path / "noise.weights.h5").write_bytes(b"\x00noise")
    wider = sparsify(
        keras.Sequential([keras.Input((5,)), layers.Dense(9, name="d")]), 0.5
    )
    wider.save_weights(tmp_path / "wider.weights.h5")
    for name in ("other", "noise", "wider", "missing"):
        with pytest.raises(ValueError, match=f"{name}.weights.h5"):
            load_weights(model, tmp_path / f"{name}.weights.h5")
        for old, variable in zip(before, model.variables, strict=True):
            np.testing.assert_array_equal(old, variable.numpy())
    with pytest.raises(ValueError, match="no masked layer"):
        load_weights(other, tmp_path / "other.weights.h5")


def test_no_file_holds_a_weight_outside_its_mask(tmp_path):
    """Weights outside the mask are not saved, however they were set."""
    model = masked("Sequential")
    for m in masked_layers(model):
        m.kernel.assign(np.ones(m.kernel.shape))
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    assert_zeros(keras.models.load_model(tmp_path / "m.keras"))
    other = masked("Sequential", seed=2)
    other.load_weights(tmp_path / "m.weights.h5")
    assert_zeros(other)


def test_masks_of_a_damaged_file_are_refused(tmp_path):
    model = masked("Sequential")
    keras.Model.save_weights(model, tmp_path / "half.weights.h5")
    with h5py.File(tmp_path / "half.weights.h5", "a") as file:
        names = []
        file.visit(lambda name: names.append(name))
        (name,) = (
            name
            for name in names
            if isinstance(file[name], h5py.Dataset)
            and file[name].dtype == bool
            and file[name].shape == (5, 8)
        )
        del file[name]
        file[name] = np.full((5, 8), 0.5)
    with pytest.raises(ValueError, match="(?s)holds 0.5, but masks are"):
        keras.Model.load_weights(
            masked("Sequential"), tmp_path / "half.weights.h5"
        )


def test_states_of_time_steps_are_carried_along():
    inputs = keras.Input(batch_shape=(2, 3, 4))
    x = layers.LSTM(5, stateful=True, name="lstm")(inputs)
    dense = keras.Model(inputs, layers.Dense(2, name="head")(x))
    model = sparsify(dense, 1.0)
    draw = np.random.default_rng(0)
    for _ in range(3):
        x = draw.standard_normal((2, 3, 4)).astype(np.float32)
        assert_same(outputs(model, x), outputs(dense, x))
    assert count(model).inference_flops == count(dense).inference_flops > 0
    before = outputs(model, x)
    model.get_layer("lstm").reset_state()  # the layer's own method
    assert not np.allclose(before[0], outputs(model, x)[0])
