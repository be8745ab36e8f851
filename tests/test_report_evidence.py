"""The uncertainty of numbers on the page, and their sources."""

import csv
import pathlib
import re

import pytest
from support.run_folders import made

from rigl_keras.experiments.protocol import journal, published, rows
from rigl_keras.experiments.report import (
    commands,
    comparisons,
    contents,
    coverage,
    curve_figures,
    page,
    reading,
    sections,
    summaries,
)
from rigl_keras.experiments.reproduction import costs, plans

DOCS = pathlib.Path(__file__).parents[1] / "docs"


@pytest.fixture
def results(tmp_path):
    """Returns three seeds of RigL and static, and two of SET.

    RigL's differences from static are 1, 2 and 6.
    """
    folder = tmp_path / "results"
    for seed, (rigl, static) in enumerate(((91, 90), (92, 90), (95, 89))):
        made(folder, "rigl_erk_wrn", 0.1, seed, rigl / 100)
        made(folder, "static_erk_wrn", 0.1, seed, static / 100)
    made(folder, "set_erk_wrn", 0.1, 2, 0.94)
    made(folder, "dense_wrn", None, 0, 0.96, flops=(1.0, 1.0))
    return folder


def of(found, row):
    return summaries.of(found, row, None if "dense" in row else 0.1)


def test_paired_differences_by_hand(results):
    """Mean 3, deviations -2, -1 and 3: s = sqrt(7), t(0.975, 2) = 4.302653."""
    found = reading.read(results)
    rigl, static = of(found, "rigl_erk_wrn"), of(found, "static_erk_wrn")
    difference = comparisons.paired(rigl, static)
    error = (7 / 3) ** 0.5
    assert difference.mean == pytest.approx(3.0)
    assert (difference.n, difference.ahead) == (3, 3)
    assert difference.low == pytest.approx(3 - 4.302653 * error, abs=1e-5)
    assert difference.high == pytest.approx(3 + 4.302653 * error, abs=1e-5)
    # With two degrees of freedom, p = 1 - t / sqrt(2 + t^2).
    t = 3 / error
    assert difference.p == pytest.approx(1 - t / (2 + t * t) ** 0.5)
    # One common seed, and none.
    alone = comparisons.paired(of(found, "set_erk_wrn"), rigl)
    assert (alone.mean, alone.n) == (pytest.approx(-1.0), 1)
    assert alone.low is alone.p is None
    dense = of(found, "dense_wrn")
    assert comparisons.paired(of(found, "set_erk_wrn"), dense) is None


def test_differences_that_are_all_the_same_have_no_interval(results):
    found = reading.read(results)
    rigl = of(found, "rigl_erk_wrn")
    same = comparisons.paired(rigl, rigl)
    assert (same.mean, same.n, same.ahead, same.p) == (0.0, 3, 0, None)


def test_the_section_of_differences(results, monkeypatch):
    found = reading.read(results)
    made_report = sections.report(found, ["differences"])
    text = page.as_markdown(made_report.page)
    assert "*minus RigL (ERK)*" in text and "*minus Static (ERK)*" in text
    assert (
        "| RigL (ERK) | +3.00 | -3.57 to +9.57 | 0.188 | 3 | 3 of 3 |" in text
    )
    assert "| Static (ERK) | -3.00 |" in text
    assert "| SET (ERK) | -1.00 | - | - | 1 | 0 of 1 |" in text
    assert "These are 6 comparisons" in text
    assert "SciPy is not installed" not in text
    # Without SciPy, the page has differences, and says what is missing.
    monkeypatch.setattr(comparisons, "stats", None)
    text = page.as_markdown(sections.report(found, ["differences"]).page)
    assert "| RigL (ERK) | +3.00 | - | - | 3 | 3 of 3 |" in text
    assert "pip install scipy" in text


def test_every_run_has_its_folder_its_log_and_its_commit(tmp_path):
    versions = {
        "rigl_keras": "0.2.0",
        "commit": "abc1234",
        "date": "2026-11-29T23:50:00+00:00",
    }
    made(tmp_path, "rigl_erk_wrn", 0.1, 0, 0.9, result={"versions": versions})
    made(tmp_path, "rigl_erk_wrn", 0.1, 1, 0.9, folder="a (1)|b")
    found = reading.read(tmp_path)
    made_report = sections.report(found, ["runs"], folder="../results")
    text = page.as_markdown(made_report.page)
    folder = "../results/full/rigl_erk_wrn-density0.1-seed0/"
    assert (
        f"| [seed 0]({folder}) | 90.00 | 90.00 | 0.17x | 1.00 | 0.2.0 "
        f"| abc1234 | 2026-11-29 23:50 | [log]({folder}log.txt) |" in text
    )
    assert "[seed 1](../results/full/a%20%281%29%7Cb/)" in text
    assert "| - | - | - | [log]" in text  # a run of an earlier version
    html = page.as_html(made_report.page)
    assert f'<a href="{folder}log.txt">log</a>' in html
    assert "<details>" in html
    # Without the folder there are no links.
    text = page.as_markdown(sections.report(found, ["runs"]).page)
    assert "| seed 0 | 90.00 |" in text and "](" not in text


