"""LSTM and GRU layers of Keras, by operations on whole sequences."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from rigl_keras.kernels.problems import Recurrence
from rigl_keras.kernels.recurrent_operations import sparse_gru, sparse_lstm

__all__ = [
    "RECURRENT",
    "recurrence",
    "recurrent_loop",
    "why_not_its_activations",
    "why_not_recurrent",
]

RECURRENT = (keras.layers.LSTM, keras.layers.GRU)
_CELLS = (keras.layers.LSTMCell, keras.layers.GRUCell)


def why_not_recurrent(layer: keras.layers.Layer) -> str | None:
    """Returns why a recurrent layer has no sparse operation, or None.

    Args:
        layer: A built layer.
    """
    cell: Any = getattr(layer, "cell", None)
    if type(layer) not in RECURRENT or type(cell) not in _CELLS:
        return f"no sparse kernels for {type(layer).__name__}"
    reason = why_not_its_activations(cell)
    if reason is not None:
        return reason
    if cell.dropout or cell.recurrent_dropout:
        return "it has dropout"
    if not getattr(cell, "reset_after", True):
        return "reset_after=False"
    return None


def why_not_its_activations(cell: Any) -> str | None:
    """Returns why no loop of ours computes a cell's activations, or None.

    Args:
        cell: That of an LSTM or a GRU.
    """
    if cell.activation is not keras.activations.tanh:
        return "its activation is not tanh"
    if cell.recurrent_activation is not keras.activations.sigmoid:
        return "its recurrent activation is not sigmoid"
    return None


def recurrence(
    layer: keras.layers.Layer,
    sequences: tuple[int, int, int],
    *,
    projected: bool = False,
) -> Recurrence:
    """Returns what a recurrent layer computes, as a problem.

    Args:
        layer: A built LSTM or GRU (`why_not_recurrent`).
        sequences: Batch, steps, inputs.
        projected: Whether only its recurrent kernel is masked.
    """
    keras_layer: Any = layer
    return Recurrence(
        kind="lstm" if isinstance(layer, keras.layers.LSTM) else "gru",
        sequences=sequences,
        units=keras_layer.units,
        projected=projected,
        returns=keras_layer.return_sequences,
        unroll=keras_layer.unroll,
    )


def recurrent_loop(
    layer: keras.layers.Layer,
    sequences: tf.Tensor,
    states: Sequence[tf.Tensor],
    kernels: Sequence[tf.Tensor],
    *,
    dense_gradient: bool,
) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
    """Returns the result of a layer's `inner_loop`, by sparse kernels.

    Args:
        layer: A built LSTM or GRU (`why_not_recurrent`).
        sequences: Float32 of shape (batch, steps, inputs); or their product
            with the layer's kernel, if `kernels` lacks that.
        states: Its states before the first step.
        kernels: The values of its kernel, its mask, its recurrent kernel and
            that mask; or only the last two.
        dense_gradient: As in `sparse_lstm`.

    Returns:
        The last output, all outputs that the layer returns, and the states
        after the last step.
    """
    keras_layer: Any = layer
    bias = keras_layer.cell.bias
    if len(kernels) == 2:
        none = tf.zeros([0, kernels[0].shape[1]])
        kernels = [none, tf.cast(none, kernels[1].dtype), *kernels]
    lstm = isinstance(layer, keras.layers.LSTM)
    operation: Any = sparse_lstm if lstm else sparse_gru
    outputs, *after = operation(
        sequences,
        *states,
        *kernels,
        None if bias is None else tf.convert_to_tensor(bias),
        sequences=keras_layer.return_sequences,
        backwards=keras_layer.go_backwards,
        dense_gradient=dense_gradient,
    )
    return after[0], outputs, after
