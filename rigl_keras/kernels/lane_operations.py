"""Operations on images in lanes, the layout of sparse convolutions.

Images in lanes are `[groups, channels, rows, columns, lanes]`: a group has as
many images as a vector has numbers, and lanes without an image are zero.
Convolutions read this layout directly, so consecutive layers in lanes never
convert images.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from rigl_keras.kernels import library
from rigl_keras.kernels.convolution_gradients import register_gradients
from rigl_keras.kernels.operations import dense_kernel_gradient

__all__ = [
    "Lanes",
    "conv2d",
    "from_lanes",
    "in_lanes",
    "moments",
    "normalise",
    "normalise_and_add",
    "to_lanes",
]


class Lanes(NamedTuple):
    """Images in lanes.

    Attributes:
        values: Float32 of shape (groups, channels, rows, columns, lanes).
        count: Number of images, an int32 scalar.
    """

    values: tf.Tensor
    count: tf.Tensor


def in_lanes(images: tf.Tensor) -> Lanes | None:
    """Returns images in lanes if this graph already has them so, or None.

    Then nobody uses their conversion back, and TensorFlow removes it.

    Args:
        images: A tensor of any kind.
    """
    if not tf.is_symbolic_tensor(images):
        return None
    source = images.op
    if (
        source.type != "RiglKerasFromLanes"
        or source.graph is not tf.compat.v1.get_default_graph()
    ):
        return None
    return Lanes(*source.inputs)


def to_lanes(images: tf.Tensor) -> Lanes:
    """Returns images in lanes.

    Args:
        images: Float32 of shape (batch, rows, columns, channels).
    """
    known = in_lanes(images)
    if known is not None:
        return known
    values = library.required().rigl_keras_to_lanes(images=images)
    return Lanes(values, tf.shape(images)[0])


def from_lanes(lanes: Lanes, batch: int | None = None) -> tf.Tensor:
    """Returns images of shape (batch, rows, columns, channels).

    Args:
        lanes: The images.
        batch: Number of images, if known.
    """
    images = library.required().rigl_keras_from_lanes(
        lanes=lanes.values, count=lanes.count
    )
    _, channels, rows, columns, _ = lanes.values.shape
    images.set_shape([batch, rows, columns, channels])
    return images


def conv2d(
    values: tf.Tensor,
    kernel: tf.Tensor,
    mask: tf.Tensor,
    *,
    strides: Sequence[int] = (1, 1),
    padding: str = "SAME",
    pads: Sequence[int] = (0, 0, 0, 0),
    dense_gradient: bool = False,
) -> tf.Tensor:
    """Returns the result of `operations.sparse_conv2d` for images in lanes.

    Args:
        values: Images in lanes.
        kernel, mask, strides, dense_gradient: As in `sparse_conv2d`.
        padding: `"SAME"` or `"VALID"`.
        pads: Zeros beyond the images with `"VALID"`: above, below, to the
            left, to the right.
    """
    return library.required().rigl_keras_lanes_conv2d(
        input=values,
        filter=kernel,
        mask=mask,
        strides=[1, *strides, 1],
        padding=padding.upper(),
        pads=list(pads),
        dense_gradient=dense_gradient,
    )


def moments(lanes: Lanes) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the mean and the (biased) variance of each channel."""
    return library.required().rigl_keras_lanes_moments(
        lanes=lanes.values, count=lanes.count
    )


def normalise(
    lanes: Lanes,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    epsilon: float,
    relu: bool = False,
    rate: float = 0.0,
    seed: tf.Tensor | None = None,
) -> tf.Tensor:
    """Returns batch norm with the moments of a batch, and what follows it.

    Differentiable in the images, gamma and beta. `mean` and `variance` must be
    those of the images: their gradient is included.

    Args:
        lanes: The images.
        mean, variance: The result of `moments` for the images.
        gamma, beta: Float32 of shape (channels,).
        epsilon: Added to the variance, positive.
        relu: Whether ReLU follows.
        rate: Rate of a dropout that follows, in [0, 1). Above 0, the number of
            channels must be a multiple of 4.
        seed: Its seed, integers of shape (2,). It drops the same entries as
            `operations.dropout`.

    Returns:
        Images in lanes.
    """
    key, counter = tf.zeros([0], tf.uint64), tf.zeros([0], tf.uint64)
    if rate:
        if seed is None:
            raise ValueError(f"Dropout needs a seed. Received: {rate=}.")
        key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(
            seed=tf.cast(seed, tf.int64)
        )
    return (
        library.required()
        .rigl_keras_lanes_normalise(
            lanes=lanes.values,
            count=lanes.count,
            mean=mean,
            variance=variance,
            gamma=gamma,
            beta=beta,
            key=key,
            counter=counter,
            epsilon=epsilon,
            relu=relu,
            rate=rate,
        )
        .y
    )


