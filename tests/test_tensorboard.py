"""TensorBoard shows all values of a run, once, and by steps."""

import csv
import functools
import gc
import pathlib
import platform
import subprocess

import keras
import numpy as np
import pytest
import tensorflow as tf

import gin
import rigl_keras
from rigl_keras import _files, diagnostics, flops
from rigl_keras.diagnostics.events import event_files, forget_events
from rigl_keras.experiments.runs import train, train_command
from rigl_keras.experiments.runs.checkpoints import Checkpoints
from rigl_keras.experiments.runs.density_figure import density_figure
from rigl_keras.experiments.runs.run_directory import RunDirectory

# Two epochs of 23 steps on digits.
SMALL = [
    "train.model = @mlp",
    "mlp.hidden = (24, 16)",
    "train.density = 0.3",
    "train.epochs = 2",
    "RigL.frequency = 5",
    "RigL.end_step = 60",
    "train.diagnostics = False",
]
RECORDED = "train.diagnostics = True"
KINDS = {
    "RigL": [],
    "dense": ["train.method = None", "train.density = None"],
    "static": ["train.method = None"],
    "SNFS": ["train.method = @SNFS", "SNFS.frequency = 5"],
    "MagnitudePruning": [
        "train.method = @MagnitudePruning",
        "train.density = 1.0",
        "MagnitudePruning.schedule = @SparsityRamp()",
        "SparsityRamp.final_density = 0.2",
        "SparsityRamp.begin_step = 5",
        "SparsityRamp.end_step = 40",
        "SparsityRamp.frequency = 5",
    ],
    "small-dense": [
        "train.model = @small_network",
        "train.method = None",
        "train.small_dense = True",
    ],
}
LEARNING = ("accuracy", "loss", "learning_rate", "seconds")
SPARSITY = (
    "density",
    "drop_fraction",
    "grown",
    "inference_flops_ratio",
    "training_flops_ratio",
)
TAGS = {f"learning/{column}": column for column in LEARNING}
TAGS |= {f"sparsity/{column}": column for column in SPARSITY}
FIGURE = "sparsity/layer_density"


class Interrupted(Exception):
    pass


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def small_run(run_dir, *more, **options):
    return train_command.run(
        bindings=[*SMALL, *more], run_dir=run_dir, **options
    )


def events(folder):
    """Returns `{tag: [(step, value)]}`, as TensorBoard reads them."""
    from tensorboard.backend.event_processing import event_accumulator

    reader = event_accumulator.EventAccumulator(
        str(folder), size_guidance={"tensors": 0}
    )
    reader.Reload()
    return {
        tag: [
            (event.step, tf.make_ndarray(event.tensor_proto))
            for event in reader.Tensors(tag)
        ]
        for tag in reader.Tags()["tensors"]
    }


