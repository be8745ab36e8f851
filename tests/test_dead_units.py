"""Removal of dead units, counted by hand."""

import keras
import numpy as np
import pytest
from keras import layers
from support.compacted import cut, in_float64, removed, settle

from rigl_keras.compaction.dead_units import remove_dead_units
from rigl_keras.compaction.folding import fold_batch_norm


@pytest.fixture(autouse=True)
def double():
    yield from in_float64()


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
