"""Mask updates within `fit`: their steps, and what they change."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.matrices import in_turn
from support.methods import (
    CONSTANT,
    DYNAMIC,
    METHODS,
    NEED_MOMENTUM,
    NEWER,
    SCHEDULED,
    WINDOW,
)
from support.small_models import compiled, kernels, masks, small_model
from support.updates import (
    EVERY_STEP,
    changed,
    one_layer,
    small_regression,
    step_by_step,
    train,
    two_layers,
)

import rigl_keras
from rigl_keras.conventions import ORIGINAL, REPORT, Conventions
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.methods.rigl import SET, RigL

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05),
    "nesterov": lambda: keras.optimizers.SGD(0.05, 0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
}
if keras.version() >= "3.13":  # before, Muon failed on TensorFlow
    # Its step mixes the entries of a kernel, so that zeros move too.
    OPTIMIZERS["muon"] = lambda: keras.optimizers.Muon(0.01)


# Each method with each optimizer. Of the pairs that `test_what_an_update_moves`
# below also has, only one for each method.
PAIRS = [
    (method, optimizer)
    for i, method in enumerate(METHODS)
    for j, optimizer in enumerate(OPTIMIZERS)
    if method not in (*DYNAMIC, *NEWER)
    or optimizer not in ("adam", "adamw")
    or (i - j) % len(OPTIMIZERS) == 0
]


# Each method and each optimizer runs in a graph once; other pairs run eagerly.
IN_GRAPHS = in_turn(METHODS, OPTIMIZERS)


@pytest.mark.slow_but(*IN_GRAPHS)
@pytest.mark.parametrize("method, optimizer", PAIRS)
def test_counts_and_zeros(method, optimizer):
    """Counts are constant by layer, constant in total, or as scheduled."""
    model = sparsify(two_layers(), 0.2)
    before = masks(model)
    eager = f"{method}-{optimizer}" not in IN_GRAPHS
    steps = 8 if eager else 14
    compiled(model, OPTIMIZERS[optimizer](), run_eagerly=eager)
    # A constant fraction, as the last update of a cosine drops nothing.
    callbacks = METHODS[method](**WINDOW, decay="constant")
    if method in NEED_MOMENTUM and optimizer == "sgd":
        with pytest.raises(ValueError, match="SGD keeps no momentum"):
            step_by_step(model, callbacks, steps=1)
        return
    record = step_by_step(model, callbacks, steps)
    assert changed(before, masks(model)) == (method != "static")
    size = sum(mask.size for mask in before.values())
    ones = sum(mask.sum() for mask in before.values())
    for step, now in enumerate(record.masks):
        if method == "MagnitudePruning":
            due, sparsity = callbacks[0].schedule(step)
            ones = round((1 - float(sparsity)) * size) if due else ones
        if method not in SCHEDULED or method == "MagnitudePruning":
            assert sum(mask.sum() for mask in now.values()) == ones
        for name, mask in now.items():
            if method in CONSTANT:
                assert mask.sum() == before[name].sum()
            assert set(np.unique(mask)) <= {0, 1}
            assert not record.kernels[step][name][mask == 0].any()
    if method in ("RigL-SG", "RigL-SM", "SNFS"):  # density does move
        assert any(now[n].sum() != before[n].sum() for n in now)
    if method in DYNAMIC:
        assert_updates(model, before, record, range(3, steps, 3))


@pytest.mark.slow_but("SET")
@pytest.mark.parametrize("method", DYNAMIC)
def test_updates_of_the_report_come_a_step_earlier(method):
    eager, steps = (False, 14) if method == "SET" else (True, 7)
    model = compiled(sparsify(two_layers(), 0.2), run_eagerly=eager)
    before = masks(model)
    callbacks = DYNAMIC[method](**WINDOW, decay="constant", conventions=REPORT)
    record = step_by_step(model, callbacks, steps)
    assert_updates(model, before, record, range(2, steps - 1, 3))


def assert_updates(model, before, record, steps):
    """Checks that masks change only in some steps, as the logs say."""
    history = [before, *record.masks]
    taken = len(record.masks)
    at = [t for t in range(taken) if changed(history[t], history[t + 1])]
    assert at == list(steps)
    assert int(model.optimizer.iterations.numpy()) == taken
    for t, logs in enumerate(record.logs):
        assert logs["drop_fraction"] == pytest.approx(
            0.4 if t >= steps[0] else 0.0
        )
        assert (logs["grown"] > 0) == (t >= steps[0])


def first_update(model, method, x, y):
    """Trains one step and then one update on the same batch."""
    data = tf.data.Dataset.from_tensors((x, y)).repeat(2)
    model.fit(data, shuffle=False, callbacks=[method], verbose=0)


@pytest.mark.parametrize("l2", [None, keras.regularizers.L2(3.0)])
def test_rigl_by_hand(l2):
    """An update replaces the step and follows the dense gradient alone."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((5, 6)).astype(np.float32)
    y = draw.standard_normal((5, 4)).astype(np.float32)
    # 12 of 24; the second model stops where the first one updates.
    model, twin = (sparsify(one_layer(l2), 0.5, seed=3) for _ in range(2))
    twin.set_weights(model.get_weights())
    for m, eager in ((model, l2 is not None), (twin, True)):
        sgd = keras.optimizers.SGD(0.05, momentum=0.9)
        m.compile(sgd, "mse", run_eagerly=eager)
    first_update(
        model,
        RigL(frequency=1, drop_fraction=0.5, end_step=9, decay="constant"),
        x,
        y,
    )
    twin.fit(x, y, verbose=0)
    kernel, mask = kernels(twin)["d"], masks(twin)["d"]
    bias = twin.get_layer("d").layer.bias.numpy()
    residual = x @ kernel + bias - y
    gradient = 2 * x.T @ residual / residual.size

    active = np.flatnonzero(mask)
    by_magnitude = active[np.argsort(np.abs(kernel).ravel()[active])]
    dropped, kept = by_magnitude[:6], by_magnitude[6:]
    off = np.setdiff1d(np.arange(24), kept)
    grown = off[np.argsort(-np.abs(gradient).ravel()[off])[:6]]
    want = np.zeros(24)
    want[kept] = want[grown] = 1
    np.testing.assert_array_equal(masks(model)["d"].ravel(), want)

    # Kept and regrown weights do not change, nor do biases; the rest is 0.
    still = np.union1d(kept, np.intersect1d(dropped, grown))
    assert len(still) < 12  # at least one new connection was grown
    wanted = np.zeros(24, np.float32)
    wanted[still] = kernel.ravel()[still]
    np.testing.assert_allclose(
        kernels(model)["d"].ravel(), wanted, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(model.get_layer("d").layer.bias, bias, 1e-5)
    # The same for momentum, which starts again for a grown connection.
    momentum, theirs = (
        rigl_keras.training.optimizer_state.slots(
            m.optimizer, m.get_layer("d").kernel
        )["momentum"].numpy()
        for m in (model, twin)
    )
    wanted = np.zeros(24, np.float32)
    wanted[still] = theirs.ravel()[still]
    np.testing.assert_allclose(momentum.ravel(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_set_repeats_with_its_seed():
    def trained(**options):
        keras.utils.set_random_seed(1)
        model = compiled(sparsify(two_layers(), 0.2), run_eagerly=True)
        train(model, [SET(**WINDOW, **options)])
        return masks(model)

    first, again, other = trained(), trained(), trained(seed=1)
    assert not changed(first, again)
    assert changed(first, other)
    report = trained(conventions=REPORT)
    assert sum(m.sum() for m in report.values()) != sum(
        m.sum() for m in first.values()
    )


def test_how_many_join_is_binomial_where_that_is_the_convention():
    """Each of four inactive connections joins with probability 1/2."""
    (layer,) = rigl_keras.masked_layers(sparsify(one_layer(), 22 / 24))
    assert layer.mask.numpy().sum() == 22
    method, dropped = SET(conventions=REPORT), tf.constant(2)
    grown = [
        int(method.grow_count(layer, dropped, tf.constant(step, tf.int64)))
        for step in range(200)
    ]
    assert set(grown) == {0, 1, 2, 3, 4}
    assert np.mean(grown) == pytest.approx(2, abs=0.3)
    assert np.var(grown) == pytest.approx(1, abs=0.3)
    assert int(SET().grow_count(layer, dropped, tf.constant(1))) == 2


def test_step_before_update():
    """The TF1 code's SET takes the optimizer step, then changes masks."""
    conventions = Conventions(update_replaces_step=False)
    record = step_by_step(
        compiled(sparsify(two_layers(), 0.2), run_eagerly=True),
        [SET(**WINDOW, conventions=conventions)],
        steps=4,
    )
    before, after = record.kernels[2]["head"], record.kernels[3]["head"]
    both = (before != 0) & (after != 0)
    assert both.any() and (before[both] != after[both]).all()


class Look(keras.callbacks.Callback):
    """Records variables and optimizer state before and after each step."""

    def __init__(self):
        super().__init__()
        self.states = []

    def on_train_begin(self, logs=None):
        self.on_train_batch_end(-1)

    def on_train_batch_end(self, batch, logs=None):
        model = self.model
        slots = {}
        if model.optimizer.built:
            for layer in rigl_keras.masked_layers(model):
                found = rigl_keras.training.optimizer_state.slots(
                    model.optimizer, layer.kernel
                )
                slots[layer.name] = {n: s.numpy() for n, s in found.items()}
        self.states.append(
            {
                "step": int(model.optimizer.iterations.numpy()),
                "masks": masks(model),
                "kernels": kernels(model),
                "slots": slots,
                "others": [
                    v.numpy()
                    for v in model.trainable_variables
                    if v.name != "kernel"
                ],
            }
        )


# Each method with each optimizer, and each of them with both conventions.
EVERY_PAIR = [
    (optimizer, method, ("ORIGINAL", "REPORT")[(i + j) % 2])
    for i, optimizer in enumerate(("nesterov", "adam", "adamw"))
    for j, method in enumerate(DYNAMIC)
]


@pytest.mark.slow_but(
    "nesterov-RigL-ORIGINAL",
    "adam-RigL-REPORT",
    "adam-SET-ORIGINAL",
    "adamw-SNFS-ORIGINAL",
    "nesterov-RigL-SG-REPORT",
    "adam-RigL-SM-REPORT",
)
@pytest.mark.parametrize("optimizer, method, conventions", EVERY_PAIR)
def test_what_an_update_moves(optimizer, method, conventions):
    """It changes only masks, dropped and grown weights, and their state."""
    conventions = {"ORIGINAL": ORIGINAL, "REPORT": REPORT}[conventions]
    model, fit = small_regression(OPTIMIZERS[optimizer]())
    look = Look()
    ahead = 0 if conventions is ORIGINAL else 1
    options = dict(frequency=2, drop_fraction=0.9, end_step=99)
    fit([*DYNAMIC[method](**options, conventions=conventions), look])
    states = look.states
    assert [state["step"] for state in states] == list(range(7))
    rejoined_at_all = grown_at_all = False
    for before, after in zip(states, states[1:], strict=False):
        step = before["step"]
        still = all(
            (one == two).all()
            for one, two in zip(before["others"], after["others"], strict=True)
        )
        update = step > 0 and (step + ahead) % 2 == 0
        assert still == update  # biases, gamma and beta
        if not update:
            continue
        for name, mask in before["masks"].items():
            new = after["masks"][name]
            old_kernel, kernel = before["kernels"][name], after["kernels"][name]
            both = (mask == 1) & (new == 1)
            anew = (mask == 0) & (new == 1)
            grown_at_all |= bool(anew.any())
            if method in ("RigL", "SET"):  # each layer keeps its count
                assert anew.any()
            assert not kernel[~both].any()
            if conventions is ORIGINAL or method == "SNFS":
                np.testing.assert_array_equal(kernel[both], old_kernel[both])
                n = int(mask.sum())
                rejoined_at_all |= both.sum() > n - int(0.9 * n)
            else:  # a regrown connection starts at zero
                moved = both & (kernel != old_kernel)
                assert not kernel[moved].any()
                rejoined_at_all |= bool(moved.any())
            assert before["slots"][name]
            for slot, memory in after["slots"][name].items():
                if method == "SNFS":  # its momentum is dense
                    both = np.ones_like(both)
                    assert memory[new == 0].any()
                assert not memory[~both].any()
                np.testing.assert_array_equal(
                    memory[both], before["slots"][name][slot][both]
                )
    assert rejoined_at_all and grown_at_all


@pytest.mark.parametrize(
    "decay, fraction",
    [
        ("cosine", lambda x: 0.2 * (1 + np.cos(np.pi * x))),
        ("constant", lambda x: 0.4),
        ("linear", lambda x: 0.4 * (1 - x)),
        ("polynomial", lambda x: 0.4 * (1 - x) ** 2),
    ],
)
def test_decay_of_the_drop_fraction(decay, fraction):
    _, fit = small_regression()
    rows = []
    log = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: rows.append(method.last_logs())
    )
    method = RigL(
        frequency=2,
        begin_step=2,
        end_step=10,
        drop_fraction=0.4,
        decay=decay,
        decay_power=2.0,
    )
    fit([method, log], epochs=2)
    for step, logs in enumerate(rows):
        last = min(step - step % 2, 10)  # the update that the logs show
        want = fraction((last - 2) / 8) if last else 0.0
        assert logs["drop_fraction"] == pytest.approx(want, abs=1e-6)
        if want == 0:
            assert logs["grown"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True, "ema_momentum": 0.5},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
        {"clipnorm": 0.01},
        {"weight_decay": 0.5},
    ],
    ids=str,
)
def test_zeros_under_each_option_of_an_optimizer(options):
    model, fit = small_regression(keras.optimizers.SGD(0.1, 0.9, **options))
    before = masks(model)
    # At the end of `fit`, averages replace the weights.
    fit([RigL(**{**EVERY_STEP, "frequency": 2})])
    assert changed(before, masks(model))
    for name, mask in masks(model).items():
        assert not kernels(model)[name][mask == 0].any()


