"""The report's tables."""

from typing import cast

from rigl_keras._text import exact
from rigl_keras.experiments.protocol import published, rows, variations
from rigl_keras.experiments.report import (
    comparisons,
    contents,
    method_figures,
    summaries,
)
from rigl_keras.experiments.report.cells import (
    NONE,
    Context,
    Marks,
    accuracy_and_seeds_cell,
    accuracy_cell,
    difference_to_published,
    flops_cells,
    interval_cell,
    listed_seeds,
    ratio_cell,
    scientific,
    seeds_cell,
    signed_cell,
    train_and_test_cell,
    updates_cell,
)
from rigl_keras.experiments.report.contents import HAS, RIGL, TITLES
from rigl_keras.experiments.report.page import Block, Section, as_csv_cell

__all__ = [
    "COLUMNS",
    "add_line",
    "methods",
    "other_runs",
    "table_4",
    "table_section",
]

COLUMNS = (
    "table",
    "row",
    "gin",
    "density",
    "changes",
    "seeds",
    "n",
    "wanted",
    "failed",
    "accuracy_mean",
    "accuracy_std",
    "validation_mean",
    "training_flops_ratio",
    "inference_flops_ratio",
    "published_accuracy",
    "published_std",
    "published_training_flops_ratio",
    "published_inference_flops_ratio",
    "difference",
    "note",
)


def add_line(context, table, label, summary, cell=None):
    """Adds a line to report.csv."""
    if not context.with_published:
        cell = None
    difference = difference_to_published(context, summary, cell)
    values = [
        table,
        label,
        summary.row,
        summary.density,
        ";".join(f"{name}={exact(value)}" for name, value in summary.changes),
        " ".join(str(run.seed) for run in summary.finished),
        summary.n,
        summary.wanted,
        summary.failed,
        summary.mean,
        summary.std,
        summary.validation if summary.n else None,
        summary.training_flops_ratio,
        summary.inference_flops_ratio,
        cell and cell.accuracy,
        cell and cell.std,
        cell and cell.train_flops,
        cell and cell.test_flops,
        difference,
        cell.note if cell else "",
    ]
    context.lines.append(
        ["" if v is None else as_csv_cell(str(v)) for v in values]
    )


def table_section(context: Context, name: str) -> Section:
    """Tables 1, 2, 3 and 5: a block of rows for each network and density."""
    cells = published.cells(name)
    marks = Marks()
    blocks = []
    networks = dict.fromkeys(rows.row(cell.gin).network for cell in cells)
    for network in networks:
        of_network = [c for c in cells if rows.row(c.gin).network == network]
        gins = {cell.gin for cell in of_network}
        trained = any(run.row in gins for run in context.records.runs)
        wanted = trained or (context.asked and context.comparable)
        if len(networks) > 1 and not wanted:
            continue
        dense = [cell for cell in of_network if cell.density is None]
        masked = [cell for cell in of_network if cell.density is not None]
        at = [(masked, d) for d in _densities(context, of_network, gins)]
        for printed, density in [*at, (dense, None)]:
            if not printed:
                continue
            title = "dense" if density is None else f"density {exact(density)}"
            if len(networks) > 1:
                title = f"{rows.NETWORKS[network].split()[-1]}, {title}"
            block = _block(context, name, printed, density, title, marks)
            if block.lines:
                blocks.append(block)
    text = []
    if context.with_published:
        text += [
            "About the published numbers: " + " ".join(published.notes(name))
        ]
    return Section(name, TITLES[name], text, None, blocks, marks.notes)


def _densities(context, cells, gins):
    printed = {cell.density for cell in cells} - {None}
    found = set(summaries.densities(context.records, gins))
    if context.comparable or not found:
        found |= printed
    return sorted(found)


