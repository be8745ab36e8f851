"""The C++ operations: their results, by hand and against dense TensorFlow."""

import os
import pathlib
import platform
import subprocess
import sys

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

HERE = pathlib.Path(__file__).parent


@pytest.fixture(autouse=True, scope="module")
def loaded():
    if kernels.load() is None:
        pytest.skip(f"no sparse kernels: {kernels.unavailable()}")


BATCHES = (1, 2, 3, 8, 15, 16, 17, 33, 100, 130)


def drawn(seed):
    """Returns images, a kernel, its mask and the options of a convolution."""
    draw = np.random.default_rng(seed)
    while True:
        positions = draw.integers(1, 6, 2)
        strides, dilations = draw.integers(1, 4, (2, 2))
        padding = str(draw.choice(["SAME", "VALID"]))
        least = 1
        if padding == "VALID":
            least = (positions - 1) * dilations + 1
        lengths = least + draw.integers(0, 18, 2)
        batch = draw.choice(BATCHES)
        channels, filters = draw.integers(1, 51, 2)
        shape = (*positions, channels, filters)
        if np.prod(shape) * batch * np.prod(lengths // strides + 1) < 5e7:
            break
    return (
        normal(draw, batch, *lengths, channels),
        normal(draw, *shape),
        mask_of(draw, shape, draw.choice([0, None, 0.1, 0.5, 1])),
        dict(
            strides=strides.tolist(),
            padding=padding,
            dilations=dilations.tolist(),
        ),
    )


def compare(images, kernel, mask, options):
    """Compares the forward and the backward pass with dense products."""
    outputs, to_images, to_kernel = wanted(images, kernel, mask, **options)
    got = passes(
        lambda images, kernel: sparse_conv2d(images, kernel, mask, **options),
        tf.constant(images),
        tf.constant(kernel),
    )
    assert_close(got[0], outputs)
    assert_close(got[1], to_images)
    assert_close(got[2], to_kernel)
    assert not got[2].numpy()[mask == 0].any()


# Results by hand.

NINE = np.arange(1, 10, dtype=np.float32).reshape(1, 3, 3, 1)


@pytest.mark.parametrize(
    "at, options, want",
    [
        ((1, 1), {}, [[2, 4, 6], [8, 10, 12], [14, 16, 18]]),
        ((0, 1), {}, [[0, 0, 0], [2, 4, 6], [8, 10, 12]]),
        ((1, 2), {}, [[4, 6, 0], [10, 12, 0], [16, 18, 0]]),
        ((2, 0), dict(padding="VALID"), [[14]]),
        ((1, 1), dict(strides=(2, 2)), [[2, 6], [14, 18]]),
        ((0, 0), dict(strides=(2, 2)), [[0, 0], [0, 10]]),
        ((0, 0), dict(strides=(3, 1)), [[0, 2, 4]]),
        (
            (0, 1),
            dict(dilations=(2, 1)),
            [[0, 0, 0], [0, 0, 0], [2, 4, 6]],
        ),
    ],
)
def test_one_weight_shifts_and_scales(at, options, want):
    kernel = np.full((3, 3, 1, 1), 99, np.float32)
    kernel[at] = 2
    mask = np.zeros_like(kernel)
    mask[at] = 1
    got = sparse_conv2d(NINE, kernel, mask, **options)
    np.testing.assert_array_equal(got[0, :, :, 0], want)
    assert got.shape == (1, *np.shape(want), 1)


def test_one_weight_between_channels():
    """Filter 1 is 3 times channel 0; filters 0 and 2 have no weight."""
    images = np.array([[[[2.0, 50.0]]], [[[-1.0, 50.0]]]], np.float32)
    mask = np.zeros((1, 1, 2, 3), np.float32)
    mask[0, 0, 0, 1] = 1
    got = sparse_conv2d(images, np.full_like(mask, 3), mask)
    np.testing.assert_array_equal(got, [[[[0, 6, 0]]], [[[0, -3, 0]]]])


@pytest.mark.parametrize("dense_gradient", [False, True])
def test_masks_are_bools_or_zeros_and_ones(dense_gradient):
    """Both give the same bits, also in second gradients."""
    draw = np.random.default_rng(0)
    images = tf.constant(normal(draw, 2, 5, 4, 3))
    kernel = tf.constant(normal(draw, 3, 3, 3, 2))
    mask = draw.random(kernel.shape) < 0.4

    def everything(mask):
        with tf.GradientTape() as outer:
            outer.watch([images, kernel])
            with tf.GradientTape() as tape:
                tape.watch([images, kernel])
                outputs = sparse_conv2d(
                    images, kernel, mask, dense_gradient=dense_gradient
                )
                total = tf.reduce_sum(outputs**2)
            first = tape.gradient(total, [images, kernel])
            both = sum(tf.reduce_sum(g**2) for g in first)
        return [outputs, *first, *outer.gradient(both, [images, kernel])]

    pairs = zip(
        everything(tf.constant(mask)),
        everything(tf.constant(mask, tf.float32)),
        strict=True,
    )
    for ours, theirs in pairs:
        assert ours.numpy().any()
        np.testing.assert_array_equal(ours, theirs)


def test_gradients_by_hand():
    """y = [2 a], with weights 2 and (removed) 9: dy/da = 2, dy/dw = [a, 0]."""
    images = tf.constant([[[[5.0, 7.0]]]])
    kernel = tf.constant([[[[2.0], [9.0]]]])
    mask = tf.constant([[[[1.0], [0.0]]]])
    for dense, want in ((False, [5, 0]), (True, [5, 7])):
        with tf.GradientTape() as tape:
            tape.watch([images, kernel])
            y = sparse_conv2d(images, kernel, mask, dense_gradient=dense)
        assert float(y[0, 0, 0, 0]) == 10
        to_images, to_kernel = tape.gradient(y, [images, kernel])
        np.testing.assert_array_equal(to_images.numpy().ravel(), [2, 0])
        np.testing.assert_array_equal(to_kernel.numpy().ravel(), want)


@pytest.mark.parametrize("low", [2**32 - 3, 2**64 - 3, 2**64 - 1])
def test_dropout_counts_in_128_bits(low):
    """Overflow is carried, as in TensorFlow."""
    key = tf.constant([12345], tf.uint64)
    counter = tf.constant([low, 7], tf.uint64)
    numbers = tf.raw_ops.StatelessRandomUniformV2(
        shape=[200], key=key, counter=counter, alg=1
    )
    got = library.load().rigl_keras_dropout(
        x=tf.ones(200), key=key, counter=counter, rate=0.5
    )
    np.testing.assert_array_equal(got, np.where(numbers >= 0.5, 2, 0))


# Against dense TensorFlow.


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    "strides, dilations", [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 3))]
)
def test_the_reference_is_tensorflow(padding, strides, dilations):
    draw = np.random.default_rng(0)
    images, kernel = (
        draw.normal(size=(2, 9, 8, 3)),
        draw.normal(size=[3, 2, 3, 4]),
    )
    options = dict(strides=strides, padding=padding, dilations=dilations)
    assert_close(
        reference(images, kernel, **options),
        tf.nn.conv2d(images, kernel, **options),
        relative=1e-14,
    )


