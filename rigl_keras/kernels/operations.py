"""The C++ operations as functions of tensors, with their gradients."""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from rigl_keras.kernels import library
from rigl_keras.kernels.convolution_gradients import register_gradients

__all__ = [
    "batch_norm",
    "dense_kernel_gradient",
    "dense_library",
    "dropout",
    "instruction_set",
    "masked_kernel",
    "scratch_bytes",
    "sparse_conv2d",
    "sparse_conv2d_transpose",
]


def sparse_conv2d(
    images: tf.Tensor,
    kernel: tf.Tensor,
    mask: tf.Tensor,
    *,
    strides: Sequence[int] = (1, 1),
    padding: str = "SAME",
    dilations: Sequence[int] = (1, 1),
    dense_gradient: bool = False,
) -> tf.Tensor:
    """Returns `conv2d(images, kernel x mask)`, skipping masked weights.

    Differentiable in images and kernel, any number of times. The order of
    reading weights is computed after the mask is assigned, and kept until the
    next assignment.

    Args:
        images: Float32 of shape (batch, rows, columns, channels).
        kernel: Float32 of shape (rows, columns, channels, filters). If it has
            fewer channels than the images, the convolution has groups: each
            filter sees the channels of its group.
        mask: Bool tensor of the kernel's shape, or float32 zeros and ones. Pass
            the value of a variable: for a tensor that each call computes, each
            call computes the order too. Or bytes (`place_operations.look_at`):
            1 where a bool mask is True, and 2 more where the gradient is
            computed as well.
        strides: For rows and columns, at least 1.
        padding: `"SAME"` or `"VALID"`, as in `tf.nn.conv2d`.
        dilations: For rows and columns, at least 1.
        dense_gradient: Whether the kernel's gradient is dL/d(kernel x mask) at
            every entry, at the cost of a dense pass. False: zero where the mask
            is.

    Returns:
        Float32 of shape (batch, new rows, new columns, filters).

    Raises:
        RuntimeError: There is no op library (`library.unavailable`).
        tf.errors.InvalidArgumentError: Shapes do not fit. Within a
            `tf.function` that knows them, it is a ValueError.
        tf.errors.ResourceExhaustedError: There is not enough memory, or a
            single position of the kernel takes more than `scratch_bytes`
            allows: it has about a million channels.
    """
    return library.required().rigl_keras_conv2d(
        input=images,
        filter=kernel,
        mask=mask,
        strides=[1, *strides, 1],
        padding=padding.upper(),
        dilations=[1, *dilations, 1],
        dense_gradient=dense_gradient,
    )


def sparse_conv2d_transpose(
    outputs: tf.Tensor,
    kernel: tf.Tensor,
    mask: tf.Tensor,
    *,
    sizes: Sequence[Any],
    strides: Sequence[int] = (1, 1),
    padding: str = "SAME",
    dilations: Sequence[int] = (1, 1),
    dense_gradient: bool = False,
) -> tf.Tensor:
    """Returns the gradient of a `sparse_conv2d` for its images.

    It is like `tf.nn.conv2d_transpose`, and differentiable like
    `sparse_conv2d`.

    Args:
        outputs: Float32 of shape (batch, new rows, new columns, filters).
        kernel, mask: Tensors of shape (rows, columns, channels, filters), as in
            `sparse_conv2d`.
        sizes: Rows and columns of the images, ints or tensors. A convolution of
            such images must have outputs of this shape.
        strides, padding, dilations, dense_gradient: As in `sparse_conv2d`.

    Returns:
        Float32 of shape (batch, rows, columns, channels).
    """
    channels: Any = kernel.shape[2]
    images = library.required().rigl_keras_conv2d_backprop_input(
        out_backprop=outputs,
        filter=kernel,
        mask=mask,
        input_sizes=tf.stack([tf.shape(outputs)[0], *sizes, channels]),
        strides=[1, *strides, 1],
        padding=padding.upper(),
        dilations=[1, *dilations, 1],
        dense_gradient=dense_gradient,
    )
    known = [size if isinstance(size, int) else None for size in sizes]
    images.set_shape([outputs.shape[0], *known, channels])
    return images


