"""Wide residual networks for small images."""

from typing import Any

import keras
from keras import layers

from rigl_keras.models.building_blocks import (
    check_sizes,
    convolution,
    l2,
    normalised,
)

__all__ = ["wide_resnet"]


def wide_resnet(
    depth: int = 22,
    width: int = 2,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    dropout: float = 0.3,
    *,
    channel_scale: float = 1.0,
    weight_decay: float = 0.0,
    name: str | None = None,
) -> keras.Model:
    """Returns a wide residual network, WRN-depth-width.

    It has a 3x3 convolution with 16 channels; three stages of (depth - 4) / 6
    pre-activation blocks with 16, 32 and 64 x width channels, the second and
    third starting with stride 2; batch norm, ReLU, the mean over all positions
    and a classifier. If a block changes the number of channels, its shortcut is
    a 1x1 convolution of the activated input. Zagoruyko and Komodakis, 2016,
    arXiv:1605.07146, section 2. Details as in the report's code: convolutions
    of stride 2 pad one pixel on each side, batch norm has momentum 0.9 and
    epsilon 1e-5, and convolutions start as N(0, 2 / (9 x channels out)).

    Args:
        depth: Number of layers, 6 n + 4.
        width: Factor on the channels, at least 1.
        num_classes: Number of classes.
        input_shape: Height, width and channels, at least 8 x 8.
        dropout: Dropout rate between the convolutions of a block, in [0, 1).
        channel_scale: Factor on every number of channels except the image's, in
            (0, 1]; products are truncated. sqrt(d) makes the report's
            Small-Dense network with about d times the parameters.
        weight_decay: Coupled L2: adds weight_decay / 2 x sum of w^2 of every
            kernel to the loss, and so weight_decay x w to the gradient.
        name: Name of the model. None: from depth and width.

    Returns:
        A Functional model whose output is logits, shape (batch, num_classes).

    Raises:
        ValueError: An argument is out of range.

    Example:

    >>> wide_resnet(depth=22, width=2).count_params()  # with batch statistics
    1082362
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(
            "A wide residual network has depth 6 n + 4 with n >= 1 blocks in "
            f"each stage: 10, 16, 22, 28, ... Received: depth={depth}."
        )
    if width < 1 or num_classes < 1:
        raise ValueError(
            "width and num_classes must be at least 1. Received: "
            f"width={width}, num_classes={num_classes}."
        )
    check_sizes(input_shape, channel_scale, channels=16)
    if not 0 <= dropout < 1:
        raise ValueError(
            f"dropout must be in [0, 1). Received: dropout={dropout}."
        )
    blocks = (depth - 4) // 6
    penalty = l2(weight_decay)

    def block(x, channels, stride, name):
        activated = normalised(x, f"{name}_bn1")
        y = convolution(
            activated, channels, 3, stride, penalty, f"{name}_conv1"
        )
        y = normalised(y, f"{name}_bn2")
        if dropout:
            y = layers.Dropout(dropout, name=f"{name}_dropout")(y)
        y = convolution(y, channels, 3, 1, penalty, f"{name}_conv2")
        if x.shape[-1] != channels:
            x = convolution(
                activated, channels, 1, stride, penalty, f"{name}_shortcut"
            )
        return layers.Add(name=f"{name}_add")([x, y])

    inputs = keras.Input(input_shape, name="image")
    x = convolution(inputs, int(16 * channel_scale), 3, 1, penalty, "conv1")
    for stage in (1, 2, 3):
        channels = int(2 ** (stage + 3) * width * channel_scale)
        for i in range(blocks):
            stride = 2 if stage > 1 and i == 0 else 1
            x = block(x, channels, stride, f"block{stage}_{i}")
    x = normalised(x, "bn")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    uniform: Any = keras.initializers.VarianceScaling(
        1 / 3, "fan_in", "uniform"
    )
    outputs = layers.Dense(
        num_classes,
        kernel_initializer=uniform,
        kernel_regularizer=penalty,
        name="classifier",
    )(x)
    return keras.Model(inputs, outputs, name=name or f"wrn_{depth}_{width}")