def test_clipping_does_not_reach_growth():
    """The clip belongs to the optimizer step, which an update replaces."""
    after = []
    for clip in (None, 1e-9):
        keras.utils.set_random_seed(0)
        optimizer = keras.optimizers.SGD(0.0, clipvalue=clip)
        model, fit = small_regression(optimizer)
        fit([RigL(**EVERY_STEP)])
        after.append(masks(model))
    assert not changed(*after)


def test_a_penalty_of_zero():
    model, fit = small_regression(
        kernel_regularizer=keras.regularizers.L1L2(0.0, 0.0)
    )
    before = masks(model)
    fit([RigL(**EVERY_STEP)])
    assert changed(before, masks(model))


@pytest.mark.parametrize("method", DYNAMIC)
def test_growth_takes_inactive_entries_only(method):
    _, fit = small_regression(OPTIMIZERS["nesterov"]())
    look = Look()
    fit([*DYNAMIC[method](**EVERY_STEP), look])
    moved = False
    for before, after in zip(look.states[1:], look.states[2:], strict=False):
        for name, mask in before["masks"].items():
            # At most 0.3 of the ones are dropped; all others stay.
            stayed = int((mask * after["masks"][name]).sum())
            ones = int(mask.sum())
            assert ones - int(0.3 * ones) <= stayed <= ones
            moved |= stayed < ones
    assert moved


