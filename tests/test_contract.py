"""Contracts of every method beyond one training step.

The methods are the rows of `support.methods.METHODS`. Other files test counts,
zeros, resume and config; here are the contracts that outlive a `fit`.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.methods import METHODS, REMEMBER, SCHEDULED
from support.resumed import fit, tiny
from support.small_models import compiled, examples, masks, small_model

from rigl_keras import flops
from rigl_keras.flops.counting import count
from rigl_keras.flops.training import training_flops
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.stripping import strip

# These run in graphs, the others eagerly: methods without memory, with the
# optimizer's memory, and with memory of their own.
IN_GRAPHS = ("RigL-SM", "RigL-SG", "MagnitudePruning", "TopKAST")


def eager(method):
    return method not in IN_GRAPHS


def state(model):
    return [v.numpy() for v in (*model.variables, *model.optimizer.variables)]


def assert_equal(one, two):
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(ours, theirs)


WINDOW = dict(frequency=2, end_step=9)


class Save(keras.callbacks.Callback):
    """Saves the model, weights and the state of a method after 5 steps."""

    def __init__(self, folder, method):
        super().__init__()
        self.folder, self.method = folder, method

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            assert int(self.model.optimizer.iterations.numpy()) == 5
            self.model.save(self.folder / "model.keras")
            self.model.save_weights(self.folder / "at5.weights.h5")
            np.savez(self.folder / "method.npz", *remembered(self.method))


@pytest.fixture(scope="module", params=METHODS)
def run_and_saved(request, tmp_path_factory):
    """The method's name, its state after 10 steps, and files saved after 5."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny(run_eagerly=eager(request.param))
    start = masks(model)
    callbacks = METHODS[request.param](**WINDOW)
    fit(model, [*callbacks, Save(folder, callbacks)], 2)
    moved = any((m != start[n]).any() for n, m in masks(model).items())
    assert moved == (request.param != "static")
    assert bool(remembered(callbacks)) == (request.param in REMEMBER)
    return request.param, state(model), folder


@pytest.fixture(scope="module")
def whole_run(run_and_saved):
    return run_and_saved[:2]


@pytest.fixture(scope="module")
def saved(run_and_saved):
    return run_and_saved[2]


def remembered(callbacks):
    return [v.numpy() for c in callbacks for v in c.variables]


def resumed(callbacks, model, values):
    """Restores the saved state of callbacks; returns them."""
    for callback in callbacks:
        callback.attach(model, model.optimizer)
    variables = [v for c in callbacks for v in c.variables]
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return callbacks


def values_of(folder):
    with np.load(folder / "method.npz") as file:
        return [file[f"arr_{i}"] for i in range(len(file.files))]


@pytest.mark.slow_but("RigL-SM")
def test_saved_in_the_middle_ends_the_same(whole_run, saved):
    method, want = whole_run
    loaded = keras.models.load_model(saved / "model.keras")
    loaded.run_eagerly = eager(method)
    callbacks = METHODS[method](**WINDOW)
    if method in REMEMBER:
        callbacks = resumed(callbacks, loaded, values_of(saved))
    fit(loaded, callbacks, 2, initial_epoch=1)
    assert_equal(state(loaded), want)


@pytest.mark.slow_but("RigL-SM")
def test_weights_alone_are_a_checkpoint(whole_run, saved):
    """The file replaces the masks of the model that loads it."""
    method, want = whole_run
    other = tiny()
    other.run_eagerly = True  # no graph with the old weights
    fit(other, METHODS[method](frequency=1, end_step=9), 1)
    other.run_eagerly = eager(method)
    other.make_train_function(force=True)
    other.load_weights(saved / "at5.weights.h5")
    callbacks = METHODS[method](**WINDOW)
    if method in REMEMBER:
        callbacks = resumed(callbacks, other, values_of(saved))
    fit(other, callbacks, 2, initial_epoch=1)
    assert_equal(state(other), want)


@pytest.mark.slow_but("RigL-SM")
@pytest.mark.parametrize(
    "run_and_saved", ["SET", "RigL-SM", "MagnitudePruning"], indirect=True
)
def test_interrupted_and_restored_by_keras(whole_run, tmp_path):
    """Keras's `BackupAndRestore` resumes from weights, as above."""
    method, want = whole_run

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def callbacks():
        restore = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        return [restore, *METHODS[method](**WINDOW)]

    how = {"run_eagerly": eager(method)}
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(**how), [*callbacks(), Stop()], 2)
    model = tiny(**how)
    fit(model, callbacks(), 2)
    assert_equal(state(model), want)


