"""A run of `fit`: its start, its end, what stops it, and its logs.

Networks run eagerly, unless a test is about the graph.
"""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.methods import CORE, METHODS
from support.regressions import (
    At,
    assert_equal,
    equal_masks,
    examples,
    fit,
    momentum,
    network,
    stopped,
    updates,
)
from support.small_models import masks

from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.methods.pruning import MagnitudePruning
from rigl_keras.methods.rigl import SET, SNFS, RigL
from rigl_keras.schedules import SparsityRamp
from rigl_keras.training import fit_runs
from rigl_keras.training.optimizer_state import slots
from rigl_keras.training.train_function import installed_update

# Epochs of 6 steps, with an update at every second one, all of one fraction.
DATA = examples(24)
EVERY_SECOND = dict(frequency=2, end_step=99, decay="constant")


# An interrupted `fit`.


def plain_fit(model):
    fit(model, [], DATA)


def plain_step(model):
    for _ in range(4):
        model.train_step(tuple(tf.constant(part[:4]) for part in DATA))


def plain_function(model):
    function = model.train_function  # of the interrupted run
    for _ in range(4):
        function(iter([tuple(tf.constant(part[:4]) for part in DATA)]))


HOOKS = (
    "on_train_begin",
    "on_epoch_begin",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_begin",
    "on_epoch_end",
)


@pytest.mark.slow_but("on_train_begin", "on_train_batch_end", "on_test_begin")
@pytest.mark.parametrize("hook", HOOKS)
def test_a_fit_that_is_cut_off_anywhere(hook):
    """No mask changes afterwards, even if a traceback keeps all frames."""
    model, method = network(), RigL(**EVERY_SECOND)
    with pytest.raises(KeyboardInterrupt) as info:
        fit(model, [method, At(hook, stopped)], DATA, validation_data=DATA)
    before = masks(model)
    nexts = {
        "on_train_begin": plain_step,
        "on_epoch_begin": plain_function,
        "on_epoch_end": plain_step,
    }
    if hook == "on_train_batch_end":
        assert installed_update(model) is None
    nexts.get(hook, plain_fit)(model)
    assert equal_masks(before, masks(model))
    assert not {"train_step", "make_train_function"} & vars(model).keys()
    assert info.tb is not None
    fit(model, [method], DATA)
    assert not equal_masks(before, masks(model))


def test_what_was_put_back_is_what_was_there():
    """An instance's own train step is restored at once."""
    model = network()
    own, calls = model.train_step, []

    def train_step(data):
        calls.append(1)
        return own(data)

    model.train_step = train_step
    try:
        fit(model, [RigL(**EVERY_SECOND), At("on_epoch_end", stopped)], DATA)
    except KeyboardInterrupt:
        pass
    # The frame of `fit` is not kept alive.
    assert vars(model)["train_step"] is train_step
    assert len(calls) == 6


@pytest.mark.slow
def test_a_callback_of_an_interrupted_fit_leaves_the_first_model():
    one, two = network(), network()
    method = RigL(frequency=1, end_step=99, decay="constant")
    with pytest.raises(KeyboardInterrupt) as info:
        stop = At("on_train_batch_end", stopped, nth=2)
        fit(one, [method, stop], DATA)
    fit(two, [method], DATA)
    rows, before = list(method.trajectory), masks(one)
    assert updates(method) == [1, 2, 3, 4, 5]
    for again in range(2):
        assert equal_masks(before, masks(one)) == (again == 0)
        if again == 0:
            fit(one, [], DATA)
            assert method.trajectory == rows
            assert equal_masks(before, masks(one))
        fit(one, [RigL(**EVERY_SECOND)], DATA)
    assert method.trajectory == rows and info.tb is not None


# The start of a run.


