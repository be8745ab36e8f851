"""Costs, by hand and on models."""

import functools
import math

import keras
import numpy as np
import pytest
from keras import layers
from support.small_models import compiled, examples, small_model

import rigl_keras
from rigl_keras import flops, models
from rigl_keras.flops.counting import count
from rigl_keras.masking.sparsify import sparsify


def test_by_hand():
    model = small_model()
    # conv1: 3x3x3x8 at 8x8, depthwise 3x3x8 at 6x6, conv2 3x3x8x16 at 2x2,
    # head 64x10 once.
    macs = {"conv1": 216 * 64, "depthwise": 72 * 36, "conv2": 1152 * 4}
    macs["head"] = 640
    got = count(model, convention="macs")
    assert {i.name: i.inference_flops for i in got.layers} == macs
    # micronet counts, for a bias, an addition for each input channel.
    biases = {"conv1": 3 * 64, "depthwise": 8 * 36, "conv2": 8 * 4, "head": 64}
    got = count(model)
    assert {i.name: i.inference_flops for i in got.layers} == {
        name: 2 * macs[name] + biases[name] for name in macs
    }
    # Kernels, biases, and gamma and beta of the batch norm.
    assert got.parameters == 216 + 8 + 72 + 8 + 1152 + 16 + 640 + 10 + 16
    assert got.bits == 32 * got.parameters
    assert got.density == 1.0 and got.nonzeros == got.parameters


def test_masked():
    model = sparsify(small_model(), 0.25)
    got, dense = count(model), count(small_model())
    weights = 216 + 72 + 1152 + 640
    kept = round(0.25 * weights)
    assert got.density == pytest.approx(kept / weights)
    assert got.nonzeros == got.parameters - weights + kept
    assert got.dense_inference_flops == dense.inference_flops
    by_hand = sum(
        2 * layer.mask.numpy().sum() * cost.positions
        for layer, cost in zip(
            rigl_keras.masked_layers(model), got.layers, strict=True
        )
    )
    biases = 3 * 64 + 8 * 36 + 8 * 4 + 64
    assert got.inference_flops == pytest.approx(by_hand + biases)
    bitmasks = sum(
        layer.mask.numpy().size
        for layer in rigl_keras.masked_layers(model)
        if layer.density < 1
    )
    assert got.bits == 32 * got.nonzeros + bitmasks
    assert "0.2500" in str(got) and "conv2" in str(got)


@pytest.mark.parametrize(
    "layer, shape, macs",
    [
        (layers.Conv1D(4, 3, strides=2), (9, 2), 3 * 2 * 4 * 4),
        (layers.Conv3D(2, 2), (3, 3, 3, 1), 8 * 2 * 8),
        (layers.Conv2D(4, 3, dilation_rate=2), (8, 8, 2), 9 * 2 * 4 * 16),
        (layers.Conv2D(4, (1, 3), groups=2), (4, 4, 6), 3 * 3 * 4 * 4 * 2),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (5, 5, 3), 27 * 2 * 9),
        (layers.Dense(5), (7, 3), 3 * 5 * 7),
    ],
)
def test_each_layer(layer, shape, macs):
    model = keras.Sequential([keras.Input(shape), layer])
    assert count(model, convention="macs").inference_flops == macs


