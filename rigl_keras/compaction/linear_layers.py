"""Dense layers and convolutions: their kinds, and resized copies."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

__all__ = [
    "CONVOLUTIONS",
    "DEPTHWISE",
    "LINEAR",
    "SEPARABLE",
    "TRANSPOSED",
    "as_float64",
    "copy_with",
    "is_channels_last",
    "is_quantized_or_adapted",
    "resized_copy",
]

# Keras's classes only: a subclass may compute something else.
CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
TRANSPOSED = (
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
)
DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
LINEAR = (
    layers.Dense,
    *CONVOLUTIONS,
    *TRANSPOSED,
    *DEPTHWISE,
    *SEPARABLE,
)


def is_channels_last(layer: Any) -> bool:
    """Returns whether channels are the last axis.

    Args:
        layer: A layer or a Keras operation, with or without a `data_format`.
    """
    return getattr(layer, "data_format", None) in (None, "channels_last")


def is_quantized_or_adapted(layer: Any) -> bool:
    """Returns whether a layer computes with more than its kernel.

    Args:
        layer: A layer or a Keras operation.
    """
    return bool(
        getattr(layer, "lora_enabled", False)
        or getattr(layer, "quantization_mode", None)
    )


def as_float64(tensor: Any) -> np.ndarray:
    """Returns a variable or a tensor of any type as a float64 array."""
    return np.asarray(keras.ops.convert_to_numpy(tensor), np.float64)


def copy_with(
    layer: keras.layers.Layer, **changes: object
) -> keras.layers.Layer:
    """Returns a layer with a changed config, not built.

    Args:
        layer: The layer.
        changes: New values for entries of its config.
    """
    return type(layer).from_config({**layer.get_config(), **changes})


def resized_copy(
    layer: keras.layers.Layer,
    input_shape: Sequence[int | None],
    weights: Mapping[str, np.ndarray],
    **changes: object,
) -> keras.layers.Layer:
    """Returns a built copy of a layer with other weights.

    Args:
        layer: The layer.
        input_shape: Shape of the copy's input.
        weights: Values, by the names of the layer's attributes.
        changes: New values for entries of its config.
    """
    new = copy_with(layer, **changes)
    new.build(input_shape)
    for name, value in weights.items():
        getattr(new, name).assign(value)
    return new