@pytest.mark.slow_but(*map(str, range(4)))
@pytest.mark.parametrize("part", range(12))
def test_random_convolutions(part):
    for seed in range(16):
        compare(*drawn(100 * part + seed))


@pytest.mark.parametrize("density", [0, None, 0.1, 0.5, 1])
@pytest.mark.parametrize("batch", [1, 15, 16, 17, 100])
def test_densities_and_batches(density, batch):
    """For the most common convolution, 3 x 3, on 9 x 9 images."""
    draw = np.random.default_rng(batch)
    shape = (3, 3, 17, 18)
    mask = mask_of(draw, shape, density)
    images = normal(draw, batch, 9, 9, 17)
    for stride in (1, 2):
        options = dict(strides=(stride, stride), padding="SAME")
        compare(images, normal(draw, *shape), mask, options)


@pytest.mark.slow
@pytest.mark.parametrize("wanted_set", ["avx2", "portable"])
def test_other_instruction_sets(wanted_set):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("there is one on this machine")
    if kernels.instruction_set() == "portable" and wanted_set == "avx2":
        pytest.skip("the processor does not have it")
    code = (
        "import test_kernels as t\n"
        "for seed in range(40): t.compare(*t.drawn(seed))\n"
        "print(t.kernels.instruction_set(), t.kernels.dense_library())"
    )
    one_dnn = wanted_set == "avx2"
    environment = {
        "RIGL_KERAS_ISA": wanted_set,
        "TF_ENABLE_ONEDNN_OPTS": str(int(one_dnn)),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        wanted_set,
        "oneDNN" if one_dnn else "Eigen",
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(strides=(2, 1)),
        dict(dilations=(1, 2), padding="VALID"),
    ],
)
def test_gradients_by_finite_differences(options):
    """Steps may have any size, as outputs are linear in each input."""
    draw = np.random.default_rng(0)
    mask = mask_of(draw, (3, 2, 2, 3), 0.5)
    found, differences = tf.test.compute_gradient(
        lambda images, kernel: sparse_conv2d(images, kernel, mask, **options),
        [normal(draw, 2, 4, 3, 2), normal(draw, *mask.shape)],
        delta=0.25,
    )
    for ours, theirs in zip(found, differences, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert np.abs(theirs).max() > 0.1


@pytest.mark.parametrize("dense_gradient", [False, True])
@pytest.mark.parametrize(
    "options", [{}, dict(strides=(2, 2)), dict(dilations=(2, 2))]
)
def test_gradients_of_gradients(options, dense_gradient):
    draw = np.random.default_rng(0)
    images, kernel = normal(draw, 3, 6, 5, 4), normal(draw, 3, 3, 4, 5)
    mask = mask_of(draw, kernel.shape, 0.3)

    def second(product, dtype):
        inputs = [tf.constant(images, dtype), tf.constant(kernel, dtype)]
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                loss = tf.reduce_sum(product(*inputs) ** 3)
            first = inner.gradient(loss, inputs)
            penalty = sum(tf.reduce_sum(g * g) for g in first)
        return outer.gradient(penalty, inputs)

    @tf.custom_gradient
    def masked(w):
        kept = tf.constant(mask, w.dtype)
        return w * kept, lambda dw: dw if dense_gradient else dw * kept

    got = second(
        lambda x, w: sparse_conv2d(
            x, w, mask, dense_gradient=dense_gradient, **options
        ),
        tf.float32,
    )
    want = second(lambda x, w: reference(x, masked(w), **options), tf.float64)
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(strides=(2, 2)),
        dict(strides=(1, 2), padding="VALID"),
        dict(dilations=(2, 1)),
    ],
)
def test_dense_gradient_is_that_of_the_product(options):
    """It is dL/d(kernel x mask), also where the mask is zero."""
    draw = np.random.default_rng(0)
    images, kernel = normal(draw, 5, 7, 6, 4), normal(draw, 3, 3, 4, 5)
    mask = mask_of(draw, kernel.shape, 0.2)
    _, to_images, to_kernel = passes(
        lambda images, kernel: sparse_conv2d(
            images, kernel, mask, dense_gradient=True, **options
        ),
        tf.constant(images),
        tf.constant(kernel),
    )
    product = kernel * mask
    _, want_images, want_kernel = wanted(
        images, product, np.ones_like(mask), **options
    )
    assert_close(to_images, want_images)
    assert_close(to_kernel, want_kernel)
    assert to_kernel.numpy()[mask == 0].all()


