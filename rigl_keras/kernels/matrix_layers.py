"""Layers that multiply by a matrix."""

import dataclasses
import math
from typing import Any

import keras
import tensorflow as tf

from rigl_keras.kernels.matrix_operations import sparse_dense

__all__ = ["SEPARABLE", "Matrix", "matrix_of", "matrix_outputs"]


SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
_KINDS = (keras.layers.Conv1D, keras.layers.Dense, keras.layers.EinsumDense)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A kernel as a matrix of inputs and outputs.

    Attributes:
        inputs: Sizes of the kernel's axes that are summed over: the first axes
            of the kernel, and the last of the layer's inputs.
        outputs: Sizes of its other axes, the last of the layer's outputs.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(self.inputs), math.prod(self.outputs)


def matrix_of(layer: keras.layers.Layer) -> Matrix | None:
    """Returns the kernel of a built layer as a matrix, or None.

    The kernel of `Dense` is one. That of `EinsumDense` is one if its equation
    is a product of rows, as in attention: inputs (batch axes, summed axes),
    kernel (summed axes, new axes), outputs (batch axes, new axes). So are the
    kernel of a `Conv1D` with one position and no strides, and the pointwise
    kernel of a separable convolution.
    """
    kind = type(layer)
    if kind in SEPARABLE:
        separable: Any = layer
        *_, channels, filters = separable.pointwise_kernel.shape
        return Matrix((channels,), (filters,))
    if kind not in _KINDS:
        return None
    shape = tuple(layer.kernel.shape)
    if kind is keras.layers.Dense:
        return Matrix(shape[:1], shape[1:])
    if kind is keras.layers.EinsumDense:
        summed = _summed_axes(layer.equation)
        return (
            None if summed is None else Matrix(shape[:summed], shape[summed:])
        )
    if shape[0] == 1 and tuple(layer.strides) == (1,) and layer.groups == 1:
        return Matrix(shape[1:2], shape[2:])
    return None


def _summed_axes(equation):
    """Returns how many axes a product of rows sums over, or None.

    >>> _summed_axes("abc,cde->abde")
    1
    >>> _summed_axes("ab,cb->ac")
    """
    terms, of_outputs = (
        equation.replace(" ", "").replace("...", ".").split("->")
    )
    of_inputs, of_kernel = terms.split(",")
    for count in range(1, len(of_kernel) + 1):
        summed, new = of_kernel[:count], of_kernel[count:]
        rows = of_inputs.removesuffix(summed)
        if (
            len(rows) < len(of_inputs)
            and of_outputs == rows + new
            and not set(rows) & set(of_kernel)
            and len({*rows, *of_kernel}) == len(rows + of_kernel)
        ):
            return count
    return None


def matrix_outputs(
    layer: keras.layers.Layer,
    matrix: Matrix,
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    mask: tf.Tensor,
    *,
    dense_gradient: bool,
) -> tf.Tensor:
    """Returns a layer's outputs before its activation, with its bias.

    Args:
        layer: A layer that multiplies by a matrix.
        matrix: Its `matrix_of`.
        inputs: Its inputs.
        kernel, mask: The values of its kernel and its mask.
        dense_gradient: As in `sparse_dense`.
    """
    keras_layer: Any = layer
    has_bias = getattr(keras_layer, "bias", None) is not None
    bias: Any = tf.convert_to_tensor(keras_layer.bias) if has_bias else None
    # In EinsumDense, a bias may cover only some of the new axes.
    whole = has_bias and tuple(bias.shape) == matrix.outputs
    outputs = sparse_dense(
        _with_last(inputs, len(matrix.inputs), matrix.shape[:1]),
        tf.reshape(kernel, matrix.shape),
        tf.reshape(mask, matrix.shape),
        bias=tf.reshape(bias, [-1]) if whole else None,
        dense_gradient=dense_gradient,
    )
    outputs = _with_last(outputs, 1, matrix.outputs)
    return outputs if whole or not has_bias else outputs + bias


def _with_last(tensor, axes, sizes):
    """Returns a tensor with its last axes reshaped to some sizes."""
    rows: Any = tensor.shape[:-axes]
    if axes == len(sizes) == 1:
        return tensor
    shape = tf.concat([tf.shape(tensor)[:-axes], sizes], axis=0)
    reshaped = tf.reshape(tensor, shape)
    reshaped.set_shape([*rows, *sizes])
    return reshaped
