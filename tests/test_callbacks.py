"""Mask updates within `fit`: their steps, their effects, and errors."""

import dataclasses
import functools
import inspect
import warnings

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
from support.small_models import compiled, examples, kernels, masks, small_model

import rigl_keras
from rigl_keras.conventions import ORIGINAL, REPORT, Conventions
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.tracing import gradients_are_dense
from rigl_keras.methods.rigl import SET, SNFS, RigL


class Steps(keras.callbacks.Callback):
    """Records masks, kernels and logs after every step, one in each epoch."""

    def __init__(self):
        super().__init__()
        self.masks, self.kernels, self.logs = [], [], []

    def on_epoch_end(self, epoch, logs=None):
        self.masks.append(masks(self.model))
        self.kernels.append(kernels(self.model))
        self.logs.append(dict(logs))


def step_by_step(model, callbacks, steps=14, **options):
    """Trains with one step in each epoch; returns the record of steps."""
    record = Steps()
    data = tf.data.Dataset.from_tensor_slices(examples(8 * steps)).batch(8)
    model.fit(
        data,
        epochs=steps,
        steps_per_epoch=1,
        shuffle=False,
        callbacks=[*callbacks, record],
        verbose=0,
        **options,
    )
    return record


def changed(one, two):
    return any((one[name] != two[name]).any() for name in one)


def train(model, callbacks, **options):
    return model.fit(
        *examples(),
        batch_size=8,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
        **options,
    )


