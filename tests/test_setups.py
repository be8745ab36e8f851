"""Training set-ups: each keeps masks exact, and grows by the right gradient.

The methods are the rows of `support.methods.METHODS`. Networks run eagerly,
unless a test is about the graph.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.methods import METHODS
from support.regressions import (
    Applies,
    assert_equal,
    assert_sparse,
    equal_masks,
    examples,
    fit,
    momentum,
    network,
)
from support.small_models import kernels, masks

import rigl_keras
from rigl_keras.conventions import REPORT, Conventions
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.tracing import dense_gradients
from rigl_keras.methods.pruning import MagnitudePruning
from rigl_keras.methods.rigl import SET, SNFS, RigL
from rigl_keras.schedules import SparsityRamp
from rigl_keras.training.optimizer_state import slots

every_method = pytest.mark.parametrize("method", METHODS)
EVERY_STEP = dict(frequency=1, end_step=99, decay="constant")
STEP_FIRST = Conventions(update_replaces_step=False)


def assert_close(one, two):
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


class Sparse(keras.callbacks.Callback):
    """Checks zeros in every hook of a callback."""

    def __init__(self):
        super().__init__()
        for name, hook in inspect.getmembers(keras.callbacks.Callback):
            if name.startswith("on_") and callable(hook):
                setattr(self, name, self.look)

    def look(self, *args, **kwargs):
        if self.model.optimizer.built:
            assert_sparse(self.model)


# Gradient accumulation.


@pytest.mark.slow_but("RigL-instead", "SNFS-after")
@pytest.mark.parametrize(
    "conventions", [rigl_keras.ORIGINAL, STEP_FIRST], ids=["instead", "after"]
)
@every_method
def test_accumulated_steps_are_those_of_a_larger_batch(method, conventions):
    """Three micro-batches of 4 give the masks and weights of a batch of 12."""
    states = []
    for size, steps in ((12, None), (4, 3)):
        model = network(
            momentum(gradient_accumulation_steps=steps),
            l2=keras.regularizers.L2(0.01),
        )
        start = masks(model)
        window = dict(frequency=2, end_step=3, decay="constant")
        if method == "MagnitudePruning":
            ramp = SparsityRamp(
                final_density=0.2,
                initial_density=0.5,
                begin_step=1,
                end_step=3,
                frequency=1,
            )
            callbacks = [MagnitudePruning(ramp, conventions=conventions)]
        else:
            callbacks = METHODS[method](**window)
            for callback in callbacks:
                callback.conventions = conventions
        fit(model, callbacks, batch_size=size)
        assert int(model.optimizer.iterations) == 4
        assert equal_masks(start, masks(model)) == (method == "static")
        states.append((masks(model), model.get_weights(), callbacks))
    assert equal_masks(states[0][0], states[1][0])
    assert_close(states[0][1], states[1][1])
    for one, two in zip(states[0][2], states[1][2], strict=True):
        assert one.trajectory == two.trajectory


def test_an_update_of_accumulated_gradients_moves_no_weight():
    model = network(momentum(gradient_accumulation_steps=2))
    biases = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: biases.append(
            model.get_layer("d").get_weights()[-2]
        )
    )
    fit(model, [RigL(frequency=3, end_step=3), look])
    moved = [(a != b).any() for a, b in zip(biases, biases[1:], strict=False)]
    # Step 3 has batches 6 and 7, so steps end with odd batches.
    assert [i + 1 for i, m in enumerate(moved) if m] == [1, 3, 5, 9, 11]
    accumulators = [
        slots(model.optimizer, m.kernel)["gradient_accumulator"].numpy()
        for m in masked_layers(model)
    ]
    assert not any(a.any() for a in accumulators)


def test_accumulation_in_a_graph_and_three_quarters_of_its_steps():
    after = []
    for options in ({}, {"run_eagerly": False}):
        model = network(momentum(gradient_accumulation_steps=2), **options)
        method = RigL(frequency=1, decay="constant")
        fit(model, [method], epochs=2)
        # 12 steps in 24 batches, so updates end with step 9.
        assert [step for step, _ in method.trajectory] == list(range(10))
        after.append(masks(model))
    assert equal_masks(*after)


@pytest.mark.slow
def test_accumulation_resumes_at_the_border_of_a_step(tmp_path):
    def method():
        return RigL(frequency=2, end_step=9, decay="constant")

    whole = network(momentum(gradient_accumulation_steps=3))
    fit(whole, [method()], epochs=2)
    model = network(momentum(gradient_accumulation_steps=3))
    fit(model, [method()])  # 12 batches, 4 steps
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    model.run_eagerly = True
    fit(model, [method()], initial_epoch=1, epochs=2)
    assert_equal(model.get_weights(), whole.get_weights())


def test_accumulation_within_several_optimizers_is_refused():
    inner = momentum(gradient_accumulation_steps=2)
    optimizer = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(inner)
    )
    with pytest.raises(ValueError, match="accumulation within MultiOptimizer"):
        fit(network(optimizer), [RigL(**EVERY_STEP)])


# Loss scaling and half precision.


def in_precision(policy, optimizer="sgd", **options):
    keras.config.set_dtype_policy(policy)
    try:
        return network(optimizer, **options)
    finally:
        keras.config.set_dtype_policy("float32")


class Batches(keras.callbacks.Callback):
    """Records logs, masks and step after every batch."""

    def __init__(self, method=None):
        super().__init__()
        self.method = method
        self.logs, self.masks, self.steps = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        if self.method is not None:
            self.logs.append(self.method.last_logs())
        self.masks.append(masks(self.model))
        self.steps.append(int(self.model.optimizer.iterations))


@pytest.mark.parametrize("eager", [True, False])
def test_an_update_that_overflows_is_put_off(eager):
    model = in_precision("mixed_float16", momentum(), run_eagerly=eager)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    x, y = examples()
    x[8:12] = 6e4  # the third batch, step 2
    method = RigL(frequency=2, end_step=4, decay="constant")
    record = Batches(method)
    fit(model, [method, record], (x, np.where(x[:, :1] == 6e4, np.inf, y)))
    assert record.steps == [1, 2, 2, *range(3, 12)]
    assert equal_masks(record.masks[1], record.masks[2])
    assert not equal_masks(record.masks[2], record.masks[3])
    skipped = [logs["skipped_updates"] for logs in record.logs]
    assert skipped == [0, 0, *[1] * 10]
    assert [step for step, _ in method.trajectory] == [0, 2, 4]
    assert_sparse(model)
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_only_loss_scaling_can_skip():
    method = RigL(frequency=2, end_step=4)
    record = Batches(method)
    fit(network(), [method, record])
    assert "skipped_updates" not in record.logs[0]


def test_scaled_and_accumulated():
    """An overflow within a step skips its batch, but not the step."""
    model = in_precision(
        "mixed_float16", momentum(gradient_accumulation_steps=2)
    )
    x, y = examples()
    y[20:24] = np.inf  # the second batch of step 2, which is an update
    method = RigL(frequency=2, end_step=4)
    record = Batches(method)
    fit(model, [method, record], (x, y))
    assert record.steps == [0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5]
    assert record.logs[-1]["skipped_updates"] == 1
    assert [step for step, _ in method.trajectory] == [0, 2, 4]


@pytest.mark.slow_but("mixed_bfloat16-{}")
@pytest.mark.parametrize(
    "policy, options",
    [
        ("mixed_bfloat16", {}),
        ("mixed_float16", {"jit_compile": True}),
        ("mixed_float16", {"steps_per_execution": 3}),
    ],
    ids=str,
)
def test_half_precision_keeps_counts(policy, options):
    """Masks are the same up to rounding, however the model runs."""
    after = []
    for more in ({}, {**options, "run_eagerly": False}):
        model = in_precision(policy, momentum(), **more)
        before = masks(model)
        method = RigL(frequency=3, end_step=9)
        fit(model, [method])
        assert not equal_masks(before, masks(model))
        for name, mask in masks(model).items():
            assert mask.sum() == before[name].sum()
        assert_sparse(model)
        after.append(masks(model))
    for name in before:
        assert (after[0][name] == after[1][name]).mean() > 0.9


def test_a_fixed_loss_scale_does_not_reach_the_gradient():
    """The penalty is removed from a gradient of the same scale."""
    after = []
    for scale in (None, 1024.0):
        optimizer = keras.optimizers.SGD(0.0, loss_scale_factor=scale)
        model = network(optimizer, l2=keras.regularizers.L2(3.0))
        method = RigL(**EVERY_STEP, redistribution="gradient")
        fit(model, [method], batch_size=24)
        after.append(masks(model))
    assert equal_masks(*after)


# Optimizers.


OPTIMIZERS = {
    name: cls
    for name, cls in vars(keras.optimizers).items()
    if inspect.isclass(cls)
    and issubclass(cls, keras.Optimizer)
    and cls is not keras.Optimizer
}


def made(name, **options):
    """Returns one of Keras's optimizers, with a rate for small models."""
    if name == "LossScaleOptimizer":
        return keras.optimizers.LossScaleOptimizer(momentum(**options), 16.0)
    if name == "MultiOptimizer":
        others = {".*d/kernel": keras.optimizers.Adam(0.01, **options)}
        return keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(momentum(**options), others)
        )
    rate = {"SGD": {"momentum": 0.9}, "Adadelta": {"learning_rate": 1.0}}
    return OPTIMIZERS[name](
        **{"learning_rate": 0.01, **rate.get(name, {})}, **options
    )


