"""At inference kernels are not multiplied by masks, but stay masked."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.small_models import compiled

from rigl_keras import kernels
from rigl_keras.kernels import library
from rigl_keras.masking import kernel_mask
from rigl_keras.masking.masked_layers import choose_kernels, masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.stripping import strip
from rigl_keras.masking.tracing import dense_gradients


@pytest.fixture(autouse=True)
def loaded():
    if library.load() is None:
        pytest.skip(f"no sparse kernels: {library.unavailable()}")


def model_of(product="auto", **options):
    """Returns a model of two large kernels and a small one."""
    keras.utils.set_random_seed(0)
    dense = keras.Sequential(
        [
            keras.Input((6, 6, 32)),
            layers.Conv2D(64, 3, padding="same", name="conv"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(8, name="wide"),
            layers.Dense(3, name="small"),
        ],
        name="net",
    )
    return compiled(sparsify(dense, 0.2, product=product), **options)


def data(count=8):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((count, 6, 6, 32)).astype(np.float32)
    return x, draw.integers(0, 3, count)


def memory(tensor):
    return np.asarray(memoryview(tensor)).__array_interface__["data"]


# The operation.


@pytest.fixture
def pair():
    draw = np.random.default_rng(0)
    mask = draw.random((300, 400)) < 0.3
    kernel = draw.standard_normal((300, 400)).astype(np.float32) * mask
    return tf.Variable(kernel), tf.Variable(mask)


def within(kernel, mask):
    return np.where(mask, kernel, 0.0)


@tf.function
def in_graph(kernel, mask):
    return kernels.masked_kernel(kernel, mask)


WAYS = {"eager": kernels.masked_kernel, "graph": in_graph}
ways = pytest.mark.parametrize("product", WAYS.values(), ids=WAYS)


@ways
def test_a_masked_kernel_is_the_product(pair, product):
    kernel, mask = pair
    for _ in range(2):
        value = tf.convert_to_tensor(kernel)
        assert memory(product(value, mask)) == memory(value)


@ways
def test_what_lies_outside_is_removed(pair, product):
    kernel, mask = pair
    kernel.assign(tf.random.stateless_normal(kernel.shape, (1, 2)))
    want = within(kernel, mask)
    first, second = product(kernel, mask), product(kernel, mask)
    np.testing.assert_array_equal(first, want)
    assert memory(first) == memory(second)  # the product was kept


@ways
@pytest.mark.parametrize("where", [(0, 0), (150, 200), (299, 399)])
@pytest.mark.parametrize("value", [1.0, -1e-30, np.nan, np.inf])
def test_one_weight_outside_is_enough(pair, product, where, value):
    kernel, mask = pair
    mask.assign(tf.tensor_scatter_nd_update(mask, [where], [False]))
    kernel.assign(within(kernel, mask))
    product(kernel, mask)
    kernel.assign(tf.tensor_scatter_nd_update(kernel, [where], [value]))
    np.testing.assert_array_equal(product(kernel, mask), within(kernel, mask))


CHANGES = {
    "assign": lambda kernel: kernel.assign(tf.ones(kernel.shape)),
    "add": lambda kernel: kernel.assign_add(tf.ones(kernel.shape)),
    "in place": lambda kernel: tf.raw_ops.ResourceApplyGradientDescent(
        var=kernel.handle, alpha=1.0, delta=tf.ones(kernel.shape)
    ),
    "a row": lambda kernel: kernel.scatter_nd_update([[7]], tf.ones((1, 400))),
    "a part": lambda kernel: kernel[3:5].assign(tf.ones((2, 400))),
}


@ways
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_kernel_is_seen(pair, product, change):
    kernel, mask = pair
    for _ in range(3):
        product(kernel, mask)
    before = kernel.numpy()
    CHANGES[change](kernel)
    assert (kernel.numpy() != before).any()
    np.testing.assert_array_equal(product(kernel, mask), within(kernel, mask))


@ways
def test_every_change_of_the_mask_is_seen(pair, product):
    kernel, mask = pair
    product(kernel, mask)
    for value in (False, True, False):
        mask.assign(tf.fill(mask.shape, value))
        np.testing.assert_array_equal(
            product(kernel, mask), within(kernel, mask)
        )


def test_many_kernels_share_an_operation(pair):
    """All layers of an eager model share it."""
    _, mask = pair
    every = [tf.fill(mask.shape, float(i)) for i in range(300)]
    for _ in range(2):
        for i, kernel in enumerate(every):
            got = kernels.masked_kernel(kernel, mask)
            assert float(tf.reduce_max(got)) == i


@ways
def test_gradients_are_masked(pair, product):
    kernel, mask = pair
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_sum(product(kernel, mask) ** 2)
        gradient = tape.gradient(loss, kernel)
        total = tf.reduce_sum(gradient)
    np.testing.assert_allclose(gradient, 2 * within(kernel, mask))
    np.testing.assert_allclose(tape.gradient(total, kernel), within(2.0, mask))


def test_float_masks_of_earlier_graphs_are_taken(pair):
    kernel, mask = pair
    kernel.assign(tf.ones(kernel.shape))
    got = kernels.masked_kernel(kernel, tf.cast(mask, tf.float32))
    np.testing.assert_array_equal(got, within(kernel, mask))


def test_shapes_must_agree(pair):
    kernel, mask = pair
    with pytest.raises(tf.errors.InvalidArgumentError, match="its kernel's"):
        kernels.masked_kernel(kernel, mask[:-1])
    with pytest.raises(ValueError, match="must be equal"):
        in_graph(kernel, mask[:-1])


# Models.


@pytest.fixture
def multiplied(monkeypatch):
    """Returns the names of kernels that are multiplied by masks."""
    names = []
    product = kernel_mask.product

    def noted(kernel, mask):
        names.append(tuple(kernel.shape))
        return product(kernel, mask)

    monkeypatch.setattr(kernel_mask, "product", noted)
    return names


SMALL = (8, 3)
EVERY = [(3, 3, 32, 64), (2304, 8), SMALL]


def operations(function):
    graph = function.get_concrete_function(
        tf.TensorSpec((None, 6, 6, 32), tf.float32)
    ).graph
    kinds = [operation.type for operation in graph.get_operations()]
    return {
        kind: kinds.count(kind)
        for kind in ("SelectV2", "RiglKerasMaskedKernel")
    }


def step_of(model, training=None):
    """Returns a graph like that of `predict`, with the same function name."""

    def one_step_on_data(x):
        return model(x, training=training)

    return tf.function(one_step_on_data, autograph=False)


@pytest.mark.parametrize("training", [None, False])
def test_a_step_of_inference_has_no_products(training):
    model = model_of()
    bare = operations(step_of(strip(model)))
    # Only the small kernel is multiplied, which takes no time.
    assert operations(step_of(model, training)) == {
        "SelectV2": bare["SelectV2"] + 1,
        "RiglKerasMaskedKernel": 2,
    }
    choose_kernels(model, "dense")  # TensorFlow's own operations
    assert operations(step_of(model, training)) == {
        "SelectV2": bare["SelectV2"] + 3,
        "RiglKerasMaskedKernel": 0,
    }


def test_a_graph_of_a_user_needs_no_library():
    model = model_of()
    call = tf.function(lambda x: model(x, training=False), autograph=False)
    assert operations(call)["RiglKerasMaskedKernel"] == 0


def test_outputs_are_the_same_to_the_bit():
    x, y = data()
    model, usual = model_of(), model_of("dense")
    for run in (
        lambda model: model(x),
        lambda model: model.predict(x, verbose=0),
        lambda model: model.predict_on_batch(x),
        lambda model: model.test_on_batch(x, y),
        lambda model: model.evaluate(x, y, batch_size=4, verbose=0),
    ):
        np.testing.assert_array_equal(run(model), run(usual))


def test_where_products_are_made(multiplied):
    x, y = data()
    model = model_of()
    for run in (
        lambda: model(x),
        lambda: model.predict(x, verbose=0),
        lambda: model.evaluate(x, y, verbose=0),
    ):
        run()
        assert set(multiplied) == {SMALL}
        multiplied.clear()
    model.train_on_batch(x, y)
    assert set(multiplied) == set(EVERY)


@pytest.mark.parametrize("training", [None, False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_within_a_tape(multiplied, training, dense):
    """Under a tape, kernels are multiplied by masks in any mode."""
    x, _ = data()
    model = model_of()
    with tf.GradientTape() as tape:
        if dense:
            with dense_gradients():
                loss = tf.reduce_sum(model(x, training=training))
        else:
            loss = tf.reduce_sum(model(x, training=training))
    assert multiplied == EVERY
    found = [layer.kernel.value for layer in masked_layers(model)]
    for layer, gradient in zip(
        masked_layers(model), tape.gradient(loss, found), strict=True
    ):
        outside = gradient.numpy()[layer.mask.numpy() == 0]
        # A small kernel is dense.
        assert outside.any() == (dense and outside.size > 0)


def test_a_graph_that_was_traced_for_inference_is_differentiated():
    x, _ = data()
    model = model_of()
    call = step_of(model, training=False)
    call(tf.constant(x))
    found = [layer.kernel.value for layer in masked_layers(model)]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(call(tf.constant(x)))
    got = tape.gradient(loss, found)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=False))
    for ours, theirs in zip(got, tape.gradient(loss, found), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_whatever_is_assigned_is_masked():
    """Optimizers apply constraints, but a user's `assign` does not."""
    x, _ = data()
    model, usual = model_of(), model_of("dense")
    predict = step_of(model, training=False)
    for seed in range(2):
        draw = np.random.default_rng(seed)
        for one in (model, usual):
            draw = np.random.default_rng(seed)
            one.get_layer("conv").kernel.assign(
                draw.standard_normal((3, 3, 32, 64))
            )
            one.get_layer("wide").mask.assign(draw.random((2304, 8)) < 0.5)
        want = usual(x)
        np.testing.assert_array_equal(model(x), want)
        np.testing.assert_array_equal(model.predict(x, verbose=0), want)
        np.testing.assert_allclose(
            predict(tf.constant(x)), want, rtol=1e-5, atol=1e-5
        )


