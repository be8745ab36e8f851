"""Gradients at some entries of a kernel, and updates that use only these."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import rigl_keras
from rigl_keras import kernels
from rigl_keras.kernels import lane_operations, sparse_conv2d, sparse_dense
from rigl_keras.kernels.lane_operations import Lanes
from rigl_keras.kernels.operations import sparse_conv2d_transpose
from rigl_keras.kernels.place_operations import look_at, places_of, with_values
from rigl_keras.kernels.recurrent_operations import sparse_lstm
from rigl_keras.masking.kernel_part import KernelPart
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.training.optimizer_state import slots
from tests.support.sparse_products import assert_close

pytestmark = pytest.mark.skipif(
    kernels.load() is None, reason=f"no op library: {kernels.unavailable()}"
)
REFUSED = (tf.errors.InvalidArgumentError, ValueError)


def normal(*shape, seed=0):
    draw = np.random.default_rng(seed)
    return tf.constant(draw.standard_normal(shape, np.float32))


# Choice of places.


def test_places_by_hand():
    mask = tf.constant([[True, False, False], [False, True, False]])
    looked = look_at(mask, tf.constant([4, 2, 2], tf.int64))
    assert looked.numpy().tolist() == [[1, 0, 2], [0, 3, 0]]
    places = places_of(looked)
    assert places.numpy().tolist() == [0, 2, 4]
    dense = tf.reshape(tf.range(6.0), [2, 3])
    written = with_values(dense, places, tf.constant([7.0, 8.0, 9.0]))
    assert written.numpy().tolist() == [[7, 1, 8], [3, 9, 5]]
    bools = with_values(mask, places, tf.constant([False, True, True]))
    assert bools.numpy().tolist() == [[False, False, True], [False, True] + [0]]
    assert dense.numpy().ravel().tolist() == list(range(6))  # unchanged


def test_many_places():
    draw = np.random.default_rng(0)
    mask = draw.random((300, 777)) < 0.01
    drawn = draw.integers(mask.size, size=5_000)
    looked = look_at(tf.constant(mask), tf.constant(drawn))
    wanted = mask.ravel().astype(np.uint8)
    wanted[drawn] |= 2
    np.testing.assert_array_equal(looked.numpy().ravel(), wanted)
    np.testing.assert_array_equal(places_of(looked), np.flatnonzero(wanted))
    for nothing in (tf.zeros([0], tf.bool), tf.zeros([9, 9], tf.uint8)):
        assert places_of(nothing).shape == (0,)


@pytest.mark.parametrize("place", [-1, 6])
def test_places_outside(place):
    places = tf.constant([0, place], tf.int64)
    with pytest.raises(REFUSED, match=r"in \[0, 6\)"):
        look_at(tf.zeros([2, 3], tf.bool), places)
    with pytest.raises(REFUSED, match=r"in \[0, 6\)"):
        with_values(tf.zeros([2, 3]), places, tf.zeros([2]))
    with pytest.raises(REFUSED, match="each place must have a value"):
        with_values(tf.zeros([2, 3]), places[:1], tf.zeros([2]))


# Products with masks of bytes.


def test_a_matrix_by_hand():
    """Places to look at have no effect on outputs, but have gradients."""
    x, kernel = tf.constant([[1.0, 2.0, 3.0]]), tf.ones([3, 2])
    mask = tf.constant([[1, 0], [2, 3], [0, 0]], tf.uint8)
    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        y = sparse_dense(x, kernel, mask)
    assert y.numpy().tolist() == [[1, 2]]
    to_x, to_kernel = tape.gradient(
        y, [x, kernel], output_gradients=tf.constant([[5.0, 7.0]])
    )
    assert to_x.numpy().tolist() == [[5, 7, 0]]
    assert to_kernel.numpy().tolist() == [[5, 0], [10, 14], [0, 0]]


def conv_in_lanes(x, kernel, mask):
    lanes = lane_operations.to_lanes(x)
    outputs = lane_operations.conv2d(lanes.values, kernel, mask)
    return lane_operations.from_lanes(Lanes(outputs, lanes.count))


def conv(x, kernel):
    return tf.nn.conv2d(x, kernel, 1, "SAME")


IMAGES, KERNEL = (5, 4, 6, 8), (3, 3, 8, 8)
PRODUCTS = {
    "matrix": ((9, 20), (20, 12), sparse_dense, tf.matmul),
    "convolution": (IMAGES, KERNEL, sparse_conv2d, conv),
    "lanes": (IMAGES, KERNEL, conv_in_lanes, conv),
    "transposed": (
        IMAGES,
        KERNEL,
        lambda x, w, m: sparse_conv2d_transpose(x, w, m, sizes=IMAGES[1:3]),
        lambda x, w: tf.nn.conv2d_transpose(x, w, IMAGES, 1),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_gradients_are_those_that_are_looked_at(name):
    images, shape, product, dense = PRODUCTS[name]
    draw = np.random.default_rng(1)
    kept = tf.constant(draw.random(shape) < 0.2)
    drawn = tf.constant(draw.integers(kept.numpy().size, size=60))
    mask = look_at(kept, drawn)
    inside, seen = (tf.cast(m, tf.float32) for m in (kept, mask > 0))
    assert 0 < np.count_nonzero(seen - inside) < np.count_nonzero(seen)

    @tf.custom_gradient
    def masked(kernel):
        return kernel * inside, lambda upstream: upstream * seen

    found = []
    for multiply in (
        lambda x, kernel: product(x, kernel, mask),
        lambda x, kernel: dense(x, masked(kernel)),
    ):
        given = [normal(*images), normal(*shape, seed=1)]
        with tf.GradientTape() as second:
            second.watch(given)
            with tf.GradientTape() as first:
                first.watch(given)
                y = multiply(*given)
                loss = tf.reduce_sum(tf.sin(y))
            gradients = first.gradient(loss, given)
            steepness = tf.add_n([tf.reduce_sum(g**2) for g in gradients])
        found.append([y, *gradients, *second.gradient(steepness, given)])
    for one, two in zip(*found, strict=True):
        assert_close(one, two)


def test_a_recurrent_layer_looks():
    draw = np.random.default_rng(2)
    shapes = (6, 20), (5, 20)
    masks = [tf.constant(draw.random(shape) < 0.3) for shape in shapes]
    looked = [
        look_at(m, tf.constant(draw.integers(100, size=30))) for m in masks
    ]
    weights = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    found = []
    for given, dense in ((looked, False), (masks, True)):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            outputs, *_ = sparse_lstm(
                normal(3, 4, 6), tf.zeros([3, 5]), tf.zeros([3, 5]),
                weights[0], given[0], weights[1], given[1],
                dense_gradient=dense,
            )  # fmt: skip
            loss = tf.reduce_sum(outputs**2)
        found.append([outputs, *tape.gradient(loss, weights)])
    (y, *some), (same, *all_of_them) = found
    assert_close(y, same)
    for mask, one, two in zip(looked, some, all_of_them, strict=True):
        seen = tf.cast(mask > 0, tf.float32)
        assert_close(one, two * seen)
        assert np.count_nonzero(one) > np.count_nonzero(one * (mask != 2))


def test_the_array_of_a_gradient_is_cleared_for_the_next():
    """Masks share the array, so values of one must not remain for another."""
    x, kernel = normal(3, 40), normal(40, 30, seed=1)
    draw = np.random.default_rng(3)
    for density in (0.3, 0.1, 0.3):
        mask = tf.constant(draw.random((40, 30)) < density)
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            y = sparse_dense(x, kernel, mask)
        got = tape.gradient(y, kernel)
        wanted = tf.matmul(x, tf.ones_like(y), transpose_a=True)
        assert_close(got, wanted * tf.cast(mask, tf.float32))
        del got  # so that its memory is used again


# Updates.


def network(product, granularity="element"):
    """Returns a model of a few layers that may have sparse products."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 8)),
            layers.Conv2D(16, 3, use_bias=False, name="c"),
            layers.ReLU(name="r"),
            layers.Flatten(name="f"),
            layers.Dense(40, "relu", kernel_regularizer="l2", name="d"),
            layers.Dense(8, name="last"),
        ]
    )
    model = rigl_keras.sparsify(
        model,
        None if granularity == "2:4" else 0.2,
        product=product,
        granularity=granularity,
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


def trained(product, granularity="element", steps=1, method=None, **options):
    model = network(product, granularity)
    method = method or rigl_keras.GSE(
        frequency=2, end_step=99, drop_fraction=0.4, **options
    )
    model.compile(model.optimizer, "mse", steps_per_execution=steps)
    x, y = normal(40, 6, 6, 8).numpy(), normal(40, 8, seed=1).numpy()
    model.fit(
        x, y, batch_size=4, verbose=0, shuffle=False, callbacks=[method]
    )  # fmt: skip
    return model


CASES = {
    "element": ("element", {}),
    "in blocks of steps": ("element", {"steps": 2}),
    "kernel": ({"c": "kernel"}, {}),
    "2:4": ("2:4", {}),
    "after the step": (
        "element",
        {"conventions": rigl_keras.Conventions(update_replaces_step=False)},
    ),
    "REPORT": ("element", {"conventions": rigl_keras.REPORT}),
}


@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_of_dense_gradients(case, monkeypatch):
    granularity, options = CASES[case]
    looked = []

    def seen(method, layer, step):
        looked.append(own(method, layer, step))
        return looked[-1]

    own = rigl_keras.GSE.looks_at
    monkeypatch.setattr(rigl_keras.GSE, "looks_at", seen)
    sparse = masked_layers(trained("sparse", granularity, **options))
    assert len(looked) == 3 and None not in looked
    dense = masked_layers(trained("dense", granularity, **options))
    assert len(looked) == 3  # dense products have every gradient
    first = masked_layers(network("dense", granularity))
    for one, two, before in zip(sparse, dense, first, strict=True):
        np.testing.assert_array_equal(one.mask.numpy(), two.mask.numpy())
        assert (one.mask.numpy() != before.mask.numpy()).any()
        assert not one.kernel.numpy()[~one.mask.numpy()].any()
        assert_close(one.kernel.numpy(), two.kernel.numpy())


class Child(rigl_keras.GSE):
    """Grows by all gradients that exist."""

    def grow_scores(self, layer, gradient, step):
        return tf.abs(gradient)


def test_a_child_that_reads_elsewhere_has_every_gradient():
    def method(kind):
        return kind(frequency=2, end_step=99, drop_fraction=0.4)

    child = masked_layers(trained("sparse", method=method(Child)))
    rigl = masked_layers(
        trained(
            "dense",
            method=rigl_keras.RigL(frequency=2, end_step=99, drop_fraction=0.4),
        )
    )
    for one, two in zip(child, rigl, strict=True):
        np.testing.assert_array_equal(one.mask.numpy(), two.mask.numpy())


def test_a_part_stands_for_the_whole():
    """The example of `test_gse_grows_within_its_subset`, with six places."""
    found = []
    for whole in (True, False):
        model = network("dense")
        (*_, layer) = masked_layers(model)
        size = int(np.prod(layer.kernel.shape))
        values = np.zeros(size, np.float32)
        values[:4] = [4, 3, 2, 1]
        layer.assign_mask((values > 0).reshape(layer.kernel.shape))
        layer.kernel.assign(values.reshape(layer.kernel.shape))
        method = Drawn(frequency=1, end_step=99, decay="constant",
                       drop_fraction=0.5)  # fmt: skip
        method.attach(model, model.optimizer)
        method._plan(0, 1, 100)
        memory = slots(model.optimizer, layer.kernel)["momentum"]
        memory.assign(tf.ones_like(memory.value))
        gradient = np.zeros(size, np.float32)
        gradient[[5, 6, 7]] = [1, 7, 9]
        gradient = tf.reshape(gradient, layer.kernel.shape)
        step = tf.constant(50, tf.int64)
        part = layer
        if not whole:
            part = KernelPart(layer, places_of(method.looks_at(layer, step)))
            assert part.places.numpy().tolist() == [0, 1, 2, 3, 5, 6]
            gradient = part.of(gradient)
        method.change_masks(model.optimizer, [part], [gradient], step)
        mask, kernel, kept = (
            v.numpy().ravel() for v in (layer.mask, layer.kernel, memory)
        )
        assert np.flatnonzero(mask).tolist() == [0, 1, 5, 6]
        assert kernel[:8].tolist() == [4, 3, 0, 0, 0, 0, 0, 0]
        found.append(kept[[0, 1, 2, 3, 5, 6]].tolist())
    assert found == [[1, 1, 0, 0, 0, 0]] * 2


class Drawn(rigl_keras.GSE):
    """Looks at entries 5 and 6, and at two active ones."""

    def positions(self, layer, step):
        return tf.constant([5, 6, 0, 5], tf.int64)
