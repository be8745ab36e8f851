"""Calls of the C++ operations: changes of masks, graphs, threads and errors."""

import concurrent.futures
import itertools

import numpy as np
import pytest
import tensorflow as tf
from support.convolutions import (
    assert_close,
    mask_of,
    normal,
    passes,
    reference,
    wanted,
)

from rigl_keras import kernels
from rigl_keras.kernels import library
from rigl_keras.kernels.operations import sparse_conv2d


@pytest.fixture(autouse=True, scope="module")
def loaded():
    if kernels.load() is None:
        pytest.skip(f"no sparse kernels: {kernels.unavailable()}")


# Changes of masks.


def a_layer(seed=0, density=0.3):
    draw = np.random.default_rng(seed)
    return (
        tf.constant(normal(draw, 3, 6, 5, 7)),
        tf.constant(normal(draw, 3, 3, 7, 9)),
        tf.Variable(mask_of(draw, (3, 3, 7, 9), density)),
    )


def all_passes(images, kernel, mask):
    return passes(
        lambda images, kernel: sparse_conv2d(images, kernel, mask),
        images,
        kernel,
    )


def assert_follows(run, images, kernel, mask):
    got = run(images, kernel)
    want = wanted(images, kernel, mask.numpy())
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("traced", [True, False])
def test_a_mask_that_is_assigned(traced):
    images, kernel, mask = a_layer()

    def run(images, kernel):
        return all_passes(images, kernel, mask)

    if traced:
        run = tf.function(run)
    draw = np.random.default_rng(1)
    for density in (0.3, 0.3, 0.0, 0.6, 1.0, 0.1):
        mask.assign(mask_of(draw, mask.shape, density))
        for _ in range(2):
            assert_follows(run, images, kernel, mask)
        mask.assign(mask.numpy())  # the same
        assert_follows(run, images, kernel, mask)
        mask.assign(mask)
        assert_follows(run, images, kernel, mask)


@pytest.mark.parametrize("traced", [True, False])
def test_a_mask_that_is_assigned_in_part(traced):
    images, kernel, mask = a_layer()

    def run(images, kernel):
        return all_passes(images, kernel, mask)

    if traced:
        run = tf.function(run)
    assert_follows(run, images, kernel, mask)
    mask[1, 1].assign(1 - mask[1, 1])
    assert_follows(run, images, kernel, mask)
    mask.scatter_nd_update([[0, 0, 1, 2], [2, 2, 6, 8]], [1.0, 1.0])
    assert_follows(run, images, kernel, mask)
    mask.assign_add(1 - mask)
    assert mask.numpy().all()
    assert_follows(run, images, kernel, mask)
    mask.assign_sub(mask)
    assert not mask.numpy().any()
    assert_follows(run, images, kernel, mask)


def test_a_mask_that_is_assigned_between_two_products():
    """Within one call, neither product may use the plan of the other."""
    images, kernel, mask = a_layer()
    draw = np.random.default_rng(1)
    masks = tf.constant(
        np.stack([mask_of(draw, mask.shape, 0.3) for _ in range(5)])
    )

    @tf.function
    def run():
        found = tf.TensorArray(tf.float32, len(masks))
        for i in tf.range(len(masks)):
            mask.assign(masks[i])
            found = found.write(i, sparse_conv2d(images, kernel, mask))
        return found.stack()

    for _ in range(2):
        for got, each in zip(run(), masks, strict=True):
            assert_close(got, wanted(images, kernel, each.numpy())[0])


def test_masks_that_take_turns():
    images, kernel, one = a_layer()
    two = tf.Variable(1 - one)
    run = tf.function(lambda mask: sparse_conv2d(images, kernel, mask))
    want = [wanted(images, kernel, m.numpy())[0] for m in (one, two)]
    for _ in range(3):
        for i, mask in enumerate((one, two)):
            assert_close(run(tf.convert_to_tensor(mask)), want[i])
            assert_close(sparse_conv2d(images, kernel, mask), want[i])


