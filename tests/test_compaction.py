"""Folding of batch norms and removal of dead units, counted by hand."""

import keras
import numpy as np
import pytest
from keras import layers
from support.kinds import KINDS, data
from support.small_models import examples, small_model

from rigl_keras import models
from rigl_keras.compaction.dead_units import remove_dead_units
from rigl_keras.compaction.folding import fold_batch_norm
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify


@pytest.fixture(autouse=True)
def double():
    """Computes in float64, so that any difference shows."""
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


def settle(model, seed=0):
    """Sets batch norms and biases as after training; returns the model."""
    draw = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            for variable in layer.weights:
                variable.assign(draw.normal(size=variable.shape))
            layer.moving_variance.assign(draw.uniform(0.5, 2, layer.beta.shape))
        elif getattr(layer, "bias", None) is not None:
            layer.bias.assign(draw.normal(size=layer.bias.shape))
    return model


def cut(layer, *, incoming=(), outgoing=()):
    """Removes all connections to some units, or from some inputs."""
    kernel = layer.kernel.numpy()
    kernel[..., list(incoming)] = 0
    kernel[..., list(outgoing), :] = 0
    layer.kernel.assign(kernel)


def outputs(model, n=3, seed=5):
    draw = np.random.default_rng(seed)
    x = keras.tree.map_structure(
        lambda t: draw.normal(size=(n, *(d or 7 for d in t.shape[1:]))),
        model.input if hasattr(model, "input") else model.inputs[0],
    )
    # Otherwise Keras passes training=True from one layer to the next.
    outputs = model(x, training=False)
    return [np.asarray(y) for y in keras.tree.flatten(outputs)]


def assert_same(model, small, tolerance=1e-12):
    for one, other in zip(outputs(model), outputs(small), strict=True):
        assert one.shape == other.shape
        scale = np.abs(one).max()
        # Outputs that do not depend on the inputs would hide differences.
        assert np.ptp(one, axis=0).max() > 1e-4 * scale
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def removed(model):
    """Compares the smaller model; returns it and the layers that shrank."""
    before = [w.numpy() for w in model.weights]
    small, removal = remove_dead_units(model)
    assert_same(model, small)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert removal.parameters_after == small.count_params()
    for name, (_, after) in removal.layers.items():
        assert small.get_layer(name).output.shape[-1] == after
    again, nothing = remove_dead_units(small)
    assert not nothing.layers and again.count_params() == small.count_params()
    return small, removal.layers


def convolutions(padding="same", **options):
    return settle(
        keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                layers.Conv2D(4, 3, use_bias=False, name="conv1"),
                layers.BatchNormalization(name="norm"),
                layers.ReLU(),
                layers.Conv2D(
                    3, 3, padding=padding, use_bias=False, name="conv2"
                ),
                *options.get("after", ()),
            ]
        )
    )


def assign_constant(norm, unit, value):
    """Makes a batch norm map an input of 0 to a value."""
    beta = norm.beta.numpy()
    std = np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
    shift = norm.moving_mean.numpy() * norm.gamma.numpy() / std
    beta[unit] = value + shift[unit]
    norm.beta.assign(beta)


# Dead units: counted by hand.


@pytest.mark.parametrize(
    "padding, value, kept, size",
    [
        # 4 filters: 72 + 16 + 108 weights; 3 filters: 54 + 12 + 81.
        ("same", -0.7, 3, 147),  # the ReLU gives 0
        ("valid", -0.7, 3, 147),
        ("valid", 0.7, 3, 150),  # the constant becomes three biases
        ("same", 0.7, 4, 196),  # kept, as it is smaller near the border
    ],
)
def test_filter_without_incoming_connections(padding, value, kept, size):
    model = convolutions(padding)
    cut(model.get_layer("conv1"), incoming=[1])
    assign_constant(model.get_layer("norm"), 1, value)
    small, shrunk = removed(model)
    both = {"conv1": (4, 3), "norm": (4, 3)}
    assert shrunk == (both if kept == 3 else {})
    assert small.get_layer("conv1").kernel.shape == (3, 3, 2, kept)
    assert small.get_layer("conv2").kernel.shape == (3, 3, kept, 3)
    assert small.count_params() == size
    if kept == 3:
        np.testing.assert_array_equal(
            small.get_layer("conv1").kernel,
            model.get_layer("conv1").kernel.numpy()[..., [0, 2, 3]],
        )


