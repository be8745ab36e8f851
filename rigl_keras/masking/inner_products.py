"""Sparse products of layers within a masked layer.

A masked layer may contain the projections of attention, the loop of an LSTM or
the pointwise half of a separable convolution. They ask the scope of the call
(`tracing.KernelScope`) whether their kernels are masked. If not, they compute
as usual.
"""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from rigl_keras.kernels import layer_products
from rigl_keras.kernels.matrix_layers import SEPARABLE
from rigl_keras.kernels.recurrent_layers import RECURRENT, recurrent_loop
from rigl_keras.masking.model_tree import within
from rigl_keras.masking.tracing import (
    current_scope,
    loops_are_sparse,
    masks_are_applied,
    note_called,
    product_masks,
)

__all__ = ["ask_scope", "ask_scope_no_more", "multiplier"]

_MATRICES = (keras.layers.Dense, keras.layers.EinsumDense)
# Batch sizes at which a served recurrent layer may begin to be sparse.
_SERVED_BATCHES = (1, 8, 32, 128)


def ask_scope(layer: keras.layers.Layer) -> None:
    """Makes layers within a layer use sparse products where possible.

    Args:
        layer: A built layer that is masked. Only matrices and recurrent layers
            of Keras's classes within it are changed.
    """
    for _, inner in within(layer, "", set()):
        name = _method(inner)
        if name is not None and name not in vars(inner):
            function = _loop
            if name == "call":
                separable = type(inner) in SEPARABLE
                function = _call_separable if separable else _call_matrix
            setattr(
                inner,
                name,
                functools.wraps(getattr(inner, name))(
                    functools.partial(function, inner)
                ),
            )


def ask_scope_no_more(layer: keras.layers.Layer) -> None:
    """Undoes `ask_scope`."""
    for _, inner in within(layer, "", set()):
        name = _method(inner)
        if name and isinstance(vars(inner).get(name), functools.partial):
            delattr(inner, name)


def multiplier(
    layer: keras.layers.Layer, owner: keras.layers.Layer
) -> keras.layers.Layer:
    """Returns the inner layer that multiplies by a kernel.

    Args:
        layer: A layer that is masked.
        owner: The owner of the kernel. In an LSTM it is the cell.
    """
    for _, inner in within(layer, "", set()):
        if type(inner) in RECURRENT and inner.cell is owner:
            return inner
    return owner


def _method(layer):
    if type(layer) in (*_MATRICES, *SEPARABLE):
        return "call"
    return "inner_loop" if type(layer) in RECURRENT else None


def _call_matrix(layer, inputs, *args, **kwargs):
    found = _masked_in_training([layer.kernel])
    if (
        found is not None
        and layer_products.takes_one_tensor((inputs, *args), kwargs)
        and layer_products.why_dense(layer) is None
        and _is_sparse(layer, inputs.shape, found)
    ):
        return _sparse_outputs(layer, inputs, found)
    return type(layer).call(layer, inputs, *args, **kwargs)


def _call_separable(layer, inputs):
    found = _masked_in_training([layer.pointwise_kernel])
    if (
        found is not None
        and layer_products.takes_one_tensor((inputs,), {})
        and layer_products.why_dense(layer) is None
    ):
        between: Any = keras.ops.depthwise_conv(
            inputs,
            layer.depthwise_kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
        if _is_sparse(layer, between.shape, found):
            return _sparse_outputs(layer, between, found)
    return type(layer).call(layer, inputs)


def _loop(layer, sequences, initial_state, mask, training=False):
    def densely():
        return type(layer).inner_loop(
            layer, sequences, initial_state, mask, training
        )

    found = _masked([layer.cell.recurrent_kernel])
    if (
        found is not None
        and loops_are_sparse()
        and mask is None
        and layer_products.takes_one_tensor((sequences,), {})
        and layer_products.why_dense(layer) is None
    ):
        of_inputs = _masked([layer.cell.kernel])
        both = [*(of_inputs or ()), *found]
        least = _least_batch(layer, sequences, both)
        sparsely = functools.partial(
            _sparse_loop, layer, sequences, initial_state, both, of_inputs
        )
        if least == 1:
            return sparsely()
        if least is not None:
            last, outputs, *states = tf.cond(
                tf.shape(sequences)[0] >= least,
                lambda: tf.nest.flatten(sparsely()),
                lambda: tf.nest.flatten(densely()),
            )
            return last, outputs, states
    return densely()


def _sparse_loop(layer, sequences, initial_state, both, of_inputs):
    if of_inputs is None:  # a dense product for all steps at once
        kernel = tf.convert_to_tensor(layer.cell.kernel)
        sequences = tf.tensordot(sequences, kernel, 1)
    values, dense = _values(both)
    return recurrent_loop(
        layer, sequences, initial_state, values, dense_gradient=dense
    )


def _least_batch(layer, sequences, found):
    """Returns from which batch size on a loop is sparse, or None.

    In training one choice is for any batch. A model that is served may get
    single examples, which the dense loop computes faster.
    """
    if not masks_are_applied() or sequences.shape[0] is not None:
        return 1 if _is_sparse(layer, sequences.shape, found) else None
    for batch in _SERVED_BATCHES:
        shape = tf.TensorShape([batch, *sequences.shape[1:]])
        if _is_sparse(layer, shape, found):
            return batch
    return None


def _masked(kernels) -> Sequence | None:
    """Returns the masks of some kernels, or None if one has no mask here."""
    scope = current_scope()
    if scope is None:
        return None
    found = [scope.masked(kernel) for kernel in kernels]
    return None if None in found else found


def _masked_in_training(kernels) -> Sequence | None:
    """Returns the masks of some kernels, or None if they are applied."""
    return None if masks_are_applied() else _masked(kernels)


def _is_sparse(layer, shape, found):
    """Returns whether sparse kernels compute a call on inputs of a shape."""
    choices: Any = found[0].choices
    return (
        choices is not None
        and choices.product != "dense"
        and not layer_products.only_dense()
        and choices.within(layer)
        .choose(
            shape,
            [masked.mask for masked in found],
            backward=not masks_are_applied(),
        )
        .sparse
    )


def _sparse_outputs(layer, inputs, found):
    values, dense = _values(found)
    return layer_products.sparse_outputs(
        layer, inputs, *values, dense_gradient=dense
    )


def _values(found):
    """Returns kernels and masks with their values outside the scope.

    And whether the product passes dense gradients.
    """
    scope: Any = current_scope()
    masks, dense = product_masks(found)
    values = []
    for masked, mask in zip(found, masks, strict=True):
        note_called(masked.kernel, masked.name)
        kernel = scope.value_outside(masked.kernel)
        values += [tf.convert_to_tensor(kernel), mask]
    return values, dense
