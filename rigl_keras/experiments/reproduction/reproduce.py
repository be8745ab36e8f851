"""Trains the missing runs of a table or figure of the report."""

import sys
from collections.abc import Mapping, Sequence

import gin
from rigl_keras.experiments import data
from rigl_keras.experiments.reproduction.estimates import estimate, plan_table
from rigl_keras.experiments.reproduction.plans import Run
from rigl_keras.experiments.reproduction.progress import Bar, Lines
from rigl_keras.experiments.reproduction.results import Results
from rigl_keras.experiments.reproduction.workers import train_missing

__all__ = ["check_data", "print_failures", "reproduce"]


def check_data(runs: Sequence[Run], *, data_dir: str | None = None) -> None:
    """Reads each data set that the runs need, once.

    Missing data is then a single error instead of one for each run, and
    several processes do not download the same data.

    Args:
        runs: The runs.
        data_dir: Folder of prepared data sets, over TFDS_DATA_DIR.

    Raises:
        ValueError: The folder or the data set does not exist.
        DatasetUnavailableError: The data set is missing and cannot be
            downloaded.
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
    worker: bool = False,
) -> dict[Run, str]:
    """Shows what runs will cost and trains those that are missing.

    Args:
        runs: The runs, each after those that it starts from.
        results: Where they are kept.
        data_dir: Folder of prepared data sets, over TFDS_DATA_DIR.
        dry_run: Whether to show the plan and train nothing.
        worker: Whether this process is one of many workers. It then measures
            no costs, and does not wait for runs that others train.

    Returns:
        `{run: reason}` of the runs that failed.

    Raises:
        ValueError: A run has a result of another configuration.
    """
    print(f"Results: {results.path}")
    if worker:
        failed = train_missing(
            runs,
            results,
            progress=Lines(results),
            data_dir=data_dir,
            wait=False,
        )
    else:
        estimates = estimate(runs, results)
        print(plan_table(runs, estimates))
        if dry_run or not estimates:
            return {}
        bar = Bar(runs, results, estimates)
        try:
            failed = train_missing(
                runs, results, progress=bar, data_dir=data_dir
            )
        finally:
            bar.close()
    print_failures(failed, results)
    done = sum(results.finished(run) for run in runs)
    print(f"{done} of {len(runs)} runs are finished, {len(failed)} failed.")
    return failed


def print_failures(failed: Mapping[Run, str], results: Results) -> None:
    """Prints why runs failed, and where their logs are."""
    for run, reason in failed.items():
        print(
            f"{run.name} failed: {reason.strip()}\n"
            f"  log: {results.folder(run) / 'log.txt'}",
            file=sys.stderr,
        )