def test_training_goes_on_as_if_nothing_had_been_predicted():
    x, y = data(16)
    weights = []
    for predicts in (False, True):
        model = model_of()
        for _ in range(4):
            if predicts:
                model(x)
                model.predict(x, verbose=0)
            model.train_on_batch(x, y)
        weights.append([w.numpy() for w in model.weights])
        want = strip(model)(x)
        np.testing.assert_array_equal(model(x), want)
        np.testing.assert_array_equal(model.predict(x, verbose=0), want)
    for one, two in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, two)


def test_xla_has_products(multiplied):
    x, _ = data()
    model = model_of(jit_compile=True)
    got = model.predict(x, verbose=0)
    assert multiplied == EVERY
    np.testing.assert_allclose(got, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_other_precisions(policy):
    keras.utils.set_random_seed(0)
    dense = keras.Sequential(
        [keras.Input((128,)), layers.Dense(160, dtype=policy)]
    )
    model = sparsify(dense, 0.2)
    x = np.random.default_rng(0).standard_normal((4, 128))
    got = model(x).numpy()
    choose_kernels(model, "dense")
    np.testing.assert_array_equal(got, model(x))


def test_without_the_library(monkeypatch, multiplied):
    model, (x, _) = model_of(), data()
    want = model(x)
    monkeypatch.setattr(library, "_module", None)
    monkeypatch.setattr(library, "_reason", "there is no compiler")
    multiplied.clear()
    np.testing.assert_array_equal(model(x), want)
    assert multiplied == EVERY
