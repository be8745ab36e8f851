"""Models of every kind: masked, saved, loaded, counted and stripped."""

import collections
import functools
import math
import pathlib

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support import kinds
from support.patterns import group_counts

from rigl_keras.flops.counting import count
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify, with_masks
from rigl_keras.masking.stripping import strip
from rigl_keras.masking.weight_files import load_weights
from rigl_keras.patterns import as_pattern

every_kind = pytest.mark.parametrize("kind", kinds.KINDS)


def make(kind):
    keras.utils.set_random_seed(0)
    return kinds.KINDS[kind]()


def masked(kind, density=0.4, **options):
    return sparsify(
        make(kind), density, **kinds.OPTIONS.get(kind, {}), **options
    )


@functools.cache
def how_many_masked(kind):
    return len(masked_layers(masked(kind)))


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


def test_a_layer_within_is_chosen_or_left_out():
    dense = make("custom layers")
    model = sparsify(dense, 0.5, layers=layers.Dense)
    assert list(masked_layers(model).masks) == [
        "block/dense/0/kernel",
        "block/dense/1/kernel",
        "block/heads/one/kernel",
        "head",
    ]
    one = dense.get_layer("block").dense[1]
    model = sparsify(dense, 0.5, layers=one)
    assert list(masked_layers(model).masks) == ["block/dense/1/kernel"]
    model = sparsify(
        dense, 0.5, kernels={kinds.Linear: ["w"]}, densities={"block": 0.6}
    )
    densities = {n: m.density for n, m in masked_layers(model).named.items()}
    assert densities["block/heads/one/kernel"] == pytest.approx(0.6, abs=0.02)
    assert densities["linear/w"] < 0.5
    report = " ".join(str(masked_layers(sparsify(dense, 0.5))).split())
    assert "linear: Linear has no kernel that can be masked" in report
    assert "pass kernels={Linear: name}" in report


def test_embeddings_are_left_out_by_default():
    dense = make("Embedding")
    model = sparsify(dense, 0.5)
    assert "embedding/embeddings" not in masked_layers(model).masks
    text = " ".join(str(masked_layers(model)).split())
    assert "embedding: an Embedding is masked only if" in text
    for options in (
        {"layers": layers.Embedding},
        {"layers": dense.get_layer("embedding")},
        {"kernels": {layers.Embedding: "embeddings"}},
    ):
        model = sparsify(dense, 0.5, **options)
        assert "embedding/embeddings" in masked_layers(model).masks


def test_strict():
    dense = make("custom layers")
    with pytest.raises(
        ValueError, match="(?s)strict=True.*linear: Linear has no"
    ):
        sparsify(dense, 0.5, strict=True)
    sparsify(dense, 0.5, strict=True, kernels={kinds.Linear: "w"})
    sparsify(make("Embedding"), 0.5, strict=True)  # left out by rule
    sparsify(make("Functional"), 0.5, strict=True)


@pytest.mark.parametrize(
    "kernels", [3, "kernel", ["w"], {"Linear": "w"}, {kinds.Linear: 3}]
)
def test_kernels_of_a_wrong_type(kernels):
    with pytest.raises(ValueError, match="kernels must be {layer or layer"):
        sparsify(make("custom layers"), 0.5, kernels=kernels)


def test_what_a_masked_layer_assigns_reaches_its_variables():
    """Statistics and random states of layers within a layer."""
    model = masked("custom layers")
    block = model.get_layer("block").layer
    x, _ = kinds.data(model, n=64)
    mean = block.norm.moving_mean.numpy()
    seeds = block.drop.seed_generator.state.numpy()
    model(x, training=False)
    np.testing.assert_array_equal(block.norm.moving_mean.numpy(), mean)
    model(x, training=True)
    assert (block.norm.moving_mean.numpy() != mean).all()
    assert (block.drop.seed_generator.state.numpy() != seeds).any()
    # The same as the plain layer, except for the masks.
    plain = strip(model)
    model(x, training=True)
    plain(x, training=True)
    np.testing.assert_allclose(
        plain.get_layer("block").norm.moving_mean.numpy(),
        block.norm.moving_mean.numpy(),
        rtol=1e-5,
    )


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


