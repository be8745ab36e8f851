"""Writes a run's metrics and a figure of densities for TensorBoard."""

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from rigl_keras.diagnostics.events import event_files
from rigl_keras.experiments.runs.density_figure import density_figure
from rigl_keras.experiments.runs.run_callbacks import Trajectory
from rigl_keras.experiments.runs.run_directory import RunDirectory
from rigl_keras.flops.counting import Count

__all__ = ["TensorBoardLog"]

_TRAIN, _VALIDATION, _TEST = "train", "validation", "test"
# Descriptions of the columns of metrics.csv, in two groups of charts, as
# TensorBoard expands only two by itself.
_LEARNING = {
    "accuracy": "Share of examples that are classified correctly: training "
    "examples during each epoch, validation examples after each epoch, test "
    "examples after the last epoch.",
    "loss": "The loss, including penalties on weights.",
    "learning_rate": "Learning rate at the end of the epoch.",
    "seconds": "Duration of the epoch, including validation.",
}
_SPARSITY = {
    "density": "Fraction of the masked weights kept. For a small dense "
    "network, its parameters over those of the dense network.",
    "drop_fraction": "Fraction of the connections that the last update "
    "dropped; 0 if there was no update.",
    "grown": "Connections that the last update grew.",
    "ever_active": "Share of all connections that have ever been active.",
    "churn": "Share of the connections that the last update replaced.",
    "skipped_updates": "How often an update was postponed because gradients "
    "were not finite.",
    "inference_flops_ratio": "Inference FLOPs over those of the dense model.",
    "training_flops_ratio": "Training FLOPs so far, over those of the whole "
    "training of the dense model.",
}
_FIGURE = (
    "sparsity/layer_density",
    "Fraction of its weights that each layer keeps, at the start and during "
    "training.",
)
# TensorBoard keeps ten images of a tag: the first figure, and these.
_FIGURES = 9


class TensorBoardLog(keras.callbacks.Callback):
    """Writes the folder tensorboard/, by optimizer steps.

    It logs the columns of metrics.csv, with a point for each epoch, and
    `density_figure` at the start and up to nine times later, the last time at
    the end. TensorBoard shows its folders train, validation and test as runs,
    whose curves share charts.

    A killed process may have logged epochs that its run repeats. The
    constructor therefore writes the folder again, from metrics.csv and
    trajectory.csv.

    Args:
        run: The run directory, in a process that writes.
        trajectory: The connections of each layer. It must be called before
            this callback.
        cost: The `count` of the model.
        first_epoch: The epoch with which this process begins.
        epochs: Epochs of the run.
    """

    def __init__(
        self,
        run: RunDirectory,
        trajectory: Trajectory,
        cost: Count,
        *,
        first_epoch: int,
        epochs: int,
    ):
        super().__init__()
        self._path = run.path / "tensorboard"
        self._trajectory = trajectory
        # The products of attention have no shape and no density.
        self._layers = tuple(layer for layer in cost.layers if layer.shape)
        self._epochs = epochs
        self._writers = {}
        for name in (_TRAIN, _VALIDATION, _TEST):
            for path in event_files(self._path / name):
                path.unlink()
        self._write_figure(trajectory.rows[0][0])
        for row in run.metrics_before(first_epoch):
            self._write_epoch(row)

    # Any: a dictionary, which Keras always passes.
    def on_epoch_end(self, epoch, logs: Any = None):
        self._write_epoch({"epoch": epoch, **logs})

    def write_test(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics on the test examples.

        Args:
            step: The number of optimizer steps of the run.
            metrics: `{name: value}`.
        """
        self._write(_TEST, step, metrics)

    def _write_epoch(self, row):
        step, epoch = int(row["step"]), int(row["epoch"])
        scalars = {
            name: float(value)
            for name, value in row.items()
            # Values that an earlier version did not log are empty.
            if name not in ("epoch", "step") and value not in ("", None)
        }
        validated = {n for n in scalars if n.startswith("val_")}
        self._write(
            _TRAIN, step, {n: scalars[n] for n in scalars.keys() - validated}
        )
        if validated:
            self._write(
                _VALIDATION,
                step,
                {n.removeprefix("val_"): scalars[n] for n in validated},
            )
        if _drawn(epoch, self._epochs):
            self._write_figure(step)

    def _write(self, name, step, scalars):
        with tf.device("CPU:0"), self._writer(name).as_default(step):
            for column, value in sorted(scalars.items()):
                group = "sparsity" if column in _SPARSITY else "learning"
                tf.summary.scalar(
                    f"{group}/{column}",
                    value,
                    description=(_LEARNING | _SPARSITY).get(column),
                )
        self._writer(name).flush()

    def _write_figure(self, step):
        if not self._layers:
            return
        start, *updates = self._trajectory.rows
        _, now = [start, *(row for row in updates if row[0] < step)][-1]
        _, first = start
        image = density_figure(self._layers, now, first=first, step=step)
        tag, description = _FIGURE
        with tf.device("CPU:0"), self._writer(_TRAIN).as_default(step):
            tf.summary.image(tag, image[None], description=description)
        self._writer(_TRAIN).flush()

    def _writer(self, name):
        if name not in self._writers:
            with tf.device("CPU:0"):
                self._writers[name] = tf.summary.create_file_writer(
                    str(self._path / name)
                )
        return self._writers[name]


def _drawn(epoch, epochs):
    """Returns whether a figure is drawn after an epoch."""
    return (epoch + 1) * _FIGURES // epochs > epoch * _FIGURES // epochs
