"""The memory that the C++ operations take: bounds, plans, and none left."""

import os
import resource

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support import sparse_products

import rigl_keras
from rigl_keras import _timing, kernels
from rigl_keras.kernels import choice, library
from rigl_keras.kernels.operations import sparse_conv2d

LARGEST = 2**31 - 1
SANITIZED = os.environ.get("RIGL_KERAS_KERNELS") in ("address", "thread")


@pytest.fixture(autouse=True, scope="module")
def loaded():
    if kernels.load() is None:
        pytest.skip(f"no sparse kernels: {kernels.unavailable()}")


def normal(draw, shape):
    return draw.standard_normal(shape).astype(np.float32)


def assert_close(got, want):
    sparse_products.assert_close(got, want, relative=1e-5)


# Memory.


def wide(draw, channels=2048, columns=700):
    """Returns a convolution whose scratch memory would be 78 MB a thread."""
    images = tf.constant(normal(draw, (1, 1, columns, channels)))
    kernel = tf.constant(normal(draw, (1, 3, channels, 2)))
    mask = tf.constant((draw.random(kernel.shape) < 0.1).astype(np.float32))
    return images, kernel, mask, dict(dilations=(1, 300))


def test_more_scratch_memory_than_allowed_is_shared_out():
    """All passes work on some positions of the kernel at a time."""
    draw = np.random.default_rng(0)
    images, kernel, mask, options = wide(draw)
    per_lane = {"avx512": 16, "avx2": 8, "portable": 4}
    if per_lane[kernels.instruction_set()] < 16:
        images, kernel, mask, options = wide(draw, 2048 * 4, 700)
    forward, both, limit = kernels.scratch_bytes(
        images.shape, kernel.shape, **options
    )
    assert limit == 64 << 20 and limit < forward <= both < 8 * limit

    def shifted(images, kernel):
        """Three matrix products, of the images from each position on."""
        padded = tf.pad(images, [(0, 0), (0, 0), (300, 300), (0, 0)])
        return sum(
            padded[:, :, 300 * k : 300 * k + 700] @ kernel[0, k]
            for k in range(3)
        )

    def passes(product):
        with tf.GradientTape() as tape:
            tape.watch([images, kernel])
            outputs = product(images, kernel)
            loss = tf.reduce_sum(outputs * upstream)
        return outputs, *tape.gradient(loss, [images, kernel])

    upstream = tf.constant(normal(draw, (1, 1, 700, 2)))
    got = passes(lambda x, w: sparse_conv2d(x, w, mask, **options))
    want = passes(lambda x, w: shifted(x, w * mask))
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs)


def test_positions_that_reach_no_pixel_take_nothing():
    shape = (3, 3, 2048, 256)  # the widest rate of DeepLab's pyramid
    for dilation, least, most in ((6, 2, 64), (36, 0, 2), (LARGEST, 0, 2)):
        forward, _, _ = kernels.scratch_bytes(
            (1, 33, 33, 2048), shape, dilations=(dilation, dilation)
        )
        assert least << 20 <= forward < most << 20
    # Only the middle position reaches a pixel.
    draw = np.random.default_rng(0)
    images, kernel = normal(draw, (2, 5, 5, 3)), normal(draw, (3, 3, 3, 4))
    got = sparse_conv2d(
        images, kernel, np.ones_like(kernel), dilations=(LARGEST, 5)
    )
    assert_close(got, images @ kernel[1, 1])


def test_a_position_that_alone_takes_too_much():
    channels = 2**23
    forward, both, limit = kernels.scratch_bytes(
        (1, 1, 1, 4), (1, 1, 4, channels)
    )
    assert forward <= limit < both  # gradients are computed in parts
    images = tf.zeros((1, 1, 1, channels))
    kernel = tf.ones((1, 1, channels, 1))
    with pytest.raises(tf.errors.ResourceExhaustedError, match="64 MB a thre"):
        sparse_conv2d(images, kernel, kernel)
    problem = kernels.Problem((1, 1, channels, 1), (1, 1, 1))
    assert "MB of scratch memory a thread, above 64" in kernels.too_large(
        problem
    )


def test_too_large_a_product_is_not_timed(monkeypatch):
    def never(*_):
        raise AssertionError("it was timed")

    monkeypatch.setattr(choice, "_seconds", never)
    problem = kernels.Problem(
        (3, 3, 8192, 256), (4, 33, 33), dilations=(24, 24)
    )
    got = kernels.choose(problem, 0.1)
    assert not got.sparse
    assert got.reason.endswith("MB of scratch memory a thread, above 64")
    small = kernels.Problem((3, 3, 640, 64), (64, 2, 1), padding="VALID")
    assert small.products == 0 and not kernels.choose(small, 0.1).sparse
    assert kernels.too_large(small) == "its images do not fit its kernel"
    small = kernels.Problem((3, 2, 5, 7), (11, 7, 4), (2, 1), "VALID", (2, 1))
    assert small.products == 3 * 2 * 5 * 7 * 11 * 2 * 3


