"""The report's figures, each with its text and table."""

from typing import cast

from rigl_keras._text import exact
from rigl_keras.experiments.protocol import published, rows
from rigl_keras.experiments.report import (
    contents,
    method_figures,
    panels,
    redistribution_figures,
    search_figures,
    summaries,
)
from rigl_keras.experiments.report.cells import (
    NONE,
    Context,
    Marks,
    accuracy_cell,
    difference_to_published,
    flops_cells,
    percent_cell,
    seeds_cell,
    signed_cell,
    updates_cell,
)
from rigl_keras.experiments.report.contents import (
    HAS,
    RIGL,
    RIGL_CIFAR100,
    TITLES,
)
from rigl_keras.experiments.report.page import Block, Section
from rigl_keras.experiments.report.tables import add_line

__all__ = ["across", "figure_2", "figure_3", "figure_4", "tuning"]


# By figure: its network, and what makes its panels.
_ACROSS = {
    "figure1": ("wrn", panels.panels),
    "figure1c": ("wrn", panels.longer),
    "cifar100": ("resnet50", panels.of_cifar100),
}


def across(context: Context, name: str) -> Section:
    """Accuracy over density, as Figure 1 has it."""
    picture = None
    if HAS[name](context.records):
        network, made = _ACROSS[name]
        picture = contents.picture_of(
            context,
            name,
            panels.across_densities,
            context.records,
            network,
            made(context.records, network),
        )
    text = [
        "Lines join means over seeds; small hollow markers are single seeds. "
        "Where a panel has two kinds of masks, those of ERK have hollow means."
    ]
    if name == "figure1" and context.with_published:
        text.append(
            "About the published figure: " + " ".join(published.notes(name))
        )
    return Section(name, TITLES[name], text, picture)


def figure_2(context: Context, name: str) -> Section:
    found = context.records
    if not HAS[name](found):
        return Section(name, TITLES[name])
    for row, density, changes in sorted(
        {
            (run.gin, run.density, run.changes)
            for run in found.runs
            if run.row in RIGL.values()
            and "sgd.learning_rate" in dict(run.changes)
        }
    ):
        summary = summaries.of(found, row, density, changes)
        add_line(context, name, rows.row(row).label, summary)
    text = ("Means over seeds; bars are the sample standard deviation.",)
    picture = contents.picture_of(
        context, name, search_figures.learning_rates, found
    )
    return Section(name, TITLES[name], text, picture)


def figure_3(context: Context, name: str) -> Section:
    gins = RIGL if name == "figure3" else RIGL_CIFAR100
    found = context.records
    if not HAS[name](found):
        return Section(name, TITLES[name])
    printed = published.cells(name) if context.with_published else ()
    columns = ["masks", "density", "FLOPs train", "accuracy (%)", "seeds"]
    if printed:
        columns.append("report: accuracy (%)")
        if context.comparable:
            columns.append("difference")
    lines, marks = [], Marks()
    for mask, gin in gins.items():
        own = {r.density for r in found.runs if r.row == gin and not r.changes}
        for density in sorted(cast(set[float], own)):
            summary = summaries.of(found, gin, density)
            cell = next(
                (
                    c
                    for c in printed
                    # The densities of ERK's bars are not published.
                    if mask == "uniform"
                    and (c.gin, c.density) == (gin, density)
                ),
                None,
            )
            line = [
                mask,
                exact(density),
                flops_cells(context, summary)[0],
                accuracy_cell(summary),
                seeds_cell(summary),
            ]
            if printed:
                accuracy = NONE
                if cell is not None:
                    accuracy = percent_cell(cell.accuracy, cell.std)
                    accuracy += marks.of(cell.note)
                line.append(accuracy)
                if context.comparable:
                    line.append(
                        signed_cell(
                            difference_to_published(context, summary, cell)
                        )
                    )
            lines.append(line)
            add_line(context, name, rows.row(gin).label, summary, cell)
    text = [
        "Numbers beside the points are densities. Uniform and ERK masks of one "
        "density cost differently; dotted lines join points that cost the "
        "same. Bars are the sample standard deviation."
    ]
    if printed:
        text.append(
            "About the published numbers: " + " ".join(published.notes(name))
        )
        erk = [
            f"{percent_cell(cell.accuracy, cell.std)} at the FLOPs of uniform "
            f"masks of density {exact(cast(float, cell.density))}"
            for cell in printed
            if cell.gin == gins["ERK"]
        ]
        text.append(f"The report's ERK: {'; '.join(erk)}.")
    picture = contents.picture_of(
        context,
        name,
        method_figures.equal_flops,
        found,
        gins,
        name,
        with_published=context.comparable,
    )
    return Section(
        name,
        TITLES[name],
        text,
        picture,
        [Block(columns, lines)],
        marks.notes,
    )


def figure_4(context: Context, name: str) -> Section:
    found = context.records
    if not HAS[name](found):
        return Section(name, TITLES[name])
    text = (
        "Left, every seed is a line; right, means over seeds. RigL alone "
        "keeps the density of each layer, so that its lines are level.",
    )
    picture = contents.picture_of(
        context, name, redistribution_figures.redistribution, found
    )
    return Section(name, TITLES[name], text, picture)


def tuning(context: Context, name: str) -> Section:
    found = context.records
    if not HAS[name](found):
        return Section(name, TITLES[name])
    for mask, gin in RIGL.items():
        densities = {run.density for run in found.runs if run.row == gin}
        for density in sorted(cast(set[float], densities)):
            for trial in summaries.trials(found, gin, density):
                updates = updates_cell(trial.drop_fraction, trial.frequency)
                label = f"{mask}, {updates}"
                add_line(context, name, label, trial.summary)
    text = (
        "Colour is the mean validation accuracy of settings with all seeds; "
        "contours are interpolated between them, where there are at least "
        "four.",
    )
    picture = contents.picture_of(context, name, search_figures.tuning, found)
    return Section(name, TITLES[name], text, picture)
