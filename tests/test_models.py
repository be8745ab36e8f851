"""The dense models: shapes, padding, initial values, decay."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import rigl_keras
from rigl_keras import models


def of(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def test_stride_2_pads_one_pixel_on_each_side():
    """By hand, on layers of the model; `same` would give other numbers."""
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
    # (n + 1) // 2, twice, as both ways of halving round up.
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
    # A stage has two blocks of two convolutions, and a shortcut in the first.
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
    # A normal distribution, not truncated at two standard deviations.
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


def test_resnet50_is_the_reports():
    model = models.resnet50(100, weight_decay=1e-4)
    convolutions = of(model, layers.Conv2D)
    assert len(convolutions) == 53 and not any(c.use_bias for c in convolutions)
    assert model.count_params() == 23_705_252 + 2 * 26_560
    # A 3x3 stem at full size, and strides in the 3x3 convolutions.
    stem = model.get_layer("conv1")
    assert (stem.kernel_size, stem.strides) == ((3, 3), (1, 1))
    assert {c.name for c in convolutions if c.strides == (2, 2)} == {
        f"conv{stage}_0_{part}"
        for stage in (3, 4, 5)
        for part in ("conv2", "shortcut")
    }
    sizes = [
        model.get_layer(f"conv{s}_0_add").output.shape[1] for s in (2, 3, 4, 5)
    ]
    assert sizes == [32, 16, 8, 4]
    for norm in of(model, layers.BatchNormalization):
        assert (norm.momentum, norm.epsilon) == (0.9, 1e-5)
        last = norm.name.endswith("_bn3")
        assert (norm.gamma.numpy() == (0 if last else 1)).all(), norm.name
    for conv in convolutions:
        height, width, _, out = conv.kernel.shape
        wanted = np.sqrt(2 / (height * width * out))
        assert np.std(conv.kernel) == pytest.approx(wanted, rel=0.1)
        assert conv.kernel_regularizer.l2 == pytest.approx(5e-5)
    head = model.get_layer("classifier")
    for values in (head.kernel, head.bias):
        assert np.abs(values).max() == pytest.approx(2048**-0.5, rel=0.05)


def test_resnet_starts_with_blocks_that_do_nothing():
    """The last batch norm of each block starts at 0, so it is its shortcut."""
    model = models.resnet18(10, (16, 16, 3))
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    outputs = [
        model.get_layer(name).output
        for name in ("conv2_0_relu", "conv2_1_relu")
    ]
    first, second = keras.Model(model.input, outputs)(x)
    np.testing.assert_array_equal(first, second)
    assert np.abs(first).max() > 0
    assert model(x).shape == (2, 10)
    assert len(of(model, layers.Conv2D)) == 20


@pytest.mark.slow_but("wide_resnet")
@pytest.mark.parametrize("make", [models.wide_resnet, models.resnet50])
def test_small_dense_truncates_channels(make):
    """Channels x sqrt(density), truncated: about density x parameters."""
    for density in (0.1, 0.2):
        small, whole = make(channel_scale=density**0.5), make()
        for one, two in zip(
            of(small, layers.Conv2D), of(whole, layers.Conv2D), strict=True
        ):
            base = two.filters // (4 if two.kernel_size == (1, 1) else 1)
            assert one.filters in (
                int(two.filters * density**0.5),
                4 * int(base * density**0.5),
            )
        ratio = small.count_params() / whole.count_params()
        assert ratio == pytest.approx(density, rel=0.05)


@pytest.mark.parametrize(
    "make, options, message",
    [
        (
            models.wide_resnet,
            dict(channel_scale=0.01),
            "leave at least one channel of 16",
        ),
        (models.wide_resnet, dict(channel_scale=1.5), "channel_scale must be"),
        (models.resnet18, dict(channel_scale=0.0), "channel_scale must be"),
        (models.resnet50, dict(num_classes=0), "num_classes"),
        (models.resnet50, dict(input_shape=(4, 4, 3)), "at least 8 x 8"),
    ],
)
def test_bad_networks(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


# --- GPT


def small_gpt(**changes):
    return models.gpt(**{"vocabulary": 11, "context": 6, **TINY, **changes})


TINY = {"layers": 2, "width": 8, "heads": 2}


def test_gpt_sees_what_came_before_alone():
    model = small_gpt()
    tokens = np.array([[1, 2, 3, 4, 5, 6]])
    logits = model(tokens).numpy()
    assert logits.shape == (1, 6, 11)
    for at in range(6):
        other = tokens.copy()
        other[0, at] = 9
        changed = np.abs(model(other).numpy() - logits).max(axis=-1)[0]
        assert (changed[:at] == 0).all()
        assert (changed[at:] > 1e-7).all()


def test_gpt_by_hand():
    """One block with one head, in NumPy."""
    model = models.gpt(5, 3, 1, 4, 1)
    draw = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(draw.normal(size=variable.shape))

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        gamma, beta = model.get_layer(name).weights
        return x * gamma.numpy() + beta.numpy()

    def dense(x, name):
        kernel, bias = model.get_layer(name).weights
        return x @ kernel.numpy() + bias.numpy()

    tokens = np.array([4, 0, 2])
    (embeddings,) = model.get_layer("embedding").weights
    (positions,) = model.get_layer("positions").weights
    x = embeddings.numpy()[tokens] + positions.numpy()
    attention = model.get_layer("block0_attention")
    y = norm(x, "block0_norm1")
    query, key, value = (
        y @ np.reshape(part.kernel, (4, 4)) + np.reshape(part.bias, -1)
        for part in (
            attention.query_dense,
            attention.key_dense,
            attention.value_dense,
        )
    )
    scores = query @ key.T / 2  # the root of 4 entries
    scores[np.triu_indices(3, 1)] = -np.inf
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    y = scores / scores.sum(-1, keepdims=True) @ value
    out = attention.output_dense
    x = x + y @ np.reshape(out.kernel, (4, 4)) + np.array(out.bias)
    y = dense(norm(x, "block0_norm2"), "block0_expand")
    y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    x = x + dense(y, "block0_contract")
    wanted = dense(norm(x, "norm"), "head")
    np.testing.assert_allclose(model(tokens[None])[0], wanted, rtol=2e-3)


def test_gpt_of_its_size():
    """12 d^2 weights and 13 d biases and norms in a block of width d."""
    model = small_gpt()
    block = 12 * 8**2 + 13 * 8
    ends = (11 + 6) * 8 + 2 * 8 + 8 * 11 + 11
    assert model.count_params() == 2 * block + ends
    # The docstring of `gpt` has the number of all parameters.
    block, ends = 12 * 512**2 + 13 * 512, (97 + 256 + 2 + 97) * 512 + 97
    assert 12 * block + ends == 38_060_129
    kernels = [v for v in model.trainable_variables if v.name == "kernel"]
    assert len(kernels) == 2 * 6 + 1
    drawn = np.concatenate([np.ravel(k) for k in kernels])
    assert drawn.std() == pytest.approx(0.02, rel=0.05)
    # Each is drawn separately, so kernels of one shape differ.
    first, second = (
        model.get_layer(f"block{i}_expand").kernel.numpy() for i in (0, 1)
    )
    assert np.abs(first - second).max() > 0.01
    assert not of(model, layers.Dropout)
    rates = [layer.rate for layer in of(small_gpt(dropout=0.2), layers.Dropout)]
    assert rates == [0.2] * 5
    attention = small_gpt(dropout=0.2).get_layer("block1_attention")
    assert attention.dropout == 0.2


def test_gpt_is_masked_saved_and_loaded(tmp_path):
    model = rigl_keras.sparsify(small_gpt(), 0.25)
    named = rigl_keras.masked_layers(model).named
    assert len(named) == 13
    assert "block1_attention/value_dense/kernel" in named
    assert rigl_keras.count(model).uncounted == (
        ("embedding", "Embedding"),
        ("positions", "LearnedPositions"),
    )
    tokens = np.array([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    wanted = model(tokens).numpy()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(tokens), wanted)
    plain = rigl_keras.strip(model)
    np.testing.assert_allclose(plain(tokens), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "format", ["saved_model", "sparse_saved_model", "onnx", "tflite"]
)
def test_gpt_is_exported(format, tmp_path):
    """The export is compared with the model, as always."""
    model = rigl_keras.sparsify(small_gpt(width=32, heads=4), 0.25)
    report = rigl_keras.export(
        model, tmp_path / "exported", format=format, measure=False
    )
    assert report.format == format
    assert report.max_difference <= report.tolerance < 1e-2
    assert report.density == pytest.approx(0.25, abs=0.01)


def test_gpt_is_no_native_network(tmp_path):
    """Networks lack look-ups and layer norms, and the error says so."""
    model = rigl_keras.sparsify(small_gpt(), 0.25)
    with pytest.raises(ValueError, match="these operations need TensorFlow"):
        rigl_keras.export(
            model, tmp_path / "exported", format="native", measure=False
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocabulary": 1}, "vocabulary must be an int of at least 2"),
        ({"context": 0}, "context must be"),
        ({"layers": 0}, "layers must be"),
        ({"layers": True}, "layers must be"),
        ({"width": 8.0}, "width must be"),
        ({"heads": 0}, "heads must be"),
        ({"heads": 3}, "multiple of heads"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_bad_gpts(changes, message):
    with pytest.raises(ValueError, match=message):
        small_gpt(**changes)
