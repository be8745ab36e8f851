"""What a run prints: a row for each epoch, at most 80 characters wide."""

import itertools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import keras

from rigl_keras.experiments.progress_bar import ProgressBar, say

__all__ = ["EpochTable", "row_of"]

# The columns, `(name, width)`.
_COLUMNS = (
    ("epoch", 9),
    ("loss", 8),
    ("accuracy", 10),
    ("validation", 12),
    ("density", 9),
    ("drop", 7),
    ("FLOPs", 8),
    ("seconds", 9),
    ("left", 8),
)
# The run's time is estimated from the last 10 of its first 15 steps.
_TIMED, _LAST_TIMED = 10, 15


class EpochTable(keras.callbacks.Callback):
    """Prints a table of epochs, and a progress bar of steps at a terminal.

    It comes after the callbacks whose logs it prints.

    Args:
        epochs: Epochs of the run.
        steps_per_epoch: Steps of an epoch.
        about: What to print before the run, by labels. The time that the run
            will take is printed once some of its steps have been timed.
    """

    def __init__(
        self,
        *,
        epochs: int,
        steps_per_epoch: int,
        about: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self._epochs, self._steps = epochs, steps_per_epoch
        self._about = about or {}
        self._bar: ProgressBar | None = None

    def on_train_begin(self, logs=None):
        self._began = time.perf_counter()
        self._times: list[float] = []
        self._ends: list[float] = []  # of the first steps
        self._first: int | None = None
        for label, said in self._about.items():
            say(f"{label:7}{said}")

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()
        if self._first is None:
            self._first = epoch
        self._bar = ProgressBar(
            unit="steps",
            total=self._steps,
            doing=f"epoch {epoch + 1}/{self._epochs}",
            leave=False,
        )

    def on_train_batch_end(self, batch, logs=None):
        if self._bar is not None:
            self._bar.set_done(batch + 1, show=True)
        if not self._times and len(self._ends) < _LAST_TIMED:
            self._ends.append(time.perf_counter())
            if len(self._ends) == _LAST_TIMED:
                self._say_how_long()

    def on_epoch_end(self, epoch, logs: Any = None):
        self._close()
        self._times.append(time.perf_counter() - self._start)
        if len(self._times) == 1:
            say("".join(name.rjust(width) for name, width in _COLUMNS))
        # The first epoch includes the time of tracing.
        usual = statistics.median(self._times[1:] or self._times)
        left = usual * (self._epochs - epoch - 1)
        say(row_of(epoch, self._epochs, logs, left=left))

    def on_train_end(self, logs=None):
        self._close()

    def _say_how_long(self):
        ends = self._ends[_LAST_TIMED - _TIMED - 1 :]
        step = statistics.median(
            after - before for before, after in itertools.pairwise(ends)
        )
        steps = self._steps * (self._epochs - (self._first or 0)) - _LAST_TIMED
        seconds = ends[-1] - self._began + step * steps  # with the tracing
        say(
            f"{'time':7}about {_roughly(seconds)}, at the pace of steps "
            f"{_LAST_TIMED - _TIMED + 1} to {_LAST_TIMED}"
        )

    def _close(self):
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def row_of(
    epoch: int, epochs: int, logs: Mapping[str, float], *, left: float
) -> str:
    """Returns an epoch's row of the table.

    Args:
        epoch: The epoch, from 0.
        epochs: Epochs of the run.
        logs: What Keras and `EpochLogs` have logged. Missing values are
            printed as `"-"`.
        left: Seconds until the run is done.
    """
    cells = (
        f"{epoch + 1}/{epochs}",
        _cell(logs, "loss", "{:.4f}"),
        _cell(logs, "accuracy", "{:.2%}"),
        _cell(logs, "val_accuracy", "{:.2%}"),
        _cell(logs, "density", "{:.4f}"),
        _cell(logs, "drop_fraction", "{:.3f}"),
        _cell(logs, "training_flops_ratio", "{:.3f}x"),
        _cell(logs, "seconds", "{:.1f}"),
        _interval(left),
    )
    return "".join(
        cell.rjust(width)
        for cell, (_, width) in zip(cells, _COLUMNS, strict=True)
    )


def _cell(logs, key, form):
    return form.format(logs[key]).replace("%", " %") if key in logs else "-"


def _interval(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d}"
    return f"{minutes}:{seconds:02d}"


def _roughly(seconds):
    """Returns a time in about two digits: "40 s", "12 min", "3.2 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
