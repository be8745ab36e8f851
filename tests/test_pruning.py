"""Gradual magnitude pruning: the ramp, the masks, and tfmot's masks."""

import dataclasses
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.small_models import compiled, examples, kernels, masks, small_model

from rigl_keras import schedules
from rigl_keras.conventions import ORIGINAL, REPORT
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.methods.granet import GraNet
from rigl_keras.methods.pruning import MagnitudePruning
from rigl_keras.schedules import SparsityRamp

RAMP = SparsityRamp(final_density=0.2, begin_step=2, end_step=10, frequency=3)


def test_ramp_by_hand():
    # 1 - x is 1, 1/2 and 0: 0.8 - 0.8 (1 - x)^3.
    for step, want in ((2, 0.0), (6, 0.7), (10, 0.8), (0, 0.0), (99, 0.8)):
        assert float(RAMP.sparsity(step)) == pytest.approx(want, abs=1e-12)
    # From begin_step on, and at end_step for any frequency.
    assert [t for t in range(15) if RAMP(t)[0]] == [2, 5, 8, 10]
    part = dataclasses.replace(RAMP, initial_density=0.6, power=1.0)
    assert float(part.sparsity(6)) == pytest.approx(0.6)  # 0.4 to 0.8


def test_ramp_under_report():
    """Steps and values agree with the trace of pruning."""
    ramp = SparsityRamp(
        final_density=0.2, begin_step=2, end_step=12, frequency=4
    )
    planned = [
        schedules.planned_sparsity(ramp, t, conventions=REPORT)
        for t in range(16)
    ]
    assert [t for t, (due, _) in enumerate(planned) if due] == [3, 7, 11]
    assert float(planned[7][1]) == pytest.approx(0.6272)
    planned = [
        schedules.planned_sparsity(ramp, t, conventions=ORIGINAL)
        for t in range(16)
    ]
    assert [t for t, (due, _) in enumerate(planned) if due] == [2, 6, 10, 12]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"final_density": 0.0}, "0 < final_density"),
        ({"final_density": 1.2}, r"in \[0, 1\]"),
        ({"final_density": float("nan")}, "nan"),
        ({"initial_density": 0.1}, "final_density <= initial_density"),
        ({"begin_step": 10}, "begin_step < end_step"),
        ({"begin_step": -1}, "begin_step .* must be an int of at least 0"),
        ({"frequency": 0}, "frequency .* must be an int of at least 1"),
        ({"frequency": 1.5}, "must be an int"),
        ({"power": 0}, "power must be positive"),
    ],
    ids=str,
)
def test_bad_ramp(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RAMP, **change)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": 0.1}, r"SparsityRamp\(final_density"),
        ({"schedule": RAMP, "scope": "model"}, "scope must be"),
        ({"schedule": RAMP, "conventions": "REPORT"}, "rigl_keras.ORIGINAL"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MagnitudePruning(**options)


def test_config_round_trip():
    callback = MagnitudePruning(RAMP, scope="layer", conventions=REPORT)
    config = callback.get_config()
    assert MagnitudePruning(**config).get_config() == config
    assert callback.lengthened(3).schedule == dataclasses.replace(
        RAMP, end_step=30
    )
    half = callback.lengthened(0.5).schedule
    assert half.end_step == callback.schedule.end_step // 2
    with pytest.raises(ValueError, match="factor must be positive"):
        callback.lengthened(0)

    class Fixed:
        def __call__(self, step):
            return step == 3, 0.5

    with pytest.raises(ValueError, match="Fixed cannot be lengthened"):
        MagnitudePruning(Fixed()).lengthened(2)


class Watch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((masks(self.model), kernels(self.model)))


def trained(callback, granularity="element", steps=12, **options):
    """Trains eagerly; `test_mask_updates.py`, `test_matrix.py` use graphs."""
    model = sparsify(small_model(), 1.0, granularity=granularity)
    watch = Watch()
    watch.seen.append((masks(model), kernels(model)))
    compiled(model, **{"run_eagerly": True, **options}).fit(
        *examples(8 * steps),
        batch_size=8,
        shuffle=False,
        verbose=0,
        callbacks=[callback, watch],
    )
    return watch.seen


@pytest.mark.slow_but("layer")
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_largest_stay(scope):
    """As many as scheduled stay, the largest, and no weight returns."""
    # Only the scope "layer" has a graph, as no other test has it.
    eager = scope == "global"
    seen = trained(MagnitudePruning(RAMP, scope=scope), run_eagerly=eager)
    for step, (before, after) in enumerate(zip(seen, seen[1:], strict=False)):
        due, sparsity = RAMP(step)
        density = 1 - float(sparsity)
        (old, kernel), (new, later) = before, after
        for name in old:
            assert (new[name] <= old[name]).all()
            assert not later[name][new[name] == 0].any()
        if not due:
            assert all((new[name] == old[name]).all() for name in old)
            continue
        if scope == "global":
            groups = [list(old)]
        else:
            groups = [[name] for name in old]
        for group in groups:
            size = sum(old[name].size for name in group)
            ones = sum(new[name].sum() for name in group)
            assert ones == max(round(density * size), scope == "layer")
            kept = [np.abs(kernel[n][new[n] == 1]) for n in group]
            gone = [np.abs(kernel[n][new[n] == 0]) for n in group]
            kept, gone = np.concatenate(kept), np.concatenate(gone)
            assert gone.size == 0 or kept.min() >= gone.max()
    assert step == 11 and sum(m.sum() for m in new.values()) < 0.21 * sum(
        m.size for m in new.values()
    )


@pytest.mark.slow
def test_one_weight_of_each_layer_stays():
    ramp = SparsityRamp(final_density=1e-6, begin_step=0, end_step=4)
    last, _ = trained(MagnitudePruning(ramp, scope="layer"), steps=6)[-1]
    assert all(mask.sum() == 1 for mask in last.values())


@pytest.mark.slow_but("global")
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_whole_kernels(scope):
    """As many whole kernels as fit into the scheduled count stay."""
    seen = trained(MagnitudePruning(RAMP, scope=scope), "kernel")
    new, _ = seen[-1]
    size = sum(mask.size for mask in new.values())
    ones = sum(mask.sum() for mask in new.values())
    assert 0.2 * size - 9 <= ones <= 0.2 * size + 9 * len(new)
    for name, mask in new.items():
        if mask.ndim == 4:
            assert (mask == mask[:1, :1]).all(), name


@pytest.mark.parametrize("due", [15, 16])
def test_what_is_left_of_a_run_may_have_no_update(due, recwarn):
    """Two of four epochs, of four steps each, are left: steps 8 to 15."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4)])
    model = sparsify(model, 1.0)
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    model.fit(
        np.ones((8, 6)),
        np.ones((8, 4)),
        batch_size=2,
        initial_epoch=2,
        epochs=4,
        verbose=0,
        callbacks=[MagnitudePruning(lambda step: (step == due, 0.5))],
    )
    said = [str(warning.message) for warning in recwarn]
    assert any("plans 0 updates in the 8 steps" in s for s in said) == (
        due == 16
    )


@pytest.mark.slow
def test_a_schedule_that_is_never_due_warns():
    ramp = SparsityRamp(final_density=0.1, begin_step=500, end_step=900)
    with pytest.warns(UserWarning, match="plans 0 updates in the 12 steps"):
        trained(MagnitudePruning(ramp))


def test_step_then_prune():
    """A pruning step also trains, as in the authors' code."""
    conventions = dataclasses.replace(ORIGINAL, update_replaces_step=False)
    ramp = SparsityRamp(final_density=0.5, begin_step=0, end_step=3)
    for choice, moves in ((ORIGINAL, False), (conventions, True)):
        seen = trained(MagnitudePruning(ramp, conventions=choice), steps=4)
        (_, before), (mask, after) = seen[3], seen[4]
        kept = mask["head"] == 1
        assert (before["head"] != after["head"])[kept].any() == moves


# tfmot needs Keras 2, which a separate process imports. It writes the masks of
# every step.
TFMOT = """
import warnings
warnings.simplefilter("ignore")
import numpy as np, sys
import tf_keras
from tensorflow_model_optimization.python.core.sparsity.keras import (
    prune, pruning_callbacks, pruning_schedule)

out = sys.argv[1]
tf_keras.utils.set_random_seed(0)
model = tf_keras.Sequential([
    tf_keras.layers.Input((8, 8, 3)),
    tf_keras.layers.Conv2D(8, 3, name="conv1"),
    tf_keras.layers.Conv2D(8, 3, name="conv2"),
    tf_keras.layers.Flatten(),
    tf_keras.layers.Dense(10, name="head"),
])
names = ["conv1", "conv2", "head"]
start = {n: model.get_layer(n).get_weights() for n in names}
schedule = pruning_schedule.PolynomialDecay(0.1, 0.8, 1, 9, frequency=2)
pruned = prune.prune_low_magnitude(model, pruning_schedule=schedule)
pruned.compile(tf_keras.optimizers.SGD(0.0), "mse")
draw = np.random.default_rng(0)
x = draw.standard_normal((8 * 12, 8, 8, 3)).astype(np.float32)
y = draw.standard_normal((8 * 12, 10)).astype(np.float32)
seen = {}

class Watch(tf_keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        for layer in pruned.layers:
            for weight, mask, _ in getattr(layer, "pruning_vars", []):
                name = layer.layer.name
                seen[f"mask{batch}/{name}"] = mask.numpy()
                seen[f"kernel{batch}/{name}"] = weight.numpy()

pruned.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[
    pruning_callbacks.UpdatePruningStep(), Watch()])
for name in names:
    seen[f"start/{name}"], seen[f"bias/{name}"] = start[name]
np.savez(out, x=x, y=y, **seen)
"""


@pytest.fixture(scope="module")
def of_tfmot(tmp_path_factory):
    """Returns kernels and masks of tfmot, with constant weights."""
    path = tmp_path_factory.mktemp("tfmot") / "masks.npz"
    done = subprocess.run(
        [sys.executable, "-c", TFMOT, path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture
def tfmot(monkeypatch):
    # On import, tfmot sets a variable that other tests would inherit, and makes
    # tf.keras Keras 2 unless that was used before.
    assert tf.keras.version() == keras.version()
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "")
    return pytest.importorskip("tensorflow_model_optimization")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_same_masks_as_tfmot(of_tfmot, tfmot):
    """The same network and weights under tfmot's own schedule and callback.

    tfmot counts steps from 1: its schedule gets 1 in the first batch.
    """
    schedule = tfmot.sparsity.keras.PolynomialDecay(0.1, 0.8, 1, 9, frequency=2)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(8, 3, name="conv1"),
            layers.Conv2D(8, 3, name="conv2"),
            layers.Flatten(),
            layers.Dense(10, name="head"),
        ]
    )
    for name in ("conv1", "conv2", "head"):
        model.get_layer(name).set_weights(
            [of_tfmot[f"start/{name}"], of_tfmot[f"bias/{name}"]]
        )
    model = sparsify(model, 1.0)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    watch = Watch()
    model.fit(
        of_tfmot["x"],
        of_tfmot["y"],
        batch_size=8,
        shuffle=False,
        verbose=0,
        callbacks=[MagnitudePruning(schedule, scope="layer"), watch],
    )
    ones = []
    for step, (found, weights) in enumerate(watch.seen):
        for name, mask in found.items():
            if step == 0:
                assert mask.all()
                continue
            theirs = f"{step - 1}/{name}"
            np.testing.assert_array_equal(mask, of_tfmot[f"mask{theirs}"])
            np.testing.assert_array_equal(
                weights[name], of_tfmot[f"kernel{theirs}"]
            )
        ones.append(sum(int(mask.sum()) for mask in found.values()))
    assert len(set(ones)) == 6  # dense, and after steps 1, 3, 5, 7 and 9


@pytest.mark.slow
def test_kernels_of_any_size_under_xla():
    """Under XLA, the mean of 121 ones is less than one."""
    model = keras.Sequential(
        [
            keras.Input((12, 12, 1)),
            layers.Conv2D(4, 11, name="large"),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ]
    )
    model = sparsify(model, 1.0, granularity="kernel")
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=True)
    ramp = SparsityRamp(final_density=0.5, begin_step=0, end_step=3)
    model.fit(
        np.ones((8, 12, 12, 1)),
        np.ones((8, 2)),
        batch_size=2,
        verbose=0,
        callbacks=[MagnitudePruning(ramp, scope="layer")],
    )
    assert {n: m.mean() for n, m in masks(model).items()} == {
        "large": 0.5,
        "head": 0.5,
    }


