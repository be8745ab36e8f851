"""The figures of `bin/benchmark language`."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from rigl_keras._figure_style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    TICKS,
    TITLE,
    VERMILION,
    dress,
    legend_below,
    new_figure,
)
from rigl_keras.experiments.benchmarks.language_losses import Point
from rigl_keras.experiments.benchmarks.language_steps import Step, sizes

__all__ = ["losses", "step_times"]

_COLOURS = (BLACK, VERMILION, BLUE, GREEN, ORANGE, PURPLE, SKY, GREY)
_STYLES = ("-", "--", "-.", ":")


def step_times(steps: Sequence[Step]) -> Figure:
    """Draws the median time of a training step, a bar for each side.

    Args:
        steps: At least one step, all from one measurement.
    """
    figure = new_figure(6.8, 1.2 + 0.32 * len(steps))
    axes = figure.subplots()
    names = [_name(step) for step in steps]
    for i, step in enumerate(steps):
        axes.barh(i, step.seconds, color=BLUE if step.product else GREY)
        # A line in the bar shows the minimum.
        axes.plot([step.least_seconds] * 2, [i - 0.4, i + 0.4], color=BLACK)
        axes.annotate(
            f" {step.seconds:.2f} s, {step.speed_up:.2f}x",
            (step.seconds, i),
            va="center",
            fontsize=TICKS,
        )
    axes.set_yticks(range(len(steps)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(step.seconds for step in steps))
    dress(axes, x="seconds a training step: median, and minimum as a line")
    axes.grid(axis="y", visible=False)
    first = steps[0]
    figure.suptitle(
        f"GPT of {sizes(first)}\n{first.machine}",
        fontsize=TITLE,
        x=0.01,
        ha="left",
    )
    return figure


def _name(step):
    if not step.product:
        return step.side
    return f"{step.side}, density {step.density:g}, {step.product}"


def losses(points: Sequence[Point]) -> Figure:
    """Draws validation loss over steps and over training FLOPs, by runs.

    Args:
        points: At least one point.
    """
    figure = new_figure(9.4, 3.9)
    grid = figure.subplots(1, 2, sharey=True)
    runs = list(dict.fromkeys(point.run for point in points))
    for axes, field, label in (
        (grid[0], "step", "optimizer steps"),
        (
            grid[1],
            "training_flops_ratio",
            "training FLOPs over all of the dense run's",
        ),
    ):
        for i, run in enumerate(runs):
            own = [point for point in points if point.run == run]
            axes.plot(
                [getattr(point, field) for point in own],
                [point.validation_loss for point in own],
                color=_COLOURS[i % len(_COLOURS)],
                ls=_STYLES[i % len(_STYLES)],
                lw=1.6,
                label=run,
            )
        dress(axes, x=label)
    grid[1].set_xscale("log")
    grid[0].set_ylabel("validation loss (nats a character)", fontsize=TICKS)
    legend_below(grid[0], ncols=4)
    return figure