def test_long_products_are_timed_once(monkeypatch):
    """Dense products with large dilations can take a minute."""
    calls = []
    monkeypatch.setattr(_timing, "settled", lambda *_, **__: calls)
    monkeypatch.setattr(choice, "_LONG", 0.0)
    problem = kernels.Problem((3, 3, 4, 4), (2, 5, 5))
    dense, sparse, busy = choice._seconds(problem, 0.5, True)
    assert 0 < dense < 60 and 0 < sparse < 60 and not busy
    monkeypatch.setattr(choice, "_LONG", 60.0)
    with pytest.raises(AttributeError):  # a list is no verdict
        choice._seconds(problem, 0.5, True)


@pytest.mark.parametrize("size", [700, None])
def test_layers_that_would_take_too_much_are_dense(size):
    """They are dense even if sparse kernels are requested."""
    inputs = keras.Input((1, size, 8192))
    layer = layers.Conv2D(
        2, (1, 3), padding="same", dilation_rate=(1, 300), name="wide"
    )
    model = keras.Model(inputs, layer(inputs))
    sparse = rigl_keras.sparsify(model, 0.1, product="sparse")
    images = normal(np.random.default_rng(0), (1, 1, 700, 8192))
    got = sparse(images)
    (masked,) = rigl_keras.masked_layers(sparse)
    reasons = {
        shape[2]: chosen for shape, chosen in masked.chosen_products().items()
    }
    assert not reasons[700].sparse
    assert "scratch memory" in reasons[700].reason
    assert_close(got, rigl_keras.strip(sparse)(images))


def test_no_memory_is_an_error():
    """The process continues, and the operation works later."""
    if SANITIZED:
        pytest.skip("sanitizers take any memory")
    images = tf.ones((1, 1, 1, 4096))
    kernel = tf.ones((1, 1, 4096, 4096))
    with open("/proc/self/statm") as status:
        pages = int(status.read().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    # The operation makes several arrays of 64 MB from the mask.
    taken = pages * resource.getpagesize() + (150 << 20)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (taken, hard))
        with pytest.raises(tf.errors.ResourceExhaustedError, match="memory"):
            sparse_conv2d(images, kernel, kernel)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    got = sparse_conv2d(images, kernel, kernel)
    np.testing.assert_array_equal(got, np.full((1, 1, 1, 4096), 4096))


def plan_bytes():
    return int(library.load().rigl_keras_plan_bytes())


def test_plans_are_bounded_by_their_bytes():
    """The bound is three dense kernels or 1 MB; image sizes share plans."""
    draw = np.random.default_rng(0)
    kernel = tf.constant(normal(draw, (3, 3, 128, 128)))
    mask = tf.ones(kernel.shape)
    run = tf.function(
        lambda x: sparse_conv2d(x, kernel, mask),
        input_signature=[tf.TensorSpec((None, None, None, 128))],
    )
    bytes_of_kernel = 4 * 9 * 128 * 128
    before = plan_bytes()
    run(tf.ones((1, 4, 4, 128)))
    one = plan_bytes() - before
    # Eight bytes for each weight, and a few more for each row.
    assert 2 * bytes_of_kernel < one < 2.1 * bytes_of_kernel
    shapes = [(1, 9, 7), (17, 5, 5), (1, 31, 30), (3, 2, 64), (1, 40, 40)]
    for shape in shapes * 2:
        got = run(tf.ones((*shape, 128)))
        assert plan_bytes() - before <= 3 * bytes_of_kernel
    np.testing.assert_allclose(
        got[0, 1, 1], tf.reduce_sum(kernel, (0, 1, 2)), atol=1e-3
    )


def test_sizes_of_images_share_their_plans():
    draw = np.random.default_rng(0)
    mask = tf.constant(draw.random((3, 3, 16, 16)) < 0.3, tf.float32)
    weights = int(tf.reduce_sum(mask))
    before = plan_bytes()
    for columns in range(4, 68):
        got = sparse_conv2d(tf.ones((1, 4, columns, 16)), mask, mask)
        assert got.shape[2] == columns
    kept = plan_bytes() - before
    assert 8 * weights < kept < 16 * 8 * weights


def test_plans_of_masks_that_are_gone_are_forgotten():
    draw = np.random.default_rng(0)
    images = tf.constant(normal(draw, (1, 4, 4, 64)))
    kernel = tf.constant(normal(draw, (3, 3, 64, 64)))
    sparse_conv2d(images, kernel, tf.ones_like(kernel))
    before = plan_bytes()
    for _ in range(10):
        sparse_conv2d(images, kernel, tf.ones_like(kernel))
    assert plan_bytes() - before <= 8 * 9 * 64 * 64