@pytest.mark.parametrize(
    "layer, shapes, products",
    [
        # 5 queries, 3 keys; 2 heads, each with keys of size 4 and values of 6.
        (
            layers.MultiHeadAttention(2, 4, value_dim=6),
            [(5, 8), (3, 8)],
            5 * 3 * 2 * (4 + 6),
        ),
        # Attention along axis 2 of a video of 7 frames.
        (
            layers.MultiHeadAttention(2, 4, attention_axes=2),
            [(7, 5, 8), (7, 3, 8)],
            7 * 5 * 3 * 2 * 8,
        ),
        # Attention over all places of images of 2 x 3 and 4 x 5.
        (
            layers.MultiHeadAttention(1, 4),
            [(2, 3, 8), (4, 5, 8)],
            6 * 20 * 8,
        ),
        # 4 heads of queries, which share 2 heads of keys.
        (
            layers.GroupQueryAttention(3, 4, 2),
            [(5, 8), (6, 8)],
            5 * 6 * 4 * (3 + 3),
        ),
    ],
)
def test_products_of_attention(layer, shapes, products):
    """Queries times keys and scores times values, besides the kernels."""
    inputs = [keras.Input(shape) for shape in shapes]
    layer.name = "attend"
    model = keras.Model(inputs, layer(*inputs))
    got = count(model, convention="macs")
    assert [layer.positions for layer in got.layers if not layer.shape] == [
        products
    ]
    assert got.layers[-1].name == "attend/products"
    assert not got.layers[-1].masked
    kernels = sum(
        math.prod(layer.shape) * layer.positions for layer in got.layers[:-1]
    )
    assert got.inference_flops == kernels + products
    # Masks do not change them.
    masked = count(sparsify(model, 0.25), convention="macs")
    assert masked.inference_flops == pytest.approx(
        kernels * 0.25 + products, rel=0.3
    )
    assert masked.layers[-1] == got.layers[-1]
    assert count(model).layers[-1].inference_flops == 2 * products


def test_shared_and_nested_layers_count_each_use():
    inputs = keras.Input((4,))
    shared = layers.Dense(4, name="shared")
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    model = keras.Model(inputs, inner(shared(shared(inputs))))
    got = count(model, convention="macs")
    assert [layer.positions for layer in got.layers] == [2, 1]
    assert got.inference_flops == 3 * 16


def test_counting_changes_nothing():
    model = compiled(sparsify(small_model(), 0.25))
    model.fit(*examples(), verbose=0)
    before = [v.numpy() for v in model.variables]
    calls = [vars(part).get("call") for part in model._flatten_layers()]
    first = count(model)
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, variable.numpy())
    assert calls == [vars(part).get("call") for part in model._flatten_layers()]
    assert count(model) == first


def test_counting_leaves_sparse_products_within_a_layer():
    """Attention still uses sparse products of its projections afterwards."""
    inputs = keras.Input((3, 8))
    attention = layers.MultiHeadAttention(2, 4, name="attend")
    model = keras.Model(inputs, attention(inputs, inputs))
    model = sparsify(model, 0.5, product="sparse")
    attend = model.get_layer("attend").layer
    within = [
        attend.query_dense,
        attend.key_dense,
        attend.value_dense,
        attend.output_dense,
    ]
    calls = [vars(inner).get("call") for inner in within]
    assert None not in calls
    count(model)
    assert calls == [vars(inner).get("call") for inner in within]


def test_what_is_not_counted_is_named():
    model = keras.Sequential(
        [keras.Input((4, 8, 3)), layers.ConvLSTM1D(4, 3, name="film")]
    )
    got = count(model)
    assert got.uncounted == (("film", "ConvLSTM1D"),)
    assert "not counted: film (ConvLSTM1D)" in str(got)


def test_errors():
    with pytest.raises(ValueError, match="convention must be one of"):
        count(small_model(), convention="flops")
    with pytest.raises(ValueError, match="built Keras model"):
        count(keras.Sequential([layers.Dense(3)]))
    free = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(1, 1)])
    with pytest.raises(ValueError, match="fixed shape"):
        count(free)


def test_training_flops_by_hand():
    cost = dict(sparse_flops=2.0, dense_flops=10.0)
    assert flops.training_flops("dense", **cost) == 30
    assert flops.training_flops("static", **cost) == 6
    assert flops.training_flops("SET", **cost) == 6
    # (6 x 9 + 4 + 10) / 10
    assert flops.training_flops("RigL", frequency=9, **cost) == 6.8
    with pytest.raises(ValueError, match="method must be"):
        flops.training_flops("prune", **cost)
    with pytest.raises(ValueError, match="frequency .*steps between"):
        flops.training_flops("rigl", **cost)


