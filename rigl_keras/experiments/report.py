"""Tables and figures of what bin/reproduce has trained.

    bin/report --preset=small                  all that has a finished run
    bin/report table2 figure1 --output=page    these, missing runs marked
    bin/report --results_dir=page/results.jsonl --output=again

Writes report.md, report.html (which needs no other file), report.csv (a line
for each cell), figures/ and results.jsonl, from which the same page can be
made without the folder of results.
"""

import csv
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

from rigl_keras import writing
from rigl_keras.experiments import (
    costs,
    exits,
    figures,
    plans,
    published,
    records,
    rows,
    summaries,
)
from rigl_keras.experiments.page import (
    Block,
    Page,
    Picture,
    Section,
    as_csv_cell,
    as_html,
    as_markdown,
)
from rigl_keras.experiments.records import Records
from rigl_keras.experiments.rows import exact
from rigl_keras.experiments.summaries import Summary
from rigl_keras.reading import brief, printable

__all__ = ["NAMES", "Report", "main", "report", "write"]

NAMES = (
    "methods",
    *published.TABLES,
    "figure1",
    "figure2",
    "figure3",
    "figure4",
    "tuning",
)
_PICTURES = (
    "methods",
    "table3",
    "figure1",
    "figure2",
    "figure3",
    "figure4",
    "tuning",
)
_TITLES = {
    "methods": "All methods",
    "table1": "Table 1: CIFAR-10, trained on all 50,000 images",
    "table2": "Table 2: CIFAR-10",
    "table3": "Table 3: CIFAR-100",
    "table4": "Table 4: tuned drop fraction and frequency of RigL",
    "table5": "Table 5: redistribution of layer-wise density",
    "figure1": "Figure 1: accuracy over density",
    "figure2": "Figure 2: learning rates",
    "figure3": "Figure 3: accuracy at equal training FLOPs",
    "figure4": "Figure 4: what redistribution does",
    "tuning": "The search for drop fraction and frequency",
}
_NONE = "-"


@dataclasses.dataclass(frozen=True)
class Report:
    """A report, to be written.

    Args:
        page: Its text, tables and figures.
        lines: The lines of report.csv, the names of its columns first.
        results: The lines of results.jsonl.
        notes: What was left out, counted once or not drawn, and what is odd.
    """

    page: Page
    lines: Sequence[Sequence[str]]
    results: str
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class _Context:
    """What each section needs."""

    records: Records
    comparable: bool  # whether the runs are of the report's own setting
    with_published: bool
    planned: Callable[[Summary], tuple[float, float]] | None
    asked: bool
    lines: list
    undrawn: dict  # {the name of a figure: why it cannot be drawn}


