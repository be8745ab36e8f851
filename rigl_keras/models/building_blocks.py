"""Convolutions and batch norm of the report's networks."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

__all__ = ["batch_norm", "check_sizes", "convolution", "l2", "normalised"]


def check_sizes(
    input_shape: Sequence[int], channel_scale: float, *, channels: int
) -> None:
    """Raises ValueError unless a network of these sizes can be built.

    Args:
        input_shape: Height, width and channels of an image.
        channel_scale: Factor on every number of channels.
        channels: The smallest number of channels.
    """
    if len(input_shape) != 3 or min(input_shape[:2]) < 8:
        raise ValueError(
            "input_shape must be (height, width, channels) of at least 8 x 8. "
            f"Received: input_shape={tuple(input_shape)}."
        )
    if not 0 < channel_scale <= 1 or int(channels * channel_scale) < 1:
        raise ValueError(
            "channel_scale must be in (0, 1] and leave at least one channel of "
            f"{channels}. Received: channel_scale={channel_scale}."
        )


def l2(weight_decay: float) -> keras.regularizers.Regularizer | None:
    """Returns the penalty weight_decay / 2 x sum of w^2, or None for 0."""
    return keras.regularizers.L2(weight_decay / 2) if weight_decay else None


def convolution(x, channels: int, size: int, stride: int, penalty, name: str):
    """Returns a convolution without bias that starts as N(0, 2 / fan out).

    Args:
        x: Symbolic images.
        channels: Output channels.
        size: Height and width of the kernel, 1 or 3.
        stride: 1 or 2. At 2 a 3 x 3 kernel is padded by one pixel on each side,
            as in PyTorch.
        penalty: Regularizer of the kernel, or None.
        name: Name of the layer.
    """
    if stride == 2 and size == 3:
        # `same` would pad at the bottom and the right only.
        x = layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
    initializer: Any = keras.initializers.VarianceScaling(
        2.0, "fan_out", "untruncated_normal"
    )
    return layers.Conv2D(
        channels,
        size,
        strides=stride,
        padding="valid" if stride == 2 else "same",
        use_bias=False,
        kernel_initializer=initializer,
        kernel_regularizer=penalty,
        name=name,
    )(x)


def batch_norm(x, name: str, *, gamma: str = "ones"):
    """Returns batch norm with momentum 0.9 and epsilon 1e-5.

    Args:
        x: Symbolic images.
        name: Name of the layer.
        gamma: Initializer of its scale.
    """
    return layers.BatchNormalization(
        momentum=0.9, epsilon=1e-5, gamma_initializer=gamma, name=name
    )(x)


def normalised(x, name: str):
    """Returns batch norm and ReLU."""
    return layers.ReLU(name=f"{name}_relu")(batch_norm(x, name))
