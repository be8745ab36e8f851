"""Sparse products of layers within a masked one, and of einsum layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from rigl_keras import kernels
from rigl_keras.kernels.matrix_layers import matrix_of
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import choose_kernels, masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.stripping import strip
from rigl_keras.masking.tracing import dense_gradients
from rigl_keras.methods.rigl import RigL
from tests.support.sparse_products import assert_close


@pytest.fixture(autouse=True, scope="module")
def loaded():
    if kernels.load() is None:
        pytest.skip(f"no sparse kernels: {kernels.unavailable()}")


def normal(draw, *shape):
    return tf.constant(draw.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize(
    "equation, shape, outputs, matrix",
    [
        ("abc,cd->abd", (3, 4), (3, 6), ((4,), (6,))),
        ("abc,cde->abde", (3, 4), (3, 2, 5), ((4,), (2, 5))),
        ("abcd,cde->abe", (3, 2, 5), (3, 4), ((2, 5), (4,))),
        ("...x,xy->...y", (3, 4), (6,), ((4,), (6,))),
        ("ab,b->a", (4,), (), ((4,), ())),
        ("ab,cb->ac", (4,), (6,), None),
        ("abc,bd->acd", (3, 4), (4, 6), None),
        ("abc,bcd->abd", (3, 4), (3, 6), None),
        ("abc,cd->adb", (3, 4), (6, 3), None),
    ],
)
def test_which_equations_are_products_of_rows(equation, shape, outputs, matrix):
    layer = layers.EinsumDense(equation, outputs)
    layer.build((None, *shape))
    found = matrix_of(layer)
    assert (found and (found.inputs, found.outputs)) == matrix


def masked(layer, *shapes, product="sparse", density=0.4):
    """Returns a built masked layer, with masks that are drawn."""
    found = Masked(layer, product=product)
    found(*(tf.zeros((1, *shape)) for shape in shapes))
    draw = np.random.default_rng(5)
    for one in found.masked_kernels():
        one.assign_mask(draw.random(one.kernel.shape) < density)
    for weight in found.trainable_variables:
        if "bias" in weight.name:
            weight.assign(draw.standard_normal(weight.shape))
    found.forget_products()
    return found


CALLED = {
    "einsum": (
        lambda: layers.EinsumDense(
            "abc,cde->abde", (None, 2, 5), bias_axes="de", activation="tanh"
        ),
        [(3, 4)],
    ),
    "part of a bias": (
        lambda: layers.EinsumDense(
            "abc,cde->abde", (None, 2, 5), bias_axes="e"
        ),
        [(3, 4)],
    ),
    "of two axes": (
        lambda: layers.EinsumDense("abcd,cde->abe", (None, 4), bias_axes="e"),
        [(3, 2, 5)],
    ),
    "conv1d": (lambda: layers.Conv1D(5, 1, activation="relu"), [(7, 4)]),
    "conv1d of more": (
        lambda: layers.Conv1D(5, 3, strides=2, padding="same"),
        [(7, 4)],
    ),
    "conv1d in groups": (
        lambda: layers.Conv1D(6, 3, groups=2, activation="tanh"),
        [(8, 4)],
    ),
    "conv2d in groups": (
        lambda: layers.Conv2D(6, 3, strides=2, padding="same", groups=3),
        [(7, 5, 6)],
    ),
    "dilated": (lambda: layers.Conv1D(5, 3, dilation_rate=2), [(9, 4)]),
    "causal": (
        lambda: layers.Conv1D(5, 3, dilation_rate=2, padding="causal"),
        [(3, 4)],
    ),
    "transposed": (
        lambda: layers.Conv2DTranspose(
            5, (3, 2), strides=(2, 3), padding="same", activation="relu"
        ),
        [(4, 3, 6)],
    ),
    "transposed, padded": (
        lambda: layers.Conv2DTranspose(5, 2, strides=(1, 3), use_bias=False),
        [(4, 3, 6)],
    ),
    "separable": (
        lambda: layers.SeparableConv2D(
            5, 3, strides=2, depth_multiplier=2, activation="relu"
        ),
        [(7, 6, 4)],
    ),
    "separable1d": (
        lambda: layers.SeparableConv1D(5, 3, padding="same"),
        [(7, 4)],
    ),
    "attention": (lambda: layers.MultiHeadAttention(2, 3), [(5, 6), (4, 6)]),
    "grouped": (
        lambda: layers.GroupQueryAttention(3, 4, 2),
        [(5, 6), (4, 6)],
    ),
    "lstm": (lambda: layers.LSTM(3), [(5, 4)]),
    "gru": (lambda: layers.GRU(3, return_sequences=True), [(5, 4)]),
    "both directions": (
        lambda: layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
        [(5, 4)],
    ),
}
# The number of sparse products of each layer, and further kernels.
PRODUCTS = {"attention": 4, "grouped": 4, "lstm": 2, "gru": 2} | {
    "both directions": 4
}


def gradients(layer, inputs, *, dense):
    weights = [v.value for v in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        if dense:
            with dense_gradients():
                outputs = layer(*inputs)
        else:
            outputs = layer(*inputs)
        loss = tf.reduce_sum(tf.sin(outputs))
    return [outputs, *tape.gradient(loss, [*inputs, *weights])]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", CALLED)
def test_agree_with_dense_products(name, dense):
    make, shapes = CALLED[name]
    layer = masked(make(), *shapes)
    draw = np.random.default_rng(0)
    inputs = [normal(draw, 6, *shape) for shape in shapes]
    got = gradients(layer, inputs, dense=dense)
    products = [
        one.chosen_products()
        for one in layer.masked_kernels()
        if "depthwise" not in one.name
    ]
    assert len(products) == PRODUCTS.get(name, 1)
    for chosen in products:
        assert list(chosen.values())[-1].sparse
    layer.product = "dense"
    layer.forget_products()
    want = gradients(layer, inputs, dense=dense)
    assert not any(one.chosen_products() for one in layer.masked_kernels())
    for one, two in zip(got, want, strict=True):
        assert_close(one, two)
    for one in layer.masked_kernels():
        at = [v.path for v in layer.trainable_variables].index(one.kernel.path)
        gradient = got[1 + len(inputs) + at].numpy()
        assert gradient[one.mask.numpy() == 0].any() == dense


def test_transposed_convolutions_of_any_batch():
    make, shapes = CALLED["transposed"]
    layer = masked(make(), *shapes)
    run = tf.function(
        layer,
        input_signature=[tf.TensorSpec([None, 4, 3, 6])],
        autograph=False,
    )
    traced = run.get_concrete_function().structured_outputs
    assert traced.shape.as_list() == [None, 8, 9, 5]
    x = normal(np.random.default_rng(0), 2, *shapes[0])
    got = run(x)
    (chosen,) = layer.chosen_products().values()
    assert chosen.sparse
    assert_close(got, layer.layer(x))


def test_what_convolutions_have_no_sparse_product():
    for make, shape, why in (
        (
            lambda: layers.Conv2DTranspose(4, 3, strides=2, output_padding=1),
            (5, 5, 2),
            "it has an output_padding",
        ),
        (
            lambda: layers.Conv1DTranspose(4, 3),
            (5, 2),
            "no sparse kernels for Conv1DTranspose",
        ),
        (
            lambda: layers.Conv3D(4, 3),
            (5, 5, 5, 2),
            "no sparse kernels for Conv3D",
        ),
    ):
        layer = Masked(make(), product="sparse")
        layer.build((None, *shape))
        assert layer.why_dense() == why
        x = normal(np.random.default_rng(0), 2, *shape)
        assert_close(layer(x), layer.layer(x))


@pytest.mark.parametrize("name", ["attention", "lstm"])
def test_within_a_graph(name):
    make, shapes = CALLED[name]
    layer = masked(make(), *shapes)
    inputs = [normal(np.random.default_rng(0), 6, *s) for s in shapes]
    run = tf.function(layer, autograph=False)
    graph = run.get_concrete_function(*inputs).graph
    kinds = [op.type for op in graph.get_operations()]
    if name == "lstm":
        assert kinds.count("RiglKerasRecurrent") == 1
    else:
        assert kinds.count("RiglKerasMatMul") == 4
    assert_close(run(*inputs), layer(*inputs))


RECURRENT_FALL_BACK = {
    "relu": (lambda: layers.LSTM(3, activation="relu"), "not tanh"),
    "hard": (
        lambda: layers.GRU(3, recurrent_activation="hard_sigmoid"),
        "not sigmoid",
    ),
    "dropout": (lambda: layers.LSTM(3, dropout=0.5), "dropout"),
    "recurrent dropout": (
        lambda: layers.GRU(3, recurrent_dropout=0.5),
        "dropout",
    ),
    "reset before": (lambda: layers.GRU(3, reset_after=False), "reset_after"),
    "simple": (lambda: layers.SimpleRNN(3), "no sparse kernels for SimpleRNN"),
}


@pytest.mark.parametrize("name", RECURRENT_FALL_BACK)
def test_recurrent_layers_that_are_dense(name):
    make, why = RECURRENT_FALL_BACK[name]
    layer = masked(make(), (5, 4))
    assert why in kernels.layer_products.why_dense(layer.layer)
    x = normal(np.random.default_rng(0), 6, 5, 4)
    assert_close(layer(x), layer.layer(x))
    assert not any(one.chosen_products() for one in layer.masked_kernels())


def test_sequences_with_a_mask_are_dense():
    layer = masked(layers.LSTM(3), (5, 4))
    x = normal(np.random.default_rng(0), 2, 5, 4)
    kept = tf.constant([[True] * 5, [True, True, False, False, False]])
    got = layer(x, mask=kept)
    assert not any(one.chosen_products() for one in layer.masked_kernels())
    assert_close(got[1:], layer(x[1:, :2]))


def test_an_input_kernel_without_a_mask():
    """Its product is a dense one, before the operation."""
    for kind in (layers.LSTM, layers.GRU):
        plain = kind(3, go_backwards=True, return_sequences=True)
        layer = Masked(
            plain, kernels=["cell.recurrent_kernel"], product="sparse"
        )
        layer.build((None, 5, 4))
        (only,) = layer.masked_kernels()
        only.assign_mask(
            np.arange(np.prod(only.kernel.shape)).reshape(3, -1) % 2
        )
        x = normal(np.random.default_rng(0), 2, 5, 4)
        for dense in (False, True):
            got = gradients(layer, [x], dense=dense)
            (chosen,) = only.chosen_products().values()
            assert chosen.sparse
            layer.product = "dense"
            layer.forget_products()
            want = gradients(layer, [x], dense=dense)
            layer.product = "sparse"
            for one, two in zip(got, want, strict=True):
                assert_close(one, two)


def test_a_recurrent_kernel_without_a_mask():
    layer = Masked(layers.LSTM(3), kernels=["cell.kernel"], product="sparse")
    layer.build((None, 5, 4))
    x = normal(np.random.default_rng(0), 2, 5, 4)
    assert_close(layer(x), layer.layer(x))
    (only,) = layer.masked_kernels()
    assert only.chosen_products() == {}


def test_states_go_on():
    """A stateful layer keeps the states that the operation returns."""
    layer = Masked(layers.LSTM(3, stateful=True), product="sparse")
    x = normal(np.random.default_rng(0), 2, 6, 4)
    layer.build((2, 3, 4))
    layer(x[:, :3])
    halves = layer(x[:, 3:])
    layer.reset_state()
    assert_close(halves, layer(x))


def transformer():
    inputs = keras.Input((7, 8))
    x = layers.Dense(8, name="embed")(inputs)
    y = layers.MultiHeadAttention(2, 4, name="attend")(x, x)
    x = layers.LayerNormalization()(layers.Add()([x, y]))
    x = layers.LSTM(6, name="lstm")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="net")


@pytest.mark.slow
def test_trains_as_with_dense_products():
    """A transformer with an LSTM, and updates that grow by gradients."""
    draw = np.random.default_rng(0)
    data = (
        draw.standard_normal((64, 7, 8)).astype(np.float32),
        draw.integers(0, 3, 64),
    )
    losses, models = [], []
    for product in ("dense", "sparse"):
        keras.utils.set_random_seed(0)
        model = sparsify(transformer(), 0.4, product=product)
        model.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        history = model.fit(
            *data,
            batch_size=16,
            epochs=13,
            shuffle=False,
            callbacks=[RigL(frequency=5, end_step=40)],
            verbose=0,
        )
        losses.append(history.history["loss"])
        models.append(model)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    dense, sparse = (masked_layers(model).named for model in models)
    assert len(sparse) == 8
    for name, one in sparse.items():
        np.testing.assert_array_equal(one.mask, dense[name].mask)
        assert_close(one.kernel, dense[name].kernel)
        assert list(one.chosen_products().values())[-1].sparse
        assert dense[name].chosen_products() == {}
    table = str(masked_layers(models[1]))
    assert table.count("sparse: as asked") == 8


def test_stripped_and_asked_otherwise():
    model = sparsify(transformer(), 0.4, product="sparse")
    x = np.random.default_rng(0).standard_normal((4, 7, 8)).astype("f")
    want = model(x)
    named = masked_layers(model).named
    assert all(one.chosen_products() for one in named.values())
    choose_kernels(model, "dense")
    assert_close(model(x), want)
    assert not any(one.chosen_products() for one in named.values())
    plain = strip(model)
    assert_close(plain(x), want)
    for inner in ("attend", "lstm"):
        assert "inner_loop" not in vars(plain.get_layer(inner))
    attend = plain.get_layer("attend")
    assert "call" not in vars(attend._query_dense)


def test_saved_and_loaded(tmp_path):
    model = sparsify(transformer(), 0.4, product="sparse")
    x = np.random.default_rng(0).standard_normal((4, 7, 8)).astype("f")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(loaded(x), model(x))
    for one in masked_layers(loaded):
        assert one.chosen_products()


def test_auto_times_rows_of_any_length(monkeypatch, timed_kernels):
    """For an LSTM it times the whole sequence, with one kernel or both."""
    asked = []

    def choose(problem, density, *, backward, in_lanes):
        assert not in_lanes
        asked.append((problem, round(density, 2)))
        return kernels.Choice(True, "test")

    monkeypatch.setattr(kernels.choice, "choose", choose)
    layer = masked(layers.LSTM(3), (5, 4), product="auto")
    layer(tf.zeros((6, 5, 4)))
    problem, density = asked[-1]
    assert problem == kernels.Recurrence("lstm", (6, 5, 4), 3)
    ones = sum(np.sum(one.mask) for one in layer.masked_kernels())
    assert density == round(ones / 84, 2)
    layer = masked(layers.GRU(3, return_sequences=True), (5, 4), product="auto")
    layer(tf.zeros((6, 5, 4)))
    assert asked[-1][0] == kernels.Recurrence("gru", (6, 5, 4), 3, returns=True)
    layer = masked(layers.Dense(5), (3, 4), product="auto")
    layer.choose_product(tf.TensorShape((None, None, 4)))
    assert asked[-1][0].images == (128 * 64, 1, 1)