def two_layers(dropout=0.2):
    """Returns a network that is quick to trace, for tests of every method."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, strides=2, name="conv")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Dropout(dropout, seed=1)(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(10, name="head")(x))


def two_dense_layers():
    inputs = keras.Input((8, 8, 3))
    x = layers.Dense(16, name="hidden")(layers.Flatten()(inputs))
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    return keras.Model(inputs, layers.Dense(10, name="head")(x))


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


def test_logs_reach_history_and_leave_the_bar_of_a_step_alone():
    model = compiled(sparsify(two_layers(), 0.2))
    steps = []
    log = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: steps.append(set(logs))
    )
    history = train(model, [RigL(**WINDOW), log], epochs=2).history
    assert all(logs == {"accuracy", "loss"} for logs in steps)
    ones = sum(mask.sum() for mask in masks(model).values())
    size = sum(mask.size for mask in masks(model).values())
    assert history["density"] == pytest.approx([ones / size] * 2)
    assert len(history["drop_fraction"]) == len(history["grown"]) == 2
    assert history["accuracy"] and history["loss"]


def one_layer(l2=None):
    inputs = keras.Input((6,))
    dense = layers.Dense(4, name="d", kernel_regularizer=l2)
    return keras.Model(inputs, dense(inputs))


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


def trained_in(method, **options):
    keras.utils.set_random_seed(1)
    # Without dropout, whose draws differ under XLA. Only one method has a
    # convolution, which XLA compiles slowly.
    network = two_layers(dropout=0) if method == "RigL" else two_dense_layers()
    model = compiled(sparsify(network, 0.2), **options)
    train(model, DYNAMIC[method](**WINDOW))
    return masks(model)


trained_plainly = functools.cache(trained_in)


@pytest.mark.slow_but(
    "SNFS-{'steps_per_execution': 4}",
    "SNFS-{'run_eagerly': True}",
    "SET-{'jit_compile': True}",
)
@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_execution": 4},
        {"run_eagerly": True},
        {"jit_compile": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", DYNAMIC)
def test_every_way_to_run_gives_the_same_masks(method, options):
    plain, other = trained_plainly(method), trained_in(method, **options)
    agree = [np.mean(plain[name] == other[name]) for name in plain]
    # XLA sums in another order, so that near ties are resolved differently.
    assert min(agree) > (0.95 if "jit_compile" in options else 0.999)


@pytest.mark.slow
def test_three_quarters_of_the_run():
    model = compiled(sparsify(two_layers(), 0.2))
    callback = RigL(frequency=1, decay="constant")
    record = step_by_step(model, [callback], steps=8)
    moving = [
        t for t in range(1, 8) if changed(record.masks[t - 1], record.masks[t])
    ]
    assert moving == [1, 2, 3, 4, 5, 6]  # 0.75 x 8
    # Resumed at epoch 4 of 8: the last update stays that of the whole run.
    model = compiled(sparsify(two_layers(), 0.2), run_eagerly=True)
    train(model, [], epochs=4)
    callback = RigL(frequency=1)
    train(model, [callback], initial_epoch=4, epochs=8)
    assert callback._window["end_step"] == 48  # of 64 steps
    # A second run on trained weights counts steps from its own start.
    callback = RigL(frequency=1)
    train(model, [callback], epochs=2)
    assert callback._window["end_step"] == 64 + 12


# Keras warns when a generator of unknown length ends.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_unknown_length():
    def batches():
        yield from (examples(8) for _ in range(9))

    model = compiled(sparsify(two_layers(), 0.2))
    signature = (
        tf.TensorSpec((8, 8, 8, 3), tf.float32),
        tf.TensorSpec((8,), tf.int64),
    )
    data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    with pytest.raises(ValueError, match="Pass steps_per_epoch.*or end_step"):
        model.fit(data, shuffle=False, callbacks=[RigL()], verbose=0)
    method = RigL(frequency=2, end_step=9)
    model.fit(data, shuffle=False, callbacks=[method], verbose=0)
    assert model.history.history["grown"][-1] > 0


@pytest.mark.slow
def test_a_schedule_that_never_fires_warns():
    """The warning names the line that calls `fit`, above frames of Keras."""
    model = compiled(sparsify(two_layers(), 0.2))
    with pytest.warns(UserWarning, match="plans 0 updates in the 8") as warned:
        train(model, [RigL()])
    (one,) = [w for w in warned if "plans 0" in str(w.message)]
    assert "/tests/" in one.filename
    assert "Lower frequency" in str(one.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, [RigL(frequency=2)])


def test_nan_gradients():
    model = compiled(sparsify(two_layers(), 0.2))
    before = masks(model)
    x, y = examples()
    x[40] = np.nan
    with pytest.raises(ValueError, match="refused the update at step 6.*NaN"):
        model.fit(
            x,
            y,
            batch_size=8,
            shuffle=False,
            verbose=0,
            callbacks=[RigL(frequency=6, end_step=50)],
        )
    assert not changed(before, masks(model))


@pytest.mark.slow
def test_fit_leaves_the_model_as_it_was():
    model = compiled(sparsify(two_layers(), 0.2))
    train(model, [RigL(**WINDOW)])
    assert not hasattr(model.train_step, "mask_update")
    after = masks(model)
    train(model, [], epochs=2)
    assert not changed(after, masks(model))

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, [RigL(frequency=3, end_step=99), Interrupt()])
    # Another method replaces the one that was interrupted.
    train(model, [SET(frequency=2, end_step=99)])
    assert not hasattr(model.train_step, "mask_update")


@pytest.mark.slow_but("SNFS")
@pytest.mark.parametrize("method", NEED_MOMENTUM)
def test_exact_resume(method, tmp_path):
    """With Adam. `test_contract.py` has all methods, with SGD."""

    def model():
        keras.utils.set_random_seed(1)
        dense = one_layer()
        return sparsify(dense, 0.5)

    draw = np.random.default_rng(0)
    x = draw.standard_normal((12, 6)).astype(np.float32)
    y = draw.standard_normal((12, 4)).astype(np.float32)
    options = dict(batch_size=2, shuffle=False, verbose=0)
    callbacks = METHODS[method](frequency=2, end_step=99)
    straight = model()
    straight.compile("adam", "mse", run_eagerly=True)
    straight.fit(x, y, epochs=4, callbacks=callbacks, **options)

    stopped = model()
    stopped.compile("adam", "mse", run_eagerly=True)
    callbacks = METHODS[method](frequency=2, end_step=99)
    stopped.fit(x, y, epochs=2, callbacks=callbacks, **options)
    stopped.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    resumed.run_eagerly = True
    callbacks = METHODS[method](frequency=2, end_step=99)
    resumed.fit(x, y, initial_epoch=2, epochs=4, callbacks=callbacks, **options)
    for old, new in zip(
        straight.get_weights(), resumed.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("method", DYNAMIC)
def test_config_round_trip(method):
    """The config has every argument of the signature."""
    (callback,) = DYNAMIC[method](
        frequency=7,
        drop_fraction=0.2,
        begin_step=5,
        end_step=50,
        decay="polynomial",
        decay_power=2.0,
        gradient_batches=2,
        grow_init="random_normal",
        grow_divisor=10.0,
        seed=3,
        conventions=REPORT,
    )
    config = callback.get_config()
    assert set(config) == set(inspect.signature(type(callback)).parameters)
    assert type(callback)(**config).get_config() == config
    twice = callback.lengthened(2)
    assert twice.get_config() == {**config, "end_step": 100}
    assert type(twice) is type(callback)


def test_frozen_layers_keep_their_masks():
    model = sparsify(small_model(), 0.2)
    model.get_layer("conv2").trainable = False
    before = masks(model)
    compiled(model, run_eagerly=True)
    train(model, [RigL(**WINDOW)])
    after = masks(model)
    assert (before["conv2"] == after["conv2"]).all()
    assert (before["head"] != after["head"]).any()


@pytest.mark.slow
def test_loss_scaling():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(sparsify(two_layers(), 0.2), "sgd")
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.dynamic_scale.assign(16.0)
    before = masks(model)
    train(model, [RigL(**WINDOW)])
    after = masks(model)
    assert changed(before, after)
    for name, mask in after.items():
        assert mask.sum() == before[name].sum()
        assert not kernels(model)[name][mask == 0].any()


def test_every_checkpoint_is_sparse(tmp_path):
    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for name, kernel in kernels(self.model).items():
                assert not kernel[masks(self.model)[name] == 0].any()

    model = compiled(sparsify(two_layers(), 0.2), "adam")
    save = keras.callbacks.ModelCheckpoint(tmp_path / "at{epoch}.keras")
    # The order of callbacks does not matter.
    train(model, [Look(), save, RigL(**WINDOW), Look()], epochs=2)
    for epoch in (1, 2):
        saved = keras.models.load_model(tmp_path / f"at{epoch}.keras")
        for name, kernel in kernels(saved).items():
            assert not kernel[masks(saved)[name] == 0].any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frequency": 0}, "frequency.*at least 1.*frequency=0"),
        ({"frequency": 2.5}, "frequency.*whole numbers"),
        ({"begin_step": -1}, "begin_step.*at least 0"),
        ({"begin_step": 9, "end_step": 5}, "end_step must not come before"),
        ({"end_step": 1.5}, "end_step.*whole numbers"),
        ({"drop_fraction": 1.5}, r"must be in \[0, 1\]"),
        ({"drop_fraction": float("nan")}, r"must be in \[0, 1\]"),
        ({"decay": "cos"}, "decay must be one of"),
        ({"decay_power": 0}, "must be positive"),
        ({"seed": -1}, "seed"),
        ({"conventions": "REPORT"}, "rigl_keras.ORIGINAL"),
        ({"redistribution": "weights"}, "redistribution must be one"),
        ({"gradient_batches": 0}, "gradient_batches.*at least 1"),
        ({"gradient_batches": 4, "frequency": 3}, "at most frequency.*=4"),
        ({"grow_init": "ones"}, "grow_init must be one of.*'ones'"),
        ({"grow_init": "zeros_2"}, "grow_init must be one of"),
        ({"grow_init": "random_normal", "grow_divisor": 0}, "positive number"),
        ({"grow_init": "random_normal_0"}, "positive number"),
        ({"grow_init": "random_normal_2", "grow_divisor": 3}, "two divisors"),
        ({"grow_divisor": 2}, "zeros stay zeros.*grow_divisor=2"),
        ({"grow_init": None}, "grow_init must be one of"),
    ],
)
@pytest.mark.parametrize("method", [RigL, SET, SNFS])
def test_bad_arguments(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_bad_set_ups():
    with pytest.raises(ValueError, match="sparsify"):
        train(compiled(two_layers()), [RigL(**WINDOW)])
    model = compiled(sparsify(two_layers(), 0.2))
    with pytest.raises(ValueError, match="one mask update at a time"):
        train(model, [RigL(**WINDOW), SET(**WINDOW)])


class Interrupt(keras.callbacks.Callback):
    """Raises KeyboardInterrupt after the first step."""

    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


def small_regression(optimizer="sgd", kernel_regularizer=None, **options):
    """Returns a masked two-layer network, run eagerly, and data of 6 steps."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((24, 6)).astype(np.float32)
    y = draw.standard_normal((24, 4)).astype(np.float32)
    inputs = keras.Input((6,))
    x_ = layers.Dense(
        8,
        activation="tanh",
        kernel_regularizer=kernel_regularizer,
        name="hidden",
    )(inputs)
    x_ = layers.BatchNormalization(name="norm")(x_)
    model = sparsify(keras.Model(inputs, layers.Dense(4, name="d")(x_)), 0.5)
    model.compile(optimizer, "mse", run_eagerly=True, **options)
    return model, lambda callbacks, **more: model.fit(
        x,
        y,
        batch_size=4,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
        **more,
    )


