"""Runs from gin files to results, also resumed, refused and repeated."""

import csv
import json
import os
import pathlib
import re
import shutil
import signal
import time

import keras
import numpy as np
import pytest

import gin
import rigl_keras
from rigl_keras import diagnostics
from rigl_keras.experiments.benchmarks import (
    input_pipeline,
    mask_updates,
    training_steps,
)
from rigl_keras.experiments.runs import config, train_command
from rigl_keras.experiments.runs.run_directory import RunDirectory

GIN = pathlib.Path(rigl_keras.__file__).parents[1] / "gin"

# Two epochs of 23 steps on digits, with dropout so that its state matters.
SMALL = [
    "train.model = @small_network",
    "train.epochs = 2",
    "small_network.dropout = 0.3",
    "RigL.frequency = 5",
    "RigL.end_step = 60",
    "train.diagnostics = False",  # its figures take seconds
]
RECORDED = "train.diagnostics = True"


def small_run(run_dir, *more, **options):
    return train_command.run(
        bindings=[*SMALL, *more], run_dir=run_dir, **options
    )


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def weights(run_dir):
    return keras.models.load_model(run_dir / "model.keras").get_weights()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, blank_figures):
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    return run_dir, small_run(run_dir, RECORDED, seed=3)


def test_a_run_leaves_a_full_record(finished):
    run_dir, result = finished
    assert json.loads((run_dir / "result.json").read_text()) == result
    assert {
        "method", "model", "dataset", "seed", "density", "test_accuracy",
        "validation_accuracy", "inference_flops_ratio",
        "training_flops_ratio", "steps", "seconds", "layers", "versions",
        "settings",
    } <= set(result)  # fmt: skip
    assert (result["method"], result["seed"]) == ("RigL", 3)
    assert result["density"] == pytest.approx(0.1, abs=1e-4)
    assert result["steps"] == 46
    assert 0.1 < result["inference_flops_ratio"] < 0.3
    assert result["training_flops_ratio"] > result["inference_flops_ratio"]
    assert result["settings"]["method"]["frequency"] == 5
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert [row["step"] for row in rows] == ["23", "46"]
    assert {"loss", "val_accuracy", "density", "grown", "learning_rate"} <= set(
        rows[0]
    )
    operative = (run_dir / "operative_config.gin").read_text()
    assert "sgd.momentum = 0.9" in operative  # a default in use
    assert any((run_dir / "tensorboard").rglob("events*"))
    assert any((run_dir / "checkpoints").iterdir())
    topology = {path.name for path in (run_dir / "topology").iterdir()}
    assert {
        "topology.csv", "density.png", "exploration.png", "churn.png",
        "dead_units.png",
    } <= topology  # fmt: skip
    rows = diagnostics.read_rows(run_dir / "topology" / "topology.csv")
    updates = [row for row in rows if row["layer"] == "all"]
    assert [row["step"] for row in updates] == list(range(0, 46, 5))
    last = updates[-1]
    assert last["inference_flops"] == pytest.approx(result["inference_flops"])
    assert last["density"] == pytest.approx(result["density"])
    table = train_command.table(result)
    for label in ("test accuracy", "density", "parameters", "inference FLOPs"):
        assert label in table


def test_a_finished_run_is_not_repeated(finished, capsys):
    run_dir, result = finished
    before = (run_dir / "result.json").stat().st_mtime_ns
    assert small_run(run_dir, RECORDED, seed=3) == result
    assert "not repeated" in capsys.readouterr().out
    assert (run_dir / "result.json").stat().st_mtime_ns == before


SCRIPT = """
import sys, tensorflow as tf
import support.small_models  # which has gin know the small network
tf.config.experimental.enable_op_determinism()
from rigl_keras.experiments.runs import train_command
train_command.run(bindings=sys.argv[2].split(";"), run_dir=sys.argv[1],
            seed=4, resume=len(sys.argv) > 3)
"""


