"""Runs that are killed, and disks that are full: nothing is lost.

This file is a program, too: a server that imports TensorFlow once, runs none
of it, and starts each run in a fork, which it may kill.
"""

import csv
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

KILLS = 20  # at random moments
AIMED = 6  # of these, while a checkpoint is being written
# Where a run is killed for sure, beside random moments: before the file of
# that name appears, or is removed. Checkpoints are of epochs 0 to 10, and 3
# are kept.
POINTS = [
    "mkdir .unfinished",
    "replace epoch-0.index",
    "replace trajectory.csv",
    "unlink epoch-1.index",
    "unlink epoch-2.data-00000-of-00001",
    "replace epoch-9.index",
    "replace model.keras",
    "replace result.json",
]
EPOCHS = 10
BINDINGS = [
    "train.model = @small",
    f"train.epochs = {EPOCHS}",
    "train.batch_size = 360",
    "train.density = 0.3",
    "train.keep_weights = [2]",
    "RigL.frequency = 3",
    "RigL.end_step = 35",
]


def test_killed_at_any_moment(tmp_path):
    """However often it is killed, a run ends bit for bit as if it was not."""
    done = subprocess.run(
        [sys.executable, __file__, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **QUIET},
    )
    assert done.returncode == 0, done.stdout[-5000:]
    report = json.loads((tmp_path / "report.json").read_text())
    print(report)
    assert report["threads"] == 1  # or a fork may hang
    assert report["at a point"] == len(POINTS)
    assert report["at random"] + report["while saving"] >= KILLS
    assert report["checkpoints read"] >= KILLS
    straight, *others = sorted(tmp_path.glob("run-*"))
    assert len(others) == report["runs"]
    wanted = record(straight)
    for other in others:
        found = record(other)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == value, (other.name, name)
        assert not [p for p in other.rglob("*") if ".unfinished" in p.name]


def record(run_dir):
    """Returns all that a run has left, but what depends on the clock."""
    import tensorflow as tf

    tables = {}
    for name in ("metrics", "trajectory", "flops"):
        with (run_dir / f"{name}.csv").open(newline="") as file:
            tables[name] = list(csv.DictReader(file))
    assert all(row.pop("seconds") for row in tables["metrics"])
    assert [row["epoch"] for row in tables["metrics"]] == [
        str(epoch) for epoch in range(EPOCHS)
    ]
    assert len(tables["trajectory"]) > 9
    result = json.loads((run_dir / "result.json").read_text())
    assert result.pop("seconds") > 0
    saved = {"model": bits_of_model(run_dir / "model.keras")}
    # Weights, masks, batch statistics, momentum, steps, generators, epoch.
    for index in run_dir.glob("checkpoints/*.index"):
        reader = tf.train.load_checkpoint(str(index.with_suffix("")))
        saved[index.stem] = {
            name: reader.get_tensor(name).tobytes()
            for name in reader.get_variable_to_shape_map()
            if name != "_CHECKPOINTABLE_OBJECT_GRAPH"
        }
    assert len(saved) == 4
    assert sum("optimizer/_variables" in n for n in saved["epoch-10"]) == 6
    assert "generators/0" in "".join(saved["epoch-10"])
    weights = [p.name for p in run_dir.glob("weights/*")]
    return {**tables, **saved, "result": result, "kept": sorted(weights)}


def bits_of_model(path):
    import keras

    return [w.tobytes() for w in keras.models.load_model(path).get_weights()]


# What follows is the server.

QUIET = {
    # Libraries that start no threads of their own when they are imported.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def small(num_classes=10, input_shape=(8, 8, 1)):
    """Returns a network with batch norm, whose statistics are state, too."""
    import keras
    from keras import layers

    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Flatten(),
            layers.Dense(96, "relu", name="hidden"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(num_classes, name="head"),
        ],
        name="small",
    )


