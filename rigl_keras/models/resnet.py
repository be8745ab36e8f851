"""Residual networks for small images."""

from typing import Any

import keras
from keras import layers

from rigl_keras.models.building_blocks import (
    batch_norm,
    check_sizes,
    convolution,
    l2,
    normalised,
)

__all__ = ["resnet18", "resnet50"]


def resnet50(
    num_classes: int = 100,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    *,
    channel_scale: float = 1.0,
    zero_init_residual: bool = True,
    weight_decay: float = 0.0,
    name: str = "resnet50",
) -> keras.Model:
    """Returns ResNet-50 for images of 32 x 32.

    A 3x3 convolution with 64 channels replaces the 7x7 one and the pooling.
    Then come stages of 3, 4, 6 and 3 bottleneck blocks (1x1, 3x3, 1x1 with four
    times the channels) with 64, 128, 256 and 512 channels; all except the first
    start with stride 2 on the 3x3 convolution. The end is the mean over all
    positions and a classifier. If a block changes the shape, its shortcut is a
    1x1 convolution with batch norm. He et al., 2016, arXiv:1512.03385. Details
    as in the report's code: the last batch norm of each block starts at 0, so
    that the block starts as the identity (He et al., 2019, arXiv:1812.01187,
    section 3.1), convolutions of stride 2 pad one pixel on each side, batch
    norm has momentum 0.9 and epsilon 1e-5, and convolutions start as N(0,
    2 / (kernel size x channels out)).

    Args:
        num_classes: Number of classes, at least 1.
        input_shape: Height, width and channels, at least 8 x 8.
        channel_scale: Factor on every number of channels except the image's, in
            (0, 1]; products are truncated.
        zero_init_residual: Whether the last batch norm of each block starts at
            0 instead of 1. At 0 the first gradient of every block is 0, and
            SNIP cannot rank by it.
        weight_decay: Coupled L2 on kernels, as in `wide_resnet`.
        name: Name of the model.

    Returns:
        A Functional model whose output is logits, shape (batch, num_classes).

    Raises:
        ValueError: An argument is out of range.

    Example:

    >>> resnet50(100).count_params()  # 23,705,252, and batch statistics
    23758372
    """
    return _resnet(
        (3, 4, 6, 3),
        _bottleneck,
        4,
        num_classes,
        input_shape,
        channel_scale,
        zero_init_residual,
        weight_decay,
        name,
    )


def resnet18(
    num_classes: int = 100,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    *,
    channel_scale: float = 1.0,
    zero_init_residual: bool = True,
    weight_decay: float = 0.0,
    name: str = "resnet18",
) -> keras.Model:
    """Returns ResNet-18 for images of 32 x 32.

    Like `resnet50`, with four stages of 2 basic blocks (two 3x3 convolutions).

    Args, Returns, Raises: as in `resnet50`.
    """
    return _resnet(
        (2, 2, 2, 2),
        _basic,
        1,
        num_classes,
        input_shape,
        channel_scale,
        zero_init_residual,
        weight_decay,
        name,
    )


def _resnet(
    blocks,
    residual,
    expansion,
    num_classes,
    input_shape,
    channel_scale,
    zero_init_residual,
    weight_decay,
    model_name,
):
    if num_classes < 1:
        raise ValueError(
            f"num_classes must be at least 1. Received: {num_classes}."
        )
    check_sizes(input_shape, channel_scale, channels=64)
    penalty = l2(weight_decay)
    gamma = "zeros" if zero_init_residual else "ones"
    inputs = keras.Input(input_shape, name="image")
    x = convolution(inputs, int(64 * channel_scale), 3, 1, penalty, "conv1")
    x = normalised(x, "bn1")
    for stage, count in enumerate(blocks, start=2):
        channels = int(2 ** (stage + 4) * channel_scale)
        for i in range(count):
            stride = 2 if stage > 2 and i == 0 else 1
            prefix = f"conv{stage}_{i}"
            y = residual(x, channels, stride, penalty, gamma, prefix)
            if stride != 1 or x.shape[-1] != channels * expansion:
                name = f"{prefix}_shortcut"
                x = convolution(
                    x, channels * expansion, 1, stride, penalty, name
                )
                x = batch_norm(x, f"{name}_bn")
            x = layers.Add(name=f"{prefix}_add")([y, x])
            x = layers.ReLU(name=f"{prefix}_relu")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    uniform: Any = keras.initializers.RandomUniform(
        -(x.shape[-1] ** -0.5), x.shape[-1] ** -0.5
    )
    outputs = layers.Dense(
        num_classes,
        kernel_initializer=uniform,
        bias_initializer=uniform.clone(),
        kernel_regularizer=penalty,
        name="classifier",
    )(x)
    return keras.Model(inputs, outputs, name=model_name)


def _bottleneck(x, channels, stride, penalty, gamma, name):
    x = convolution(x, channels, 1, 1, penalty, f"{name}_conv1")
    x = normalised(x, f"{name}_bn1")
    x = convolution(x, channels, 3, stride, penalty, f"{name}_conv2")
    x = normalised(x, f"{name}_bn2")
    x = convolution(x, 4 * channels, 1, 1, penalty, f"{name}_conv3")
    return batch_norm(x, f"{name}_bn3", gamma=gamma)


def _basic(x, channels, stride, penalty, gamma, name):
    x = convolution(x, channels, 3, stride, penalty, f"{name}_conv1")
    x = normalised(x, f"{name}_bn1")
    x = convolution(x, channels, 3, 1, penalty, f"{name}_conv2")
    return batch_norm(x, f"{name}_bn2", gamma=gamma)