def metrics(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def check_complete(run_dir, result):
    """Checks that TensorBoard shows each value of metrics.csv once."""
    rows = metrics(run_dir)
    shown = events(run_dir / "tensorboard" / "train")
    assert set(TAGS) <= set(shown)
    validated = events(run_dir / "tensorboard" / "validation")
    assert set(validated) == {"learning/accuracy", "learning/loss"}
    columns = {("train", tag): column for tag, column in TAGS.items()}
    columns |= {
        ("validation", f"learning/{name}"): f"val_{name}"
        for name in ("accuracy", "loss")
    }
    steps = [int(row["step"]) for row in rows]
    assert all(a < b for a, b in zip([0, *steps], steps, strict=False))
    for (name, tag), column in columns.items():
        points = (shown if name == "train" else validated)[tag]
        assert [step for step, _ in points] == steps, tag
        np.testing.assert_allclose(
            [value for _, value in points],
            [float(row[column]) for row in rows],
            rtol=1e-6,
            err_msg=tag,
        )
    tested = events(run_dir / "tensorboard" / "test")
    ((step, accuracy),) = tested["learning/accuracy"]
    assert step == result["steps"] == steps[-1]
    assert accuracy == pytest.approx(result["test_accuracy"])
    check_figures(shown[FIGURE], [0, *steps], len(result["layers"]))
    last = rows[-1]
    for name in ("density", "inference_flops_ratio", "training_flops_ratio"):
        assert float(last[name]) == pytest.approx(result[name], rel=1e-6), name


def check_figures(figures, steps, layers):
    assert [step for step, _ in figures] == steps
    for _, (width, height, png) in figures:
        image = tf.io.decode_png(png).numpy()
        assert image.shape == (int(height), int(width), 3)
        assert 600 < int(width) < 1200
        assert int(height) == pytest.approx(120 * (1.35 + 0.2 * layers), abs=1)
        assert image.min() == 0 and image.max() == 255


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    @functools.cache
    def of(kind):
        run_dir = tmp_path_factory.mktemp("runs") / kind
        result = small_run(run_dir, *KINDS[kind], seed=3)
        gin.clear_config()
        return run_dir, result

    return of


@pytest.mark.slow_but("SNFS")
@pytest.mark.parametrize("kind", KINDS)
def test_all_is_shown(kind, finished):
    run_dir, result = finished(kind)
    assert result["method"] == kind
    check_complete(run_dir, result)
    assert not (run_dir / "topology").exists()
    rows = metrics(run_dir)
    density, dropped, grown = (
        [float(row[column]) for row in rows]
        for column in ("density", "drop_fraction", "grown")
    )
    first, last = (float(row["training_flops_ratio"]) for row in rows)
    assert first < last
    if kind in ("dense", "static", "small-dense"):
        assert first == pytest.approx(last / 2)
    if kind == "MagnitudePruning":
        assert density[0] > density[1] == pytest.approx(0.2, abs=1e-3)
        (_, before), (_, after) = (
            (step, sum(counts.values()))
            for step, counts in RunDirectory(
                run_dir,
                config=(run_dir / "config.gin").read_text(),
                resume=True,
            ).trajectory[-2:]
        )
        assert dropped[1] == pytest.approx(1 - after / before) != 0
        assert grown == [0, 0]
    else:
        expected = 1.0 if kind == "dense" else 0.3
        assert density == pytest.approx([expected] * 2, rel=0.1)
        updated = kind in ("RigL", "SNFS")
        assert all(f > 0 for f in dropped) == updated
        assert all(n > 0 for n in grown) == updated


@pytest.mark.slow
def test_a_lottery_ticket(finished, tmp_path):
    source = str(finished("RigL")[0])
    result = small_run(
        tmp_path / "run",
        "train.method = None",
        f"train.masks_from = {source!r}",
        f"train.weights_from = {source!r}",
    )
    assert result["method"] == "lottery"
    check_complete(tmp_path / "run", result)


def interrupt(run_dir, patch, *more):
    """Makes a run that has trained two epochs, but saved only one."""
    save = Checkpoints.save

    def stop(checkpoints, epoch):
        if epoch == 2:
            raise Interrupted
        save(checkpoints, epoch)

    with patch.context() as patched:
        patched.setattr(Checkpoints, "save", stop)
        with pytest.raises(Interrupted):
            small_run(run_dir, *more, seed=3)
    gin.clear_config()


@pytest.mark.slow
def test_a_killed_run_shows_each_epoch_once(finished, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    interrupt(run_dir, monkeypatch, RECORDED)
    # The log has more epochs than the checkpoint.
    (steps,) = {
        tuple(step for step, _ in points)
        for tag, points in events(run_dir / "tensorboard" / "train").items()
        if tag != FIGURE
    }
    assert steps == (23, 46)
    topology = run_dir / "topology"
    assert max(s for s, _ in events(topology)["topology/grown/all"]) == 45
    # As after a kill.
    for path in (*run_dir.glob("tensorboard/*/*"), *event_files(topology)):
        path.write_bytes(path.read_bytes()[:-10])

    monkeypatch.setattr(diagnostics, "figures", lambda *_: [])  # slow
    result = small_run(run_dir, RECORDED, seed=3, resume=True)
    check_complete(run_dir, result)
    for column in ("accuracy", "grown", "training_flops_ratio"):
        straight, resumed = (
            [float(row[column]) for row in metrics(path)]
            for path in (finished("RigL")[0], run_dir)
        )
        np.testing.assert_allclose(resumed, straight, rtol=0.05)
    rows = diagnostics.read_rows(topology / "topology.csv")
    shown = events(topology)
    for column in ("density", "grown", "loss_after"):
        wanted = [
            (row["step"], pytest.approx(row[column], rel=1e-6))
            for row in rows
            if row["layer"] == "all" and row[column] is not None
        ]
        assert shown[f"topology/{column}/all"] == wanted, column


def test_a_run_of_an_earlier_version(tmp_path, monkeypatch):
    """Its metrics.csv has fewer columns, and its events are by epochs."""
    run_dir = tmp_path / "run"
    interrupt(run_dir, monkeypatch, *KINDS["static"])
    new = {"density", "grown", "drop_fraction", "training_flops_ratio"}
    rows = metrics(run_dir)
    names = [name for name in rows[0] if name not in new]
    names.append("density")  # as after resuming it once
    rows = [row | {"density": ""} for row in rows]
    with (run_dir / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    folder = run_dir / "tensorboard" / "train"
    for path in event_files(folder):
        path.unlink()
    with tf.summary.create_file_writer(str(folder)).as_default():
        tf.summary.scalar("epoch_loss", 1.0, step=0)

    small_run(run_dir, *KINDS["static"], seed=3, resume=True)
    shown = {
        tag: [step for step, _ in points]
        for tag, points in events(folder).items()
    }
    assert "epoch_loss" not in shown
    for tag, column in TAGS.items():
        assert shown[tag] == ([46] if column in new else [23, 46]), tag
    first, second = metrics(run_dir)
    assert first["density"] == "" and float(second["density"]) < 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up")
def test_a_process_that_does_not_write(tmp_path):
    run = RunDirectory(tmp_path / "run", config="", resume=False, writes=False)
    result = train.train(
        run,
        model=rigl_keras.models.mlp,
        dataset="digits",
        method=functools.partial(rigl_keras.RigL, frequency=5),
        density=0.3,
        epochs=1,
    )
    assert 0 < result["training_flops_ratio"] < 1
    assert not list(tmp_path.iterdir())
    gc.collect()  # deletes old checkpoints while the filter is set


def test_the_figure_shows_densities():
    network = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, name="masked"),
            keras.layers.Dense(16, name="another"),
            keras.layers.Dense(10, name="plain"),
        ]
    )
    layers = flops.count(network).layers
    start = {"masked": 128 // 2, "another": 256 // 4}
    image = density_figure(layers, start, first=start, step=7)
    blue = (np.abs(image.astype(int) - (0, 0x72, 0xB2)) < 9).all(axis=-1)
    bars = blue[100:].sum(axis=1)  # below the legend
    quarter, half = np.percentile(bars[bars > 0], [25, 75])
    assert half / quarter == pytest.approx(2, rel=0.05)
    # A changed layer is marked; a network without masks has no blue bars.
    moved = density_figure(layers, start | {"masked": 32}, first=start, step=7)
    assert not np.array_equal(moved, image)
    dense = density_figure(layers, {}, first={}, step=7)
    assert dense.shape == image.shape
    assert (dense[..., 2] == dense[..., 0]).all()  # black and white


def test_only_a_runs_own_events_are_forgotten(tmp_path):
    def write(tag):
        writer = tf.summary.create_file_writer(str(tmp_path))
        with writer.as_default():
            for step in range(4):
                tf.summary.scalar(tag, step, step=step)
        writer.close()

    write("mine/a")
    write("theirs/a")
    forget_events(tmp_path, first_step=2, prefix="mine/")
    shown = events(tmp_path)
    assert [step for step, _ in shown["mine/a"]] == [0, 1]
    assert [step for step, _ in shown["theirs/a"]] == [0, 1, 2, 3]
    assert len(list(pathlib.Path(tmp_path).iterdir())) == 2


def test_what_a_killed_process_left_goes_with_nothing_to_forget(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = tmp_path / f"{_files.UNFINISHED}{platform.node()}-{gone.pid}"
    left.mkdir()
    forget_events(tmp_path, first_step=2, prefix="mine/")
    assert not list(tmp_path.iterdir())