@pytest.mark.parametrize(
    "make, parameters",
    [
        (lambda: models.wide_resnet(22, 2), 1_079_642),
        (lambda: models.wide_resnet(10, 1, dropout=0.0), 77_850),
        (lambda: models.lenet5(), 61_706),
        (lambda: models.mlp(), 266_610),
    ],
)
def test_models(make, parameters):
    assert count(make()).parameters == parameters


@pytest.mark.parametrize("size", [8, 33, 64])
def test_wide_resnet_takes_any_size_from_8(size):
    model = models.wide_resnet(10, 1, 7, (size, size, 2))
    assert model(np.zeros((2, size, size, 2), np.float32)).shape == (2, 7)


def test_wide_resnet_is_the_reports():
    model = models.wide_resnet(22, 2)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            assert (layer.momentum, layer.epsilon) == (0.9, 1e-5)
        if isinstance(layer, layers.Conv2D):
            height, width, _, out = layer.kernel.shape
            wanted = np.sqrt(2 / (height * width * out))
            assert np.std(layer.kernel) == pytest.approx(wanted, rel=0.2)
            # One pixel on each side; `same` would pad only below and right.
            if layer.strides == (2, 2) and height == 3:
                pad = model.get_layer(f"{layer.name}_pad")
                assert pad.padding == ((1, 1), (1, 1))
                assert layer.padding == "valid"
    assert sum(isinstance(m, layers.Dropout) for m in model.layers) == 9


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: models.wide_resnet(depth=20), "depth 6 n . 4.*depth=20"),
        (lambda: models.wide_resnet(width=0), "width=0"),
        (lambda: models.wide_resnet(input_shape=(7, 7, 3)), "8 x 8"),
        (lambda: models.wide_resnet(dropout=1.0), "dropout"),
        (lambda: models.lenet5(input_shape=(8, 8, 1)), "12 x 12"),
        (lambda: models.lenet5(num_classes=0), "num_classes"),
        (lambda: models.mlp(hidden=(3, 0)), "at least one unit"),
    ],
)
def test_bad_models(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_frozen_layers_count():
    """The cost of inference does not depend on which layers are trained."""
    model = sparsify(small_model(), 0.25)
    want = count(model)
    model.get_layer("conv2").trainable = False
    got = count(model)
    assert (got.nonzeros, got.bits) == (want.nonzeros, want.bits)
    assert got == want


def test_counting_leaves_losses_alone():
    inputs = keras.Input((4,))
    dense = layers.Dense(3, activity_regularizer="l2", name="d")
    model = keras.Model(inputs, dense(inputs))
    for each in (model, sparsify(model, 0.5)):
        each(np.ones((2, 4), np.float32))
        before = [float(loss) for loss in each.losses]
        assert before[0] > 0
        count(each)
        assert [float(loss) for loss in each.losses] == before


@pytest.mark.parametrize("kind", [dict, list])
def test_several_inputs(kind):
    one, two = keras.Input((4,), name="one"), keras.Input((2,), name="two")
    outputs = layers.Dense(3)(layers.Concatenate()([one, two]))
    inputs = [one, two] if kind is list else {"one": one, "two": two}
    model = keras.Model(inputs, outputs)
    assert count(model, convention="macs").inference_flops == 18


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


def test_a_subclassed_model_is_counted_as_it_was_built():
    model = Subclassed()
    model(np.ones((1, 2), np.float32))
    (layer,) = count(model, convention="macs").layers
    assert layer.inference_flops == 2 * 3
    unknown = Subclassed()
    unknown.dense.build((None, 2))
    unknown.built = True
    with pytest.raises(ValueError, match="(?i)build it by model.build"):
        count(unknown)


def test_all_ones_need_no_bitmask():
    got = count(sparsify(small_model(), 1.0))
    assert got.density == 1.0
    assert got.bits == 32 * got.parameters == 32 * got.nonzeros
    assert got.inference_flops == got.dense_inference_flops


def test_flops_at_another_density():
    layer = count(small_model(), convention="macs").layers[0]
    assert layer.flops_at(0.5) == layer.dense_inference_flops / 2
    assert layer.flops_at(0.0) == 0


@pytest.mark.parametrize(
    "equation, output, shape, macs, additions",
    [
        ("abc,cd->abd", (7, 3), (7, 5), 7 * 5 * 3, 7 * 5),
        ("abc,cde->abde", (7, 2, 3), (7, 6), 7 * 6 * 2 * 3, 7 * 6),
        ("abcd,cde->abe", (7, 4), (7, 2, 3), 7 * 2 * 3 * 4, 7 * 6),
        ("...x,xy->...y", 4, (5, 7, 3), 35 * 12, 35 * 3),
        # `c` is summed in the input only; `d` is in input and kernel.
        ("abcd,de->abe", (7, 4), (7, 2, 3), 7 * 2 * 3 * 4, 7 * 2 * 3),
    ],
)
def test_einsum(equation, output, shape, macs, additions):
    axes = equation.split("->")[1]
    layer = layers.EinsumDense(equation, output, bias_axes=axes[-1])
    model = keras.Sequential([keras.Input(shape), layer])
    assert count(model, convention="macs").inference_flops == macs
    assert count(model).inference_flops == 2 * macs + additions


def test_sizes_by_hand():
    """6 of 24 weights and 4 biases: 10 values and their positions."""
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(4, name="d")(inputs))
    cost = count(sparsify(model, 0.25))
    assert cost.bits == 32 * 10 + 24
    # A column index for each weight, and 5 pointers for the 4 rows.
    assert cost.csr_bits == 32 * 10 + 32 * (6 + 5)
    dense = count(model)
    assert dense.bits == dense.csr_bits == 32 * 28
    assert "as CSR" in str(cost)