def test_histories_are_kept_with_the_data(results):
    run = reading.read(results).finished[0]
    assert run.history == ((1, 20.0), (2, 40.0))  # on validation images
    path = results / "full" / run.name / "run/metrics.csv"
    path.write_text("epoch,accuracy\n0,0.25\n")
    assert reading.read(results).finished[0].history == ((1, 25.0),)
    for wrong in (
        "epoch,accuracy\n0,2\n",
        "epoch\n0\n",
        "epoch,accuracy\n-9,0\n",
    ):
        path.write_text(wrong)
        assert reading.read(results).finished[0].history == ()


def test_commands_make_the_runs_that_are_there(tmp_path):
    changes = (("train.length", 4),)
    made(tmp_path, "rigl_erk_wrn", 0.05, 0, 0.5, preset="small")
    made(
        tmp_path, "rigl_erk_wrn", 0.02, 0, 0.5, preset="small", changes=changes
    )
    found = reading.read(tmp_path)
    made_report = sections.report(found, ["figure1", "methods"])
    figure = made_report.page.sections[1].commands
    assert figure == [
        "bin/reproduce figure1 --preset=small --densities=0.05",
        "bin/reproduce figure1 --preset=small --densities=0.02 "
        "--gin_bindings='train.length = 4'",
        "bin/report figure1 --preset=small",
    ]
    assert made_report.page.sections[0].commands[:2] == figure[:2]
    made(tmp_path, "gse_wrn", 0.02, 0, 0.5, preset="small", changes=changes)
    made_report = sections.report(reading.read(tmp_path), ["methods"])
    assert made_report.page.sections[0].commands == [
        "bin/reproduce figure1 --preset=small --densities=0.05",
        "bin/reproduce methods --preset=small",
        "bin/report methods --preset=small",
    ]


def test_dense_has_no_density(results):
    made_report = sections.report(reading.read(results), ["methods", "table2"])
    text = page.as_markdown(made_report.page)
    assert "| method | dense | density 0.1 |" in text
    assert "| Dense | 96.00 (1 of 3) |  |" in text
    assert "| RigL (ERK) |  | 92.67 ± 2.08 |" in text
    assert re.search(r"\*\*dense\*\*\n\n.*\n.*\n\| Dense Baseline", text)


def test_what_no_run_had_is_not_drawn(results):
    found = reading.read(results)
    shown = [s.anchor for s in sections.report(found).page.sections]
    assert {"table2", "figure1", "figure3", "curves", "costs"} <= set(shown)
    assert not {"figure4", "table5", "table7", "figure1c"} & set(shown)


def test_each_item_can_be_made(results):
    """The commands know exactly the items that --list names."""
    items = [item.target for item in journal.ITEMS]
    assert len(set(items)) == len(items)
    trained = [t for t in items if commands.has_own_runs(t)]
    assert set(trained) == {*plans.TARGETS, "tuning"}
    assert set(items) <= set(contents.NAMES)
    assert set(published.TABLES + published.FIGURES) <= set(items)
    lines = journal.as_list().splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(t) for line in lines) for t in items)


def test_the_table_of_coverage_is_that_of_the_data():
    found = sorted(DOCS.glob("results_*/results.jsonl"))
    table = coverage.coverage(found)
    # The page's first table.
    text = (DOCS / "results.md").read_text().split("## ")[0]
    written = [line for line in text.splitlines() if line.startswith("|")]
    assert written == table
    assert len(table) == 2 + len(journal.ITEMS)


def test_numbers_of_the_open_questions_are_published():
    text = (DOCS / "results.md").read_text().split("## What the report")[1]
    text = " ".join(text.split())
    for table, gin, density in (
        ("figure3", "rigl_erk_wrn", 0.5),
        ("figure3", "rigl_uniform_wrn", 0.5),
        ("table2", "set_uniform_wrn", 0.2),
        ("table2", "rigl_uniform_wrn", 0.2),
        ("table2", "set_uniform_2x_wrn", 0.1),
        ("table5", "rigl_uniform_wrn", 0.2),
        ("figure3", "rigl_uniform_wrn", 0.2),
    ):
        said = coverage.published_cell(table, gin, density)
        wanted = said.split(" ± ")[0] if density == 0.5 else said
        assert wanted in text, (table, gin, density)


@pytest.mark.parametrize("network", ["wrn", "resnet50"])
def test_flops_over_density_are_those_that_are_planned(network):
    with curve_figures.FLOPS.open(newline="") as file:
        lines = [
            line
            for line in csv.DictReader(file)
            if rows.row(line["gin"]).network == network
        ]
    assert len(lines) == 20
    for line in lines[3::9]:
        run = plans.Run(line["gin"], plans.Preset(), float(line["density"]), 0)
        run.configure()
        cost = costs.planned()
        for name in ("inference_flops_ratio", "training_flops_ratio"):
            assert float(line[name]) == pytest.approx(
                getattr(cost, name), abs=6e-5
            )


def test_a_reference_that_failed_hides_no_difference(tmp_path):
    """Others are compared with uniform masks if ERK has no result."""
    folder = tmp_path / "results"
    for seed in range(2):
        made(folder, "rigl_uniform_wrn", 0.1, seed, 0.90)
        made(folder, "pruning_wrn", 0.1, seed, 0.92)
    shown = "| Pruning | +2.00 |"
    for failed in (False, True):
        if failed:
            made(folder, "rigl_erk_wrn", 0.1, 0, 0.91)
            (run,) = folder.glob("full/rigl_erk_wrn*")
            (run / "run/result.json").unlink()
            (run / "failure.txt").write_text("no luck")
        found = reading.read(folder)
        text = page.as_markdown(sections.report(found, ["differences"]).page)
        assert shown in text
