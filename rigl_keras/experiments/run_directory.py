"""A run on disk: its configuration, checkpoints, metrics and result."""

import csv
import json
import os
from pathlib import Path

import keras
import tensorflow as tf

__all__ = ["Checkpoints", "RunDirectory"]

# What TensorFlow raises for a checkpoint that is cut short, damaged or of
# another model.
_UNREADABLE = (
    tf.errors.OpError,
    AssertionError,
    IndexError,
    OSError,
    ValueError,
)


class RunDirectory:
    """The folder of one run, which holds one configuration for good.

    config.gin            every binding the run was started with
    operative_config.gin  every value in use, defaults included
    metrics.csv           a row for each epoch
    tensorboard/          the same for TensorBoard
    checkpoints/          the last three epochs, and the start
    result.json           written last: a run that has it is finished
    model.keras           the trained model, masks included

    Args:
        path: The folder; made if it does not exist.
        config: The configuration, as text.
        resume: Whether a run that has been begun may be continued.

    Raises:
        ValueError: The folder cannot be written, holds another
            configuration, or an unfinished run while `resume` is false.
    """

    def __init__(self, path: str | os.PathLike, *, config: str, resume: bool):
        self.path = Path(path)
        self._config = config
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"The run directory {str(self.path)!r} cannot be written "
                f"({error.strerror}). Pass --run_dir with a folder that can."
            ) from error
        stored = self.path / "config.gin"
        if stored.exists():
            if stored.read_text() != config:
                raise ValueError(
                    f"The run directory {str(self.path)!r} holds another "
                    f"configuration: {_first_difference(stored, config)} "
                    "Choose another --run_dir, or delete this one."
                )
            if not (resume or self.finished):
                raise ValueError(
                    f"The run directory {str(self.path)!r} holds an "
                    "unfinished run of this configuration. Pass --resume to "
                    "continue it, or delete the folder."
                )
        elif any(self.path.iterdir()):
            raise ValueError(
                f"The run directory {str(self.path)!r} is not empty and holds "
                "no run. Choose another --run_dir."
            )

    def begin(self) -> None:
        """Claims the folder for this configuration.

        Not before the run is known to start: one that is refused leaves
        nothing behind that a corrected one would trip over.
        """
        _write(self.path / "config.gin", self._config)

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").exists()

    @property
    def result(self) -> dict:
        """The result of a finished run."""
        return json.loads((self.path / "result.json").read_text())

    def write_operative_config(self, text: str) -> None:
        _write(self.path / "operative_config.gin", text)

    def write_result(self, result: dict) -> None:
        _write(self.path / "result.json", json.dumps(result, indent=2) + "\n")

    def checkpoints(self, model: keras.Model) -> "Checkpoints":
        return Checkpoints(self.path / "checkpoints", model)

    @property
    def metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv."""
        path = self.path / "metrics.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def forget_metrics_from(self, epoch: int) -> None:
        """Drops the rows of epochs that are about to be trained again."""
        rows = [row for row in self.metrics if int(row["epoch"]) < epoch]
        path = self.path / "metrics.csv"
        if not rows:
            path.unlink(missing_ok=True)
            return
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)


class Checkpoints(keras.callbacks.Callback):
    """Saves all that a run needs to continue, at the end of each epoch.

    That is the weights, the masks, the optimizer's slots and step, and the
    state of the random generators (dropout), which Keras's own formats leave
    out. The order of the data follows from the epoch.

    Args:
        path: Folder of the checkpoints.
        model: The compiled model.
        keep: How many of the last checkpoints are kept.
    """

    def __init__(self, path: Path, model: keras.Model, *, keep: int = 3):
        super().__init__()
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        # `variables` are the weights, the generators' states and metrics.
        known = {id(v) for v in model.weights + model.metrics_variables}
        generators = [v.value for v in model.variables if id(v) not in known]
        self._epoch = tf.Variable(0, dtype=tf.int64)
        self._manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(
                model=model,
                optimizer=model.optimizer,
                generators=generators,
                epoch=self._epoch,
            ),
            str(path),
            max_to_keep=keep,
            checkpoint_name="epoch",
        )

    def on_epoch_end(self, epoch, logs=None):
        self.save(epoch + 1)

    def save(self, epoch: int) -> None:
        """Saves the state before `epoch`."""
        self._epoch.assign(epoch)
        self._manager.save(checkpoint_number=epoch)

    def restore(self) -> int | None:
        """Restores the last checkpoint that can be read.

        Returns:
            The epoch to continue with, or None where there is no checkpoint.

        Raises:
            ValueError: There are checkpoints and none can be read.
        """
        saved = self._manager.checkpoints
        for checkpoint in reversed(saved):
            try:
                self._manager.checkpoint.restore(checkpoint).assert_consumed()
                return int(self._epoch.numpy())
            except _UNREADABLE as error:
                reason = str(error).splitlines()[0]
                print(
                    f"Checkpoint {checkpoint} cannot be read ({reason}): "
                    "falling back to the one before."
                )
        if saved:
            raise ValueError(
                f"None of the checkpoints can be read: {', '.join(saved)}. "
                "Delete the run directory to start again."
            )
        return None


def _write(path, text):
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _first_difference(stored, config):
    old, new = stored.read_text().splitlines(), config.splitlines()
    for line in old:
        if line not in new:
            return f"it has {line!r}, which this run has not."
    extra = next(line for line in new if line not in old)
    return f"it lacks {extra!r}."
