"""A run on disk: its configuration, checkpoints, metrics and result."""

import contextlib
import csv
import errno
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras import _files, _reading
from rigl_keras._files import UNFINISHED, DiskFullError
from rigl_keras._text import first_line
from rigl_keras.experiments.runs.checkpoints import Checkpoints
from rigl_keras.experiments.runs.run_files import (
    naming,
    whole,
    write,
)

__all__ = ["EarlierRun", "RunDirectory"]

# A file in the run's folder, locked by the process that trains the run.
_LOCK = ".lock"
_log = logging.getLogger("rigl_keras")


class RunDirectory:
    """The folder of one run, with one configuration that does not change.

    Each file is written whole or not at all. If the run is killed, the disk
    is full or the power fails, the run loses at most the current epoch.

    The folder belongs to one process at a time, until `close`, the end of a
    `with` block, or the end of the process.

    config.gin            every binding the run was started with
    operative_config.gin  every value in use, defaults included
    metrics.csv           a row for each epoch
    trajectory.csv        connections of each layer, at the start and after
                          each update
    flops.csv             FLOPs of a step, a row wherever these change
    weights/              weights to rewind to: those at the start, and after
                          the epochs of `keep_weights`
    tensorboard/          the metrics for TensorBoard, by steps, and a figure
                          of the layers' densities (`TensorBoardLog`)
    topology/             how the masks moved: topology.csv, a row for each
                          layer and update, figures (density, exploration,
                          churn, dead_units, loss), TensorBoard events
    checkpoints/          the last three epochs; at first the start is one
    result.json           written last: a run that has it is finished
    model.keras           the trained model, masks included
    .lock                 locked while a process trains the run

    Args:
        path: The folder. It is created if it does not exist, and removed
            again by `close` if the run did not `begin`.
        config: The configuration, as text.
        resume: Whether an unfinished run may be continued.
        writes: Whether this process writes. One of the workers of a run does;
            all of them must see the folder.

    Raises:
        ValueError: The folder cannot be written, is in use by another
            process, or holds another configuration, or it holds an unfinished
            run and `resume` is false.
        DiskFullError: The disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        config: str,
        resume: bool,
        writes: bool = True,
    ):
        self.path = Path(path)
        self.writes = writes
        self._config = config
        self._lock = contextlib.ExitStack()
        # Frees the lock of an object that is deleted without `close`.
        weakref.finalize(self, self._lock.close)
        try:
            if writes:
                self._make()
                self._claim()
            self._check(resume)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Releases the folder for other processes."""
        self._lock.close()

    def _check(self, resume):
        """Raises ValueError unless this run may use the folder."""
        stored = self.path / "config.gin"
        if stored.exists():
            if _reading.text(stored) != self._config:
                raise ValueError(
                    f"The run directory {str(self.path)!r} holds another "
                    "configuration: "
                    f"{_first_difference(stored, self._config)} Choose "
                    "another --run_dir, or delete this one."
                )
            if not (resume or self.finished):
                raise ValueError(
                    f"The run directory {str(self.path)!r} holds an "
                    "unfinished run of this configuration. Pass --resume to "
                    "continue it, or delete the folder."
                )
        elif self.writes and {
            path
            for path in self.path.iterdir()
            if path.name != _LOCK and not path.name.startswith(UNFINISHED)
        }:
            raise ValueError(
                f"The run directory {str(self.path)!r} is not empty and holds "
                "no run. Choose another --run_dir."
            )

    def _make(self):
        try:
            with naming(self.path):
                missing = [
                    folder
                    for folder in (self.path, *self.path.parents)
                    if not folder.exists()
                ]
                # A run that is refused leaves no folder.
                self._lock.callback(_remove_empty, missing)
                self.path.mkdir(parents=True, exist_ok=True)
                with _files.unfinished_folder(self.path):
                    pass
        except DiskFullError:
            raise
        except OSError as error:
            raise ValueError(
                f"The run directory {str(self.path)!r} cannot be written "
                f"({error.strerror}). Choose another --run_dir."
            ) from error

    def _claim(self):
        """Locks the folder for this process."""
        path = self.path / _LOCK
        try:
            with naming(path):
                claim = self._lock.enter_context(_files.lock(path, wait=False))
                if claim is not None:
                    # A run that is refused leaves no files.
                    self._lock.callback(
                        _remove_unless, path, self.path / "config.gin"
                    )
                    _files.sign(claim)
        except DiskFullError:
            raise
        except OSError as error:
            _log.warning(
                "The run directory %r cannot be locked (%s): start no other "
                "process on it.",
                str(self.path),
                error.strerror,
            )
            return
        if claim is None:
            raise ValueError(
                f"The run directory {str(self.path)!r} is in use by "
                f"{_who(path)}. Wait until that ends, or choose another "
                "--run_dir."
            )

    def _write(self, name, text):
        if self.writes:
            write(self.path / name, text)

    def begin(self) -> None:
        """Writes the configuration, and removes half-written files.

        Call it when the run is about to start, so that a run that is refused
        earlier leaves no configuration behind.
        """
        if self.writes:
            for folder in (self.path, self.path / "weights"):
                _files.clear_unfinished(folder, of_others=True)
        self._write("config.gin", self._config)

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").exists()

    @property
    def result(self) -> dict:
        """The result of a finished run."""
        return _result(self.path / "result.json")

    def write_operative_config(self, text: str) -> None:
        self._write("operative_config.gin", text)

    def write_result(self, result: dict) -> None:
        self._write("result.json", json.dumps(result, indent=2) + "\n")

    def checkpoints(
        self, model: keras.Model, *, variables: Sequence[tf.Variable] = ()
    ) -> "Checkpoints":
        return Checkpoints(
            self.path / "checkpoints",
            model,
            variables=variables,
            writes=self.writes,
        )

    def save_weights(self, model: keras.Model, epoch: int) -> None:
        """Saves the weights of a dense model, for later runs to rewind to."""
        if not self.writes:
            return
        path = _weights_path(self.path, epoch)
        with naming(path):
            path.parent.mkdir(exist_ok=True)
        with whole(path) as temporary:
            # Checked before, as HDF5 prints pages when the disk fills up.
            size = sum(weights.nbytes for weights in model.get_weights())
            needed = size + 8192 * (1 + len(model.weights))
            if shutil.disk_usage(path.parent).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            model.save_weights(temporary)

    def save_model(self, model: keras.Model) -> None:
        """Saves the trained model.

        Every worker must call it, because Keras creates variables as it saves
        and the workers of a strategy create them together.
        """
        with contextlib.ExitStack() as stack:
            if self.writes:
                path = stack.enter_context(whole(self.path / "model.keras"))
            else:
                scratch = tempfile.TemporaryDirectory()
                path = Path(stack.enter_context(scratch)) / "model.keras"
            model.save(path)

    @property
    def trajectory(self) -> list[tuple[int, dict[str, int]]]:
        """The rows of trajectory.csv, as `flops.training_curve` takes them."""
        rows = [
            {name: int(value) for name, value in row.items()}
            for row in _rows(self.path / "trajectory.csv")
        ]
        return [(row.pop("step"), row) for row in rows]

    def write_trajectory(
        self, trajectory: Sequence[tuple[int, Mapping[str, int]]]
    ) -> None:
        """Writes trajectory.csv whole."""
        names = list(trajectory[0][1])
        lines = [",".join(["step", *names])]
        for step, counts in trajectory:
            lines.append(",".join(map(str, [step, *counts.values()])))
        self._write("trajectory.csv", "\n".join(lines) + "\n")

    def write_curve(self, inference: np.ndarray, training: np.ndarray) -> None:
        """Writes flops.csv. A row applies until the step of the next one."""
        lines = ["step,inference_flops,training_flops,training_flops_so_far"]
        so_far = np.cumsum(training)
        changes = (np.diff(inference) != 0) | (np.diff(training) != 0)
        steps = {0, *(np.flatnonzero(changes) + 1).tolist(), len(training) - 1}
        for step in sorted(steps):
            lines.append(
                f"{step},{inference[step]:.0f},{training[step]:.0f},"
                f"{so_far[step]:.0f}"
            )
        self._write("flops.csv", "\n".join(lines) + "\n")

    @property
    def metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv."""
        return _rows(self.path / "metrics.csv")

    def metrics_before(self, epoch: int) -> list[dict[str, str]]:
        """Returns the rows of metrics.csv before an epoch.

        Args:
            epoch: The epoch, from 0. A killed process may have written rows of
                epochs without a checkpoint.
        """
        return [row for row in self.metrics if int(row["epoch"]) < epoch]

    def write_metrics(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Writes metrics.csv whole."""
        names = ["epoch", *sorted({n for row in rows for n in row} - {"epoch"})]
        table = io.StringIO()
        writer = csv.DictWriter(table, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write("metrics.csv", table.getvalue())


class EarlierRun:
    """An earlier run, whose masks and weights another run starts with.

    Args:
        path: A run directory.

    Raises:
        ValueError: The folder holds no run.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).resolve()
        if not (self.path / "config.gin").exists():
            raise ValueError(
                f"{str(self.path)!r} is not the directory of a run: it holds "
                "no config.gin. Pass the --run_dir of an earlier run."
            )

    @property
    def result(self) -> dict:
        """The result of the run.

        Raises:
            ValueError: The run is not finished.
        """
        path = self.path / "result.json"
        if not path.exists():
            raise ValueError(
                f"The run in {str(self.path)!r} is not finished: it holds no "
                "result.json. Continue it with --resume first."
            )
        return _result(path)

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """The final masks of the run, `{layer name: zeros and ones}`.

        Raises:
            ValueError: The run is not finished, or was dense.
        """
        _ = self.result  # raises if the run is not finished
        # Any: Keras does not annotate what load_model returns.
        model: Any = keras.models.load_model(
            self.path / "model.keras", compile=False
        )
        masks = rigl_keras.masked_layers(model).masks
        if not masks:
            raise ValueError(
                f"The run in {str(self.path)!r} was dense: it has no masks."
            )
        return masks

    def load_weights(self, model: keras.Model, epoch: int) -> None:
        """Sets a dense model's weights to those of the run at an epoch.

        Raises:
            ValueError: The run has kept no weights of that epoch, or its
                network is another one.
        """
        path = _weights_path(self.path, epoch)
        if not path.exists():
            kept = sorted(
                int(p.name.removeprefix("epoch-").split(".")[0])
                for p in path.parent.glob("epoch-*.weights.h5")
            )
            raise ValueError(
                f"The run in {str(self.path)!r} has kept no weights of epoch "
                f"{epoch}, but those of {kept or 'none'}. List the epochs to "
                "keep in train.keep_weights."
            )
        try:
            with warnings.catch_warnings():
                # Keras warns of each layer that does not fit, then raises.
                warnings.simplefilter("ignore")
                model.load_weights(path)
        except ValueError as error:
            raise ValueError(
                f"The weights of {str(self.path)!r} are of another network "
                f"than {model.name!r}: {first_line(error)}"
            ) from error


def _weights_path(run, epoch):
    return run / "weights" / f"epoch-{epoch:04d}.weights.h5"


def _result(path):
    """Returns the result that a file holds.

    Raises:
        ValueError: It is damaged.
    """
    try:
        return _reading.json_object(path)
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}). Remove it, then pass "
            "--resume: the run is finished again from its last checkpoint."
        ) from error


def _rows(path):
    """Returns the rows of a table, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _remove_unless(path, config):
    """Removes the lock file of a run that was not begun."""
    if not config.exists():
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_empty(folders):
    """Removes folders, inner ones first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _who(path):
    """Returns the process that holds a lock, in words."""
    with contextlib.suppress(OSError, ValueError):
        machine, process, _ = path.read_text().split()
        return f"process {process} on {machine}"
    return "another process"


def _first_difference(stored, config):
    old, new = _reading.text(stored).splitlines(), config.splitlines()
    for line in old:
        if line not in new:
            return f"it has {line!r}, which this run has not."
    for line in new:
        if line not in old:
            return f"it lacks {line!r}."
    return "its lines are in another order."
