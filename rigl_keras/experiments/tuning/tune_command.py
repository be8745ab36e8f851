"""Searches RigL's hyperparameters, as section 5.3 of the report does.

    bin/tune updates --preset=small --distribution=erk --density=0.1
    bin/tune learning_rate --preset=small --distribution=erk --density=0.1

`updates` searches the drop fraction and the frequency of mask updates: 15
trials of Optuna's TPE sampler, whose objective is the validation accuracy,
averaged over 3 seeds. `learning_rate` is the grid of Figure 2.

Frequencies are in steps of the report's runs, where the default is 100, and are
scaled to the preset's steps.

The report finishes each trial. Here, once 5 trials are complete, a trial is cut
before its next seed if its best mean is in the lowest quarter of those of the
complete trials after as many seeds; --noprune finishes all.

To share the work, start the command again, in another terminal or on another
machine that sees the same --results_dir. No trial is lost if a process is
killed. A trial with a failed run counts, and the next command begins it again.
--slurm=N has SLURM start N such processes, and --status shows their progress.
"""

import functools
import sys

from absl import flags, logging

from rigl_keras.experiments import exits
from rigl_keras.experiments.protocol import variations
from rigl_keras.experiments.reproduction import slurm

# Modules that need TensorFlow are imported where they are used, so that
# --help is fast.

__all__ = ["SUBJECTS", "main"]

SUBJECTS = ("updates", "learning_rate")
# Flags of `updates` alone.
_OF_UPDATES = ("trials", "drop_fraction", "frequency", "sampler_seed", "prune")


def _define_flags():
    """Defines the flags; returns those about SLURM."""
    flags.DEFINE_string(
        "preset",
        variations.FULL,
        "full (the report's setting), small, fifth, or the path of a gin file "
        "that is read after the row's own.",
    )
    flags.DEFINE_string(
        "distribution",
        "erk",
        "How density is spread: uniform (the report's Random) or erk.",
    )
    flags.DEFINE_float("density", 0.1, "Fraction of weights kept.")
    flags.DEFINE_list(
        "seeds", ["0", "1", "2"], "Seeds over which accuracies are averaged."
    )
    flags.DEFINE_integer("trials", 15, "Settings that `updates` tries.")
    flags.DEFINE_list("drop_fraction", ["0.1", "0.6"], "Lowest and highest.")
    flags.DEFINE_list(
        "frequency",
        ["50", "1000", "50"],
        "Lowest, highest and step, in steps of the report's runs.",
    )
    flags.DEFINE_integer("sampler_seed", 0, "Seed of the TPE sampler.")
    flags.DEFINE_bool("prune", True, "Cut hopeless trials (see above).")
    flags.DEFINE_bool(
        "dry_run", False, "Show the plan and the results so far, and stop."
    )
    flags.DEFINE_bool(
        "status", False, "Show the state and the worker of each run, and stop."
    )
    array = slurm.Flags("tune", "rigl_keras.experiments.tuning.tune_command")
    flags.DEFINE_string("results_dir", "results", "Folder of all results.")
    flags.DEFINE_string(
        "data_dir", None, "Folder of prepared data sets, over TFDS_DATA_DIR."
    )
    return array


def _compared():
    """Returns the row, the preset and the density of all runs."""
    from rigl_keras.experiments.reproduction.plans import Preset
    from rigl_keras.experiments.tuning.search import DISTRIBUTIONS

    given = flags.FLAGS
    if given.distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"--distribution must be one of {', '.join(DISTRIBUTIONS)}. "
            f"Received: {given.distribution!r}."
        )
    row = DISTRIBUTIONS[given.distribution]
    return row, Preset(given.preset), given.density


def _updates(row, preset, density, seeds):
    """Returns a function that searches, and one that lists its runs."""
    from rigl_keras.experiments.tuning import tune
    from rigl_keras.experiments.tuning.search import Search

    given = flags.FLAGS
    searched = Search(
        row,
        preset,
        density,
        seeds=seeds,
        trials=given.trials,
        drop_fraction=exits.numbers(
            "drop_fraction", given.drop_fraction, float
        ),
        frequency=exits.numbers("frequency", given.frequency, int),
        sampler_seed=given.sampler_seed,
    )
    return (
        functools.partial(tune.updates, searched, prune=given.prune),
        functools.partial(tune.runs_begun, searched),
    )


def _learning_rate(row, preset, density, seeds):
    """Returns a function that trains the grid, and one that lists its runs."""
    from rigl_keras.experiments.tuning import tune
    from rigl_keras.experiments.tuning.search import check_runs

    unused = [name for name in _OF_UPDATES if flags.FLAGS[name].present]
    if unused:
        raise ValueError(
            "learning_rate is a grid, without the search's "
            f"flags. Received: --{', --'.join(unused)}. Leave them out."
        )
    check_runs(row, preset, density, seeds)
    grid = tune.grid_of(row, preset, density, seeds)
    return (
        functools.partial(
            tune.learning_rate, row, preset, density, seeds=seeds
        ),
        lambda results: tune.by_seed(grid),
    )


def _run(array, argv):
    """Searches, submits workers that search, or shows their progress."""
    from rigl_keras.experiments.reproduction.plans import Run
    from rigl_keras.experiments.reproduction.reproduce import check_data
    from rigl_keras.experiments.reproduction.results import Results
    from rigl_keras.experiments.reproduction.status import status_table

    logging.set_verbosity(logging.WARNING)
    if len(argv) != 2 or argv[1] not in SUBJECTS:
        raise ValueError(
            f"Pass one of {', '.join(SUBJECTS)}. Received: "
            f"{' '.join(argv[1:]) or 'none'}."
        )
    exits.raise_stop_requests()
    given = flags.FLAGS
    row, preset, density = _compared()
    seeds = exits.numbers("seeds", given.seeds, int)
    of_subject = _updates if argv[1] == "updates" else _learning_rate
    tune, runs_of = of_subject(row, preset, density, seeds)
    looks = given.dry_run or given.status
    if not looks:
        check_data([Run(row, preset, density, 0)], data_dir=given.data_dir)
    results = Results(given.results_dir, preset.folder)
    if given.status:
        print(status_table(runs_of(results), results))
    elif array.given and not looks:
        array.submit(argv, results.path)
    elif tune(results, data_dir=given.data_dir, dry_run=given.dry_run):
        sys.exit(1)
    elif array.given:
        array.show(argv, results.path)


def main() -> None:
    """Reads the command line and runs the search that it names."""
    exits.run_command(
        "tune",
        functools.partial(_run, _define_flags()),
        about=__doc__,
        interrupted="the same command continues after the last epoch",
    )


if __name__ == "__main__":
    main()
