"""LSTM and GRU with sparse kernels, compared with Keras's."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from rigl_keras import kernels
from rigl_keras.kernels.recurrent_operations import sparse_gru, sparse_lstm
from tests.support.sparse_products import assert_close, random_mask

REFUSED = (tf.errors.InvalidArgumentError, ValueError)


@pytest.fixture(autouse=True, scope="module")
def operations():
    if kernels.load() is None:
        pytest.skip(f"no sparse kernels: {kernels.unavailable()}")
    return kernels.load()


def normal(draw, *shape):
    return tf.constant(0.5 * draw.standard_normal(shape).astype(np.float32))


def test_a_step_by_hand():
    """With zero products, gates are 1/2 and the candidate is tanh(0)."""
    one = tf.ones((1, 1))
    state, carry = tf.constant([[5.0]]), tf.constant([[0.6]])
    nothing = tf.zeros((1, 4))
    outputs, last, after = sparse_lstm(
        tf.ones((1, 1, 1)), state, carry, nothing, nothing, nothing, nothing
    )
    assert_close(after, 0.3 * one)
    assert_close(last, 0.5 * np.tanh(0.3) * one)
    assert_close(outputs, 0.5 * np.tanh(0.3) * one[tf.newaxis])
    nothing = tf.zeros((1, 3))
    outputs, last = sparse_gru(
        tf.ones((1, 1, 1)), state, nothing, nothing, nothing, nothing
    )
    assert_close(last, 2.5 * one)


def test_masks_are_used():
    """Only the input gate has weights, one for the input, one for the state."""
    mask = tf.constant([[0.0, 0.0, 1.0, 0.0]])
    kernel = tf.constant([[9.0, 9.0, 0.5, 9.0]])
    _, _, after = sparse_lstm(
        tf.constant([[[2.0]]]),
        tf.constant([[3.0]]),
        tf.constant([[0.0]]),
        *(kernel, mask, kernel, mask),
    )
    # c = sigmoid(0) tanh(0.5 * 2 + 0.5 * 3)
    assert_close(after, [[0.5 * np.tanh(2.5)]])


def layer_of(kind, units, **options):
    return {"lstm": layers.LSTM, "gru": layers.GRU}[kind](
        units, return_state=True, bias_initializer="random_normal", **options
    )


def ours(layer, kind, x, states, values, masks, **options):
    kernel, recurrent, *bias = values
    tensors = [kernel, masks[0], recurrent, masks[1], *bias]
    function = sparse_lstm if kind == "lstm" else sparse_gru
    return function(
        x,
        *states,
        *tensors,
        sequences=layer.return_sequences,
        backwards=layer.go_backwards,
        **options,
    )


def theirs(layer, x, states, values):
    (outputs, *after), _ = layer.stateless_call(
        values,
        [v.value for v in layer.non_trainable_variables],
        x,
        initial_state=list(states),
    )
    if not layer.return_sequences:
        outputs = outputs[:, tf.newaxis]
    return outputs, *after


def compare(kind, batch, steps, inputs, units, density, *, dense=False, **how):
    draw = np.random.default_rng(batch + steps + units)
    layer = layer_of(kind, units, **how)
    layer.build((batch, steps, inputs))
    values = [normal(draw, *v.shape) for v in layer.trainable_variables]
    masks = [random_mask(draw, v.shape, density) for v in values[:2]]
    x = normal(draw, batch, steps, inputs)
    states = [normal(draw, batch, units) for _ in layer.state_size]
    sources = [x, *states, *values]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        got = ours(layer, kind, x, states, values, masks, dense_gradient=dense)
        loss = tf.add_n([tf.reduce_sum(tf.sin(2 * y)) for y in got])
    found = tape.gradient(loss, sources)
    masked = [v * m for v, m in zip(values, masks, strict=False)] + values[2:]
    with tf.GradientTape() as tape:
        watched = [x, *states, *masked]
        tape.watch(watched)
        want = theirs(layer, x, states, masked)
        loss = tf.add_n([tf.reduce_sum(tf.sin(2 * y)) for y in want])
    wanted = tape.gradient(loss, watched)
    at = 1 + len(states)
    if not dense:
        for k in range(2):
            wanted[at + k] = wanted[at + k] * masks[k]
    for one, two in zip(got, want, strict=True):
        assert_close(one, two)
    for one, two in zip(found, wanted, strict=True):
        assert_close(one, two)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("batch", [1, 17, 70])
def test_as_keras(kind, density, batch):
    compare(kind, batch, 4, 5, 7, density, return_sequences=True)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(go_backwards=True),
        dict(go_backwards=True, return_sequences=True),
        dict(use_bias=False, return_sequences=True),
    ],
)
def test_options(kind, dense, options):
    compare(kind, 5, 3, 4, 6, 0.4, dense=dense, **options)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_many_panels(kind):
    compare(kind, 1100, 2, 3, 4, 0.5)


def test_gates_that_are_full():
    """With large products, gates are 0 and 1, and no output is NaN."""
    x = tf.constant([[[1e4]], [[-1e4]], [[np.inf]], [[88.0]]], tf.float32)
    zero, ones = tf.zeros((4, 1)), tf.ones((1, 4))
    _, state, carry = sparse_lstm(
        x, zero, zero + 0.5, ones, ones, tf.zeros((1, 4)), ones
    )
    assert_close(carry, [[1.5], [0], [1.5], [1.5]])
    assert_close(state, np.tanh([[1.5], [0], [1.5], [1.5]]))
    _, state, _ = sparse_lstm(
        x * np.nan, zero, zero, ones, ones, tf.zeros((1, 4)), ones
    )
    assert np.isnan(state).all()


def test_masks_that_are_assigned():
    draw = np.random.default_rng(0)
    kernel, recurrent = normal(draw, 3, 8), normal(draw, 2, 8)
    masks = [tf.Variable(tf.ones((3, 8))), tf.Variable(tf.ones((2, 8)))]
    x, state = normal(draw, 4, 3, 3), tf.zeros((4, 2))

    @tf.function(autograph=False)
    def run():
        return sparse_lstm(
            x,
            *(state, state),
            *(kernel, masks[0].value(), recurrent, masks[1].value()),
        )[1]

    full = run()
    masks[0].assign(random_mask(draw, (3, 8), 0.5))
    masks[1].assign(random_mask(draw, (2, 8), 0.5))
    layer = layer_of("lstm", 2, use_bias=False)
    layer.build((4, 3, 3))
    values = [kernel * masks[0], recurrent * masks[1]]
    _, want, _ = theirs(layer, x, [state, state], values)
    assert_close(run(), want)
    assert np.abs(full - want).max() > 0.01


# Four examples, three steps, five features and two units.
SHAPES = dict(
    x=(4, 3, 5),
    state=(4, 2),
    carry=(4, 2),
    kernel=(5, 8),
    kernel_mask=(5, 8),
    recurrent=(2, 8),
    recurrent_mask=(2, 8),
    bias=(8,),
)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "name, shape",
    [
        ("x", (4, 3)),
        ("x", (4, 0, 5)),
        ("x", (4, 3, 6)),
        ("state", (3, 2)),
        ("state", (4, 1)),
        ("carry", (4, 3)),
        ("kernel", (5, 9)),
        ("kernel_mask", (5, 7)),
        ("recurrent", (2, 6)),
        ("recurrent", (8,)),
        ("recurrent_mask", (8, 2)),
        ("bias", (7,)),
        ("bias", (2, 8)),
    ],
)
def test_shapes_that_do_not_fit(name, shape, traced):
    def run(*tensors):
        return sparse_lstm(*tensors)

    if traced:
        run = tf.function(
            run, input_signature=[tf.TensorSpec(None)] * 8, autograph=False
        )
    assert run(*map(tf.ones, SHAPES.values()))[0].shape == (4, 3, 2)
    with pytest.raises(REFUSED):
        run(*map(tf.ones, {**SHAPES, name: shape}.values()))


def test_gradients_that_do_not_fit(operations):
    how = dict(kind="lstm", sequences=True, backwards=False)
    forward = {name: tf.ones(shape) for name, shape in SHAPES.items()}
    y, last, kept, one, two = operations.rigl_keras_recurrent(**forward, **how)
    backward = dict(
        kept=kept,
        kernel_weights=one,
        recurrent_weights=two,
        dy=tf.ones_like(y),
        dlast=tf.ones_like(last),
    )
    found = operations.rigl_keras_recurrent_grad(
        **forward, **backward, **how, to_x=True
    )
    assert found[0].shape == (4, 3, 5)
    for name, shape in [
        ("kept", (3,)),
        ("kernel_weights", (39,)),
        ("recurrent_weights", (17,)),
        ("dy", (4, 1, 2)),
        ("dlast", (4, 3)),
    ]:
        with pytest.raises(REFUSED):
            operations.rigl_keras_recurrent_grad(
                **forward,
                **{**backward, name: tf.ones(shape)},
                **how,
                to_x=True,
            )


def test_no_sequences_at_all():
    kernel = tf.ones((5, 8))
    recurrent = tf.ones((2, 8))
    x, state = tf.ones((0, 3, 5)), tf.ones((0, 2))
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        y, _, _ = sparse_lstm(
            x, state, state, kernel, kernel, recurrent, recurrent
        )
    assert y.shape == (0, 3, 2)
    assert not tape.gradient(y, kernel).numpy().any()


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["avx2", "portable"])
def test_other_instruction_sets(wanted):
    """In a separate process, as the library is chosen once."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-n0", __file__),
            *("-k", "by_hand or as_keras or many_panels or full"),
        ],
        env={**os.environ, "RIGL_KERAS_ISA": wanted},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
