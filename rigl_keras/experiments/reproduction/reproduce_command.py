"""Reproduces a table or figure of the report.

    bin/reproduce --list                           the tables and figures
    bin/reproduce table2 --dry_run                 the plan and what it costs
    bin/reproduce figure1 --preset=small --densities=0.05,0.1

Runs that have a result are not repeated, and interrupted runs continue. To
share the work, start the command again, in another terminal or on another
machine that sees the same --results_dir. On a CPU, two processes of one thread
each are faster than one process of two threads:

    TF_NUM_INTRAOP_THREADS=1 bin/reproduce table2 --preset=small

On a cluster, have SLURM start N workers, then look at their progress:

    bin/reproduce table2 --slurm=N --slurm_options='--time=8:00:00'
    bin/reproduce table2 --status
"""

import ast
import functools
import sys

from absl import app, flags, logging

from rigl_keras import _reading, _text
from rigl_keras.experiments import exits
from rigl_keras.experiments.protocol import journal, variations
from rigl_keras.experiments.reproduction import slurm

# Modules that need TensorFlow are imported where they are used, so that
# --help is fast.

__all__ = ["main"]


def _changes(bindings):
    """Returns bindings as names and values."""
    changes = []
    for binding in bindings:
        name, equals, value = binding.partition("=")
        try:
            number = ast.literal_eval(value.strip())
            bits = isinstance(number, bool)
            if not equals or not (bits or _reading.is_number(number)):
                raise ValueError
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(
                "--gin_bindings takes numbers, such as 'train.length = 4'; "
                "for anything else write a preset. Received: "
                f"{_text.brief(binding)}."
            ) from None
        changes.append((name.strip(), number))
    return tuple(changes)


def _define_flags():
    """Defines the flags; returns those about SLURM."""
    flags.DEFINE_string(
        "preset",
        variations.FULL,
        "full (the report's setting), small, fifth, or the path of a gin file "
        "that is read after each row's own.",
    )
    flags.DEFINE_list("densities", [], "Densities, instead of the report's.")
    flags.DEFINE_list("seeds", [], "Seeds, instead of 0,1,2.")
    flags.DEFINE_list(
        "rows", [], "Only these rows, gin files or patterns such as 'rigl_*'."
    )
    flags.DEFINE_multi_string(
        "gin_bindings",
        [],
        "Binding such as 'train.length = 4', over those of all runs. The "
        "changed runs have other names.",
    )
    flags.DEFINE_bool("dry_run", False, "Show the plan, and stop.")
    flags.DEFINE_bool(
        "status", False, "Show the state and the worker of each run, and stop."
    )
    array = slurm.Flags(
        "reproduce", "rigl_keras.experiments.reproduction.reproduce_command"
    )
    flags.DEFINE_bool(
        "worker",
        False,
        "Train the runs that no other process trains, and end. --slurm starts "
        "such workers.",
    )
    flags.DEFINE_bool("list", False, "Show what can be reproduced, and stop.")
    flags.DEFINE_string("results_dir", "results", "Folder of all results.")
    flags.DEFINE_string(
        "data_dir", None, "Folder of prepared data sets, over TFDS_DATA_DIR."
    )
    return array


def _runs(argv):
    """Returns the preset and the runs that the command line names."""
    from rigl_keras.experiments.reproduction import plans

    given = flags.FLAGS
    if len(argv) != 2:
        raise app.UsageError(
            f"Pass one of {', '.join(plans.TARGETS)}. Received: "
            f"{' '.join(argv[1:]) or 'none'}. --list describes them."
        )
    preset = plans.Preset(given.preset)
    runs = plans.runs(
        argv[1],
        preset=preset,
        densities=exits.numbers("densities", given.densities, float),
        seeds=exits.numbers("seeds", given.seeds, int),
        rows=given.rows,
        changes=_changes(given.gin_bindings),
    )
    return preset, runs


def _run(array, argv):
    """Trains runs, submits workers that train them, or shows their state."""
    given = flags.FLAGS
    if given.list:
        print(journal.as_list())
        return
    from rigl_keras.experiments.reproduction.reproduce import (
        check_data,
        reproduce,
    )
    from rigl_keras.experiments.reproduction.results import Results
    from rigl_keras.experiments.reproduction.status import status_table

    logging.set_verbosity(logging.WARNING)
    preset, runs = _runs(argv)
    results = Results(given.results_dir, preset.folder)
    if given.status:
        print(status_table(runs, results))
        return
    if not given.dry_run and not given.worker:
        missing = [run for run in runs if not results.finished(run)]
        check_data(missing, data_dir=given.data_dir)
    if array.given and not given.dry_run:
        array.submit(argv, results.path, extra=["--worker"])
        return
    exits.raise_stop_requests()
    failed = reproduce(
        runs,
        results,
        data_dir=given.data_dir,
        dry_run=given.dry_run,
        worker=given.worker,
    )
    if array.given and given.dry_run:
        array.show(argv, results.path, extra=["--worker"])
    if failed:
        sys.exit(1)


def main() -> None:
    """Reads the command line and trains the runs that it names."""
    exits.run_command(
        "reproduce",
        functools.partial(_run, _define_flags()),
        about=__doc__,
        interrupted="the same command continues after the last epoch",
    )


if __name__ == "__main__":
    main()