@pytest.mark.parametrize(
    "seen, arguments, want",
    [
        # batches so far, and the start of a run of 10 steps an epoch
        (0, dict(epoch=0), 0),
        (500, dict(epoch=0), 500),  # trained before
        (7, dict(epoch=0), 7),
        (50, dict(epoch=5), 0),  # resumed between epochs
        (53, dict(epoch=5), 0),  # resumed within an epoch
        (59, dict(epoch=5), 0),
        (550, dict(epoch=5), 500),  # the resumed run began at 500
        (0, dict(epoch=5), -50),  # with a new optimizer
        (20, dict(epoch=5), -30),
        (47, dict(epoch=5, skips=True), 0),  # three batches were no steps
        (0, dict(epoch=5, skips=True), -50),
        (500, dict(epoch=0, each=4), 125),
        (550, dict(epoch=5, each=4), 125),
        (50, dict(epoch=5, each=4), 0),
        (500, dict(epoch=0, steps=None), 500),
        (500, dict(epoch=5, steps=None), 0),
    ],
    ids=str,
)
def test_where_a_run_starts(seen, arguments, want):
    usual = dict(each=1, steps=10, skips=False)
    assert fit_runs.start_of(None, seen, **{**usual, **arguments}) == want


def pruning(*, begin_step=1, end_step=3, frequency=1):
    ramp = SparsityRamp(
        final_density=0.2,
        initial_density=0.5,
        begin_step=begin_step,
        end_step=end_step,
        frequency=frequency,
    )
    return MagnitudePruning(ramp)


def window_run(name, **options):
    if name == "MagnitudePruning":
        return pruning(begin_step=2, end_step=6, frequency=2)
    return METHODS[name](frequency=2, drop_fraction=0.4, **options)[0]


class Logs(keras.callbacks.Callback):
    """Records what a method logs after every step."""

    def __init__(self, method):
        super().__init__()
        self.method, self.rows = method, []

    def on_train_batch_end(self, batch, logs=None):
        self.rows.append(self.method.last_logs())


@pytest.mark.slow_but("RigL")
@pytest.mark.parametrize("name", [n for n in CORE if n != "static"])
def test_on_trained_weights_as_on_new_ones(name):
    """Drop fractions and densities are the same at each step of the run."""
    rows, steps = [], []
    for before in (0, 10):
        model = network(momentum())
        fit(model, [], DATA, epochs=5, steps_per_epoch=2) if before else None
        options = {} if name == "MagnitudePruning" else {"begin_step": 2}
        method = window_run(name, **options)
        logs = Logs(method)
        fit(model, [method, logs], DATA, epochs=2)
        rows.append([{**row, "grown": None} for row in logs.rows])
        steps.append([step - before for step in updates(method)])
    assert (
        steps[0]
        == steps[1]
        == ([2, 4, 6] if name == "MagnitudePruning" else [2, 4, 6, 8])
    )
    moves = "density" if name in ("MagnitudePruning",) else "drop_fraction"
    assert [r[moves] for r in rows[0]] == pytest.approx(
        [r[moves] for r in rows[1]]
    )
    # Updates end at 3/4 of 12 steps: a cosine from step 2 to 9.
    if moves == "drop_fraction":
        want = 0.2 * (1 + np.cos(np.pi * (np.array([2, 4, 6, 8]) - 2) / 7))
        got = [rows[1][t]["drop_fraction"] for t in (2, 4, 6, 8)]
        assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.slow
def test_a_run_on_trained_weights_may_begin_with_an_update():
    """Its updates count from its first step, not from step 0."""
    model = network()
    fit(model, [], DATA)  # 6 steps
    method = RigL(frequency=4, begin_step=0, drop_fraction=0.4)
    logs = Logs(method)
    fit(model, [method, logs], DATA, epochs=2)
    assert updates(method) == [6, 10, 14]
    assert logs.rows[0]["drop_fraction"] == pytest.approx(0.4)
    # A third run with the same callback keeps no state of the second.
    fit(model, [method, logs], DATA, epochs=2)
    assert updates(method) == [18, 22, 26]
    later = [row["drop_fraction"] for row in logs.rows[12:]]
    assert later == [row["drop_fraction"] for row in logs.rows[:12]]


