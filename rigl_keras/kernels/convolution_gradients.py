"""Gradients of sparse convolutions, for any layout of images.

A convolution and its gradients with respect to images and kernel are linear in
their arguments, so each one's gradients are the two others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from rigl_keras.kernels import library

__all__ = ["all_of", "register_gradients"]


def all_of(mask: tf.Tensor) -> tf.Tensor:
    """Returns a mask that keeps all that the gradient of a kernel is of.

    Args:
        mask: As in `operations.sparse_conv2d`.
    """
    return mask != 0 if mask.dtype == tf.uint8 else mask


def register_gradients(
    operation: str,
    function: str,
    *,
    attributes: Sequence[str],
    dense_kernel_gradient: Callable[
        [tf.Tensor, tf.Tensor, tf.Tensor, dict[str, Any]], tf.Tensor
    ],
) -> None:
    """Registers the gradients of a convolution, and those of its gradients.

    Args:
        operation: Its name in a graph: `"RiglKerasConv2D"`. Its gradients are
            named `operation` + `"BackpropInput"` and
            `operation` + `"BackpropFilter"`.
        function: Its name in the op library, `"rigl_keras_conv2d"`.
        attributes: Names of the attributes that all three have.
        dense_kernel_gradient: Takes images, mask, the gradient of the outputs
            and the attributes. Returns the gradient of the kernel at every
            entry.
    """

    def run(suffix="", **arguments):
        return getattr(library.required(), function + suffix)(**arguments)

    def attributes_of(op):
        found = {name: op.get_attr(name) for name in attributes}
        found["padding"] = found["padding"].decode()
        return found

    def kernel_gradient(images, mask, upstream, how, dense):
        if dense:
            return dense_kernel_gradient(images, mask, upstream, how)
        return run(
            "_backprop_filter",
            input=images,
            mask=mask,
            out_backprop=upstream,
            **how,
        )

    @tf.RegisterGradient(operation)
    def of_product(op, upstream):
        images, kernel, mask = op.inputs
        how, dense = attributes_of(op), op.get_attr("dense_gradient")
        to_images = run(
            "_backprop_input",
            out_backprop=upstream,
            filter=kernel,
            mask=mask,
            input_sizes=tf.shape(images),
            dense_gradient=dense,
            **how,
        )
        to_images.set_shape(images.shape)
        to_kernel = kernel_gradient(images, mask, upstream, how, dense)
        return to_images, to_kernel, None

    @tf.RegisterGradient(f"{operation}BackpropInput")
    def of_images(op, upstream):
        out_backprop, kernel, mask, _ = op.inputs
        how, dense = attributes_of(op), op.get_attr("dense_gradient")
        to_out_backprop = run(
            input=upstream,
            filter=kernel,
            mask=mask,
            dense_gradient=dense,
            **how,
        )
        to_kernel = kernel_gradient(upstream, mask, out_backprop, how, dense)
        return to_out_backprop, to_kernel, None, None

    @tf.RegisterGradient(f"{operation}BackpropFilter")
    def of_kernel(op, upstream):
        images, mask, out_backprop = op.inputs
        how, mask = attributes_of(op), all_of(mask)
        to_images = run(
            "_backprop_input",
            out_backprop=out_backprop,
            filter=upstream,
            mask=mask,
            input_sizes=tf.shape(images),
            **how,
        )
        to_out_backprop = run(input=images, filter=upstream, mask=mask, **how)
        return to_images, None, to_out_backprop
