"""A table or figure of the report, by one command.

    bin/reproduce table2 --dry_run                 the plan and what it costs
    bin/reproduce figure1 --preset=small --densities=0.05,0.1

Runs that have a result are not repeated, and those that were interrupted go
on. To share the work start the command again, in another terminal or on
another machine that sees the same --results_dir. On a CPU two processes of one
thread each train more than one process of two:

    TF_NUM_INTRAOP_THREADS=1 bin/reproduce table2 --preset=small
"""

import ast
import sys
from collections.abc import Sequence

import tqdm
from absl import app, flags, logging

import gin
from rigl_keras import reading
from rigl_keras.experiments import costs, data, exits, plans
from rigl_keras.experiments.plans import Run
from rigl_keras.experiments.results import Results
from rigl_keras.experiments.rows import exact
from rigl_keras.experiments.work import Progress, work_off
from rigl_keras.sparsify import aligned

__all__ = [
    "Bar",
    "check_data",
    "estimate",
    "main",
    "numbers",
    "plan_table",
    "reproduce",
]

Estimate = dict[Run, tuple[costs.Cost, float]]


def estimate(runs: Sequence[Run], results: Results) -> Estimate:
    """Returns `{run: (cost, seconds)}` of runs that have no result yet.

    Seconds are those of the steps that are left, at the time that a step of
    the network takes here and now.
    """
    estimates = {}
    for run in runs:
        if results.finished(run):
            continue
        run.configure()
        cost = costs.planned()
        left = 1 - results.epochs(run) / cost.epochs
        second = costs.seconds_of_step(cost.network)
        estimates[run] = cost, max(left, 0.0) * cost.steps * second
    return estimates