def test_convolution_of_one_pixel_has_no_border():
    model = keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            layers.Conv2D(3, 3, activation="sigmoid", name="a"),
            layers.Conv2D(2, 1, padding="same", strides=2, name="b"),
        ]
    )
    cut(settle(model).layers[0], incoming=[0])  # sigmoid(bias) is never 0
    small, shrunk = removed(model)
    assert shrunk == {"a": (3, 2)}
    bias = model.layers[0].bias.numpy()[0]
    np.testing.assert_allclose(
        small.get_layer("b").bias,
        model.layers[1].bias
        + model.layers[1].kernel.numpy()[0, 0, 0] / (1 + np.exp(-bias)),
    )


def test_filter_without_outgoing_connections():
    model = convolutions()
    cut(model.get_layer("conv2"), outgoing=[0, 3])
    small, shrunk = removed(model)
    assert shrunk == {"conv1": (4, 2), "norm": (4, 2)}
    assert small.count_params() == 36 + 8 + 54


def test_nothing_dead_nothing_removed():
    model = convolutions()
    small, shrunk = removed(model)
    assert not shrunk and small.count_params() == model.count_params()
    assert "no unit is dead" in str(remove_dead_units(model)[1])


def chain(activation="relu"):
    return settle(
        keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(5, activation, name="a"),
                layers.Dense(4, activation, name="b"),
                layers.Dense(6, activation, name="c"),
                layers.Dense(2, name="head"),
            ]
        )
    )


def test_death_spreads_backward():
    """c2 is not read. Only c2 reads b1, and only b1 reads a0 and a4."""
    model = chain()
    a, b, c, head = model.layers
    cut(head, outgoing=[2])
    kernel = c.kernel.numpy()
    kernel[1] = [0, 0, 1, 0, 0, 0]
    c.kernel.assign(kernel)
    kernel = b.kernel.numpy()
    kernel[[0, 4]] = [0, 1, 0, 0]
    b.kernel.assign(kernel)
    small, shrunk = removed(model)
    assert shrunk == {"a": (5, 3), "b": (4, 3), "c": (6, 5)}
    assert small.count_params() == 3 * 3 + 3 + 3 * 3 + 3 + 3 * 5 + 5 + 5 * 2 + 2


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "softplus"])
def test_death_spreads_forward(activation):
    """a0 has no inputs. b1 reads only a0, and c3 and c4 read only b1."""
    model = chain(activation)
    a, b, c, _ = model.layers
    cut(a, incoming=[0])
    kernel = b.kernel.numpy()
    kernel[1:, 1] = 0
    b.kernel.assign(kernel)
    kernel = c.kernel.numpy()
    kernel[[0, 2, 3], 3:5] = 0
    c.kernel.assign(kernel)
    _, shrunk = removed(model)
    assert shrunk == {"a": (5, 4), "b": (4, 3), "c": (6, 4)}


def test_dead_layer_keeps_one_unit():
    model = chain()
    skip = layers.Dense(2, name="skip")(model.inputs[0])
    model = keras.Model(model.inputs, layers.Add()([model.outputs[0], skip]))
    settle(model)
    cut(model.get_layer("c"), incoming=range(6))
    small, shrunk = removed(model)
    assert shrunk == {"a": (5, 1), "b": (4, 1), "c": (6, 1)}
    assert not small.get_layer("c").kernel.numpy().any()


def test_gamma_of_zero_cuts_as_well():
    model = convolutions("valid")
    gamma = model.get_layer("norm").gamma
    gamma.assign(gamma.numpy() * [1, 0, 0, 1])
    _, shrunk = removed(model)
    assert shrunk == {"conv1": (4, 2), "norm": (4, 2)}


