"""Trains the runs of a table or figure of the report that are missing."""

import sys
from collections.abc import Sequence

import gin
from rigl_keras.experiments import data
from rigl_keras.experiments.reproduction.estimates import estimate, plan_table
from rigl_keras.experiments.reproduction.plans import Run
from rigl_keras.experiments.reproduction.progress import Bar
from rigl_keras.experiments.reproduction.results import Results
from rigl_keras.experiments.reproduction.workers import train_missing

__all__ = ["check_data", "reproduce"]


def check_data(runs: Sequence[Run], *, data_dir: str | None = None) -> None:
    """Reads each data set that some runs need, once.

    So that data which is not there is one error, and not one of each run, and
    several processes do not download the same.

    Args:
        runs: The runs.
        data_dir: Folder of prepared data sets, over TFDS_DATA_DIR.

    Raises:
        ValueError: There is no such folder, or data set.
        DatasetUnavailableError: It is neither here nor can it be downloaded.
    """
    names = {}
    for run in runs:
        run.configure()
        names[gin.get_bindings("train")["dataset"]] = None
    for name in names:
        data.load(name, data_dir=data_dir)


def reproduce(
    runs: Sequence[Run],
    results: Results,
    *,
    data_dir: str | None = None,
    dry_run: bool = False,
) -> dict[Run, str]:
    """Shows what runs will cost and trains those that are missing.

    Args:
        runs: The runs, each after those that it starts from.
        results: Where they are kept.
        data_dir: Folder of prepared data sets, over TFDS_DATA_DIR.
        dry_run: Whether the plan is shown, and nothing trained.

    Returns:
        `{run: reason}` of the runs that failed.

    Raises:
        ValueError: A run has a result of another configuration.
    """
    print(f"Results: {results.path}")
    estimates = estimate(runs, results)
    print(plan_table(runs, estimates))
    if dry_run or not estimates:
        return {}
    bar = Bar(runs, results, estimates)
    try:
        failed = train_missing(runs, results, progress=bar, data_dir=data_dir)
    finally:
        bar.close()
    for run, reason in failed.items():
        print(
            f"{run.name} failed: {reason}\n"
            f"  what it said: {results.folder(run) / 'log.txt'}",
            file=sys.stderr,
        )
    done = len(runs) - len(failed)
    print(f"{done} of {len(runs)} runs are finished, {len(failed)} failed.")
    return failed