def _block(context, name, cells, density, title, marks):
    columns = ["method", "accuracy (%)", "seeds", "FLOPs train", "test"]
    of_report = "report" if context.comparable else "report, its own setting"
    in_report = density in {cell.density for cell in cells}
    with_published = context.with_published and in_report
    if with_published:
        columns.append(f"{of_report}: accuracy (%)")
        if name == "table1":
            columns.append("RigL paper")
        else:
            columns.append("report: FLOPs")
        if context.comparable:
            columns += ["difference", "95 % interval"]
    columns.append("gin file")
    lines, group = [], ""
    for cell in _rows_of(cells):
        at = None if cell.density is None else density
        summary = summaries.of(context.records, cell.gin, at)
        # Rows that the report lacks at this density are not missing.
        if not (in_report or summary.n or summary.others):
            continue
        if cell.group != group:
            group = cell.group
            lines.append(group.split(": ")[-1])
        printed = next(
            (
                c
                for c in cells
                if (c.group, c.row, c.gin, c.density)
                == (cell.group, cell.row, cell.gin, at)
            ),
            None,
        )
        line = [
            cell.row,
            accuracy_cell(summary),
            seeds_cell(summary),
            *flops_cells(context, summary),
        ]
        if with_published:
            line += _published(name, printed, marks)
            if context.comparable:
                line += _difference(summary, printed)
        lines.append([*line, cell.gin])
        add_line(context, name, cell.row, summary, printed)
    return Block(columns, lines, title)


def _difference(summary, printed):
    """Returns the cells of how far a mean is from the published one."""
    found = printed and comparisons.to_published(
        summary, printed.accuracy, printed.std
    )
    if found is None:
        return [NONE, NONE]
    return [signed_cell(found.mean), interval_cell(found)]


def _rows_of(cells):
    """Returns one cell for each row, in the order of the table."""
    return list(
        {(cell.group, cell.row, cell.gin): cell for cell in cells}.values()
    )


def _published(name, cell, marks):
    if cell is None:
        return [NONE, NONE]
    accuracy = cell.printed + marks.of(cell.note)
    if name == "table1":
        original = cell.original
        return [accuracy, NONE if original is None else f"{original:.1f}"]
    if cell.dense_train_flops is not None:
        costs = (cell.dense_train_flops, cell.dense_test_flops)
        return [accuracy, ", ".join(map(scientific, costs))]
    return [
        accuracy,
        train_and_test_cell(
            ratio_cell(cell.train_flops), ratio_cell(cell.test_flops)
        ),
    ]


def table_4(context: Context, name: str) -> Section:
    """The reference setting of mask updates, and the best tried one."""
    found, marks, lines = context.records, Marks(), []
    printed = published.cells(name)
    for mask, gin in RIGL.items():
        densities = {
            cast(float, cell.density) for cell in printed if cell.gin == gin
        }
        own = {run.density for run in found.runs if run.row == gin}
        tried_at = {
            density
            for density in cast(set[float], own)
            if summaries.trials(found, gin, density)
        }
        if not context.comparable:
            densities = tried_at
        for density in sorted(densities | tried_at):
            tried = summaries.trials(found, gin, density)
            best = summaries.best(tried)
            reference = summaries.of(found, gin, density)
            complete = sum(trial.summary.complete for trial in tried)
            optimum = f"optimum of {complete}" if tried else "optimum"
            lines.append(f"{mask} masks, density {exact(density)}")
            for label, summary, optimal in (
                ("reference", reference, False),
                (optimum, best and best.summary, True),
            ):
                cell = next(
                    (
                        c
                        for c in printed
                        if (c.gin, c.density, c.optimal)
                        == (gin, density, optimal)
                    ),
                    None,
                )
                lines.append(_setting(context, label, summary, cell, marks))
                if summary is not None:
                    label = f"{mask}, {label.split()[0]}"
                    add_line(context, name, label, summary, cell)
    columns = ["setting", "drop fraction, steps", "validation (%)"]
    columns += ["test (%)", "seeds"]
    text = [
        "The optimum is the setting with the highest mean validation accuracy "
        "among those tried with all seeds "
        f"{listed_seeds(found)}; their number stands beside it. Its test "
        "accuracy was not used for the choice."
    ]
    if context.with_published:
        columns += ["report: drop fraction, steps", "report: test (%)"]
        text += [
            "About the published numbers: " + " ".join(published.notes(name))
        ]
        if context.comparable:
            columns.append("difference")
    blocks = [Block(columns, lines)] if lines else []
    return Section(name, TITLES[name], text, None, blocks, marks.notes)


