"""What a run prints: a row for each epoch, at most 80 characters wide."""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from rigl_keras._text import roughly
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
        epochs: The epochs that are left, to the last of the run.
        steps_per_epoch: Steps of an epoch.
        about: What to print before the run, by labels.
        earlier: Seconds of each earlier epoch of the run.

    It also prints before the run how long it will take, if there are earlier
    epochs. A new run would have to trace its steps twice to time some of them
    beforehand. It prints when the time will be known, and the time once some
    of its steps have been timed.
    """

    def __init__(
        self,
        *,
        epochs: range,
        steps_per_epoch: int,
        about: Mapping[str, str] | None = None,
        earlier: Sequence[float] = (),
    ):
        super().__init__()
        self._epochs, self._steps = epochs, steps_per_epoch
        self._about, self._earlier = about or {}, earlier
        self._bar: ProgressBar | None = None

    def on_train_begin(self, logs=None):
        self._began = time.perf_counter()
        self._times: list[float] = []
        self._ends: list[float] = []  # of the first steps
        for label, said in {**self._about, "time": self._expected()}.items():
            say(f"{label:7}{said}")

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()
        self._bar = ProgressBar(
            unit="steps",
            total=self._steps,
            doing=f"epoch {epoch + 1}/{self._epochs.stop}",
            leave=False,
        )

    def on_train_batch_end(self, batch, logs=None):
        if self._bar is not None:
            self._bar.set_done(batch + 1, show=True)
        if not self._times and len(self._ends) < _LAST_TIMED:
            self._ends.append(time.perf_counter())
            if len(self._ends) == _LAST_TIMED:
                say(f"{'time':7}{self._by_steps()}")

    def on_epoch_end(self, epoch, logs: Any = None):
        self._close()
        self._times.append(time.perf_counter() - self._start)
        if len(self._times) == 1:
            say("".join(name.rjust(width) for name, width in _COLUMNS))
        epochs = self._epochs.stop
        left = _usual(self._times) * (epochs - epoch - 1)
        say(row_of(epoch, epochs, logs, left=left))

    def on_train_end(self, logs=None):
        self._close()

    def _expected(self):
        """Returns the expected time, or when it will be known."""
        if self._earlier:
            seconds = _usual(self._earlier) * len(self._epochs)
            last = self._epochs.start
            those = f"epochs 1 to {last}" if last > 1 else "epoch 1"
            return f"about {roughly(seconds)}, at the pace of {those}"
        if self._steps < _LAST_TIMED:
            return "known after the first epoch"
        return f"known after {_LAST_TIMED} steps"

    def _by_steps(self):
        """Returns the expected time at the pace of the first steps."""
        ends = self._ends[_LAST_TIMED - _TIMED - 1 :]
        step = statistics.median(
            after - before for before, after in itertools.pairwise(ends)
        )
        steps = self._steps * len(self._epochs) - _LAST_TIMED
        seconds = ends[-1] - self._began + step * steps  # with the tracing
        return (
            f"about {roughly(seconds)}, at the pace of steps "
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
        _loss(logs),
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


def _usual(times):
    """Returns the median time of epochs, without the first if possible."""
    # The first epoch includes the time of tracing.
    return statistics.median(times[1:] or times)


def _loss(logs):
    """Returns the loss in seven characters, also of a run that diverges."""
    loss = abs(logs.get("loss", 0.0))
    digits = ".4f" if loss < 99.99995 else ".2f" if loss < 9_999.995 else ".1e"
    return _cell(logs, "loss", f"{{:{digits}}}")


def _cell(logs, key, form):
    return form.format(logs[key]).replace("%", " %") if key in logs else "-"


def _interval(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d}"
    return f"{minutes}:{seconds:02d}"
