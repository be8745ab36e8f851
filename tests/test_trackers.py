"""Runs that are logged to MLflow or Weights & Biases.

The tests' packages include neither, as MLflow needs forty more. To test them,
`pip install mlflow-skinny wandb`.
"""

import importlib.util
import struct

import keras
import pytest

from rigl_keras._extras import MissingPackageError
from rigl_keras.experiments import exits
from rigl_keras.experiments.runs import run_directory, trackers, train_command

METRICS = [
    {"epoch": epoch, "step": 5 * (epoch + 1), "loss": 1 / (epoch + 1)}
    for epoch in range(3)
]
PARAMETERS = {"train.epochs": 3, "train.method": "RigL"}
RESULT = {"steps": 15, "test_accuracy": 0.75, "method": "RigL"}


def installed(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None,
        reason=f"{name} is not installed: pip install {name}",
    )


class Recorder(trackers.Tracker):
    """Records all calls; it may fail like a tracker whose server is away."""

    package, module = "json", "json"

    def __init__(self):
        super().__init__()
        self.events, self.away = [], False

    def begin(self, name, parameters, folder, earlier):
        self.events.append(("begin", earlier, dict(parameters)))
        return "a run"

    def log(self, metrics, step):
        if self.away:
            raise ConnectionError("no route\nto host")
        self.events.append(("log", step, dict(metrics)))

    def keep(self, files, figures):
        names = {path.name for path in files}, {path.name for path in figures}
        self.events.append(("keep", *names))

    def end(self, *, finished):
        self.events.append(("end", finished))


class Away(keras.callbacks.Callback):
    """Makes a tracker fail for an epoch."""

    def __init__(self, recorder):
        super().__init__()
        self._recorder = recorder

    def on_epoch_begin(self, epoch, logs=None):
        self._recorder.away = epoch == 0


class Stop(keras.callbacks.Callback):
    """Ends a run in its third epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise exits.StopRequest


def test_a_run_that_goes_on_does_so_in_the_tracker(
    tmp_path, caplog, blank_figures
):
    recorder = Recorder()
    run = {
        "bindings": [
            "train.model = @mlp",
            "mlp.hidden = (8,)",
            "train.batch_size = 512",
            "train.epochs = 3",
            "RigL.frequency = 2",
        ],
        "run_dir": tmp_path / "run",
    }
    with pytest.raises(exits.StopRequest):
        train_command.run(
            **run, tracker=recorder, callbacks=[Away(recorder), Stop()]
        )
    assert "failed to log an epoch" in caplog.text
    assert "no route" in caplog.text
    events, recorder.events = recorder.events, []
    ((_, earlier, parameters), *logged, end) = events
    assert earlier is None and end == ("end", False)
    assert parameters["train.epochs"] == 3
    assert parameters["train.method"] == "RigL"
    assert parameters["RigL.frequency"] == 2
    # The first epoch, which failed, was logged after the second.
    assert [(step, m["epoch"]) for _, step, m in logged] == [(3, 0), (6, 1)]
    result = train_command.run(**run, resume=True, tracker=recorder)
    (begin, third, last, kept, end) = recorder.events
    assert begin[:2] == ("begin", "a run") and end == ("end", True)
    assert third[1] == 9 and third[2]["epoch"] == 2
    assert last[1] == 9 and last[2]["test_accuracy"] == result["test_accuracy"]
    _, files, figures = kept
    assert {"config.gin", "result.json", "model.keras", "metrics.csv"} <= files
    assert "density.png" in figures
    # A finished run is not logged again.
    recorder.events = []
    assert train_command.run(**run, tracker=recorder) == result
    assert recorder.events == []


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert set(trackers.TRACKERS) == {"mlflow", "wandb"}  # as the flag says
    for name in trackers.TRACKERS:
        with pytest.raises(
            MissingPackageError, match=f"needs {name}: pip install"
        ):
            trackers.TRACKERS[name]()


def followed(make, folder):
    """Logs a run that is killed once; returns its directory.

    The kill is between two epochs, without a message to the tracker.
    """
    with run_directory.RunDirectory(folder, config="", resume=True) as run:
        run.begin()
        for rows in (METRICS[:2], METRICS):
            tracking = trackers.Tracking(make(), run, PARAMETERS)
            tracking.on_train_begin()
            run.write_metrics(rows)
            tracking.on_epoch_end(len(rows) - 1)
        (folder / "topology").mkdir()
        (folder / "topology/density.png").write_bytes(PIXEL)
        tracking.finish(RESULT)
        with pytest.raises(ValueError, match="began with --tracker"):
            trackers.Tracking(Recorder(), run, {}).on_train_begin()


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63600000000200015ed92b490000000049454e44ae426082"
)


@installed("mlflow")
def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlflow'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    followed(trackers.MLflow, tmp_path / "run")
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("rigl_keras")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params == {k: str(v) for k, v in PARAMETERS.items()}
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [(each.step, each.value) for each in losses] == [
        (row["step"], row["loss"]) for row in METRICS
    ]
    assert run.data.metrics["test_accuracy"] == 0.75
    kept = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert kept == {"config.gin", "metrics.csv", "figures"}


@installed("wandb")
def test_wandb_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    followed(trackers.WeightsAndBiases, tmp_path / "run")
    logged, names, artifacts = [], set(), []
    for record in wandb_records(tmp_path / "run/wandb"):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {
                (item.key or "/".join(item.nested_key)): item.value_json
                for item in record.history.item
            }
            if "loss" in row:
                logged.append((record.history.step.num, float(row["loss"])))
            names |= row.keys()
        elif kind == "artifact":
            contents = record.artifact.manifest.contents
            artifacts.append({each.path for each in contents})
    assert logged == [(row["step"], row["loss"]) for row in METRICS]
    assert "test_accuracy" in names
    assert any("figures" in name and "density" in name for name in names)
    assert artifacts == [{"config.gin", "metrics.csv"}]
    # Both processes logged to one run.
    folders = (tmp_path / "run/wandb").glob("offline-run-*")
    assert len({folder.name.split("-")[-1] for folder in folders}) == 1


def wandb_records(folder):
    """Yields the records of W&B's logs, which have LevelDB's format."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(folder.glob("*/*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""
        while len(data) - at > 7:
            left = -at % 32768
            if left and left < 7:
                at += left  # the end of a block, too short for a header
            _, length, kind = struct.unpack_from("<IHB", data, at)
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or its last part
                yield wandb_internal_pb2.Record.FromString(whole)
                whole = b""


def test_a_tracker_that_fails_at_the_end_hides_nothing(
    tmp_path, caplog, blank_figures
):
    class Lost(Recorder):
        def end(self, *, finished):
            raise ConnectionError("no route")

    bindings = [
        "train.model = @mlp",
        "mlp.hidden = (8,)",
        "train.batch_size = 512",
        "train.epochs = 3",
        "RigL.frequency = 2",
    ]
    with pytest.raises(exits.StopRequest):
        train_command.run(
            bindings=bindings,
            run_dir=tmp_path / "run",
            tracker=Lost(),
            callbacks=[Stop()],
        )
    assert "failed to mark the run as interrupted: no route" in caplog.text
