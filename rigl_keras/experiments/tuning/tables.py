"""Tables of what searches found."""

import statistics
from collections.abc import Sequence
from typing import cast

from optuna.trial import TrialState

from rigl_keras._text import aligned, exact
from rigl_keras.experiments.protocol import published
from rigl_keras.experiments.reproduction.plans import Run
from rigl_keras.experiments.reproduction.results import Results
from rigl_keras.experiments.tuning.search import REFERENCE, Search
from rigl_keras.experiments.tuning.studies import Study

__all__ = ["accuracies_of", "mean_cell", "table_4", "trial_table"]

_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "cut",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def accuracies_of(
    runs: Sequence[Run], results: Results
) -> tuple[list[float], list[float], str]:
    """Returns validation accuracies, test accuracies and seeds of runs."""
    finished = [run for run in runs if results.finished(run)]
    found = [results.result(run) for run in finished]
    return (
        [result["validation_accuracy"] for result in found],
        [result["test_accuracy"] for result in found],
        ",".join(str(run.seed) for run in finished),
    )


def mean_cell(accuracies: Sequence[float]) -> str:
    """Returns the mean and, if there are several, the deviation, in percent."""
    if not accuracies:
        return "-"
    mean = f"{100 * statistics.fmean(accuracies):.2f}"
    if len(accuracies) == 1:
        return mean
    return f"{mean} +- {100 * statistics.stdev(accuracies):.2f}"


def trial_table(searched: Search, study: Study, results: Results) -> str:
    """Returns all trials, the best first."""
    ranks = list(_STATES)
    trials = sorted(
        study.trials(),
        key=lambda t: (ranks.index(t.state), -(t.value or 0), t.number),
    )
    rows = [
        (
            "trial",
            "state",
            "drop fraction",
            "frequency",
            "steps",
            "validation",
            "test",
            "seeds",
        )
    ]
    for trial in trials:
        params = study.params(trial)
        runs = searched.runs(**params)
        validation, test, seeds = accuracies_of(runs, results)
        rows.append(
            (
                str(trial.number),
                _STATES[trial.state],
                f"{params['drop_fraction']:.3f}",
                str(params["frequency"]),
                str(searched.steps(runs[0])),
                mean_cell(validation),
                mean_cell(test),
                seeds or "-",
            )
        )
    lines = aligned(rows, left=2)
    for trial in trials:
        if "failure" in trial.user_attrs and trial.state == TrialState.FAIL:
            lines.append(
                f"Trial {trial.number} failed, and is begun again by the next "
                f"command: {trial.user_attrs['failure'].strip()}"
            )
    return "\n".join(lines)


def table_4(searched: Search, study: Study, results: Results) -> str:
    """Returns the row of Table 4 from these runs and from the report."""
    best = max(
        (t for t in study.trials() if t.state == TrialState.COMPLETE),
        key=lambda trial: cast(float, trial.value),
        default=None,
    )
    if best is None:
        return "No trial is complete: there is no optimum yet."
    params = study.params(best)
    optimal = params["drop_fraction"], params["frequency"]
    reference, test, _ = accuracies_of(searched.reference(), results)
    _, tuned, _ = accuracies_of(searched.runs(*optimal), results)
    rows = [
        ("Table 4", "density", "reference", "test", "optimal", "test"),
        (
            f"{searched.row}, here",
            exact(searched.density),
            _pair(*REFERENCE),
            mean_cell(test),
            _pair(*optimal),
            mean_cell(tuned),
        ),
    ]
    printed = {
        cell.optimal: cell
        for cell in published.cells("table4")
        if (cell.gin, cell.density) == (searched.row, searched.density)
    }
    if len(printed) == 2:
        rows.append(
            (
                "in the report",
                exact(searched.density),
                *_printed(printed[False]),
                *_printed(printed[True]),
            )
        )
    lines = aligned(rows, left=1)
    if len(reference) == len(searched.seeds):
        gain = 100 * (cast(float, best.value) - statistics.fmean(reference))
        lines.append(
            f"In validation accuracy the optimum is {gain:+.2f} points from "
            "the reference."
        )
    return "\n".join(lines)


def _printed(cell):
    return (
        _pair(cell.drop_fraction, cell.frequency),
        f"{cell.accuracy} +- {cell.std}",
    )


def _pair(drop_fraction, frequency):
    return f"{round(drop_fraction, 3):g}, {frequency}"
