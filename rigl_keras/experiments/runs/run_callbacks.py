"""Callbacks that write metrics, trajectory and weights during a run."""

from collections.abc import Sequence
from typing import Any, cast

import keras
import numpy as np

import rigl_keras
from rigl_keras.experiments.runs.run_directory import RunDirectory

__all__ = ["KeepWeights", "Metrics", "Trajectory"]


class Metrics(keras.callbacks.Callback):
    """Writes metrics.csv, with a row for each epoch.

    Args:
        run: The run directory.
        first_epoch: The epoch with which this process begins. Rows of this
            and later epochs are dropped, as these are trained again.
    """

    def __init__(self, run: RunDirectory, *, first_epoch: int):
        super().__init__()
        self._run = run
        self._rows = run.metrics_before(first_epoch)

    # Any: a dictionary, which Keras always passes.
    def on_epoch_end(self, epoch, logs: Any = None):
        self._rows.append({"epoch": epoch, **logs})
        self._run.write_metrics(self._rows)


class Trajectory(keras.callbacks.Callback):
    """Writes trajectory.csv at the end of each epoch.

    Args:
        run: The run directory.
        model: The masked model.
        method: Its mask update, or None.

    The process begins with the step of the model's optimizer. Updates of this
    and later steps are dropped, as they are repeated.
    """

    def __init__(self, run: RunDirectory, model, method):
        super().__init__()
        self._run, self._method = run, method
        masked = rigl_keras.masked_layers(model).named
        self._names = {id(m.kernel): name for name, m in masked.items()}
        counts = {
            name: int(np.count_nonzero(m.mask.numpy()))
            for name, m in masked.items()
        }
        first_step = int(model.optimizer.iterations.numpy())
        start, *updates = run.trajectory or [(first_step, counts)]
        self._rows = [start, *(row for row in updates if row[0] < first_step)]
        run.write_trajectory(self._rows)

    @property
    def rows(self) -> list[tuple[int, dict[str, int]]]:
        """All rows so far, `[(step, {layer: connections})]`."""
        method = self._method
        updates = method.trajectory[1:] if method else []
        names = (
            [self._names[id(m.kernel)] for m in method.masked] if method else []
        )
        _, counts_at_start = self._rows[0]
        new = [
            # Layers that are not trained keep their counts.
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
    """Saves the weights after given epochs, for later runs to rewind to.

    Args:
        run: The run directory.
        epochs: The numbers of epochs after which to save.
    """

    def __init__(self, run: RunDirectory, epochs: Sequence[int]):
        super().__init__()
        self._run, self._epochs = run, set(epochs)

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in self._epochs:
            plain = cast(keras.Model, self.model)  # Keras declares it None
            if rigl_keras.masked_layers(plain):
                plain = rigl_keras.strip(plain)
            self._run.save_weights(plain, epoch + 1)