FRESH = """
import sys, keras, numpy as np
sys.path.insert(0, sys.argv[2])
import rigl_keras
from support import kinds
model = keras.models.load_model(sys.argv[1])
print(type(model).__name__, len(rigl_keras.masked_layers(model)))
np.save(sys.argv[1] + ".npy", model(np.ones((2, 5), np.float32)))
"""


def test_a_subclassed_model_loads_in_another_process(tmp_path, fresh):
    model = masked("subclassed")
    path = tmp_path / "m.keras"
    model.save(path)
    done = fresh("-c", FRESH, path, pathlib.Path(__file__).parent)
    assert done.stdout.split() == ["Subclassed", "8"], done.stderr
    want = model(np.ones((2, 5), np.float32))
    np.testing.assert_allclose(np.load(f"{path}.npy"), want, rtol=1e-5)


class Wrapping(keras.Model):
    """A Functional model with a custom constructor."""

    def __init__(self, units):
        inputs = keras.Input((4,))
        super().__init__(inputs, layers.Dense(units)(inputs))

    def train_step(self, data):
        raise NotImplementedError


def test_a_model_of_which_a_copy_would_lose_methods_is_masked_in_place():
    dense = Wrapping(3)
    model = sparsify(dense, 0.5)
    assert model is dense and len(masked_layers(model)) == 1
    with pytest.raises(NotImplementedError):
        model.train_step(None)
    assert strip(model) is dense and type(dense) is Wrapping


class Doubled(keras.Sequential):
    """Does not compute its layers one after the other."""

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


def test_a_model_within_that_would_lose_its_call_is_masked_in_place():
    inputs = keras.Input((4,))
    inner = Doubled([keras.Input((4,)), layers.Dense(3)])
    dense, x = keras.Model(inputs, inner(inputs)), np.ones((2, 4), np.float32)
    want = dense(x).numpy()
    with pytest.warns(UserWarning, match="in place, because it cannot be"):
        model = sparsify(dense, 1.0)
    assert isinstance(model.layers[1], Doubled) and masked_layers(model)
    np.testing.assert_allclose(model(x), want, rtol=1e-6)


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