KEEP_NO_MOMENTUM = {
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Ftrl",
    "RMSprop",  # only with momentum
    "ScheduleFreeAdamW",
}


@pytest.mark.slow_but(
    "Adafactor-SNFS",
    "AdamW-RigL",
    "LossScaleOptimizer-SNFS",
    "MultiOptimizer-RigL",
    "SGD-SNFS",
)
@pytest.mark.parametrize("method", [RigL, SNFS])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_keras(name, method):
    """With averaged weights and clipping. Add a row for a new class."""
    model = network(made(name, use_ema=True, ema_momentum=0.5, clipnorm=0.5))
    before, start = masks(model), kernels(model)
    callbacks = [method(frequency=2, end_step=9, decay="constant"), Sparse()]
    if method is SNFS and name in KEEP_NO_MOMENTUM:
        with pytest.raises(ValueError, match="keeps no momentum"):
            fit(model, callbacks)
        return
    record = Batches()
    fit(model, [*callbacks, record], batch_size=8)
    assert record.steps == [1, 2, 3, 4, 5, 6]
    moved = [
        not equal_masks(a, b)
        for a, b in zip(record.masks, record.masks[1:], strict=False)
    ]
    assert moved == [False, True, False, True, False]
    for n, kernel in kernels(model).items():
        both = (before[n] == 1) & (masks(model)[n] == 1)
        assert (kernel[both] != start[n][both]).any()
        if method is RigL:
            assert masks(model)[n].sum() == before[n].sum()


