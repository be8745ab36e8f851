"""`Masked`: its outputs, gradients, zeros and saved files."""

import inspect
import json
import pathlib
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import rigl_keras
from rigl_keras.masking.masked import Masked, MaskProjection
from rigl_keras.masking.tracing import dense_gradients

ROOT = pathlib.Path(__file__).parents[1]

# A warning of TensorFlow when Keras saves with NumPy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning"
)


def random_mask(shape, seed=0):
    """Returns a mask of about half ones, never only ones or only zeros."""
    mask = np.random.default_rng(seed).random(shape) < 0.5
    mask.flat[0], mask.flat[-1] = True, False
    return mask.astype(np.float32)


def images(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def copy_of(layer):
    """Returns a copy of a layer, with its own weights."""
    return type(layer).from_config(layer.get_config())


LAYERS = {
    "dense": (lambda: layers.Dense(3, activation="tanh"), (4,)),
    "dense_without_bias": (lambda: layers.Dense(3, use_bias=False), (4,)),
    "dense_rank_3": (lambda: layers.Dense(3, activation="relu"), (5, 4)),
    "conv1d": (lambda: layers.Conv1D(3, 3, strides=2), (8, 2)),
    "conv1d_causal": (
        lambda: layers.Conv1D(3, 2, padding="causal", dilation_rate=2),
        (8, 2),
    ),
    "conv2d": (
        lambda: layers.Conv2D(3, 3, strides=2, padding="same"),
        (8, 8, 2),
    ),
    "conv2d_dilated": (
        lambda: layers.Conv2D(3, 3, dilation_rate=2, activation="relu"),
        (8, 8, 2),
    ),
    "conv2d_grouped": (lambda: layers.Conv2D(4, 3, groups=2), (8, 8, 4)),
    "conv2d_channels_first": (
        lambda: layers.Conv2D(3, 3, data_format="channels_first"),
        (2, 8, 8),
    ),
    "conv3d": (lambda: layers.Conv3D(2, 2, use_bias=False), (4, 4, 4, 2)),
    "depthwise1d": (
        lambda: layers.DepthwiseConv1D(3, depth_multiplier=2),
        (8, 2),
    ),
    "depthwise2d": (
        lambda: layers.DepthwiseConv2D(3, strides=2, padding="same"),
        (8, 8, 3),
    ),
    "depthwise2d_dilated": (
        lambda: layers.DepthwiseConv2D(3, dilation_rate=2),
        (8, 8, 3),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_output_is_that_of_the_plain_layer_on_the_masked_kernel(kind):
    make, shape = LAYERS[kind]
    x = images(2, *shape)
    plain = make()
    plain.build((None, *shape))
    if plain.use_bias:
        plain.bias.assign(images(*plain.bias.shape))
    masked = Masked(copy_of(plain))
    masked.build((None, *shape))
    for ours, theirs in zip(masked.layer.weights, plain.weights, strict=True):
        ours.assign(theirs)
    try:
        dense = plain(x).numpy()
    except tf.errors.UnimplementedError:
        pytest.skip(f"TensorFlow has no {kind} on a CPU without oneDNN")
    mask = random_mask(plain.kernel.shape)
    # Not `assign_mask`, which would set the kernel to zero outside the mask.
    masked.mask.assign(mask)
    plain.kernel.assign(plain.kernel * mask)
    got = masked(x).numpy()
    # TensorFlow may use another kernel for the other layer.
    np.testing.assert_allclose(got, plain(x).numpy(), rtol=1e-5, atol=1e-6)
    assert got.shape == masked.compute_output_shape((2, *shape))
    assert np.abs(got - dense).max() > 1e-2


def test_penalties_and_constraint_of_the_wrapped_layer_apply():
    plain = layers.Dense(
        3,
        kernel_regularizer=keras.regularizers.L2(0.5),
        activity_regularizer=keras.regularizers.L1(0.25),
    )
    x = images(2, 4)
    masked = Masked(plain)
    masked.build((None, 4))
    masked.assign_mask(random_mask((4, 3)))
    y = masked(x).numpy()
    alone = copy_of(plain)
    alone.build((None, 4))
    alone.kernel.assign(masked.kernel)
    np.testing.assert_array_equal(alone(x), y)
    want = [float(loss) for loss in alone.losses]
    assert 0.5 * np.square(masked.kernel).sum() == pytest.approx(want[1])
    got = [float(loss) for loss in masked.losses]
    assert sorted(got) == pytest.approx(sorted(want), rel=1e-5)
    masked(x)
    assert len(masked.losses) == 2  # only those of the last call


def test_penalties_enter_the_loss_of_a_model():
    x = images(2, 4)
    inputs = keras.Input((4,))
    outputs = layers.Dense(
        3,
        name="d",
        kernel_regularizer=keras.regularizers.L2(0.5),
        activity_regularizer=keras.regularizers.L1(0.25),
    )(inputs)
    model = keras.Model(inputs, outputs)
    sparse = rigl_keras.sparsify(model, 0.5)
    plain = rigl_keras.strip(sparse)
    losses = []
    for each in (sparse, plain):
        each.compile("sgd", "mse")
        losses.append(each.evaluate(x, np.zeros((2, 3)), verbose=0))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] > 1.1 * float(np.mean(sparse(x).numpy() ** 2))


def two_by_two():
    """With y = x (w * m) and L = sum(c * y), dL/d(w * m) is x^T c."""
    masked = Masked(layers.Dense(2, use_bias=False))
    masked.build((None, 2))
    masked.kernel.assign([[1.0, 2.0], [3.0, 4.0]])
    masked.mask.assign([[1.0, 0.0], [0.0, 1.0]])
    x = tf.constant([[1.0, 10.0], [2.0, 20.0]])
    c = tf.constant([[1.0, 5.0], [1.0, 7.0]])
    # x^T c = [[1+2, 5+14], [10+20, 50+140]]
    return masked, x, c, [[3.0, 19.0], [30.0, 190.0]]


def gradient(masked, x, c):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(c * masked(x))
    return tape.gradient(loss, masked.kernel.value).numpy()


def test_gradient_is_masked_and_dense_on_request():
    masked, x, c, dense = two_by_two()
    np.testing.assert_array_equal(gradient(masked, x, c), [[3, 0], [0, 190]])
    with dense_gradients():
        np.testing.assert_array_equal(gradient(masked, x, c), dense)
    np.testing.assert_array_equal(gradient(masked, x, c), [[3, 0], [0, 190]])


def test_dense_gradients_ends_with_its_block_when_that_raises():
    masked, x, c, _ = two_by_two()
    with pytest.raises(KeyError), dense_gradients():
        raise KeyError
    assert gradient(masked, x, c)[0, 1] == 0


def test_what_counts_is_where_the_function_is_traced():
    masked, x, c, dense = two_by_two()
    traced = tf.function(lambda: gradient_tensor(masked, x, c))
    with dense_gradients():
        np.testing.assert_array_equal(traced(), dense)
    # The function is traced already, so the context of the call has no effect.
    np.testing.assert_array_equal(traced(), dense)


def gradient_tensor(masked, x, c):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(c * masked(x))
    return tape.gradient(loss, masked.kernel.value)


def test_input_gradient_goes_through_the_masked_kernel():
    masked, x, c, _ = two_by_two()
    for dense in (False, True):
        with tf.GradientTape() as tape:
            tape.watch(x)
            if dense:
                with dense_gradients():
                    loss = tf.reduce_sum(c * masked(x))
            else:
                loss = tf.reduce_sum(c * masked(x))
        # c (w * m)^T with w * m = diag(1, 4)
        np.testing.assert_array_equal(
            tape.gradient(loss, x), [[1.0, 20.0], [1.0, 28.0]]
        )


def test_config_holds_every_argument():
    masked = Masked(
        layers.Dense(3, name="d"),
        draw_key=7,
        name="outer",
        dtype="float64",
        trainable=False,
    )
    arguments = set(inspect.signature(Masked.__init__).parameters) - {"self"}
    config = masked.get_config()
    assert arguments <= config.keys()
    json.dumps(config)  # what .keras files hold
    again = Masked.from_config(config)
    assert again.get_config() == masked.get_config()
    assert (again.name, again.draw_key) == ("outer", 7)
    assert again.layer.name == "d"
    assert not again.trainable
    assert again.compute_dtype == "float64"


def test_defaults_come_from_the_wrapped_layer():
    masked = Masked(layers.Dense(3, name="d", dtype="float64"))
    assert masked.name == "d"
    assert masked.compute_dtype == "float64"
    assert masked.draw_key == Masked(layers.Dense(5, name="d")).draw_key
    assert masked.draw_key != Masked(layers.Dense(5, name="e")).draw_key


def masked_model():
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(2, 3, name="conv", kernel_constraint="non_neg"),
            layers.Flatten(),
            layers.Dense(3, name="dense"),
        ]
    )
    return rigl_keras.sparsify(model, 0.3, seed=5)