@pytest.mark.slow_but("RigL")
@pytest.mark.parametrize("method", ["RigL", "SET", "MagnitudePruning"])
def test_whole_kernels_move(method):
    """Kernels are dropped and grown whole, and counts do not change."""
    model = sparsify(small_model(), 0.5, granularity="kernel")
    before = masks(model)
    compiled(model, run_eagerly=method != "RigL")
    record = step_by_step(model, METHODS[method](**WINDOW))
    assert changed(before, masks(model))
    for step, now in enumerate(record.masks):
        for name, mask in now.items():
            if mask.ndim == 4:
                assert (mask == mask[:1, :1]).all()
            if method != "MagnitudePruning":
                assert mask.sum() == before[name].sum()
            assert not record.kernels[step][name][mask == 0].any()


def test_kernels_are_ranked_by_their_mean():
    """Kernels that differ in one weight, by hand."""
    inputs = keras.Input((3, 2))
    conv = layers.Conv1D(2, 3, name="conv", use_bias=False)
    model = keras.Model(inputs, conv(inputs))
    model = rigl_keras.with_masks(
        model,
        {"conv": np.broadcast_to([[1.0, 1.0], [1.0, 0.0]], (3, 2, 2))},
        granularity="kernel",
    )
    layer = model.get_layer("conv")
    # Mean magnitudes 2, 3 and 1 of the kernels that are on.
    kernel = np.zeros((3, 2, 2))
    kernel[:, 0, 0], kernel[:, 0, 1] = [6, 0, 0], [-3, 3, 3]
    kernel[:, 1, 0] = [-1, -1, 1]
    layer.kernel.assign(kernel)
    x = np.array([[[1, 0], [1, 1], [1, 9]]], np.float32)
    model.compile(keras.optimizers.SGD(0.0), "mae")
    data = tf.data.Dataset.from_tensors((x, np.full((1, 1, 2), 99.0))).repeat(2)
    method = RigL(frequency=1, drop_fraction=0.34, end_step=9, decay="constant")
    model.fit(data, shuffle=False, callbacks=[method], verbose=0)
    # The kernel of mean 1 is dropped. Both inactive kernels then have the
    # gradients of input 1, so the first of them grows: the dropped one.
    assert layer.mask.numpy()[0].tolist() == [[1, 1], [1, 0]]
    assert layer.kernel.numpy()[:, 1, 0].tolist() == [-1, -1, 1]


