"""The C++ operations with wrong or large attributes and tensors.

No operation may end the process, or accept what TensorFlow's operations refuse.
`bin/check_kernels` also runs these tests under sanitizers.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support import sparse_products

import rigl_keras
from rigl_keras import kernels
from rigl_keras.kernels.operations import sparse_conv2d

REFUSED = (tf.errors.InvalidArgumentError, ValueError)
LARGEST = 2**31 - 1


@pytest.fixture(autouse=True, scope="module")
def operations():
    if kernels.load() is None:
        pytest.skip(f"no sparse kernels: {kernels.unavailable()}")
    return kernels.load()


def normal(draw, shape):
    return draw.standard_normal(shape).astype(np.float32)


def outcome(run, *arguments):
    """Returns the result of a call, or None if it is refused."""
    try:
        return run(*map(tf.constant, arguments))
    except REFUSED:
        return None


def assert_close(got, want):
    sparse_products.assert_close(got, want, relative=1e-5)


# Random calls, compared with TensorFlow.


def convolution(draw):
    """Draws shapes of images and kernel, and attributes, valid or not."""
    sizes = [1, 2, 3, 4, 5, 8, 17]
    images = [int(draw.choice(sizes)) for _ in range(4)]
    kernel = [*map(int, draw.choice([1, 2, 3, 4], 2)), images[3]]
    kernel.append(int(draw.choice(sizes)))
    strides = draw.choice([1, 1, 2, 3, 9, LARGEST], 2).tolist()
    dilations = draw.choice([1, 1, 2, 3, 9, 3000, 2**20], 2).tolist()
    spoil = draw.integers(12)
    if draw.integers(4) == 0:  # in groups
        images[3] = kernel[2] * int(draw.choice([1, 2, 3]))
    if spoil == 0:
        strides[draw.integers(2)] = int(draw.choice([-LARGEST, -1, 0]))
    elif spoil == 1:
        dilations[draw.integers(2)] = int(draw.choice([-LARGEST, -1, 0]))
    elif spoil == 2:
        kernel[draw.integers(3)] = int(draw.choice([0, 1, 5, 7]))
    elif spoil == 3:
        images[draw.integers(4)] = 0
    elif spoil == 4:
        (images if draw.integers(2) else kernel).pop()
    padding = str(draw.choice(["SAME", "VALID"]))
    return images, kernel, strides, dilations, padding


def dense(x, w, strides, padding, dilations):
    """Computes a convolution by its definition, where TensorFlow would crash.

    For each position of the kernel, it multiplies the pixels in the image.
    """
    seen, sizes = [], []
    for axis, (stride, dilation) in enumerate(
        zip(strides, dilations, strict=True)
    ):
        length, positions = x.shape[axis + 1], w.shape[axis]
        extent = (positions - 1) * dilation + 1
        before, size = 0, (length - extent + stride) // stride
        if padding == "SAME":
            size = -(-length // stride)
            before = max(0, (size - 1) * stride + extent - length) // 2
        sizes.append(size)
        at = np.arange(size) * stride - before
        seen.append([at + k * dilation for k in range(positions)])
    y = np.zeros((len(x), *sizes, w.shape[3]))
    groups = x.shape[3] // w.shape[2] if w.shape[2] else 1
    for i, j in np.ndindex(*w.shape[:2]):
        rows, columns = seen[0][i], seen[1][j]
        row = (rows >= 0) & (rows < x.shape[1])
        column = (columns >= 0) & (columns < x.shape[2])
        part = np.float64(x[:, rows[row]][:, :, columns[column]])
        y[np.ix_(np.arange(len(x)), row, column)] += np.concatenate(
            [
                each @ own
                for each, own in zip(
                    np.split(part, groups, axis=3),
                    np.split(w[i, j], groups, axis=1),
                    strict=True,
                )
            ],
            axis=3,
        )
    return y


def accepts(images, kernel, options):
    """Returns whether TensorFlow can build a graph of a convolution."""
    if len(images) == len(kernel) == 4 and not images[3] == kernel[2] == 0:
        if not kernel[2] or images[3] % kernel[2]:
            return False
        if not images[3] or kernel[3] % (images[3] // kernel[2]):
            return False
    graph = tf.function(
        lambda x, w: tf.nn.conv2d(x, w, **options), autograph=False
    )
    try:
        graph.get_concrete_function(
            tf.TensorSpec(images), tf.TensorSpec(kernel)
        )
    except REFUSED:
        return False
    return 0 not in kernel[:2]  # TensorFlow refuses these at run time


@pytest.mark.parametrize("part", range(4))
def test_any_convolution(part):
    """Each is computed as by TensorFlow, or refused as by TensorFlow."""
    draw = np.random.default_rng(part)
    accepted = refused = 0
    for case in range(40):
        images, kernel, strides, dilations, padding = convolution(draw)
        x, w = normal(draw, images), normal(draw, kernel)
        mask = (draw.random(kernel) < 0.5).astype(np.float32)
        options = dict(strides=strides, padding=padding, dilations=dilations)

        def ours(x, w, mask, options=options):
            return sparse_conv2d(x, w, mask, **options)

        signature = [tf.TensorSpec(None)] * 3 if case % 2 else None
        graph = tf.function(ours, input_signature=signature, autograph=False)
        about = (images, kernel, options)
        fits = accepts(images, kernel, options)
        want = dense(x, w * mask, **options) if fits else None
        small = x.size * w.size and max(*strides, *dilations) < 10
        if fits and small and images[3] == kernel[2]:
            assert_close(tf.nn.conv2d(x, w * mask, **options), want)
        for run in (graph, ours):
            got = outcome(run, x, w, mask)
            if fits:
                assert got is not None, about
                assert_close(got, want)
            elif got is not None:  # at run time, TensorFlow refuses less
                assert not got.shape.num_elements(), about
        accepted, refused = accepted + fits, refused + (not fits)
        if fits:
            check_gradients(draw, x, w, mask, options)
    assert accepted > 10 and refused > 10, (accepted, refused)


def check_gradients(draw, x, w, mask, options):
    """Checks both gradients against the dense product's."""
    x, w = tf.constant(x), tf.constant(w)
    with tf.GradientTape() as tape:
        tape.watch([x, w])
        y = sparse_conv2d(x, w, mask, **options)
    upstream = normal(draw, y.shape)
    to_x, to_w = tape.gradient(y, [x, w], output_gradients=upstream)
    assert to_x.shape == x.shape and to_w.shape == w.shape
    assert not to_w.numpy()[mask == 0].any()
    x, w = x.numpy(), w.numpy()
    dx, dw = normal(draw, x.shape), normal(draw, w.shape)
    for gradient, along, moved in (
        (to_x, dx, dense(dx, w * mask, **options)),
        (to_w, dw, dense(x, dw * mask, **options)),
    ):
        got = np.sum(np.float64(gradient) * along)
        want = np.sum(moved * upstream)
        largest = np.sqrt(np.sum((moved * upstream) ** 2))
        assert abs(got - want) <= 1e-4 * max(1, largest)