def normalise_and_add(
    lanes: Lanes,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    addend: tf.Tensor,
    *,
    epsilon: float,
) -> tf.Tensor:
    """Returns ReLU of the sum of batch norm and an addend.

    This is how a residual block ends: one operation reads and writes images
    once, where batch norm, sum and ReLU do so three times.

    Args:
        lanes, mean, variance, gamma, beta, epsilon: As in `normalise`.
        addend: Values in lanes, of the same shape.

    Returns:
        Images in lanes.
    """
    return (
        library.required()
        .rigl_keras_lanes_normalise_add(
            lanes=lanes.values,
            count=lanes.count,
            mean=mean,
            variance=variance,
            gamma=gamma,
            beta=beta,
            addend=addend,
            epsilon=epsilon,
        )
        .y
    )


def _norm_attributes(op):
    return {name: op.get_attr(name) for name in ("epsilon", "relu", "rate")}


@tf.RegisterGradient("RiglKerasToLanes")
def _to_lanes_gradient(op, upstream):
    images = op.inputs[0]
    lanes = Lanes(upstream, tf.shape(images)[0])
    return from_lanes(lanes, images.shape[0])


@tf.RegisterGradient("RiglKerasFromLanes")
def _from_lanes_gradient(op, upstream):
    return to_lanes(upstream).values, None


def _dense_kernel_gradient(values, mask, upstream, attributes):
    """Returns a convolution's gradient of its kernel, at every entry."""
    above, below, left, right = attributes["pads"]
    # Lanes without an image are zero, and contribute nothing.
    images, gradients = (
        from_lanes(Lanes(t, tf.shape(t)[0] * tf.shape(t)[4]))
        for t in (values, upstream)
    )
    if any(attributes["pads"]):
        images = tf.pad(images, [[0, 0], [above, below], [left, right], [0, 0]])
    how = {name: attributes[name] for name in attributes if name != "pads"}
    return dense_kernel_gradient(images, mask, gradients, how)


register_gradients(
    "RiglKerasLanesConv2D",
    "rigl_keras_lanes_conv2d",
    attributes=("strides", "padding", "dilations", "pads"),
    dense_kernel_gradient=_dense_kernel_gradient,
)


@tf.RegisterGradient("RiglKerasLanesMoments")
def _moments_gradient(op, to_mean, to_variance):
    values, count = op.inputs
    size = _numbers_of_a_channel(values, count)
    apart = values - _of_channels(op.outputs[0])
    to_values = _of_channels(to_mean) + 2 * apart * _of_channels(to_variance)
    return _used(values, count) * to_values / size, None


def _inputs_of_gradient(op, upstream):
    """Returns what both gradients of batch norm are computed from."""
    values, count, mean, variance, gamma, beta, *_ = op.inputs
    return {
        "dy": upstream,
        "lanes": values,
        "count": count,
        "mean": mean,
        "variance": variance,
        "gamma": gamma,
        "beta": beta,
        "passed": op.outputs[1],
    }


@tf.RegisterGradient("RiglKerasLanesNormalise")
def _normalise_gradient(op, upstream, _):
    to_values, to_gamma, to_beta = (
        library.required().rigl_keras_lanes_normalise_grad(
            **_inputs_of_gradient(op, upstream), **_norm_attributes(op)
        )
    )
    return to_values, None, None, None, to_gamma, to_beta, None, None