def test_what_a_method_remembers_begins_with_the_run():
    model = network()
    method = SET(frequency=2, end_step=9, grow_init="initial_dist")
    fit(model, [method], DATA)
    started = [m.kernel.numpy() for m in masked_layers(model)]
    fit(model, [method], DATA)
    for kept, kernel in zip(method.variables, started, strict=True):
        assert set(kept.numpy()) == set(kernel[kernel != 0])


class RestoredWithin(keras.callbacks.BackupAndRestore):
    """Saves at each step."""

    def __init__(self, path):
        super().__init__(path, save_freq=1, delete_checkpoint=False)


@pytest.mark.slow_but("last")
@pytest.mark.parametrize("first", [True, False], ids=["method first", "last"])
def test_restored_within_the_first_epoch(first, tmp_path):
    """Keras begins the epoch again, and the run is the same."""

    def callbacks(method):
        restore = RestoredWithin(tmp_path)
        return [method, restore] if first else [restore, method]

    with pytest.raises(KeyboardInterrupt):
        stop = At("on_train_batch_begin", stopped, nth=4)
        method = RigL(frequency=4, end_step=99)
        fit(network(), [*callbacks(method), stop], DATA, epochs=2)
    model, method = network(), RigL(frequency=4, end_step=99)
    fit(model, callbacks(method), DATA, epochs=2)
    assert method.run_start == 0
    assert method.trajectory[0][0] == 3 and updates(method) == [4, 8, 12]


@pytest.mark.slow
def test_several_fits_of_one_run():
    """The advice of the warning works; the warning comes once."""
    ends, texts = {}, {}
    for kind in ("one", "advised", "loop"):
        model, texts[kind] = network(momentum()), []
        for epoch in range(1 if kind == "one" else 5):
            epochs = {
                "one": dict(epochs=5),
                "advised": dict(initial_epoch=epoch, epochs=epoch + 1),
                "loop": {},
            }[kind]
            end_step = None if kind == "loop" else 22  # 3/4 of 30
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                method = RigL(frequency=3, end_step=end_step)
                fit(model, [method], DATA, **epochs)
            texts[kind] += [
                (epoch, str(w.message))
                for w in caught
                if "in a row" in str(w.message)
            ]
        ends[kind] = model.get_weights()
    assert_equal(ends["one"], ends["advised"])
    assert texts["one"] == texts["advised"] == []
    ((epoch, text),) = texts["loop"]
    assert epoch == 2
    for word in ("initial_epoch=e, epochs=e + 1", "end_step", "RigL"):
        assert word in text


@pytest.mark.slow
def test_one_epoch_more_without_an_end_step_is_a_loop_too():
    model = network()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for e in range(4):
            method = RigL(frequency=2)
            fit(model, [method], DATA, initial_epoch=e, epochs=e + 1)
    assert ["in a row" in str(w.message) for w in caught].count(True) == 1


def test_a_fit_goes_on_with_what_was_attached():
    """Only the next `fit` continues; the one after it begins a run."""
    model, method = network(), RigL(**EVERY_SECOND)
    fit(model, [], (DATA[0][:12], DATA[1][:12]))  # 3 steps
    method.attach(model, model.optimizer)
    fit(model, [method], DATA)
    assert method.run_start == 0 and updates(method) == [4, 6, 8]
    fit(model, [method], DATA)
    assert method.run_start == 9 and updates(method) == [9, 11, 13]


# Logs.


def density(model):
    found = list(masks(model).values())
    return sum(m.sum() for m in found) / sum(m.size for m in found)


def counts(model):
    return tuple(int(m.sum()) for m in masks(model).values())


