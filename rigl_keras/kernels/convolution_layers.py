"""Keras's convolution layers, computed by the operations.

A `Conv1D` is a convolution of images with one row. A `Conv2DTranspose` is the
gradient of a convolution with respect to its images: its outputs are the images
of that convolution, and its inputs are the outputs.
"""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from rigl_keras.kernels.operations import (
    sparse_conv2d,
    sparse_conv2d_transpose,
)
from rigl_keras.kernels.problems import Problem

__all__ = [
    "CONVOLUTIONS",
    "convolution_outputs",
    "convolution_problem",
    "least_sizes",
    "why_no_convolution",
]

CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv2DTranspose,
)


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """A layer's convolution, with two axes.

    Attributes:
        kernel: Rows, columns, channels, filters.
        strides, dilations: Of rows and columns.
        padding: `"SAME"` or `"VALID"`.
        causal: Columns of zeros before the first.
        groups: Number of groups. The kernel has the channels of one group.
    """

    kernel: tuple[int, int, int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    padding: str
    causal: int
    groups: int

    @classmethod
    def of(cls, layer) -> "_Convolution":
        kernel: Any = tuple(layer.kernel.shape)
        strides, dilations = tuple(layer.strides), tuple(layer.dilation_rate)
        padding, causal = layer.padding.upper(), 0
        if isinstance(layer, keras.layers.Conv1D):
            kernel = (1, *kernel)
            strides, dilations = (1, *strides), (1, *dilations)
        if padding == "CAUSAL":
            padding, causal = "VALID", (kernel[1] - 1) * dilations[1]
        groups = getattr(layer, "groups", 1)
        return cls(kernel, strides, dilations, padding, causal, groups)

    @property
    def extents(self) -> tuple[int, ...]:
        """Rows and columns spanned by the kernel."""
        return tuple(
            (size - 1) * dilation + 1
            for size, dilation in zip(
                self.kernel[:2], self.dilations, strict=True
            )
        )

    def transposed_sizes(self, sizes) -> list[int]:
        """Returns rows and columns of a transposed convolution's outputs."""
        if self.padding == "SAME":
            return [n * s for n, s in zip(sizes, self.strides, strict=True)]
        return [
            (size - 1) * stride + max(extent, stride)
            for size, stride, extent in zip(
                sizes, self.strides, self.extents, strict=True
            )
        ]


def why_no_convolution(layer: keras.layers.Layer) -> str | None:
    """Returns why a convolution has no sparse product, or None.

    Args:
        layer: A built layer of one of the `CONVOLUTIONS`.
    """
    conv: Any = layer
    if conv.data_format != "channels_last":
        return f"sparse kernels are channels_last, not {conv.data_format}"
    if getattr(conv, "output_padding", None) is not None:
        return "it has an output_padding"
    return None


def least_sizes(layer: keras.layers.Layer) -> list[int]:
    """Returns the smallest sizes of a convolution's images.

    Args:
        layer: A built layer of one of the `CONVOLUTIONS`.
    """
    conv = _Convolution.of(layer)
    axes = 1 if isinstance(layer, keras.layers.Conv1D) else 2
    if (
        conv.padding == "SAME"
        or conv.causal
        or isinstance(layer, keras.layers.Conv2DTranspose)
    ):
        return [1] * axes
    return list(conv.extents[2 - axes :])


def convolution_problem(
    layer: keras.layers.Layer, batch: int, sizes: list[int]
) -> Problem:
    """Returns what a convolution computes.

    Args:
        layer: A built layer of one of the `CONVOLUTIONS`.
        batch: Number of images in a batch.
        sizes: Sizes of an image, without the channels.
    """
    conv = _Convolution.of(layer)
    if isinstance(layer, keras.layers.Conv1D):
        sizes = [1, sizes[0] + conv.causal]
    if isinstance(layer, keras.layers.Conv2DTranspose):
        sizes = conv.transposed_sizes(sizes)
    images: Any = (batch, *sizes)
    return Problem(
        kernel=conv.kernel,
        images=images,
        strides=conv.strides,
        padding=conv.padding,
        dilations=conv.dilations,
        groups=conv.groups,
    )


def convolution_outputs(
    layer: keras.layers.Layer,
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    mask: tf.Tensor,
    *,
    dense_gradient: bool,
) -> tf.Tensor:
    """Returns a convolution's outputs before bias and activation.

    Args:
        layer: A built layer of one of the `CONVOLUTIONS`.
        inputs: Its inputs.
        kernel, mask: The values of its kernel and its mask.
        dense_gradient: As in `sparse_conv2d`.
    """
    conv = _Convolution.of(layer)
    how: Any = dict(
        strides=conv.strides,
        padding=conv.padding,
        dilations=conv.dilations,
        dense_gradient=dense_gradient,
    )
    if isinstance(layer, keras.layers.Conv2DTranspose):
        sizes = [
            static or dynamic
            for static, dynamic in zip(
                inputs.shape[1:3],
                tf.unstack(tf.shape(inputs)[1:3]),
                strict=True,
            )
        ]
        return sparse_conv2d_transpose(
            inputs, kernel, mask, sizes=conv.transposed_sizes(sizes), **how
        )
    if not isinstance(layer, keras.layers.Conv1D):
        return sparse_conv2d(inputs, kernel, mask, **how)
    if conv.causal:
        inputs = tf.pad(inputs, [[0, 0], [conv.causal, 0], [0, 0]])
    # The mask has another shape, but the same memory.
    outputs = sparse_conv2d(
        inputs[:, tf.newaxis],
        tf.reshape(kernel, conv.kernel),
        tf.reshape(mask, conv.kernel),
        **how,
    )
    return tf.squeeze(outputs, axis=1)
