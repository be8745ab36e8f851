"""What TensorBoard shows of a run: its metrics, and a figure of densities."""

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
# Two groups of charts, as TensorBoard unfolds no more by itself, and what the
# charts say of the columns of metrics.csv.
_LEARNING = {
    "accuracy": "Share of the examples that are classified right: of the "
    "training examples as they were trained on, of the validation examples "
    "after each epoch, and of the test examples after the last.",
    "loss": "The loss, penalties on weights included.",
    "learning_rate": "As the epoch ends.",
    "seconds": "Of the epoch, validation included.",
}
_SPARSITY = {
    "density": "Fraction of the masked weights kept; of a small dense network, "
    "its parameters over the dense one's.",
    "drop_fraction": "Fraction of the connections that the last update "
    "dropped; 0 where there was none.",
    "grown": "Connections that the last update grew.",
    "ever_active": "Share of all connections that have ever been active.",
    "churn": "Share of the connections that the last update replaced.",
    "skipped_updates": "How often an update was put off, as gradients were not "
    "finite.",
    "inference_flops_ratio": "Inference FLOPs over those of the dense model.",
    "training_flops_ratio": "Training FLOPs so far, over those of all of the "
    "dense model's training.",
}
_FIGURE = (
    "sparsity/layer_density",
    "Fraction of its weights that each layer keeps: at the start, and as "
    "training goes on.",
)
# Of an image that TensorBoard shows, it keeps ten: one of the start, and
# these.
_FIGURES = 9


class TensorBoardLog(keras.callbacks.Callback):
    """Keeps tensorboard/, by optimizer steps.

    It shows metrics.csv, a point for each epoch, and `density_figure` at the
    start and up to nine times later, the last of them at the end. TensorBoard
    takes its folders train, validation and test for runs whose curves share
    charts.

    A process that was killed may have written more than its run continues
    from: what the folder holds is written again, from metrics.csv and
    trajectory.csv, as this is made.

    Args:
        run: The run directory, of a process that writes.
        trajectory: The connections of each layer, which is up to date before
            this callback is called.
        cost: The `count` of the model.
        first_epoch: The epoch with which this process begins.
        epochs: How many epochs the run has.
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
        # Without the products of attention, which have no density.
        self._layers = tuple(layer for layer in cost.layers if layer.shape)
        self._epochs = epochs
        self._writers = {}
        for name in (_TRAIN, _VALIDATION, _TEST):
            for path in event_files(self._path / name):
                path.unlink()
        self._write_figure(trajectory.rows[0][0])
        for row in run.metrics:
            if int(row["epoch"]) < first_epoch:
                self._write_epoch(row)

    # Any: a dictionary, which Keras always passes.
    def on_epoch_end(self, epoch, logs: Any = None):
        self._write_epoch({"epoch": epoch, **logs})

    def write_test(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of the test examples.

        Args:
            step: The optimizer step after the last.
            metrics: `{name: value}`.
        """
        self._write(_TEST, step, metrics)

    def _write_epoch(self, row):
        step, epoch = int(row["step"]), int(row["epoch"])
        scalars = {
            name: float(value)
            for name, value in row.items()
            # What an earlier version did not know of is empty.
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
