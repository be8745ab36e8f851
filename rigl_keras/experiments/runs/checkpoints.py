"""Checkpoints of a run, each written whole or not at all."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from rigl_keras import _files
from rigl_keras._text import first_line
from rigl_keras.experiments.runs import devices
from rigl_keras.experiments.runs.run_files import naming
from rigl_keras.masking.mask_variable import MaskVariable

__all__ = ["Checkpoints"]

# What TensorFlow raises for a checkpoint that is truncated, damaged or from
# another model.
_UNREADABLE = (
    tf.errors.OpError,
    AssertionError,
    IndexError,
    OSError,
    ValueError,
)


class Checkpoints(keras.callbacks.Callback):
    """Saves all that a run needs to continue, at the end of each epoch.

    It saves the weights, the masks, the optimizer's slots and step, and the
    state of the random generators (dropout), which Keras's own formats leave
    out. The order of the data follows from the epoch.

    Args:
        path: Folder of the checkpoints.
        model: The compiled model.
        variables: Further variables to save, those of the method.
        keep: How many of the last checkpoints to keep.
        writes: Whether this process writes them. All workers save, because
            some values are spread over them; a worker that does not write
            discards what it saves.
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
        state = [
            # A mask defines how it is saved, so that older checkpoints load.
            v if isinstance(v, MaskVariable) else v.value
            for v in model.variables
            if id(v) not in metrics
        ]
        zero: Any = 0  # TensorFlow's annotations want a tensor
        self._epoch = tf.Variable(zero, dtype=tf.int64)
        self._checkpoint = tf.train.Checkpoint(
            # Lists, because TensorFlow finds no variables within objects of
            # classes it does not know, such as masks.
            model=state,
            optimizer=[v.value for v in model.optimizer.variables],
            method=list(variables),
            epoch=self._epoch,
        )
        # Creates this variable now: it is then saved too, and all workers
        # create it at the same time.
        _ = self._checkpoint.save_counter
        self._path, self._keep, self._writes = path, keep, writes
        if writes:
            _files.clear_unfinished(path, of_others=True)
        else:
            self._scratch = tempfile.TemporaryDirectory()

    def on_epoch_end(self, epoch, logs=None):
        self.save(epoch + 1)

    @property
    def saved(self) -> dict[int, Path]:
        """The checkpoints on disk, `{epoch: path}`, in the order of epochs."""
        # The list of TensorFlow's CheckpointManager may name checkpoints that
        # are half deleted, and is lost when the clock is set back.
        paths = [p.with_suffix("") for p in self._path.glob("epoch-*.index")]
        numbered = {int(p.name.removeprefix("epoch-")): p for p in paths}
        return dict(sorted(numbered.items()))

    def save(self, epoch: int) -> None:
        """Saves the state before `epoch`.

        Raises:
            DiskFullError: The disk is full. Earlier checkpoints are intact.
        """
        self._epoch.assign(epoch)
        if not self._writes:
            self._checkpoint.write(f"{self._scratch.name}/epoch")
            return
        path = self._path / f"epoch-{epoch}"
        with naming(path):
            self._path.mkdir(exist_ok=True)
            with _files.unfinished_folder(self._path) as folder:
                self._checkpoint.write(str(folder / path.name))
                # The index is written last and removed first: where it
                # exists, the checkpoint is whole.
                _remove_checkpoint(path)
                for part in sorted(folder.iterdir()):  # .data-..., .index
                    _files.put(part, self._path / part.name)
        for old in list(self.saved.values())[: -self._keep]:
            _remove_checkpoint(old)

    def restore(self) -> int | None:
        """Restores the last readable checkpoint in each worker.

        Returns:
            The epoch to continue with, or None if there is no checkpoint.

        Raises:
            ValueError: There are checkpoints, but none can be read.
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
                reason = first_line(error)
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


def _remove_checkpoint(path):
    for part in (".index", ".data-*"):
        for file in path.parent.glob(path.name + part):
            file.unlink()
