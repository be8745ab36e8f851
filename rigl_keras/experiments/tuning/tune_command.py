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

import sys

from absl import flags, logging

from rigl_keras.experiments import exits
from rigl_keras.experiments.protocol import variations
from rigl_keras.experiments.reproduction import slurm

__all__ = ["SUBJECTS", "main"]

SUBJECTS = ("updates", "learning_rate")


def main() -> None:
    """Reads the command line and runs the search that it names."""
    preset = flags.DEFINE_string(
        "preset",
        variations.FULL,
        "full (the report's setting), small, or the path of a gin file that "
        "is read after the row's own.",
    )
    distribution = flags.DEFINE_string(
        "distribution",
        "erk",
        "How density is spread: uniform (the report's Random) or erk.",
    )
    density = flags.DEFINE_float("density", 0.1, "Fraction of weights kept.")
    seeds = flags.DEFINE_list(
        "seeds", ["0", "1", "2"], "Seeds over which accuracies are averaged."
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
        "dry_run", False, "Show the plan and the results so far, and stop."
    )
    status = flags.DEFINE_bool(
        "status", False, "Show the state and the worker of each run, and stop."
    )
    array = slurm.Flags("tune", "rigl_keras.experiments.tuning.tune_command")
    results_dir = flags.DEFINE_string(
        "results_dir", "results", "Folder of all results."
    )
    data_dir = flags.DEFINE_string(
        "data_dir", None, "Folder of prepared data sets, over TFDS_DATA_DIR."
    )

    def tune(argv):
        from rigl_keras.experiments.reproduction.plans import Preset, Run
        from rigl_keras.experiments.reproduction.reproduce import check_data
        from rigl_keras.experiments.reproduction.results import Results
        from rigl_keras.experiments.reproduction.status import status_table
        from rigl_keras.experiments.tuning.search import (
            DISTRIBUTIONS,
            Search,
            check_runs,
        )
        from rigl_keras.experiments.tuning.tune import (
            by_seed,
            grid_of,
            learning_rate,
            runs_begun,
            updates,
        )

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
        if argv[1] == "updates":
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
                print(status_table(runs_begun(searched, results), results))
                return {}
            if array.given and not looks:
                array.submit(argv, results.path)
                return {}
            return updates(searched, results, prune=prune.value, **options)
        unused = [flag.name for flag in of_updates if flag.present]
        if unused:
            raise ValueError(
                "learning_rate is a grid, without the search's "
                f"flags. Received: --{', --'.join(unused)}. Leave them out."
            )
        check_runs(*of_runs, chosen)
        check_data(needed, data_dir=data_dir.value)
        results = Results(results_dir.value, of_runs[1].folder)
        if status.value:
            runs = by_seed(grid_of(*of_runs, chosen))
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
        about=__doc__,
        interrupted="the same command continues after the last epoch",
    )


if __name__ == "__main__":
    main()
