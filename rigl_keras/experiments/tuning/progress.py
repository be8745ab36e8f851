"""The plan and the progress of a search."""

import dataclasses
from collections.abc import Sequence

from optuna.trial import FrozenTrial, Trial, TrialState

from rigl_keras._text import aligned, exact, roughly
from rigl_keras.experiments.progress_bar import ProgressBar, say
from rigl_keras.experiments.reproduction import costs
from rigl_keras.experiments.reproduction.plans import Run
from rigl_keras.experiments.reproduction.results import Results
from rigl_keras.experiments.tuning.search import (
    ENDED,
    Search,
    TrialProgress,
    with_commas,
)
from rigl_keras.experiments.tuning.studies import Study

__all__ = ["Bar", "plan"]


@dataclasses.dataclass(frozen=True)
class _Cost:
    """An upper bound on the cost left of a search; cut trials cost less."""

    runs: int
    flops: float  # of a run
    seconds: float  # of a run


def _cost_left(searched, study, results):
    """Returns the cost of the trials to do and of the reference's runs.

    Each run is taken to cost as much as the reference's. The frequency changes
    FLOPs by one or two percent, and the time even less.
    """
    trials = study.trials()
    wanted = set(searched.reference())
    for trial in trials:
        if trial.state not in ENDED:
            wanted |= set(searched.runs(**study.params(trial)))
    missing = sum(not results.finished(run) for run in wanted)
    to_begin = max(searched.trials - len(trials), 0) * len(searched.seeds)
    searched.reference()[0].configure()
    cost = costs.planned()
    return _Cost(
        runs=missing + to_begin,
        flops=cost.total_flops,
        seconds=cost.steps * costs.seconds_of_step(cost.step),
    )


def plan(searched: Search, study: Study, results: Results) -> str:
    """Returns the plan: settings, finished trials, and the cost of the rest."""
    states = [trial.state for trial in study.trials()]
    ended = sum(state in ENDED for state in states)
    left = _cost_left(searched, study, results)
    low, high, step = searched.frequency
    own = searched.steps(searched.reference()[0])
    rows = [
        ("row", f"{searched.row}, density {exact(searched.density)}"),
        ("preset", searched.preset.name),
        ("drop fraction", " to ".join(map(str, searched.drop_fraction))),
        (
            "frequency",
            f"{low} to {high} by {step}, in steps of the report's runs; 100 "
            f"are {own} here",
        ),
        (
            "trials",
            f"{searched.trials}, each of seeds {with_commas(searched.seeds)}: "
            f"{ended} finished, {max(searched.trials - ended, 0)} to do",
        ),
        (
            "cost",
            f"at most {left.runs} runs, with the reference's: "
            f"{left.runs * left.flops:.2e} FLOPs",
        ),
        (
            "time",
            f"about {roughly(left.runs * left.seconds)} in one process here",
        ),
    ]
    return "\n".join(line.rstrip() for line in aligned(rows, left=2))


class Bar(TrialProgress):
    """A progress bar over trials, with the time left."""

    def __init__(self, searched: Search, study: Study, results: Results):
        self._searched, self._study = searched, study
        self._results = results
        self._begun = 0.0  # part of the run that was trained before
        self._epoch = None
        self._bar = ProgressBar(unit="trials", total=searched.trials)
        self._left()

    def begin(self, trial: Trial) -> None:
        say(f"trial {trial.number}: {self._setting(trial.params)}")

    def end(self, trial: Trial, failure: str | None = None) -> None:
        if failure is not None:
            say(f"trial {trial.number} FAILED: {failure}")
            return
        (ended,) = [t for t in self._study.trials() if t.number == trial.number]
        says = "cut" if ended.state == TrialState.PRUNED else "complete"
        say(
            f"trial {trial.number} {says}: validation accuracy "
            f"{ended.value:.2%}; {self._left()} left"
        )

    def idle(self, trials: Sequence[FrozenTrial]) -> None:
        others = ", ".join(str(trial.number) for trial in trials)
        self._left(f"waiting for trials of others: {others}")

    def start(self, run: Run) -> None:
        self._epoch = None
        self._begun = self._part(run, self._results.epochs(run))

    def epoch(self, run: Run, epochs: int) -> None:
        if epochs != self._epoch:
            self._epoch = epochs
            self._left(f"seed {run.seed}: epoch {epochs + 1}")

    def finish(self, run: Run, *, seconds: float, failure: str | None) -> None:
        if failure is None:
            trained = max(1 - self._begun, 0.01)
            self._bar.learn_pace(seconds / trained, self._seconds(run))

    def wait(self, runs: Sequence[Run]) -> None:
        self._left(f"waiting for {runs[0].name}, which others train")

    def close(self) -> None:
        self._bar.close()

    def _setting(self, params):
        run = self._searched.runs(**params)[0]
        return (
            f"drop fraction {params['drop_fraction']:.3f}, frequency "
            f"{params['frequency']} ({self._searched.steps(run)} steps)"
        )

    def _part(self, run, epochs):
        run.configure()
        return min(epochs / costs.planned().epochs, 1.0)

    def _seconds(self, run):
        run.configure()
        cost = costs.planned()
        return cost.steps * costs.seconds_of_step(cost.step)

    def _left(self, doing=""):
        """Shows and returns the time left, shared with other processes."""
        left = _cost_left(self._searched, self._study, self._results)
        states = [trial.state for trial in self._study.trials()]
        at_work = max(states.count(TrialState.RUNNING), 1)
        self._bar.set_done(sum(state in ENDED for state in states))
        return self._bar.show_left(left.runs * left.seconds / at_work, doing)
