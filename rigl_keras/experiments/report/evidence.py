"""How sure the numbers are, and where they come from: the sections on that."""

import posixpath
import urllib.parse
from collections.abc import Sequence

from rigl_keras._text import brief, exact
from rigl_keras.experiments.protocol import rows
from rigl_keras.experiments.report import (
    comparisons,
    contents,
    curve_figures,
    summaries,
)
from rigl_keras.experiments.report.cells import (
    NONE,
    Context,
    interval_cell,
    ratio_cell,
    signed_cell,
)
from rigl_keras.experiments.report.contents import HAS, TITLES
from rigl_keras.experiments.report.page import Block, Link, Section

__all__ = ["costs", "curves", "differences", "every_run", "flops"]

# What each row is compared with, by the masks it has or else with ERK.
_REFERENCES = ("rigl", "static")
_MASKS = {"uniform": "uniform", "ERK": "erk"}


def differences(context: Context, name: str) -> Section:
    """Each row against RigL and static masks, seed by seed."""
    found = context.records
    blocks, count = [], 0
    for network, density, changes in _cases(found):
        lines = []
        for method in _REFERENCES:
            lines += _against(found, method, network, density, changes)
        compared = [line for line in lines if not isinstance(line, str)]
        if compared:
            count += len(compared)
            title = f"{rows.NETWORKS[network].split()[-1]}, density "
            title += ", ".join(
                [
                    exact(density),
                    *(f"{name} = {exact(value)}" for name, value in changes),
                ]
            )
            blocks.append(Block(_COLUMNS, lines, title))
    if not blocks:
        return Section(name, TITLES[name])
    text = [
        "Percentage points of test accuracy, seed by seed: the mean of the "
        "differences of the seeds that both have, its 95 % interval by the "
        "t distribution, and p of the paired t-test that there is no "
        "difference. Equal density is not equal cost: that stands among all "
        "methods.",
        f"These are {count} comparisons: by chance alone about one in twenty "
        "has p below 0.05. With three seeds an interval is wide, and one that "
        "holds 0 says that these seeds cannot tell, not that there is no "
        "difference.",
    ]
    if not comparisons.has_intervals():
        text.append(
            "SciPy is not installed where this page was made, so that "
            "intervals and p are missing: pip install scipy."
        )
    return Section(name, TITLES[name], text, None, blocks, folded=True)


_COLUMNS = ("method", "difference", "95 % interval", "p", "seeds", "ahead in")


def _cases(found):
    """Returns `(network, density, changes)` of what can be compared."""
    cases = []
    for network in rows.NETWORKS:
        runs = [
            run
            for run in found.finished
            if rows.row(run.gin).network == network
            and not summaries.is_trial(run)
        ]
        at = summaries.densities(found, {run.gin for run in runs})
        for changes in sorted({run.changes for run in runs}):
            cases += [(network, density, changes) for density in at]
    return cases


def _against(found, method, network, density, changes):
    """Returns the lines of all rows against one, by the masks they have."""
    every = dict.fromkeys(
        run.gin
        for run in found.finished
        if rows.row(run.gin).network == network
        and run.changes == changes
        and run.density in (None, density)
    )
    lines: list[Sequence[str] | str] = []
    for masks, ending in _MASKS.items():
        reference = summaries.of(
            found, f"{method}_{ending}_{network}", density, changes
        )
        if not reference.n:
            continue
        own = []
        for gin in sorted(every):
            row = rows.row(gin)
            if gin == reference.row or row.all_data:
                continue
            has = row.distribution if row.distribution in _MASKS else "ERK"
            other = f"{method}_{_MASKS[has]}_{network}"
            if has != masks and summaries.of(found, other, density, changes).n:
                continue  # it is compared with that one
            summary = summaries.of(
                found, gin, None if row.dense else density, changes
            )
            difference = comparisons.paired(summary, reference)
            if difference is not None:
                own.append(_line(summary, difference))
        if own:
            lines += [f"minus {summaries.label(reference.row)}", *own]
    return lines


def _line(summary, difference):
    p = difference.p
    return [
        summaries.label(summary.row),
        signed_cell(difference.mean),
        interval_cell(difference),
        NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        str(difference.n),
        f"{difference.ahead} of {difference.n}",
    ]


