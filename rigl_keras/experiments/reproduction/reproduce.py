"""A table or figure of the report, by one command.

    bin/reproduce table2 --dry_run                 the plan and what it costs
    bin/reproduce figure1 --preset=small --densities=0.05,0.1

Runs that have a result are not repeated, and those that were interrupted go
on. To share the work start the command again, in another terminal or on
another machine that sees the same --results_dir. On a CPU two processes of one
thread each train more than one process of two:

    TF_NUM_INTRAOP_THREADS=1 bin/reproduce table2 --preset=small

On a cluster, N workers that SLURM starts, and how far they are:

    bin/reproduce table2 --slurm=N --slurm_options='--time=8:00:00'
    bin/reproduce table2 --status
"""

import ast
import sys
from collections.abc import Sequence

from absl import app, flags, logging

import gin
from rigl_keras import _reading, _text
from rigl_keras.experiments import data, exits
from rigl_keras.experiments.protocol import variations
from rigl_keras.experiments.reproduction import plans, slurm
from rigl_keras.experiments.reproduction.estimates import estimate, plan_table
from rigl_keras.experiments.reproduction.plans import Run
from rigl_keras.experiments.reproduction.progress import Bar, Lines
from rigl_keras.experiments.reproduction.results import Results
from rigl_keras.experiments.reproduction.status import status_table
from rigl_keras.experiments.reproduction.workers import train_missing

__all__ = ["check_data", "main", "reproduce"]


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
    """Reads the command line and reproduces what it names."""
    preset = flags.DEFINE_string(
        "preset",
        variations.FULL,
        "full (the report's setting), small, or the path of a gin file that "
        "is read after each row's own.",
    )
    densities = flags.DEFINE_list(
        "densities", [], "Densities, in place of the report's."
    )
    seeds = flags.DEFINE_list("seeds", [], "Seeds, in place of 0,1,2.")
    rows = flags.DEFINE_list(
        "rows", [], "Only these rows, gin files or patterns such as 'rigl_*'."
    )
    bindings = flags.DEFINE_multi_string(
        "gin_bindings",
        [],
        "Binding such as 'train.length = 4', over those of all runs; these "
        "are then other runs.",
    )
    dry_run = flags.DEFINE_bool("dry_run", False, "Show the plan, and stop.")
    status = flags.DEFINE_bool(
        "status",
        False,
        "Show how far runs are, and who trains them, and stop.",
    )
    worker = flags.DEFINE_bool(
        "worker",
        False,
        "Train what no other process trains, and end: what --slurm starts.",
    )
    array = slurm.Flags("rigl_keras.experiments.reproduction.reproduce")
    results_dir = flags.DEFINE_string(
        "results_dir", "results", "Folder of all results."
    )
    data_dir = flags.DEFINE_string(
        "data_dir", None, "Folder of prepared data sets, over TFDS_DATA_DIR."
    )

    def run(argv):
        logging.set_verbosity(logging.WARNING)
        if len(argv) != 2:
            raise app.UsageError(
                f"Pass one of {', '.join(plans.TARGETS)}. Received: "
                f"{' '.join(argv[1:]) or 'none'}."
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
        refusals=(data.DatasetUnavailableError,),
        interrupted="interrupted; the same command goes on from the last "
        "epoch.",
    )


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
    worker: bool = False,
) -> dict[Run, str]:
    """Shows what runs will cost and trains those that are missing.

    Args:
        runs: The runs, each after those that it starts from.
        results: Where they are kept.
        data_dir: Folder of prepared data sets, over TFDS_DATA_DIR.
        dry_run: Whether the plan is shown, and nothing trained.
        worker: Whether this is one of many: it measures no costs, and leaves
            runs to those that train them.

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
    for run, reason in failed.items():
        print(
            f"{run.name} failed: {reason}\n"
            f"  what it said: {results.folder(run) / 'log.txt'}",
            file=sys.stderr,
        )
    done = sum(results.finished(run) for run in runs)
    print(f"{done} of {len(runs)} runs are finished, {len(failed)} failed.")
    return failed


if __name__ == "__main__":
    main()
