"""The dense models: shapes, padding, initial values, decay."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from rigl_keras import models


def of(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def test_stride_2_pads_one_pixel_on_each_side():
    """By hand, on the model's own layers: `same` would give other numbers."""
    model = models.wide_resnet(10, 1, input_shape=(8, 8, 3), dropout=0.0)
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 16)).astype(np.float32)
    conv = model.get_layer("block2_0_conv1")
    got = conv(model.get_layer("block2_0_conv1_pad")(x)).numpy()
    padded = np.zeros((10, 10, 16), np.float32)
    padded[1:9, 1:9] = x[0]
    kernel = conv.kernel.numpy()
    want = np.zeros((4, 4, 32))
    for i in range(4):
        for j in range(4):
            window = padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            want[i, j] = np.tensordot(window, kernel, 3)
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-4)
    same = tf.nn.conv2d(x, kernel, 2, "SAME").numpy()
    assert np.abs(same - got).max() > 0.1


@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_shortcut_and_branch_meet_at_any_size(size):
    model = models.wide_resnet(10, 1, input_shape=(*size, 3))
    # (n + 1) // 2, twice: both ways of halving round up.
    half = [(n + 1) // 2 for n in size]
    quarter = [(n + 1) // 2 for n in half]
    assert model.get_layer("block2_0_add").output.shape[1:3] == (*half,)
    assert model.get_layer("block3_0_add").output.shape[1:3] == (*quarter,)


def test_dropout_is_there_only_if_asked_for():
    with_it = of(models.wide_resnet(16, 1, dropout=0.3), layers.Dropout)
    assert [layer.rate for layer in with_it] == [0.3] * 6
    assert not of(models.wide_resnet(16, 1, dropout=0.0), layers.Dropout)


def test_width_and_depth():
    model = models.wide_resnet(16, 3, num_classes=7)
    channels = [c.filters for c in of(model, layers.Conv2D)]
    # A stage: two blocks of two convolutions and, in the first, a shortcut.
    assert sorted(channels) == sorted([16] + [48] * 5 + [96] * 5 + [192] * 5)
    assert model.output.shape == (None, 7)
    assert not any(c.use_bias for c in of(model, layers.Conv2D))
    assert model.get_layer("classifier").use_bias


def test_initial_values():
    keras.utils.set_random_seed(0)
    model = models.wide_resnet(10, 4)
    kernel = model.get_layer("block3_0_conv2").kernel.numpy()  # 589,824
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 256)), rel=0.01)
    assert abs(kernel.mean()) < 0.01 * kernel.std() * 3
    # A normal distribution that is not cut at two deviations.
    assert np.mean(np.abs(kernel) > 2 * kernel.std()) > 0.04
    # PyTorch's Linear: uniform within 1 / sqrt(inputs), zero bias.
    head = model.get_layer("classifier")
    bound = 1 / np.sqrt(256)
    assert 0.98 * bound < np.abs(head.kernel.numpy()).max() <= bound
    assert not head.bias.numpy().any()


@pytest.mark.parametrize(
    "make",
    [
        lambda decay: models.wide_resnet(10, 1, weight_decay=decay),
        lambda decay: models.lenet5(weight_decay=decay),
        lambda decay: models.mlp(hidden=(4,), weight_decay=decay),
    ],
)
def test_weight_decay_is_half_the_square_of_every_kernel(make):
    model = make(0.5)
    kernels = [v for v in model.trainable_variables if v.name == "kernel"]
    want = 0.25 * sum(np.square(k.numpy()).sum() for k in kernels)
    assert len(model.losses) == len(kernels) > 1
    assert float(sum(model.losses)) == pytest.approx(want, rel=1e-5)
    assert not make(0.0).losses


def test_outputs_are_logits():
    for make in (models.lenet5, models.mlp):
        model = make(num_classes=3)
        x = np.random.default_rng(0).normal(0, 9, (5, 28, 28, 1))
        y = model(x.astype(np.float32)).numpy()
        assert y.shape == (5, 3)
        assert (y < 0).any()
        assert model.layers[-1].activation is keras.activations.linear


def test_mlp_takes_any_shape():
    model = models.mlp(4, (3, 5), hidden=())
    assert model.count_params() == 15 * 4 + 4
