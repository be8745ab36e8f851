"""Folding of batch norms, layers that stay, and whole networks made smaller."""

import keras
import numpy as np
import pytest
from keras import layers
from support.compacted import (
    assert_same,
    cut,
    in_float64,
    outputs,
    removed,
    settle,
)
from support.kinds import KINDS, data
from support.small_models import examples, small_model

from rigl_keras import models
from rigl_keras.compaction.dead_units import remove_dead_units
from rigl_keras.compaction.folding import fold_batch_norm
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify


@pytest.fixture(autouse=True)
def double():
    yield from in_float64()


# Unknown layers stay.


@keras.saving.register_keras_serializable("tests")
def reverse(x):
    return x[:, ::-1]


def test_softmax_reads_all():
    inputs = keras.Input((3,))
    x = layers.Dense(5, "relu", name="a")(inputs)
    x = layers.Dense(4, "softmax", name="attention")(x)
    model = settle(keras.Model(inputs, layers.Dense(2, name="head")(x)))
    cut(model.get_layer("a"), incoming=[2])
    attention = model.get_layer("attention")
    cut(attention, incoming=[1])
    # Only entries that the head does not read depend on unit 3, and the sum.
    kernel = attention.kernel.numpy()
    kernel[3, 1:] = 0
    attention.kernel.assign(kernel)
    cut(model.get_layer("head"), outgoing=[0])
    assert removed(model)[1] == {"a": (5, 4)}


@pytest.mark.parametrize(
    "layer",
    [
        layers.LayerNormalization(),
        layers.Softmax(),
        layers.Reshape((4, 1)),
        layers.PReLU(),
        layers.Lambda(reverse, output_shape=(4,)),
        layers.Dense(4, activation=reverse),
    ],
    ids=lambda layer: layer.name,
)
def test_unknown_layers_keep_what_they_read(layer):
    config = layer.get_config()
    inputs = keras.Input((3,))
    x = layers.Dense(4, "relu", name="a")(inputs)
    layer = type(layer).from_config({**config, "dtype": "float64"})
    x = layers.Dense(3, name="head")(layers.Flatten()(layer(x)))
    model = settle(keras.Model(inputs, x))
    cut(model.get_layer("a"), incoming=[1])
    cut(model.get_layer("head"), outgoing=[2])
    known = isinstance(layer, layers.Dense)
    assert removed(model)[1] == ({"a": (4, 3)} if known else {})


