"""Kernels that are read later or elsewhere, in sparse models."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support import hard_kinds

import rigl_keras
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.tracing import dense_gradients
from rigl_keras.methods.rigl import RigL
from rigl_keras.training.dense_gradients import seem_masked


@keras.saving.register_keras_serializable("tests")
class TwoLayers(hard_kinds.Inner):
    """Read as usual, recomputed, or differentiated by hand."""

    parts = ("one", "two")

    def __init__(self, way="plain", **kwargs):
        super().__init__(**kwargs)
        self.way = way

    def call(self, x):
        def inner(x):
            return self.two(self.one(x))

        if self.way == "remat":
            return keras.remat(inner)(x)
        if self.way == "by hand":
            return by_hand(inner)(x)
        return inner(x)

    def get_config(self):
        return {**super().get_config(), "way": self.way}


def by_hand(function):
    @tf.custom_gradient
    def forward(x):
        def gradient(upstream, variables=None):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x)
            of_x, *others = tape.gradient(y, [x, *(variables or [])], upstream)
            return of_x, others

        return function(x), gradient

    return forward


WAYS = ("plain", "remat", "by hand")


def of_one_layer(way):
    """A single masked layer, which calls inner layers again."""
    inputs = keras.Input((6,))
    outputs = TwoLayers(way, name="inner")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(outputs))


class OfMaskedLayers(keras.Model):
    """Has masked layers that are called again."""

    def __init__(self, way):
        super().__init__(name="model")
        self.inner = TwoLayers("plain", name="inner")
        self.head = layers.Dense(3, name="head")
        around = {
            "plain": lambda f: f,
            "remat": keras.remat,
            "by hand": by_hand,
        }
        self.first = around[way](lambda x: self.inner(x))

    def call(self, x):
        return self.head(self.first(x))


def of_masked_layers(way):
    model = OfMaskedLayers(way)
    model(np.zeros((1, 6), np.float32))
    return model


@functools.cache
def made(make, way):
    keras.utils.set_random_seed(0)
    return sparsify(make(way), 0.4)


@functools.cache
def gradients(make, way, graph, forward_dense, backward_dense):
    """Returns each kernel's gradient, from a pass and a later backward pass."""
    model = made(make, way)
    x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)

    def compute(x):
        kernels = [m.kernel.value for m in masked_layers(model)]
        with tf.GradientTape() as tape:
            with dense_gradients() if forward_dense else tf.name_scope("no"):
                loss = tf.reduce_sum(model(x, training=True) ** 2)
        with dense_gradients() if backward_dense else tf.name_scope("no"):
            return tape.gradient(loss, kernels)

    compute = tf.function(compute) if graph else compute
    return [g.numpy() for g in compute(tf.constant(x))]


@pytest.mark.parametrize("backward_dense", [False, True])
@pytest.mark.parametrize("forward_dense", [False, True])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [of_one_layer, of_masked_layers])
def test_where_the_forward_pass_is_counts(
    make, way, graph, forward_dense, backward_dense
):
    got = gradients(make, way, graph, forward_dense, backward_dense)
    want = gradients(of_one_layer, "plain", False, forward_dense, False)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for gradient, masked in zip(
        got, masked_layers(made(make, way)), strict=True
    ):
        outside = gradient[masked.mask.numpy() == 0]
        assert (outside != 0).any() == forward_dense
        assert (gradient[masked.mask.numpy() == 1] != 0).any()