@tf.RegisterGradient("RiglKerasLanesNormaliseAdd")
def _normalise_and_add_gradient(op, upstream, _):
    to_values, to_gamma, to_beta, to_addend = (
        library.required().rigl_keras_lanes_normalise_add_grad(
            **_inputs_of_gradient(op, _terms(upstream)),
            epsilon=op.get_attr("epsilon"),
        )
    )
    return to_values, None, None, None, to_gamma, to_beta, to_addend


def _terms(upstream):
    """Returns the gradients that TensorFlow adds up for an upstream gradient.

    Images that a block and its shortcut read have two. If nobody else uses
    their sum, TensorFlow removes it.
    """
    if (
        tf.is_symbolic_tensor(upstream)
        and upstream.op.type == "AddN"
        and upstream.op.graph is tf.compat.v1.get_default_graph()
    ):
        return list(upstream.op.inputs)
    return [upstream]


@tf.RegisterGradient("RiglKerasLanesNormaliseGrad")
def _normalise_second_gradient(op, *upstream):
    return _second_gradient(op, upstream, **_norm_attributes(op))


@tf.RegisterGradient("RiglKerasLanesNormaliseAddGrad")
def _normalise_and_add_second_gradient(op, *upstream):
    return _second_gradient(op, upstream, epsilon=op.get_attr("epsilon"))


def _second_gradient(op, upstream, **attributes):
    # Rare: TensorFlow's operations are fast enough.
    *terms, values, count, _, _, gamma, beta, passed = op.inputs
    dy = tf.add_n(terms)
    watched = [tf.identity(t) for t in (dy, values, gamma, beta)]
    with tf.GradientTape() as tape:
        tape.watch(watched)
        outputs = _gradients_of_norm(count, passed, *watched, **attributes)
        outputs = outputs[: len(upstream)]
    to_dy, to_values, to_gamma, to_beta = tape.gradient(
        outputs, watched, output_gradients=list(upstream)
    )
    to_terms = [to_dy] * len(terms)
    return *to_terms, to_values, None, None, None, to_gamma, to_beta, None


def _gradients_of_norm(
    count,
    passed,
    upstream,
    values,
    gamma,
    beta,
    *,
    epsilon,
    relu=False,
    rate=None,
):
    """Returns the operation's results, differentiable in everything.

    Without a rate, those of `normalise_and_add`.
    """
    axes = [0, 2, 3, 4]
    size = _numbers_of_a_channel(values, count)
    used = _used(values, count)
    mean = tf.reduce_sum(values, axes) / size
    apart = used * (values - _of_channels(mean))
    variance = tf.reduce_sum(apart**2, axes) / size
    inverse = tf.math.rsqrt(variance + epsilon)
    if rate or rate is None:
        lanes = tf.bitwise.left_shift(
            tf.constant(1, tf.int32), tf.range(values.shape[4])
        )
        bits = tf.cast(passed, tf.int32)[..., None]
        kept = tf.bitwise.bitwise_and(bits, lanes) > 0
        upstream = tf.where(kept, upstream / (1 - (rate or 0.0)), 0.0)
    elif relu:
        positive = (
            apart * _of_channels(gamma * inverse) + _of_channels(beta) > 0
        )
        upstream = tf.where(positive, upstream, 0.0)
    upstream = used * upstream
    total = tf.reduce_sum(upstream, axes)
    product = tf.reduce_sum(upstream * apart, axes)
    to_values = used * (
        _of_channels(gamma * inverse) * (upstream - _of_channels(total) / size)
        - apart * _of_channels(gamma * inverse**3 * product) / size
    )
    return to_values, product * inverse, total, upstream


def _of_channels(vector):
    """Returns a vector over channels, shaped for images in lanes."""
    return tf.reshape(vector, [1, -1, 1, 1, 1])


def _numbers_of_a_channel(values, count):
    sizes = tf.shape(values)
    return tf.cast(count * sizes[2] * sizes[3], values.dtype)


def _used(values, count) -> Any:
    """Returns 1 for each lane that has an image."""
    sizes = tf.shape(values)
    lanes = tf.range(sizes[0] * sizes[4]) < count
    shape = tf.stack([sizes[0], 1, 1, 1, sizes[4]])
    return tf.cast(tf.reshape(lanes, shape), values.dtype)