def _setting(context, label, summary, cell, marks):
    line = [label, *[NONE] * 4]
    if summary is not None:
        updates = summaries.settings_of(context.records, summary)
        settings = cast(tuple[float, float], updates)  # they are known here
        known = None not in updates and (summary.n or summary.others)
        validation = summary.validation if summary.n else None
        line = [
            label,
            updates_cell(*settings) if known else NONE,
            NONE if validation is None else f"{validation:.2f}",
            accuracy_cell(summary),
            seeds_cell(summary),
        ]
    if not context.with_published:
        return line
    if cell is None:
        line += [NONE, NONE]
    else:
        line += [
            updates_cell(cell.drop_fraction, cell.frequency),
            cell.printed + marks.of(cell.note),
        ]
    if context.comparable:
        line.append(
            signed_cell(
                summary and difference_to_published(context, summary, cell)
            )
        )
    return line


def methods(context: Context, name: str) -> Section:
    found = context.records
    if not HAS[name](found):
        return Section(name, TITLES[name])
    blocks = []
    for network, title in rows.NETWORKS.items():
        keys = _ordered(
            {
                (run.gin, run.changes)
                for run in found.runs
                if rows.row(run.gin).network == network
                and not summaries.is_trial(run)
            }
        )
        if keys:
            densities = summaries.densities(found, {gin for gin, _ in keys})
            blocks += _of_methods(context, name, keys, densities, title)
    text = (
        "Every row that has a run. A number in brackets says how many seeds "
        "are finished, if not all.",
    )
    picture = contents.picture_of(context, name, method_figures.methods, found)
    return Section(name, TITLES[name], text, picture, blocks)


def _of_methods(context, name, keys, densities, title):
    """Two tables of rows by densities: accuracies and costs.

    The dense network has no density, and its own column.
    """
    accuracies, costs = [], []
    any_dense = any(rows.row(gin).dense for gin, _ in keys)
    for gin, changes in keys:
        label = summaries.label(gin, changes)
        dense = rows.row(gin).dense
        found = [
            summaries.of(context.records, gin, density, changes)
            for density in ([None] if dense else densities)
        ]
        for summary in found:
            if summary.n or summary.others:
                add_line(context, name, label, summary)
        before = [""] if any_dense and not dense else []
        after = [""] * len(densities) if dense else []
        accuracy = map(accuracy_and_seeds_cell, found)
        accuracies.append([label, *before, *accuracy, *after])
        flops = [
            train_and_test_cell(*flops_cells(context, summary))
            for summary in found
        ]
        costs.append([label, *before, *flops, *after])
    heads = [f"density {exact(density)}" for density in densities]
    heads = ["dense"] * any_dense + heads
    data = title.split()[-1]
    return [
        Block(["method", *heads], accuracies, f"{data}: test accuracy (%)"),
        Block(["method", *heads], costs, f"{data}: FLOPs to train, to test"),
    ]


def _ordered(keys):
    """Sorts rows by method as in Table 2, then by masks and length."""
    order = ["Dense", "Small-Dense", "Static", "SET", "SNFS", "RigL"]

    def place(key):
        gin, changes = key
        row = rows.row(gin)
        method = order.index(row.method) if row.method in order else len(order)
        masks = ["uniform", "ER", "ERK", ""].index(row.distribution)
        return changes, method, row.method, row.all_data, row.length, masks, gin

    return sorted(keys, key=place)


def other_runs(context: Context) -> list[Section]:
    """Runs that no other section shows, such as those of new gin files."""
    found, lines = context.records, []
    shared = summaries.densities(found, {run.gin for run in found.runs})
    groups = dict.fromkeys(
        (run.gin, run.density, run.changes, summaries.is_trial(run))
        for run in found.finished
    )
    for row, density, changes, is_trial in groups:
        names = {name for name, _ in changes}
        shown = "sgd.learning_rate" not in names or HAS["figure2"](found)
        if row in RIGL.values() and names <= variations.TUNED and shown:
            continue  # in Figures 2 and 3, or in Table 4
        compared = density is None or density in shared
        if rows.row(row).network and compared and not is_trial:
            continue  # among all methods
        summary = summaries.of(found, row, density, changes)
        lines.append(
            [
                row,
                NONE if density is None else exact(density),
                ", ".join(f"{name} = {exact(value)}" for name, value in changes)
                or NONE,
                accuracy_cell(summary),
                seeds_cell(summary),
                *flops_cells(context, summary),
            ]
        )
        add_line(context, "other", rows.row(row).label, summary)
    if not lines:
        return []
    columns = ["row", "density", "changes", "accuracy (%)", "seeds"]
    columns += ["FLOPs train", "test"]
    return [Section("other", "Other runs", blocks=[Block(columns, lines)])]