def plan_table(runs: Sequence[Run], estimates: Estimate) -> str:
    """Returns the plan as a table: each row, density and change, its cost."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.row, run.density, run.changes), []).append(run)
    rows = [
        ("run", "density", "seeds", "left", "FLOPs train", "test", "total", "h")
    ]
    for (row, density, changes), group in groups.items():
        left = [estimates[run] for run in group if run in estimates]
        cost = left[0][0] if left else None
        values = ", ".join(
            f"{name} = {exact(value)}" for name, value in changes
        )
        rows.append(
            (
                f"{row} {values}".rstrip(),
                "-" if density is None else exact(density),
                ",".join(str(run.seed) for run in group),
                str(len(left)),
                f"{cost.training_flops_ratio:.2f}x" if cost else "",
                f"{cost.inference_flops_ratio:.2f}x" if cost else "",
                f"{sum(c.total_flops for c, _ in left):.2e}" if cost else "",
                f"{sum(s for _, s in left) / 3600:.1f}" if cost else "",
            )
        )
    total = sum(c.total_flops for c, _ in estimates.values())
    hours = sum(s for _, s in estimates.values()) / 3600
    summary = (
        f"{len(runs)} runs, {len(runs) - len(estimates)} finished, "
        f"{len(estimates)} left: {total:.2e} FLOPs, about {hours:.1f} h in one "
        "process here."
    )
    return "\n".join([*aligned(rows, left=1), "", summary])


class Bar(Progress):
    """A progress bar over runs, with the time that is left.

    Args:
        runs: All runs of the plan.
        results: Where they are kept.
        estimates: What `estimate` says of those that are left.
    """

    def __init__(
        self, runs: Sequence[Run], results: Results, estimates: Estimate
    ):
        self._results, self._estimates = results, dict(estimates)
        self._pace = []  # seconds taken over seconds estimated, by run
        self._bar = tqdm.tqdm(
            total=len(runs),
            initial=len(runs) - len(estimates),
            bar_format="{n_fmt}/{total_fmt} runs |{bar:20}| {elapsed}{desc}",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._run = self._epoch = None
        self._left()

    def start(self, run):
        self._run, self._epoch = run, None
        again = "continues" if self._results.epochs(run) else "begins"
        self._say(f"{run.name} {again}")

    def epoch(self, run, epochs):
        if epochs != self._epoch:
            self._epoch = epochs
            self._left(f"{run.name}: epoch {epochs + 1}")

    def finish(self, run, *, seconds, failure):
        _, estimated = self._estimates.pop(run)
        if failure is not None:
            self._say(f"{run.name} FAILED: {failure}")
        else:
            self._pace.append(seconds / max(estimated, 1e-9))
            accuracy = self._results.result(run).get("test_accuracy")
            shown = (
                f"{accuracy:.2%}"
                if reading.is_number(accuracy)
                else f"is no number, {reading.brief(accuracy)}"
            )
            self._say(
                f"{run.name} finished after {seconds:.0f} s: test accuracy "
                f"{shown}; {self._left()} left"
            )
            self._bar.update()

    def elsewhere(self, run):
        self._estimates.pop(run, None)
        self._say(f"{run.name} finished by another process")
        self._bar.update()

    def wait(self, runs):
        self._left(f"waiting for {len(runs)} that others train")

    def close(self):
        self._bar.close()

    def _say(self, line):
        # Above the bar, where there is one.
        tqdm.tqdm.write(line)
        sys.stdout.flush()

    def _left(self, doing=""):
        """Shows and returns the time left, at the pace of what is done."""
        pace = sum(self._pace) / len(self._pace) if self._pace else 1.0
        at_work = 1 + sum(
            run != self._run and self._results.claimed(run)
            for run in self._estimates
        )
        seconds = sum(s for _, s in self._estimates.values())
        left = tqdm.tqdm.format_interval(pace * seconds / at_work)
        self._bar.set_description_str(f"<{left}  {doing}")
        return left


def numbers(name: str, kind: type, texts: Sequence[str]) -> tuple:
    """Returns the numbers that a flag lists.

    Args:
        name: The flag.
        kind: int or float.
        texts: What is between its commas.

    Raises:
        ValueError: One of them is none.
    """
    try:
        return tuple(kind(text) for text in texts)
    except ValueError as error:
        raise ValueError(
            f"--{name} takes {'whole ' if kind is int else ''}numbers, "
            f"separated by commas. Received: {','.join(texts)}."
        ) from error


def _changes(bindings):
    """Returns bindings as names and values."""
    changes = []
    for binding in bindings:
        name, equals, value = binding.partition("=")
        try:
            number = ast.literal_eval(value.strip())
            bits = isinstance(number, bool)
            if not equals or not (bits or reading.is_number(number)):
                raise ValueError
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(
                "--gin_bindings takes numbers, such as 'train.length = 4'; "
                "for anything else write a preset. Received: "
                f"{reading.brief(binding)}."
            ) from None
        changes.append((name.strip(), number))
    return tuple(changes)


def main() -> None:
    """Reads the command line and reproduces what it names."""
    preset = flags.DEFINE_string(
        "preset",
        plans.FULL,
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
        try:
            chosen = plans.Preset(preset.value)
            runs = plans.runs(
                argv[1],
                preset=chosen,
                densities=numbers("densities", float, densities.value),
                seeds=numbers("seeds", int, seeds.value),
                rows=rows.value,
                changes=_changes(bindings.value),
            )
            results = Results(results_dir.value, chosen.folder)
            if not dry_run.value:
                missing = [run for run in runs if not results.finished(run)]
                check_data(missing, data_dir=data_dir.value)
            failed = reproduce(
                runs, results, data_dir=data_dir.value, dry_run=dry_run.value
            )
        except (ValueError, data.DatasetUnavailableError) as error:
            print(f"reproduce: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(
                "\nreproduce: interrupted; the same command goes on from the "
                "last epoch.",
                file=sys.stderr,
            )
            sys.exit(130)
        if failed:
            sys.exit(1)

    app.run(exits.one_line("reproduce", run))


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
        failed = work_off(runs, results, progress=bar, data_dir=data_dir)
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


if __name__ == "__main__":
    main()