@pytest.mark.slow
def test_killed_and_resumed(fresh, tmp_path):
    """A run that is killed within an epoch ends as an uninterrupted run."""
    bindings = ";".join([*SMALL, RECORDED, "train.epochs = 4"])

    def start(run_dir, *resume):
        folder = pathlib.Path(__file__).parent
        return fresh.start("-c", SCRIPT, run_dir, bindings, *resume, cwd=folder)

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    _, errors = (process := start(straight)).communicate()
    assert process.returncode == 0, errors

    process = start(killed)
    deadline = time.monotonic() + 120
    # Once the second epoch is saved, the third begins.
    while not (killed / "checkpoints" / "epoch-2.index").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "result.json").exists()
    out, errors = (process := start(killed, "--resume")).communicate()
    assert process.returncode == 0, errors
    assert "Resuming" in out and "at epoch" in out
    assert re.search(
        r"^time   about \d+ \S+, at the pace of epochs 1", out, re.M
    )

    for old, new in zip(weights(straight), weights(killed), strict=True):
        np.testing.assert_array_equal(old, new)
    losses = []
    for run_dir in (straight, killed):
        with (run_dir / "metrics.csv").open(newline="") as file:
            losses.append([row["loss"] for row in csv.DictReader(file)])
    assert losses[0] == losses[1] and len(losses[0]) == 4
    table = pathlib.Path("topology") / "topology.csv"
    assert (killed / table).read_text() == (straight / table).read_text()


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped before its result, with two epochs saved."""
    run_dir = tmp_path_factory.mktemp("runs") / "stopped"

    def stop(run, result):
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "write_result", stop)
        with pytest.raises(Interrupted):
            small_run(run_dir, seed=3)
    gin.clear_config()
    return run_dir


@pytest.fixture
def interrupted(stopped, tmp_path):
    """A copy of that run, which a test may change."""
    return pathlib.Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.mark.slow
def test_a_truncated_checkpoint_falls_back(interrupted, finished, capsys):
    (data,) = interrupted.glob("checkpoints/epoch-2.data*")
    data.write_bytes(data.read_bytes()[:1000])
    result = small_run(interrupted, seed=3, resume=True)
    out = capsys.readouterr().out
    assert "epoch-2 cannot be read" in out and "the one before" in out
    assert "Resuming" in out and "epoch 2 of 2" in out
    assert ", at the pace of epoch 1\n" in out
    assert result["test_accuracy"] == pytest.approx(
        finished[1]["test_accuracy"], abs=0.05
    )
    with (interrupted / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]


def test_unreadable_checkpoints(interrupted):
    for data in interrupted.glob("checkpoints/epoch-*.data*"):
        data.write_bytes(b"")
    with pytest.raises(ValueError, match="None of the checkpoints"):
        small_run(interrupted, seed=3, resume=True)


def test_run_directories_are_not_mixed(interrupted, tmp_path):
    with pytest.raises(ValueError, match="unfinished run.*--resume"):
        small_run(interrupted, seed=3)
    with pytest.raises(ValueError, match="another configuration.*seed"):
        small_run(interrupted, seed=5, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        small_run(tmp_path / "file" / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        small_run(tmp_path / "mine")


@pytest.mark.slow
def test_data_order_depends_on_the_seed(tmp_path):
    results = [
        small_run(tmp_path / str(i), "train.epochs = 1", seed=seed)
        for i, seed in enumerate((1, 2))
    ]
    assert results[0]["test_loss"] != results[1]["test_loss"]


@pytest.mark.slow_but("bindings2-dense-1.0")
@pytest.mark.parametrize(
    "bindings, method, density",
    [
        ([*SMALL, "train.method = @SET"], "SET", 0.1),
        (["train.method = None"], "static", 0.1),
        (["train.method = None", "train.density = None"], "dense", 1.0),
    ],
)
def test_methods(tmp_path, bindings, method, density):
    bindings = [*bindings, "train.epochs = 1", "SET.frequency = 5"]
    result = train_command.run(bindings=bindings, run_dir=tmp_path / "run")
    assert result["method"] == method
    assert result["density"] == pytest.approx(density, abs=1e-3)


@pytest.mark.parametrize(
    "path", sorted(GIN.glob("*.gin")), ids=lambda p: p.stem
)
def test_gin_files_parse(path):
    config.parse([str(path)], [])
    if path.stem.endswith("_wrn"):
        assert gin.query_parameter("train.epochs") == 250
        assert gin.query_parameter("sgd.decay_every") == 30_000
        assert gin.query_parameter("wide_resnet.weight_decay") == 5e-4
    if path.stem.endswith("_resnet50"):
        assert gin.query_parameter("train.label_smoothing") == 0.1
        assert gin.query_parameter("sgd.decay_every") == 20_000
        assert gin.query_parameter("sgd.warmup_steps") == 1_760
        assert gin.query_parameter("resnet50.weight_decay") == 1e-4
    if path.stem == "rigl_erk_wrn":
        method = gin.query_parameter("train.method").scoped_configurable_fn()
        assert isinstance(method, rigl_keras.RigL)
        assert (method.frequency, method.end_step) == (100, 65_918)
        assert (method.drop_fraction, method.decay) == (0.3, "cosine")


@pytest.mark.parametrize(
    "files, bindings, message",
    [
        (["gin/rigl_erk_wnr.gin"], [], "Did you mean gin/rigl_erk_wrn.gin"),
        ([], ["train.densty = 0.1"], "Did you mean 'density'"),
        ([], ["RigL.frequncy = 5"], "Did you mean 'frequency'"),
        ([], ["trian.density = 0.1"], "Did you mean 'train'"),
        ([], ["train.density"], "train.epochs = 2"),
        ([], ["train.dataset = 'cifar11'"], "cifar10"),
        ([], ["train.epochs = 0"], "at least 1"),
        ([], ["train.model = 3"], "@wide_resnet"),
        ([], ["train.method = 'RigL'"], "@RigL"),
        ([], ["train.density = 0.0"], r"\(0, 1\]"),
        ([], ["train.density = None"], "density=None"),
        ([], ["RigL.frequency = 0"], "frequency"),
        ([], ["train.distribution = 'erkk'"], "Did you mean 'erk'"),
    ],
)
def test_bad_configurations(tmp_path, files, bindings, message):
    with pytest.raises(ValueError, match=message):
        train_command.run(files, bindings=bindings, run_dir=tmp_path / "run")
    # A refused run leaves nothing.
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path, fresh):
    done = fresh(
        *("-m", "rigl_keras.experiments.runs.train_command"),
        *("--density=7", f"--run_dir={tmp_path / 'run'}"),
    )
    assert done.returncode == 2
    assert "train: density is the fraction" in done.stderr
    assert "Traceback" not in done.stderr and "<function" not in done.stderr


@pytest.mark.slow
def test_benchmarks_run():
    seconds = training_steps.measure_steps(
        depth=10, width=1, batch_size=2, rounds=1, steps_per_execution=2
    )
    assert set(seconds) == {"dense", "RigL", "update"}
    assert (
        sum(np.prod(s) for s in mask_updates._resnet50_shapes()) == 23_652_032
    )
    assert input_pipeline.measure_input_pipeline("digits", steps=3) > 0