def test_shared_layer_is_left_alone():
    inputs = keras.Input((4,))
    twice = layers.Dense(4, "relu", name="twice")
    relu = layers.ReLU()
    x = twice(twice(relu(inputs)))
    x = relu(layers.Dense(5, name="b")(x))  # shared, but without weights
    model = settle(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    cut(twice, incoming=[0])
    cut(model.get_layer("b"), incoming=[1])
    cut(model.get_layer("head"), outgoing=[3])
    small, shrunk = removed(model)
    assert shrunk == {"b": (5, 3)}
    assert small.get_layer("twice").kernel.shape == (4, 4)


def test_batch_norm_that_trains_and_groups_are_left_alone():
    inputs = keras.Input((9, 9, 4))
    x = layers.Conv2D(4, 3, name="a")(inputs)
    x = layers.Conv2D(4, 3, groups=2, name="groups")(x)
    x = layers.Conv2D(4, 3, name="b")(x)
    x = layers.BatchNormalization(name="norm")(x, training=True)
    model = settle(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    for name in ("a", "b"):
        cut(model.get_layer(name), incoming=[0])
    cut(model.get_layer("head"), outgoing=[2])
    small, removal = remove_dead_units(model)
    assert not removal.layers
    assert_same(model, small)


def test_outputs_and_inputs_stay():
    one, two = keras.Input((4,), name="one"), keras.Input((3,), name="two")
    x = layers.Dense(5, "relu", name="x")(one)
    y = layers.Dense(5, "relu", name="y")(layers.Concatenate()([x, two]))
    model = settle(keras.Model({"one": one, "two": two}, {"y": y, "x": x}))
    for name in "xy":
        cut(model.get_layer(name), incoming=[0])
    cut(model.get_layer("y"), outgoing=[1, 6])
    small, shrunk = removed(model)
    assert not shrunk
    assert list(small.output) == list(model.output) == ["y", "x"]
    # Only the head's own units are removed.
    z = layers.Dense(4, "relu", name="z")(y)
    model = keras.Model(model.input, [x, layers.Dense(2, name="head")(z)])
    settle(model)
    cut(model.get_layer("z"), incoming=[3])
    cut(model.get_layer("z"), outgoing=[2])
    assert removed(model)[1] == {"y": (5, 3), "z": (4, 3)}


def test_models_within_are_opened():
    inner = keras.Sequential(
        [keras.Input((5,)), layers.Dense(6, "relu", name="dense")],
        name="inner",
    )
    inputs = keras.Input((4,))
    x = inner(layers.Dense(5, "relu", name="dense")(inputs))
    model = settle(keras.Model(inputs, layers.Dense(2, name="head")(x)))
    cut(inner.layers[0], outgoing=[0, 1])
    cut(model.get_layer("head"), outgoing=[0])
    assert removed(model)[1] == {"dense": (5, 3), "dense_1": (6, 5)}


# Folding.


def linear_layers():
    conv = {"kernel_size": 3, "use_bias": False}
    return {
        "Dense": ((4,), layers.Dense(3)),
        "Conv1D": ((7, 2), layers.Conv1D(3, **conv)),
        "Conv2D": ((7, 7, 2), layers.Conv2D(3, 3, padding="same")),
        "Conv2D in groups": ((7, 7, 4), layers.Conv2D(6, groups=2, **conv)),
        "Conv3D": ((5, 5, 5, 2), layers.Conv3D(3, **conv)),
        "DepthwiseConv1D": (
            (7, 2),
            layers.DepthwiseConv1D(3, depth_multiplier=2),
        ),
        "DepthwiseConv2D": (
            (7, 7, 2),
            layers.DepthwiseConv2D(3, depth_multiplier=3, use_bias=False),
        ),
        "SeparableConv1D": ((7, 2), layers.SeparableConv1D(3, **conv)),
        "SeparableConv2D": ((7, 7, 2), layers.SeparableConv2D(3, 3)),
        "Conv1DTranspose": ((5, 2), layers.Conv1DTranspose(3, **conv)),
        "Conv2DTranspose": ((5, 5, 2), layers.Conv2DTranspose(3, 3, strides=2)),
    }


@pytest.mark.parametrize("kind", linear_layers())
@pytest.mark.parametrize("scale", [True, False])
def test_folding(kind, scale):
    shape, layer = linear_layers()[kind]
    layer.name = "linear"
    norm = layers.BatchNormalization(name="norm", scale=scale)
    model = keras.Sequential([keras.Input(shape), layer, norm, layers.ReLU()])
    draw = np.random.default_rng(1)
    settle(keras.Sequential([layer])) if layer.use_bias else None
    for variable in norm.weights:
        variable.assign(draw.uniform(0.5, 2, variable.shape))
    folded, report = fold_batch_norm(model)
    assert report.folded == {"norm": "linear"} and not report.kept
    assert [x.name for x in folded.layers[1:]] == [
        "linear",
        model.layers[2].name,
    ]
    assert_same(model, folded)


def test_folding_by_hand():
    model = keras.Sequential(
        [
            keras.Input((1,)),
            layers.Dense(1, name="dense"),
            layers.BatchNormalization(epsilon=1.0, name="norm"),
        ]
    )
    # 3 (2 x + 1 - 5) / sqrt(3 + 1) + 7 = 3 x + 1
    model.layers[0].set_weights([np.array([[2.0]]), np.array([1.0])])
    model.layers[1].set_weights(np.array([[3.0], [7.0], [5.0], [3.0]]))
    folded, _ = fold_batch_norm(model)
    dense = folded.get_layer("dense")
    assert dense.kernel.numpy() == [[3.0]] and dense.bias.numpy() == [1.0]


def test_why_batch_norms_are_kept():
    @keras.saving.register_keras_serializable("tests")
    class OwnNorm(layers.BatchNormalization):
        pass

    inputs = keras.Input((6, 6, 2))

    def norm(x, name, **options):
        return layers.BatchNormalization(name=name, **options)(x)

    def conv(x, name, **options):
        options = {"padding": "same", **options}
        return layers.Conv2D(2, 3, name=name, **options)(x)

    a = norm(inputs, "n_input")
    b = conv(a, "b")
    c = norm(b, "n_read_twice")
    d = norm(layers.Add(name="sum")([b, c]), "n_sum")
    e = norm(conv(d, "e", activation="relu"), "n_activation")
    twice = layers.Conv2D(2, 3, padding="same", name="twice")
    f = norm(twice(twice(e)), "n_twice")
    g = norm(conv(f, "g"), "n_axis", axis=1)
    h = OwnNorm(name="n_own")(conv(g, "h"))
    i = conv(h, "i")
    j = layers.BatchNormalization(name="n_training")(i, training=True)
    k = norm(conv(j, "k", dtype="mixed_float16"), "n_type")
    l_ = norm(conv(k, "l"), "n_output")
    model = keras.Model(inputs, l_)
    folded, report = fold_batch_norm(model)
    assert report.folded == {"n_output": "l"}
    assert report.kept == {
        "n_input": "it follows an input of the model",
        "n_read_twice": "the output of 'b' is needed elsewhere",
        "n_sum": "it follows 'sum', an Add",
        "n_activation": "'e' has an activation",
        "n_twice": "'twice' is called 2 times",
        "n_axis": "the channels are not the last axis",
        "n_own": "it is an OwnNorm, which may compute something else",
        "n_training": "it or the layer before is called with special arguments",
        "n_type": "more than one type: float16, float32, float64",
    }
    assert "1 of 10 batch norms folded\n  n_output into l\nkept:" in str(report)
    assert_same(model, folded)


def test_output_of_the_model_is_not_scaled():
    inputs = keras.Input((4,))
    x = layers.Dense(3, name="x")(inputs)
    model = settle(keras.Model(inputs, [x, layers.BatchNormalization()(x)]))
    folded, report = fold_batch_norm(model)
    assert not report.folded
    assert_same(model, folded)


# Networks.


def random_masks(build, density, **options):
    return settle(
        sparsify(
            build(), density, distribution="er", scale_to_fan_in=True, **options
        )
    )


NETWORKS = {
    # A batch norm is folded if it follows a convolution, not an Add.
    "wide_resnet": (
        lambda: models.wide_resnet(10, 1, input_shape=(16, 16, 3)),
        [f"block{i}_0_bn2" for i in (1, 2, 3)],
        4,
    ),
    "resnet18": (
        lambda: models.resnet18(
            10, (16, 16, 3), channel_scale=0.13, zero_init_residual=False
        ),
        None,
        0,
    ),
    "lenet5": (models.lenet5, [], 0),
}


@pytest.mark.slow_but("lenet5-0.01", "wide_resnet-0.1")
@pytest.mark.parametrize(
    "name, density",
    [
        (name, density)
        for name in NETWORKS
        for density in (0.01, 0.1)
        if (name, density) != ("resnet18", 0.1)  # the test below folds it first
    ],
)
def test_networks(name, density):
    build, _, _ = NETWORKS[name]
    model = random_masks(build, density)
    small, shrunk = removed(model)
    assert not masked_layers(small) and masked_layers(model)
    assert shrunk or density > 0.01
    if shrunk:
        assert small.count_params() < build().count_params()


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_in_networks(name):
    build, folded, kept = NETWORKS[name]
    model = random_masks(build, 0.1)
    small, report = fold_batch_norm(model)
    if folded is None:  # each convolution has a batch norm
        folded = [x.name for x in model.layers if x.name[:-1].endswith("bn")]
        folded += [x.name for x in model.layers if x.name.endswith("bn")]
        assert len(folded) == 20
    assert sorted(report.folded) == sorted(folded)
    assert len(report.kept) == kept
    assert_same(model, small)
    smaller, removal = remove_dead_units(small)
    assert_same(model, smaller)


def test_blocks_that_start_as_the_identity():
    """The last batch norm of each block has gamma 0, so its branch is 0."""
    model = models.resnet18(10, (16, 16, 3), channel_scale=0.1)
    _, shrunk = removed(model)
    assert shrunk == {
        f"conv{stage}_{i}_{layer}": (n, 1)
        for stage, n in zip((2, 3, 4, 5), (6, 12, 25, 51), strict=True)
        for i in (0, 1)
        for layer in ("conv1", "bn1")
    }


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "subclassed"])
def test_every_kind_of_model(kind):
    keras.config.set_dtype_policy("float32")
    model = settle(KINDS[kind]())
    x, _ = data(model)
    for shrink in (fold_batch_norm, remove_dead_units):
        small, _ = shrink(model)
        keras.tree.map_structure(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
            model(x),
            small(x),
        )


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_other_types(policy):
    keras.config.set_dtype_policy(policy)
    model = settle(sparsify(small_model(), 0.1))
    x, _ = examples(4)
    expected = np.asarray(model(x), np.float64)
    small, removal = remove_dead_units(model)
    folded, folding = fold_batch_norm(model)
    assert removal.layers
    assert small.get_layer("conv2").dtype_policy.name == policy
    assert len(folding.folded) == (policy == "float32")
    tolerance = 1e-6 if policy == "float32" else 5e-3
    for other in (small, folded):
        difference = np.abs(np.asarray(other(x), np.float64) - expected).max()
        assert difference <= tolerance * np.abs(expected).max()