EVERY_STEP = dict(frequency=1, end_step=99, decay="constant")


def test_an_interrupted_fit_does_not_reach_the_next():
    model, fit = small_regression()
    with pytest.raises(KeyboardInterrupt):
        fit([RigL(**EVERY_STEP), Interrupt()])
    before = masks(model)
    history = fit([])
    assert not changed(before, masks(model))
    assert history.history.keys() == {"loss"}


@pytest.mark.slow
def test_a_callback_can_be_used_again_after_an_interrupt():
    model, fit = small_regression()
    method = RigL(**EVERY_STEP)
    with pytest.raises(KeyboardInterrupt):
        fit([method, Interrupt()])
    before = masks(model)
    fit([method])
    assert changed(before, masks(model))
    # It also can after its own error, and without any error.
    fit([method])
    assert not hasattr(model.train_step, "mask_update")


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


@pytest.mark.parametrize(
    "options, name",
    [
        ({"drop_fraction": "0.3"}, "drop_fraction"),
        ({"drop_fraction": None}, "drop_fraction"),
        ({"decay_power": "3"}, "decay_power"),
        ({"seed": 2**64}, "seed"),  # too large for a seed
    ],
    ids=str,
)
def test_wrong_types_are_named(options, name):
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        SET(**options)


def test_a_model_that_is_not_compiled():
    model = sparsify(one_layer(), 0.5)
    with pytest.raises(ValueError, match="compile"):
        model.fit(np.ones((2, 6)), np.ones((2, 4)), callbacks=[RigL()])


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


