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
import sys

from absl import app, flags, logging

from rigl_keras import _reading, _text
from rigl_keras.experiments import exits
from rigl_keras.experiments.protocol import journal, variations
from rigl_keras.experiments.reproduction import slurm

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


def main() -> None:
    """Reads the command line and trains the runs that it names."""
    preset = flags.DEFINE_string(
        "preset",
        variations.FULL,
        "full (the report's setting), small, or the path of a gin file that "
        "is read after each row's own.",
    )
    densities = flags.DEFINE_list(
        "densities", [], "Densities, instead of the report's."
    )
    seeds = flags.DEFINE_list("seeds", [], "Seeds, instead of 0,1,2.")
    rows = flags.DEFINE_list(
        "rows", [], "Only these rows, gin files or patterns such as 'rigl_*'."
    )
    bindings = flags.DEFINE_multi_string(
        "gin_bindings",
        [],
        "Binding such as 'train.length = 4', over those of all runs. The "
        "changed runs have other names.",
    )
    dry_run = flags.DEFINE_bool("dry_run", False, "Show the plan, and stop.")
    status = flags.DEFINE_bool(
        "status", False, "Show the state and the worker of each run, and stop."
    )
    array = slurm.Flags(
        "reproduce", "rigl_keras.experiments.reproduction.reproduce_command"
    )
    worker = flags.DEFINE_bool(
        "worker",
        False,
        "Train the runs that no other process trains, and end. --slurm starts "
        "such workers.",
    )
    listed = flags.DEFINE_bool(
        "list", False, "Show what can be reproduced, and stop."
    )
    results_dir = flags.DEFINE_string(
        "results_dir", "results", "Folder of all results."
    )
    data_dir = flags.DEFINE_string(
        "data_dir", None, "Folder of prepared data sets, over TFDS_DATA_DIR."
    )

    def run(argv):
        if listed.value:
            print(journal.as_list())
            return
        from rigl_keras.experiments.reproduction import plans
        from rigl_keras.experiments.reproduction.reproduce import (
            check_data,
            reproduce,
        )
        from rigl_keras.experiments.reproduction.results import Results
        from rigl_keras.experiments.reproduction.status import status_table

        logging.set_verbosity(logging.WARNING)
        if len(argv) != 2:
            raise app.UsageError(
                f"Pass one of {', '.join(plans.TARGETS)}. Received: "
                f"{' '.join(argv[1:]) or 'none'}. --list describes them."
            )
        chosen = plans.Preset(preset.value)
        runs = plans.runs(
            argv[1],
            preset=chosen,
            densities=exits.numbers("densities", densities.value, float),
            seeds=exits.numbers("seeds", seeds.value, int),
            rows=rows.value,
            changes=_changes(bindings.value),
        )
        results = Results(results_dir.value, chosen.folder)
        if status.value:
            print(status_table(runs, results))
            return
        if not dry_run.value and not worker.value:
            missing = [run for run in runs if not results.finished(run)]
            check_data(missing, data_dir=data_dir.value)
        if array.given and not dry_run.value:
            array.submit(argv, results.path, extra=["--worker"])
            return
        exits.raise_stop_requests()
        failed = reproduce(
            runs,
            results,
            data_dir=data_dir.value,
            dry_run=dry_run.value,
            worker=worker.value,
        )
        if failed:
            sys.exit(1)

    exits.run_command(
        "reproduce",
        run,
        about=__doc__,
        interrupted="the same command continues after the last epoch",
    )


if __name__ == "__main__":
    main()