@pytest.mark.parametrize("method", ["SNFS", "RigL-SG", "RigL-SM"])
def test_redistribution_needs_single_weights(method):
    model = compiled(sparsify(small_model(), 0.5, granularity="kernel"))
    with pytest.raises(ValueError, match="moves single weights.*'conv1'"):
        train(model, METHODS[method](**WINDOW))


def test_density_moves_to_where_gradients_are():
    """RigL-SG's counts follow from the gradients of a batch, by hand."""
    inputs = keras.Input((6,))
    outputs = [
        layers.Dense(4, name=n, use_bias=False)(inputs) for n in ("a", "b")
    ]
    model = sparsify(keras.Model(inputs, outputs), 0.5, distribution="er")
    draw = np.random.default_rng(0)
    x = draw.standard_normal((5, 6)).astype(np.float32)
    # Targets of the second layer are large, and so are its gradients.
    y = [draw.standard_normal((5, 4)), 9 * draw.standard_normal((5, 4))]
    gradients = {}
    for target, name in zip(y, "ab", strict=True):
        layer = model.get_layer(name)
        residual = x @ layer.kernel.numpy() - target
        gradients[name] = np.abs(2 * x.T @ residual / residual.size)
    model.compile(keras.optimizers.SGD(0.0), ["mse", "mse"])
    before = masks(model)
    means = [gradients[n][before[n] == 1].mean() for n in "ab"]
    data = tf.data.Dataset.from_tensors((x, tuple(y))).repeat(2)
    method = RigL(
        frequency=1,
        drop_fraction=0.5,
        end_step=9,
        decay="constant",
        redistribution="gradient",
    )
    model.fit(data, shuffle=False, callbacks=[method], verbose=0)
    grown = 12 * np.array(means) / sum(means)  # each layer drops 6 of 12
    after = masks(model)
    assert after["a"].sum() == 6 + np.round(grown[0]) < before["a"].sum()
    assert after["b"].sum() == 6 + np.round(grown[1]) > before["b"].sum()
