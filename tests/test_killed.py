"""Killed runs and full disks lose nothing.

This file is also a program: a server that imports TensorFlow once, without
running it, and starts each run in a fork, which it may kill.
"""

import contextlib
import csv
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

# Numbers of kills: at random moments, and while a checkpoint is written.
FEW, MANY = (3, 1), (20, 6)
# Further points at which a run is killed: before a file of this name appears or
# is removed. There are checkpoints of epochs 0 to 10; 3 are kept.
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
    "train.keep_weights = [4]",
    "RigL.frequency = 3",
    "RigL.end_step = 35",
]


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, request):
    """A run that is killed repeatedly ends bit for bit like one that is not."""
    kills, aimed = MANY if request.config.getoption("every_kill") else FEW
    report = serve(f"kill {kills} {aimed}", tmp_path)
    assert report["threads"] == 1  # otherwise a fork may hang
    assert report["at a point"] == len(POINTS)
    assert report["at random"] >= kills - aimed
    assert report["while saving"] >= aimed
    assert checkpoints_read(tmp_path) >= len(POINTS) + kills
    assert len(list(tmp_path.glob("run-*"))) == report["runs"] + 1
    check_equal(tmp_path)


# What is written when the disk becomes full, in the order of a run: the method,
# the number of its call, and the name in the message.
FULL = [
    ("write_trajectory", 2, "trajectory.csv"),
    ("write_metrics", 2, "metrics.csv"),
    ("save_weights", 1, "epoch-0004.weights.h5"),
    ("save", 2, "epoch-5"),
    ("save_model", 1, "model.keras"),
    ("write_result", 1, "result.json"),
]


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """A run names the file, loses nothing, and continues with free space."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-rm", "sh", "-c"]
    small_disk = f"mount -t tmpfs -o size=2m none {disk}"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*mount, small_disk], capture_output=True).returncode
    ):
        pytest.skip("No small file system may be mounted here.")
    report = serve("fill", tmp_path, [*mount, f'{small_disk} && exec "$@"', ""])
    for (_, _, name), (status, said) in zip(FULL, report["ends"], strict=True):
        assert status == 2 and len(said) == 1, said
        line = said[0]
        assert line.startswith("train: The disk is full") and name in line
        assert "No space left on device" in line and "--resume" in line
    assert checkpoints_read(tmp_path) >= len(FULL)
    check_equal(tmp_path)


def serve(task, folder, before=()):
    done = subprocess.run(
        [*before, sys.executable, __file__, task, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **QUIET},
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return json.loads((folder / "report.json").read_text())


def checkpoints_read(folder):
    return sum(int(note.read_text()) for note in folder.glob("read-*"))


def check_equal(folder):
    """Checks that all runs in a folder ended like the first one."""
    straight, *others = sorted(folder.glob("run-*"))
    wanted = record(straight)
    assert others
    for other in others:
        found = record(other)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == value, (other.name, name)
        assert not [p for p in other.rglob("*") if ".unfinished" in p.name]


def record(run_dir):
    """Returns all files of a run, without values that depend on the clock."""
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
    steps = [int(row["step"]) for row in tables["metrics"]]
    assert steps_shown(run_dir / "tensorboard/train", "learning/loss") == steps
    updates = [int(row["step"]) for row in tables["trajectory"]]
    assert steps_shown(run_dir / "topology", "topology/grown/all") == updates
    result = json.loads((run_dir / "result.json").read_text())
    assert result.pop("seconds") > 0
    assert result["versions"].pop("date").endswith("+00:00")
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
    # Kernels, biases and masks of two layers, batch norm, dropout; steps and
    # momentum.
    held = [name.split("/")[0] for name in saved["epoch-10"]]
    assert held.count("model") == 6 + 4 + 1
    assert held.count("optimizer") >= 1 + 6
    weights = [p.name for p in run_dir.glob("weights/*")]
    return {**tables, **saved, "result": result, "kept": sorted(weights)}


def steps_shown(folder, tag):
    """Returns the steps for which TensorBoard shows a point."""
    from tensorboard.backend.event_processing import event_accumulator

    reader = event_accumulator.EventAccumulator(
        str(folder), size_guidance={"tensors": 0}
    )
    reader.Reload()
    return [event.step for event in reader.Tensors(tag)]


def bits_of_model(path):
    import keras

    import rigl_keras  # noqa: F401 - registers its layers with Keras

    return [w.tobytes() for w in keras.models.load_model(path).get_weights()]


# The server.

QUIET = {
    # Keeps libraries from starting threads on import.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def small(num_classes=10, input_shape=(8, 8, 1)):
    """Returns a network with batch norm, whose statistics are state."""
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


def server(task, folder):
    # Imported before any fork.
    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.figure
    import sklearn.datasets  # noqa: F401
    import tensorflow as tf

    import gin
    from rigl_keras import _patience
    from rigl_keras.experiments.runs import train_command  # noqa: F401

    # A run on a busy machine prints nothing but its end.
    _patience._SECONDS = 3600.0

    # Figures are blank, as drawing takes half of a run's time.
    matplotlib.figure.Figure.draw = lambda figure, renderer: None
    gin.external_configurable(small, name="small")
    tf.config.experimental.enable_op_determinism()
    threads = len(os.listdir("/proc/self/task"))
    name, *numbers = task.split()
    report = {"kill": kill, "fill": fill}[name](folder, *map(int, numbers))
    report["threads"] = threads
    (folder / "report.json").write_text(json.dumps(report))


def kill(folder, kills, aimed):
    report = {"at random": 0, "at a point": 0, "while saving": 0, "runs": 0}
    start = time.monotonic()
    assert attempt(lambda: train(folder / "run-00")) == 0
    whole = time.monotonic() - start
    draw = random.Random(0)
    points = list(POINTS)
    while points or report["at random"] + report["while saving"] < kills:
        report["runs"] += 1
        run_dir = folder / f"run-{report['runs']:02d}"
        status = None
        while status != 0:
            point = moment = None
            if points:
                kind, point = "at a point", points.pop(0)
            elif report["at random"] < kills - aimed:
                kind, moment = "at random", draw.uniform(0, whole)
            elif report["while saving"] < aimed:
                kind = "while saving"
                # Any checkpoint from this epoch on, as writing one takes
                # only a millisecond.
                epoch = min(next_epoch(run_dir) + draw.randrange(3), EPOCHS)
                saved = f"{run_dir}/checkpoints/.unfinished-{platform.node()}-*"
                moment = [
                    f"{saved}/epoch-{later}"
                    for later in range(epoch, EPOCHS + 1)
                ]
            status = attempt(lambda: train(run_dir, point), moment)  # noqa: B023
            assert status in (0, -signal.SIGKILL)
            report[kind] += status != 0
    return report


def fill(folder):
    disk = folder / "disk"
    assert attempt(lambda: train(folder / "run-00")) == 0
    ends = []
    for method, call, _ in [*FULL, (None, 0, "")]:
        said = folder / "stderr"
        status = attempt(lambda: command_on_full_disk(disk, method, call, said))  # noqa: B023
        ends.append((status, said.read_text().splitlines()))
        (disk / "ballast").unlink(missing_ok=True)
    last = ends.pop()
    assert last == (0, []), last
    shutil.copytree(disk / "run", folder / "run-01")
    return {"ends": ends}


def next_epoch(run_dir):
    saved = run_dir.glob("checkpoints/epoch-*.index")
    return 1 + max(
        (int(p.stem.removeprefix("epoch-")) for p in saved), default=-1
    )


def attempt(task, moment=None):
    """Runs a fork until it ends or is killed; returns how it ended.

    Args:
        task: The function that the fork calls.
        moment: Seconds after which it is killed, or prefixes of paths: it is
            killed once such a file exists.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            task()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    paths = moment if isinstance(moment, list) else []
    paths = [f"{path.replace('*', str(child))}_temp" for path in paths]
    start, ended = time.monotonic(), 0
    while not ended:
        time.sleep(0.0005 if paths else 0.005)
        ended, status = os.waitpid(child, os.WNOHANG)
        if isinstance(moment, float):
            due = time.monotonic() - start >= moment
        else:
            due = any(map(os.path.exists, paths))
        if due and not ended:
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def train(run_dir, point=None):
    from rigl_keras.experiments.runs import train_command

    watch_checkpoints(run_dir.parent)
    if point:
        kill_at(*point.split())
    train_command.run(
        bindings=BINDINGS, run_dir=run_dir, seed=3, resume=run_dir.exists()
    )


