"""How far many runs have come: the bar, and what it adds up."""

import sys
from collections.abc import Sequence

import tqdm

from rigl_keras import _reading, _text
from rigl_keras.experiments.reproduction.estimates import Estimate
from rigl_keras.experiments.reproduction.plans import Run
from rigl_keras.experiments.reproduction.results import Results

__all__ = ["Bar", "Progress"]


class Progress:
    """What `work_off` tells of its work; this one keeps it to itself."""

    def start(self, run: Run) -> None:
        """A run is begun, or continued."""

    def epoch(self, run: Run, epochs: int) -> None:
        """So many epochs of the run are trained."""

    def finish(self, run: Run, *, seconds: float, failure: str | None) -> None:
        """A run has ended, in this many seconds; why it failed, or None."""

    def wait(self, runs: Sequence[Run]) -> None:
        """Others train these runs, and nothing else is left."""

    def elsewhere(self, run: Run) -> None:
        """Another process has finished a run."""


class Bar(Progress):
    """A progress bar over runs, with the time that is left.

    Args:
        runs: All runs of the plan.
        results: Where they are kept.
        estimates: What `estimate` says of those that are left.
    """

    def __init__(
        self, runs: Sequence[Run], results: Results, estimates: Estimate
    ):
        self._results, self._estimates = results, dict(estimates)
        self._pace = []  # seconds taken over seconds estimated, by run
        self._bar = tqdm.tqdm(
            total=len(runs),
            initial=len(runs) - len(estimates),
            bar_format="{n_fmt}/{total_fmt} runs |{bar:20}| {elapsed}{desc}",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._run = self._epoch = None
        self._left()

    def start(self, run):
        self._run, self._epoch = run, None
        again = "continues" if self._results.epochs(run) else "begins"
        self._say(f"{run.name} {again}")

    def epoch(self, run, epochs):
        if epochs != self._epoch:
            self._epoch = epochs
            self._left(f"{run.name}: epoch {epochs + 1}")

    def finish(self, run, *, seconds, failure):
        _, estimated = self._estimates.pop(run)
        if failure is not None:
            self._say(f"{run.name} FAILED: {failure}")
        else:
            self._pace.append(seconds / max(estimated, 1e-9))
            accuracy = self._results.result(run).get("test_accuracy")
            shown = (
                f"{accuracy:.2%}"
                if _reading.is_number(accuracy)
                else f"is no number, {_text.brief(accuracy)}"
            )
            self._say(
                f"{run.name} finished after {seconds:.0f} s: test accuracy "
                f"{shown}; {self._left()} left"
            )
            self._bar.update()

    def elsewhere(self, run):
        self._estimates.pop(run, None)
        self._say(f"{run.name} finished by another process")
        self._bar.update()

    def wait(self, runs):
        self._left(f"waiting for {len(runs)} that others train")

    def close(self):
        self._bar.close()

    def _say(self, line):
        # Above the bar, where there is one.
        tqdm.tqdm.write(line)
        sys.stdout.flush()

    def _left(self, doing=""):
        """Shows and returns the time left, at the pace of what is done."""
        pace = sum(self._pace) / len(self._pace) if self._pace else 1.0
        at_work = 1 + sum(
            run != self._run and self._results.claimed(run)
            for run in self._estimates
        )
        seconds = sum(s for _, s in self._estimates.values())
        left = tqdm.tqdm.format_interval(pace * seconds / at_work)
        self._bar.set_description_str(f"<{left}  {doing}")
        return left
