"""Images in lanes: the layout, its operations, and layers that use it."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import rigl_keras
from rigl_keras import kernels
from rigl_keras.kernels import fast_calls, lane_operations, library
from rigl_keras.kernels.lane_operations import Lanes

pytestmark = pytest.mark.skipif(
    kernels.load() is None, reason=f"no op library: {kernels.unavailable()}"
)


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    """Removes the size below which Keras computes layers."""
    monkeypatch.setattr(fast_calls, "_LEAST_NUMBERS", 0)


def normal(*shape, seed=0):
    draw = np.random.default_rng(seed)
    return tf.constant(draw.standard_normal(shape, np.float32))


def in_lanes(images, product):
    """Returns the outputs of a product of images in lanes, as images."""
    lanes = lane_operations.to_lanes(images)
    outputs = product(lanes.values)
    return lane_operations.from_lanes(Lanes(outputs, lanes.count))


def random_mask(shape, density):
    return tf.constant(np.random.default_rng(2).random(shape) < density)


def close(got, want, tolerance=2e-5):
    largest = max(np.abs(want).max(), 1e-3)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * largest)


def everything(product, x, w):
    """Returns outputs, gradients and second gradients."""
    with tf.GradientTape() as second:
        second.watch([x, w])
        with tf.GradientTape() as first:
            first.watch([x, w])
            y = product(x, w)
            loss = tf.reduce_sum(tf.sin(y))
        gradients = first.gradient(loss, [x, w])
        steepness = tf.add_n([tf.reduce_sum(g**2) for g in gradients])
    return [y, *gradients, *second.gradient(steepness, [x, w])]


@pytest.mark.parametrize(
    "shape", [(1, 3, 5, 3), (17, 4, 4, 16), (33, 2, 3, 20), (16, 1, 1, 1)]
)
def test_images_are_turned_into_lanes_and_back(shape):
    images = normal(*shape)
    values, count = lane_operations.to_lanes(images)
    batch, rows, columns, channels = shape
    groups, *rest, width = values.shape
    assert rest == [channels, rows, columns]
    assert groups == -(-batch // width) and int(count) == batch
    by_image = tf.reshape(
        tf.transpose(values, [0, 4, 2, 3, 1]), [-1, *shape[1:]]
    )
    np.testing.assert_array_equal(by_image[:batch], images)
    assert not np.any(by_image[batch:])
    back = lane_operations.from_lanes(Lanes(values, count))
    np.testing.assert_array_equal(back, images)


@pytest.mark.parametrize(
    "images, kernel, strides, padding, pads",
    [
        ((5, 6, 7, 3), (3, 3, 3, 5), (1, 1), "SAME", (0, 0, 0, 0)),
        ((17, 8, 8, 20), (3, 3, 20, 17), (1, 1), "SAME", (0, 0, 0, 0)),
        ((16, 9, 4, 4), (3, 3, 4, 8), (2, 2), "VALID", (1, 1, 1, 1)),
        ((33, 8, 10, 6), (1, 1, 6, 7), (2, 2), "SAME", (0, 0, 0, 0)),
        ((2, 11, 9, 3), (5, 3, 3, 4), (2, 1), "SAME", (0, 0, 0, 0)),
        ((4, 5, 5, 2), (3, 3, 2, 3), (1, 1), "VALID", (0, 2, 1, 0)),
        ((1, 2, 2, 40), (1, 1, 40, 33), (1, 1), "VALID", (0, 0, 0, 0)),
        ((18, 5, 4, 12), (3, 3, 4, 6), (2, 1), "SAME", (0, 0, 0, 0)),
        # More weights than sums are kept as vectors of, and shared out.
        ((20, 5, 3, 70), (3, 3, 70, 41), (1, 1), "SAME", (0, 0, 0, 0)),
        ((20, 5, 5, 61), (1, 1, 61, 600), (1, 1), "SAME", (0, 0, 0, 0)),
    ],
)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_convolutions_are_those_of_images_that_are_not_in_lanes(
    images, kernel, strides, padding, pads, density
):
    x, w = normal(*images), normal(*kernel, seed=1)
    mask = random_mask(kernel, density)
    above, below, left, right = pads

    def plain(x, w):
        x = tf.pad(x, [[0, 0], [above, below], [left, right], [0, 0]])
        return kernels.sparse_conv2d(
            x, w, mask, strides=strides, padding=padding
        )

    def ours(x, w):
        return in_lanes(
            x,
            lambda values: lane_operations.conv2d(
                values, w, mask, strides=strides, padding=padding, pads=pads
            ),
        )

    found, wanted = everything(ours, x, w), everything(plain, x, w)
    for got, want in zip(found, wanted, strict=True):
        close(got, want, 1e-4)


@pytest.mark.parametrize("columns", [30, 31])
def test_outputs_that_are_larger_than_caches(columns):
    x, w = normal(40, 32, columns, 64), normal(1, 1, 64, 64, seed=1)
    mask = random_mask(w.shape, 0.2)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, w])
        got = in_lanes(
            x,
            lambda values: lane_operations.conv2d(
                values, w, mask, strides=(1, 1), padding="SAME"
            ),
        )
        want = tf.nn.conv2d(x, tf.where(mask, w, 0), 1, "SAME")
        losses = [tf.reduce_sum(tf.sin(y)) for y in (got, want)]
    close(got, want)
    got, want = (tape.gradient(loss, [x, w]) for loss in losses)
    close(got[0], want[0])
    close(got[1], want[1])
    lanes = lane_operations.to_lanes(x)
    norm = tf.ones(64), tf.ones(64) * 4, tf.ones(64), tf.zeros(64)
    got = lane_operations.normalise(lanes, *norm, epsilon=0.0, relu=True)
    got = lane_operations.from_lanes(Lanes(got, lanes.count))
    close(got, tf.nn.relu((x - 1) / 2))


@pytest.mark.parametrize("dense_gradient", [False, True])
def test_masks_are_bools_or_zeros_and_ones(dense_gradient):
    """Both give the same bits, also in second gradients."""
    x, w = normal(19, 5, 4, 3), normal(3, 3, 3, 2, seed=1)
    mask = random_mask(w.shape, 0.4)

    def product_by(mask):
        return lambda x, w: in_lanes(
            x,
            lambda values: lane_operations.conv2d(
                values, w, mask, dense_gradient=dense_gradient
            ),
        )

    bools = everything(product_by(mask), x, w)
    floats = everything(product_by(tf.cast(mask, tf.float32)), x, w)
    for ours, theirs in zip(bools, floats, strict=True):
        assert ours.numpy().any()
        np.testing.assert_array_equal(ours, theirs)


def scratch_bytes(shape, kernel, strides, padding="SAME"):
    return kernels.scratch_bytes(
        shape, kernel, strides=strides, padding=padding, in_lanes=True
    )


SHARED_OUT = [
    ((5, 6, 7, 6), (3, 3, 6, 17), (1, 1), "SAME"),
    ((17, 9, 8, 40), (3, 3, 40, 5), (2, 2), "SAME"),
    ((3, 7, 7, 5), (5, 3, 5, 9), (1, 2), "VALID"),
    ((2, 6, 6, 8), (3, 3, 2, 12), (1, 1), "SAME"),
]


def test_more_memory_than_allowed_is_shared_out():
    """Kernels work on some positions at a time, in a process with a limit."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-n0", __file__),
            *("-k", "little_memory"),
        ],
        env={
            **os.environ,
            "RIGL_KERAS_SCRATCH": {
                "avx512": "3000",
                "avx2": "1500",
                "portable": "750",
            }[kernels.instruction_set()],
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "." * (len(SHARED_OUT) + 1) in done.stdout  # none is skipped


@pytest.mark.skipif(
    "RIGL_KERAS_SCRATCH" not in os.environ, reason="there is much memory"
)
@pytest.mark.parametrize("images, kernel, strides, padding", SHARED_OUT)
def test_little_memory(images, kernel, strides, padding):
    _, both, limit = scratch_bytes(images, kernel, strides, padding)
    assert both > limit
    x, w = normal(*images), normal(*kernel, seed=1)
    mask = random_mask(kernel, 0.5)
    groups = images[3] // kernel[2]

    def plain(x, w):
        parts = zip(
            tf.split(x, groups, axis=3),
            tf.split(tf.where(mask, w, 0.0), groups, axis=3),
            strict=True,
        )
        return tf.concat(
            [tf.nn.conv2d(*part, strides, padding) for part in parts], axis=3
        )

    def ours(x, w):
        return in_lanes(
            x,
            lambda values: lane_operations.conv2d(
                values, w, mask, strides=strides, padding=padding
            ),
        )

    found, wanted = everything(ours, x, w), everything(plain, x, w)
    for got, want in zip(found, wanted, strict=True):
        close(got, want, 1e-4)


@pytest.mark.skipif(
    "RIGL_KERAS_SCRATCH" not in os.environ, reason="there is much memory"
)
def test_little_memory_of_a_layer():
    """The layer uses no lanes, or no sparse product, with the same result."""
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, padding="same", use_bias=False)(inputs)
    x = layers.Conv2D(17, 3, padding="same", use_bias=False)(x)
    dense = keras.Model(inputs, x)
    model = rigl_keras.sparsify(dense, 0.5, product="sparse")

    @tf.function(autograph=False)
    def outputs(x):
        return model(x, training=True)

    found = operations_of(outputs, tf.TensorSpec((20, 6, 6, 3)))
    kinds = [op.type for op in found if "Conv2D" in op.type]
    assert kinds == ["RiglKerasLanesConv2D"]
    x = normal(20, 6, 6, 3)
    close(outputs(x), rigl_keras.strip(model)(x).numpy())