def command_on_full_disk(disk, method, call, said):
    """Runs the command on a disk that becomes full when a method is called."""
    from rigl_keras.experiments.runs import train_command
    from rigl_keras.experiments.runs.checkpoints import Checkpoints
    from rigl_keras.experiments.runs.run_directory import RunDirectory

    watch_checkpoints(disk.parent)
    if method:
        owner = Checkpoints if method == "save" else RunDirectory
        before, calls = getattr(owner, method), []

        def on_full_disk(*args, **options):
            calls.append(method)
            if len(calls) == call:
                leave(disk, 8192 if method.startswith("save") else 0)
            return before(*args, **options)

        setattr(owner, method, on_full_disk)
    os.dup2(os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
    sys.argv = ["train", f"--run_dir={disk / 'run'}", "--seed=3", "--resume"]
    sys.argv += [f"--gin_bindings={binding}" for binding in BINDINGS]
    train_command.main()


def leave(disk, room):
    """Fills a disk up to some free bytes."""
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        with contextlib.suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        ballast.truncate(ballast.tell() - room)


def watch_checkpoints(folder):
    """Makes a run read every checkpoint into its model before it resumes."""
    from rigl_keras.experiments.runs.checkpoints import Checkpoints

    begin, restore = Checkpoints.__init__, Checkpoints.restore

    def remember(checkpoints, path, model, **options):
        checkpoints.network = model
        begin(checkpoints, path, model, **options)

    def read_all_first(checkpoints):
        saved = checkpoints.saved
        for epoch, path in saved.items():
            checkpoints._checkpoint.restore(str(path)).assert_consumed()
            assert int(checkpoints._epoch.numpy()) == epoch
            check_zeros(checkpoints.network)
        (folder / f"read-{os.getpid()}").write_text(str(len(saved)))
        return restore(checkpoints)

    Checkpoints.__init__, Checkpoints.restore = remember, read_all_first


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
    """Makes this process kill itself just before it touches a file."""
    act = getattr(pathlib.Path, action)

    def act_or_die(path, *args, **options):
        if path.name.startswith(name):
            if action == "replace":  # the file is half written
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return act(path, *args, **options)

    setattr(pathlib.Path, action, act_or_die)


if __name__ == "__main__":
    server(sys.argv[1], pathlib.Path(sys.argv[2]))