def test_result_trains_and_saves(tmp_path):
    model = settle(sparsify(small_model(), 0.1))
    small, _ = remove_dead_units(fold_batch_norm(model)[0])
    small.save(tmp_path / "small.keras")
    assert_same(small, keras.models.load_model(tmp_path / "small.keras"), 0)
    small.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
    small.fit(*examples(8), verbose=0)
    assert_same(model, remove_dead_units(model)[0])


def test_subclassed_models_are_refused():
    for shrink in (fold_batch_norm, remove_dead_units):
        with pytest.raises(ValueError, match="subclassed: only its own `call`"):
            shrink(KINDS["subclassed"]())


# Random graphs.


class Draw:
    """A random network, whose layers read random earlier tensors."""

    def __init__(self, seed):
        self.draw = np.random.default_rng(seed)
        inputs = keras.Input((6, 6, 3))
        self.tensors = [inputs]
        steps = [self.linear, self.linear, self.norm, self.act, self.merge]
        steps += [self.concatenate, self.pool, self.pad]
        for _ in range(12):
            x = self.choice(steps)(self.choice(self.tensors[-4:]))
            self.tensors.append(x)
        x = layers.Flatten()(self.tensors[-1])
        heads = [layers.Dense(3)(x)]
        heads.append(layers.Dense(2, "softmax")(layers.Dense(4, "tanh")(x)))
        self.model = settle(keras.Model(inputs, heads), seed)
        for layer in self.model.layers:
            self.thin(layer)

    def choice(self, options):
        return options[self.draw.integers(len(options))]

    def linear(self, x):
        options = {
            "padding": self.choice(["same", "valid"]),
            "use_bias": self.choice([True, False]),
            "activation": self.choice(["linear", "relu", "sigmoid"]),
        }
        size = min(self.choice([1, 2, 3]), x.shape[1], x.shape[2])
        units = int(self.draw.integers(1, 6))
        kind = self.draw.integers(6)
        if kind == 0:
            return layers.DepthwiseConv2D(
                size, depth_multiplier=int(self.draw.integers(1, 3)), **options
            )(x)
        if kind == 1:
            return layers.SeparableConv2D(
                units,
                size,
                depth_multiplier=int(self.draw.integers(1, 3)),
                **options,
            )(x)
        if kind == 2:
            return layers.Conv2DTranspose(units, size, **options)(x)
        if kind == 3:
            return layers.Dense(units, options["activation"])(x)
        return layers.Conv2D(units, size, **options)(x)

    def norm(self, x):
        return layers.BatchNormalization()(x)

    def act(self, x):
        return self.choice(
            [layers.ReLU(), layers.Activation("gelu"), keras.ops.silu]
        )(x)

    def merge(self, x):
        merge = self.choice(
            [layers.Add, layers.Multiply, layers.Maximum, layers.Subtract]
        )
        alike = [t for t in self.tensors if t.shape == x.shape]
        other = self.choice(alike)
        return merge()([x, layers.ReLU()(other)])

    def concatenate(self, x):
        alike = [t for t in self.tensors if t.shape[:3] == x.shape[:3]]
        return layers.Concatenate()([x, self.choice(alike)])

    def pool(self, x):
        pool = self.choice([layers.MaxPooling2D, layers.AveragePooling2D])
        return pool(2, strides=1, padding="same")(x)

    def pad(self, x):
        return layers.ZeroPadding2D(1)(x) if x.shape[1] < 8 else self.act(x)

    def thin(self, layer):
        """Zeroes most connections, some gammas and some biases."""
        for variable in layer.weights:
            if "kernel" in variable.name:
                keep = self.draw.random(variable.shape) < 0.2
                keep &= self.draw.random(variable.shape[-1]) < 0.8
            elif variable.name in ("gamma", "bias"):
                keep = self.draw.random(variable.shape) < 0.7
            else:
                continue
            variable.assign(variable.numpy() * keep)


@pytest.mark.slow_but(*map(str, range(4)))
@pytest.mark.parametrize("seed", range(30))
def test_random_graphs(seed, pytestconfig):
    if seed >= 15 and not pytestconfig.getoption("every_combination"):
        pytest.skip("with --every-combination")
    model = Draw(seed).model
    expected = outputs(model)
    folded, _ = fold_batch_norm(model)
    for source in (model, folded):
        small, _ = remove_dead_units(source)
        again, removal = remove_dead_units(small)
        assert not removal.layers
        for shrunk in (source, small, again):
            for one, other in zip(expected, outputs(shrunk), strict=True):
                scale = max(1e-3, np.abs(one).max())
                np.testing.assert_allclose(one, other, atol=1e-12 * scale)


def test_random_graphs_have_dead_units():
    shrunk = [
        remove_dead_units(Draw(seed).model)[1].layers for seed in range(5)
    ]
    assert all(shrunk)
