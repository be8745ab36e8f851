"""Small models, functions that train them and read their state."""

import keras
import numpy as np
from keras import layers

import gin
import rigl_keras


def small_model(dropout=0.2, **kernel):
    """Returns a dense convolutional network with named layers."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", name="conv1", **kernel)(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU()(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Conv2D(16, 3, strides=2, name="conv2", **kernel)(x)
    x = layers.Flatten()(x)
    x = layers.Dropout(dropout, seed=1)(x)
    return keras.Model(inputs, layers.Dense(10, name="head", **kernel)(x))


def two_headed():
    """Returns a dense network with two inputs and two outputs."""
    a, b = keras.Input((6,), name="a"), keras.Input((4,), name="b")
    x = layers.Concatenate()([layers.Dense(8, name="left")(a), b])
    heads = layers.Dense(3, name="one")(x), layers.Dense(2, name="two")(x)
    return keras.Model({"a": a, "b": b}, heads)


def small_network(
    num_classes=10,
    input_shape=(8, 8, 1),
    channel_scale=1.0,
    width=1,
    dropout=0.0,
    weight_decay=5e-4,
):
    """Returns the network of test runs, three times as fast as a wide ResNet.

    It is registered with gin.
    """
    penalty = keras.regularizers.L2(weight_decay) if weight_decay else None
    x = inputs = keras.Input(input_shape)
    for name, channels, strides in (("conv1", 16, 1), ("conv2", 32, 2)):
        x = layers.Conv2D(
            int(channels * width * channel_scale),
            3,
            strides=strides,
            padding="same",
            use_bias=False,
            kernel_regularizer=penalty,
            name=name,
        )(x)
        x = layers.BatchNormalization(name=f"{name}_norm")(x)
        x = layers.ReLU()(x)
    x = layers.Dropout(dropout)(layers.GlobalAveragePooling2D()(x))
    head = layers.Dense(
        num_classes, kernel_regularizer=penalty, name="classifier"
    )
    return keras.Model(inputs, head(x), name="small_network")


gin.external_configurable(small_network, name="small_network")


def examples(n=64, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, 8, 8, 3)).astype(np.float32)
    return x, draw.integers(0, 10, n)


def compiled(model, optimizer=None, **options):
    model.compile(
        optimizer or keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **options,
    )
    return model


def masks(model):
    return {m.name: m.mask.numpy() for m in rigl_keras.masked_layers(model)}


def kernels(model):
    return {m.name: m.kernel.numpy() for m in rigl_keras.masked_layers(model)}