def report(
    found: Records,
    names: Sequence[str] = (),
    *,
    with_published: bool = False,
    with_planned: bool = False,
) -> Report:
    """Returns the report of the runs of one preset.

    Args:
        found: All runs.
        names: Which of `NAMES`. None at all: those that have a finished run.
        with_published: Whether the numbers of the report stand beside those
            of another preset, too. They always do beside those of the report's
            own setting.
        with_planned: Whether FLOPs are computed where no run is finished.

    Raises:
        ValueError: There is no such table or figure.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(
                f"A table or figure is one of {', '.join(NAMES)}. Received: "
                f"{name!r}."
            )
    comparable = found.preset == plans.FULL
    context = _Context(
        records=found,
        comparable=comparable,
        with_published=comparable or with_published,
        planned=_planned(found.preset) if with_planned else None,
        asked=bool(names),
        lines=[],
        undrawn={},
    )
    sections, left_out = [], []
    for name in NAMES:
        if names and name not in names:
            continue
        if name in names or _HAS[name](found):
            sections.append(_section(context, name))
        else:
            left_out.append(name)
    if not names:
        sections += _others(context)
    notes = [
        *found.notes,
        *(
            f"{_TITLES[name]}: its figure cannot be drawn ({why})."
            for name, why in context.undrawn.items()
        ),
    ]
    sections += _notes(found, notes)
    text = _introduction(context)
    if left_out:
        text.append(f"No run is finished of: {', '.join(left_out)}.")
    title = f"Results of rigl_keras: preset {found.preset}"
    return Report(
        Page(title, text, sections),
        [_COLUMNS, *context.lines],
        records.as_lines(found),
        notes,
    )


# When a section is shown unasked.


def _has_row(of_table):
    return _has_any({cell.gin for cell in published.cells(of_table)})


_RIGL = {"uniform": "rigl_uniform_wrn", "ERK": "rigl_erk_wrn"}
_FIGURE_4 = (
    *_RIGL.values(),
    "rigl_sg_uniform_wrn",
    "rigl_sm_uniform_wrn",
)


def _has_any(gins):
    def has(found):
        return any(
            run.row in gins and not run.changes for run in found.finished
        )

    return has


_HAS = {
    "methods": lambda found: any(
        rows.row(run.row).network and not summaries.is_trial(run)
        for run in found.finished
    ),
    **{table: _has_row(table) for table in published.TABLES},
    # Their reference settings alone are in Table 2 and Figure 1.
    "table4": figures.has_trials,
    "figure1": lambda found: bool(figures.panels(found, "wrn")),
    "figure2": figures.has_learning_rates,
    "figure3": _has_any(_RIGL.values()),
    "figure4": figures.has_redistribution,
    "tuning": figures.has_trials,
}


# What stands in cells.


def _percent(mean, std):
    if mean is None:
        return _NONE
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def _accuracy(summary):
    if summary.n:
        return _percent(summary.mean, summary.std)
    if summary.failed:
        return "failed"
    return "unfinished" if summary.others else _NONE


def _seeds(summary):
    if not summary.n and not summary.others:
        return _NONE
    text = f"{summary.n} of {summary.wanted}"
    if summary.failed:
        text += f", {summary.failed} failed"
    if summary.collapsed:
        text += f", {summary.collapsed} collapsed"
    return text


def _signed(difference):
    if difference is None:
        return _NONE
    return f"{round(difference, 2) + 0.0:+.2f}"  # without -0.00


def _ratio(value):
    return _NONE if value is None else f"{value:.2f}x"


def _flops(context, summary):
    """Returns FLOPs to train and to test; planned ones in brackets."""
    if not summary.n and context.planned is not None:
        planned = context.planned(summary)
        return tuple(f"({_ratio(value)})" for value in planned)
    return (
        _ratio(summary.training_flops_ratio),
        _ratio(summary.inference_flops_ratio),
    )


def _planned(preset):
    """Returns what computes the FLOPs of runs that are not finished."""

    def one(run):
        run.configure()
        return costs.planned()

    def planned(summary):
        run = plans.Run(
            summary.row,
            plans.Preset(preset),
            summary.density,
            seed=0,
            changes=summary.changes,
        )
        cost = one(run)
        training = cost.training_flops_ratio
        if rows.row(summary.row).method == "Lottery":
            training += one(run.source).training_flops_ratio
        return training, cost.inference_flops_ratio

    return planned


class _Marks:
    """Numbers the notes of a section."""

    def __init__(self):
        self.notes = []

    def of(self, note):
        if not note:
            return ""
        if note not in self.notes:
            self.notes.append(note)
        return f" [{self.notes.index(note) + 1}]"


_COLUMNS = (
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


def _add_line(context, table, label, summary, cell=None):
    """Adds a line to report.csv."""
    if not context.with_published:
        cell = None
    difference = _difference(context, summary, cell)
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


def _difference(context, summary, cell):
    if not context.comparable or cell is None or summary.mean is None:
        return None
    return summary.mean - cell.accuracy


# Sections.


def _introduction(context):
    found = context.records
    text = []
    settings, total = {}, 0.0
    for run in found.finished:
        result, own = run.result, run.result["settings"]
        total += result["seconds"] or 0.0
        if own.get("length", 1) != 1:
            continue
        dense = result["inference_flops"] / result["inference_flops_ratio"]
        epochs, batch = map(brief, (own.get("epochs"), own.get("batch_size")))
        line = (
            f"{result['model']} on {result['dataset']}: {epochs} epochs of "
            f"batch {batch}, {result['steps']:,} steps; the dense "
            f"network costs {_scientific(dense)} FLOPs a sample to test and "
            "three times as many to train"
        )
        settings.setdefault(line, None)
    if context.comparable:
        text.append(
            "These runs have the report's own setting. Its numbers stand "
            "beside them, with the difference of the means."
        )
    else:
        text.append(
            f"These runs are of the preset {found.preset}, not of the report's "
            "setting, which is WRN-22-2 on CIFAR-10 or ResNet-50 on CIFAR-100, "
            "trained for 250 epochs: accuracies of the two are of different "
            "networks and lengths. "
            + (
                "The report's stand in columns of their own, without a "
                "difference."
                if context.with_published
                else "The report's are left out; --published adds them."
            )
        )
    if settings:
        text.append(f"Trained: {'; '.join(settings)}.")
    count = len(found.finished)
    versions = _versions(found.finished)
    text.append(
        f"{count} {'run is' if count == 1 else 'runs are'} finished, "
        f"{total / 3600:.1f} h of training in all" + versions + "."
    )
    text.append(
        "Accuracies are in percent, of the test images unless it says "
        "validation: the mean over seeds ± the sample standard deviation (n - "
        "1), none of a single seed. FLOPs are over the dense network's, by "
        "rigl_keras.count: to train over training it once, to test as the "
        "masks are at the end. "
        f'"{_NONE}" stands for what there is not: no run, or nothing '
        'published; "failed" and "unfinished" for runs that are listed at the '
        "end."
    )
    if context.planned is not None:
        text.append(
            "FLOPs in brackets are planned, by closed forms, where no run is "
            "finished. They are no results; SNFS and redistribution cost more, "
            "for density moves."
        )
    return text


def _versions(finished):
    names = {"tensorflow": "TensorFlow", "keras": "Keras"}
    found = dict.fromkeys(
        f"{label} {brief(run.result['versions'][name])[1:-1]}"
        for name, label in names.items()
        for run in finished
        if isinstance(run.result.get("versions"), dict)
        and isinstance(run.result["versions"].get(name), str)
    )
    return f", with {', '.join(found)}" if found else ""


def _section(context, name):
    section = _SECTIONS[name](context, name)
    if name in context.undrawn:
        missing = f"The figure cannot be drawn: {context.undrawn[name]}."
        section = dataclasses.replace(section, text=(*section.text, missing))
    elif section.picture is None and not section.blocks:
        preset = context.records.preset
        target = "" if name in ("methods", "tuning") else f" {name}"
        how = "bin/tune" if name == "tuning" else f"bin/reproduce{target}"
        nothing = (
            f"No run of it is finished. {how} --preset={preset} trains them."
        )
        section = dataclasses.replace(section, text=(nothing,))
    return section


def _table(context, name):
    """Tables 1, 2, 3 and 5: a block of rows for each network and density."""
    cells = published.cells(name)
    marks = _Marks()
    blocks = []
    networks = dict.fromkeys(rows.row(cell.gin).network for cell in cells)
    for network in networks:
        of_network = [c for c in cells if rows.row(c.gin).network == network]
        gins = {cell.gin for cell in of_network}
        some = any(run.row in gins for run in context.records.runs)
        if not some and not (context.asked and context.comparable):
            if len(networks) > 1:
                continue
        for density in _densities(context, of_network, gins):
            title = f"density {exact(density)}"
            if len(networks) > 1:
                title = f"{rows.NETWORKS[network].split()[-1]}, {title}"
            blocks.append(
                _block(context, name, of_network, density, title, marks)
            )
    text = []
    if context.with_published:
        text += [
            "About the published numbers: " + " ".join(published.notes(name))
        ]
    picture = None
    if name == "table3" and figures.panels(context.records, "resnet50"):
        picture = _picture(
            context,
            "table3",
            figures.across_densities,
            context.records,
            "resnet50",
        )
    return Section(name, _TITLES[name], text, picture, blocks, marks.notes)


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
            columns.append("difference")
    columns.append("gin file")
    lines, group = [], ""
    for cell in _rows_of(cells):
        at = None if cell.density is None else density
        summary = summaries.of(context.records, cell.gin, at)
        # What the report does not have at this density is not missing.
        if not (in_report or summary.n or summary.others):
            continue
        if cell.group != group:
            group = cell.group
            lines.append(group.split(": ")[-1] or "dense")
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
            _accuracy(summary),
            _seeds(summary),
            *_flops(context, summary),
        ]
        if with_published:
            line += _published(name, printed, marks)
            if context.comparable:
                line.append(_signed(_difference(context, summary, printed)))
        lines.append([*line, cell.gin])
        _add_line(context, name, cell.row, summary, printed)
    return Block(columns, lines, title)


def _rows_of(cells):
    """Returns one cell of each row, in the order of the table."""
    return list(
        {(cell.group, cell.row, cell.gin): cell for cell in cells}.values()
    )


def _published(name, cell, marks):
    if cell is None:
        return [_NONE, _NONE]
    accuracy = cell.printed + marks.of(cell.note)
    if name == "table1":
        original = cell.original
        return [accuracy, _NONE if original is None else f"{original:.1f}"]
    if cell.dense_train_flops is not None:
        costs_of = (cell.dense_train_flops, cell.dense_test_flops)
        return [accuracy, ", ".join(map(_scientific, costs_of))]
    return [accuracy, _pair(_ratio(cell.train_flops), _ratio(cell.test_flops))]


def _table_4(context, name):
    """The reference setting of mask updates, and the best that was tried."""
    found, marks, lines = context.records, _Marks(), []
    printed = published.cells(name)
    for mask, gin in _RIGL.items():
        densities = {cell.density for cell in printed if cell.gin == gin}
        own = {run.density for run in found.runs if run.row == gin}
        tried_at = {d for d in own if summaries.trials(found, gin, d)}
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
                    _add_line(context, name, label, summary, cell)
    columns = ["setting", "drop fraction, steps", "validation (%)"]
    columns += ["test (%)", "seeds"]
    text = [
        "The optimum is the setting of the highest mean validation accuracy "
        f"among those tried that have all seeds {_listed(found)}; how many "
        "these are "
        "stands beside it. Its test accuracy did not take part in the choice."
    ]
    if context.with_published:
        columns += ["report: drop fraction, steps", "report: test (%)"]
        text += [
            "About the published numbers: " + " ".join(published.notes(name))
        ]
        if context.comparable:
            columns.append("difference")
    blocks = [Block(columns, lines)] if lines else []
    return Section(name, _TITLES[name], text, None, blocks, marks.notes)


def _setting(context, label, summary, cell, marks):
    line = [label, *[_NONE] * 4]
    if summary is not None:
        updates = summaries.settings_of(context.records, summary)
        known = None not in updates and (summary.n or summary.others)
        validation = summary.validation if summary.n else None
        line = [
            label,
            _updates(*updates) if known else _NONE,
            _NONE if validation is None else f"{validation:.2f}",
            _accuracy(summary),
            _seeds(summary),
        ]
    if not context.with_published:
        return line
    if cell is None:
        line += [_NONE, _NONE]
    else:
        line += [
            _updates(cell.drop_fraction, cell.frequency),
            cell.printed + marks.of(cell.note),
        ]
    if context.comparable:
        line.append(_signed(summary and _difference(context, summary, cell)))
    return line


def _scientific(value):
    return f"{value:.2e}".replace("e+0", "e")


def _updates(drop_fraction, frequency):
    return f"{exact(drop_fraction)}, {exact(frequency)}"


def _listed(found):
    """Returns the seeds that each row should have, as text."""
    *others, last = map(str, summaries.seeds(found))
    return f"{', '.join(others)} and {last}" if others else last


# Figures.


_ALT = {
    "methods": "Dot plot: test accuracy of each method, every seed a hollow "
    "marker and the mean a bar, a panel for each density; the dense network "
    "is a dashed line.",
    "table3": "Lines: test accuracy over density for each method on "
    "CIFAR-100, by initialisation; the dense network is a horizontal line.",
    "figure1": "Lines: test accuracy over density for each method on "
    "CIFAR-10, by initialisation; the dense network is a horizontal line.",
    "figure2": "Lines: test accuracy over learning rate for each pair of drop "
    "fraction and frequency, a panel for each density and initialisation.",
    "figure3": "Lines: test accuracy of RigL over training FLOPs, with "
    "uniform and with ERK masks, densities beside the points; pairs of equal "
    "FLOPs are joined.",
    "figure4": "Left, lines: inference FLOPs over training steps, with and "
    "without redistribution. Right, bars: the density of each layer at the "
    "end.",
    "tuning": "Contours: validation accuracy over drop fraction and steps "
    "between updates, settings tried as points, the best as a star.",
}


def _picture(context, name, draw, *arguments, **options):
    """Returns a figure, or None where it cannot be drawn, and notes why."""
    try:
        png = figures.as_png(draw(*arguments, **options))
    except Exception as error:  # whatever the numbers are, there is a page
        said = str(error).strip() or type(error).__name__
        context.undrawn[name] = said.splitlines()[0][:200].rstrip(".")
        return None
    return Picture(name, png, _ALT[name] + " Numbers: report.csv.")


def _methods(context, name):
    found = context.records
    if not _HAS[name](found):
        return Section(name, _TITLES[name])
    blocks = []
    for network, title in rows.NETWORKS.items():
        keys = _ordered(
            {
                (run.row, run.changes)
                for run in found.runs
                if rows.row(run.row).network == network
                and not summaries.is_trial(run)
            }
        )
        if keys:
            densities = summaries.densities(found, {gin for gin, _ in keys})
            blocks += _of_methods(context, name, keys, densities, title)
    text = (
        "Every row that has a run. A number in brackets says how many seeds "
        "are finished where some are not.",
    )
    picture = _picture(context, name, figures.methods, found)
    return Section(name, _TITLES[name], text, picture, blocks)


def _of_methods(context, name, keys, densities, title):
    """Two tables of rows by densities: accuracies, and what they cost."""
    accuracies, costs_of = [], []
    for gin, changes in keys:
        label = summaries.label(gin, changes)
        dense = rows.row(gin).dense
        found = [
            summaries.of(context.records, gin, density, changes)
            for density in ([None] if dense else densities)
        ]
        for summary in found:
            if summary.n or summary.others:
                _add_line(context, name, label, summary)
        blank = [""] * (len(densities) - 1 if dense else 0)
        accuracies.append([label, *map(_with_seeds, found), *blank])
        flops = [_pair(*_flops(context, summary)) for summary in found]
        costs_of.append([label, *flops, *blank])
    heads = [f"density {exact(density)}" for density in densities]
    heads = heads or ["dense"]
    data = title.split()[-1]
    return [
        Block(["method", *heads], accuracies, f"{data}: test accuracy (%)"),
        Block(["method", *heads], costs_of, f"{data}: FLOPs to train, to test"),
    ]


def _pair(train, test):
    return _NONE if train == test == _NONE else f"{train}, {test}"


def _ordered(keys):
    """Sorts rows by method, as Table 2 has them, then by masks and length."""
    order = ["Dense", "Small-Dense", "Static", "SET", "SNFS", "RigL"]

    def place(key):
        gin, changes = key
        row = rows.row(gin)
        method = order.index(row.method) if row.method in order else len(order)
        masks = ["uniform", "ER", "ERK", ""].index(row.distribution)
        return changes, method, row.method, row.all_data, row.length, masks, gin

    return sorted(keys, key=place)


def _with_seeds(summary):
    text = _accuracy(summary)
    if summary.n and summary.n < summary.wanted:
        text += f" ({summary.n} of {summary.wanted})"
    return text


def _figure_1(context, name):
    picture = None
    if _HAS[name](context.records):
        draw = figures.across_densities
        picture = _picture(context, name, draw, context.records, "wrn")
    text = (
        "Lines join means over seeds; small hollow markers are single seeds.",
    )
    return Section(name, _TITLES[name], text, picture)


def _figure_2(context, name):
    found = context.records
    if not _HAS[name](found):
        return Section(name, _TITLES[name])
    for row, density, changes in sorted(
        {
            (run.row, run.density, run.changes)
            for run in found.runs
            if run.row in _RIGL.values()
            and "sgd.learning_rate" in dict(run.changes)
        }
    ):
        summary = summaries.of(found, row, density, changes)
        _add_line(context, name, rows.row(row).label, summary)
    text = ("Means over seeds; bars are the sample standard deviation.",)
    picture = _picture(context, name, figures.learning_rates, found)
    return Section(name, _TITLES[name], text, picture)


def _figure_3(context, name):
    found = context.records
    if not _HAS[name](found):
        return Section(name, _TITLES[name])
    printed = published.cells(name) if context.with_published else ()
    columns = ["masks", "density", "FLOPs train", "accuracy (%)", "seeds"]
    if printed:
        columns.append("report: accuracy (%)")
        if context.comparable:
            columns.append("difference")
    lines, marks = [], _Marks()
    for mask, gin in _RIGL.items():
        own = {r.density for r in found.runs if r.row == gin and not r.changes}
        for density in sorted(own):
            summary = summaries.of(found, gin, density)
            cell = next(
                (
                    c
                    for c in printed
                    # ERK's bars are of densities that are not published.
                    if mask == "uniform"
                    and (c.gin, c.density) == (gin, density)
                ),
                None,
            )
            line = [
                mask,
                exact(density),
                _flops(context, summary)[0],
                _accuracy(summary),
                _seeds(summary),
            ]
            if printed:
                accuracy = _NONE
                if cell is not None:
                    accuracy = _percent(cell.accuracy, cell.std)
                    accuracy += marks.of(cell.note)
                line.append(accuracy)
                if context.comparable:
                    line.append(_signed(_difference(context, summary, cell)))
            lines.append(line)
            _add_line(context, name, rows.row(gin).label, summary, cell)
    text = [
        "Numbers beside the points are densities. Uniform and ERK masks of one "
        "density cost differently; dotted lines join points that cost the same."
    ]
    if printed:
        text.append(
            "About the published numbers: " + " ".join(published.notes(name))
        )
        erk = [
            f"{_percent(cell.accuracy, cell.std)} at the FLOPs of uniform "
            f"masks of density {exact(cell.density)}"
            for cell in printed
            if cell.gin == _RIGL["ERK"]
        ]
        text.append(f"The report's ERK: {'; '.join(erk)}.")
    picture = _picture(
        context,
        name,
        figures.equal_flops,
        found,
        with_published=context.comparable,
    )
    return Section(
        name,
        _TITLES[name],
        text,
        picture,
        [Block(columns, lines)],
        marks.notes,
    )


def _figure_4(context, name):
    found = context.records
    if not _HAS[name](found):
        return Section(name, _TITLES[name])
    text = (
        "Left, every seed is a line; right, means over seeds. RigL alone "
        "keeps the density of each layer, so that its lines are level.",
    )
    picture = _picture(context, name, figures.redistribution, found)
    return Section(name, _TITLES[name], text, picture)


def _tuning(context, name):
    found = context.records
    if not _HAS[name](found):
        return Section(name, _TITLES[name])
    for mask, gin in _RIGL.items():
        densities = {run.density for run in found.runs if run.row == gin}
        for density in sorted(densities):
            for trial in summaries.trials(found, gin, density):
                updates = _updates(trial.drop_fraction, trial.frequency)
                label = f"{mask}, {updates}"
                _add_line(context, name, label, trial.summary)
    text = (
        "Colour is the mean validation accuracy of settings with all seeds; "
        "contours are interpolated between them, where there are at least "
        "four.",
    )
    picture = _picture(context, name, figures.tuning, found)
    return Section(name, _TITLES[name], text, picture)


_SECTIONS = {
    "methods": _methods,
    **{table: _table for table in published.TABLES},
    "table4": _table_4,
    "figure1": _figure_1,
    "figure2": _figure_2,
    "figure3": _figure_3,
    "figure4": _figure_4,
    "tuning": _tuning,
}


def _others(context):
    """Runs that no other section shows, such as those of gin files added."""
    found, lines = context.records, []
    shared = summaries.densities(found, {run.row for run in found.runs})
    groups = dict.fromkeys(
        (run.row, run.density, run.changes, summaries.is_trial(run))
        for run in found.finished
    )
    for row, density, changes, is_trial in groups:
        names = {name for name, _ in changes}
        shown = "sgd.learning_rate" not in names or _HAS["figure2"](found)
        if row in _RIGL.values() and names <= records.TUNED and shown:
            continue  # in Figures 2 and 3, or in Table 4
        compared = density is None or density in shared
        if rows.row(row).network and compared and not is_trial:
            continue  # among all methods
        summary = summaries.of(found, row, density, changes)
        lines.append(
            [
                row,
                _NONE if density is None else exact(density),
                ", ".join(f"{name} = {exact(value)}" for name, value in changes)
                or _NONE,
                _accuracy(summary),
                _seeds(summary),
                *_flops(context, summary),
            ]
        )
        _add_line(context, "other", rows.row(row).label, summary)
    if not lines:
        return []
    columns = ["row", "density", "changes", "accuracy (%)", "seeds"]
    columns += ["FLOPs train", "test"]
    return [Section("other", "Other runs", blocks=[Block(columns, lines)])]


def _notes(found, notes):
    """What failed, what is unfinished, and what was left out or is odd."""
    failed = [f"{run.name}: {run.failure}" for run in found.runs if run.failed]
    unfinished = [
        f"{run.name}: {run.failure}"
        for run in found.runs
        if run.result is None and not run.failed
    ]
    parts = (
        ("failed", "Failed runs", failed),
        ("unfinished", "Unfinished runs", unfinished),
        ("left-out", "Left out, counted once, or odd", notes),
    )
    return [
        Section(anchor, title, items=items)
        for anchor, title, items in parts
        if items
    ]


# Files.


def write(made: Report, output: str | os.PathLike) -> list[Path]:
    """Writes a report, each file whole or not at all.

    Args:
        made: The report.
        output: Folder; made if it does not exist. Other files in it stay.

    Returns:
        The files.

    Raises:
        ValueError: The folder cannot be written to.
        DiskFullError: There is no room.
    """
    output = Path(output)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(made.lines)
    pictures = {
        section.picture.name: section.picture.png
        for section in made.page.sections
        if section.picture is not None
    }
    contents = {
        **{f"figures/{name}.png": png for name, png in pictures.items()},
        "results.jsonl": made.results.encode(),
        "report.csv": table.getvalue().encode(),
        "report.html": as_html(made.page).encode(),
        "report.md": as_markdown(made.page).encode(),
    }
    try:
        (output / "figures").mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            writing.write(output / name, content)
        # Figures of a report before this one.
        for name in set(_PICTURES) - set(pictures):
            (output / "figures" / f"{name}.png").unlink(missing_ok=True)
    except OSError as error:
        reason = writing.disk_is_full(error)
        if reason:
            advice = "Make room, or pass another --output."
            raise writing.DiskFullError(output, reason, advice) from error
        raise ValueError(
            f"{str(output)!r} cannot be written to ({error.strerror}). Pass "
            "--output with a folder that can be, or that can be made."
        ) from error
    return [output / name for name in contents]


def main() -> None:
    """Reads the command line and writes a report."""
    results_dir = flags.DEFINE_string(
        "results_dir",
        "results",
        "Folder of all results, or a results.jsonl that this command wrote.",
    )
    preset = flags.DEFINE_string(
        "preset", None, "Whose runs. Default: the only preset there is."
    )
    output = flags.DEFINE_string("output", "report", "Folder to write.")
    with_published = flags.DEFINE_bool(
        "published",
        False,
        "Show the report's numbers beside those of another preset, too.",
    )
    with_planned = flags.DEFINE_bool(
        "planned",
        False,
        "Show the FLOPs of runs that are not finished, in brackets.",
    )

    def run(argv):
        logging.set_verbosity(logging.WARNING)
        try:
            if Path(output.value).exists() and not Path(output.value).is_dir():
                raise ValueError(
                    f"{output.value!r} is no folder. Pass --output with one, "
                    "or with one that can be made."
                )
            found = records.read(results_dir.value, preset.value)
            made = report(
                found,
                argv[1:],
                with_published=with_published.value,
                with_planned=with_planned.value,
            )
            written = write(made, output.value)
        except (ValueError, OSError) as error:
            print(f"report: {printable(str(error))}", file=sys.stderr)
            sys.exit(2)
        print("\n".join(printable(str(path)) for path in written))
        _tell(found, made.notes)

    app.run(exits.one_line("report", run))


def _tell(found, notes):
    """Says how many runs count, which do not, and what is odd."""
    failed = sum(run.failed for run in found.runs)
    unfinished = len(found.runs) - len(found.finished) - failed
    print(
        f"{len(found.finished)} runs of the preset {found.preset} are "
        f"finished, {failed} failed, {unfinished} are unfinished."
    )
    for note in notes:
        print(f"  {printable(note)}")


if __name__ == "__main__":
    main()