@pytest.mark.slow
def test_a_schedule_of_ones_own():
    callback = MagnitudePruning(lambda step: (step == 3, 0.5), scope="layer")
    last, _ = trained(callback)[-1]
    assert all(mask.mean() == pytest.approx(0.5) for mask in last.values())
    always = MagnitudePruning(lambda step: (True, 0.25), scope="layer")
    last, _ = trained(always, steps=2)[-1]
    assert all(mask.mean() == pytest.approx(0.75) for mask in last.values())


@pytest.mark.slow
def test_layers_of_two_precisions():
    inputs = keras.Input((6,))
    x = layers.Dense(8, dtype="mixed_bfloat16", name="half")(inputs)
    x = layers.Dense(8, dtype="bfloat16", name="less")(x)
    model = keras.Model(inputs, layers.Dense(3, dtype="float32", name="d")(x))
    model = sparsify(model, 1.0)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    ramp = SparsityRamp(final_density=0.5, begin_step=0, end_step=3)
    model.fit(
        np.ones((8, 6)),
        np.ones((8, 3)),
        batch_size=2,
        verbose=0,
        callbacks=[MagnitudePruning(ramp)],
    )
    found = masks(model)
    ones = sum(np.count_nonzero(mask) for mask in found.values())
    assert ones == 68  # of 48 + 64 + 24


@pytest.mark.parametrize("name", ["GraNet", "MagnitudePruning"])
def test_masks_that_are_sparser_than_its_end_are_named(name):
    """Nothing would ever be pruned."""
    ramp = SparsityRamp(final_density=0.5, begin_step=1, end_step=5)
    method = {
        "GraNet": lambda: GraNet(final_density=0.5, frequency=1, end_step=9),
        "MagnitudePruning": lambda: MagnitudePruning(schedule=ramp),
    }[name]()
    model = compiled(sparsify(small_model(), 0.2), run_eagerly=True)
    with pytest.warns(UserWarning, match=f"{name} ends at density 0.5, but"):
        model.fit(*examples(), batch_size=4, verbose=0, callbacks=[method])
