"""Training set-ups: each keeps masks exact, and grows by the right gradient.

The methods are the rows of `support.methods.METHODS`. Networks run eagerly,
unless a test is about the graph.
"""

import inspect

import keras
import numpy as np
import pytest
from support.methods import METHODS
from support.regressions import (
    Batches,
    assert_close,
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
from rigl_keras.conventions import Conventions
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.methods.pruning import MagnitudePruning
from rigl_keras.methods.rigl import SNFS, RigL
from rigl_keras.schedules import SparsityRamp
from rigl_keras.training.optimizer_state import slots

every_method = pytest.mark.parametrize("method", METHODS)
EVERY_STEP = dict(frequency=1, end_step=99, decay="constant")
STEP_FIRST = Conventions(update_replaces_step=False)


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
