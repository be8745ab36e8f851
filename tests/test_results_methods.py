"""The published page about methods has the numbers of its data."""

import csv
import itertools
import json
import pathlib
import re
import statistics

import pytest

from rigl_keras.experiments.protocol import rows
from rigl_keras.experiments.report import page, reading, sections

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = DOCS / "results_methods.md"
DATA = DOCS / "results_methods" / "results.jsonl"


@pytest.fixture(scope="module")
def made():
    return sections.report(reading.read(DATA, "small"))


@pytest.fixture(scope="module")
def cells():
    """Returns finished runs by method, with its masks, and density."""
    found = {}
    for line in DATA.read_text().splitlines():
        run = json.loads(line)
        key = rows.row(run["row"]).label, run["density"]
        found.setdefault(key, []).append(run["result"])
    return found


def steady(folder):
    """Returns a run's validation accuracies in its last four epochs."""
    path = DATA.parent / folder / "run" / "metrics.csv"
    lines = list(csv.DictReader(path.read_text().splitlines()))
    return [100 * float(line["val_accuracy"]) for line in lines[-4:]]


def last_epochs():
    """Returns accuracies in the last epochs, by method and density."""
    found = {}
    for line in DATA.read_text().splitlines():
        run = json.loads(line)
        key = rows.row(run["row"]).label, run["density"]
        found.setdefault(key, []).append(steady(run["folder"]))
    return found


def steady_table():
    """Returns the page's table of the last epochs."""
    found = last_epochs()
    lines = [
        "| mean of four epochs | density 0.02 | density 0.05 |",
        "| :-- | --: | --: |",
    ]
    for method in dict.fromkeys(method for method, _ in found):
        if (method, 0.02) not in found:
            continue
        cells = []
        for density in (0.02, 0.05):
            means = [statistics.fmean(run) for run in found[method, density]]
            mean, spread = statistics.fmean(means), statistics.stdev(means)
            cells.append(f"{mean:.2f} ± {spread:.2f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(text):
    """Returns the tables of a Markdown page, as lines."""
    return {line for line in text.splitlines() if line.startswith("|")}


def test_the_page_has_the_numbers_of_its_data(made):
    shown = tables(PAGE.read_text())
    assert len(shown) > 30
    steady = steady_table()
    assert steady in PAGE.read_text()
    assert shown <= tables(page.as_markdown(made.page)) | tables(steady)


def test_the_data_is_as_it_was_written(made):
    assert made.results == DATA.read_text()
    written = (DATA.parent / "report.md").read_text()
    assert written == page.as_markdown(made.page)


def test_numbers_in_the_text_follow_from_the_data(cells):
    """Each is a mean, a spread, a difference of means or a ratio of FLOPs."""
    known = {"0.02", "0.05", "0.1", "0.5"}  # densities
    known.add("64.65")  # of the page results_small.md, which has its own test
    means = {}
    for key, results in cells.items():
        accuracies = [100 * result["test_accuracy"] for result in results]
        means[key] = statistics.fmean(accuracies)
        known |= {f"{each:.2f}" for each in (*accuracies, means[key])}
        if len(accuracies) > 1:
            known.add(f"{statistics.stdev(accuracies):.2f}")
        for kind in ("training", "inference"):
            ratios = [result[f"{kind}_flops_ratio"] for result in results]
            known.add(f"{statistics.fmean(ratios):.2f}x")
    for (a, x), (b, y) in itertools.permutations(means.items(), 2):
        if a[1] == b[1]:
            known.add(f"{abs(x - y):.2f}")
    ranges = [
        max(run) - min(run) for runs in last_epochs().values() for run in runs
    ]
    known |= {f"{statistics.median(ranges):.2f}", f"{max(ranges):.2f}"}
    for (a, x), (b, y) in itertools.permutations(last_epochs().items(), 2):
        if a[1] == b[1]:
            x, y = (statistics.fmean(map(statistics.fmean, z)) for z in (x, y))
            known |= {f"{abs(x - y):.2f}", f"{x:.2f}", f"{y:.2f}"}
    minutes = [r["seconds"] / 60 for c in cells.values() for r in c]
    known |= {f"{each:.1f}" for each in (min(minutes), max(minutes))}
    known.add(f"{statistics.median(minutes):.1f}")
    known.add(f"{sum(minutes) / 60:.1f}")
    text = PAGE.read_text()
    assert f"{sum(map(len, cells.values()))} runs" in text
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)
    prose = [ln for ln in prose.splitlines() if not ln.startswith("|")]
    said = re.findall(r"(?<![\w.])\d+\.\d+x?", "\n".join(prose))
    assert len(said) > 15
    assert [each for each in said if each not in known] == []


def test_links_are_there():
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()):
        if not link.startswith("http"):
            assert (PAGE.parent / link).exists(), link


if __name__ == "__main__":
    print(steady_table())
