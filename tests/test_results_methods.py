"""The published page about methods has the numbers of its data."""

import csv
import itertools
import statistics

import pytest
from support import result_pages

from rigl_keras.experiments.protocol import rows
from rigl_keras.experiments.report import page


@pytest.fixture(scope="module")
def cells():
    """Returns finished runs by method, with its masks, and density."""
    found = {}
    for run in result_pages.runs("methods"):
        key = rows.row(run["row"]).label, run["density"]
        found.setdefault(key, []).append(run["result"])
    return found


def steady(folder):
    """Returns a run's validation accuracies in its last four epochs."""
    data = result_pages.data("methods")
    path = data.parent / folder / "run" / "metrics.csv"
    lines = list(csv.DictReader(path.read_text().splitlines()))
    return [100 * float(line["val_accuracy"]) for line in lines[-4:]]


def last_epochs():
    """Returns accuracies in the last epochs, by method and density."""
    found = {}
    for run in result_pages.runs("methods"):
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


def test_the_page_has_the_numbers_of_its_data():
    made = result_pages.made("methods", "small")
    text, steady = result_pages.text("methods"), steady_table()
    assert steady in text
    shown = set(result_pages.tables(text))
    assert len(shown) > 30
    shown -= set(result_pages.tables(steady))
    assert shown <= set(result_pages.tables(page.as_markdown(made.page)))


def test_the_data_is_as_it_was_written():
    made = result_pages.made("methods", "small")
    data = result_pages.data("methods")
    assert made.results == data.read_text()
    written = (data.parent / "report.md").read_text()
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
    text = result_pages.text("methods")
    assert f"{sum(map(len, cells.values()))} runs" in text
    said = result_pages.numbers(text)
    assert len(said) > 15
    assert [each for each in said if each not in known] == []


def test_links_are_there():
    for link in result_pages.links(result_pages.text("methods")):
        assert (result_pages.DOCS / link).exists(), link


if __name__ == "__main__":
    print(steady_table())