def test_a_curve_by_hand():
    """Two layers of 24 and 8 weights, dense 2 x 32, from 6 and 2 to 4 and 4."""
    inputs = keras.Input((6,))
    x = layers.Dense(4, name="a", use_bias=False)(inputs)
    outputs = layers.Dense(2, name="b", use_bias=False)(x)
    cost = count(sparsify(keras.Model(inputs, outputs), 0.25))
    run = [
        (10, {"a": 6, "b": 2}),
        (12, {"a": 4, "b": 4}),
        (13, {"a": 8, "b": 4}),
    ]
    curve = functools.partial(flops.training_curve, cost, run, steps=5)
    inference, training = curve(dense_gradients="updates")
    assert inference.tolist() == [16, 16, 16, 16, 24]
    assert training.tolist() == [48, 48, 32 + 64, 32 + 64, 72]
    _, training = curve(dense_gradients="never")
    assert training.tolist() == [48, 48, 48, 48, 72]
    _, training = curve(dense_gradients="always")
    assert training.tolist() == [96, 96, 96, 96, 112]


def test_an_update_at_the_first_step_counts():
    cost = count(sparsify(small_model(), 0.25))
    counts = {layer.name: 1 for layer in cost.layers}
    full = {layer.name: math.prod(layer.shape) for layer in cost.layers}
    inference, training = flops.training_curve(
        cost, [(0, full), (0, counts)], steps=2, dense_gradients="updates"
    )
    assert inference[0] == cost.dense_inference_flops > 2 * inference[1]
    assert training[0] == 3 * cost.dense_inference_flops


