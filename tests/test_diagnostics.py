"""Diagnostics of masks: measures by hand, every method, resumed runs."""

import contextlib
import importlib.util
import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.methods import METHODS
from support.resumed import fit, tiny
from support.small_models import masks

from rigl_keras import diagnostics
from rigl_keras.diagnostics.callback import TopologyDiagnostics
from rigl_keras.flops.counting import count
from rigl_keras.masking import layer_kernels
from rigl_keras.masking.dead_units import warn_of_dead_units
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.methods.rigl import RigL
from rigl_keras.methods.srigl import SRigL

# 3 inputs, 2 outputs. The first update moves one of three connections, the
# second moves two.
START = np.array([[1, 0], [1, 0], [0, 1]])
FIRST = np.array([[1, 1], [0, 0], [0, 1]])
SECOND = np.array([[1, 0], [1, 0], [1, 0]])
WINDOW = dict(frequency=2, end_step=9)


def of(mask):
    return {"d": mask}


def test_by_hand():
    assert diagnostics.densities(of(START)) == {"d": 3 / 6, "all": 3 / 6}
    churn, overlap = diagnostics.churn, diagnostics.overlap
    assert churn(of(START), of(FIRST))["d"] == 1 / 3
    assert churn(of(FIRST), of(SECOND))["d"] == 2 / 3
    assert overlap(of(START), of(FIRST))["d"] == 2 / 3
    assert overlap(of(START), of(SECOND))["d"] == 2 / 3
    ever = diagnostics.ever_active
    assert ever(of(START))["d"] == 3 / 6
    assert ever(of(START), of(FIRST))["d"] == 4 / 6
    assert ever(of(START), of(FIRST), of(SECOND))["d"] == 5 / 6
    for mask, dead in ((START, (0, 0)), (FIRST, (0, 1)), (SECOND, (1, 0))):
        assert diagnostics.dead_units(mask) == dead


def test_rows_by_hand():
    layer, together = diagnostics.measure(
        20,
        of(SECOND),
        before=of(FIRST),
        initial=of(START),
        ever=diagnostics.explored(of(START), of(FIRST), of(SECOND)),
    )
    assert layer == {
        "step": 20,
        "layer": "d",
        "density": 3 / 6,
        "inference_flops": None,
        "ever_active": 5 / 6,
        "overlap": 2 / 3,
        "churn": 2 / 3,
        "grown": 2,
        "no_incoming": 1,
        "outputs": 2,
        "no_outgoing": 0,
        "inputs": 3,
        "loss_before": None,
        "loss_after": None,
    }
    assert tuple(layer) == diagnostics.COLUMNS
    assert together == {**layer, "layer": "all"}


def test_layers_weigh_as_much_as_they_have_entries():
    few, many = np.array([1, 1]), np.array([1, 0, 0, 0, 0, 0])
    moved = np.array([0, 1, 0, 0, 0, 0])
    old, new = {"a": few, "b": many}, {"a": few, "b": moved}
    assert diagnostics.densities(old)["all"] == 3 / 8
    assert diagnostics.churn(old, new) == {"a": 0, "b": 1, "all": 1 / 3}
    assert diagnostics.overlap(old, new) == {"a": 1, "b": 0, "all": 2 / 3}
    assert diagnostics.ever_active(old, new)["all"] == 4 / 8
    nothing = {"a": np.zeros(2)}
    assert diagnostics.churn(nothing, nothing) == {"a": 0, "all": 0}
    assert diagnostics.overlap(nothing, nothing) == {"a": 1, "all": 1}


