"""Small models of every kind that the library supports, with data."""

import keras
import numpy as np
from keras import layers

from rigl_keras.masking.sparsify import sparsify


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """A custom layer with layers in lists and dicts."""

    def __init__(self, units=6, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = [layers.Dense(units, name="a"), layers.Dense(units)]
        self.heads = {"one": layers.Dense(units, activation="relu", name="h")}
        self.norm = layers.BatchNormalization(name="norm")
        self.drop = layers.Dropout(0.2, seed=3)

    def build(self, input_shape):
        self.dense[0].build(input_shape)
        inner = (*input_shape[:-1], self.units)
        for layer in (self.dense[1], self.heads["one"], self.norm):
            layer.build(inner)

    def call(self, x, training=None):
        x = self.dense[1](self.norm(self.dense[0](x), training=training))
        return self.heads["one"](self.drop(x, training=training))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("tests")
class Linear(layers.Layer):
    """A layer whose kernel has another name."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape):
        self.w = self.add_weight(
            name="w",
            shape=(input_shape[-1], self.units),
            initializer="he_normal",
        )

    def call(self, x):
        return x @ self.w

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """Owns layers as attributes, in a list, a tuple, and a nested model."""

    def __init__(self, units=6, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = layers.Dense(units, activation="relu", name="first")
        self.blocks = [Block(units, name="b0"), layers.Dense(units, name="b1")]
        self.pair = (layers.Dense(units, name="p0"), layers.ReLU())
        self.nested = keras.Sequential(
            [keras.Input((units,)), layers.Dense(units, name="deep")]
        )
        self.last = layers.Dense(3, name="last")

    def call(self, x, training=None):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        for layer in self.pair:
            x = layer(x)
        return self.last(self.nested(x))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("tests")
class OwnStep(keras.Model):
    """A Functional model with a custom training step."""

    def train_step(self, data):
        x, y = data[:2]
        with self.tape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}

    def tape(self):
        import tensorflow as tf

        return tf.GradientTape()


def sequential():
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(8, activation="relu", name="hidden"),
            layers.Dense(3, name="head"),
        ]
    )


def functional(channels=4, outputs=3):
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(channels, 3, padding="same", name="conv1")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    skip = x = layers.ReLU()(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Conv2D(channels, 3, padding="same", name="conv2")(x)
    x = layers.GlobalAveragePooling2D()(layers.Add()([skip, x]))
    return keras.Model(inputs, layers.Dense(outputs, name="head")(x))


def nested():
    inner = keras.Sequential(
        [keras.Input((6,)), layers.Dense(6, name="inner"), layers.ReLU()]
    )
    inputs = keras.Input((5,))
    x = inner(layers.Dense(6, name="outer")(inputs))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def nested_subclassed():
    inputs = keras.Input((5,))
    return keras.Model(inputs, Subclassed(name="inside")(inputs))


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 5), np.float32))
    return model


def shared():
    inputs = keras.Input((6,))
    twice = layers.Dense(6, activation="relu", name="twice")
    x = twice(twice(inputs))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def several_inputs_and_outputs():
    one, two = keras.Input((5,), name="one"), keras.Input((4,), name="two")
    x = layers.Concatenate()(
        [layers.Dense(6, name="d1")(one), layers.Dense(6, name="d2")(two)]
    )
    return keras.Model(
        {"one": one, "two": two},
        {
            "a": layers.Dense(3, name="a")(x),
            "b": layers.Dense(2, name="b")(x),
        },
    )


def attention():
    inputs = keras.Input((4, 6))
    x = layers.MultiHeadAttention(2, 3, dropout=0.1, name="attention")(
        inputs, inputs, use_causal_mask=True
    )
    x = layers.LayerNormalization(name="norm")(inputs + x)
    x = layers.EinsumDense(
        "abc,cd->abd", output_shape=(None, 5), name="einsum"
    )(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def separable():
    inputs = keras.Input((8, 8, 3))
    x = layers.SeparableConv2D(6, 3, name="separable")(inputs)
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def transposed():
    inputs = keras.Input((4, 4, 3))
    x = layers.Conv2DTranspose(5, 3, strides=2, name="transposed")(inputs)
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def recurrent():
    inputs = keras.Input((4, 5))
    # Each direction is a loop, which takes a second to trace.
    both = layers.Bidirectional(
        layers.LSTM(4, dropout=0.1),
        backward_layer=layers.GRU(4, go_backwards=True),
        name="both",
    )
    x = both(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def embedding():
    inputs = keras.Input((4,), dtype="int32")
    x = layers.Embedding(9, 5, mask_zero=True, name="embedding")(inputs)
    x = layers.LSTM(4, name="lstm")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def custom_layers():
    inputs = keras.Input((5,))
    x = Block(6, name="block")(inputs)
    x = Linear(6, name="linear")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def own_train_step():
    model = sequential()
    inputs = keras.Input((5,))
    return OwnStep(inputs, model(inputs))


KINDS = {
    "Sequential": sequential,
    "Functional": functional,
    "nested": nested,
    "subclassed": subclassed,
    "subclassed, nested": nested_subclassed,
    "shared layer": shared,
    "several inputs and outputs": several_inputs_and_outputs,
    "MultiHeadAttention, EinsumDense": attention,
    "SeparableConv2D": separable,
    "Conv2DTranspose": transposed,
    "LSTM, GRU, Bidirectional": recurrent,
    "Embedding": embedding,
    "custom layers": custom_layers,
    "own train_step": own_train_step,
}

# Arguments of `sparsify` for a kind, besides model and density.
OPTIONS = {
    "Embedding": {"layers": lambda layer: True},
    "custom layers": {"kernels": {Linear: "w"}},
}


def data(model, n=16, seed=0):
    """Returns inputs and targets that fit one of these models."""
    draw = np.random.default_rng(seed)

    def array(spec, rows=n):
        shape = (rows, *spec.shape[1:])
        if "int" in str(spec.dtype):
            return draw.integers(1, 9, shape)
        return draw.standard_normal(shape).astype(np.float32)

    if not isinstance(model, keras.Sequential) and hasattr(model, "operations"):
        spec, target = model.input, model.output
    else:  # inputs and outputs are vectors
        spec, target = keras.Input((5,)), keras.Input((3,))
    return (
        keras.tree.map_structure(array, spec),
        keras.tree.map_structure(array, target),
    )


def make(kind):
    """Returns the dense model of a kind, the same in each call."""
    keras.utils.set_random_seed(0)
    return KINDS[kind]()


def masked(kind, density=0.4, **options):
    """Returns the masked model of a kind; `options` go to `sparsify`."""
    return sparsify(make(kind), density, **OPTIONS.get(kind, {}), **options)


def outputs(model, x):
    """Returns the outputs of a model as a list of arrays."""
    return [np.asarray(y) for y in keras.tree.flatten(model(x, training=False))]


def assert_same(one, two):
    """Checks that two lists of arrays are equal up to rounding."""
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
