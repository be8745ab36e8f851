"""Models that read kernels, or assign state, later or elsewhere than usual.

They do so in a recomputation, in a custom gradient, in a loop or a branch, in
a layer's `tf.function`, or by assigning the kernel itself.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

registered = keras.saving.register_keras_serializable("tests")


@registered
class Inner(layers.Layer):
    """Has layers that subclasses call in various ways."""

    parts = ("one", "norm", "drop", "two")

    def __init__(self, units=6, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        made = {
            "one": lambda: layers.Dense(units, activation="tanh", name="one"),
            "norm": lambda: layers.BatchNormalization(name="norm"),
            "drop": lambda: layers.Dropout(0.2, seed=3),
            "two": lambda: layers.Dense(units, name="two"),
        }
        for name in self.parts:
            setattr(self, name, made[name]())

    def build(self, input_shape):
        for name in self.parts:
            getattr(self, name).build((None, self.units))

    def inner(self, x, training=None):
        x = self.norm(self.one(x), training=training)
        return self.two(self.drop(x, training=training))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@registered
class Recomputed(Inner):
    """Rematerialised: it is called again while gradients are computed."""

    def call(self, x, training=None):
        return keras.remat(lambda x: self.inner(x, training))(x)


@registered
class RecomputedKernel(layers.Layer):
    """A kernel that only a recomputed function reads."""

    def build(self, input_shape):
        self.kernel = self.add_weight(
            name="kernel", shape=(input_shape[-1], 6), initializer="he_normal"
        )
        self.product = tf.recompute_grad(lambda x: ops.tanh(x @ self.kernel))

    def call(self, x):
        return self.product(x)


@registered
class ByHand(layers.Layer):
    """A custom gradient, which calls the layer again."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(6, activation="tanh", name="dense")

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        @tf.custom_gradient
        def forward(x):
            def gradient(upstream, variables=None):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    y = self.dense(x)
                of_x, *of_variables = tape.gradient(
                    y, [x, *(variables or [])], upstream
                )
                return of_x, of_variables

            return self.dense(x), gradient

        return forward(x)


@registered
class Loop(Inner):
    """Calls a layer as often as a tensor says."""

    def call(self, x, training=None):
        times = ops.cast(ops.max(x) * 0.0, "int32") + 3
        return ops.while_loop(
            lambda i, x: i < times,
            lambda i, x: (i + 1, self.inner(x, training)),
            (0, x),
            maximum_iterations=4,  # XLA needs a bound
        )[1]


@registered
class Branch(Inner):
    def call(self, x, training=None):
        return ops.cond(
            ops.sum(x) > 0,
            lambda: self.inner(x, training) + x,
            lambda: self.inner(2.0 * x, training),
        )


@registered
class EachRow(Inner):
    parts = ("one", "drop")

    def call(self, x, training=None):
        return ops.map(
            lambda row: self.drop(self.one(row), training=training), x
        )


@registered
class Scan(Inner):
    parts = ("one", "drop")

    def call(self, x, training=None):
        def step(state, row):
            state = self.drop(self.one(row) + state, training=training)
            return state, state

        rows = ops.transpose(x, (1, 0, 2))
        return ops.scan(step, ops.zeros_like(rows[0]), rows)[1][-1]

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.units)


@registered
class Vectorized(Inner):
    parts = ("one", "two")

    def call(self, x, training=None):
        return ops.vectorized_map(lambda rows: self.two(self.one(rows)), x)


@registered
class Traced(Inner):
    """Calls a layer in its own `tf.function`."""

    @tf.function
    def call(self, x, training=None):
        return self.inner(x, training)


@registered
class Tied(Inner):
    """Reads a kernel without calling the layer that owns it."""

    parts = ("one",)

    def call(self, x, training=None):
        return self.one(x) @ ops.transpose(self.one.kernel)


@registered
class Penalised(Inner):
    """Adds a loss, the gradient of its outputs with respect to its inputs."""

    parts = ("one", "two")

    def call(self, x, training=None):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = ops.tanh(self.two(self.one(x)))
        self.add_loss(ops.mean(tape.gradient(y, x) ** 2))
        return y