def server(folder):
    import sklearn.datasets  # noqa: F401  imported before any fork
    import tensorflow as tf

    import gin
    from rigl_keras.experiments import command  # noqa: F401

    gin.external_configurable(small, name="small")
    tf.config.experimental.enable_op_determinism()
    report = {
        "threads": len(os.listdir("/proc/self/task")),
        "at random": 0,
        "at a point": 0,
        "while saving": 0,
        "checkpoints read": 0,
        "runs": 0,
    }
    start = time.monotonic()
    assert attempt(folder / "run-00", None, None) == 0
    whole = time.monotonic() - start
    draw = random.Random(0)
    points = list(POINTS)
    while points or report["at random"] + report["while saving"] < KILLS:
        report["runs"] += 1
        run_dir = folder / f"run-{report['runs']:02d}"
        kind = None
        while kind != "finished":
            if points:
                kind, status = "at a point", attempt(run_dir, points[0], None)
                points = points[1:]
            elif report["at random"] < KILLS - AIMED:
                kind = "at random"
                status = attempt(run_dir, None, draw.uniform(0, whole))
            elif report["while saving"] < AIMED:
                kind = "while saving"
                epoch = min(next_epoch(run_dir) + draw.randrange(3), EPOCHS)
                status = attempt(run_dir, None, f"epoch-{epoch}_temp")
            else:
                kind, status = "", attempt(run_dir, None, None)
            if status == 0:
                kind = "finished"
            elif status == -signal.SIGKILL:
                report[kind] += 1
            else:
                raise SystemExit(f"A run ended with {status}.")
    for note in folder.glob("read-*"):
        report["checkpoints read"] += int(note.read_text())
    report["seconds"] = time.monotonic() - start
    (folder / "report.json").write_text(json.dumps(report))


def next_epoch(run_dir):
    saved = run_dir.glob("checkpoints/epoch-*.index")
    return max(
        (int(p.stem.removeprefix("epoch-")) + 1 for p in saved), default=0
    )


def attempt(run_dir, point, moment):
    """Runs a fork until it ends or is killed; returns how it ended.

    Args:
        run_dir: The run directory.
        point: One of `POINTS`, at which it kills itself.
        moment: Seconds after which it is killed, or what a checkpoint is
            called while TensorFlow writes it: it is killed when that is there.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            run_in_fork(run_dir, point)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    start, status = time.monotonic(), None
    while status is None:
        pid, ended = os.waitpid(child, os.WNOHANG)
        if pid:
            status = os.waitstatus_to_exitcode(ended)
        elif isinstance(moment, float):
            if time.monotonic() - start >= moment:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.001)
        elif moment:
            time.sleep(0.0005)
            if (run_dir / f"checkpoints/.unfinished-{child}" / moment).exists():
                os.kill(child, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return status


def run_in_fork(run_dir, point):
    from rigl_keras.experiments import command
    from rigl_keras.experiments.run_directory import Checkpoints

    restore = Checkpoints.restore

    def read_all_first(checkpoints):
        """Reads each checkpoint that there is into the model."""
        for epoch, path in checkpoints.saved.items():
            checkpoints._checkpoint.restore(str(path)).assert_consumed()
            assert int(checkpoints._epoch.numpy()) == epoch
            check_zeros(checkpoints.network)
        count = len(checkpoints.saved)
        note = run_dir.parent / f"read-{os.getpid()}"
        note.write_text(str(count))
        return restore(checkpoints)

    begin = Checkpoints.__init__

    def remember(checkpoints, path, model, **options):
        checkpoints.network = model
        begin(checkpoints, path, model, **options)

    Checkpoints.__init__ = remember
    Checkpoints.restore = read_all_first
    if point:
        kill_at(*point.split())
    command.run(
        bindings=BINDINGS, run_dir=run_dir, seed=3, resume=run_dir.exists()
    )


def check_zeros(model):
    import numpy as np

    import rigl_keras

    layers = rigl_keras.masked_layers(model)
    assert len(layers) == 2
    for layer in layers:
        mask, kernel = layer.mask.numpy(), layer.kernel.numpy()
        assert set(np.unique(mask)) == {0, 1}
        assert kernel.any() and not kernel[mask == 0].any()


def kill_at(action, name):
    """Has this process kill itself when it is about to touch a file."""
    act = getattr(pathlib.Path, action)

    def act_or_die(path, *args, **options):
        if path.name.startswith(name):
            if action == "replace":  # half of it is written
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return act(path, *args, **options)

    setattr(pathlib.Path, action, act_or_die)


if __name__ == "__main__":
    server(pathlib.Path(sys.argv[1]))