def test_any_shapes_of_gradients(operations):
    """They are refused, or fit the outputs."""
    draw = np.random.default_rng(0)
    accepted = 0
    for _ in range(150):
        images, kernel, strides, _, padding = convolution(draw)
        options = dict(strides=[1, *strides, 1], padding=padding)
        fits = accepts(images, kernel, options)
        outputs = draw.choice([1, 2, 3], 4).tolist()
        if fits and draw.integers(4):
            outputs = dense(
                np.ones(images), np.ones(kernel), strides, padding, (1, 1)
            ).shape
        w, dy = np.ones(kernel, "f"), np.ones(outputs, "f")
        mask = np.ones(kernel if draw.integers(9) else kernel[:-1], "f")
        sizes = np.int32(images)
        if not draw.integers(6):
            sizes[0] = draw.choice([-1, LARGEST])

        def to_images(dy, w, mask, sizes, options=options):
            return operations.rigl_keras_conv2d_backprop_input(
                out_backprop=dy,
                filter=w,
                mask=mask,
                input_sizes=sizes,
                **options,
            )

        def to_kernel(x, mask, dy, options=options):
            return operations.rigl_keras_conv2d_backprop_filter(
                input=x, mask=mask, out_backprop=dy, **options
            )

        one = outcome(to_images, dy, w, mask, sizes)
        two = outcome(to_kernel, np.ones(images, "f"), mask, dy)
        if not fits or 0 in images:
            continue
        want = dense(
            np.ones(images), np.ones(kernel), strides, padding, (1, 1)
        ).shape
        same = mask.shape == w.shape and dy.shape == want
        assert (two is not None) == same
        assert (one is not None) == (same and list(sizes) == images)
        accepted += same
    assert accepted > 10