def test_a_dense_gradient_of_the_kernel():
    x, w = normal(9, 6, 6, 3), normal(3, 3, 3, 4, seed=1)
    mask = random_mask(w.shape, 0.3)
    upstream = normal(9, 3, 3, 4, seed=3)
    lanes = lane_operations.to_lanes(x)
    with tf.GradientTape() as tape:
        tape.watch(w)
        y = lane_operations.conv2d(
            lanes.values,
            w,
            mask,
            strides=(2, 2),
            padding="VALID",
            pads=(1, 1, 1, 1),
            dense_gradient=True,
        )
        loss = tf.reduce_sum(
            lane_operations.from_lanes(Lanes(y, lanes.count)) * upstream
        )
    got = tape.gradient(loss, w)
    with tf.GradientTape() as tape:
        tape.watch(w)
        padded = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
        product = tf.nn.conv2d(padded, w, 2, "VALID")
        loss = tf.reduce_sum(product * upstream)
    close(got, tape.gradient(loss, w))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(16, 3, 2, 4), (37, 4, 5, 8)])
def test_batch_norm_and_what_follows_it(shape, relu, rate):
    x = normal(*shape) * 3 + 1
    gamma = 1 + normal(shape[-1], seed=1) / 4
    beta = normal(shape[-1], seed=2)
    seed = tf.constant([5, -3])

    def plain(x, gamma, beta):
        mean, variance = tf.nn.moments(x, [0, 1, 2])
        y = tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-3)
        y = tf.nn.relu(y) if relu else y
        if rate:
            y = tf.nn.experimental.stateless_dropout(y, rate, seed)
        return y, mean, variance

    def ours(x, gamma, beta):
        lanes = lane_operations.to_lanes(x)
        mean, variance = lane_operations.moments(lanes)
        y = lane_operations.normalise(
            *(lanes, mean, variance, gamma, beta),
            epsilon=1e-3,
            relu=relu,
            rate=rate,
            seed=seed,
        )
        unused = tf.reshape(
            tf.transpose(y, [0, 4, 1, 2, 3]), [-1, *y.shape[1:4]]
        )[shape[0] :]
        assert not np.any(unused)
        y = lane_operations.from_lanes(Lanes(y, lanes.count))
        return y, mean, variance

    found = {}
    for norm in (plain, ours):
        with tf.GradientTape() as second:
            second.watch([x, gamma, beta])
            with tf.GradientTape() as first:
                first.watch([x, gamma, beta])
                y, mean, variance = norm(x, gamma, beta)
                loss = tf.reduce_sum(tf.sin(y) * y)
            gradients = first.gradient(loss, [x, gamma, beta])
            steepness = tf.add_n([tf.reduce_sum(g**2) for g in gradients])
        again = second.gradient(steepness, [x, gamma, beta])
        found[norm] = [y, mean, variance, *gradients, *again]
    for got, want in zip(found[ours], found[plain], strict=True):
        close(got, want, 1e-4)


