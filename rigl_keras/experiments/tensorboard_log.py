"""What TensorBoard shows of a run: its metrics, and a figure of densities."""

from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from rigl_keras.events import event_files
from rigl_keras.experiments.run_directory import RunDirectory, Trajectory
from rigl_keras.flops import Count, LayerCount

__all__ = ["TensorBoardLog", "density_figure"]

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
    from: what the folder holds is written anew, from metrics.csv and
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
        self._trajectory, self._layers = trajectory, cost.layers
        self._epochs = epochs
        self._writers = {}
        for name in (_TRAIN, _VALIDATION, _TEST):
            for path in event_files(self._path / name):
                path.unlink()
        self._write_figure(trajectory.rows[0][0])
        for row in run.metrics:
            if int(row["epoch"]) < first_epoch:
                self._write_epoch(row)

    def on_epoch_end(self, epoch, logs=None):
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


_BLUE = "#0072B2"  # of Okabe and Ito's palette, dark in grey as well
_TITLE, _TEXT, _TICKS = 10, 9, 8  # sizes of letters
_DPI = 120
_MOST_INCHES = 200  # of height, however many layers; Agg draws 500


def density_figure(
    layers: Sequence[LayerCount],
    connections: Mapping[str, int],
    *,
    first: Mapping[str, int],
    step: int,
) -> np.ndarray:
    """Returns an image of the density of each layer.

    Args:
        layers: The layers of `flops.count`, one at least.
        connections: `{layer: active connections}` of the masked layers.
        first: The same at the start, which is marked where it was different.
        step: The optimizer step, for the title.

    Returns:
        uint8 array of shape (height, width, 3).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    now, before = (_densities(layers, c) for c in (connections, first))
    masked = [layer for layer in layers if layer.name in connections]
    rows = np.arange(len(layers))
    # In inches, as a layout that fits itself takes most of a second.
    left = 0.3 + 0.075 * max(len(layer.name) for layer in layers)
    width, above, below = left + 5.6, 0.85, 0.5
    height = min(above + below + 0.2 * len(layers), _MOST_INCHES)
    figure = Figure(figsize=(width, height), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (
            left / width,
            below / height,
            4.9 / width,
            (height - above - below) / height,
        )
    )
    handles = []
    for is_masked, label, look in (
        (True, "masked", {"facecolor": _BLUE}),
        (False, "without a mask", {"facecolor": "white", "hatch": "////"}),
    ):
        shown = [(layer in masked) == is_masked for layer in layers]
        look |= {"edgecolor": "black", "linewidth": 0.6}
        axes.barh(rows[shown], now[shown], 0.72, **look)
        if any(shown):
            handles.append(Patch(label=label, **look))
    if masked:
        ones = sum(connections[layer.name] for layer in masked)
        overall = ones / sum(np.prod(layer.shape) for layer in masked)
        handles.append(
            axes.axvline(
                overall,
                color="black",
                lw=1.2,
                ls="--",
                label=f"all masked layers: {overall:.3f}",
            )
        )
    moved = now != before
    if moved.any():
        handles += axes.plot(
            before[moved],
            rows[moved],
            ls="none",
            marker="D",
            ms=4.5,
            mfc="white",
            mec="black",
            label="at the start",
        )
    at = axes.get_yaxis_transform()
    for row, density in zip(rows, now, strict=True):
        axes.text(
            1.1,
            row,
            f"{density:.3f}",
            transform=at,
            fontsize=_TICKS,
            ha="right",
            va="center",
        )
    axes.set_xlim(0, 1.02)
    axes.set_ylim(len(layers) - 0.4, -0.6)  # the first layer on top
    axes.set_yticks(rows, [layer.name for layer in layers], fontsize=_TICKS)
    axes.tick_params(axis="x", labelsize=_TICKS)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("density", fontsize=_TEXT)
    figure.text(
        0.15 / width,
        1 - 0.12 / height,
        f"Density of each layer at step {step:,}",
        fontsize=_TITLE,
        va="top",
    )
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.1 / width, 1 - 0.38 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=_TEXT,
        borderaxespad=0,
        columnspacing=1.2,
        handlelength=1.8,
    )
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _densities(layers, connections):
    """Returns the density of each layer; 1 where there is no mask."""
    return np.array(
        [
            connections.get(layer.name, np.prod(layer.shape))
            / np.prod(layer.shape)
            for layer in layers
        ]
    )
