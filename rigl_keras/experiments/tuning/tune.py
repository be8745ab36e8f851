"""Searches RigL's hyperparameters, as section 5.3 of the report does.

    bin/tune updates --preset=small --distribution=erk --density=0.1
    bin/tune learning_rate --preset=small --distribution=erk --density=0.1

`updates` searches the drop fraction and the frequency of mask updates: 15
trials of Optuna's TPE sampler, whose objective is the validation accuracy,
averaged over 3 seeds. `learning_rate` is the grid of Figure 2.

Frequencies are given in steps of the report's runs, whose own is 100, and
scaled to those of the preset.

The report finishes each trial. Here one is cut before its next seed if the
best mean that it has had is in the lowest quarter of what the complete trials
had after as many seeds, once 5 are complete; --noprune finishes all.

To share the work start the command again, in another terminal or on another
machine that sees the same --results_dir. Whatever is killed, there are as many
trials in the end. One with a run that fails counts as a trial, and is begun
again by the next command. --slurm=N has SLURM start N such processes, and
--status shows how far they are.
"""

import statistics
import sys
from collections.abc import Callable, Sequence

from absl import flags, logging

from rigl_keras._text import aligned
from rigl_keras.experiments import data, exits
from rigl_keras.experiments.protocol import variations
from rigl_keras.experiments.reproduction import plans, slurm
from rigl_keras.experiments.reproduction.plans import Preset, Run
from rigl_keras.experiments.reproduction.reproduce import (
    check_data,
    reproduce,
)
from rigl_keras.experiments.reproduction.results import Results
from rigl_keras.experiments.reproduction.status import status_table
from rigl_keras.experiments.reproduction.workers import train_missing
from rigl_keras.experiments.tuning.progress import Bar, plan
from rigl_keras.experiments.tuning.search import (
    DISTRIBUTIONS,
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

__all__ = ["SUBJECTS", "learning_rate", "main", "updates"]

SUBJECTS = ("updates", "learning_rate")


def updates(
    searched: Search,
    results: Results,
    *,
    prune: bool = True,
    train: Callable[..., dict[Run, str]] = train_missing,
    data_dir: str | None = None,
    dry_run: bool = False,
) -> dict[Run, str]:
    """Shows what a search will cost, makes it and shows what it found.

    Args:
        searched: What is searched.
        results: Where runs and the study are kept.
        prune: Whether hopeless trials are cut.
        train: Trains runs that are missing, as in `search`.
        data_dir: Folder of prepared data sets, over TFDS_DATA_DIR.
        dry_run: Whether the plan is shown, and nothing trained.

    Returns:
        `{run: reason}` of the runs that failed.

    Raises:
        ValueError: The study was made with something else, or a run has a
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
        _tell_failures(failed, results)
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


def _runs_begun(searched, results):
    """Returns the runs of the trials that there are, and the reference's."""
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
    """Trains the grid of Figure 2 at one density and shows what is best.

    Args:
        row: The gin file, one of `DISTRIBUTIONS`' values.
        preset: How large the experiment is.
        density: Fraction of the weights kept, in (0, 1].
        results: Where runs are kept.
        seeds: Seeds that accuracies are averaged over.
        data_dir: Folder of prepared data sets, over TFDS_DATA_DIR.
        dry_run: Whether the plan is shown, and nothing trained.

    Returns:
        `{run: reason}` of the runs that failed.

    Raises:
        ValueError: An argument is out of range, or a run has a result of
            another configuration.
    """
    check_runs(row, preset, density, seeds)
    grid = _grid(row, preset, density, seeds)
    failed = reproduce(
        _by_seed(grid), results, data_dir=data_dir, dry_run=dry_run
    )
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
    return failed


def _grid(row, preset, density, seeds):
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


def _by_seed(grid):
    """Returns all runs of a grid, those of the first seed first."""
    return [run for same in zip(*grid.values(), strict=True) for run in same]


def _tell_failures(failed, results):
    for run, reason in failed.items():
        print(
            f"{run.name} failed: {reason.strip()}\n"
            f"  what it said: {results.folder(run) / 'log.txt'}",
            file=sys.stderr,
        )


def main() -> None:
    """Reads the command line and searches what it names."""
    preset = flags.DEFINE_string(
        "preset",
        variations.FULL,
        "full (the report's setting), small, or the path of a gin file that "
        "is read after the row's own.",
    )
    distribution = flags.DEFINE_string(
        "distribution",
        "erk",
        f"How density is spread: {', '.join(DISTRIBUTIONS)} (the report's "
        "Random is uniform).",
    )
    density = flags.DEFINE_float("density", 0.1, "Fraction of weights kept.")
    seeds = flags.DEFINE_list(
        "seeds", ["0", "1", "2"], "Seeds that accuracies are averaged over."
    )
    of_updates = [
        flags.DEFINE_integer("trials", 15, "Settings that `updates` tries."),
        flags.DEFINE_list(
            "drop_fraction", ["0.1", "0.6"], "Lowest and highest."
        ),
        flags.DEFINE_list(
            "frequency",
            ["50", "1000", "50"],
            "Lowest, highest and step, in steps of the report's runs.",
        ),
        flags.DEFINE_integer("sampler_seed", 0, "Seed of the TPE sampler."),
        flags.DEFINE_bool("prune", True, "Cut hopeless trials (see above)."),
    ]
    trials, drop_fraction, frequency, sampler_seed, prune = of_updates
    dry_run = flags.DEFINE_bool(
        "dry_run", False, "Show the plan and what there is, and stop."
    )
    status = flags.DEFINE_bool(
        "status", False, "Show how far runs are, and who trains them, and stop."
    )
    array = slurm.Flags("rigl_keras.experiments.tuning.tune")
    results_dir = flags.DEFINE_string(
        "results_dir", "results", "Folder of all results."
    )
    data_dir = flags.DEFINE_string(
        "data_dir", None, "Folder of prepared data sets, over TFDS_DATA_DIR."
    )

    def tune(argv):
        subject = argv[1]
        if distribution.value not in DISTRIBUTIONS:
            raise ValueError(
                f"--distribution must be one of {', '.join(DISTRIBUTIONS)}. "
                f"Received: {distribution.value!r}."
            )
        of_runs = (
            DISTRIBUTIONS[distribution.value],
            Preset(preset.value),
            density.value,
        )
        chosen = exits.numbers("seeds", seeds.value, int)
        looks = dry_run.value or status.value
        needed = [] if looks else [Run(*of_runs, seed=0)]
        options = {"data_dir": data_dir.value, "dry_run": dry_run.value}
        if subject == "updates":
            searched = Search(
                *of_runs,
                seeds=chosen,
                trials=trials.value,
                drop_fraction=exits.numbers(
                    "drop_fraction", drop_fraction.value, float
                ),
                frequency=exits.numbers("frequency", frequency.value, int),
                sampler_seed=sampler_seed.value,
            )
            check_data(needed, data_dir=data_dir.value)
            results = Results(results_dir.value, searched.preset.folder)
            if status.value:
                print(status_table(_runs_begun(searched, results), results))
                return {}
            if array.given and not looks:
                array.submit(argv, results.path)
                return {}
            return updates(searched, results, prune=prune.value, **options)
        unused = [flag.name for flag in of_updates if flag.present]
        if unused:
            raise ValueError(
                "learning_rate is a grid, which has none of the search's "
                f"flags. Received: --{', --'.join(unused)}. Leave them out."
            )
        check_runs(*of_runs, chosen)
        check_data(needed, data_dir=data_dir.value)
        results = Results(results_dir.value, of_runs[1].folder)
        if status.value:
            runs = _by_seed(_grid(*of_runs, chosen))
            print(status_table(runs, results))
            return {}
        if array.given and not looks:
            array.submit(argv, results.path)
            return {}
        return learning_rate(*of_runs, results, seeds=chosen, **options)

    def run(argv):
        logging.set_verbosity(logging.WARNING)
        if len(argv) != 2 or argv[1] not in SUBJECTS:
            raise ValueError(
                f"Pass one of {', '.join(SUBJECTS)}. Received: "
                f"{' '.join(argv[1:]) or 'none'}."
            )
        exits.raise_stop_requests()
        if tune(argv):
            sys.exit(1)

    exits.run_command(
        "tune",
        run,
        refusals=(data.DatasetUnavailableError,),
        interrupted="interrupted; the same command goes on from the last "
        "epoch.",
    )


if __name__ == "__main__":
    main()
