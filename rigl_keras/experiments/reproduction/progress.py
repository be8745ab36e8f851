"""The progress of many runs, as lines or as a bar."""

from collections.abc import Sequence

from rigl_keras import _reading, _text
from rigl_keras.experiments.progress_bar import ProgressBar, say
from rigl_keras.experiments.reproduction.estimates import Estimate
from rigl_keras.experiments.reproduction.plans import Run
from rigl_keras.experiments.reproduction.results import Results

__all__ = ["Bar", "Lines", "Progress"]


def _say(words):
    """Prints a text in lines of at most 80 columns."""
    for line in _text.wrapped(words):
        say(line)


class Progress:
    """Receives the events of `train_missing`; this class ignores them."""

    def start(self, run: Run) -> None:
        """A run begins, or continues."""

    def epoch(self, run: Run, epochs: int) -> None:
        """The run has trained this many epochs."""

    def finish(self, run: Run, *, seconds: float, failure: str | None) -> None:
        """A run has ended after some seconds, or failed for a reason."""

    def wait(self, runs: Sequence[Run]) -> None:
        """Only these runs are left, and other processes train them."""

    def elsewhere(self, run: Run) -> None:
        """Another process has finished a run."""


class Lines(Progress):
    """Prints a line for each event, for a log file.

    Args:
        results: Where runs are kept.
    """

    def __init__(self, results: Results):
        self._results = results

    def start(self, run: Run) -> None:
        again = "continues" if self._results.epochs(run) else "begins"
        say(f"{run.name} {again}")

    def finish(self, run: Run, *, seconds: float, failure: str | None) -> None:
        left = self._left_after(run, None if failure else seconds)
        if failure is not None:
            _say(f"{run.name} FAILED: {failure}")
            return
        accuracy = self._results.result(run).get("test_accuracy")
        shown = (
            f"{accuracy:.2%}"
            if _reading.is_number(accuracy)
            else f"is not a number, {_text.brief(accuracy)}"
        )
        _say(
            f"{run.name} finished after {seconds:.0f} s: test accuracy "
            f"{shown}{left}"
        )

    def elsewhere(self, run: Run) -> None:
        say(f"{run.name} finished by another process")

    def _left_after(self, run, seconds):
        """Returns text about the time left after a run, or an empty string.

        The run took `seconds`, or None if it failed.
        """
        return ""


class Bar(Lines):
    """A progress bar over runs, with the time that is left.

    Args:
        runs: All runs of the plan.
        results: Where they are kept.
        estimates: The `estimate` of the runs that are left.
    """

    def __init__(
        self, runs: Sequence[Run], results: Results, estimates: Estimate
    ):
        super().__init__(results)
        self._estimates = dict(estimates)
        self._bar = ProgressBar(
            unit="runs", total=len(runs), done=len(runs) - len(estimates)
        )
        self._run = self._epoch = None
        self._left()

    def start(self, run: Run) -> None:
        self._run, self._epoch = run, None
        super().start(run)

    def epoch(self, run: Run, epochs: int) -> None:
        if epochs != self._epoch:
            self._epoch = epochs
            last = self._estimates[run][0].epochs
            now = min(epochs + 1, last)
            self._left(f"{run.name}: epoch {now} of {last}")

    def finish(self, run: Run, *, seconds: float, failure: str | None) -> None:
        super().finish(run, seconds=seconds, failure=failure)
        if failure is None:
            self._bar.advance()

    def elsewhere(self, run: Run) -> None:
        self._estimates.pop(run, None)
        super().elsewhere(run)
        self._bar.advance()

    def wait(self, runs: Sequence[Run]) -> None:
        self._left(f"waiting for {len(runs)} that others train")

    def close(self) -> None:
        self._bar.close()

    def _left_after(self, run, seconds):
        _, estimated = self._estimates.pop(run)
        if seconds is not None:
            self._bar.learn_pace(seconds, estimated)
        return f"; {self._left()} left"

    def _left(self, doing=""):
        """Shows and returns the time left, shared with other processes."""
        at_work = 1 + sum(
            run != self._run and self._results.claimed(run)
            for run in self._estimates
        )
        seconds = sum(s for _, s in self._estimates.values())
        return self._bar.show_left(seconds / at_work, doing)