def test_any_rows(operations):
    draw = np.random.default_rng(0)
    traced = tf.function(kernels.batch_norm, reduce_retracing=True)
    for _ in range(60):
        shape = draw.choice([0, 1, 2, 5, 40], draw.integers(5)).tolist()
        vectors = [shape[-1:], shape[-1:]]
        if not draw.integers(4):
            vectors[draw.integers(2)] = [[], [3], [5, 1], [0]][draw.integers(4)]
        x, gamma, beta = (normal(draw, s) for s in (shape, *vectors))
        fits = len(shape) > 1 and vectors == [shape[-1:]] * 2
        for run in (kernels.batch_norm, traced):
            got = outcome(
                lambda *given, run=run: run(*given, epsilon=0.1), x, gamma, beta
            )
            assert (got is not None) == fits
            if fits and x.size:
                over = tuple(range(x.ndim - 1))
                want = (x - x.mean(over)) / np.sqrt(x.var(over) + 0.1)
                assert_close(got[0], want * gamma + beta)
            if fits and not x.size:  # the mean of an empty tensor is NaN
                assert np.isnan(got[1]).all() and np.isnan(got[2]).all()
    for rate in (-1, 1, 2, np.nan, np.inf):
        for run in (kernels.dropout, tf.function(kernels.dropout)):
            with pytest.raises(REFUSED, match="rate must be in"):
                run(tf.ones(3), rate, [1, 2])
    for key, counter in (([], [1, 2]), ([1], [1]), ([1, 1], [1, 2])):
        with pytest.raises(REFUSED, match="a key and two counters"):
            operations.rigl_keras_dropout(
                x=tf.ones(3),
                key=tf.constant(key, tf.uint64),
                counter=tf.constant(counter, tf.uint64),
                rate=0.5,
            )


# Errors that must name the cause.

W = np.zeros((1, 1, 3, 4), np.float32)


def of_shape(*shape):
    return dict(filter=np.ones(shape, "f"), mask=np.ones(shape, "f"))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(strides=[1, 0, 0, 1]), "strides and dilations must be"),
        (dict(strides=[2, 1, 1, 1]), "strides and dilations must be"),
        (dict(strides=[1, 1, 1]), "strides and dilations must be"),
        (dict(dilations=[1, -1, 1, 1]), "strides and dilations must be"),
        (dict(padding="FULL"), "padding"),
        (of_shape(1, 3, 4), r"rank 4|\[rows, columns, in, out\]"),
        (of_shape(1, 1, 5, 4), "3 and 5|takes 5 channels"),
        (of_shape(0, 1, 3, 4), "must have rows and columns"),
        (of_shape(9, 1, 3, 4), "smaller than the kernel"),
        (dict(mask=np.ones((1, 1, 3, 2), "f")), "must be equal|mask must have"),
    ],
)
def test_what_a_convolution_refuses(operations, traced, changes, words):
    given = dict(filter=W, mask=W, strides=[1, 1, 1, 1], padding="VALID")

    def run(x):
        return operations.rigl_keras_conv2d(input=x, **{**given, **changes})

    if traced:  # refused before anything is computed
        graph = tf.function(run, autograph=False)
        with pytest.raises(REFUSED, match=words):
            graph.get_concrete_function(tf.TensorSpec((1, 4, 4, 3)))
    else:
        with pytest.raises(REFUSED, match=words):
            run(tf.zeros((1, 4, 4, 3)))


def test_sizes_that_no_tensor_has(operations):
    options = dict(strides=[1, 1, 1, 1], padding="SAME")

    def to_images(sizes):
        return operations.rigl_keras_conv2d_backprop_input(
            out_backprop=np.zeros((1, 1, 1, 4), "f"),
            filter=W,
            mask=W,
            input_sizes=sizes,
            **options,
        )

    sizes = np.int32([LARGEST] * 4)
    for run in (to_images, tf.function(to_images)):
        with pytest.raises(REFUSED):
            run(tf.constant(sizes))
    with pytest.raises(REFUSED):
        tf.function(lambda: to_images(sizes)).get_concrete_function()
    # Without elements, sizes can be as large as one likes.
    kernel = tf.zeros((2**32 + 1, 0, 3, 4))
    with pytest.raises(REFUSED, match=r"below 2\^31"):
        sparse_conv2d(tf.zeros((1, 4, 4, 3)), kernel, kernel)