def test_bad_curves():
    cost = count(sparsify(small_model(), 0.25))
    good = dict(steps=3, dense_gradients="never")
    with pytest.raises(ValueError, match="dense_gradients must be"):
        flops.training_curve(cost, [(0, {})], steps=3, dense_gradients="yes")
    with pytest.raises(ValueError, match="Received an empty one"):
        flops.training_curve(cost, [], **good)
    with pytest.raises(ValueError, match="must increase"):
        flops.training_curve(cost, [(0, {}), (2, {}), (1, {})], **good)
    with pytest.raises(ValueError, match="the model lacks.*hiden"):
        flops.training_curve(cost, [(0, {"hiden": 3})], **good)


def test_every_method_of_the_report_has_a_closed_form():
    cost = dict(sparse_flops=2.0, dense_flops=10.0, frequency=9)
    for name in ("RigL", "RigL-SG", "RigL-SM"):
        assert flops.training_flops(name, **cost) == 6.8
    for name in ("SNFS", "MagnitudePruning", "magnitude_pruning"):
        assert flops.training_flops(name, **cost) == 14
    for name in ("static", "SET", "SNIP", "small-dense", "Small_Dense"):
        assert flops.training_flops(name, **cost) == 6


def test_closed_forms_of_newer_methods():
    cost = dict(sparse_flops=2.0, dense_flops=10.0, frequency=9)
    for name in ("GraNet", "SRigL", "GSE"):
        assert flops.training_flops(name, **cost) == 6.8
    for name in ("Top-KAST", "TopKAST", "SR-STE", "SRSTE"):
        assert flops.training_flops(name, **cost) == 14
    for name in ("MEST", "AC/DC", "ACDC", "GraSP", "SynFlow"):
        assert flops.training_flops(name, **cost) == 6
    # An update that computes at most twice as many gradients.
    cost["weight_gradient_flops"] = 4.0
    assert flops.training_flops("TopKAST", **cost) == 8
    assert flops.training_flops("GSE", **cost) == 6.2  # (6 x 9 + 8) / 10
    for beyond in (1.0, 11.0):
        cost["weight_gradient_flops"] = beyond
        with pytest.raises(ValueError, match="between sparse_flops and dense"):
            flops.training_flops("GSE", **cost)


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_masks_of_half_precision_are_counted_whole(policy):
    """A sum of ones in bfloat16 ends at 256."""
    inputs = keras.Input((512,))
    dense = layers.Dense(512, dtype=policy)(inputs)
    cost = count(sparsify(keras.Model(inputs, dense), 0.5))
    assert cost.density == 0.5


def test_steps_of_a_trajectory_do_not_go_back():
    cost = count(sparsify(small_model(), 0.25))
    with pytest.raises(ValueError, match="must increase"):
        flops.training_curve(
            cost, [(100, {}), (50, {})], steps=3, dense_gradients="never"
        )


@pytest.mark.parametrize(
    "shape, layer, rows",
    [
        ((8, 8, 16), lambda: layers.Conv2DTranspose(4, 3, use_bias=False), 4),
        (
            (8, 16),
            lambda: layers.EinsumDense("abc,cde->abde", (None, 4, 6)),
            24,
        ),
    ],
    ids=["transposed", "einsum"],
)
def test_rows_of_csr_are_output_units(shape, layer, rows):
    inputs = keras.Input(shape)
    model = sparsify(keras.Model(inputs, layer()(inputs)), 0.5)
    cost = count(model)
    (each,) = cost.layers
    assert cost.csr_bits == 32 * (2 * each.nonzeros + rows + 1)


def test_names_and_bad_costs_of_training():
    costs = dict(sparse_flops=1, dense_flops=5)
    for name in ("magnitude pruning", "SNFS-SG", "SNFS"):
        assert flops.training_flops(name, **costs) == 7
    with pytest.raises(ValueError, match="number of at least 0.*=-1"):
        flops.training_flops("SET", sparse_flops=-1, dense_flops=5)
    for batches in ("2", 1.5, 4):
        with pytest.raises(ValueError, match="int from 1 to frequency=3"):
            flops.training_flops(
                "RigL", **costs, frequency=3, gradient_batches=batches
            )