def test_masks_that_are_parts_of_one_tensor():
    """TensorFlow does not copy such parts; they share a buffer."""
    draw = np.random.default_rng(0)
    inputs, kernel = normal(draw, 3, 16), normal(draw, 16, 16)
    masks = tf.constant(mask_of(draw, (2, 16, 16), 0.3))
    run = tf.function(lambda mask: kernels.sparse_dense(inputs, kernel, mask))
    part = tf.function(lambda i: kernels.sparse_dense(inputs, kernel, masks[i]))
    want = [np.float64(inputs) @ (kernel * mask) for mask in masks]
    for _ in range(2):
        for i in range(2):
            assert_close(run(masks[i]), want[i])
            assert_close(part(tf.constant(i)), want[i])
            assert_close(
                kernels.sparse_dense(inputs, kernel, masks[i]), want[i]
            )


def test_more_masks_than_are_remembered():
    draw = np.random.default_rng(1)
    inputs, kernel = normal(draw, 2, 6), normal(draw, 6, 5)
    masks = [tf.constant(mask_of(draw, (6, 5), 0.3)) for _ in range(300)]
    made = int(library.load().rigl_keras_plans_made())
    for _ in range(2):
        for mask in masks:
            got = kernels.sparse_dense(inputs, kernel, mask)
            assert_close(got, np.float64(inputs) @ (kernel * mask))
    # The first plans are dropped before they are used again, like all others.
    assert int(library.load().rigl_keras_plans_made()) == made + 600


@pytest.mark.parametrize("product", [sparse_conv2d, kernels.sparse_dense])
def test_a_mask_that_stays_is_planned_once(product):
    inputs, kernel, mask = a_layer()
    if product is kernels.sparse_dense:
        kernel, mask = kernel[0, 0], mask[0, 0]
    mask = tf.Variable(mask)
    run = tf.function(lambda: product(inputs, kernel, mask))
    count = library.load().rigl_keras_plans_made

    def made(*, assigned):
        before = int(count())
        for _ in range(5):
            if assigned:
                mask.assign(tf.ones_like(mask))
            run()
        return int(count()) - before

    run()
    assert made(assigned=False) == 0
    assert made(assigned=True) == 5


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, 1e9])
def test_what_is_removed_does_not_leak(spoilt):
    images, kernel, mask = a_layer()
    kept = mask.numpy() > 0
    other = tf.constant(np.where(kept, kernel, np.float32(spoilt)))
    for ours, theirs in zip(
        all_passes(images, other, mask),
        all_passes(images, kernel, mask),
        strict=True,
    ):
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours, theirs)


# Ways to call them.


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_sizes_that_are_not_known(strides):
    _, kernel, mask = a_layer()

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 7])])
    def run(images):
        def product(images, kernel):
            outputs = sparse_conv2d(images, kernel, mask, strides=strides)
            assert outputs.shape.as_list() == [None, None, None, 9]
            return outputs

        return passes(product, images, kernel)

    draw = np.random.default_rng(0)
    for shape in ((1, 4, 5), (17, 4, 5), (2, 9, 3), (0, 4, 5), (1, 4, 5)):
        images = normal(draw, *shape, 7)
        want = wanted(images, kernel, mask.numpy(), strides=strides)
        for ours, theirs in zip(run(images), want, strict=True):
            assert_close(ours, theirs)


def test_within_a_loop():
    """The same layer three times, and the gradient through all calls."""
    draw = np.random.default_rng(0)
    images = tf.constant(normal(draw, 2, 5, 5, 6))
    kernel = tf.constant(normal(draw, 3, 3, 6, 6))
    mask = tf.Variable(mask_of(draw, kernel.shape, 0.3))

    @tf.function
    def run(images, kernel):
        def thrice(images, kernel):
            return tf.while_loop(
                lambda i, x: i < 3,
                lambda i, x: (i + 1, sparse_conv2d(x, kernel, mask)),
                (0, images),
            )[1]

        return passes(thrice, images, kernel)

    def unrolled(x, kernel):
        for _ in range(3):
            x = reference(x, kernel * tf.cast(mask, tf.float64))
        return x

    want = passes(
        unrolled, tf.cast(images, tf.float64), tf.cast(kernel, tf.float64)
    )
    for ours, theirs in zip(run(images, kernel), want, strict=True):
        assert_close(ours, theirs)


