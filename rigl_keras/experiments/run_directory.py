"""A run on disk: its configuration, checkpoints, metrics and result."""

import contextlib
import csv
import errno
import functools
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras import reading, writing
from rigl_keras.experiments import devices
from rigl_keras.writing import UNFINISHED, DiskFullError

__all__ = [
    "Checkpoints",
    "EarlierRun",
    "KeepWeights",
    "Metrics",
    "RunDirectory",
    "Trajectory",
]

# What TensorFlow raises for a checkpoint that is cut short, damaged or of
# another model.
_UNREADABLE = (
    tf.errors.OpError,
    AssertionError,
    IndexError,
    OSError,
    ValueError,
)

# A full disk is an error that names the file.
_naming = functools.partial(
    writing.naming,
    advice="The last checkpoint is intact. Make room, then pass --resume to "
    "continue.",
)

# In a run's folder, locked by the process that trains it.
_LOCK = ".lock"

_log = logging.getLogger("rigl_keras")


class RunDirectory:
    """The folder of one run, which holds one configuration for good.

    Each file is written whole or not at all, so that a run which is killed,
    whose disk is full or whose power is cut, loses no more than the epoch it
    was in.

    It belongs to one process at a time, until `close`, the end of a `with`
    block, or the end of the process: the kernel frees the lock.

    config.gin            every binding the run was started with
    operative_config.gin  every value in use, defaults included
    metrics.csv           a row for each epoch
    trajectory.csv        connections of each layer, at the start and after
                          each update
    flops.csv             what a step costs, a row wherever that changes
    weights/              weights to rewind to: those of the start, and of
                          epochs that were asked for
    tensorboard/          the same for TensorBoard, by steps, and a figure of
                          the layers' densities (`TensorBoardLog`)
    topology/             how the masks moved: topology.csv, a row for each
                          layer and update, figures (density, exploration,
                          churn, dead_units, loss), TensorBoard events
    checkpoints/          the last three epochs, and the start
    result.json           written last: a run that has it is finished
    model.keras           the trained model, masks included
    .lock                 locked while a process trains the run

    Args:
        path: The folder; made if it does not exist.
        config: The configuration, as text.
        resume: Whether a run that has been begun may be continued.
        writes: Whether this process writes. Of the workers of one run, which
            must all see the folder, one does.

    Raises:
        ValueError: The folder cannot be written, is another process's, holds
            another configuration, or an unfinished run while `resume` is
            false.
        DiskFullError: There is no room.
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
        # Of an object that nobody closes, when nobody has it any more.
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
        """Frees the folder for other processes."""
        self._lock.close()

    def _check(self, resume):
        """Raises ValueError unless this run may be trained here."""
        stored = self.path / "config.gin"
        if stored.exists():
            if reading.text(stored) != self._config:
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
            with _naming(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                with writing.unfinished_folder(self.path):
                    pass
        except DiskFullError:
            raise
        except OSError as error:
            raise ValueError(
                f"The run directory {str(self.path)!r} cannot be written "
                f"({error.strerror}). Pass --run_dir with a folder that can."
            ) from error

    def _claim(self):
        """Takes the folder for this process."""
        path = self.path / _LOCK
        try:
            with _naming(path):
                claim = self._lock.enter_context(writing.lock(path, wait=False))
                if claim is not None:
                    # What is refused leaves nothing behind.
                    self._lock.callback(
                        _remove_unless, path, self.path / "config.gin"
                    )
                    writing.sign(claim)
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
                f"{_who(path)}. Wait for its end, or choose another --run_dir."
            )

    def _write(self, name, text):
        if self.writes:
            _write(self.path / name, text)

    def begin(self) -> None:
        """Claims the folder for this configuration.

        Not before the run is known to start: one that is refused leaves
        nothing behind that a corrected one would trip over. What a run that
        was killed has left half written goes.
        """
        if self.writes:
            for folder in (self.path, self.path / "weights"):
                _remove_unfinished(folder)
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
        """Saves the weights of a dense model, to which runs may rewind."""
        if not self.writes:
            return
        path = _weights_path(self.path, epoch)
        with _naming(path):
            path.parent.mkdir(exist_ok=True)
        with _whole(path) as temporary:
            # HDF5 has pages to say where it runs out of space midway.
            size = sum(weights.nbytes for weights in model.get_weights())
            needed = size + 8192 * (1 + len(model.weights))
            if shutil.disk_usage(path.parent).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            model.save_weights(temporary)

    def save_model(self, model: keras.Model) -> None:
        """Saves the trained model.

        Every worker must call it: Keras makes variables as it saves, and
        under a strategy workers make these together.
        """
        with contextlib.ExitStack() as stack:
            if self.writes:
                path = stack.enter_context(_whole(self.path / "model.keras"))
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
        """Writes flops.csv: a row holds until the next one's step."""
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

    def write_metrics(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Writes metrics.csv whole."""
        names = ["epoch", *sorted({n for row in rows for n in row} - {"epoch"})]
        table = io.StringIO()
        writer = csv.DictWriter(table, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write("metrics.csv", table.getvalue())


class EarlierRun:
    """What a run takes from the directory of another: masks and weights.

    Args:
        path: A run directory.

    Raises:
        ValueError: There is no run.
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
        _ = self.result  # only of a finished run are they final
        model = keras.models.load_model(
            self.path / "model.keras", compile=False
        )
        masks = rigl_keras.masked_layers(model).masks
        if not masks:
            raise ValueError(
                f"The run in {str(self.path)!r} was dense: it has no masks."
            )
        return masks

    def load_weights(self, model: keras.Model, epoch: int) -> None:
        """Gives a dense model the weights that the run had at an epoch.

        Raises:
            ValueError: The run has kept none of that epoch, or its network
                is another.
        """
        path = _weights_path(self.path, epoch)
        if not path.exists():
            kept = sorted(
                int(p.name.removeprefix("epoch-").split(".")[0])
                for p in path.parent.glob("epoch-*.weights.h5")
            )
            raise ValueError(
                f"The run in {str(self.path)!r} has kept no weights of epoch "
                f"{epoch}, but of {kept or 'none'}. A run keeps those of "
                "train.keep_weights."
            )
        try:
            with warnings.catch_warnings():
                # Of each layer that does not fit, before the error.
                warnings.simplefilter("ignore")
                model.load_weights(path)
        except ValueError as error:
            raise ValueError(
                f"The weights of {str(self.path)!r} are of another network "
                f"than {model.name!r}: {str(error).splitlines()[0]}"
            ) from error


class Metrics(keras.callbacks.Callback):
    """Keeps metrics.csv, a row for each epoch.

    Args:
        run: The run directory.
        first_epoch: With which this process begins. Rows from there on are of
            epochs that are about to be trained again, and forgotten.
    """

    def __init__(self, run: RunDirectory, *, first_epoch: int):
        super().__init__()
        self._run = run
        self._rows = [
            row for row in run.metrics if int(row["epoch"]) < first_epoch
        ]

    def on_epoch_end(self, epoch, logs=None):
        self._rows.append({"epoch": epoch, **logs})
        self._run.write_metrics(self._rows)


class Trajectory(keras.callbacks.Callback):
    """Keeps trajectory.csv, epoch by epoch.

    Args:
        run: The run directory.
        model: The masked model.
        method: Its mask update, or None.
        first_step: The step with which this process begins. Updates from
            there on are about to be repeated, and forgotten.
    """

    def __init__(self, run: RunDirectory, model, method, *, first_step: int):
        super().__init__()
        self._run, self._method = run, method
        masked = rigl_keras.masked_layers(model).named
        self._names = {id(m.kernel): name for name, m in masked.items()}
        counts = {
            name: int(np.count_nonzero(m.mask.numpy()))
            for name, m in masked.items()
        }
        start, *updates = run.trajectory or [(first_step, counts)]
        self._rows = [start, *(row for row in updates if row[0] < first_step)]
        run.write_trajectory(self._rows)

    @property
    def rows(self) -> list[tuple[int, dict[str, int]]]:
        """All rows until now, `[(step, {layer: connections})]`."""
        method = self._method
        updates = method.trajectory[1:] if method else []
        names = (
            [self._names[id(m.kernel)] for m in method.masked] if method else []
        )
        _, counts_at_start = self._rows[0]
        new = [
            # Layers that are not trained keep theirs.
            (
                step,
                counts_at_start | dict(zip(names, counts, strict=True)),
            )
            for step, counts in updates
        ]
        return [*self._rows, *new]

    def on_epoch_end(self, epoch, logs=None):
        self._run.write_trajectory(self.rows)


class KeepWeights(keras.callbacks.Callback):
    """Saves the weights after some epochs, for later runs to rewind to.

    Args:
        run: The run directory.
        epochs: After how many epochs.
    """

    def __init__(self, run: RunDirectory, epochs: Sequence[int]):
        super().__init__()
        self._run, self._epochs = run, set(epochs)

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in self._epochs:
            plain = self.model
            if rigl_keras.masked_layers(plain):
                plain = rigl_keras.strip(plain)
            self._run.save_weights(plain, epoch + 1)


class Checkpoints(keras.callbacks.Callback):
    """Saves all that a run needs to continue, at the end of each epoch.

    That is the weights, the masks, the optimizer's slots and step, and the
    state of the random generators (dropout), which Keras's own formats leave
    out. The order of the data follows from the epoch.

    Args:
        path: Folder of the checkpoints.
        model: The compiled model.
        variables: What the method must remember as well.
        keep: How many of the last checkpoints are kept.
        writes: Whether this process writes them. Workers save together, as
            some values are spread over all; those that do not write throw
            away what they save.
    """

    def __init__(
        self,
        path: Path,
        model: keras.Model,
        *,
        variables: Sequence[tf.Variable] = (),
        keep: int = 3,
        writes: bool = True,
    ):
        super().__init__()
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        # `variables` are the weights, the generators' states and metrics.
        metrics = {id(v) for v in model.metrics_variables}
        state = [v.value for v in model.variables if id(v) not in metrics]
        self._epoch = tf.Variable(0, dtype=tf.int64)
        self._checkpoint = tf.train.Checkpoint(
            # Lists of variables: by attributes TensorFlow would not find
            # those within objects of one's own, as masks are.
            model=state,
            optimizer=[v.value for v in model.optimizer.variables],
            method=list(variables),
            epoch=self._epoch,
        )
        # Made now, it is written, too; and the workers of a run make variables
        # together.
        _ = self._checkpoint.save_counter
        self._path, self._keep, self._writes = path, keep, writes
        if writes:
            _remove_unfinished(path)
        else:
            self._scratch = tempfile.TemporaryDirectory()

    def on_epoch_end(self, epoch, logs=None):
        self.save(epoch + 1)

    @property
    def saved(self) -> dict[int, Path]:
        """The checkpoints there are, `{epoch: path}`, the last one last."""
        # TensorFlow's CheckpointManager keeps a list, which may name what is
        # half deleted, and forgets it all when the clock is put back.
        paths = [p.with_suffix("") for p in self._path.glob("epoch-*.index")]
        numbered = {int(p.name.removeprefix("epoch-")): p for p in paths}
        return dict(sorted(numbered.items()))

    def save(self, epoch: int) -> None:
        """Saves the state before `epoch`.

        Raises:
            DiskFullError: There is no room. Those saved before are intact.
        """
        self._epoch.assign(epoch)
        if not self._writes:
            self._checkpoint.write(f"{self._scratch.name}/epoch")
            return
        path = self._path / f"epoch-{epoch}"
        with _naming(path):
            self._path.mkdir(exist_ok=True)
            with writing.unfinished_folder(self._path) as folder:
                self._checkpoint.write(str(folder / path.name))
                # The index is the last to come and the first to go: where it
                # is, the checkpoint is whole.
                _remove_checkpoint(path)
                for part in sorted(folder.iterdir()):  # .data-..., .index
                    writing.put(part, self._path / part.name)
        for old in list(self.saved.values())[: -self._keep]:
            _remove_checkpoint(old)

    def restore(self) -> int | None:
        """Restores the last checkpoint that can be read, in each worker.

        Returns:
            The epoch to continue with, or None where there is no checkpoint.

        Raises:
            ValueError: There are checkpoints and none can be read.
        """
        epoch = self._restore_last() if self._writes else None
        epoch = devices.from_chief(-1 if epoch is None else epoch)
        if epoch < 0:
            return None
        if not self._writes:
            saved = str(self._path / f"epoch-{epoch}")
            self._checkpoint.restore(saved).assert_consumed()
        return epoch

    def _restore_last(self):
        saved = [str(path) for path in self.saved.values()]
        for path in reversed(saved):
            try:
                self._checkpoint.restore(path).assert_consumed()
                return int(self._epoch.numpy())
            except _UNREADABLE as error:
                reason = str(error).splitlines()[0]
                print(
                    f"Checkpoint {path} cannot be read ({reason}): "
                    "falling back to the one before."
                )
        if saved:
            raise ValueError(
                f"None of the checkpoints can be read: {', '.join(saved)}. "
                "Delete the run directory to start again."
            )
        return None


def _weights_path(run, epoch):
    return run / "weights" / f"epoch-{epoch:04d}.weights.h5"


def _result(path):
    """Returns the result that a file holds.

    Raises:
        ValueError: It is damaged.
    """
    try:
        return reading.json_object(path)
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}). Remove it, then pass "
            "--resume: the run is finished again from its last checkpoint."
        ) from error


def _rows(path):
    """Returns the rows of a table, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(path, text):
    with _naming(path):
        writing.write(path, text)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Gives a file to write, which then appears at `path`, whole."""
    with _naming(path), writing.whole(path) as unfinished:
        yield unfinished


def _remove_unfinished(folder):
    """Removes what processes have left, of any machine; the run is ours."""
    for left in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)


def _remove_unless(path, config):
    """Removes a lock of a run that was not begun."""
    if not config.exists():
        with contextlib.suppress(OSError):
            path.unlink()


def _who(path):
    """Returns which process says that it has a lock."""
    with contextlib.suppress(OSError, ValueError):
        machine, process, _ = path.read_text().split()
        return f"process {process} on {machine}"
    return "another process"


def _remove_checkpoint(path):
    for part in (".index", ".data-*"):
        for file in path.parent.glob(path.name + part):
            file.unlink()


def _first_difference(stored, config):
    old, new = reading.text(stored).splitlines(), config.splitlines()
    for line in old:
        if line not in new:
            return f"it has {line!r}, which this run has not."
    for line in new:
        if line not in old:
            return f"it lacks {line!r}."
    return "its lines are in another order."
