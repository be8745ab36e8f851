"""Operations release the masks that nothing else uses."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf

from rigl_keras import kernels

UPDATES = 40
MILLION = 2**20


@pytest.fixture(autouse=True, scope="module")
def operations():
    if kernels.load() is None:
        pytest.skip(f"no sparse kernels: {kernels.unavailable()}")
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("only Linux says there how much memory is in use")


def resident():
    """Returns the resident memory of this process, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def dense(images, kernel, mask):
    return kernels.sparse_dense(images, kernel, mask)


def convolution(images, kernel, mask):
    return kernels.sparse_conv2d(images, kernel, mask)


@pytest.mark.parametrize(
    "product, inputs, shape",
    [
        (dense, (2, 1024), (1024, 1024)),
        (convolution, (1, 4, 4, 340), (3, 3, 340, 340)),
    ],
)
def test_masks_that_were_replaced_are_released(product, inputs, shape):
    """Forward pass and gradients each keep the mask in a cache."""
    draw = np.random.default_rng(0)
    images = tf.constant(draw.standard_normal(inputs).astype(np.float32))
    kernel = tf.constant(draw.standard_normal(shape).astype(np.float32))
    chosen = draw.random(shape) < 0.05
    mask = tf.Variable(chosen)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            tape.watch([images, kernel])
            outputs = product(images, kernel, mask)
        return tape.gradient(outputs, [images, kernel])

    def update(times):
        for i in range(times):
            mask.assign(np.roll(chosen, i, axis=-1))
            step()

    update(8)
    before = resident()
    update(UPDATES)
    # Each mask has a million bytes.
    assert resident() - before < UPDATES * MILLION / 2