@pytest.mark.parametrize("shape", [(16, 3, 2, 4), (37, 4, 5, 8)])
def test_batch_norm_an_addend_and_relu(shape):
    x, addend = normal(*shape) * 3 + 1, normal(*shape, seed=3)
    gamma = 1 + normal(shape[-1], seed=1) / 4
    beta = normal(shape[-1], seed=2)

    def plain(x, gamma, beta, addend):
        mean, variance = tf.nn.moments(x, [0, 1, 2])
        y = tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-3)
        return tf.nn.relu(y + addend)

    def ours(x, gamma, beta, addend):
        lanes = lane_operations.to_lanes(x)
        y = lane_operations.normalise_and_add(
            lanes,
            *lane_operations.moments(lanes),
            gamma,
            beta,
            lane_operations.to_lanes(addend).values,
            epsilon=1e-3,
        )
        return lane_operations.from_lanes(Lanes(y, lanes.count))

    found = {}
    inputs = [x, gamma, beta, addend]
    for end in (plain, ours):
        with tf.GradientTape() as second:
            second.watch(inputs)
            with tf.GradientTape() as first:
                first.watch(inputs)
                y = end(*inputs)
                loss = tf.reduce_sum(tf.sin(y) * y)
            gradients = first.gradient(loss, inputs)
            steepness = tf.add_n([tf.reduce_sum(g**2) for g in gradients])
        found[end] = [y, *gradients, *second.gradient(steepness, inputs)]
    for got, want in zip(found[ours], found[plain], strict=True):
        close(got, want, 1e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_gradient_of_several_terms_is_that_of_their_sum(count):
    shape = (37, 3, 2, 4)
    lanes = lane_operations.to_lanes(normal(*shape))
    terms = [
        lane_operations.to_lanes(normal(*shape, seed=i)).values
        for i in range(count)
    ]
    addend = lane_operations.to_lanes(normal(*shape, seed=9)).values
    moments = lane_operations.moments(lanes)
    gamma, beta = normal(4, seed=1), normal(4, seed=2)
    norm = library.required().rigl_keras_lanes_normalise_add(
        *(lanes.values, lanes.count, *moments, gamma, beta, addend),
        epsilon=1e-3,
    )

    def gradients(dy):
        return library.required().rigl_keras_lanes_normalise_add_grad(
            *(dy, lanes.values, lanes.count, *moments, gamma, beta),
            norm.passed,
            epsilon=1e-3,
        )

    @tf.function(autograph=False)
    def in_place(terms):
        # Nobody else reads these, so the sum takes the place of the last one.
        return gradients([*terms[:-1], terms[-1] * 1.0])

    want = gradients([tf.add_n(terms)])
    for got in (gradients(terms), in_place(terms)):
        for one, other in zip(got, want, strict=True):
            close(one, other, 1e-6)


def test_moments_have_gradients():
    x = normal(21, 3, 3, 4)
    weights = normal(4, seed=1)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        mean, variance = lane_operations.moments(lane_operations.to_lanes(x))
        ours = tf.reduce_sum((mean + variance**2) * weights)
        mean, variance = tf.nn.moments(x, [0, 1, 2])
        theirs = tf.reduce_sum((mean + variance**2) * weights)
    close(tape.gradient(ours, x), tape.gradient(theirs, x))


def blocks(dropout=0.3):
    """Returns a pre-activation network whose layers all support lanes."""
    inputs = keras.Input((10, 10, 3))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    for i, (channels, stride) in enumerate([(8, 1), (16, 2)]):
        a = layers.BatchNormalization(name=f"norm{i}")(x)
        a = layers.ReLU()(a)
        y = layers.ZeroPadding2D(1)(a) if stride == 2 else a
        y = layers.Conv2D(
            channels,
            3,
            stride,
            padding="valid" if stride == 2 else "same",
            use_bias=False,
        )(y)
        y = layers.BatchNormalization()(y)
        y = layers.Activation("relu")(y)
        y = layers.Dropout(dropout, seed=i)(y)
        y = layers.Conv2D(channels, 3, padding="same", use_bias=False)(y)
        if stride == 2:
            x = layers.Conv2D(channels, 1, 2, use_bias=False)(a)
        x = layers.Add()([x, y])
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(3)(x))