@pytest.mark.slow_but("remat")
@pytest.mark.parametrize("way", ["remat", "by hand"])
def test_rigl_moves_the_same_connections(way):
    """In `fit`, with a layer that is called again for its gradients."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((16, 6)).astype(np.float32)
    y = draw.standard_normal((16, 3)).astype(np.float32)

    def masks(way):
        keras.utils.set_random_seed(0)
        model = sparsify(of_one_layer(way), 0.4)
        before = masked_layers(model).masks
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        model.fit(
            x,
            y,
            batch_size=4,
            shuffle=False,
            verbose=0,
            callbacks=[RigL(frequency=2, end_step=4)],
        )
        after = masked_layers(model).masks
        assert any((after[n] != before[n]).any() for n in after)
        return after

    want = masks("plain")
    for name, mask in masks(way).items():
        np.testing.assert_array_equal(mask, want[name])


def test_what_a_layer_assigns_to_its_kernel_is_masked():
    """Spectral normalisation by hand: the kernel over its largest value."""

    class Largest(layers.Dense):
        def call(self, x):
            self.kernel.assign(self.kernel / tf.reduce_max(self.kernel) + 1.0)
            return super().call(x)

    masked = Masked(Largest(2, use_bias=False))
    masked.build((None, 2))
    masked.assign_mask([[1.0, 0.0], [1.0, 1.0]])
    masked.kernel.assign([[1.0, 0.0], [2.0, 4.0]])
    y = masked(np.ones((1, 2), np.float32)).numpy()
    # [[1/4, 0], [1/2, 1]] + 1, and zero outside the mask.
    np.testing.assert_array_equal(masked.kernel, [[1.25, 0.0], [1.5, 2.0]])
    np.testing.assert_array_equal(y, [[2.75, 2.0]])


def test_a_loop_reads_a_product_made_before_it():
    """Otherwise the cell of an RNN would multiply at every time step."""
    inputs = keras.Input((5, 6))
    model = sparsify(keras.Model(inputs, layers.LSTM(4)(inputs)), 0.5)
    function = tf.function(lambda x: model(x)).get_concrete_function(
        tf.TensorSpec((2, 5, 6))
    )
    graph = function.graph.as_graph_def()
    bodies = {n.attr["body"].func.name for n in graph.node if "While" in n.op}
    reads = [
        node.name
        for body in graph.library.function
        if body.signature.name in bodies
        for node in body.node_def
        if node.op == "ReadVariableOp"
    ]
    assert len(reads) == 1  # the bias


def test_mixed_precision_casts_the_product():
    masked = Masked(hard_kinds.Recomputed(dtype="mixed_bfloat16", name="i"))
    masked.build((None, 6))
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.cast(masked(x, training=True), "float32") ** 2)
    first = masked.masked_kernels()[0].kernel
    gradient = tape.gradient(loss, first.value)
    assert gradient.dtype == first.dtype == "float32"
    assert np.abs(gradient).max() > 0


def test_sparse_inputs_take_dense_products(always_sparse):
    """Sparse products take no SparseTensor."""
    dense = layers.Dense(4)
    dense.build((None, 6))
    masked = Masked(dense, product="sparse")
    masked.build((None, 6))
    x = tf.sparse.from_dense(np.eye(6, dtype=np.float32)[:3])
    np.testing.assert_array_equal(masked(x), masked.kernel[:3])
    got = tf.function(lambda x: masked(x, training=True))(x)
    np.testing.assert_array_equal(got, masked.kernel[:3])


# Averages of weights.


def dense_model(name=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(8, activation="relu", name="hidden")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name=name)


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
def test_an_average_keeps_what_either_keeps(in_graph, tmp_path):
    one, two = (sparsify(dense_model(), 0.3, seed=seed) for seed in (1, 2))
    masks, others = (masked_layers(m).masks for m in (one, two))
    kernels = [
        0.75 * a.kernel.numpy() + 0.25 * b.kernel.numpy()
        for a, b in zip(masked_layers(one), masked_layers(two), strict=True)
    ]

    def average():
        for target, source in zip(one.weights, two.weights, strict=True):
            target.assign(0.75 * target + 0.25 * source)

    with pytest.warns(UserWarning, match="What is not 0 counts as 1"):
        if in_graph:
            tf.function(average)()
        else:
            one.set_weights(
                [
                    0.75 * a + 0.25 * b
                    for a, b in zip(
                        one.get_weights(), two.get_weights(), strict=True
                    )
                ]
            )
    for masked, kernel in zip(masked_layers(one), kernels, strict=True):
        union = masks[masked.name] | others[masked.name]
        np.testing.assert_array_equal(masked.mask, union)
        np.testing.assert_allclose(masked.kernel, kernel, rtol=1e-6)
        # No average is lost, or computed with only a part of a mask.
        np.testing.assert_array_equal(masked.masked_kernel(), masked.kernel)
    one.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    x = np.ones((2, 6), np.float32)
    np.testing.assert_allclose(loaded(x), one(x), rtol=1e-6)


@pytest.mark.parametrize(
    "value",
    [
        np.array([[1, 0], [0, 1]]),
        np.array([[True, False], [False, True]]),
        tf.constant([[1.0, 0.0], [0.0, 1.0]], tf.float64),
    ],
    ids=["int", "bool", "float64"],
)
def test_masks_of_zeros_and_ones_are_assigned_without_a_word(value):
    masked = Masked(layers.Dense(2))
    masked.build((None, 2))
    masked.mask.assign(value)
    np.testing.assert_array_equal(masked.mask, [[1, 0], [0, 1]])
    assert masked.mask.value.dtype == tf.bool
    tf.function(lambda: masked.mask.assign(1 - np.asarray(value, int)))()
    np.testing.assert_array_equal(masked.mask, [[0, 1], [1, 0]])


def test_a_fractional_mask_that_a_call_is_given_counts_as_ones():
    model = sparsify(dense_model(), 1.0)
    halves = [0.5 * v.numpy() for v in model.non_trainable_variables]
    x = np.ones((1, 6), np.float32)
    y, _ = model.stateless_call(model.trainable_variables, halves, x)
    np.testing.assert_allclose(y, model(x), rtol=1e-6)


# Names.


class Named(keras.Model):
    def __init__(self, name=None):
        super().__init__(name=name)
        self.one = layers.Dense(8, name="hidden")
        self.block = TwoLayers(name="inner", units=8)
        self.two = layers.Dense(3, name="head")

    def call(self, x):
        return self.two(self.block(self.one(x)))


def subclassed(name=None):
    model = Named(name)
    model(np.zeros((1, 6), np.float32))
    return model


def sequential(name=None):
    return keras.Sequential([keras.Input((6,)), *Named().layers], name=name)


def functional(name=None):
    inputs = keras.Input((6,))
    return keras.Model(inputs, sequential()(inputs), name=name)


def test_masks_depend_on_layer_names_and_seed_alone():
    """They do not depend on the kind of model, or on earlier models."""
    drawn = [
        masked_layers(sparsify(make(name), 0.3, seed=3)).masks
        for make in (subclassed, sequential, functional)
        for name in (None, "net", None)
    ]
    assert list(drawn[0]) == [
        "hidden",
        "inner/one/kernel",
        "inner/two/kernel",
        "head",
    ]
    for masks in drawn[1:]:
        for name, mask in masks.items():
            np.testing.assert_array_equal(mask, drawn[0][name])
    other = masked_layers(sparsify(sequential(), 0.3, seed=4)).masks
    assert all((other[n] != m).any() for n, m in drawn[0].items())
    keys = [
        m.draw_key
        for make in (subclassed, functional)
        for m in masked_layers(sparsify(make(), 0.3))
    ]
    assert keys[:4] == keys[4:]
    assert len(set(keys)) == 4


class Counting(layers.Dense):
    """Counts its calls."""

    def build(self, input_shape):
        super().build(input_shape)
        self.calls = self.add_weight(
            name="calls", initializer="zeros", trainable=False
        )

    def call(self, inputs):
        self.calls.assign(self.calls + 1.0)
        return super().call(inputs)


def test_a_stateless_call_returns_what_a_layer_assigns():
    model = keras.Sequential([keras.Input((6,)), Counting(4)])
    model = sparsify(model, 0.5)
    names = [variable.name for variable in model.non_trainable_variables]
    values = [v.value for v in model.non_trainable_variables]
    trainable = [v.value for v in model.trainable_variables]
    _, after = model.stateless_call(trainable, values, tf.ones((2, 6)))
    at = names.index("calls")
    assert float(after[at]) == float(values[at]) + 1
    assert float(model.non_trainable_variables[at]) == float(values[at])


# Whether gradients are dense.


def halves(*shape):
    """A mask with ones in every second column."""
    mask = np.zeros(shape, np.float32)
    mask[..., ::2] = 1
    return tf.constant(mask)


def seems(*pairs):
    return seem_masked(*zip(*pairs, strict=True)).numpy().tolist()


def test_a_layer_whose_gradients_are_masked_is_found_among_others():
    mask, dense = tf.eye(8), tf.ones((8, 8))
    # Every input and output has a weight on the diagonal, so 56 gradients are
    # expected.
    assert seems((mask, mask), (mask, dense)) == [True, False]
    assert seems((mask, dense), (mask, dense)) == [False, False]
    assert seems((mask, mask), (mask, mask)) == [True, True]
    one = np.array(mask)
    one[0, 1] = 1e-30  # dense gradients are nonzero somewhere
    assert seems((mask, one), (mask, dense)) == [False, False]


def test_gradients_that_may_be_zero():
    mask = halves(8, 8)
    zeros = tf.zeros((8, 8))
    rows = np.zeros((8, 8), np.float32)
    rows[:2] = 1.0  # six inputs are always zero,
    dead = rows * mask  # and so are the units that could grow
    assert seems((mask, zeros), (mask, tf.ones((8, 8)))) == [False, False]
    assert seems((mask, dead), (mask, dead)) == [False, False]
    assert seems((tf.ones((8, 8)), tf.ones((8, 8)))) == [False]  # no zeros
    # All gradients of a small kernel may be zero, if other kernels decide.
    small = tf.eye(3)
    assert seems((small, small), (mask, tf.ones((8, 8)))) == [False, False]
    assert seems((small, small)) == [True]
    # One gradient is expected where this kernel has no weight.
    corner = np.array([[1, 1], [1, 0]], np.float32)
    assert seems((corner, corner)) == [True]
    # If a third of the kept have a gradient, so would a third of the removed.
    assert seems((tf.eye(3), tf.zeros((3, 3)))) == [False]


def test_the_layer_is_named():
    model = sparsify(dense_model(), 0.5)
    optimizer = keras.optimizers.SGD(0.1)
    updater = RigL(frequency=1, end_step=9)
    updater.attach(model, optimizer)
    x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x) ** 2)
        variables = model.trainable_variables
        updater.update(tape.gradient(loss, variables), variables)

    step()  # step 0 is not an update
    named = "every gradient of 'hidden', 'head' was exactly zero"
    with pytest.raises(ValueError, match=f"step 1: {named}"):
        step()
    with pytest.raises(ValueError, match=named):
        updater.fetch()


def test_a_graph_without_dense_gradients_fails():
    """Masks that never move would tell nobody."""
    model = sparsify(dense_model(), 0.5)
    updater = RigL(frequency=1, end_step=9)
    updater.attach(model, keras.optimizers.SGD(0.1))
    before = [np.array(v) for v in model.variables]

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x) ** 2)
        variables = model.trainable_variables
        updater.update(tape.gradient(loss, variables), variables)

    x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    step(x)
    after = [np.array(v) for v in model.variables]
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
    with pytest.raises(tf.errors.InvalidArgumentError, match="dense_gradients"):
        step(x)
    for variable, value in zip(model.variables, after, strict=True):
        np.testing.assert_array_equal(variable, value)
    with pytest.raises(ValueError, match="step 1: every gradient of 'hidden'"):
        updater.fetch()


def test_one_layer_that_is_traced_too_early_is_named():
    """The error names it even if all other layers have dense gradients."""
    model = sparsify(dense_model(), 0.5)
    hidden = model.get_layer("hidden")
    early = tf.function(hidden.layer.call)
    draw = np.random.default_rng(0)
    x = draw.standard_normal((8, 6)).astype(np.float32)
    with rigl_keras.masking.tracing.KernelScope(hidden.masked_kernels()):
        early(x)  # traced, with masked gradients
    hidden.layer.call = early
    updater = RigL(frequency=1, end_step=9)
    updater.attach(model, keras.optimizers.SGD(0.1))

    def step():
        with dense_gradients(), tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x) ** 2)
        variables = model.trainable_variables
        updater.update(tape.gradient(loss, variables), variables)

    step()
    with pytest.raises(ValueError, match="every gradient of 'hidden' was"):
        step()