def test_a_loop_that_never_applies_is_refused():
    model = sparsify(one_layer(), 0.5)
    optimizer = keras.optimizers.SGD(0.1)
    step = RigL(end_step=9).wrap(
        lambda x: tf.reduce_sum(model(x)), model=model, optimizer=optimizer
    )
    with pytest.raises(ValueError, match="never calls"):
        tf.function(step)(np.ones((2, 6), np.float32))
    with pytest.raises(ValueError, match="Pass steps_per_epoch to fit, or end"):
        RigL().wrap(lambda x: x, model=model, optimizer=optimizer)


@pytest.mark.slow
def test_a_refused_update_is_told_in_a_loop_of_ones_own():
    model = sparsify(one_layer(), 0.5)
    optimizer, status = keras.optimizers.SGD(0.0), []

    class Looking(RigL):
        def grow_scores(self, layer, gradient, step):
            now = tf.__internal__.autograph.control_status_ctx()
            status.append(now.status.name)
            return super().grow_scores(layer, gradient, step)

    method = Looking(end_step=9, frequency=1)

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)

    step = tf.function(method.wrap(step, model=model, optimizer=optimizer))
    step(np.ones((2, 6), np.float32))
    # AutoGraph converts the user's loop, but not the package.
    assert status == ["DISABLED"]
    step(np.full((2, 6), np.nan, np.float32))
    with pytest.raises(ValueError, match="refused the update at step 1"):
        method.fetch()


def test_when_gradients_are_dense_is_one_of_three():
    class Sometimes(RigL):
        dense_gradients = "sometimes"

    with pytest.raises(ValueError, match="dense_gradients.*'sometimes'"):
        Sometimes().attach(sparsify(two_layers(), 0.2), keras.optimizers.SGD())


def test_gradients_that_are_never_dense():
    """They are zero outside the masks, and nothing can grow by them."""
    seen = []

    class Look(SET):
        def drop_scores(self, layer, gradient, step):
            seen.append((layer.mask.numpy(), gradient.numpy()))
            return super().drop_scores(layer, gradient, step)

    model = compiled(sparsify(two_layers(), 0.2))
    method = Look(frequency=1, end_step=9)
    method.attach(model, model.optimizer)
    variables = model.trainable_variables
    for _ in range(2):
        method.update([tf.ones(v.shape) for v in variables], variables)
    assert len(seen) == 2  # one of each layer
    for mask, gradient in seen:
        assert gradient[mask].all() and not gradient[~mask].any()

    class Grow(rigl_keras.MaskUpdate):
        dense_gradients = "never"

        def grow_scores(self, layer, gradient, step):
            return abs(gradient)

    with pytest.raises(ValueError, match="(?s)Grow has dense_gradients = 'nev"):
        train(model, [Grow(frequency=1, end_step=9)])


def test_nan_scores_are_refused():
    """A custom method may compute NaN from finite gradients and kernels."""

    class Logarithm(rigl_keras.MaskUpdate):
        def grow_scores(self, layer, gradient, step):
            return tf.math.log(gradient)

    model = compiled(sparsify(two_layers(), 0.2))
    before = masks(model)
    with pytest.raises(ValueError, match="at step 3.*a score was NaN"):
        train(model, [Logarithm(frequency=3, end_step=5)])
    assert not changed(before, masks(model))