def test_several_optimizers_count_updates_as_steps():
    optimizer = made("MultiOptimizer")
    fit(network(optimizer), [RigL(**EVERY_STEP)])
    counts = [int(part.iterations) for part in optimizer.optimizers]
    assert [int(optimizer.iterations), *counts] == [12, 12, 12]


def test_schedule_free_memory_of_weights_starts_with_the_weight():
    if "ScheduleFreeAdamW" not in OPTIMIZERS:
        pytest.skip("this version of Keras does not have it")
    model = network(OPTIMIZERS["ScheduleFreeAdamW"](0.1))
    look = {}

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            look[batch] = {
                m.name: (
                    m.mask.numpy(),
                    m.kernel.numpy(),
                    slots(model.optimizer, m.kernel)["momentum"].numpy(),
                )
                for m in masked_layers(model)
            }

    method = RigL(
        frequency=3, end_step=3, decay="constant", grow_init="grad_sign"
    )
    fit(model, [method, Look()])
    for name, (mask, kernel, memory) in look[3].items():
        new = (mask == 1) & (look[2][name][0] == 0)
        assert new.any() and (np.abs(kernel[new]) == 1).all()
        np.testing.assert_array_equal(memory[new], kernel[new])
        np.testing.assert_array_equal(memory[mask == 0], 0)
        kept = (mask == 1) & ~new
        assert (memory[kept] != kernel[kept]).any()


@pytest.mark.slow_but("SNFS-test")
@pytest.mark.parametrize("swap", [True, False], ids=["epoch", "test"])
@pytest.mark.parametrize("method", [RigL, SNFS])
def test_averages_that_take_the_weights_place(method, swap):
    model = network(momentum(use_ema=True, ema_momentum=0.5))
    callbacks = [
        Sparse(),
        keras.callbacks.SwapEMAWeights(swap_on_epoch=swap),
        Sparse(),
        method(frequency=2, end_step=99, decay="constant"),
    ]
    fit(model, callbacks, epochs=2, validation_data=examples(8))
    assert_sparse(model)


@pytest.mark.slow_but(
    "RigL-{'weight_decay': 0.5}",
    "SNFS-{'clipvalue': 0.01}",
)
@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
        {"clipvalue": 0.01},
        {"global_clipnorm": 0.01},
        {"weight_decay": 0.5},
        {
            "use_ema": True,
            "ema_momentum": 0.5,
            "gradient_accumulation_steps": 2,
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [RigL, SNFS])
def test_zeros_under_every_option(method, options):
    model = network(momentum(**options))
    before = masks(model)
    fit(model, [method(frequency=2, end_step=9), Sparse()])
    assert not equal_masks(before, masks(model))
    assert_sparse(model)


# Custom training steps of models.


