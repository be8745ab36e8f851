"""Records of finished, failed and missing runs.

They come from a folder of results (see `reproduction/results.py`), or from a
`results.jsonl` with a line for each run, which holds all that a report needs.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping
from typing import cast

from rigl_keras.experiments.protocol import rows
from rigl_keras.experiments.protocol.variations import TUNED, Changes

__all__ = ["NOTE", "OF_ANOTHER", "Record", "Records", "as_lines", "collapsed"]

_COLLAPSED = 10.0  # points below the other seeds
_CLASSES = {"cifar10": 10, "cifar100": 100, "mnist": 10, "digits": 10}
NOTE = 1_000  # most letters that are kept of a note
# Prefix of the failure of a run with another run's result.
OF_ANOTHER = "its result.json and about.json disagree: "


@dataclasses.dataclass(frozen=True)
class Record:
    """One run.

    Args:
        folder: `PRESET/RUN_NAME`.
        row: The gin file, without folder and ending. None: the folder does not
            say which, and `failure` says why.
        preset: The name of its preset's folder.
        density: Fraction of the weights kept. None: a dense model.
        seed: The seed.
        changes: gin bindings that override the files, sorted by name.
        result: The result of `train`, as far as a report needs it, or None.
        failure: Why there is no result.
        failed: Whether it failed; otherwise it is unfinished.
        learning_rate: From its configuration, if that could be read.
        curve: `((step, inference FLOPs over the dense network's), ...)`.
        history: `((epoch, accuracy), ...)` in percent, of the images held
            out, or of the training images where none are.
    """

    folder: str
    row: str | None
    preset: str
    density: float | None = None
    seed: int | None = None
    changes: Changes = ()
    result: Mapping | None = None
    failure: str | None = None
    failed: bool = False
    learning_rate: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    history: tuple[tuple[int, float], ...] = ()

    @property
    def key(self) -> tuple:
        """Identifies a run: equal keys mean the same run."""
        return self.row, self.density, self.seed, self.changes

    @property
    def variant(self) -> Changes:
        """Its changes, without those that searches vary."""
        return tuple(pair for pair in self.changes if pair[0] not in TUNED)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.split("/", 1)[-1]

    @property
    def gin(self) -> str:
        """Its row, if its folder says which."""
        return cast(str, self.row)

    @property
    def finished_result(self) -> Mapping:
        """The result of a finished run."""
        return cast(Mapping, self.result)

    @property
    def test(self) -> float:
        """Test accuracy of a finished run, in percent."""
        return 100 * self.finished_result["test_accuracy"]

    @property
    def validation(self) -> float | None:
        """Validation accuracy in percent, or None without validation."""
        accuracy = self.finished_result["validation_accuracy"]
        return None if accuracy is None else 100 * accuracy

    @property
    def training_flops_ratio(self) -> float:
        """Relative to training the dense model; tickets include Pruning's."""
        if rows.row(self.gin).method == "Lottery":
            return self.finished_result["training_flops_ratio_with_sources"]
        return self.finished_result["training_flops_ratio"]

    @property
    def inference_flops_ratio(self) -> float:
        """Relative to the dense model's, at the end."""
        return self.finished_result["inference_flops_ratio"]


@dataclasses.dataclass(frozen=True)
class Records:
    """The runs of one preset.

    Args:
        preset: The name of its folder.
        runs: Each run once, in the order of folders, without those that cannot
            be averaged with the others.
        notes: What was left out or counted once, and why.
        found: All runs that were found, for results.jsonl.
    """

    preset: str
    runs: tuple[Record, ...]
    notes: tuple[str, ...]
    found: tuple[Record, ...]

    @property
    def finished(self) -> tuple[Record, ...]:
        """The runs with a result."""
        return tuple(run for run in self.runs if run.result is not None)


def as_lines(records: Records) -> str:
    """Returns all runs that were found as `results.jsonl`, for `read`."""
    lines = []
    for record in records.found:
        fields = {
            field.name: getattr(record, field.name)
            for field in dataclasses.fields(record)
        }
        fields["changes"] = dict(record.changes)
        if not record.history:  # as in data from before it was kept
            del fields["history"]
        lines.append(json.dumps(fields) + "\n")
    return "".join(lines)


def collapsed(runs: Iterable[Record]) -> dict[str, str]:
    """Returns the seeds of a row that learned almost nothing.

    A seed has collapsed if it is at least 10 points below the median of the
    others, or hardly better than chance.

    Args:
        runs: Finished runs that differ only by their seeds.

    Returns:
        `{name of the run: why}`.
    """
    runs, found = list(runs), {}
    for run in runs:
        chance = 100 / _CLASSES.get(
            run.finished_result["dataset"], float("inf")
        )
        others = [other.test for other in runs if other is not run]
        below = statistics.median(others) - run.test if others else 0.0
        if run.test <= 1.2 * chance:
            found[run.name] = (
                f"{run.test:.2f} % is hardly better than chance, {chance:g} %"
            )
        elif below >= _COLLAPSED:
            found[run.name] = (
                f"{run.test:.2f} % is {below:.1f} points below the other seeds"
            )
    return found