@pytest.fixture(scope="module", params=METHODS)
def trained(request):
    """A method, its callbacks, a model after 4 steps, and its first masks."""
    model = sparsify(small_model(), 0.2, seed=4)
    compiled(model, run_eagerly=eager(request.param))
    first = masks(model)
    callbacks = METHODS[request.param](**WINDOW)
    model.fit(
        *examples(),
        batch_size=16,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )
    return request.param, callbacks, model, first


@pytest.mark.slow_but("RigL-SG")
def test_trained_then_stripped_then_masked_again(trained):
    """Masks depend on the seed and not on the weights."""
    method, _, model, first = trained
    cost = count(model)
    plain = strip(model)
    x, _ = examples(4, seed=9)
    np.testing.assert_array_equal(
        plain(x, training=False), model(x, training=False)
    )
    # The kept weights are the trained ones.
    if method not in SCHEDULED:
        assert cost.nonzeros == count(sparsify(plain, 0.2, seed=4)).nonzeros
    again = masks(sparsify(plain, 0.2, seed=4))
    assert again.keys() == first.keys()
    for name, mask in first.items():
        np.testing.assert_array_equal(again[name], mask)


@pytest.mark.slow_but("RigL-SM")
def test_a_loop_of_ones_own(whole_run):
    """A custom loop with `wrap` in a `tf.function` gives the same as `fit`."""
    method, want = whole_run
    model = tiny()
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    loss = keras.losses.MeanSquaredError()

    def train_step(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        variables = model.trainable_variables
        gradients = tape.gradient(value, variables)
        optimizer.apply(gradients, variables)
        if value < 0:  # AutoGraph converts this
            value = -value
        return value

    callbacks = METHODS[method](**WINDOW)
    for callback in callbacks:
        train_step = callback.wrap(train_step, model=model, optimizer=optimizer)
    train_step = tf.function(train_step)
    draw = np.random.default_rng(0)
    x = draw.standard_normal((20, 6)).astype(np.float32)
    y = draw.standard_normal((20, 3)).astype(np.float32)
    for start in 2 * list(range(0, 20, 4)):
        value = train_step(x[start : start + 4], y[start : start + 4])
    assert np.isfinite(value)
    for callback in callbacks:
        callback.fetch()
        steps = [step for step, _ in callback.trajectory]
        due = [t for t in range(1, 10) if callback.is_due(t)]
        assert steps == [0, *due]
    for ours, theirs in zip(model.variables, want, strict=False):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-6)


ALWAYS_DENSE = ("SNFS", "TopKAST", "SRSTE")


@pytest.mark.slow_but("RigL-SG")
def test_what_training_costs(trained):
    """The closed form and the cost from the masks agree with a hand count."""
    method, callbacks, model, first = trained
    start = {name: int(mask.sum()) for name, mask in first.items()}
    cost = count(model)
    dense = cost.dense_inference_flops
    trajectory, needs = [(0, start)], "never"
    for callback in callbacks:
        assert (callback.dense_gradients == "always") == (
            method in ALWAYS_DENSE
        )
        needs = callback.dense_gradients
        trajectory += [
            (step, dict(zip(start, counts, strict=True)))
            for step, counts in callback.trajectory[1:]
        ]
        assert tuple(start.values()) == callback.trajectory[0][1]
    assert [step for step, _ in trajectory[1:]] == {
        "static": [],
        "MagnitudePruning": [1, 3],
        "TopKAST": [1, 3],
        "SRSTE": [1, 3],
    }.get(method, [2])
    inference, training = flops.training_curve(
        cost, trajectory, steps=4, dense_gradients=needs
    )
    if trajectory[-1][0] < 3:  # the masks of the last step are the last
        assert inference[-1] == pytest.approx(cost.inference_flops)
    for step, (forward, whole) in enumerate(
        zip(inference, training, strict=True)
    ):
        expensive = method in ALWAYS_DENSE or (needs == "updates" and step == 2)
        assert whole == (2 * forward + dense if expensive else 3 * forward)
    kinds = [type(c).__name__ for c in callbacks] or ["static"]
    closed = training_flops(
        kinds[0],
        sparse_flops=np.mean(inference),
        dense_flops=dense,
        frequency=2,
    )
    mean = np.mean(training)
    if method in ("static", "SET", "MEST", "ACDC", *ALWAYS_DENSE):
        assert closed == pytest.approx(mean)
    elif method == "MagnitudePruning":  # the closed form has a dense backward
        assert closed == pytest.approx(mean + dense - np.mean(inference))
    else:  # an update for every two other steps instead of four
        assert mean < closed < dense * 3