class AppliesGradients(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        pairs = zip(gradients, self.trainable_variables, strict=True)
        self.optimizer.apply_gradients(pairs)
        return {"loss": loss}


class AppliesWithoutVariables(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables))
        return {"loss": loss}


class Compiled(keras.Model):
    @tf.function
    def train_step(self, data):
        return Applies.train_step(self, data)


@pytest.mark.slow_but("AppliesGradients")
@pytest.mark.parametrize(
    "cls", [Applies, AppliesGradients, AppliesWithoutVariables, Compiled]
)
def test_a_train_step_of_ones_own(cls):
    after = []
    for kind in (keras.Model, cls):
        model = network(momentum(), cls=kind, run_eagerly=cls is not Compiled)
        assert type(model).train_step is kind.train_step
        fit(model, [RigL(frequency=2, end_step=9)])
        after.append((masks(model), model.get_weights()))
    assert equal_masks(after[0][0], after[1][0])
    assert_close(after[0][1], after[1][1])


# Weights of samples, classes and outputs: weight 0 has no effect on growth.


def grown_on(model, *data, **options):
    model.fit(
        *data,
        batch_size=24,
        shuffle=False,
        verbose=0,
        callbacks=[RigL(**EVERY_STEP)],
        **options,
    )
    return masks(model)


def test_sample_weights_reach_growth():
    x, y = examples()
    weight = np.tile([1.0, 0.0], 24)
    noise = np.where(weight[:, None] == 0, 100 * y[::-1], y)
    still = keras.optimizers.SGD
    clean = grown_on(network(still(0.0)), x, y, sample_weight=weight)
    same = grown_on(network(still(0.0)), x, noise, sample_weight=weight)
    assert equal_masks(clean, same)
    assert not equal_masks(clean, grown_on(network(still(0.0)), x, noise))


def test_class_weights_reach_growth():
    x, _ = examples()
    y = np.arange(48) % 4
    noise = np.where(y[:, None] == 3, 100 * x[::-1], x)
    weight = {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.0}

    def model():
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return network(keras.optimizers.SGD(0.0), loss=loss)

    clean = grown_on(model(), x, y, class_weight=weight)
    same = grown_on(model(), noise, y, class_weight=weight)
    assert equal_masks(clean, same)
    assert not equal_masks(clean, grown_on(model(), noise, y))


def two_headed(optimizer, weights=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(8, name="hidden")(inputs)
    outputs = {n: layers.Dense(4, name=n)(x) for n in ("a", "b")}
    model = sparsify(keras.Model(inputs, outputs), 0.5)
    model.compile(
        optimizer,
        {"a": "mse", "b": "mae"},
        loss_weights=weights,
        run_eagerly=True,
    )
    return model


def test_several_outputs_and_losses_reach_growth():
    def model(weights):
        return two_headed(keras.optimizers.SGD(0.0), weights)

    x, y = examples()
    one, two = {"a": y, "b": y}, {"a": y, "b": 100 * y[::-1]}
    weights = {"a": 1.0, "b": 0.0}
    clean = grown_on(model(weights), x, one)
    assert equal_masks(clean, grown_on(model(weights), x, two))
    assert not equal_masks(clean, grown_on(model(None), x, two))


# A custom loop, where `update` replaces `optimizer.apply`.


def by_hand(
    model, updater, data, *, dense=dense_gradients, values=False, eager=False
):
    """Trains batch by batch with `update`, like `fit`."""
    loss = keras.losses.MeanSquaredError()
    optimizer = model.optimizer
    updater.attach(model, optimizer)

    def train_step(x, y):
        with dense(), tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
            scaled = optimizer.scale_loss(value)
        variables = model.trainable_variables
        if values:
            variables = [v.value for v in variables]
        updater.update(tape.gradient(scaled, variables), variables)
        return value

    if not eager:
        train_step = tf.function(train_step)
    for start in range(0, len(data[0]), 4):
        train_step(*(part[start : start + 4] for part in data))
    updater.fetch()


@pytest.mark.slow_but("RigL-SG")
@every_method
def test_update_in_place_of_apply(method):
    """The loop ends with the same model as `fit`."""
    options = dict(frequency=2, end_step=9)
    want, got = network(momentum()), network(momentum())
    callbacks = METHODS[method](**options)
    if not callbacks:  # static masks need no update
        callbacks = [RigL(frequency=50, end_step=99)]
    else:
        fit(want, METHODS[method](**options), examples(40))
    if method == "static":
        fit(want, [], examples(40))
    # test_matrix.py has loops of the other methods in graphs.
    eager = method not in ("RigL-SG", "SNFS", "MagnitudePruning", "GraNet")
    by_hand(got, callbacks[0], examples(40), eager=eager)
    assert_close(got.get_weights(), want.get_weights())
    memory = [[v.numpy() for v in m.optimizer.variables] for m in (got, want)]
    assert_close(*memory)
    assert len(callbacks[0].trajectory) > 1 or method == "static"


@pytest.mark.slow
def test_update_with_the_variables_that_keras_holds():
    models = [network(momentum()) for _ in range(2)]
    for model, values in zip(models, (False, True), strict=True):
        method = RigL(frequency=2, end_step=9)
        by_hand(model, method, examples(24), values=values)
        assert_sparse(model)
    assert equal_masks(*map(masks, models))


@pytest.mark.slow
def test_update_of_scaled_gradients():
    x, y = examples()
    y[8:12] = np.inf
    model = network(keras.optimizers.LossScaleOptimizer(momentum(), 16.0))
    method = RigL(frequency=2, end_step=4, decay="constant")
    by_hand(model, method, (x, y))
    assert [step for step, _ in method.trajectory] == [0, 2, 4]
    assert method.skipped_updates == 1
    assert int(model.optimizer.iterations) == 11
    plain = network(momentum())
    others = np.r_[0:8, 12:48]
    method = RigL(frequency=2, end_step=4, decay="constant")
    by_hand(plain, method, (x[others], y[others]))
    assert_close(model.get_weights(), plain.get_weights())


class Nothing:
    def __enter__(self):
        return None

    def __exit__(self, *error):
        return None


def test_forgotten_dense_gradients_are_noticed():
    model = network(momentum())
    before = masks(model)
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match="every gradient of one of hidden, d was ",
    ):
        by_hand(model, RigL(frequency=2, end_step=9), examples(), dense=Nothing)
    assert equal_masks(before, masks(model))
    # No error if they are not needed, or if masks have no zeros.
    by_hand(model, SET(frequency=2, end_step=99), examples(), dense=Nothing)
    assert not equal_masks(before, masks(model))
    for layer in masked_layers(model):
        layer.assign_mask(np.ones(layer.mask.shape))
    by_hand(model, RigL(frequency=2, end_step=99), examples(), dense=Nothing)


