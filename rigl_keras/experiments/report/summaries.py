"""Means over seeds, and the optimum of a search."""

import dataclasses
import math
import statistics
from collections.abc import Iterable
from typing import cast

from rigl_keras._reading import is_number
from rigl_keras._text import exact
from rigl_keras.experiments.protocol import rows, variations
from rigl_keras.experiments.protocol.variations import Changes
from rigl_keras.experiments.report.records import Record, Records, collapsed

__all__ = [
    "Summary",
    "Trial",
    "best",
    "densities",
    "is_trial",
    "label",
    "of",
    "seeds",
    "settings_of",
    "trials",
]

_UPDATE = {"UPDATE_FRACTION", "UPDATE_FREQUENCY"}


@dataclasses.dataclass(frozen=True)
class Summary:
    """The runs of a row at one density, for all seeds.

    Args:
        row: The gin file, without folder and ending.
        density: Fraction of the weights kept. None: a dense model.
        changes: gin bindings that override the files.
        finished: Runs with a result, by seed.
        others: Runs without a result, by seed.
        seeds: The seeds that each row should have.
    """

    row: str
    density: float | None
    changes: Changes
    finished: tuple[Record, ...]
    others: tuple[Record, ...]
    seeds: tuple[int, ...] = variations.SEEDS

    @property
    def n(self) -> int:
        """The number of finished seeds."""
        return len(self.finished)

    @property
    def wanted(self) -> int:
        """The number of wanted seeds: `seeds`, and others that were found."""
        found = {run.seed for run in self.finished + self.others}
        return len(found | set(self.seeds))

    @property
    def complete(self) -> bool:
        """Whether all seeds that each row should have are finished."""
        return set(self.seeds) <= {run.seed for run in self.finished}

    @property
    def collapsed(self) -> int:
        """The number of finished seeds that learned almost nothing."""
        return len(collapsed(self.finished))

    @property
    def failed(self) -> int:
        """The number of failed seeds."""
        return sum(run.failed for run in self.others)

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Test accuracy of each finished seed, in percent."""
        return tuple(run.test for run in self.finished)

    @property
    def mean(self) -> float | None:
        """Mean test accuracy in percent."""
        return _mean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1) in percent; None for one seed."""
        return statistics.stdev(self.accuracies) if self.n > 1 else None

    @property
    def validation(self) -> float | None:
        """Mean validation accuracy in percent, or None without validation."""
        found = [run.validation for run in self.finished]
        return None if None in found else _mean(found)

    @property
    def training_flops_ratio(self) -> float | None:
        """Relative to training the dense model; tickets include Pruning's."""
        return _mean([run.training_flops_ratio for run in self.finished])

    @property
    def inference_flops_ratio(self) -> float | None:
        """Relative to the dense model's."""
        return _mean([run.inference_flops_ratio for run in self.finished])


def _mean(values):
    return math.fsum(values) / len(values) if values else None


def of(
    records: Records, row: str, density: float | None, changes: Changes = ()
) -> Summary:
    """Returns the summary of a row at a density.

    Args:
        records: All runs.
        row: The gin file, without folder and ending.
        density: Fraction of the weights kept. None: a dense model.
        changes: gin bindings that override the files, sorted by name.
    """
    runs = sorted(
        (
            run
            for run in records.runs
            if (run.row, run.density, run.changes) == (row, density, changes)
        ),
        key=lambda run: cast(int, run.seed),
    )
    return Summary(
        row,
        density,
        changes,
        tuple(run for run in runs if run.result is not None),
        tuple(run for run in runs if run.result is None),
        seeds(records),
    )


def seeds(records: Records) -> tuple[int, ...]:
    """Returns the seeds that each row should have.

    The report's; or all that were found, if no run has one of those.

    Args:
        records: All runs.
    """
    found = {cast(int, run.seed) for run in records.runs}
    return (
        tuple(sorted(found))
        if found.isdisjoint(variations.SEEDS)
        else variations.SEEDS
    )


@dataclasses.dataclass(frozen=True)
class Trial:
    """A pair of drop fraction and frequency that was tried.

    Args:
        summary: Its runs.
        drop_fraction: RigL's.
        frequency: Steps between mask updates.
    """

    summary: Summary
    drop_fraction: float
    frequency: float


def trials(records: Records, row: str, density: float) -> list[Trial]:
    """Returns the tried settings of mask updates, without the reference.

    Args:
        records: All runs.
        row: The gin file, without folder and ending.
        density: Fraction of the weights kept.
    """
    tried = {
        run.changes: None
        for run in records.runs
        if (run.row, run.density) == (row, density)
        and run.changes
        and {name for name, _ in run.changes} <= _UPDATE
    }
    found = []
    for changes in tried:
        summary = of(records, row, density, changes)
        drop_fraction, frequency = settings_of(records, summary)
        if drop_fraction is not None and frequency is not None:
            found.append(Trial(summary, drop_fraction, frequency))
    return found


def settings_of(
    records: Records, summary: Summary
) -> tuple[float | None, float | None]:
    """Returns the drop fraction and frequency of runs, or None if unknown.

    Args:
        records: All runs. Those of the row give the unchanged settings.
        summary: The runs.
    """
    changed = dict(summary.changes)
    of_row = [run for run in records.finished if run.row == summary.row]

    def value(macro, name, least, most):
        if macro in changed:
            return changed[macro]
        for run in (*summary.finished, *of_row):
            if macro not in dict(run.changes):
                method = run.finished_result["settings"].get("method")
                method = method if isinstance(method, dict) else {}
                own = method.get(name)
                return own if is_number(own, least=least, most=most) else None
        return None

    return (
        value("UPDATE_FRACTION", "drop_fraction", 0.0, 1.0),
        value("UPDATE_FREQUENCY", "frequency", 1, 1e12),
    )


def best(found: Iterable[Trial]) -> Trial | None:
    """Returns the trial with the highest mean validation accuracy.

    Only trials with all seeds count. None if there are none.
    """
    complete = [
        trial
        for trial in found
        if trial.summary.complete and trial.summary.validation is not None
    ]
    return max(
        complete,
        key=lambda trial: cast(float, trial.summary.validation),
        default=None,
    )


def is_trial(run: Record) -> bool:
    """Returns whether a run is part of a search (Figure 2 or Table 4)."""
    return run.changes != run.variant


def label(gin: str, changes: Changes = ()) -> str:
    """Returns the label of a row with changes, without its network.

    Args:
        gin: The gin file, without folder and ending.
        changes: gin bindings that override the files.
    """
    changed, row = dict(changes), rows.row(gin)
    longer = changed.pop("train.length", 1)
    row = dataclasses.replace(row, length=row.length * longer)
    return ", ".join(
        [
            row.label,
            *(f"{name} = {exact(value)}" for name, value in changed.items()),
        ]
    )


def densities(records: Records, gins: Iterable[str]) -> list[float]:
    """Returns the densities at which rows can be compared, smallest first.

    These are the report's, and others at which several rows were run. A row may
    also have densities with the training FLOPs of another. If there are no such
    densities, all are returned.

    Args:
        records: All runs.
        gins: The rows.
    """
    rows_at: dict[float, set] = {}
    for run in records.runs:
        if run.row in set(gins) and run.density and not is_trial(run):
            rows_at.setdefault(run.density, set()).add(run.row)
    shared = [
        density
        for density, found in rows_at.items()
        if len(found) > 1 or density in variations.DENSITIES
    ]
    return sorted(shared or rows_at)
