"""Models to copy: plain ones, and ones whose layers alone are not enough."""

import functools

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from rigl_keras.masking.sparsify import sparsify

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
WORDS = tf.constant([[word] for word in "a b c d a b c d".split()])


@keras.saving.register_keras_serializable("tests")
class Encoder(keras.Model):
    def __init__(self, units=6, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.a = layers.Dense(12, "relu", name="a")
        self.b = layers.Dense(units, name="b")
        self.scale = layers.Normalization(name="scale")

    def build(self, shape):
        self.scale.build(shape)
        self.a.build(shape)
        self.b.build((None, 12))

    def call(self, x):
        return self.b(self.a(self.scale(x)))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def networks():
    """Returns functions that make plain models, and options of `sparsify`."""

    def mlp():
        inputs = keras.Input((6,))
        x = layers.Dense(12, name="hidden")(inputs)
        return keras.Model(inputs, layers.Dense(3, name="head")(x)), {}

    def convolutions():
        inputs = keras.Input((8, 8, 3))
        x = layers.Conv2D(9, 3, name="conv1")(inputs)
        x = layers.Conv2D(9, 3, name="conv2")(x)
        return keras.Model(inputs, x), {"granularity": "kernel"}

    def several_kernels():
        inputs = keras.Input((4, 5))
        x = layers.LSTM(4, name="lstm")(inputs)
        return keras.Sequential(
            [
                keras.Model(inputs, x),
                keras.layers.Dense(7, name="head"),
            ]
        ), {}

    return [mlp, convolutions, several_kernels]


def encoder():
    """Returns an adapted and built `Encoder`."""
    model = Encoder(name="encoder")
    model(X)
    model.scale.adapt(X + 3)
    return model


@keras.saving.register_keras_serializable("tests")
class Backbone(keras.Model):
    """A Functional model with a constructor of numbers, as in keras_hub."""

    def __init__(self, units=6, **kwargs):
        inputs = keras.Input((6,), name="x")
        embed = layers.Dense(units, name="embed")
        blocks = [layers.Dense(units, "relu", name=f"b{i}") for i in range(2)]
        x = embed(inputs)
        between = []
        for block in blocks:
            x = block(x) + x
            between.append(x)
        x = keras.Sequential([layers.Dense(units, name="deep")], name="seq")(x)
        super().__init__(inputs, x, **kwargs)
        self.units, self.embed, self.blocks = units, embed, blocks
        self.between = between

    def get_config(self):
        return {
            "units": self.units,
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable("tests")
class Task(keras.Model):
    """A backbone with a head, which calls a layer of the backbone again."""

    def __init__(self, backbone, **kwargs):
        inputs = backbone.input
        head = layers.Dense(3, name="head")
        super().__init__(
            inputs, head(backbone.embed(backbone(inputs))), **kwargs
        )
        self.backbone, self.head = backbone, head

    def get_config(self):
        return {
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        config["backbone"] = keras.saving.deserialize_keras_object(
            config["backbone"]
        )
        return cls(**config)

    def through(self, x):
        """Calls layers of the backbone directly, as text generation does."""
        x = self.backbone.embed(x)
        for block in self.backbone.blocks:
            x = block(x) + x
        return x


def lookups():
    """A vocabulary, bins and statistics, each adapted."""
    words = keras.Input((1,), dtype="string", name="words")
    numbers = keras.Input((6,), name="numbers")
    lookup = layers.StringLookup(output_mode="one_hot")
    lookup.adapt(np.array(["a", "b", "b"]))
    bins = layers.Discretization(num_bins=4, output_mode="multi_hot")
    bins.adapt(X)
    scale = layers.Normalization()
    scale.adapt(3 * X + 1)
    x = layers.Concatenate()([lookup(words), bins(numbers), scale(numbers)])
    x = layers.Dense(6, "relu", name="hidden")(x)
    return keras.Model([words, numbers], layers.Dense(3, name="head")(x))


def on_base(change):
    inner = keras.Input((6,))
    x = layers.Dense(6, name="one")(inner)
    x = layers.BatchNormalization(name="norm")(x)
    x = keras.Sequential([layers.Dense(6, name="two")], name="deep")(x)
    base = keras.Model(inner, x, name="base")
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(3, name="head")(base(inputs)))
    change(base)
    return model


def frozen(base):
    base.trainable = False


def thawed_within(base):
    base.trainable = False
    base.trainable = True
    base.get_layer("one").trainable = False


def with_encoder(parent, density=None):
    """A subclassed model within another, masked before it is put there."""
    encoder = Encoder(name="encoder")
    encoder(X)
    encoder.scale.adapt(X + 3)
    if density is not None:
        encoder = sparsify(encoder, density, product="dense")
    if parent == "Functional":
        inputs = keras.Input((6,))
        outputs = layers.Dense(3, name="head")(encoder(inputs))
        return keras.Model(inputs, outputs)
    return keras.Sequential(
        [keras.Input((6,)), encoder, layers.Dense(3, name="head")]
    )


def task():
    return Task(Backbone(name="backbone"))


KINDS = {
    "lookups": lookups,
    "frozen base": functools.partial(on_base, frozen),
    "thawed base": functools.partial(on_base, thawed_within),
    "masked in a Functional": functools.partial(with_encoder, "Functional"),
    "masked in a Sequential": functools.partial(with_encoder, "Sequential"),
    "constructor of its own": task,
}

# How to mask these models, if not by `sparsify` on the whole model.
MASKED = {
    "masked in a Functional": functools.partial(with_encoder, "Functional"),
    "masked in a Sequential": functools.partial(with_encoder, "Sequential"),
}

WITHOUT_XLA = {"lookups"}


def data(kind, model):
    x = [WORDS, tf.constant(X)] if kind == "lookups" else X
    return [(x, Y)] * 5