@pytest.mark.parametrize(
    "layer, shape, axes",
    [
        (layers.Dense(2), (None, 3), ((0,), (1,))),
        (layers.Conv2D(4, 3), (None, 8, 8, 5), ((2,), (3,))),
        (layers.Conv1DTranspose(4, 3), (None, 8, 5), ((2,), (1,))),
        (
            layers.DepthwiseConv2D(3, depth_multiplier=2),
            (None, 8, 8, 5),
            ((2,), (2, 3)),
        ),
        (
            layers.EinsumDense("abc,cde->abde", (None, 2, 3)),
            (None, 7, 5),
            ((0,), (1, 2)),
        ),
    ],
    ids=lambda x: type(x).__name__ if hasattr(x, "build") else None,
)
def test_units_of_a_kernel(layer, shape, axes):
    """A unit is dead only without any of its entries in the mask."""
    layer.build(shape)
    (kernel,) = layer_kernels.find_kernels(layer)
    inputs, outputs = axes
    assert kernel.input_axes == inputs
    assert kernel.output_axes == outputs
    mask = np.ones(layer.kernel.shape)
    options = dict(input_axes=inputs, output_axes=outputs)
    assert diagnostics.dead_units(mask, **options) == (0, 0)
    first = [slice(None)] * mask.ndim
    for axis in outputs:
        first[axis] = 0
    mask[tuple(first)] = 0
    assert diagnostics.dead_units(mask, **options) == (1, 0)
    mask = np.ones(layer.kernel.shape)
    first = [slice(None)] * mask.ndim
    for axis in inputs:
        first[axis] = 0
    mask[tuple(first)] = 0
    cut = mask.shape[outputs[1]] if set(inputs) & set(outputs) else 0
    assert diagnostics.dead_units(mask, **options) == (cut, 1)


@pytest.mark.parametrize(
    "cut, named",
    [
        # A tenth of the units, and at least two.
        (dict(conv=1, depthwise=1, head=1), ""),
        (dict(conv=2), "'conv' 2 of 20. "),
        (dict(conv=3, depthwise=2), "3 of 20, 'sep/depthwise_kernel' 2 of 20."),
    ],
)
def test_many_units_without_inputs_are_named(cut, named):
    x = inputs = keras.Input((4, 4, 3))
    x = layers.Conv2D(20, 1, name="conv")(x)
    x = layers.SeparableConv2D(20, 3, name="sep")(x)
    x = layers.LSTM(4, name="lstm")(layers.Reshape((4, 20))(x))
    x = layers.Dense(2, name="head")(x)
    model = sparsify(keras.Model(inputs, x), 1.0)
    found = masked_layers(model).named
    # Gates of the LSTM have another kernel, too.
    cut = {"conv": 0, "depthwise": 0, "head": 0, "lstm/cell/kernel": 8} | cut
    cut["sep/depthwise_kernel"] = cut.pop("depthwise")
    for name, units in cut.items():
        mask = found[name].mask.numpy()
        axis = found[name].found.output_axes[0]
        np.moveaxis(mask, axis, 0)[:units] = 0
        found[name].assign_mask(mask)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert warn_of_dead_units("RigL", found) == bool(named)
    text = "".join(str(warning.message) for warning in said)
    assert named in text and bool(text) == bool(named)
    example = "'sep/depthwise_kernel'" if "sep" in named else "'conv'"
    assert (f"densities={{{example}: 1.0}}" in text) == bool(named)
    assert ("as the RigL paper does" in text) == ("sep" in named)