@keras.saving.register_keras_serializable("tests")
class Watched(layers.Layer):
    """Has a metric and a float32 layer, under half precision."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(1, use_bias=False, dtype="float32")
        self.mean = keras.metrics.Mean(name="watched")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        self.mean.update_state(keras.ops.mean(x))
        return self.dense(x)

    def double(self, x):
        return 2 * self(x)


def test_metrics_precision_and_methods_of_a_masked_layer():
    inputs = keras.Input((4,))
    watched = Watched(name="w", dtype="mixed_float16")
    dense = keras.Model(inputs, watched(inputs))
    watched.dense.kernel.assign(np.full((4, 1), 1.0003))
    model = sparsify(dense, 1.0)
    x = np.eye(4, dtype=np.float32)[:2]
    np.testing.assert_array_equal(model(x), dense(x))
    assert abs(float(model(x)[0, 0]) - 1.0003) < 1e-6
    masked = model.get_layer("w")
    assert float(masked.mean.result()) == float(watched.mean.result()) > 0
    np.testing.assert_array_equal(masked.double(x), 2 * model(x))
    masked_model = sparsify(make("Embedding"), 0.5)
    with pytest.raises(AttributeError, match="no single `kernel`"):
        _ = masked_model.get_layer("lstm").kernel
    with pytest.raises(AttributeError, match="neither"):
        _ = masked.neither


@keras.saving.register_keras_serializable("tests")
class Around(layers.Layer):
    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return self.inner(x)


class Odd(keras.Model):
    """Has layers in every kind of container."""

    def __init__(self):
        super().__init__()
        pair = collections.namedtuple("pair", "one two")
        self.numbered = {0: layers.Dense(4), 1: layers.Dense(4)}
        self.dotted = {"conv1.a": layers.Dense(4, name="dotted")}
        self.pair = pair(layers.Dense(4), [(layers.Dense(4), "text")])
        self.checkpointed = True
        self.out = layers.Dense(4, name="out")

    def call(self, x):
        x = self.numbered[1](self.numbered[0](x))
        x = self.pair.two[0][0](self.pair.one(self.dotted["conv1.a"](x)))
        return self.out(x) * (1.0 if self.checkpointed is True else 0.0)


def test_layers_in_every_kind_of_container():
    model = Odd()
    x = np.ones((2, 4), np.float32)
    want = outputs(model, x)
    parameters = model.count_params()
    model = sparsify(model, 1.0, strict=True)
    assert len(masked_layers(model)) == 6
    assert_same(outputs(model, x), want)
    assert count(model).parameters == parameters
    assert_same(outputs(strip(model), x), want)


class Tied(keras.Model):
    """Uses a layer within two other layers, and by itself."""

    def __init__(self):
        super().__init__()
        dense = layers.Dense(20, name="d")
        self.one, self.two = (
            Around(dense, name="one"),
            Around(dense, name="two"),
        )

    def call(self, x):
        return self.two(self.one(x))


def test_a_kernel_that_layers_share_has_one_mask():
    model = Tied()
    x = np.ones((2, 20), np.float32)
    model(x)
    model = sparsify(model, 0.5)
    (masked,) = masked_layers(model)
    assert np.count_nonzero(masked.kernel.numpy()) == 200
    assert count(model).nonzeros == 200 + 20
    # Masked in place, as a copy would have two layers instead of one.
    dense = layers.Dense(8, name="d")
    inputs = keras.Input((4, 8))
    tied = keras.Model(inputs, dense(layers.TimeDistributed(dense)(inputs)))
    before = len(tied.trainable_variables)
    with pytest.warns(UserWarning, match="share the weights"):
        model = sparsify(tied, 0.5)
    assert len(masked_layers(model)) == 1
    assert len(model.trainable_variables) == before


class Sharing(keras.Model):
    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def call(self, x):
        return self.dense(x)


def test_a_layer_that_another_model_has_masked_is_refused():
    dense = layers.Dense(8, name="d")
    one, two = Sharing(dense), Sharing(dense)
    for model in (one, two):
        model(np.zeros((1, 5), np.float32))
    sparsify(one, 0.5)
    with pytest.raises(ValueError, match="already masked in another model"):
        sparsify(two, 0.5)


def test_what_is_frozen_stays_frozen():
    dense = make("custom layers")
    dense.get_layer("block").dense[0].trainable = False
    dense.get_layer("head").trainable = False
    for model in (sparsify(dense, 0.5), strip(sparsify(dense, 0.5))):
        names = [v.path for v in model.trainable_variables]
        assert len(names) == len(dense.trainable_variables)
    model = sparsify(dense, 0.5)
    frozen = model.get_layer("block").layer.dense[0].kernel
    before = frozen.numpy()
    model.compile("sgd", "mse")
    model.fit(*kinds.data(model), verbose=0)
    np.testing.assert_array_equal(frozen.numpy(), before)


class Named(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.rnn = layers.LSTM(3)

    def call(self, inputs):
        return self.dense(inputs["a"]) + self.rnn(sequences=inputs["b"])


class Whole(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, ids):
        return self.dense(tf.one_hot(ids, 7))


def test_counting_what_is_called_in_other_ways():
    model = Named()
    model({"a": np.ones((1, 2)), "b": np.ones((1, 5, 4))})
    cost = count(sparsify(model, 1.0), convention="macs")
    assert cost.inference_flops == 2 * 3 + 5 * (4 * 12 + 3 * 12)
    whole = Whole()
    whole(np.ones((2,), np.int32))
    with pytest.raises(ValueError, match="FLOPs of model .* cannot be counted"):
        count(whole)
