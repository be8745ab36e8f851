"""The loops of LSTM and GRU layers, as functions that a network can compute."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from rigl_keras.kernels.recurrent_layers import why_not_its_activations
from rigl_keras.masking.model_tree import within
from rigl_keras.masking.tracing import KernelScope
from rigl_keras.serving.network import Cell
from rigl_keras.serving.recurrent_operations import Loop

__all__ = ["loops_marked"]

_CELLS = {
    keras.layers.LSTM: keras.layers.LSTMCell,
    keras.layers.GRU: keras.layers.GRUCell,
}
_METHOD = "inner_loop"


@contextlib.contextmanager
def loops_marked(
    model: keras.Model, *, highest_density: float = 1.0
) -> Iterator[dict[str, str]]:
    """Within the context, the loops of recurrent layers are marked functions.

    The functions compute what the layers do at inference. `Loop` reads the
    marks. Layers that a network cannot compute stay as they are.

    Args:
        model: A built model, masked or not.
        highest_density: Layers stay as they are, too, if more of their
            recurrent kernel is nonzero than this fraction.

    Yields:
        `{"LSTM 'name'": why its loop has no mark}`, filled when layers are
        called.
    """
    unmarked = {}
    with contextlib.ExitStack() as stack:
        for _, layer in within(model, "", set()):
            if (
                isinstance(layer, keras.layers.RNN)
                and _density(layer) <= highest_density
            ):
                stack.enter_context(_replaced(layer, unmarked))
        yield unmarked


def _density(layer):
    kernel = getattr(layer.cell, "recurrent_kernel", None)
    if kernel is None:
        return 0.0
    with tf.init_scope():  # values, although a function is traced
        return np.mean(kernel.numpy() != 0)


@contextlib.contextmanager
def _replaced(layer, unmarked):
    """Replaces a layer's loop within the context."""
    before = vars(layer).get(_METHOD)
    own = getattr(layer, _METHOD)
    loop = functools.wraps(own)(functools.partial(_loop, layer, own, unmarked))
    setattr(layer, _METHOD, loop)
    try:
        yield
    finally:
        if before is None:
            delattr(layer, _METHOD)
        else:
            setattr(layer, _METHOD, before)


def _loop(layer, own, unmarked, sequences, initial_state, mask, training=False):
    reason = _why_not(layer, sequences, mask)
    if reason is not None:
        unmarked[f"{type(layer).__name__} {layer.name!r}"] = reason
        return own(
            sequences=sequences,
            initial_state=initial_state,
            mask=mask,
            training=training,
        )
    outputs = _marked(layer, sequences, initial_state)
    # Nothing reads the rest: the layer returns no states.
    last = outputs[:, -1] if layer.return_sequences else outputs
    return last, outputs, [last] * len(initial_state)


def _marked(layer, sequences, states):
    cell = layer.cell
    variables = [cell.kernel, cell.recurrent_kernel]
    if cell.bias is not None:
        variables.append(cell.bias)

    # Reads nothing but its arguments, as a marked function must.
    def compute(x, *tensors):
        values = tensors[len(states) :]
        with KernelScope() as scope:
            for variable, value in zip(variables, values, strict=True):
                scope.give(variable, value)
            last, outputs, _ = type(layer).inner_loop(
                layer, x, list(tensors[: len(states)]), None, False
            )
        return outputs if layer.return_sequences else last

    # A function that could be inlined would lose its mark.
    attributes = {"_implements": _loop_of(layer).mark, "_noinline": True}
    function = tf.function(
        compute, autograph=False, experimental_attributes=attributes
    )
    return function(sequences, *states, *map(tf.convert_to_tensor, variables))


def _loop_of(layer):
    cell = Cell.LSTM
    if isinstance(layer, keras.layers.GRU):
        cell = Cell.GRU if layer.cell.reset_after else Cell.GRU_BEFORE
    return Loop(cell, layer.return_sequences, layer.go_backwards)


def _why_not(layer, sequences, mask):
    """Returns why a network cannot compute a layer's loop, or None."""
    cell: Any = getattr(layer, "cell", None)
    if type(layer) not in _CELLS or type(cell) is not _CELLS[type(layer)]:
        return "networks have LSTM and GRU only"
    reason = why_not_its_activations(cell)
    if reason is not None:
        return reason
    if layer.stateful or layer.return_state:
        return "it keeps or returns its states"
    if mask is not None:
        return "it reads a mask of steps"
    if sequences.dtype != tf.float32:
        return f"it computes {sequences.dtype.name}"
    return None