@pytest.mark.parametrize(
    "method, times", [(RigL, 1), (SRigL, 0)], ids=["RigL", "SRigL"]
)
def test_lost_units_are_said_once(method, times):
    """SRigL ablates units on purpose."""
    model = tiny(run_eagerly=True)
    first = masked_layers(model)[0]
    mask = first.mask.numpy()
    mask[:, :2] = 0
    first.assign_mask(mask)
    update = method(**WINDOW | dict(drop_fraction=0.0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(model, [update], 1)
        fit(model, [update], 2, 1)
    said = [s for s in said if "no active input" in str(s.message)]
    assert len(said) == times
    assert all("'hidden' 2 of 8" in str(s.message) for s in said)


def test_lost_units_in_a_custom_loop():
    """They are said after an update, when the record is fetched."""
    model = tiny()
    first = masked_layers(model)[0]
    mask = first.mask.numpy()
    mask[:, :2] = 0
    first.assign_mask(mask)
    update = RigL(**WINDOW, drop_fraction=0.0)
    update.attach(model, model.optimizer)
    variables = model.trainable_variables
    gradients = [tf.ones(v.shape) for v in variables]
    update.fetch()
    for step in range(3):
        update.update(gradients, variables)
        said = pytest.warns(UserWarning, match="With RigL .*'hidden' 2 of 8")
        with said if step == 2 else contextlib.nullcontext():
            update.fetch()


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: diagnostics.churn(of(START), {"e": START}),
            "same layers and shapes",
        ),
        (
            lambda: diagnostics.overlap(of(START), of(START[:2])),
            "same layers and shapes",
        ),
        (lambda: diagnostics.densities({"all": START}), "rename the layer"),
        (lambda: diagnostics.dead_units(np.ones(3)), "has no axes"),
        (
            lambda: TopologyDiagnostics().variables,
            "call set_model",
        ),
        (
            lambda: TopologyDiagnostics().set_model(
                keras.Sequential([keras.Input((3,)), layers.Dense(2)])
            ),
            "rigl_keras.sparsify",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_files_need_their_packages(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"rigl_keras\[experiments\]"):
        TopologyDiagnostics("anywhere")
    TopologyDiagnostics()  # without files


class Batches(keras.callbacks.Callback):
    """Records the masks at the start and after every batch."""

    def on_train_begin(self, logs=None):
        self.masks = [masks(self.model)]

    def on_train_batch_end(self, batch, logs=None):
        self.masks.append(masks(self.model))


@pytest.mark.slow_but("RigL-SG-first", "RigL-last", "MagnitudePruning-first")
@pytest.mark.parametrize(
    "method, first",
    [*((method, True) for method in METHODS), ("RigL", False)],
    ids=lambda x: x if isinstance(x, str) else ("first" if x else "last"),
)
def test_rows_are_those_of_the_masks(method, first):
    """Rows agree with masks of every batch, in any order of callbacks."""
    # Only two methods have a graph: one with varying counts, one that prunes.
    model = tiny(run_eagerly=method not in ("RigL-SG", "MagnitudePruning"))
    record, topology = Batches(), TopologyDiagnostics()
    update = METHODS[method](**WINDOW)
    callbacks = [topology, *update] if first else [*update, topology]
    fit(model, [*callbacks, record], 2)
    history = record.masks
    due = [t for t in range(10) if update and update[0].is_due(t)]
    assert bool(due) == (method != "static")
    rows = {(r["step"], r["layer"]): r for r in topology.rows}
    names = [*history[0], "all"]
    assert [*rows] == [(t, n) for t in [0, *due] for n in names]
    cost = count(model)
    for step, name in rows:
        row, chosen = rows[step, name], [name]
        if name == "all":
            chosen = names[:-1]
        at = step + 1 if step else 0

        def joined(masks, chosen=chosen):
            return np.concatenate([masks[n].ravel() for n in chosen]) > 0

        now, old, start = (joined(history[i]) for i in (at, max(at - 1, 0), 0))
        ever = np.any([joined(past) for past in history[: at + 1]], axis=0)
        assert row["density"] == np.mean(now)
        assert row["ever_active"] == np.mean(ever)
        assert row["overlap"] == np.sum(start & now) / np.sum(start)
        assert row["churn"] == np.sum(now & ~old) / np.sum(old)
        assert row["grown"] == np.sum(now & ~old)
        flops = [
            layer.flops_at(history[at][layer.name].mean())
            for layer in cost.layers
            if layer.name in chosen
        ]
        assert row["inference_flops"] == pytest.approx(sum(flops))
        kernels = [history[at][n] for n in chosen]
        dead = sum(int((~k.any(0)).sum()) for k in kernels)
        unread = sum(int((~k.any(1)).sum()) for k in kernels)
        assert (row["no_incoming"], row["no_outgoing"]) == (dead, unread)


def test_logs():
    model, topology = tiny(), TopologyDiagnostics()
    logs = keras.callbacks.History()
    fit(model, [RigL(**WINDOW), topology, logs], 2)
    whole = {r["step"]: r for r in topology.rows if r["layer"] == "all"}
    for key in ("ever_active", "churn"):
        assert logs.history[key] == [whole[4][key], whole[8][key]]
    assert whole[8]["ever_active"] > whole[0]["ever_active"]


def test_updates_of_one_execution_are_one():
    model = tiny()
    model.compile(model.optimizer, "mse", steps_per_execution=5)
    record, topology = Batches(), TopologyDiagnostics()
    update = RigL(frequency=2, drop_fraction=0.5, end_step=99)
    fit(model, [update, topology, record], 2)
    whole = [r for r in topology.rows if r["layer"] == "all"]
    assert [r["step"] for r in whole] == [0, 4, 8]  # of 2, 4 and 6, 8
    old, now = record.masks[:2]
    grown = sum(((now[n] > 0) & (old[n] == 0)).sum() for n in now)
    assert whole[1]["grown"] == grown > 0


@pytest.mark.slow
def test_files(tmp_path):
    topology = TopologyDiagnostics(tmp_path)
    update = RigL(**WINDOW)
    fit(tiny(), [topology, update], 2)
    path = tmp_path / "topology.csv"
    assert diagnostics.read_rows(path) == topology.rows
    numbers = [
        value
        for row in topology.rows
        for value in row.values()
        if isinstance(value, (int, float))
    ]
    assert all(map(math.isfinite, numbers))
    assert "nan" not in path.read_text()
    losses = {
        r["step"]: [r["loss_before"], r["loss_after"]]
        for r in topology.rows
        if r["layer"] == "all"
    }
    assert losses.pop(0) == [None, None]
    assert losses == {step: pair for step, *pair in update.update_losses}

    drawn = diagnostics.figures(path, tmp_path / "again")
    assert [p.name for p in drawn] == [
        "density.png", "exploration.png", "dead_units.png", "churn.png",
        "loss.png",
    ]  # fmt: skip
    for again in drawn:
        pixels = tf.io.decode_png(again.read_bytes()).numpy()
        assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels)) > 20
        assert again.read_bytes() == (tmp_path / again.name).read_bytes()

    (events,) = tmp_path.glob("events*")
    scalars = {}
    for record in tf.data.TFRecordDataset(str(events)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            number = float(tf.make_ndarray(value.tensor))
            scalars[value.tag, event.step] = number
    for row in topology.rows:
        for key in ("density", "grown", "ever_active"):
            tag = f"topology/{key}/{row['layer']}"
            assert scalars[tag, row["step"]] == pytest.approx(row[key])
    (_, _, after), *_ = update.update_losses
    assert scalars["topology/loss_after/all", 2] == pytest.approx(after)

    # A row that was only partly written when the run was interrupted.
    text = path.read_text()
    path.write_text(text[: text.rindex("all") + 6])
    assert diagnostics.read_rows(path) == topology.rows[:-3]
    path.write_text("step,loss\n")
    with pytest.raises(ValueError, match="its columns must be"):
        diagnostics.read_rows(path)


def eager():
    """Returns the model to resume, run eagerly to save time."""
    return tiny(run_eagerly=True)


def test_static_masks_are_drawn_too(tmp_path):
    fit(eager(), [TopologyDiagnostics(tmp_path)], 1)
    drawn = {p.name for p in tmp_path.glob("*.png")}
    assert drawn == {"density.png", "exploration.png", "dead_units.png"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Returns the rows and the file of ten steps of RigL."""
    path = tmp_path_factory.mktemp("straight")
    topology = TopologyDiagnostics(path, draw=False)
    fit(eager(), [RigL(**WINDOW), topology], 2)
    assert not any(path.glob("*.png"))
    return topology.rows, (path / "topology.csv").read_text()


def half(path=None):
    """Trains five of these steps; returns the model and the callback."""
    model, topology = eager(), TopologyDiagnostics(path, draw=False)
    fit(model, [RigL(**WINDOW), topology], 1)
    return model, topology


def other_half(model, topology):
    fit(model, [RigL(**WINDOW), topology], 2, initial_epoch=1)


@pytest.mark.slow
def test_resumed_from_its_files(straight, tmp_path):
    rows, text = straight
    model, _ = half(tmp_path)
    with (tmp_path / "topology.csv").open("a") as file:
        # Updates after the checkpoint, which the resumed run repeats.
        last = text.splitlines(keepends=True)[-3:]
        file.writelines(last)
        file.write("9,hid")
    topology = TopologyDiagnostics(tmp_path, draw=False)
    other_half(model, topology)
    assert topology.rows == rows
    assert (tmp_path / "topology.csv").read_text() == text


def test_resumed_from_a_checkpoint(straight, tmp_path):
    """The variables are enough; earlier rows are read from the file."""
    rows, _ = straight
    model, topology = half()
    saved = tf.train.Checkpoint(state=topology.variables).save(tmp_path / "c")
    topology = TopologyDiagnostics()
    topology.set_model(model)
    restored = tf.train.Checkpoint(state=topology.variables).restore(saved)
    restored.assert_consumed()
    other_half(model, topology)
    start, later = topology.rows[:3], topology.rows[3:]
    assert later == [r for r in rows if r["step"] > 5]
    at_four = [r for r in rows if r["step"] == 4]
    for ours, theirs in zip(start, at_four, strict=True):
        nothing = {"churn": 0.0, "grown": 0}
        unknown = {"loss_before": None, "loss_after": None}
        assert ours == {**theirs, "step": 5, **nothing, **unknown}


@pytest.mark.slow
def test_the_same_callback_goes_on(straight):
    rows, _ = straight
    model, topology = half()
    other_half(model, topology)
    assert topology.rows == rows


@pytest.mark.slow_but("of another step")
@pytest.mark.parametrize("files", ["none", "of another step"])
def test_otherwise_it_begins_anew(files, straight, tmp_path):
    """It warns, and keeps the earlier file."""
    model, topology = half(tmp_path if files != "none" else None)
    if files == "of another step":
        archive = dict(np.load(tmp_path / "topology.npz"))
        np.savez(tmp_path / "topology.npz", **{**archive, "step": 4})
    earlier = topology.rows if files == "of another step" else []
    anew = TopologyDiagnostics(tmp_path, draw=False)
    with pytest.warns(UserWarning, match="begins at step 5 without a record"):
        other_half(model, anew)
    assert anew.rows[: len(earlier)] == earlier
    start = anew.rows[len(earlier)]
    assert start["step"] == 5 and start["overlap"] == 1
    assert start["ever_active"] == start["density"]
    assert diagnostics.read_rows(tmp_path / "topology.csv") == anew.rows


@pytest.mark.slow
def test_from_step_0_the_record_is_new(straight, tmp_path):
    _, text = straight
    _, topology = half(tmp_path)
    fit(eager(), [RigL(**WINDOW), topology], 2)  # the callback is used again
    assert (tmp_path / "topology.csv").read_text() == text


@pytest.mark.slow
def test_flops_that_cannot_be_counted_stay_empty(tmp_path):
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    model = sparsify(model, 0.5)
    model.compile("sgd", "mse", run_eagerly=True)
    x, y = np.zeros((4, 6, 6, 3)), np.zeros((4, 4))
    topology = TopologyDiagnostics(tmp_path)  # its figure lacks FLOPs
    with pytest.warns(UserWarning, match="inference_flops stays empty"):
        model.fit(x, y, callbacks=[topology], verbose=0)
    rows = diagnostics.read_rows(tmp_path / "topology.csv")
    assert [row["inference_flops"] for row in rows] == [None, None]
    assert rows[0]["density"] == 0.5
