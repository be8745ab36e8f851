"""Logs a run to MLflow or Weights & Biases, from the files that it writes.

Only the chosen tracker is imported. Its own environment variables, such as
MLFLOW_TRACKING_URI and WANDB_PROJECT, say where it stores runs.
"""

import abc
import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from rigl_keras import _reading
from rigl_keras._extras import MissingPackageError
from rigl_keras._text import first_line
from rigl_keras.experiments import exits
from rigl_keras.experiments.runs import run_files
from rigl_keras.experiments.runs.run_directory import RunDirectory

__all__ = ["MLflow", "TRACKERS", "Tracker", "Tracking", "WeightsAndBiases"]

# The files of a run that a tracker stores.
_FILES = (
    "config.gin",
    "operative_config.gin",
    "metrics.csv",
    "trajectory.csv",
    "flops.csv",
    "result.json",
    "model.keras",
)
_log = logging.getLogger("rigl_keras")


class Tracker(abc.ABC):
    """A service to which a run is logged.

    Raises:
        MissingPackageError: Its package is not installed.
    """

    package: str  # its name for pip
    module: str

    def __init__(self):
        if importlib.util.find_spec(self.module) is None:
            raise MissingPackageError(
                f"--tracker={self.module} needs {self.package}: pip install "
                f"{self.package}."
            )

    @abc.abstractmethod
    def begin(
        self,
        name: str,
        parameters: Mapping[str, Any],
        folder: Path,
        earlier: str | None,
    ) -> str:
        """Begins to log a run, or continues.

        Args:
            name: Name of the run.
            parameters: Its settings, such as `{"train.epochs": 250}`.
            folder: The run directory.
            earlier: What an earlier `begin` returned for this run, or None.

        Returns:
            The tracker's identifier of the run.
        """

    @abc.abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs the metrics of an optimizer step."""

    @abc.abstractmethod
    def keep(self, files: Sequence[Path], figures: Sequence[Path]) -> None:
        """Stores files and figures of the run."""

    @abc.abstractmethod
    def end(self, *, finished: bool) -> None:
        """Ends the run, or interrupts it so that it can be continued."""


class MLflow(Tracker):
    """Logs runs to MLflow, at MLFLOW_TRACKING_URI."""

    package, module = "mlflow", "mlflow"

    def begin(self, name, parameters, folder, earlier):
        mlflow: Any = importlib.import_module("mlflow")
        self._client = mlflow.MlflowClient()
        if earlier is not None:
            self._run = earlier
            self._client.update_run(earlier, status="RUNNING")
            return earlier
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rigl_keras")
        experiment = self._client.get_experiment_by_name(title)
        self._run = self._client.create_run(
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(title),
            run_name=name,
        ).info.run_id
        for key, value in parameters.items():
            self._client.log_param(self._run, key, value)
        return self._run

    def log(self, metrics, step):
        for name, value in metrics.items():
            self._client.log_metric(self._run, name, value, step=step)

    def keep(self, files, figures):
        for path in files:
            self._client.log_artifact(self._run, str(path))
        for path in figures:
            self._client.log_artifact(self._run, str(path), "figures")

    def end(self, *, finished):
        status = "FINISHED" if finished else "KILLED"
        self._client.set_terminated(self._run, status)


class WeightsAndBiases(Tracker):
    """Logs runs to Weights & Biases, or to disk with WANDB_MODE=offline."""

    package, module = "wandb", "wandb"

    def begin(self, name, parameters, folder, earlier):
        self._wandb: Any = importlib.import_module("wandb")
        self._run = self._wandb.init(
            id=earlier,
            resume="allow",
            name=name,
            config=dict(parameters),
            dir=str(folder),
            settings=self._wandb.Settings(silent=True, console="off"),
        )
        return self._run.id

    def log(self, metrics, step):
        self._run.log(dict(metrics), step=step)

    def keep(self, files, figures):
        artifact = self._wandb.Artifact(f"run-{self._run.id}", type="run")
        for path in files:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)
        self._run.log(
            {f"figures/{p.stem}": self._wandb.Image(str(p)) for p in figures}
        )

    def end(self, *, finished):
        self._run.finish(exit_code=0 if finished else 1)


TRACKERS: dict[str, type[Tracker]] = {
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


class Tracking(keras.callbacks.Callback):
    """Logs a run to a tracker, from the run's files.

    It comes after the callbacks that write metrics.csv and checkpoints. The
    file tracker.json holds the tracker's identifier of the run and the number
    of logged epochs, so that a continued run continues in the tracker too and
    each epoch is logged once. If logging an epoch fails, for instance because
    the server cannot be reached, it is repeated after the next epoch.

    Args:
        tracker: The tracker.
        run: The run directory.
        parameters: The settings of the run.
    """

    def __init__(
        self,
        tracker: Tracker,
        run: RunDirectory,
        parameters: Mapping[str, Any],
    ):
        super().__init__()
        self._tracker, self._run = tracker, run
        self._parameters = parameters
        self._path = run.path / "tracker.json"
        self._begun = False

    def on_train_begin(self, logs=None):
        self._begin()

    def on_epoch_end(self, epoch, logs=None):
        try:
            self._log_epochs()
        except Exception as error:  # each tracker has its own
            _log.warning(
                "--tracker=%s failed to log an epoch, and tries again after "
                "the next: %s",
                self._tracker.module,
                first_line(error),
            )

    def finish(self, result: Mapping[str, Any]) -> None:
        """Logs the result of a finished run, once.

        Args:
            result: The result.

        Raises:
            FailedError: The tracker fails.
        """
        if self._state.get("finished"):
            return
        self._begin()
        try:
            self._log_epochs()
            numbers = {
                name: float(value)
                for name, value in result.items()
                if _reading.is_number(value)
            }
            self._tracker.log(numbers, result["steps"])
            paths = [self._run.path / name for name in _FILES]
            self._tracker.keep(
                [path for path in paths if path.exists()],
                sorted(self._run.path.glob("topology/*.png")),
            )
            self._tracker.end(finished=True)
        except Exception as error:  # each tracker has its own
            raise self._failed(error) from error
        self._begun = False
        self._write(finished=True)
        print(f"Logged to {self._tracker.module} as run {self._state['run']}.")

    def leave(self) -> None:
        """Tells the tracker that the run is interrupted, if it has begun."""
        if self._begun:
            self._begun = False
            try:
                self._tracker.end(finished=False)
            except Exception as error:  # each tracker has its own
                # What ended the run is what the user must see.
                _log.warning(
                    "--tracker=%s failed to mark the run as interrupted: %s",
                    self._tracker.module,
                    first_line(error),
                )

    @property
    def _state(self):
        if not self._path.exists():
            return {}
        state = _reading.json_object(self._path)
        if state.get("tracker") != self._tracker.module:
            raise ValueError(
                f"The run began with --tracker={state.get('tracker')}. Pass "
                f"that, or remove {str(self._path)!r} to log all epochs to "
                f"{self._tracker.module}."
            )
        return state

    def _begin(self):
        if self._begun:
            return
        earlier = self._state.get("run")
        try:
            name = self._tracker.begin(
                self._run.path.resolve().name,
                self._parameters,
                self._run.path,
                earlier,
            )
        except Exception as error:  # each tracker has its own
            raise self._failed(error) from error
        self._begun = True
        self._write(run=name)

    def _log_epochs(self):
        """Logs the epochs of metrics.csv that are not logged yet."""
        known = self._state.get("epochs", 0)
        rows = self._run.metrics
        for row in rows[known:]:
            step = int(float(row["step"]))
            metrics = {
                name: float(value)
                for name, value in row.items()
                if name != "step" and value
            }
            self._tracker.log(metrics, step)
        if len(rows) > known:
            self._write(epochs=len(rows))

    def _write(self, **changes):
        state = {"tracker": self._tracker.module, **self._state, **changes}
        run_files.write(self._path, json.dumps(state, indent=2) + "\n")

    def _failed(self, error):
        return exits.FailedError(
            f"--tracker={self._tracker.module} failed: {first_line(error)}. "
            "The run itself is intact: continue it with --resume."
        )