@pytest.mark.parametrize("method, dense", [(RigL, True), (SET, False)])
def test_a_step_is_traced_once(method, dense):
    """It is traced once as an ordinary step and once as an update, although
    Keras makes metrics during the trace. SET needs no dense gradients."""
    model = compiled(sparsify(two_layers(), 0.2))
    own, traced = model.train_step, []
    model.train_step = lambda data: (
        traced.append(gradients_are_dense()) or own(data)
    )
    history = train(model, [method(**WINDOW)], epochs=2).history
    assert traced == [False, dense]
    assert len(history["accuracy"]) == 2 and history["accuracy"][1] > 0


@pytest.mark.skipif(
    bool(tf.config.list_physical_devices("GPU")), reason="of CPUs"
)
def test_an_update_is_traced_when_it_is_due():
    """The first step does not wait for it."""
    model = compiled(sparsify(two_layers(), 0.2))
    own, traced, each = model.train_step, [], []
    model.train_step = lambda data: traced.append(1) or own(data)
    counting = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: each.append(len(traced))
    )
    method = RigL(frequency=3, end_step=99)
    train(model, [method, counting])
    (first, _), *_ = method.trajectory[1:]
    assert first == 3
    assert each == [1, 1, 1] + [2] * (len(each) - 3) and len(each) > 3


@pytest.mark.slow
def test_a_train_function_that_is_rebuilt_within_fit():
    """Updates continue if it is rebuilt, for instance to freeze layers."""

    class Rebuild(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.make_train_function(force=True)

    model = compiled(sparsify(two_layers(), 0.2))
    method = RigL(frequency=3, end_step=99)
    train(model, [method, Rebuild()], epochs=2)
    assert [step for step, _ in method.trajectory] == [0, 3, 6, 9, 12, 15]
    assert not hasattr(model.train_step, "mask_update")


def test_a_head_without_a_loss():
    inputs = keras.Input((6,))
    heads = [layers.Dense(4, name=name)(inputs) for name in ("a", "b")]
    model = sparsify(keras.Model(inputs, heads), 0.5)
    before = masks(model)
    model.compile(keras.optimizers.SGD(0.1), ["mse", None])
    conventions = Conventions(update_replaces_step=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras's, of missing gradients
        model.fit(
            np.random.default_rng(0).normal(size=(8, 6)),
            [np.ones((8, 4)), np.ones((8, 4))],
            batch_size=2,
            verbose=0,
            callbacks=[RigL(frequency=1, end_step=9, conventions=conventions)],
        )
    after = masks(model)
    assert (before["a"] != after["a"]).any()
    assert (before["b"] == after["b"]).all()


@pytest.mark.slow
def test_averaged_weights_of_snfs_are_sparse():
    model, fit = small_regression(
        keras.optimizers.SGD(0.05, 0.9, use_ema=True, ema_momentum=0.5)
    )
    fit([SNFS(frequency=2, end_step=9)])
    for layer in rigl_keras.masked_layers(model):
        assert not layer.kernel.numpy()[layer.mask.numpy() == 0].any()


def test_a_method_with_arguments_of_its_own_is_lengthened_whole():
    class Warm(RigL):
        def __init__(self, temperature=1.0, **options):
            super().__init__(**options)
            self.temperature = temperature

    warm = Warm(temperature=5.0, end_step=10)
    assert warm.lengthened(2).temperature == 5.0
    assert (warm.end_step, warm.lengthened(2).end_step) == (10, 20)


def test_the_fields_of_a_method_are_its_arguments():
    @dataclasses.dataclass(kw_only=True, eq=False, repr=False)
    class Seldom(RigL):
        frequency: int = 500
        temperature: float = 1.0

    assert list(inspect.signature(Seldom).parameters) == [
        *inspect.signature(RigL).parameters,
        "temperature",
    ]
    seldom = Seldom(temperature=5.0, end_step=10)
    assert seldom.get_config() == {
        **RigL(frequency=500, end_step=10).get_config(),
        "temperature": 5.0,
    }
    assert seldom.lengthened(2).get_config()["temperature"] == 5.0
    with pytest.raises(ValueError, match="frequency.*at least 1"):
        Seldom(frequency=0)
    with pytest.raises(TypeError, match="positional"):
        Seldom(500)


def test_only_what_the_optimizer_trains_is_updated():
    """The wrapped layer may be frozen although its wrapper is not."""
    model = sparsify(small_model(), 0.2)
    frozen = rigl_keras.masked_layers(model)[0]
    frozen.layer.trainable = False
    before = masks(model)
    compiled(model, run_eagerly=True)
    train(model, [SNFS(frequency=2, end_step=9)])
    after = masks(model)
    assert (before[frozen.name] == after[frozen.name]).all()
    assert changed(before, after)
