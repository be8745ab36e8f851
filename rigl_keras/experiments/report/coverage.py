"""What of the report is here: each table and figure, published and ours.

    python -m rigl_keras.experiments.report.coverage FILE...

of the files docs/results_*/results.jsonl prints the table of docs/results.md,
from published.csv and the data of runs.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from rigl_keras._text import exact
from rigl_keras.experiments.protocol import journal, published, rows, variations
from rigl_keras.experiments.report import reading, summaries
from rigl_keras.experiments.report.cells import NONE, percent_cell
from rigl_keras.experiments.report.curve_figures import FLOPS
from rigl_keras.experiments.report.records import Records

__all__ = ["coverage"]

# Of each item: the table that prints the number shown, its row and density.
_SHOWN = {
    "table1": ("table1", "rigl_erk_50k_wrn", 0.1),
    "table2": ("table2", "rigl_erk_wrn", 0.1),
    "table3": ("table3", "rigl_erk_resnet50", 0.1),
    "table4": ("table4", "rigl_erk_wrn", 0.1),
    "table5": ("table5", "rigl_sg_uniform_wrn", 0.1),
    "table7": ("table7", "rigl_kernel_erk_wrn", 0.1),
    "figure1": ("table2", "rigl_erk_wrn", 0.1),
    "figure1c": ("table2", "rigl_uniform_2x_wrn", 0.1),
    "cifar100": ("table3", "rigl_uniform_2x_resnet50", 0.1),
    "figure2": ("", "rigl_erk_wrn", 0.1),
    "figure3": ("figure3", "rigl_uniform_wrn", 0.1),
    "figure3b": ("figure3b", "rigl_uniform_resnet50", 0.1),
    "figure4": ("", "rigl_sg_uniform_wrn", 0.1),
    "flops": ("", "rigl_erk_wrn", 0.1),
    "tuning": ("", "rigl_erk_wrn", 0.1),
    "methods": ("", "rigl_erk_wrn", 0.05),
}
# The rows of a figure; a table's are those that it prints.
_ROWS = {
    "figure1": variations.FIGURE_1,
    "figure1c": variations.FIGURE_1C,
    "cifar100": variations.CIFAR100,
    "figure3": variations.RIGL,
    "figure3b": variations.RIGL_RESNET50,
    "figure4": variations.FIGURE_4,
    "methods": (*variations.METHODS, *variations.METHODS_AT_HALF),
}


def coverage(paths: Sequence[str | Path]) -> list[str]:
    """Returns the lines of a table in Markdown, one for each item.

    Args:
        paths: Files of runs, each a `results.jsonl` of one preset.

    Raises:
        ValueError: One of them cannot be read.
    """
    found = [reading.read(path) for path in paths]
    lines = [
        "| item | here | row shown, density | published (%) | ours (%) | rows "
        "with runs |",
        "| :-- | :-- | :-- | --: | --: | --: |",
    ]
    for item in journal.ITEMS:
        table, gin, density = _SHOWN[item.target]
        shown = f"{rows.row(gin).label}, {exact(density)}"
        said = published_cell(table, gin, density)
        if item.target == "methods":
            said = NONE
        if item.target == "flops":
            said, ours, share = (
                "curves",
                f"{_flops(gin, density)}, counted",
                NONE,
            )
        else:
            ours = "; ".join(_ours(item.target, found, gin, density)) or NONE
            share = "; ".join(_shares(item.target, found)) or NONE
        cells = [item.numbers, f"`{item.target}`", shown, said, ours, share]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def published_cell(table: str, gin: str, density: float) -> str:
    """Returns what is published of a row, or that curves alone are.

    Args:
        table: Where it is printed; `""`: nowhere as a number.
        gin: The gin file, without folder and ending.
        density: Fraction of the weights kept.
    """
    if not table:
        return "curves"
    cell = [
        cell
        for cell in published.cells(table)
        if (cell.gin, cell.density) == (gin, density)
    ][-1]  # in Table 4 the tuned one
    if len(cell.printed) > 20:  # read from code, in all digits
        return percent_cell(cell.accuracy, cell.std)
    return cell.printed


def _ours(target, found: Sequence[Records], gin, density):
    for records in found:
        if target in ("table4", "figure2", "tuning"):
            continue  # of searches, of which there is none
        variants = {
            run.changes
            for run in records.finished
            if (run.gin, run.density) == (gin, density)
            and not summaries.is_trial(run)
        }
        of_methods = {changes for changes in variants if changes}
        for changes in of_methods if target == "methods" else variants & {()}:
            summary = summaries.of(records, gin, density, changes)
            seeds = "1 seed" if summary.n == 1 else f"{summary.n} seeds"
            label = f" ({records.preset}, {seeds})"
            yield percent_cell(summary.mean, summary.std) + label


def _shares(target, found: Sequence[Records]):
    if target in ("figure2", "tuning"):
        return
    of_target = _ROWS.get(target) or {
        cell.gin for cell in published.cells(target)
    }
    for records in found:
        trained = {
            run.row
            for run in records.finished
            if not summaries.is_trial(run)
            and bool(run.changes) == (target == "methods")
        }
        count = len(set(of_target) & trained)
        if count and target != "table4":
            yield f"{count} of {len(set(of_target))} ({records.preset})"


def _flops(gin, density):
    with FLOPS.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if (line["gin"], float(line["density"])) == (gin, density):
                return f"{float(line['training_flops_ratio']):.2f}x"
    raise ValueError(f"{FLOPS} has no {gin} at density {density}.")


if __name__ == "__main__":
    print("\n".join(coverage(sys.argv[1:])))