def test_save_and_load(tmp_path, fresh):
    model = masked_model()
    x = images(2, 8, 8, 1)
    path = tmp_path / "model.keras"
    model.save(path)

    loaded = keras.saving.load_model(path)
    assert len(rigl_keras.masked_layers(loaded)) == 2
    for ours, theirs in zip(
        rigl_keras.masked_layers(loaded),
        rigl_keras.masked_layers(model),
        strict=True,
    ):
        np.testing.assert_array_equal(ours.mask.numpy(), theirs.mask.numpy())
        assert ours.draw_key == theirs.draw_key
    np.testing.assert_array_equal(loaded(x).numpy(), model(x).numpy())
    # The projection is restored too, around the user's constraint.
    projection = loaded.get_layer("conv").kernel.constraint
    assert isinstance(projection, MaskProjection)
    assert isinstance(projection.constraint, keras.constraints.NonNeg)

    # In a process that has only imported the package.
    np.save(tmp_path / "x.npy", x)
    script = (
        "import rigl_keras, sys, numpy as np, tensorflow as tf\n"
        "model = tf.keras.models.load_model(sys.argv[1] + '/model.keras')\n"
        "x = np.load(sys.argv[1] + '/x.npy')\n"
        "np.save(sys.argv[1] + '/y.npy', model(x).numpy())\n"
        "for m in rigl_keras.masked_layers(model):\n"
        "    np.save(f'{sys.argv[1]}/{m.name}.npy', m.mask.numpy())\n"
    )
    done = fresh("-c", script, tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for layer in rigl_keras.masked_layers(model):
        np.testing.assert_array_equal(
            np.load(tmp_path / f"{layer.name}.npy"), layer.mask.numpy()
        )
    np.testing.assert_allclose(
        np.load(tmp_path / "y.npy"), model(x).numpy(), rtol=1e-6
    )


def test_file_stores_the_mask_as_a_weight(tmp_path):
    model = masked_model()
    path = tmp_path / "model.keras"
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        config = archive.read("config.json").decode()
    assert '"registered_name": "rigl_keras>Masked"' in config
    assert len(model.non_trainable_variables) == 2
    model.save_weights(tmp_path / "m.weights.h5")
    other = masked_model()
    for layer in rigl_keras.masked_layers(other):
        layer.assign_mask(np.zeros(layer.kernel.shape))
    other.load_weights(tmp_path / "m.weights.h5")
    for ours, theirs in zip(other.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
    "clipped": lambda: keras.optimizers.Adam(0.1, global_clipnorm=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kernel_is_zero_outside_the_mask_after_apply(optimizer):
    masked, _, _, dense = two_by_two()
    mask = masked.mask.numpy()
    # Even if the optimizer gets a dense gradient.
    made = OPTIMIZERS[optimizer]()
    for _ in range(3):
        before = masked.kernel.numpy()
        made.apply([tf.constant(dense)], [masked.kernel])
        after = masked.kernel.numpy()
        assert (after[mask == 0] == 0).all()
        assert (after[mask == 1] != before[mask == 1]).all()


def test_projection_composes_with_the_users_constraint():
    masked = Masked(
        layers.Dense(2, use_bias=False, kernel_constraint="max_norm")
    )
    masked.build((None, 2))
    masked.kernel.assign([[3.0, 0.0], [0.0, 4.0]])
    masked.mask.assign([[1.0, 0.0], [0.0, 1.0]])
    norm = masked.layer.kernel_constraint.max_value
    keras.optimizers.SGD(1.0).apply([tf.ones((2, 2))], [masked.kernel])
    # A step gives [[2, -1], [-1, 3]]; columns are clipped, then projected.
    stepped = np.array([[2.0, -1.0], [-1.0, 3.0]])
    want = stepped * np.minimum(1, norm / np.linalg.norm(stepped, axis=0))
    want[0, 1] = want[1, 0] = 0.0
    np.testing.assert_allclose(masked.kernel.numpy(), want, rtol=1e-5)


def test_projection_removes_what_a_product_would_keep():
    projection = MaskProjection(keras.Variable([1.0, 0.0, 0.0]))
    got = projection(tf.constant([2.0, np.nan, np.inf])).numpy()
    np.testing.assert_array_equal(got, [2.0, 0.0, 0.0])


def test_refuses_what_cannot_be_masked():
    masked = Masked(layers.Dense(2, name="d"))
    with pytest.raises(ValueError, match="'d' is masked already"):
        Masked(masked)
    for layer in (
        layers.BatchNormalization(),
        layers.Normalization(),
        layers.Flatten(),
    ):
        with pytest.raises(ValueError, match=type(layer).__name__):
            Masked(layer).build((None, 8, 3))
    with pytest.raises(ValueError, match="Layer"):
        Masked("dense")


def test_wraps_a_layer_that_is_built():
    plain = layers.Dense(3)
    plain.build((None, 4))
    kernel = plain.kernel.numpy()
    masked = Masked(plain)
    masked(images(2, 4))
    np.testing.assert_array_equal(masked.kernel.numpy(), kernel)
    assert masked.density == 1.0


def test_new_mask_is_all_ones_and_not_trained():
    masked = Masked(layers.Dense(3))
    masked.build((None, 4))
    assert masked.density == 1.0
    assert masked.mask.shape == masked.kernel.shape
    assert masked.mask.dtype == "bool"
    assert [v is masked.mask for v in masked.non_trainable_variables] == [True]
    assert len(masked.trainable_variables) == 2


def test_assign_mask_zeroes_the_kernel_outside():
    masked = Masked(layers.Dense(3))
    masked.build((None, 4))
    before = masked.kernel.numpy()
    mask = random_mask((4, 3))
    masked.assign_mask(mask)
    np.testing.assert_array_equal(masked.mask.numpy(), mask)
    np.testing.assert_array_equal(masked.kernel.numpy(), before * mask)
    assert masked.density == mask.mean()
    masked.assign_mask(mask.astype(bool))
    np.testing.assert_array_equal(masked.mask.numpy(), mask)
    with pytest.raises(ValueError, match="shape"):
        masked.assign_mask(np.ones((2, 2)))


def test_assign_mask_removes_a_nan_outside():
    masked = Masked(layers.Dense(2, use_bias=False))
    masked.build((None, 1))
    masked.kernel.assign([[np.nan, 1.0]])
    masked.assign_mask([[0.0, 1.0]])
    np.testing.assert_array_equal(masked.kernel.numpy(), [[0.0, 1.0]])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    masked = Masked(layers.Dense(3, dtype=policy))
    x = images(2, 4)
    masked.build((None, 4))
    masked.assign_mask(random_mask((4, 3)))
    y = masked(x)
    assert y.dtype == policy.removeprefix("mixed_")
    assert masked.kernel.dtype == "float32"
    assert masked.mask.dtype == "bool"
    want = x @ masked.kernel.numpy()
    np.testing.assert_allclose(tf.cast(y, "float32"), want, atol=0.05)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.cast(masked(x), "float32"))
    gradient = tape.gradient(loss, masked.kernel.value).numpy()
    assert gradient.dtype == np.float32
    assert (gradient[masked.mask.numpy() == 0] == 0).all()
    assert (gradient[masked.mask.numpy() == 1] != 0).all()
    # Outside a call, where `strip` and `export` read it, there is no autocast.
    np.testing.assert_array_equal(
        masked.masked_kernel().numpy(), masked.kernel.numpy()
    )


def test_stateless_call_sees_every_given_value():
    """In the caller's scope, `Masked` overrides only the kernel."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3)(inputs))
    sparse = rigl_keras.sparsify(model, 1.0)
    ones = [np.ones(v.shape, np.float32) for v in sparse.trainable_variables]
    y, _ = sparse.stateless_call(
        ones, sparse.non_trainable_variables, np.ones((1, 4), np.float32)
    )
    np.testing.assert_array_equal(np.array(y), [[5.0, 5.0, 5.0]])


def test_keras_mask_passes_through():
    inputs = keras.Input((3,))
    embedded = layers.Embedding(5, 4, mask_zero=True)(inputs)
    outputs = Masked(layers.Dense(2, name="d"))(embedded)
    pooled = layers.GlobalAveragePooling1D()(outputs)
    model = keras.Model(inputs, [outputs, pooled])
    y, mean = model(np.array([[1, 2, 0]]))
    np.testing.assert_allclose(mean, np.mean(y[:, :2], axis=1), rtol=1e-6)


def test_masks_are_named_after_their_kernels():
    """They are the names in `model.summary()` and in files of weights."""
    dense = Masked(layers.Dense(2))
    dense.build((None, 3))
    assert [m.mask.name for m in dense.masked_kernels()] == ["mask"]
    lstm = Masked(
        layers.LSTM(2), kernels=("cell.kernel", "cell.recurrent_kernel")
    )
    lstm.build((None, 4, 3))
    assert [m.mask.name for m in lstm.masked_kernels()] == [
        "cell_kernel_mask",
        "cell_recurrent_kernel_mask",
    ]


@keras.saving.register_keras_serializable("tests")
class ByInputs(layers.Dense):
    """Saves the number of its inputs, not their shape."""

    def get_build_config(self):
        return {"inputs": self.kernel.shape[0]}

    def build_from_config(self, config):
        self.build((None, config["inputs"]))


@pytest.mark.parametrize("kind", [layers.Dense, ByInputs])
def test_a_layer_made_from_what_keras_serializes_is_built(kind):
    masked = Masked(kind(2))
    masked.build((None, 3))
    config = keras.saving.serialize_keras_object(masked)
    again = keras.saving.deserialize_keras_object(config)
    assert again.layer.built
    assert again.kernel.shape == again.mask.shape == (3, 2)