@pytest.mark.slow_but(
    "on_epoch_end-1-last",
    "on_epoch_begin-2-method first",
    "on_train_batch_end-8-last",
)
@pytest.mark.parametrize("first", [True, False], ids=["method first", "last"])
@pytest.mark.parametrize(
    "hook, nth",
    [("on_epoch_end", 1), ("on_epoch_begin", 2), ("on_train_batch_end", 8)],
)
def test_logs_follow_weights_that_are_set(hook, nth, first):
    model, method = network(), pruning()
    dense, at_start = model.get_weights(), counts(model)
    back = At(hook, lambda model: model.set_weights(dense), nth)
    callbacks = [method, back] if first else [back, method]
    history = fit(model, callbacks, DATA, epochs=3).history
    assert density(model) == pytest.approx(0.5)
    # The method may see the density before the callback changed it.
    assert history["density"][0] == pytest.approx(
        0.5 if hook == "on_epoch_end" and not first else 0.2, abs=0.01
    )
    assert history["density"][1:] == pytest.approx([0.5, 0.5])
    # A change before step 6 (8) counts like an update at the step before.
    step, last = method.trajectory[-1]
    assert last == at_start
    # A change within an epoch is seen at its end.
    assert step == (11 if hook == "on_train_batch_end" else 5)
    assert updates(method)[:3] == [1, 2, 3]


def test_logs_follow_weights_that_are_loaded(tmp_path):
    """Loading resets the optimizer's steps, so later updates are repeated."""
    model, method = network(), pruning()
    path = tmp_path / "at2.weights.h5"
    save = At("on_train_batch_end", lambda m: m.save_weights(path), nth=2)
    load = At("on_epoch_end", lambda m: m.load_weights(path))
    history = fit(model, [method, save, load], DATA, epochs=2).history
    assert int(model.optimizer.iterations) == 8
    assert updates(method) == [1, 2, 3]
    assert method.trajectory[-1][1] == counts(model)
    assert history["density"] == pytest.approx([0.2, 0.2], abs=0.01)


@pytest.mark.slow_but("last")
@pytest.mark.parametrize("first", [True, False], ids=["method first", "last"])
def test_logs_of_a_run_that_keras_restores(first, tmp_path):
    """The ramp has ended, so no update corrects the logs later."""

    def callbacks(method):
        restore = keras.callbacks.BackupAndRestore(tmp_path)
        return [method, restore] if first else [restore, method]

    stop = At("on_epoch_begin", stopped, nth=2)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), [*callbacks(pruning()), stop], DATA, epochs=3)
    model, method = network(), pruning()
    with pytest.warns(UserWarning, match="plans 0 updates in the 12 steps"):
        history = fit(model, callbacks(method), DATA, epochs=3).history
    assert density(model) == pytest.approx(0.2, abs=0.01)
    assert history["density"] == pytest.approx([density(model)] * 2)
    assert method.trajectory == [(6, counts(model))]


@pytest.mark.parametrize("gradient_batches", [1, 2])
def test_a_backup_by_keras_lacks_what_a_method_remembers(
    gradient_batches, tmp_path
):
    restore = keras.callbacks.BackupAndRestore(tmp_path)
    method = RigL(**EVERY_SECOND, gradient_batches=gradient_batches)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(network(), [method, restore], DATA, epochs=1)
    said = [
        str(w.message) for w in seen if "BackupAndRestore" in str(w.message)
    ]
    assert len(said) == (1 if method.variables else 0) == gradient_batches - 1
    if said:
        assert "variables` of the RigL callback" in said[0]


def test_loggers_that_come_first_see_the_density():
    model, seen = network(), []
    log = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(logs["density"])
    )
    dense = model.get_weights()
    back = At("on_epoch_begin", lambda model: model.set_weights(dense), nth=2)
    fit(model, [log, pruning(), back], DATA, epochs=2)
    assert seen == pytest.approx([0.2, 0.5], abs=0.01)


# Breaks of the code that no test had caught.