def test_update_needs_to_know():
    model = network()
    kernel = masked_layers(model)[0].kernel
    with pytest.raises(ValueError, match="call attach"):
        RigL().update([tf.zeros(kernel.shape)], [kernel])
    updater = RigL()
    updater.attach(model, model.optimizer)
    with pytest.raises(ValueError, match="or end_step"):
        updater.update([tf.zeros(kernel.shape)], [kernel])
    bias = model.trainable_variables[1]
    updater = RigL(**EVERY_STEP)
    updater.attach(model, model.optimizer)
    model.optimizer.iterations.assign(1)
    with pytest.raises(ValueError, match="does the loss depend"):
        updater.update([tf.zeros(bias.shape)], [bias])


# Gradients of several batches.


@pytest.mark.slow_but("True")
@pytest.mark.parametrize("eager", [True, False])
def test_growth_by_the_mean_of_several_batches(eager):
    """With constant weights, it is the gradient of one large batch."""
    x, y = examples(48)
    y[:, 0] *= np.repeat([1, -9, 9, 1], 12)
    after = {}
    for batches in (1, 3):
        model = network(keras.optimizers.SGD(0.0), run_eagerly=eager)
        method = RigL(
            frequency=3,
            end_step=3,
            drop_fraction=0.9,
            decay="constant",
            gradient_batches=batches,
        )
        fit(model, [method], (x, y), batch_size=12)
        after[batches] = masks(model)
    # Steps 1, 2 and 3 as one batch, after a first batch.
    model = network(keras.optimizers.SGD(0.0))
    method = RigL(**{**EVERY_STEP, "drop_fraction": 0.9})
    fit(model, [method], (np.r_[x[12:], x[12:]], np.r_[y[12:], y[12:]]), 36)
    assert equal_masks(after[3], masks(model))
    assert not equal_masks(after[1], after[3])


def test_batches_before_an_update_train_as_always():
    """They give the same weights and the same optimizer state."""
    records = []
    for batches in (1, 3):
        model, record = network(momentum()), Weights()
        method = RigL(frequency=5, end_step=9, gradient_batches=batches)
        fit(model, [method, record])
        records.append(record)
    one, two = records
    for step in range(5):
        assert_equal(one.weights[step], two.weights[step])
        assert_equal(one.memory[step], two.memory[step])
    with pytest.raises(AssertionError):
        assert_equal(one.weights[5], two.weights[5])