def residual(merge=None, padding="same"):
    inputs = keras.Input((6, 6, 2))
    options = {"use_bias": False, "padding": "same"}
    x = layers.Conv2D(4, 3, name="stem", **options)(inputs)
    y = layers.BatchNormalization(name="norm1")(x)
    y = layers.ReLU()(y)
    y = layers.Conv2D(4, 3, name="branch", **options)(y)
    x = merge([x, y]) if merge else x + y
    x = layers.GlobalAveragePooling2D()(x)
    return settle(keras.Model(inputs, layers.Dense(3, name="head")(x)))


MERGES = [layers.Add, layers.Subtract, layers.Average, layers.Maximum]


@pytest.mark.parametrize("merge", [None, *MERGES, layers.Minimum])
def test_sum_of_two_branches(merge):
    """A unit goes if it is dead in both, or not read after the sum."""
    model = residual(merge and merge())
    cut(model.get_layer("branch"), incoming=[0, 1])
    cut(model.get_layer("stem"), incoming=[1, 2])
    assign_constant(model.get_layer("norm1"), 1, -0.5)
    assign_constant(model.get_layer("norm1"), 2, -0.5)
    # Channel 1 is dead in both; 0 and 2 in one.
    small, shrunk = removed(model)
    assert shrunk == dict.fromkeys(["stem", "norm1", "branch"], (4, 3))
    cut(model.get_layer("head"), outgoing=[3])
    # Channel 3 is not read after the sum, but in the branch.
    assert removed(model)[1] == shrunk
    cut(model.get_layer("branch"), outgoing=[3])
    assert removed(model)[1]["stem"] == (4, 2)


@pytest.mark.parametrize("sign", [False, True])
def test_product_with_zero_is_zero(sign):
    inputs = keras.Input((3,))
    a = layers.Dense(4, name="a")(inputs)
    b = layers.Dense(4, "sigmoid", name="b")(inputs)
    x = a * b if sign else layers.Multiply()([a, b])
    x = layers.Dense(2, name="head")(x)
    model = settle(keras.Model(inputs, x))
    a = model.get_layer("a")
    cut(a, incoming=[0, 1])
    a.bias.assign([0, 1, 1, 1])
    # Channel 0 is 0; 1 is b's.
    assert removed(model)[1] == {"a": (4, 3), "b": (4, 3)}


def test_zero_of_a_product_stays_zero():
    """An unknown layer reads it, and hard_sigmoid(0) is not 0."""
    inputs = keras.Input((3,))
    a = layers.Dense(4, "hard_sigmoid", name="a")(inputs)
    b = layers.Dense(4, "sigmoid", name="b")(inputs)
    x = layers.LayerNormalization()(layers.Multiply()([b, a]))
    model = settle(keras.Model(inputs, x))
    cut(model.get_layer("a"), incoming=[0])
    model.get_layer("a").bias.assign([-5, 0, 0, 0])
    small, shrunk = removed(model)
    assert not shrunk
    # A factor of 0 makes the other factor unnecessary.
    assert not small.get_layer("b").kernel.numpy()[:, 0].any()


def test_flatten_repeats_channels():
    model = settle(
        keras.Sequential(
            [
                keras.Input((4, 4, 2)),
                layers.Conv2D(3, 3, activation="relu", name="conv"),
                layers.Flatten(),
                layers.Dense(5, name="head"),
            ]
        )
    )
    conv, _, head = model.layers
    cut(conv, incoming=[1])
    bias = conv.bias.numpy()
    bias[1] = 0.4  # relu(0.4) in all four positions
    conv.bias.assign(bias)
    small, shrunk = removed(model)
    assert shrunk == {"conv": (3, 2)}
    kernel = head.kernel.numpy()
    np.testing.assert_array_equal(
        small.get_layer("head").kernel, np.delete(kernel, [1, 4, 7, 10], 0)
    )
    np.testing.assert_allclose(
        small.get_layer("head").bias,
        head.bias + 0.4 * kernel[[1, 4, 7, 10]].sum(0),
    )
    # A channel that is read at one position is needed.
    model = keras.models.clone_model(model)
    head = settle(model).layers[2]
    cut(head, outgoing=[2, 5, 8])
    assert not removed(model)[1]
    cut(head, outgoing=[11])
    assert removed(model)[1] == {"conv": (3, 2)}