def masked_kernel(kernel: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Returns kernel x mask, computed once while both stay the same.

    It is the kernel itself if that is zero outside the mask. Differentiable any
    number of times; the gradient is masked.

    Args:
        kernel: Float32 of any shape: the value of a variable. For a tensor that
            each call computes, each call computes the product.
        mask: Tensor of the kernel's shape, as in `sparse_conv2d`.
    """
    return library.required().rigl_keras_masked_kernel(kernel=kernel, mask=mask)


def batch_norm(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, *, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Normalises by the moments of a batch, in a few passes over memory.

    y = (x - mean) / sqrt(variance + epsilon) * gamma + beta. Differentiable in
    x, gamma and beta, any number of times.

    Args:
        x: Float32 of shape (..., channels).
        gamma, beta: Float32 of shape (channels,).
        epsilon: Added to the variance, positive.

    Returns:
        y, and the mean and the (biased) variance of each channel.
    """
    return library.required().rigl_keras_batch_norm(
        x=x, gamma=gamma, beta=beta, epsilon=epsilon
    )


def dropout(x: tf.Tensor, rate: float, seed: tf.Tensor) -> tf.Tensor:
    """Returns the result of `tf.nn.experimental.stateless_dropout`, faster.

    The random numbers are the same (Philox, as on every CPU), and are drawn
    where they are used.

    Args:
        x: Float32 of any shape.
        rate: Fraction of entries that become 0, in [0, 1).
        seed: Integers of shape (2,).

    Returns:
        Float32 of the same shape.
    """
    key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(
        seed=tf.cast(seed, tf.int64)
    )
    return library.required().rigl_keras_dropout(
        x=x, key=key, counter=counter, rate=rate
    )


def scratch_bytes(
    images: Sequence[int],
    kernel: Sequence[int],
    *,
    strides: Sequence[int] = (1, 1),
    padding: str = "SAME",
    dilations: Sequence[int] = (1, 1),
    in_lanes: bool = False,
) -> tuple[int, int, int]:
    """Returns the memory of a sparse convolution, for each thread.

    It grows with the channels times the span of the kernel. Above the limit,
    operations compute the positions of the kernel in parts, each within the
    limit, and a dense convolution is probably faster.

    Args:
        images: Batch, rows, columns, channels.
        kernel: Rows, columns, channels, filters.
        strides, padding, dilations: As in `sparse_conv2d`.
        in_lanes: Whether images are in lanes (`lane_operations`).

    Returns:
        Bytes of the forward pass, of a training step, and the limit.

    Raises:
        tf.errors.InvalidArgumentError: Shapes do not fit.
    """
    taken, limit = library.required().rigl_keras_scratch_bytes(
        images=tf.constant(images, tf.int64),
        kernel=tf.constant(kernel, tf.int64),
        strides=[1, *strides, 1],
        padding=padding.upper(),
        dilations=[1, *dilations, 1],
        in_lanes=in_lanes,
    )
    forward, both = taken.numpy().tolist()
    return forward, both, int(limit)


def instruction_set() -> str:
    """Returns the instruction set in use: avx512, avx2 or portable."""
    return library.required().rigl_keras_computed_by().sparse.numpy().decode()


def dense_library() -> str:
    """Returns the library of TensorFlow's dense products here.

    It is oneDNN or Eigen. Without AVX-512, TensorFlow uses oneDNN, which may be
    faster, only if TF_ENABLE_ONEDNN_OPTS=1 is set before its import.
    """
    return library.required().rigl_keras_computed_by().dense.numpy().decode()


def dense_kernel_gradient(
    images: tf.Tensor,
    mask: tf.Tensor,
    upstream: tf.Tensor,
    attributes: Mapping[str, Any],
) -> tf.Tensor:
    """Returns a convolution's gradient of its kernel, at every entry.

    Args:
        images: Its images.
        mask: Its mask; only the shape is used.
        upstream: The gradient of its outputs.
        attributes: Strides, padding and dilations of the operation.
    """
    # On a CPU, TensorFlow has none for dilated kernels or groups.
    if max(attributes["dilations"]) > 1 or images.shape[3] != mask.shape[2]:
        return library.required().rigl_keras_conv2d_backprop_filter(
            input=images,
            mask=tf.ones_like(mask),
            out_backprop=upstream,
            **attributes,
        )
    return tf.raw_ops.Conv2DBackpropFilter(
        input=images,
        filter_sizes=mask.shape,
        out_backprop=upstream,
        **attributes,
    )


register_gradients(
    "RiglKerasConv2D",
    "rigl_keras_conv2d",
    attributes=("strides", "padding", "dilations"),
    dense_kernel_gradient=dense_kernel_gradient,
)


@tf.RegisterGradient("RiglKerasMaskedKernel")
def _masked_kernel_gradient(op, upstream):
    mask = tf.cast(op.inputs[1], tf.bool)
    return tf.where(mask, upstream, tf.zeros([], upstream.dtype)), None


@tf.RegisterGradient("RiglKerasBatchNorm")
def _batch_norm_gradient(op, upstream, to_mean, to_variance):
    x, gamma, _ = op.inputs
    _, mean, variance = op.outputs
    nothing = tf.zeros_like(mean)
    return library.required().rigl_keras_batch_norm_grad(
        dy=tf.zeros_like(x) if upstream is None else upstream,
        dmean=nothing if to_mean is None else to_mean,
        dvariance=nothing if to_variance is None else to_variance,
        x=x,
        gamma=gamma,
        mean=mean,
        variance=variance,
        epsilon=op.get_attr("epsilon"),
    )


@tf.RegisterGradient("RiglKerasBatchNormGrad")
def _batch_norm_second_gradient(op, *upstream):
    # Rare: TensorFlow's operations are fast enough.
    inputs = [tf.identity(tensor) for tensor in op.inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = _gradients_of_batch_norm(
            *inputs, epsilon=op.get_attr("epsilon")
        )
    return tape.gradient(outputs, inputs, output_gradients=list(upstream))


def _gradients_of_batch_norm(
    upstream, to_mean, to_variance, x, gamma, mean, variance, *, epsilon
):
    """Returns the operation's results, differentiable in everything."""
    rows = list(range(len(x.shape) - 1))
    count = tf.cast(tf.size(x) / tf.size(mean), x.dtype)
    inverse = tf.math.rsqrt(variance + epsilon)
    apart = x - mean
    total = tf.reduce_sum(upstream, rows)
    product = tf.reduce_sum(upstream * apart, rows)
    to_x = (
        gamma * inverse * (upstream - total / count)
        - apart * gamma * inverse**3 * product / count
        + (to_mean + 2 * apart * to_variance) / count
    )
    return to_x, product * inverse, total


@tf.RegisterGradient("RiglKerasDropout")
def _dropout_gradient(op, upstream):
    _, key, counter = op.inputs
    to_x = library.required().rigl_keras_dropout(
        x=upstream, key=key, counter=counter, rate=op.get_attr("rate")
    )
    return to_x, None, None