def trained(model, product, batches):
    keras.utils.set_random_seed(0)
    model = rigl_keras.sparsify(model, 0.4, product=product)
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = model.fit(batches, epochs=3, shuffle=False, verbose=0)
    return model, history.history["loss"]


def residual_blocks():
    """Returns blocks that end with a sum and ReLU, as ResNet-50's."""

    def convolved(x, channels, size, strides=1):
        conv = layers.Conv2D(
            channels, size, strides, padding="same", use_bias=False
        )
        return layers.BatchNormalization()(conv(x))

    inputs = keras.Input((10, 10, 3))
    x = layers.ReLU()(convolved(inputs, 8, 3))
    for strides in (1, 2):
        y = layers.ReLU()(convolved(x, 8, 3, strides))
        y = convolved(y, 8, 1)
        x = x if strides == 1 else convolved(x, 8, 1, 2)
        x = layers.ReLU()(layers.Add()([y, x]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(3)(x))


@pytest.mark.parametrize("made", [blocks, residual_blocks])
def test_a_network_that_stays_in_lanes_trains_alike(made):
    model = made()
    x, y = normal(50, 10, 10, 3), np.arange(50) % 3
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(20)
    dense, want = trained(model, "dense", batches)
    sparse, got = trained(model, "sparse", batches)
    np.testing.assert_allclose(got, want, rtol=1e-3)
    for a, b in zip(dense.weights, sparse.weights, strict=True):
        close(b, np.asarray(a), 2e-3)


def operations_of(function, *args):
    graph = function.get_concrete_function(*args).graph
    return [op for op in graph.get_operations() if "Rigl" in op.type]


def test_layers_become_one_operation():
    model = rigl_keras.sparsify(blocks(), 0.4, product="sparse")

    @tf.function(autograph=False)
    def outputs(x):
        return model(x, training=True)

    found = operations_of(outputs, tf.TensorSpec((None, 10, 10, 3)))
    used = {t.op.name for op in found for t in op.inputs}
    norms = [op for op in found if op.type == "RiglKerasLanesNormalise"]
    read = [
        (op.get_attr("relu"), round(op.get_attr("rate"), 3))
        for op in norms
        if op.outputs[0].consumers()
        and any(
            consumer.type != "RiglKerasFromLanes"
            for consumer in op.outputs[0].consumers()
        )
    ]
    assert sorted(set(read)) == [(True, 0.0), (True, 0.3)]
    # No image is converted back before a layer that supports lanes.
    assert not [
        op
        for op in found
        if op.type == "RiglKerasFromLanes" and op.name in used
    ]
    assert sum(op.type == "RiglKerasToLanes" for op in found) == 1
    # The classifier.
    assert sum(op.type == "RiglKerasMatMul" for op in found) == 1
    assert "RiglKerasConv2D" not in {op.type for op in found}


def test_residual_blocks_end_with_one_operation():
    model = rigl_keras.sparsify(residual_blocks(), 0.4, product="sparse")

    @tf.function(autograph=False)
    def outputs(x):
        return model(x, training=True)

    graph = outputs.get_concrete_function(
        tf.TensorSpec((None, 10, 10, 3))
    ).graph
    read = {
        t.op.type
        for op in graph.get_operations()
        for t in op.inputs
        if op.type in ("RiglKerasLanesConv2D", "Mean")
    }
    assert "RiglKerasLanesNormaliseAdd" in read
    assert not read & {"AddV2", "Relu"}


def test_gradients_of_a_block_and_its_shortcut_are_added_by_batch_norm():
    model = rigl_keras.sparsify(residual_blocks(), 0.4, product="sparse")

    @tf.function(autograph=False)
    def gradients(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    graph = gradients.get_concrete_function(
        tf.TensorSpec((None, 10, 10, 3))
    ).graph
    ends = [
        op
        for op in graph.get_operations()
        if op.type == "RiglKerasLanesNormaliseAddGrad"
    ]
    # The last block has no shortcut after it.
    assert sorted(op.get_attr("terms") for op in ends) == [1, 2]
    assert not [op for end in ends for op in end.inputs if op.op.type == "AddN"]


def test_other_layers_find_their_images():
    """A layer that does not support lanes gets normal images."""
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.LeakyReLU()(x)
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
    x = layers.Add()([x, x])
    x = layers.Flatten()(x)
    model = keras.Model(inputs, layers.Dense(3)(x))
    x, y = normal(40, 8, 8, 4), np.arange(40) % 3
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    _, want = trained(model, "dense", batches)
    _, got = trained(model, "sparse", batches)
    np.testing.assert_allclose(got, want, rtol=1e-3)