def test_concatenated_channels():
    inputs = keras.Input((3,))
    a = layers.Dense(4, "relu", name="a")(inputs)
    b = layers.Dense(3, "relu", name="b")(inputs)
    x = layers.Concatenate()([a, b])
    model = settle(
        keras.Model(inputs, layers.Dense(2, name="head")(layers.ReLU()(x)))
    )
    cut(model.get_layer("a"), incoming=[1])
    cut(model.get_layer("head"), outgoing=[0, 5])
    small, shrunk = removed(model)
    assert shrunk == {"a": (4, 2), "b": (3, 2)}
    np.testing.assert_array_equal(
        small.get_layer("head").kernel,
        model.get_layer("head").kernel.numpy()[[2, 3, 4, 6]],
    )


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_depthwise_convolution(padding):
    """Both outputs of a channel are removed together."""
    model = settle(
        keras.Sequential(
            [
                keras.Input((8, 8, 2)),
                layers.Conv2D(4, 3, activation="relu", name="conv"),
                layers.DepthwiseConv2D(
                    3, depth_multiplier=2, padding=padding, name="depthwise"
                ),
                layers.Conv2D(3, 3, name="head"),
            ]
        )
    )
    conv, depthwise, head = model.layers
    cut(conv, incoming=[0])
    conv.bias.assign([0.5, 1, 1, 1])
    kernel = depthwise.kernel.numpy()
    kernel[:, :, 1] = 0  # both outputs are their biases
    kernel[:, :, 2, 0] = 0  # one output is its bias
    depthwise.kernel.assign(kernel)
    cut(head, outgoing=[7])
    small, shrunk = removed(model)
    # Channel 0 is a constant, whose sum is smaller near the border.
    left = 2 if padding == "valid" else 3
    assert shrunk == {"conv": (4, left), "depthwise": (8, 2 * left)}
    assert small.get_layer("depthwise").kernel.shape == (3, 3, left, 2)
    cut(head, outgoing=[6])
    assert removed(model)[1]["conv"] == (4, left - 1)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_separable_convolution(padding):
    model = settle(
        keras.Sequential(
            [
                keras.Input((8, 8, 2)),
                layers.Conv2D(4, 3, activation="relu", name="conv"),
                layers.SeparableConv2D(
                    5, 3, depth_multiplier=2, padding=padding, name="separable"
                ),
                layers.Conv2D(3, 3, name="head"),
            ]
        )
    )
    conv, separable, head = model.layers
    cut(conv, incoming=[0])
    conv.bias.assign([0.5, 1, 1, 1])
    kernel = separable.depthwise_kernel.numpy()
    kernel[:, :, 1] = 0
    kernel[:, :, 2, 0] = 0
    kernel[:, :, 3, 1] = 0  # channel 3 still has the other path
    separable.depthwise_kernel.assign(kernel)
    kernel = separable.pointwise_kernel.numpy()
    kernel[:, :, 5] = 0  # the other path of channel 2
    separable.pointwise_kernel.assign(kernel)
    cut(head, outgoing=[3])
    small, shrunk = removed(model)
    left = 1 if padding == "valid" else 2
    assert shrunk == {"conv": (4, left), "separable": (5, 4)}
    assert small.get_layer("separable").pointwise_kernel.shape == (
        (1, 1, 2 * left, 4)
    )


@pytest.mark.parametrize(
    "reader",
    [
        layers.Dense(3),
        layers.Conv2D(3, 2),
        layers.Conv2D(3, 2, padding="same"),
        layers.DepthwiseConv2D(2, depth_multiplier=2),
        layers.SeparableConv2D(3, 2, depth_multiplier=2),
        layers.Conv2DTranspose(3, 2),
    ],
    ids=lambda layer: layer.name,
)
def test_constant_that_stays_is_not_added_twice(reader):
    """The constant is also an output of the model."""
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    y = type(reader).from_config({**reader.get_config(), "dtype": None})(x)
    model = settle(keras.Model(inputs, [x, y]))
    cut(model.get_layer("conv"), incoming=[0, 2])
    assert not removed(model)[1]


