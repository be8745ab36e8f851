"""The networks that benchmarks measure."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from rigl_keras.models.gpt import LearnedPositions
from rigl_keras.models.resnet import resnet50
from rigl_keras.models.wide_resnet import wide_resnet

__all__ = ["MODELS", "NETWORKS"]

# Functions that make a network, by its name: those of images, which all
# benchmarks take, and all whose layers and training steps are measured.
MODELS: dict[str, Callable[[], keras.Model]] = {
    "wide_resnet": functools.partial(wide_resnet, 22, 2),
    "resnet50": functools.partial(resnet50, 100),
}
_CLASSES = 10


def _vision_transformer() -> keras.Model:
    """Six blocks of width 384 on 65 tokens, for images of 32 x 32.

    64 patches of 4 x 4 pixels, and a token of zeros before them that becomes
    the class (Dosovitskiy et al., 2021, section 3.1; norms come first).
    """
    width = 384
    images = keras.Input((32, 32, 3))
    x = layers.Conv2D(width, 4, strides=4)(images)
    x = layers.Reshape((64, width))(x)
    before: Any = (1, 0)  # Any: Keras declares an int
    x = layers.ZeroPadding1D(before)(x)
    x = LearnedPositions()(x)
    for _ in range(6):
        y = layers.LayerNormalization()(x)
        attention: Any = layers.MultiHeadAttention(6, width // 6)
        x = layers.Add()([x, attention(y, y)])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * width, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(width)(y)])
    x = layers.LayerNormalization()(x)[:, 0]
    return keras.Model(images, layers.Dense(_CLASSES)(x))


def _lstm() -> keras.Model:
    """An LSTM of 512 units on sequences of 64 steps with 512 numbers each."""
    sequences = keras.Input((64, 512))
    x = layers.LSTM(512)(sequences)
    return keras.Model(sequences, layers.Dense(_CLASSES)(x))


def _dense() -> keras.Model:
    """One layer with 4,096 inputs and outputs."""
    inputs = keras.Input((4096,))
    return keras.Model(inputs, layers.Dense(4096, use_bias=False)(inputs))


NETWORKS = collections.ChainMap(
    {
        "vision_transformer": _vision_transformer,
        "lstm": _lstm,
        "dense": _dense,
    },
    MODELS,
)
