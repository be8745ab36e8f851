"""Products with a sparse matrix, compared with TensorFlow's dense ones."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from rigl_keras import kernels
from rigl_keras.kernels import library, sparse_dense
from tests.support.sparse_products import assert_close, random_mask

REFUSED = (tf.errors.InvalidArgumentError, ValueError)


@pytest.fixture(autouse=True, scope="module")
def operations():
    if kernels.load() is None:
        pytest.skip(f"no sparse kernels: {kernels.unavailable()}")
    return kernels.load()


def normal(draw, *shape):
    return tf.constant(draw.standard_normal(shape).astype(np.float32))


def by_hand():
    x = tf.constant([[1.0, 2.0, 3.0]])
    kernel = tf.constant([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    mask = tf.constant([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    return x, kernel, mask, tf.constant([100.0, 200.0])


def test_by_hand():
    x, kernel, mask, bias = by_hand()
    with tf.GradientTape() as tape:
        tape.watch([x, kernel, bias])
        y = sparse_dense(x, kernel, mask, bias=bias)
    # 1 * 1 + 3 * 3 + 100, and 2 * 20 + 200
    assert y.numpy().tolist() == [[110, 240]]
    upstream = tf.constant([[2.0, 5.0]])
    to_x, to_kernel, to_bias = tape.gradient(
        y, [x, kernel, bias], output_gradients=upstream
    )
    assert to_x.numpy().tolist() == [[2, 100, 6]]
    assert to_kernel.numpy().tolist() == [[2, 0], [0, 10], [6, 0]]
    assert to_bias.numpy().tolist() == [2, 5]


def test_the_dense_gradient_by_hand():
    x, kernel, mask, _ = by_hand()
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        y = sparse_dense(x, kernel, mask, dense_gradient=True)
    assert y.numpy().tolist() == [[10, 40]]
    found = tape.gradient(y, kernel, output_gradients=tf.constant([[2.0, 5.0]]))
    assert found.numpy().tolist() == [[2, 5], [4, 10], [6, 15]]


def compare(draw, rows, inputs, outputs, density, *, dense=False, bias=True):
    x = normal(draw, *rows, inputs)
    kernel = normal(draw, inputs, outputs)
    mask = random_mask(draw, (inputs, outputs), density)
    shift = normal(draw, outputs)
    upstream = normal(draw, *rows, outputs)
    sources = [x, kernel, *([shift] if bias else [])]
    with tf.GradientTape() as ours:
        ours.watch(sources)
        y = sparse_dense(
            *(x, kernel, mask),
            bias=shift if bias else None,
            dense_gradient=dense,
        )
    with tf.GradientTape() as theirs:
        theirs.watch(sources)
        masked = kernel * mask
        theirs.watch(masked)
        want = tf.tensordot(x, masked, 1) + (shift if bias else 0.0)
    assert_close(y, want)
    got = ours.gradient(y, sources, output_gradients=upstream)
    other = theirs.gradient(
        want, [x, masked, *sources[2:]], output_gradients=upstream
    )
    other[1] = other[1] if dense else other[1] * mask
    for one, two in zip(got, other, strict=True):
        assert_close(one, two)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("rows", [(1,), (2, 3, 7), (131,), (5, 129)])
def test_rows_and_densities(rows, density):
    draw = np.random.default_rng(len(rows) + int(1000 * density))
    for inputs, outputs in [(1, 1), (3, 5), (16, 32), (70, 33), (257, 96)]:
        compare(draw, rows, inputs, outputs, density)


@pytest.mark.parametrize("dense", [False, True])
def test_many_rows(dense):
    """With many panels, sums of weights are computed in vectors."""
    draw = np.random.default_rng(0)
    compare(draw, (65, 67), 48, 40, 0.2, dense=dense)
    compare(draw, (4200,), 17, 31, 0.3, dense=dense, bias=False)


def test_few_weights_of_many():
    compare(np.random.default_rng(1), (128,), 1500, 1100, 0.001)


@pytest.mark.parametrize("rows", [(0,), (4, 0), (3,), ()])
def test_nothing_to_multiply(rows):
    draw = np.random.default_rng(0)
    for inputs, outputs in [(0, 4), (4, 0), (0, 0), (4, 3)]:
        for dense in (False, True):
            compare(draw, rows, inputs, outputs, 0.5, dense=dense)


def test_what_is_removed_does_not_leak():
    x, kernel, mask, _ = by_hand()
    spoilt = tf.where(mask > 0, kernel, np.nan)
    with tf.GradientTape() as tape:
        tape.watch([x, spoilt])
        y = sparse_dense(x, spoilt, mask)
    assert y.numpy().tolist() == [[10, 40]]
    for gradient in tape.gradient(y, [x, spoilt]):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dense", [False, True])
def test_gradients_of_gradients(dense):
    draw = np.random.default_rng(2)
    x, kernel, bias = normal(draw, 5, 6), normal(draw, 6, 4), normal(draw, 4)
    mask = random_mask(draw, (6, 4), 0.5)

    def dense_product(x, kernel, mask, *, bias, dense_gradient):
        @tf.custom_gradient
        def masked(kernel):
            return kernel * mask, lambda up: up if dense else up * mask

        return x @ masked(kernel) + bias

    found = []
    for product in (sparse_dense, dense_product):
        with tf.GradientTape() as outer:
            outer.watch([x, kernel, bias])
            with tf.GradientTape() as inner:
                inner.watch([x, kernel, bias])
                y = product(x, kernel, mask, bias=bias, dense_gradient=dense)
                loss = tf.reduce_sum(tf.sin(y))
            first = inner.gradient(loss, [x, kernel, bias])
            total = tf.add_n([tf.reduce_sum(g**3) for g in first])
        found.append([*first, *outer.gradient(total, [x, kernel, bias])])
    for one, two in zip(*found, strict=True):
        assert_close(one, two)


def test_only_what_is_asked_for_is_computed():
    """Inputs that are data and frozen kernels need no gradients."""
    draw = np.random.default_rng(0)
    x, kernel = normal(draw, 5, 6), normal(draw, 6, 4)
    mask = random_mask(draw, (6, 4), 0.5)

    def gradient_of(which):
        @tf.function(autograph=False)
        def run(x, kernel):
            source = [x, kernel][which]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(source)
                y = sparse_dense(x, kernel, mask)
            return tape.gradient(y, source)

        graph = run.get_concrete_function(x, kernel).graph
        (op,) = [
            op
            for op in graph.get_operations()
            if op.type == "RiglKerasMatMulGrad"
        ]
        asked = [op.get_attr(name) for name in ("to_x", "to_kernel", "to_bias")]
        return run(x, kernel), asked

    to_x, asked = gradient_of(0)
    assert asked == [True, False, False]
    ones = tf.ones((5, 4))
    assert_close(to_x, ones @ tf.transpose(kernel * mask))
    to_kernel, asked = gradient_of(1)
    assert asked == [False, True, False]
    assert_close(to_kernel, tf.transpose(x) @ ones * mask)


def test_a_gradient_that_is_kept_is_not_written_to():
    """Only the memory of a released gradient is used again."""
    draw = np.random.default_rng(0)
    kernel, mask = normal(draw, 6, 4), random_mask(draw, (6, 4), 0.5)
    kept, copies = [], []

    @tf.function(autograph=False)
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            y = sparse_dense(x, kernel, mask)
        return tape.gradient(y, kernel)

    for step in range(6):
        x = normal(draw, 3, 6)
        found = gradient(x)
        assert_close(found, tf.reduce_sum(x, 0)[:, tf.newaxis] * mask)
        if step % 2:
            kept.append(found)
            copies.append(found.numpy().copy())
    for one, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(one, copy)


def test_a_mask_that_stays_is_sorted_once(operations):
    draw = np.random.default_rng(0)
    x, kernel = normal(draw, 5, 6), normal(draw, 6, 4)
    mask = tf.Variable(random_mask(draw, (6, 4), 0.5))

    @tf.function(autograph=False)
    def run(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = sparse_dense(x, kernel, mask.value())
        return y, tape.gradient(y, [x, kernel])

    made = int(operations.rigl_keras_plans_made())
    for _ in range(3):
        run(x, kernel)
    assert int(operations.rigl_keras_plans_made()) == made + 2
    mask.assign(1.0 - mask)
    y, (_, to_kernel) = run(x, kernel)
    assert int(operations.rigl_keras_plans_made()) == made + 4
    assert_close(y, x @ (kernel * mask))
    assert_close(to_kernel, tf.reduce_sum(x, 0)[:, tf.newaxis] * mask)


def test_the_same_twice():
    draw = np.random.default_rng(0)
    x, kernel = normal(draw, 3000, 60), normal(draw, 60, 40)
    mask = random_mask(draw, (60, 40), 0.5)
    found = []
    for _ in range(2):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = sparse_dense(x, kernel, mask)
        found.append([y, *tape.gradient(y, [x, kernel])])
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


def test_shapes_are_known_where_they_are_traced():
    kernel = tf.ones((6, 4))

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, 6])], autograph=False
    )
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = sparse_dense(x, kernel, kernel)
        gradients = tape.gradient(y, [x, kernel])
        assert y.shape.as_list() == [None, None, 4]
        assert gradients[0].shape.as_list() == [None, None, 6]
        assert gradients[1].shape == (6, 4)
        return y

    assert (
        run(tf.ones((2, 3, 6))).numpy().tolist()
        == np.full((2, 3, 4), 6.0).tolist()
    )


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "x, kernel, mask, bias",
    [
        ((5, 7), (6, 4), (6, 4), (4,)),
        ((5, 6), (6, 4), (4, 6), (4,)),
        ((5, 6), (6, 4), (6, 4), (3,)),
        ((5, 6), (6, 4), (6, 4), (4, 1)),
        ((5, 6), (24,), (24,), (4,)),
        ((5, 6), (1, 6, 4), (1, 6, 4), (4,)),
        ((), (6, 4), (6, 4), (4,)),
    ],
)
def test_shapes_that_do_not_fit(x, kernel, mask, bias, traced):
    tensors = [tf.ones(shape) for shape in (x, kernel, mask, bias)]

    def run(x, kernel, mask, bias):
        return sparse_dense(x, kernel, mask, bias=bias)

    if traced:
        run = tf.function(
            run, input_signature=[tf.TensorSpec(None)] * 4, autograph=False
        )
    with pytest.raises(REFUSED):
        run(*tensors)


def test_gradients_that_do_not_fit(operations):
    good = dict(
        x=tf.ones((5, 6)),
        dy=tf.ones((5, 4)),
        kernel=tf.ones((6, 4)),
        mask=tf.ones((6, 4)),
        weights=tf.ones(24),
    )
    how = dict(to_x=True, to_kernel=True, to_bias=True)
    to_x, *_ = operations.rigl_keras_mat_mul_grad(**good, **how)
    assert to_x.numpy().tolist() == np.full((5, 6), 4.0).tolist()
    for name, shape in [
        ("x", (4, 6)),
        ("x", (5, 5)),
        ("dy", (5, 3)),
        ("dy", (20,)),
        ("mask", (4, 6)),
        ("kernel", (6, 5)),
        ("weights", (23,)),
        ("weights", (24, 1)),
        ("weights", (0,)),
    ]:
        with pytest.raises(REFUSED):
            operations.rigl_keras_mat_mul_grad(
                **{**good, name: tf.ones(shape)}, **how
            )


def test_without_a_library(monkeypatch):
    monkeypatch.setattr(library, "_module", None)
    monkeypatch.setattr(library, "_reason", "there is no compiler")
    with pytest.raises(RuntimeError, match="not available: there is no comp"):
        sparse_dense(*by_hand()[:3])


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["avx2", "portable"])
def test_other_instruction_sets(wanted):
    """In a separate process, as the library is chosen once."""
    chosen = [
        "test_by_hand",
        "test_rows_and_densities",
        "test_many_rows",
        "test_few_weights_of_many",
    ]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-n0", __file__),
            *("-k", " or ".join(chosen)),
        ],
        env={**os.environ, "RIGL_KERAS_ISA": wanted},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