def test_each_filter_sees_the_channels_of_its_group():
    images = tf.constant([1, 2, 3, 4], tf.float32, (1, 1, 1, 4))
    kernel = np.ones((1, 1, 2, 6), np.float32)
    mask = np.array([[1, 1, 0, 1, 0, 1], [1, 0, 1, 1, 1, 0]], np.float32)
    got = sparse_conv2d(images, kernel, mask.reshape(kernel.shape))
    np.testing.assert_array_equal(np.ravel(got), [3, 1, 2, 7, 4, 3])


@pytest.mark.parametrize("dense_gradient", [False, True])
@pytest.mark.parametrize(
    "options, batch, groups",
    [
        ({}, 3, 2),
        (dict(strides=(2, 1), padding="VALID"), 17, 3),
        (dict(dilations=(1, 2)), 2, 6),
    ],
)
def test_groups_are_products_side_by_side(
    options, batch, groups, dense_gradient
):
    draw = np.random.default_rng(0)
    images = normal(draw, batch, 7, 6, 12)
    kernel = normal(draw, 3, 2, 12 // groups, 18)
    mask = mask_of(draw, kernel.shape, 0.4)
    got = passes(
        lambda x, w: sparse_conv2d(
            x, w, mask, dense_gradient=dense_gradient, **options
        ),
        tf.constant(images),
        tf.constant(kernel),
    )

    def side_by_side(x, w):
        parts = zip(
            tf.split(x, groups, axis=3),
            tf.split(w, groups, axis=3),
            strict=True,
        )
        return tf.concat([reference(*part, **options) for part in parts], 3)

    outputs, to_images, to_kernel = passes(
        side_by_side,
        tf.constant(images, tf.float64),
        tf.constant(kernel * mask, tf.float64),
    )
    if not dense_gradient:
        to_kernel = to_kernel * mask
    for ours, theirs in zip(got, (outputs, to_images, to_kernel), strict=True):
        assert_close(ours, theirs)


def test_dense_layers():
    draw = np.random.default_rng(0)
    kernel = normal(draw, 6, 5)
    mask = mask_of(draw, kernel.shape, 0.4)
    for shape in ((6,), (7, 6), (7, 3, 6), (2, 3, 4, 6)):
        inputs = normal(draw, *shape)
        got = kernels.sparse_dense(inputs, kernel, mask)
        assert_close(got, np.float64(inputs) @ (kernel * mask))


def test_dense_layers_know_their_shape_and_gradients():
    draw = np.random.default_rng(0)
    kernel = tf.constant(normal(draw, 6, 5))
    mask = mask_of(draw, kernel.shape, 0.4)

    @tf.function(input_signature=[tf.TensorSpec([None, 3, 6])])
    def gradients(inputs):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([inputs, kernel])
            ours = kernels.sparse_dense(inputs, kernel, mask) ** 2
            theirs = (inputs @ (kernel * mask)) ** 2
        assert ours.shape.as_list() == [None, 3, 5]
        wrt = [inputs, kernel]
        return tape.gradient(ours, wrt), tape.gradient(theirs, wrt)

    for batch in (4, 0):
        got, want = gradients(normal(draw, batch, 3, 6))
        for ours, theirs in zip(got, want, strict=True):
            assert_close(ours, theirs)


def test_no_images():
    draw = np.random.default_rng(0)
    kernel = normal(draw, 3, 3, 4, 5)
    mask = np.ones_like(kernel)
    outputs, to_images, to_kernel = passes(
        lambda images, kernel: sparse_conv2d(
            images, kernel, mask, strides=(2, 2)
        ),
        tf.zeros((0, 8, 7, 4)),
        tf.constant(kernel),
    )
    assert outputs.shape == (0, 4, 4, 5)
    assert to_images.shape == (0, 8, 7, 4)
    np.testing.assert_array_equal(to_kernel, np.zeros_like(kernel))
