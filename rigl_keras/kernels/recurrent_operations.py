"""LSTM and GRU layers with sparse kernels, as functions of tensors."""

import tensorflow as tf

from rigl_keras.kernels import library

__all__ = ["sparse_gru", "sparse_lstm"]


def sparse_lstm(
    x: tf.Tensor,
    state: tf.Tensor,
    carry: tf.Tensor,
    kernel: tf.Tensor,
    kernel_mask: tf.Tensor,
    recurrent: tf.Tensor,
    recurrent_mask: tf.Tensor,
    bias: tf.Tensor | None = None,
    *,
    sequences: bool = True,
    backwards: bool = False,
    dense_gradient: bool = False,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the result of Keras's LSTM, skipping masked weights.

    All steps are one operation. The gates are sigmoids and the activation is
    tanh. Differentiable once, in everything except masks.

    Args:
        x: Float32 of shape (batch, steps, inputs), with at least one step.
        state, carry: Float32 of shape (batch, units): before the first step.
        kernel, kernel_mask: Tensors of shape (inputs, 4 units): for the input,
            forget, carry and output gates. Masks are as in `sparse_conv2d`.
            With shape (0, 4 units), x is already multiplied by the kernel.
        recurrent, recurrent_mask: Float32 of shape (units, 4 units).
        bias: Float32 of shape (4 units,), or None.
        sequences: Whether to return the outputs of all steps, or of the last.
        backwards: Whether the last step of x comes first.
        dense_gradient: Whether the gradients of both kernels are those of
            kernel x mask at every entry. False: zero where masks are.

    Returns:
        Outputs of shape (batch, steps or 1, units), in the order in which they
        were computed, and state and carry after the last step.

    Raises:
        RuntimeError: There is no op library (`library.unavailable`).
        tf.errors.InvalidArgumentError: Shapes do not fit. Within a
            `tf.function` that knows them, it may be a ValueError.
        tf.errors.ResourceExhaustedError: There is not enough memory.
    """
    outputs, last = _recurrent(
        "lstm",
        (x, state, carry, kernel, kernel_mask, recurrent, recurrent_mask),
        bias,
        sequences,
        backwards,
        dense_gradient,
    )
    return outputs, outputs[:, -1], last


def sparse_gru(
    x: tf.Tensor,
    state: tf.Tensor,
    kernel: tf.Tensor,
    kernel_mask: tf.Tensor,
    recurrent: tf.Tensor,
    recurrent_mask: tf.Tensor,
    bias: tf.Tensor | None = None,
    *,
    sequences: bool = True,
    backwards: bool = False,
    dense_gradient: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the result of Keras's GRU (`reset_after=True`), as `sparse_lstm`.

    Args:
        x, state, sequences, backwards, dense_gradient: As in `sparse_lstm`.
        kernel, kernel_mask: Tensors of shape (inputs, 3 units): for the update
            and reset gates and the candidate.
        recurrent, recurrent_mask: Tensors of shape (units, 3 units).
        bias: Float32 of shape (2, 3 units), for inputs and for states, or None.

    Returns:
        Outputs of shape (batch, steps or 1, units), and the state after the
        last step.
    """
    outputs, _ = _recurrent(
        "gru",
        (
            *(x, state, tf.zeros([0, 0]), kernel, kernel_mask, recurrent),
            recurrent_mask,
        ),
        None if bias is None else tf.reshape(bias, [-1]),
        sequences,
        backwards,
        dense_gradient,
    )
    return outputs, outputs[:, -1]


def _recurrent(kind, tensors, bias, sequences, backwards, dense_gradient):
    # The dense gradient needs the states of all steps.
    outputs, last, *_ = library.required().rigl_keras_recurrent(
        *tensors,
        bias=tf.zeros([0]) if bias is None else bias,
        kind=kind,
        sequences=sequences or dense_gradient,
        backwards=backwards,
        dense_gradient=dense_gradient,
    )
    return outputs if sequences else outputs[:, -1:], last


@tf.RegisterGradient("RiglKerasRecurrent")
def _recurrent_gradient(op, of_outputs, of_last, *_):
    x, state, _, kernel, *_ = op.inputs
    outputs, last, *kept = op.outputs
    dense, kind = op.get_attr("dense_gradient"), op.get_attr("kind").decode()
    unneeded = getattr(op, "skip_input_indices", None) or ()
    backwards = op.get_attr("backwards")
    to_x, to_state, to_carry, to_kernel, to_recurrent, to_bias, *products = (
        library.required().rigl_keras_recurrent_grad(
            *op.inputs,
            *kept,
            dy=tf.zeros_like(outputs) if of_outputs is None else of_outputs,
            dlast=tf.zeros_like(last) if of_last is None else of_last,
            kind=kind,
            sequences=op.get_attr("sequences"),
            backwards=backwards,
            to_x=0 not in unneeded,
            dense_gradient=dense,
        )
    )
    if dense:
        # The factor of each kernel, and the gradients of the products.
        before = tf.concat([state[:, tf.newaxis], outputs[:, :-1]], axis=1)
        of_inputs, of_state = products
        to_kernel = tf.zeros_like(kernel)
        if kernel.shape[0] != 0:
            to_kernel = _sum_of_products(
                x[:, ::-1] if backwards else x, of_inputs
            )
        to_recurrent = _sum_of_products(
            before, of_inputs if kind == "lstm" else of_state
        )
    return (
        None if 0 in unneeded else to_x,
        to_state,
        to_carry if kind == "lstm" else None,
        to_kernel,
        None,
        to_recurrent,
        None,
        to_bias,
    )


def _sum_of_products(x, upstream):
    """Returns the sum over batch and steps of x' upstream."""
    return tf.tensordot(x, upstream, [[0, 1], [0, 1]])
