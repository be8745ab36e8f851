"""Methods as callbacks of `fit`, and in custom loops."""

import functools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.methods import DYNAMIC, METHODS, NEED_MOMENTUM, WINDOW
from support.small_models import compiled, examples, kernels, masks, small_model
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
from rigl_keras.conventions import Conventions
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.tracing import gradients_are_dense
from rigl_keras.methods.rigl import SET, SNFS, RigL


def two_dense_layers():
    inputs = keras.Input((8, 8, 3))
    x = layers.Dense(16, name="hidden")(layers.Flatten()(inputs))
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    return keras.Model(inputs, layers.Dense(10, name="head")(x))


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


def test_a_model_that_is_not_compiled():
    model = sparsify(one_layer(), 0.5)
    with pytest.raises(ValueError, match="compile"):
        model.fit(np.ones((2, 6)), np.ones((2, 4)), callbacks=[RigL()])


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
