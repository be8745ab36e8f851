"""The whole report: its sections and its introduction."""

import dataclasses
from collections.abc import Callable, Sequence

from rigl_keras._text import brief
from rigl_keras.experiments.protocol import published, variations
from rigl_keras.experiments.report import commands, evidence, records
from rigl_keras.experiments.report.cells import NONE, Context, scientific
from rigl_keras.experiments.report.contents import HAS, NAMES, TITLES
from rigl_keras.experiments.report.figure_sections import (
    across,
    figure_2,
    figure_3,
    figure_4,
    tuning,
)
from rigl_keras.experiments.report.page import Page, Section
from rigl_keras.experiments.report.records import Records
from rigl_keras.experiments.report.summaries import Summary
from rigl_keras.experiments.report.tables import (
    COLUMNS,
    methods,
    other_runs,
    table_4,
    table_section,
)

__all__ = ["Report", "report"]


@dataclasses.dataclass(frozen=True)
class Report:
    """A report to be written.

    Args:
        page: Its text, tables and figures.
        lines: The lines of report.csv, with the names of its columns first.
        results: The lines of results.jsonl.
        notes: What was left out, counted once, not drawn, or odd.
    """

    page: Page
    lines: Sequence[Sequence[str]]
    results: str
    notes: Sequence[str] = ()


def report(
    found: Records,
    names: Sequence[str] = (),
    *,
    folder: str | None = None,
    with_published: bool = False,
    planned: Callable[[Summary], tuple[float, float]] | None = None,
) -> Report:
    """Returns the report of the runs of one preset.

    Args:
        found: All runs.
        names: Names of sections, from `NAMES`. Empty: those with a finished
            run.
        folder: Of all results, relative to the page, for its links. None: no
            links.
        with_published: Whether to show the report's numbers beside those of
            another preset. Runs with the report's own setting always have them.
        planned: `planned(summary) -> (training, inference)`, the FLOPs ratios
            of runs without a finished one. None: they are left out.

    Raises:
        ValueError: There is no such table or figure.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(
                f"A table or figure is one of {', '.join(NAMES)}. Received: "
                f"{name!r}."
            )
    comparable = found.preset == variations.FULL
    context = Context(
        records=found,
        comparable=comparable,
        with_published=comparable or with_published,
        planned=planned,
        asked=bool(names),
        lines=[],
        undrawn={},
        folder=folder,
    )
    sections, left_out = [], []
    for name in NAMES:
        if names and name not in names:
            continue
        if name in names or HAS[name](found):
            section = _section(context, name)
            # Of rows without a seed in common there are no differences.
            if names or name != "differences" or section.blocks:
                sections.append(section)
        elif commands.has_own_runs(name):
            left_out.append(name)
    if not names:
        sections += other_runs(context)
    notes = [
        *found.notes,
        *(
            f"{TITLES[name]}: its figure cannot be drawn ({why})."
            for name, why in context.undrawn.items()
        ),
    ]
    sections += _notes(found, notes)
    text = _introduction(context)
    if left_out:
        text.append(f"Without a finished run: {', '.join(left_out)}.")
    title = f"Results of rigl_keras: preset {found.preset}"
    return Report(
        Page(title, text, sections),
        [COLUMNS, *context.lines],
        records.as_lines(found),
        notes,
    )


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
            f"network costs {scientific(dense)} FLOPs per sample to test and "
            "three times as many to train"
        )
        settings.setdefault(line, None)
    if context.comparable:
        text.append(
            "These runs have the report's own setting. Its numbers are beside "
            "them, with the difference of the means."
        )
    else:
        text.append(
            f"These runs use the preset {found.preset}, not the report's "
            "setting, which is WRN-22-2 on CIFAR-10 or ResNet-50 on CIFAR-100, "
            "trained for 250 epochs: their accuracies come from different "
            "networks and lengths. "
            + (
                "The report's numbers have separate columns, without a "
                "difference."
                if context.with_published
                else "The report's numbers are left out; --published adds them."
            )
        )
    if settings:
        text.append(f"Trained: {'; '.join(settings)}.")
    count = len(found.finished)
    versions = _versions(found.finished)
    text.append(
        f"{count} {'run is' if count == 1 else 'runs are'} finished, "
        f"{total / 3600:.1f} h of training in all{versions}."
    )
    text.append(
        "Accuracies are in percent, on the test images unless marked as "
        "validation: means over seeds ± the sample standard deviation (n - "
        "1), which a single seed does not have. FLOPs are relative to the "
        "dense network's, by rigl_keras.count: to train, over training it "
        "once; to test, with the final masks. "
        f'"{NONE}" means no run, or no published number; "failed" and '
        '"unfinished" runs are listed at the end.'
    )
    if context.planned is not None:
        text.append(
            "FLOPs in brackets are planned, by closed forms, if no run is "
            "finished. They are not results: SNFS and redistribution cost "
            "more, because density moves."
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
        how = commands.training(name)
        nothing = (
            "None of its runs is finished. "
            f"{how} --preset={preset} trains them."
        )
        return dataclasses.replace(section, text=(nothing,))
    made = [*section.commands, *commands.of(context, name)]
    return dataclasses.replace(section, commands=made)


_SECTIONS = {
    "methods": methods,
    "differences": evidence.differences,
    "costs": evidence.costs,
    "curves": evidence.curves,
    **{table: table_section for table in published.TABLES},
    "table4": table_4,
    **dict.fromkeys(("figure1", "figure1c", "cifar100"), across),
    "figure2": figure_2,
    **dict.fromkeys(("figure3", "figure3b"), figure_3),
    "figure4": figure_4,
    "flops": evidence.flops,
    "tuning": tuning,
    "runs": evidence.every_run,
}


def _notes(found, notes):
    """Returns a section on failed, unfinished, left-out and odd runs."""
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