def test_an_average_of_what_snfs_has_grown_starts_with_the_weight():
    """SNFS keeps dense momentum, but an average of weights is reset."""
    model = network(momentum(use_ema=True, ema_momentum=0.9))
    states = []

    def look(model):
        states.append(
            {
                m.name: (
                    m.mask.numpy() > 0,
                    m.kernel.numpy(),
                    slots(model.optimizer, m.kernel)["average"].numpy(),
                )
                for m in masked_layers(model)
            }
        )

    looks = [At("on_train_batch_end", look, nth=nth) for nth in (2, 3)]
    method = SNFS(grow_init="random_normal", **EVERY_SECOND)
    fit(model, [method, *looks], DATA)
    before, after = states
    grown_at_all = 0
    for name, (mask, kernel, average) in after.items():
        grown = mask & ~before[name][0]
        grown_at_all += grown.sum()
        assert kernel[grown].all()
        np.testing.assert_array_equal(average[grown], kernel[grown])
        both = mask & before[name][0]
        assert (average[both] != kernel[both]).any()
    assert grown_at_all


def test_a_kernel_that_is_not_finite_is_refused():
    """All gradients are finite, as tanh is flat at infinity."""
    model = network()
    hidden = model.get_layer("hidden")
    where = tuple(np.argwhere(hidden.mask.numpy() > 0)[0])
    kernel = hidden.kernel.numpy()
    kernel[where] = np.inf
    hidden.kernel.assign(kernel)
    before = masks(model)
    x, y = DATA
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    (gradient,) = tape.gradient(loss, [hidden.kernel.value])
    assert np.isfinite(gradient).all()
    with pytest.raises(ValueError, match="step 1: the gradient.*or the kernel"):
        fit(model, [SET(frequency=1, end_step=9)], DATA)
    assert equal_masks(before, masks(model))


@pytest.mark.parametrize("lengths", [(0, 0), (3, 3)])
def test_a_fit_without_an_epoch_changes_nothing(lengths):
    epochs, initial = lengths
    model, method = network(), RigL(**EVERY_SECOND)
    before = masks(model)
    fit(model, [method], DATA, epochs=epochs, initial_epoch=initial)
    assert equal_masks(before, masks(model))
    fit(model, [method], DATA)
    assert not equal_masks(before, masks(model))


def test_a_refused_update_counts_the_steps_before_a_compile():
    """6 steps, a compile, 6 more, and NaN from step 12 on."""
    model = network()

    def begins(epoch, logs=None):
        if epoch == 1:
            model.compile("sgd", "mse")
        if epoch == 2:
            hidden = model.get_layer("hidden")
            kernel = hidden.kernel.numpy()
            kernel[hidden.mask.numpy() > 0] = np.nan
            hidden.kernel.assign(kernel)

    changes = keras.callbacks.LambdaCallback(on_epoch_begin=begins)
    with pytest.raises(ValueError, match="refused the update at step 12:"):
        fit(model, [changes, RigL(**EVERY_SECOND)], DATA, epochs=3)


# What would fail without a word.


class TrainsItself(keras.Model):
    """A model that applies an optimizer which compile does not know."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.own.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def test_an_optimizer_that_takes_no_step():
    model = network(cls=TrainsItself)
    model.own = keras.optimizers.SGD(0.1)
    before = masks(model)
    with pytest.warns(UserWarning, match="'sgd.*took none in this epoch") as w:
        fit(model, [RigL(**EVERY_SECOND)], DATA, epochs=2)
    assert equal_masks(before, masks(model))
    assert len([each for each in w if "took none" in str(each.message)]) == 1


def test_full_masks_cannot_move():
    model = network()
    for layer in masked_layers(model):
        layer.assign_mask(np.ones(layer.mask.shape))
    with pytest.warns(UserWarning, match="can move no .*hidden, d keep all"):
        fit(model, [RigL(**EVERY_SECOND)], DATA)


def test_images_of_all_weights_are_refused(tmp_path):
    board = keras.callbacks.TensorBoard(
        tmp_path, histogram_freq=1, write_images=True
    )
    with pytest.raises(ValueError, match="write_images=False"):
        fit(network(), [board, RigL(**EVERY_SECOND)], DATA)