@pytest.mark.parametrize(
    "kernel, mask, outputs, sizes",
    [
        ((3, 3, 3, 5), (2, 3, 3, 5), (2, 4, 4, 5), (2, 4, 4, 3)),
        ((3, 3, 3, 5), (3, 3, 3, 5), (2, 4, 4, 4), (2, 4, 4, 3)),
        ((3, 3, 3, 5), (3, 3, 3, 5), (2, 2, 4, 5), (2, 4, 4, 3)),
        ((3, 3, 3, 5), (3, 3, 3, 5), (2, 4, 4, 5), (2, 4, 4, 1)),
        ((3, 3, 3, 5), (3, 3, 3, 5), (2, 4, 4, 5), (4, 4, 3)),
        ((0, 3, 3, 5), (0, 3, 3, 5), (2, 4, 4, 5), (2, 4, 4, 3)),
        ((3, 3, 5), (3, 3, 5), (2, 4, 4, 5), (2, 4, 4, 3)),
    ],
)
def test_graphs_of_shapes_that_do_not_fit(
    operations, kernel, mask, outputs, sizes
):
    """Graphs are refused when they are built, in each pass."""
    options = dict(strides=[1, 1, 1, 1], padding="SAME")
    given = [tf.TensorSpec(shape) for shape in (sizes, kernel, mask, outputs)]

    def forward(x, w, mask, _):
        y = sparse_conv2d(x, w, mask)
        assert y.shape != outputs  # otherwise all would fit
        raise ValueError

    def to_images(_, w, mask, dy):
        return operations.rigl_keras_conv2d_backprop_input(
            out_backprop=dy, filter=w, mask=mask, input_sizes=sizes, **options
        )

    def to_kernel(x, _, mask, dy):
        return operations.rigl_keras_conv2d_backprop_filter(
            input=x, mask=mask, out_backprop=dy, **options
        )

    for run in (forward, to_images, to_kernel):
        if run is to_kernel and kernel != mask:
            continue  # this pass takes no kernel
        with pytest.raises(ValueError):
            tf.function(run, autograph=False).get_concrete_function(*given)


def test_images_smaller_than_the_kernel(operations):
    """As in TensorFlow, the graph or the kernel refuses them."""
    kernel = tf.ones((3, 3, 3, 4))

    def run(x):
        return sparse_conv2d(x, kernel, kernel, padding="VALID")

    assert run(tf.ones((1, 2, 2, 3))).shape == (1, 0, 0, 4)
    with pytest.raises(REFUSED, match="smaller than the kernel"):
        run(tf.ones((1, 1, 3, 3)))
    unknown = tf.function(run, input_signature=[tf.TensorSpec(None)])
    with pytest.raises(REFUSED, match="1 pixels and a kernel of 3"):
        unknown(tf.ones((1, 3, 1, 3)))
    with pytest.raises(REFUSED, match="smaller than the kernel"):
        tf.function(run)(tf.ones((1, 2, 2, 3)))


def test_a_model_of_images_that_are_too_small():
    """It raises, as the dense model does, and does not return NaN."""
    inputs = keras.Input((None, None, 8))
    x = layers.ReLU()(layers.Conv2D(4, 3)(inputs))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(x))
    model = keras.Model(inputs, layers.Dense(2)(x))
    sparse = rigl_keras.sparsify(model, 0.5, product="sparse")
    images = np.ones((1, 3, 3, 8), np.float32)
    for each in (model, sparse):
        with pytest.raises(REFUSED):
            each(images)
        run = tf.function(each, input_signature=[tf.TensorSpec((None,) * 4)])
        with pytest.raises(REFUSED):
            run(images)


def test_no_channels_sum_up_to_zero():
    """Outputs are zero even in memory that was used before."""
    other = tf.fill((1, 64, 64, 30), 1234.5)
    ones = np.ones((1, 1, 30, 1), np.float32)
    sparse_conv2d(other, ones, ones)
    nothing = np.zeros((3, 3, 0, 8), np.float32)
    images = np.zeros((2, 16, 16, 0), np.float32)
    got = sparse_conv2d(images, nothing, nothing)
    assert got.shape == (2, 16, 16, 8) and not got.numpy().any()


def test_tensors_that_begin_anywhere():
    """TensorFlow aligns its tensors to 64 bytes, but other libraries do not."""
    memory = np.arange(401, dtype=np.float32)
    parts = [memory[i:][: 5 * 5 * 4].reshape(1, 5, 5, 4) for i in range(1, 4)]
    kernel = np.ones((5, 5, 4, 1), np.float32)
    for part in parts:
        given = tf.experimental.dlpack.from_dlpack(part.__dlpack__())
        got = sparse_conv2d(given, kernel, kernel, padding="VALID")
        assert float(got[0, 0, 0, 0]) == part.sum()
        mask = (part.reshape(1, 1, 20, 5) % 2).astype(np.float32)
        y, mean, _ = kernels.batch_norm(
            given, tf.ones(4), tf.zeros(4), epsilon=0.1
        )
        assert y.shape == (1, 5, 5, 4)
        assert_close(mean, part.mean((0, 1, 2)))
        assert_close(kernels.dropout(given, 0.0, [1, 2]), part)
        assert mask.any()