def test_transposed_convolution():
    model = settle(
        keras.Sequential(
            [
                keras.Input((4, 4, 2)),
                layers.Conv2D(4, 3, activation="relu", name="conv"),
                layers.Conv2DTranspose(
                    5, 3, strides=2, activation="relu", name="transposed"
                ),
                layers.Conv2D(3, 3, name="head"),
            ]
        )
    )
    conv, transposed, head = model.layers
    cut(conv, incoming=[0, 1])
    # Channel 0 is 0; channel 1 is smaller near the border.
    conv.bias.assign([-1, 1, 1, 1])
    kernel = transposed.kernel.numpy()  # (..., outputs, inputs)
    kernel[:, :, 2] = 0
    transposed.kernel.assign(kernel)
    transposed.bias.assign(np.ones(5))
    cut(head, outgoing=[4])
    small, shrunk = removed(model)
    assert shrunk == {"conv": (4, 3), "transposed": (5, 3)}
    assert small.get_layer("transposed").kernel.shape == (3, 3, 3, 3)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_padding_with_zeros(value):
    model = settle(
        keras.Sequential(
            [
                keras.Input((5, 5, 2)),
                layers.Conv2D(3, 3, name="conv"),
                layers.ZeroPadding2D(1),
                layers.Conv2D(2, 3, name="head"),
            ]
        )
    )
    cut(model.layers[0], incoming=[1])
    model.layers[0].bias.assign([1, value, 1])
    assert removed(model)[1] == ({} if value else {"conv": (3, 2)})


PASSING = [
    layers.MaxPooling2D(2, padding="same"),
    layers.AveragePooling2D(2, padding="same"),
    layers.GlobalAveragePooling2D(keepdims=True),
    layers.GlobalMaxPooling2D(keepdims=True),
    layers.UpSampling2D(2),
    layers.Cropping2D(1),
    layers.SpatialDropout2D(0.3),
    layers.GaussianNoise(0.3),
    layers.Identity(),
    layers.LeakyReLU(),
    layers.ELU(),
    layers.Activation("silu"),
]


@pytest.mark.parametrize("between", PASSING, ids=lambda layer: layer.name)
def test_constants_pass_through(between):
    between = type(between).from_config({**between.get_config(), "dtype": None})
    model = settle(
        keras.Sequential(
            [
                keras.Input((7, 7, 2)),
                layers.Conv2D(4, 3, name="conv"),
                between,
                layers.Conv2D(3, 1, name="head"),
            ]
        )
    )
    cut(model.layers[0], incoming=[1])
    cut(model.layers[2], outgoing=[3])
    assert removed(model)[1] == {"conv": (4, 2)}


@pytest.mark.parametrize("padding", ["causal", "valid"])
def test_causal_convolution_pads(padding):
    model = settle(
        keras.Sequential(
            [
                keras.Input((7, 2)),
                layers.Conv1D(4, 3, name="conv"),
                layers.Conv1D(3, 2, padding=padding, name="head"),
            ]
        )
    )
    cut(model.layers[0], incoming=[1])
    shrunk = {"conv": (4, 3)} if padding == "valid" else {}
    assert removed(model)[1] == shrunk


def test_operations_are_known_as_layers_are():
    inputs = keras.Input((3,))
    x = keras.ops.relu(layers.Dense(4, name="a")(inputs))
    y = keras.ops.gelu(layers.Dense(4, name="b")(inputs), approximate=True)
    model = settle(keras.Model(inputs, layers.Dense(2, name="head")(x - y)))
    for name in "ab":
        cut(model.get_layer(name), incoming=[1, int(name == "b")])
    assert removed(model)[1] == {"a": (4, 3), "b": (4, 3)}
    # A sum with a number is not supported.
    model = keras.Model(inputs, layers.Dense(2, name="head")(x + 1.0))
    cut(settle(model).get_layer("head"), outgoing=[0])
    assert not removed(model)[1]


def test_reports_read_well():
    model = convolutions()
    cut(model.get_layer("conv2"), outgoing=[0, 3])
    assert str(remove_dead_units(model)[1]) == (
        "conv1  2 of 4 units\n"
        "norm   2 of 4 units\n"
        "parameters: 98 of 196 (50.0%)"
    )
    assert str(fold_batch_norm(model)[1]) == (
        "1 of 1 batch norms folded\n  norm into conv1"
    )


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