def test_several_threads_at_once():
    _, kernel, mask = a_layer()
    run = tf.function(
        lambda images: all_passes(images, kernel, mask), reduce_retracing=True
    )
    draw = np.random.default_rng(0)
    batches = [normal(draw, batch, 6, 5, 7) for batch in range(1, 25)]
    first = [[t.numpy() for t in run(images)] for images in batches]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        again = list(pool.map(run, batches * 4))
    for got, want in zip(again, itertools.cycle(first)):
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_several_threads_while_the_mask_changes():
    """Each result belongs to one of the masks, never to a mixture."""
    images, kernel, mask = a_layer()
    run = tf.function(lambda: sparse_conv2d(images, kernel, mask))
    masks = [mask.numpy(), 1 - mask.numpy()]
    want = []
    for each in masks:
        mask.assign(each)
        want.append(run().numpy())

    def call(i):
        mask.assign(masks[i % 2])
        return run().numpy()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got in pool.map(call, range(200)):
            assert any((got == each).all() for each in want)


def test_in_the_input_pipeline():
    images, kernel, mask = a_layer()
    data = tf.data.Dataset.from_tensor_slices(images).batch(2)
    data = data.map(
        lambda images: sparse_conv2d(images, kernel, mask),
        num_parallel_calls=2,
    )
    got = np.concatenate([batch.numpy() for batch in data])
    assert_close(got, reference(images, kernel * mask))


def test_the_same_twice():
    """Results have the same bits, whichever thread computes which part."""
    draw = np.random.default_rng(0)
    images = tf.constant(normal(draw, 40, 12, 12, 20))
    kernel = tf.constant(normal(draw, 3, 3, 20, 40))
    mask = tf.constant(mask_of(draw, kernel.shape, 0.2))
    first = all_passes(images, kernel, mask)
    for _ in range(5):
        for ours, theirs in zip(
            all_passes(images, kernel, mask), first, strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_the_first_call_may_be_traced(monkeypatch, caplog):
    """AutoGraph does not warn about loading the library."""
    images, kernel, mask = a_layer()
    monkeypatch.setattr(library, "_module", None)
    traced = tf.function(lambda: sparse_conv2d(images, kernel, mask))
    assert traced().shape == (3, 6, 5, 9)
    assert "AutoGraph" not in caplog.text


# What is refused.

X = np.zeros((2, 4, 4, 3), np.float32)
W = np.zeros((3, 3, 3, 5), np.float32)


@pytest.mark.parametrize(
    "images, kernel, mask, words",
    [
        (X, W, W[:2], r"mask must have shape \[3,3,3,5\].*\[2,3,3,5\]"),
        (X[..., :2], W, W, "takes 3 channels and the images have 2"),
        (X[0], W, W, r"images must be \[batch.*\[4,4,3\]"),
        (X, W[0], W[0], r"kernels \[rows, columns, in, out\].*\[3,3,5\]"),
    ],
)
def test_shapes_that_do_not_fit(images, kernel, mask, words):
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        sparse_conv2d(images, kernel, mask)
    # With unknown shapes.
    any_shape = [tf.TensorSpec(None)] * 3
    run = tf.function(sparse_conv2d, input_signature=any_shape)
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        run(images, kernel, mask)


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (2, 2, 8, 5)])
def test_gradients_of_a_shape_that_does_not_fit(shape):
    """The same number of elements in another shape does not fit either."""
    received = ",".join(map(str, shape))
    words = rf"out_backprop must have shape \[2,4,4,5\].*\[{received}\]"
    options = dict(strides=[1, 1, 1, 1], padding="SAME")
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        library.load().rigl_keras_conv2d_backprop_filter(
            input=X, mask=W, out_backprop=np.zeros(shape, "f"), **options
        )
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        library.load().rigl_keras_conv2d_backprop_input(
            out_backprop=np.zeros(shape, "f"),
            filter=W,
            mask=W,
            input_sizes=X.shape,
            **options,
        )


@pytest.mark.parametrize(
    "options",
    [dict(strides=(0, 1)), dict(dilations=(1, -1)), dict(strides=(1, 1, 1))],
)
def test_strides_and_dilations_that_do_not_fit(options):
    with pytest.raises(tf.errors.InvalidArgumentError, match="strides and di"):
        sparse_conv2d(X, W, W, **options)


def test_without_a_library(monkeypatch):
    monkeypatch.setattr(library, "_module", None)
    monkeypatch.setattr(library, "_reason", "there is no compiler")
    with pytest.raises(RuntimeError, match="available: there is no compiler"):
        sparse_conv2d(X, W, W)