@registered
class Cell(Inner):
    """A recurrent cell with its own dropout and normalisation."""

    def __init__(self, units=6, **kwargs):
        super().__init__(units, **kwargs)
        self.state_size = units

    def call(self, x, states, training=None):
        state = ops.tanh(self.inner(x, training) + states[0])
        return state, [state]


@registered
class InPlace(keras.Model):
    """Subclassed, with rematerialised layers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with keras.RematScope(mode="full"):
            self.first = layers.Dense(6, activation="relu", name="first")
            self.second = layers.Dense(6, name="second")
        self.both = keras.remat(lambda x: self.last(ops.relu(self.second(x))))
        self.last = layers.Dense(3, name="last")

    def call(self, x):
        return self.both(self.first(x))


@registered
class OnSparse(keras.Model):
    """Subclassed, on SparseTensors."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(6, activation="relu", name="first")
        self.last = layers.Dense(3, name="last")

    def call(self, x):
        return self.last(self.first(x))


def around(*middle, shape=(6,), **options):
    """A Functional model of some layers and a head."""
    inputs = x = keras.Input(shape, **options)
    for layer in middle:
        x = layer(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def called(model, x):
    model(x)
    return model


KINDS = {
    "keras.remat": lambda: around(Recomputed(name="inner")),
    "tf.recompute_grad of a kernel": lambda: around(RecomputedKernel(name="k")),
    "RematScope, keras.remat of layers": lambda: called(
        InPlace(), np.zeros((1, 6), np.float32)
    ),
    "tf.custom_gradient": lambda: around(ByHand(name="hand")),
    "while_loop": lambda: around(Loop(name="inner")),
    "cond": lambda: around(Branch(name="inner")),
    "map": lambda: around(
        EachRow(name="inner"), layers.Flatten(), shape=(4, 6)
    ),
    "scan": lambda: around(Scan(name="inner"), shape=(4, 6)),
    "vectorized_map": lambda: around(
        Vectorized(name="inner"), layers.Flatten(), shape=(4, 6)
    ),
    "tf.function": lambda: around(Traced(name="inner")),
    "tied kernel": lambda: around(Tied(name="inner")),
    "gradient penalty": lambda: around(Penalised(name="inner")),
    "RNN": lambda: around(layers.RNN(Cell(name="c"), name="rnn"), shape=(4, 6)),
    "stateful LSTM": lambda: around(
        layers.LSTM(4, stateful=True, name="lstm"),
        shape=None,
        batch_shape=(4, 4, 6),
    ),
    "SpectralNormalization": lambda: around(
        layers.SpectralNormalization(
            layers.Conv2D(4, 3, name="conv"), name="spectral"
        ),
        layers.LeakyReLU(),
        layers.Flatten(),
        layers.SpectralNormalization(
            layers.Dense(5, name="dense"), name="spectral_dense"
        ),
        shape=(6, 6, 2),
    ),
    "TimeDistributed": lambda: around(
        layers.TimeDistributed(Recomputed(name="inner"), name="each"),
        layers.Flatten(),
        shape=(4, 6),
    ),
    "Input(sparse=True)": lambda: around(
        layers.Dense(6, activation="relu", name="first"),
        shape=(6,),
        sparse=True,
    ),
    "SparseTensor": lambda: called(
        OnSparse(), tf.sparse.from_dense(np.eye(6, dtype=np.float32))
    ),
}

ON_SPARSE = ("Input(sparse=True)", "SparseTensor")


def data(kind, model, n=20):
    """Returns inputs and targets, in batches of four."""
    draw = np.random.default_rng(0)
    shape = (6,)
    if hasattr(model, "operations"):
        shape = model.input.shape[1:]
    x = draw.standard_normal((n, *shape)).astype(np.float32)
    y = draw.standard_normal((n, 3)).astype(np.float32)
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, n, 4)]
    if kind in ON_SPARSE:
        batches = [
            (tf.sparse.from_dense(np.maximum(x, 0.0)), y) for x, y in batches
        ]
    return batches
