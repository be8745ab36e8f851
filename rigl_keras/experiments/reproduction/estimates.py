"""How long runs will take, before they start."""

from collections.abc import Sequence

from rigl_keras._text import aligned, exact
from rigl_keras.experiments.reproduction import costs
from rigl_keras.experiments.reproduction.plans import Run
from rigl_keras.experiments.reproduction.results import Results

__all__ = ["estimate", "plan_table"]

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
