"""What bin/tune runs and prints: a search, or the grid of Figure 2."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from rigl_keras._text import aligned
from rigl_keras.experiments.protocol import variations
from rigl_keras.experiments.reproduction import plans
from rigl_keras.experiments.reproduction.plans import Preset, Run
from rigl_keras.experiments.reproduction.reproduce import (
    print_failures,
    reproduce,
)
from rigl_keras.experiments.reproduction.results import Results
from rigl_keras.experiments.reproduction.workers import train_missing
from rigl_keras.experiments.tuning.progress import Bar, plan
from rigl_keras.experiments.tuning.search import (
    Search,
    check_runs,
    runs_of,
    search,
)
from rigl_keras.experiments.tuning.studies import Study
from rigl_keras.experiments.tuning.tables import (
    accuracies_of,
    mean_cell,
    table_4,
    trial_table,
)

__all__ = ["by_seed", "grid_of", "learning_rate", "runs_begun", "updates"]


def updates(
    searched: Search,
    results: Results,
    *,
    prune: bool = True,
    train: Callable[..., dict[Run, str]] = train_missing,
    data_dir: str | None = None,
    dry_run: bool = False,
) -> dict[Run, str]:
    """Shows the cost of a search, runs it and shows its results.

    Args:
        searched: The search.
        results: Where runs and the study are kept.
        prune: Whether to cut hopeless trials.
        train: Trains missing runs, as in `search`.
        data_dir: Folder of prepared data sets, over TFDS_DATA_DIR.
        dry_run: Whether to show the plan and train nothing.

    Returns:
        `{run: reason}` of the runs that failed.

    Raises:
        ValueError: The study was made with other settings, or a run has a
            result of another configuration.
    """
    study = _study(searched, results)
    print(f"Study: {study.path}")
    print(plan(searched, study, results), flush=True)
    failed = {}
    if not dry_run:
        study.begin()
        bar = Bar(searched, study, results)
        try:
            failed = search(
                searched,
                study,
                results,
                prune=prune,
                train=train,
                progress=bar,
                data_dir=data_dir,
            )
            failed |= train(
                searched.reference(),
                results,
                progress=bar,
                data_dir=data_dir,
            )
        finally:
            bar.close()
        print_failures(failed, results)
    if study.trials():
        print(f"\n{trial_table(searched, study, results)}")
        print(f"\n{table_4(searched, study, results)}")
    return failed


def _study(searched, results):
    return Study(
        results.path / "studies" / searched.name,
        space=searched.space,
        about=searched.about,
        seed=searched.sampler_seed,
    )


def runs_begun(searched: Search, results: Results) -> list[Run]:
    """Returns the runs of all trials so far, and the reference's."""
    study = _study(searched, results)
    runs = [
        run
        for trial in sorted(study.trials(), key=lambda trial: trial.number)
        for run in searched.runs(**study.params(trial))
    ]
    return list(dict.fromkeys([*runs, *searched.reference()]))


def learning_rate(
    row: str,
    preset: Preset,
    density: float,
    results: Results,
    *,
    seeds: Sequence[int] = variations.SEEDS,
    data_dir: str | None = None,
    dry_run: bool = False,
) -> dict[Run, str]:
    """Trains the grid of Figure 2 at one density and shows the best setting.

    Args:
        row: The gin file, one of `DISTRIBUTIONS`' values.
        preset: How large the experiment is.
        density: Fraction of the weights kept, in (0, 1].
        results: Where runs are kept.
        seeds: Seeds over which accuracies are averaged.
        data_dir: Folder of prepared data sets, over TFDS_DATA_DIR.
        dry_run: Whether to show the plan and train nothing.

    Returns:
        `{run: reason}` of the runs that failed.

    Raises:
        ValueError: An argument is out of range, or a run has a result of
            another configuration.
    """
    check_runs(row, preset, density, seeds)
    grid = grid_of(row, preset, density, seeds)
    failed = reproduce(
        by_seed(grid), results, data_dir=data_dir, dry_run=dry_run
    )
    _print_grid(grid, results, seeds)
    return failed


def _print_grid(grid, results, seeds):
    """Prints the settings of a grid that have results, the best first."""
    rows = []
    for setting, group in grid.items():
        validation, test, known = accuracies_of(group, results)
        cells = (
            *map(str, setting),
            mean_cell(validation),
            mean_cell(test),
            known,
        )
        if validation:
            all_seeds = len(validation) == len(seeds)
            rows.append(((all_seeds, statistics.fmean(validation)), cells))
    if rows:
        rows.sort(reverse=True)
        head = (
            "learning rate",
            "drop fraction",
            "frequency",
            "validation",
            "test",
            "seeds",
        )
        lines = aligned([head, *(cells for _, cells in rows)], left=0)
        print("\n" + "\n".join(lines))
        (all_seeds, accuracy), (rate, fraction, frequency, *_) = rows[0]
        if all_seeds:
            print(
                f"\nBest of {len(rows)} of {len(grid)} settings by validation "
                f"accuracy, {accuracy:.2%}: learning rate {rate}, with drop "
                f"fraction {fraction} and frequency {frequency}."
            )


def grid_of(
    row: str, preset: Preset, density: float, seeds: Sequence[int]
) -> dict[tuple, list[Run]]:
    """Returns the runs of each setting of Figure 2."""
    grid = {}
    for drop_fraction, frequency in variations.UPDATES:
        for rate in variations.LEARNING_RATES:
            changes = (
                *plans.updates_of(drop_fraction, frequency),
                *plans.learning_rate_of(rate),
            )
            grid[rate, drop_fraction, frequency] = runs_of(
                row, preset, density, seeds, changes
            )
    return grid


def by_seed(grid: Mapping[tuple, Sequence[Run]]) -> list[Run]:
    """Returns all runs of a grid, ordered by seed."""
    return [run for same in zip(*grid.values(), strict=True) for run in same]