class Weights(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.weights, self.memory = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(self.model.get_weights())
        memory = self.model.optimizer.variables
        self.memory.append([v.numpy() for v in memory])


def several(**options):
    return RigL(
        frequency=4,
        end_step=9,
        drop_fraction=0.9,
        gradient_batches=4,
        **options,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:RigL plans 0 updates")
def test_what_was_gathered_can_be_saved():
    x, y = examples(40)
    whole = network(momentum())
    fit(whole, [several()], (x, y))
    # Stopped after step 2, so two of the steps 1 to 4 are gathered.
    start, first = network(momentum()), several()
    fit(start, [first], (x[:12], y[:12]))
    assert [v.shape for v in first.variables] == [
        (2,),
        *(m.kernel.shape for m in masked_layers(start)),
    ]
    ends = {}
    for kept in (True, False):
        model, method = network(momentum()), several()
        model.optimizer.build(model.trainable_variables)
        model.set_weights(start.get_weights())
        for ours, theirs in zip(
            model.optimizer.variables, start.optimizer.variables, strict=True
        ):
            ours.assign(theirs)
        method.attach(model, model.optimizer)
        for ours, theirs in zip(method.variables, first.variables, strict=True):
            if kept:
                ours.assign(theirs)
        fit(model, [method], (x[12:], y[12:]))
        ends[kept] = model.get_weights()
    same = [
        all((a == b).all() for a, b in zip(e, whole.get_weights(), strict=True))
        for e in (ends[True], ends[False])
    ]
    assert same == [True, False]  # the second has the mean over steps 3 and 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:RigL plans 0 updates")
def test_what_an_earlier_run_gathered_is_forgotten():
    x, y = examples(40)
    after = []
    for again in (True, False):
        model, first = network(momentum()), several()
        fit(model, [first], (x[:12], y[:12]))
        fit(model, [], (x[:4], y[:4]))  # step 3, without the method
        fit(model, [first if again else several()], (x, y))
        after.append(model.get_weights())
    assert_equal(*after)


def test_two_traces_are_enough():
    model, traces = network(momentum(), cls=Applies), []
    step = model.train_step

    def counted(data):
        traces.append(1)
        return step(data)

    model.train_step = counted
    model.run_eagerly = False
    fit(model, [several()])
    assert len(traces) == 2


@pytest.mark.parametrize("conventions", [rigl_keras.ORIGINAL, REPORT])
def test_gathered_steps_by_enumeration(conventions):
    window = dict(
        frequency=4, begin_step=3, end_step=17, conventions=conventions
    )
    due = [
        t for t in range(30) if rigl_keras.schedules.is_update_step(t, **window)
    ]
    assert len(due) == 4
    for n in (1, 3, 4):
        want = {t - i for t in due for i in range(n)} - set(range(-9, 0))
        got = {
            t
            for t in range(30)
            if rigl_keras.schedules.is_gathered_step(
                t, gradient_batches=n, **window
            )
        }
        assert got == want
        tensor = rigl_keras.schedules.is_gathered_step(
            tf.range(30, dtype=tf.int64), gradient_batches=n, **window
        )
        assert set(np.flatnonzero(tensor)) == want


def test_what_several_batches_cost():
    model = network()
    cost = rigl_keras.count(model)
    counts = {m.name: int(m.mask.numpy().sum()) for m in masked_layers(model)}
    sparse = 3 * cost.inference_flops
    dense = 2 * cost.inference_flops + cost.dense_inference_flops
    curve = dict(steps=9, dense_gradients="updates", gradient_batches=3)
    trajectory = [(0, counts), (1, counts), (6, counts)]
    _, training = rigl_keras.flops.training_curve(cost, trajectory, **curve)
    want = [dense, dense, *[sparse] * 2, *[dense] * 3, *[sparse] * 2]
    np.testing.assert_allclose(training, want)
    # Two of four steps are dense: (2 x 3 + 2 x (2 + 5)) / 4.
    options = dict(sparse_flops=1, dense_flops=5, frequency=3)
    cost = rigl_keras.training_flops("rigl", **options, gradient_batches=2)
    assert cost == 5.0
    with pytest.raises(ValueError, match="at most frequency"):
        rigl_keras.training_flops("rigl", **options, gradient_batches=4)


# Initial values of grown weights.


@pytest.mark.slow_but("zeros-1", "initial_dist-1")
@pytest.mark.parametrize(
    "kind, divisor",
    [
        ("zeros", 1),
        ("initial_dist", 1),
        ("random_normal", 1),
        ("random_uniform", 10),
        ("grad_scale", 2.5),
        ("grad_sign", 100),
    ],
)
def test_only_grown_weights_start_anew(kind, divisor):
    """They start by the given kind, without state, and the run repeats."""
    ends = []
    for _ in range(2):
        model = network(momentum())
        initial, look = kernels(model), Batches()
        weights = Weights()
        method = RigL(
            frequency=2,
            end_step=2,
            decay="constant",
            grow_init=kind,
            grow_divisor=divisor,
        )
        fit(model, [method, look, weights], examples(12))
        before, after = look.masks[1], look.masks[2]
        paths = [v.path for v in model.weights]
        old, new = (
            dict(zip(paths, weights.weights[t], strict=True)) for t in (1, 2)
        )
        for layer in masked_layers(model):
            was, now = old[layer.kernel.path], new[layer.kernel.path]
            grown = (before[layer.name] == 0) & (after[layer.name] == 1)
            kept = (before[layer.name] == 1) & (after[layer.name] == 1)
            assert grown.any()
            np.testing.assert_array_equal(now[kept], was[kept])
            assert not now[after[layer.name] == 0].any()
            memory = slots(model.optimizer, layer.kernel)["momentum"].numpy()
            assert not memory[grown].any() and memory[kept].any()
            active = np.abs(was[before[layer.name] == 1])
            if kind == "zeros":
                assert not now[grown].any()
            else:
                assert now[grown].all()
            if kind == "initial_dist":
                assert np.isin(now[grown], initial[layer.name]).all()
            if kind == "random_uniform":
                assert (np.abs(now[grown]) <= active.mean() / 10).all()
            if kind == "grad_sign":
                np.testing.assert_allclose(np.abs(now[grown]), 0.01)
        ends.append(model.get_weights())
    assert_equal(*ends)


def test_draws_have_the_spread_of_active_weights():
    draw = np.random.default_rng(0)
    mask = draw.random((200, 300)) < 0.3
    kernel = tf.constant((draw.normal(0.5, 2.0, mask.shape) * mask), tf.float32)
    gradient = tf.constant(draw.normal(size=mask.shape), tf.float32)
    active = kernel.numpy()[mask]

    def values(kind, divisor=1.0, key=1, step=7, kernel=kernel):
        drawn = rigl_keras.initial_values.grown_values(
            kind,
            kernel,
            tf.constant(mask, tf.float32),
            divisor=divisor,
            gradient=gradient,
            initial=tf.constant([1.0, 2.0, 4.0]),
            key=key,
            step=step,
        )
        assert drawn.dtype == kernel.dtype
        return drawn.numpy()

    normal = values("random_normal")
    assert normal.std() == pytest.approx(active.std(), rel=0.02)
    assert abs(normal.mean()) < 0.02 * active.std()
    # Values beyond three standard deviations, as often as in a normal draw.
    assert np.mean(np.abs(normal) > 3 * active.std()) == pytest.approx(
        0.0027, rel=0.3
    )
    uniform = values("random_uniform")
    bound = np.abs(active).mean()
    assert np.abs(uniform).max() == pytest.approx(bound, rel=1e-3)
    assert uniform.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    chosen, count = np.unique(values("initial_dist", 2), return_counts=True)
    assert chosen.tolist() == [0.5, 1.0, 2.0]
    np.testing.assert_allclose(count / mask.size, 1 / 3, rtol=0.05)
    np.testing.assert_allclose(values("grad_scale", 4), gradient / 4)
    np.testing.assert_allclose(values("grad_sign"), np.sign(gradient))
    half = values("random_normal", 2, kernel=tf.cast(kernel, tf.float16))
    np.testing.assert_allclose(half, normal / 2, rtol=0.02, atol=1e-3)
    for other in ({"key": 2}, {"step": 8}):
        assert (values("random_normal", **other) != normal).mean() > 0.99


@pytest.mark.parametrize("method", [RigL, SNFS])
def test_a_divisor_within_the_name_is_deprecated(method):
    with pytest.warns(
        DeprecationWarning,
        match=r"grow_init='random_normal', grow_divisor=2\.5\.",
    ) as warned:
        old = method(grow_init="random_normal_2.5")
    assert [w.filename for w in warned] == [__file__]
    new = method(grow_init="random_normal", grow_divisor=2.5)
    assert old.get_config() == new.get_config()
    assert old.lengthened(2).get_config() == new.get_config()


def test_gradients_must_be_there_to_start_from():
    with pytest.raises(ValueError, match="only where a method needs dense"):
        SET(grow_init="grad_scale")
    assert SET(grow_init="random_normal").grow_init == "random_normal"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random_normal", "initial_dist"])
def test_drawn_weights_resume_exactly(kind):
    def method():
        return SET(frequency=2, end_step=99, grow_init=kind)

    x, y = examples(40)
    whole = network(momentum())
    fit(whole, [method()], (x, y))
    model, first = network(momentum()), method()
    fit(model, [first], (x[:20], y[:20]))
    second = method()
    second.attach(model, model.optimizer)
    for ours, theirs in zip(second.variables, first.variables, strict=True):
        ours.assign(theirs)
    assert len(second.variables) == (2 if kind == "initial_dist" else 0)
    fit(model, [second], (x[20:], y[20:]))
    assert_equal(model.get_weights(), whole.get_weights())


def test_a_callback_remembers_the_start_of_the_run_it_is_in():
    method = SET(frequency=2, end_step=99, grow_init="initial_dist")
    fit(network(momentum()), [method])
    model = network(momentum())
    for layer in masked_layers(model):
        layer.kernel.assign(tf.sign(layer.kernel.value))
    method.attach(model, model.optimizer)
    assert all((np.abs(v.numpy()) == 1).all() for v in method.variables)


# The loss of the batch of an update.


@pytest.mark.parametrize("eager", [True, False])
def test_loss_before_and_after_an_update(eager):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(8, name="hidden", activity_regularizer="l2")(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Dropout(0.5)(x)
    model = sparsify(keras.Model(inputs, layers.Dense(4, name="d")(x)), 0.5)
    model.compile("sgd", "mse", run_eagerly=eager, metrics=["mae"])
    twin = keras.models.clone_model(model)
    twin.compile("sgd", "mse")
    data = examples(16)
    weights = Weights()
    method = RigL(frequency=2, end_step=9, drop_fraction=0.9)
    method.watch_loss = True
    fit(model, [method, weights], data)
    ((step, before, after),) = method.update_losses
    assert step == 2
    # Batch statistics change in the update's forward pass, masks after it.
    batch = [part[8:12] for part in data]
    wanted = []
    for at in (1, 2):
        twin.set_weights(weights.weights[at])
        for ours in twin.weights:
            if "moving" in ours.path:
                index = [v.path for v in model.weights].index(ours.path)
                ours.assign(weights.weights[2][index])
        wanted.append(twin.evaluate(*batch, verbose=0)[0])
    assert before != after
    assert [before, after] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_watching_the_loss_changes_nothing():
    """It does not change Keras's mean loss of an epoch either."""
    x, y = examples()
    after = []
    for watch in (True, False):
        model = two_headed(momentum())
        method = RigL(frequency=2, end_step=9)
        method.watch_loss = watch
        history = fit(model, [method], (x, {"a": y, "b": y})).history
        assert "a_loss" in history
        after.append((model.get_weights(), history))
        assert len(method.update_losses) == (4 if watch else 0)
    assert after[0][1] == after[1][1]
    assert_equal(after[0][0], after[1][0])


class WithoutLoss(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def test_a_model_without_a_loss_to_watch():
    model = network(momentum(), cls=WithoutLoss, loss=None)
    method = RigL(frequency=2, end_step=3)
    method.watch_loss = True
    fit(model, [method])
    ((step, *losses),) = method.update_losses
    assert step == 2 and np.isnan(losses).all()


@pytest.mark.slow
def test_all_of_it_at_once_under_xla():
    model = in_precision(
        "mixed_float16",
        momentum(
            gradient_accumulation_steps=2, use_ema=True, global_clipnorm=1.0
        ),
        run_eagerly=False,
        jit_compile=True,
    )
    counts = tuple(int(mask.sum()) for mask in masks(model).values())
    method = RigL(
        frequency=3,
        end_step=9,
        decay="constant",
        gradient_batches=2,
        grow_init="random_normal",
        grow_divisor=2.0,
    )
    method.watch_loss = True
    fit(model, [method], epochs=2)
    assert method.trajectory == [(step, counts) for step in (0, 3, 6, 9)]
    assert [step for step, *_ in method.update_losses] == [3, 6, 9]
    assert all(a != b for _, a, b in method.update_losses)
    assert_sparse(model)


class TracedByItself(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4, name="inner")

    @tf.function
    def call(self, x):
        return self.dense(x)


def test_what_is_traced_once_for_both_kinds_of_step_is_refused():
    """Its gradients would be those of the first trace."""
    model = TracedByItself()
    x = np.ones((8, 3), np.float32)
    model(x)
    model = sparsify(model, 0.5)
    model.compile("sgd", "mse")
    y = np.ones((8, 4), np.float32)
    with pytest.raises(ValueError, match="inner are traced only once"):
        model.fit(x, y, batch_size=2, callbacks=[RigL(frequency=2, end_step=9)])
    model.fit(x, y, verbose=0)  # it is allowed without a method
