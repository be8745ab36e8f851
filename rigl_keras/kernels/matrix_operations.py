"""Products with a sparse matrix, as functions of tensors."""

import tensorflow as tf

from rigl_keras.kernels import library
from rigl_keras.kernels.convolution_gradients import all_of

__all__ = ["sparse_dense"]


def sparse_dense(
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    mask: tf.Tensor,
    *,
    bias: tf.Tensor | None = None,
    dense_gradient: bool = False,
) -> tf.Tensor:
    """Returns `inputs @ (kernel x mask) + bias`, skipping masked weights.

    Differentiable in inputs, kernel and bias, any number of times. The order of
    reading weights is computed after the mask is assigned, and kept until the
    next assignment.

    Args:
        inputs: Float32 of shape (..., inputs).
        kernel: Float32 of shape (inputs, units).
        mask: Tensor of the same shape, as in `sparse_conv2d`: the value of a
            variable, or reshaped from one.
        bias: Float32 of shape (units,), or None.
        dense_gradient: Whether the kernel's gradient is dL/d(kernel x mask) at
            every entry, at the cost of a dense product. False: zero where the
            mask is.

    Returns:
        Float32 of shape (..., units).

    Raises:
        RuntimeError: There is no op library (`library.unavailable`).
        tf.errors.InvalidArgumentError: Shapes do not fit. Within a
            `tf.function` that knows them, it is a ValueError.
        tf.errors.ResourceExhaustedError: There is not enough memory.
    """
    outputs, _ = library.required().rigl_keras_mat_mul(
        x=inputs,
        kernel=kernel,
        mask=mask,
        bias=tf.zeros([0]) if bias is None else bias,
        dense_gradient=dense_gradient,
    )
    return outputs


def _matrix(tensor):
    """Returns a tensor's rows as a matrix."""
    # Not -1: without entries, it could be any size.
    sizes = tf.shape(tensor)
    return tf.reshape(tensor, [tf.reduce_prod(sizes[:-1]), sizes[-1]])


def _unneeded(op):
    """Returns which inputs need no gradient, if a tape knows."""
    return getattr(op, "skip_input_indices", None) or ()


@tf.RegisterGradient("RiglKerasMatMul")
def _mat_mul_gradient(op, upstream, _):
    x, kernel, mask, bias = op.inputs
    dense, unneeded = op.get_attr("dense_gradient"), _unneeded(op)
    to_kernel = 1 not in unneeded
    to_x, of_kernel, to_bias = library.required().rigl_keras_mat_mul_grad(
        x=x,
        dy=upstream,
        kernel=kernel,
        mask=mask,
        weights=op.outputs[1],
        to_x=0 not in unneeded,
        to_kernel=to_kernel and not dense,
        to_bias=3 not in unneeded and bias.shape[0] != 0,
        dense_gradient=dense,
    )
    if to_kernel and dense:
        of_kernel = tf.matmul(_matrix(x), _matrix(upstream), transpose_a=True)
    return (
        None if 0 in unneeded else to_x,
        of_kernel if to_kernel else None,
        None,
        to_bias,
    )


@tf.RegisterGradient("RiglKerasMatMulGrad")
def _mat_mul_second_gradient(op, of_x, of_kernel, of_bias):
    """The gradients of dx = dy W', dW = x' dy (masked) and db = sum(dy)."""
    x, dy, kernel, mask, weights = op.inputs
    dense = op.get_attr("dense_gradient")
    operations = library.required()
    none = tf.zeros([0])
    to_x = tf.zeros_like(x)
    to_dy = tf.zeros_like(dy)
    to_kernel = None

    def mat_mul(x, kernel, mask=mask):
        return operations.rigl_keras_mat_mul(
            x=x, kernel=kernel, mask=mask, bias=none, dense_gradient=dense
        )

    if op.get_attr("to_x") and of_x is not None:
        to_dy += mat_mul(of_x, kernel)[0]
        if dense:
            to_kernel = tf.matmul(_matrix(of_x), _matrix(dy), transpose_a=True)
        else:
            _, to_kernel, _ = operations.rigl_keras_mat_mul_grad(
                x=of_x,
                dy=dy,
                kernel=kernel,
                mask=mask,
                weights=weights,
                to_x=False,
                to_kernel=True,
                to_bias=False,
            )
    if op.get_attr("to_kernel") and of_kernel is not None:
        looked_at = all_of(mask)
        product, left = mat_mul(x, of_kernel, looked_at)
        to_dy += product
        to_x += operations.rigl_keras_mat_mul_grad(
            x=x,
            dy=dy,
            kernel=of_kernel,
            mask=looked_at,
            weights=left,
            to_x=True,
            to_kernel=False,
            to_bias=False,
        )[0]
    if op.get_attr("to_bias") and of_bias is not None:
        to_dy += of_bias
    return to_x, to_dy, to_kernel, None, None
