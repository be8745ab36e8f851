"""Estimates of the FLOPs and the time of runs before they start."""

import dataclasses
import itertools
from collections.abc import Sequence

from rigl_keras._text import aligned, exact, roughly, wrapped
from rigl_keras.experiments.progress_bar import ProgressBar
from rigl_keras.experiments.protocol import published, rows
from rigl_keras.experiments.reproduction import costs
from rigl_keras.experiments.reproduction.plans import Run
from rigl_keras.experiments.reproduction.results import Results

__all__ = ["counted", "estimate", "plan_table"]

Estimate = dict[Run, tuple[costs.Cost, float]]
_LOTTERY = "Lottery"


def counted(run: Run, *, printed: bool = True) -> tuple[costs.Cost, float]:
    """Returns the cost of a run, and its training FLOPs over dense training.

    It counts as the report does: a lottery ticket's FLOPs include those of
    the pruning run it starts from.

    Args:
        run: The run.
        printed: Whether to use the FLOPs that the report prints for this very
            run, if the densities of layers are not known before training.
    """
    run.configure()
    cost = costs.planned()
    if printed and not cost.certain:
        cost = _as_printed(run, cost)
    ratio = cost.training_flops_ratio
    if rows.row(run.row).method == _LOTTERY and run.source is not None:
        ratio += counted(run.source, printed=printed)[1]
    return cost, ratio


def _as_printed(run, cost):
    """Returns a cost with the FLOPs of the report, if it prints them."""
    if run.preset.path is not None or run.changes:
        return cost
    tables = map(published.cells, published.TABLES)
    for cell in itertools.chain.from_iterable(tables):
        of_run = (cell.gin, cell.density) == (run.row, run.density)
        if of_run and cell.train_flops and cell.test_flops:
            inference = cell.test_flops * cost.dense_flops
            training = cell.train_flops * 3 * cost.dense_flops
            if rows.row(run.row).method == _LOTTERY:
                training = 3 * inference  # without the pruning run
            else:
                training /= cost.times_as_long
            return dataclasses.replace(
                cost, inference_flops=inference, training_flops=training
            )
    return cost


def estimate(runs: Sequence[Run], results: Results) -> Estimate:
    """Returns `{run: (cost, seconds)}` of runs that have no result yet.

    Seconds are the number of steps left, times the seconds of a step on this
    machine (`costs.seconds_of_step`).
    """
    found = {}
    for run in runs:
        if not results.finished(run):
            cost, _ = counted(run)
            left = 1 - results.epochs(run) / cost.epochs
            found[run] = cost, max(left, 0.0) * cost.steps
    steps = dict.fromkeys(cost.step for cost, _ in found.values())
    with ProgressBar(
        unit="kinds of steps", total=len(steps), doing="timing", leave=False
    ) as bar:
        seconds = {s: costs.seconds_of_step(s) for s in bar.over(steps)}
    return {
        run: (cost, left * seconds[cost.step])
        for run, (cost, left) in found.items()
    }


def plan_table(runs: Sequence[Run], estimates: Estimate) -> str:
    """Returns a table of the cost of each row, density and change."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.row, run.density, run.changes), []).append(run)
    table: list[tuple[str, ...]] = [
        ("run", "density", "seeds", "left", "train", "test", "FLOPs", "time")
    ]
    headings: dict[int, str] = {}  # by the row that follows
    guessed, before = False, ()
    for (row, density, changes), group in groups.items():
        left = [estimates[run] for run in group if run in estimates]
        if changes != before:
            before = changes
            headings[len(table)] = "with " + (
                ", ".join(f"{name} = {exact(value)}" for name, value in changes)
                or "no change"
            )
        cells = ("", "", "", "")
        if left:
            cost, training = counted(group[0])
            about = "" if cost.certain else "~"
            guessed |= not cost.certain
            cells = (
                f"{about}{training:.2f}x",
                f"{about}{cost.inference_flops_ratio:.2f}x",
                # Short, because the longest row has to fit a terminal.
                f"{sum(c.total_flops for c, _ in left):.1e}".replace("+", ""),
                roughly(sum(s for _, s in left)),
            )
        table.append(
            (
                row,
                "-" if density is None else exact(density),
                ",".join(str(run.seed) for run in group),
                str(len(left)),
                *cells,
            )
        )
    total = sum(c.total_flops for c, _ in estimates.values())
    time = roughly(sum(s for _, s in estimates.values()))
    summary = wrapped(
        f"{len(runs)} runs, {len(runs) - len(estimates)} finished, "
        f"{len(estimates)} left: {total:.2e} FLOPs, about {time} in one "
        "process here."
    )
    summary += wrapped(
        "train, test: the FLOPs of one run, relative to the dense run. FLOPs, "
        "time: of all seeds that are left."
    )
    if guessed:
        summary += wrapped(
            "~: training decides the density of each layer. These are FLOPs "
            "that the report prints for this run or, if it has none, of the "
            "initial masks."
        )
    lines: list[str] = []
    for number, line in enumerate(aligned(table, left=1)):
        if number in headings:
            lines += wrapped(headings[number])
        lines.append(line)
    return "\n".join([*lines, "", *summary])