def _drawn(context, name, text, draw):
    """Returns a section of a text and a figure of the runs, if it has any."""
    if not HAS[name](context.records):
        return Section(name, TITLES[name])
    picture = contents.picture_of(context, name, draw, context.records)
    return Section(name, TITLES[name], text, picture)


def costs(context: Context, name: str) -> Section:
    """Accuracy over training FLOPs, of all rows."""
    text = (
        "A marker is the mean over seeds of a row, and the small number beside "
        "it its density; bars are the sample standard deviation, and thin "
        "lines join the densities of a row. Markers of ERK masks are hollow, "
        "those of longer runs half filled. Further left is cheaper, further "
        "up is better.",
    )
    return _drawn(context, name, text, curve_figures.accuracy_over_flops)


def curves(context: Context, name: str) -> Section:
    """Accuracy over epochs."""
    text = (
        "Accuracy after each epoch, of the images held out, or of the training "
        "images where none are. Lines are means over the seeds that have got "
        "so far; bands reach from the lowest to the highest seed.",
    )
    return _drawn(context, name, text, curve_figures.training_curves)


def flops(context: Context, name: str) -> Section:
    """FLOPs over density, of the report's two networks."""
    if not HAS[name](context.records) and not context.asked:
        return Section(name, TITLES[name])
    text = (
        "What RigL costs to train at a density, by the library's count of the "
        "report's two networks; no run is needed. With ERK masks small layers "
        "are denser, and they are those that see many positions. The numbers "
        "are in rigl_keras/experiments/protocol/flops_by_density.csv.",
    )
    picture = contents.picture_of(
        context, name, curve_figures.flops_over_density
    )
    return Section(name, TITLES[name], text, picture)


def every_run(context: Context, name: str) -> Section:
    """Each seed, with its folder, its log, and what trained it."""
    found = context.records
    groups: dict[tuple, list] = {}
    for run in found.finished:
        key = (run.gin, run.density or 0.0, run.changes)
        groups.setdefault(key, []).append(run)
    lines: list[Sequence[str] | str] = []
    for (gin, density, changes), runs in sorted(groups.items()):
        label = summaries.label(gin, changes)
        lines.append(f"{label}, density {exact(density)}" if density else label)
        for run in sorted(runs, key=lambda run: run.seed):
            result = run.finished_result
            seconds = result["seconds"]
            lines.append(
                [
                    _link(context, run, f"seed {run.seed}", ""),
                    f"{run.test:.2f}",
                    NONE if run.validation is None else f"{run.validation:.2f}",
                    ratio_cell(run.training_flops_ratio),
                    f"{seconds / 3600:.2f}" if seconds else NONE,
                    _version(run, "rigl_keras"),
                    _version(run, "commit"),
                    _version(run, "date").replace("T", " ")[:16],
                    _link(context, run, "log", "log.txt"),
                ]
            )
    if not lines:
        return Section(name, TITLES[name])
    columns = ["run", "test (%)", "validation (%)", "FLOPs train", "hours"]
    columns += ["version", "commit", "date (UTC)", "log"]
    text = [
        "The test accuracy of each seed, and what trained it. "
        + (
            "Names lead to the folder of the run, which has its configuration, "
            "metrics.csv and result.json. "
            if context.folder is not None
            else "The folders are not at hand: this page is made of "
            "results.jsonl. "
        )
        + f'"{NONE}" stands for what a run of an earlier version did not note.'
    ]
    preset = found.preset
    file = "" if context.comparable else f" --gin_file=gin/presets/{preset}.gin"
    return Section(
        name,
        TITLES[name],
        text,
        None,
        [Block(columns, lines)],
        commands=[
            f"bin/train --gin_file=gin/ROW.gin{file} --density=D --seed=S"
        ],
        folded=True,
    )


def _version(run, name):
    versions = run.finished_result.get("versions")
    value = versions.get(name) if isinstance(versions, dict) else None
    return brief(value)[1:-1] if isinstance(value, str) and value else NONE


def _link(context, run, words, file):
    if context.folder is None:
        return words if not file else NONE
    preset, _, folder = run.folder.partition("/")
    path = posixpath.join(context.folder, preset, folder, file)
    return Link(words, urllib.parse.quote(path))
