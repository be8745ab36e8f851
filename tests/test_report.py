"""bin/report: what it reads, averages and writes."""

import csv
import html.parser
import json
import re
import shutil
import subprocess
import sys

import pytest
from support.run_folders import failed, lines_of, made, searched

import rigl_keras
from rigl_keras.experiments import report_command
from rigl_keras.experiments.protocol import published, rows, variations
from rigl_keras.experiments.report import (
    contents,
    page,
    panels,
    reading,
    records,
    sections,
    summaries,
)
from rigl_keras.experiments.reproduction import plans

# The report's tables, as printed.

TABLE_1 = """
Dense | 94.6 | 94.1
Static (ERK) | 91.6 | 93.2 | 94.3 | 91.6 | 92.9 | 94.2
Pruning | 93.2 | 93.6 | 94.3 | 93.3 | 93.5 | 94.1
RigL (ERK) | 93.2 | 93.8 | 94.4 | 93.1 | 93.8 | 94.3
"""
TABLE_2 = """
Small Dense | 89.0 0.35 | 0.11x, 0.11x | 91.0 0.07 | 0.20x, 0.20x |
Static | 89.1 0.17 | 0.10x, 0.10x | 91.2 0.16 | 0.20x,0.20x |
SET | 91.3 0.47 | 0.10x, 0.10x | 92.7 0.28 | 0.20x, 0.20x |
RigL | 91.7 0.18 | 0.10x, 0.10x | 92.6 0.10 | 0.20x, 0.20x |
SET (ERK) | 92.2 0.04 | 0.17x, 0.17x | 92.9 0.16 | 0.35x, 0.35x |
RigL (ERK) | 92.4 0.06 | 0.17x, 0.17x | 93.1 0.09 | 0.35x, 0.35x |
Static 2x | 89.15 0.17 | 0.20x, 0.10x | 91.2 0.16 | 0.40x, 0.20x |
Lottery | 90.4 0.09 | 0.45x, 0.13x | 92.0 0.31 | 0.68x,0.27x |
SET 2x | 83.3 15.33 | 0.20x, 0.10x | 93.0 0.22 | 0.41x, 0.20x |
SNFS | 92.4 0.43 | 0.51x, 0.27x | 92.7 0.20 | 0.66x, 0.49x |
SNFS (ERK) | 92.2 0.2 | 0.52x, 0.28x | 92.8 0.07 | 0.66x, 0.49x |
SNFS 2x | 92.3 0.33 | 1.02x, 0.27x | 93.2 0.14 | 1.32x, 0.98x |
RigL 2x | 92.3 0.25 | 0.20x, 0.10x | 93.0 0.21 | 0.41x, 0.20x |
Pruning | 92.6 0.08 | 0.32x,0.13x | 93.2 0.27 | 0.41x,0.27x |
RigL (ERK) 2x | 92.7 0.37 | 0.34x, 0.17x | 93.3 0.09 | 0.70x, 0.35x |
Dense Baseline | 93.4 0.07 | 9.45e8, 3.15e8
"""
TABLE_3 = """
Static | 69.7 0.42 | 0.10x, 0.10x | 72.3 0.30 | 0.20x,0.20x
Small Dense | 70.8 0.22 | 0.11x, 0.11x | 72.6 0.93 | 0.20x, 0.20x
SET | 71.4 0.35 | 0.10x, 0.10x | 73.4 0.45 | 0.20x, 0.20x
RigL | 71.8 0.33 | 0.10x, 0.10x | 73.5 0.04 | 0.20x, 0.20x
Static (ERK) | 71.5 0.18 | 0.22x, 0.22x | 73.2 0.39 | 0.38x, 0.38x
SET (ERK) | 72.3 0.39 | 0.22x, 0.22x | 73.5 0.25 | 0.38x, 0.38x
RigL (ERK) | 72.6 0.37 | 0.23x, 0.22x | 73.4 0.15 | 0.38x, 0.38x
SNFS | 72.3 0.20 | 0.58x, 0.37x | 73.9 0.20 | 0.70x, 0.55x
SNFS (ERK) | 73.0 0.33 | 0.59x, 0.38x | 73.9 0.27 | 0.69x, 0.54x
Pruning | 73.1 0.32 | 0.36x,0.11x | 73.8 0.23 | 0.45x,0.25x
RigL 2x | 73.1 0.71 | 0.20x, 0.10x | 74.0 0.24 | 0.41x, 0.20x
Lottery | 73.6 0.32 | 0.62x,0.11x | 74.2 0.41 | 0.81x,0.25x
RigL 3x | 73.7 0.16 | 0.30x, 0.10x | 74.2 0.23 | 0.61x, 0.20x
RigL (ERK) 2x | 73.6 0.05 | 0.46x, 0.22x | 74.4 0.10 | 0.76x, 0.38x
Dense Baseline | 74.7 0.38 | 7.77e9, 2.59e9
"""
TABLE_4 = """
Random | 0.1 | 0.3, 100 | 91.7 0.18 | 0.197, 50 | 91.8 0.17 |
Random | 0.2 | 0.3, 100 | 92.6 0.10 | 0.448, 150 | 92.8 0.16 |
Random | 0.5 | 0.3, 100 | 93.3 0.07 | 0.459, 550 | 93.3 0.18 |
ERK | 0.1 | 0.3, 100 | 92.4 0.06 | 0.416, 200 | 92.4 0.23 |
ERK | 0.2 | 0.3, 100 | 93.1 0.09 | 0.381, 950 | 93.1 0.21 |
ERK | 0.5 | 0.3, 100 | 93.4 0.14 | 0.287, 500 | 93.8 0.06 |
"""
# The report prints both data sets side by side.
TABLE_5 = """
RigL | 91.7 0.18 | 0.10x, 0.10x | 92.9 0.10 | 0.20x, 0.20x | 71.8 0.33 | 0.10x, 0.10x | 73.5 0.04 | 0.20x, 0.20x |
RigL-SG | 92.2 0.17 | 0.28x, 0.28x | 92.7 0.25 | 0.49x, 0.49x | 72.3 0.12 | 0.36x,0.35x | 73.7 0.15 | 0.53x, 0.53x |
RigL-SM | 92.2 0.20 | 0.28x, 0.28x | 92.9 0.21 | 0.50x, 0.49x | 72.6 0.27 | 0.36x,0.36x | 73.7 0.35 | 0.53x, 0.53x |
RigL | 92.4 0.06 | 0.17x, 0.17x | 93.1 0.09 | 0.35x, 0.35x | 72.6 0.37 | 0.23x, 0.22x | 73.4 0.15 | 0.38x, 0.38x |
RigL-SG | 92.1 0.19 | 0.28x, 0.28x | 92.7 0.19 | 0.49x, 0.49x | 73.0 0.13 | 0.37x,0.36x | 74.2 0.26 | 0.53x, 0.53x |
RigL-SM | 92.27 0.01 | 0.28x, 0.28x | 93.0 0.13 | 0.50x, 0.49x | 72.6 0.27 | 0.37x, 0.37x | 74.2 0.13 | 0.53x, 0.53x |
RigL | 90.3 0.34 | 0.28x, 0.28x | 91.0 0.38 | 0.50x, 0.49x | 67.6 0.28 | 0.36x, 0.36x | 68.9 0.65 | 0.53x, 0.53x |
RigL (ERK) | 90.2 0.57 | 0.28x, 0.28x | 90.6 0.56 | 0.50x, 0.49x | 67.8 0.73 | 0.37x, 0.37x | 68.9 0.47 | 0.53x, 0.53x |
"""  # noqa: E501


def printed(text):
    """Returns the cells of a printed table, a list for each line."""
    lines = text.strip().splitlines()
    return [[c.strip() for c in line.strip(" |").split("|")] for line in lines]


def in_file(table):
    """Returns the lines of published.csv for a table, as text."""
    with published._FILE.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["table"] == table]


def costed(cell):
    """Returns the cells of a line, such as `["89.0 0.35", "0.11x,0.11x"]`."""
    accuracy = f"{cell['accuracy']} {cell['std']}"
    if cell["dense_train_flops"]:
        flops = f"{cell['dense_train_flops']},{cell['dense_test_flops']}"
    else:
        flops = f"{cell['train_flops']}x,{cell['test_flops']}x"
    return [accuracy, flops]


def test_table_1_is_what_is_printed():
    found = {}
    for cell in in_file("table1"):
        ours, original = found.setdefault(cell["row"], ([], []))
        ours.append(cell["accuracy"])
        original.append(cell["original"])
    assert [
        [row, *ours, *original] for row, (ours, original) in found.items()
    ] == printed(TABLE_1)
    densities = [cell["density"] for cell in in_file("table1")]
    assert densities == ["", *["0.1", "0.2", "0.5"] * 3]


@pytest.mark.parametrize(
    ("table", "text"), [("table2", TABLE_2), ("table3", TABLE_3)]
)
def test_tables_2_and_3_are_what_is_printed(table, text):
    found = {}
    for cell in in_file(table):
        found.setdefault(cell["row"], []).extend(costed(cell))
    wanted = [
        [part.replace(", ", ",") for part in line] for line in printed(text)
    ]
    assert [[row, *parts] for row, parts in found.items()] == wanted
    densities = [cell["density"] for cell in in_file(table)]
    assert densities == [*["0.1", "0.2"] * (len(wanted) - 1), ""]


def test_table_4_is_what_is_printed():
    lines = in_file("table4")
    pairs = zip(lines[::2], lines[1::2], strict=True)
    found = []
    for reference, optimal in pairs:
        assert (reference["optimal"], optimal["optimal"]) == ("no", "yes")
        assert reference["gin"] == optimal["gin"]
        line = [reference["row"], reference["density"]]
        for cell in (reference, optimal):
            line.append(f"{cell['drop_fraction']}, {cell['frequency']}")
            line.append(f"{cell['accuracy']} {cell['std']}")
        found.append(line)
    assert found == printed(TABLE_4)


def test_table_5_is_what_is_printed():
    lines = in_file("table5")
    halves = [
        [cell for cell in lines if cell["gin"].endswith(network)]
        for network in ("_wrn", "_resnet50")
    ]
    assert sum(map(len, halves)) == len(lines)
    found = []
    for at in range(0, len(halves[0]), 2):
        cells = [cell for half in halves for cell in half[at : at + 2]]
        assert [c["density"] for c in cells] == ["0.1", "0.2"] * 2
        found.append([cells[0]["row"], *sum(map(costed, cells), [])])
    wanted = [
        [part.replace(", ", ",") for part in line] for line in printed(TABLE_5)
    ]
    assert found == wanted


@pytest.mark.parametrize("table", published.TABLES + published.FIGURES)
def test_each_published_cell_has_a_run(table):
    """Its gin file exists, has the same numbers, and is planned."""
    cells = published.cells(table)
    planned = set()
    if table != "figure3":  # its densities take a while to find
        for run in plans.runs(table, preset=plans.Preset()):
            planned.add((run.row, run.density))
    for cell in cells:
        path = variations.GIN_FOLDER / f"{cell.gin}.gin"
        header = path.read_text().split("\n\n")[0].replace("\n# ", " ")
        if table in ("table2", "table3", "table5"):
            number = cell.printed.replace("±", "+-")
            # If two tables differ, the header has this number in brackets.
            assert number in header or f"({cell.accuracy} in" in header
        if planned:
            assert (cell.gin, cell.density) in planned
    assert published.notes(table)


def test_what_is_ambiguous_is_noted():
    def notes(table, row, density, gin=""):
        return [
            cell.note
            for cell in published.cells(table)
            if cell.row == row and cell.density == density and gin in cell.gin
        ]

    assert "92.9" in notes("table2", "RigL", 0.2)[0]
    assert "one seed collapsed" in notes("table2", "SET 2x", 0.1)[0]
    assert "same runs" in notes("table2", "Static", 0.1)[0]
    assert "copy" in notes("table5", "RigL-SM", 0.1, "erk_resnet50")[0]
    assert "45,000" in notes("table2", "Dense Baseline", None)[0]
    assert "0.47x" in notes("table3", "Lottery", 0.1)[0]
    with pytest.raises(ValueError, match="table must be one of table1"):
        published.cells("table6")


# Made-up folders of results.


@pytest.fixture
def results(tmp_path):
    """Returns RigL (ERK) at 0.1 with three seeds, and a dense run."""
    folder = tmp_path / "results"
    for seed, accuracy in enumerate((0.92, 0.93, 0.955)):
        made(folder, "rigl_erk_wrn", 0.1, seed, accuracy)
    made(folder, "dense_wrn", None, 0, 0.94, flops=(1.0, 1.0))
    return folder


def test_mean_deviation_and_difference(results):
    """92.0, 93.0 and 95.5: mean 93.5, deviations -1.5, -0.5 and 2.

    The sample variance is (2.25 + 0.25 + 4) / 2 = 3.25; published is 92.4.
    """
    made_report = sections.report(reading.read(results), ["table2"])
    (line,) = lines_of(made_report, row="RigL (ERK)", density="0.1")
    assert float(line["accuracy_mean"]) == pytest.approx(93.5)
    assert float(line["accuracy_std"]) == pytest.approx(3.25**0.5)
    assert float(line["difference"]) == pytest.approx(93.5 - 92.4)
    assert (line["seeds"], line["n"], line["wanted"]) == ("0 1 2", "3", "3")
    assert line["published_accuracy"] == "92.4"
    assert line["training_flops_ratio"] == "0.17"
    text = page.as_markdown(made_report.page)
    assert (
        "| RigL (ERK) | 93.50 ± 1.80 | 3 of 3 | 0.17x | 0.16x | 92.4 ± 0.06 "
        "| 0.17x, 0.17x | +1.10 | -3.37 to +5.57 |" in text
    )
    # One seed has no deviation, and a row without runs has no numbers.
    assert "| Dense Baseline | 94.00 | 1 of 3 | 1.00x | 1.00x |" in text
    assert "| SET (ERK) | - | - | - | - | 92.2 ± 0.04 |" in text
    assert "92.6 ± 0.10 [" in text and "Table 5 prints 92.9" in text


def test_tickets_are_charged_for_pruning(results):
    made(results, "lottery_wrn", 0.1, 0, 0.9, flops=(0.13, 0.13))
    found = sections.report(reading.read(results), ["table2"])
    (line,) = lines_of(found, row="Lottery", density="0.1")
    assert float(line["training_flops_ratio"]) == pytest.approx(0.43)


def test_missing_failed_and_unfinished_runs(results):
    failed(results, "set_erk_wrn", 0.1, 0, "loss is nan\n<b>a | b</b>")
    failed(results, "static_uniform_wrn", 0.1, 0, None)
    failed(results, "rigl_erk_wrn", 0.2, 0, "out of memory")
    made(results, "rigl_erk_wrn", 0.2, 1, 0.93)
    found = reading.read(results)
    made_report = sections.report(found)
    text = page.as_markdown(made_report.page)
    assert "| SET (ERK) | failed | 0 of 3, 1 failed | - | - |" in text
    assert "| Static | unfinished | 0 of 3 | - | - |" in text
    assert "| RigL (ERK) | 93.00 | 1 of 3, 1 failed |" in text
    assert "- rigl\\_erk\\_wrn-density0.2-seed0: out of memory" in text
    assert "a | b\\</b>" in text and "<b>" not in page.as_html(made_report.page)
    assert "unfinished, after 0 epochs" in text


def test_duplicates_count_once(results):
    first = results / "full" / "rigl_erk_wrn-density0.1-seed0"
    shutil.copytree(first, results / "full" / "z-copy")
    made(results, "rigl_erk_wrn", 0.1, 1, 0.5, folder="z-other")
    found = reading.read(results)
    summary = summaries.of(found, "rigl_erk_wrn", 0.1)
    assert summary.n == 3
    assert summary.mean == pytest.approx(93.5)
    same, different = found.notes
    assert same == (
        "rigl_erk_wrn-density0.1-seed0 is there 2 times and counts once; the "
        "same result is in z-copy."
    )
    assert different == (
        "rigl_erk_wrn-density0.1-seed1 (93.00 %) is there 2 times and counts "
        "once; not counted: z-other (50.00 %)."
    )


def test_a_finished_duplicate_counts_before_a_failed_one(results):
    failed(results, "set_erk_wrn", 0.1, 0, "killed")
    made(results, "set_erk_wrn", 0.1, 0, 0.91, folder="z")
    found = reading.read(results)
    assert summaries.of(found, "set_erk_wrn", 0.1).n == 1
    assert "z (91.00 %) is there 2 times" in found.notes[0]
    assert "set_erk_wrn-density0.1-seed0 (no result)" in found.notes[0]


def test_runs_from_before_growth_had_a_divisor(results):
    """Their files lack it, and they are averaged with later runs."""
    for seed, more in enumerate(({}, {"grow_divisor": 1.0})):
        path = made(results, "set_erk_wrn", 0.1, seed, 0.9) / "run"
        result = json.loads((path / "result.json").read_text())
        result["settings"]["method"] |= {"grow_init": "zeros", **more}
        (path / "result.json").write_text(json.dumps(result))
    found = reading.read(results)
    assert not found.notes
    assert summaries.of(found, "set_erk_wrn", 0.1).n == 2


def test_other_settings_are_not_averaged(results):
    for seed in (0, 1):
        made(results, "set_erk_wrn", 0.1, seed, 0.9)
    made(results, "set_erk_wrn", 0.1, 2, 0.1, epochs=3)
    made(results, "set_erk_wrn", 0.2, 0, 0.1, updates=(0.5, 100))
    found = reading.read(results)
    summary = summaries.of(found, "set_erk_wrn", 0.1)
    assert summary.accuracies == (90.0, 90.0)
    assert not summaries.of(found, "set_erk_wrn", 0.2).n
    epochs, fraction = found.notes
    assert "set_erk_wrn-density0.1-seed2 is left out" in epochs
    assert "epochs 3 where the others have 250" in epochs
    assert "drop_fraction 0.5 where the others have 0.3" in fraction


def test_longer_runs_are_rows_of_their_own(results):
    longer = (("train.length", 4),)
    for row in ("rigl_erk_wrn", "set_erk_wrn"):
        made(results, row, 0.1, 0, 0.97, changes=longer, epochs=1000)
    found = reading.read(results)
    assert found.notes == ()
    assert summaries.of(found, "rigl_erk_wrn", 0.1).n == 3
    made_report = sections.report(found)
    (line,) = lines_of(made_report, table="methods", row="RigL (ERK) 4x")
    assert (line["n"], line["changes"]) == ("1", "train.length=4")
    assert panels.panels(found, "wrn")["4 times as long"] == [
        ("set_erk_wrn", longer),
        ("rigl_erk_wrn", longer),
    ]


BROKEN = {
    "not JSON": "{",
    "a list": "[]",
    "no accuracy": '{"seed": 0}',
    "nan": '{"seed": 0, "test_accuracy": NaN}',
    "text": '{"seed": 0, "test_accuracy": "0.9"}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_results_that_cannot_be_read(results, content):
    path = results / "full" / "rigl_erk_wrn-density0.1-seed0"
    (path / "run/result.json").write_text(content)
    found = reading.read(results)
    summary = summaries.of(found, "rigl_erk_wrn", 0.1)
    assert (summary.n, summary.failed) == (2, 1)
    (broken,) = summary.others
    assert "its result.json cannot be read" in broken.failure
    assert "result.json cannot be read" in str(sections.report(found).page)


@pytest.mark.parametrize(
    "more",
    [
        {"test_accuracy": float("nan")},
        {"test_accuracy": 92.0},
        {"training_flops_ratio": None},
        {"seed": 7},
        {"settings": []},
        {"validation_accuracy": "high"},
        {"inference_flops_ratio": True},
        {"training_flops_ratio": float("inf")},
        {"inference_flops_ratio": 0.0},
        {"steps": None},
    ],
    ids=str,
)
def test_results_that_cannot_be_right(results, more):
    made(results, "set_erk_wrn", 0.1, 0, 0.9, result=more)
    summary = summaries.of(reading.read(results), "set_erk_wrn", 0.1)
    assert (summary.n, summary.failed) == (0, 1)


def test_folders_that_are_no_runs(results):
    for own in ("slurm", "studies"):  # of bin/reproduce and bin/tune
        (results / "full" / own).mkdir()
    (results / "full" / "thesis").mkdir()
    (results / "full" / "notes.txt").write_text("mine")
    (results / "empty").mkdir()
    made(results, "my_row", 0.1, 0, 0.9)
    path = made(results, "set_erk_wrn", 0.1, 0, 0.9)
    (path / "about.json").write_bytes(b"\xff\xfe")
    moved = made(results, "static_erk_wrn", 0.1, 0, 0.9, preset="small")
    shutil.move(moved, results / "full" / "moved")
    shutil.rmtree(results / "small")
    found = reading.read(results)
    assert len(found.finished) == 4
    told = "\n".join(found.notes)
    assert "thesis is left out: it has no about.json" in told
    assert "slurm" not in told and "studies" not in told
    assert "there is no gin file 'my_row'" in told
    assert "set_erk_wrn-density0.1-seed0 is left out: its about.json" in told
    assert (
        "moved is left out: its about.json says that it is of 'small'" in told
    )


def test_densities_that_a_row_cannot_have(results):
    made(results, "dense_wrn", 0.1, 1, 0.9)
    made(results, "set_erk_wrn", None, 0, 0.9)
    made(results, "set_erk_wrn", 1.5, 0, 0.9)
    found = reading.read(results)
    assert len(found.finished) == 4
    assert ["is left out" in note for note in found.notes] == [True] * 3


def test_rows_that_were_added(results, monkeypatch):
    """A user's gin file is shown, although it is in no table."""
    made(results, "my_row", 0.1, 0, 0.9)
    names = [*rows.known(), "my_row"]
    monkeypatch.setattr(rows, "known", lambda: names)
    made_report = sections.report(reading.read(results))
    assert [line["n"] for line in lines_of(made_report, gin="my_row")] == ["1"]
    text = page.as_markdown(made_report.page)
    assert "| my\\_row | 0.1 | - | 90.00 | 1 of 3 |" in text


def test_a_loss_that_is_no_number_is_noted(results):
    made(
        results, "set_erk_wrn", 0.1, 0, 0.1, result={"test_loss": float("nan")}
    )
    found = reading.read(results)
    assert summaries.of(found, "set_erk_wrn", 0.1).mean == 10.0
    assert "has diverged" in found.notes[0]


def test_presets_are_never_mixed(results):
    made(results, "rigl_erk_wrn", 0.1, 0, 0.5, preset="small")
    with pytest.raises(ValueError, match="--preset with one of full, small"):
        reading.read(results)
    full, small = (reading.read(results, name) for name in ("full", "small"))
    assert summaries.of(full, "rigl_erk_wrn", 0.1).n == 3
    assert summaries.of(small, "rigl_erk_wrn", 0.1).mean == 50.0
    with pytest.raises(ValueError, match="holds no run of the preset 'tiny'"):
        reading.read(results, "tiny")


def test_another_preset_is_not_compared_with_the_report(tmp_path):
    made(tmp_path, "rigl_erk_wrn", 0.1, 0, 0.5, preset="small")
    found = reading.read(tmp_path)
    text = page.as_markdown(sections.report(found).page)
    assert "92.4" not in text and "difference" not in text
    made_report = sections.report(found, with_published=True)
    text = page.as_markdown(made_report.page)
    assert "report, its own setting: accuracy (%)" in text
    assert "92.4 ± 0.06" in text and "| difference" not in text
    (line,) = lines_of(made_report, table="table2", row="RigL (ERK)")
    assert (line["published_accuracy"], line["difference"]) == ("92.4", "")


def test_what_is_shown(results):
    text = sections.report(reading.read(results)).page.text
    told = "Without a finished run: table1, table3, table4, table5"
    assert told in text[-1]
    shown = sections.report(reading.read(results), ["figure2", "table3"])
    assert [s.anchor for s in shown.page.sections] == ["table3", "figure2"]
    markdown = page.as_markdown(shown.page)
    assert "| RigL 3x | - | - |" in markdown
    assert "bin/reproduce figure2 --preset=full trains them" in markdown
    with pytest.raises(ValueError, match="is one of methods, differences"):
        sections.report(reading.read(results), ["table6"])


def test_the_optimum_is_chosen_by_validation_of_all_seeds(results):
    searched(results)
    found = reading.read(results)
    trials = summaries.trials(found, "rigl_erk_wrn", 0.1)
    assert len(trials) == 3
    best = summaries.best(trials)
    assert (best.drop_fraction, best.frequency) == (0.4, 200)
    made_report = sections.report(found, ["table4"])
    text = page.as_markdown(made_report.page)
    assert (
        "| optimum of 2 | 0.4, 200 | 96.00 | 90.00 ± 0.00 | 3 of 3 | "
        "0.416, 200 | 92.4 ± 0.23 | -2.40 |" in text
    )
    assert "| reference | 0.3, 100 | 93.50 | 93.50 ± 1.80 | 3 of 3 |" in text
    assert summaries.best([]) is None


def test_a_change_to_the_own_value_is_known(results):
    """A trial that changes only one value has the row's other value."""
    changes = (("UPDATE_FRACTION", 0.5),)
    failed_path = made(results, "rigl_erk_wrn", 0.1, 0, 0.9, changes=changes)
    (failed_path / "run/result.json").unlink()
    (trial,) = summaries.trials(reading.read(results), "rigl_erk_wrn", 0.1)
    assert (trial.drop_fraction, trial.frequency) == (0.5, 100)


def test_results_jsonl_makes_the_same_page(results, tmp_path):
    searched(results)
    failed(results, "set_erk_wrn", 0.1, 0, "out of memory")
    (results / "full" / "thesis").mkdir()
    made(results, "rigl_erk_wrn", 0.1, 1, 0.5, folder="z-other")
    first, second = tmp_path / "first", tmp_path / "second"
    report_command.write(sections.report(reading.read(results)), first)
    again = reading.read(first / "results.jsonl", "full")
    report_command.write(sections.report(again), second)
    names = sorted(p.relative_to(first) for p in first.rglob("*"))
    assert names == sorted(p.relative_to(second) for p in second.rglob("*"))
    for name in names:
        if (first / name).is_file():
            assert (first / name).read_bytes() == (second / name).read_bytes()
    assert not [name for name in names if name.name.startswith(".")]


def test_a_broken_line_of_results_jsonl(results, tmp_path):
    text = records.as_lines(reading.read(results))
    path = tmp_path / "results.jsonl"
    path.write_text("rubbish\n[1]\n" + '{"folder": "a/b"}\n\n' + text)
    found = reading.read(path)
    assert len(found.finished) == 4
    assert [note[:6] for note in found.notes] == ["Line 1", "Line 2", "Line 3"]


def test_lines_that_are_wrong_in_one_place(results, tmp_path):
    """A wrong line is no error, and gives no wrong number."""
    text = records.as_lines(reading.read(results)).splitlines()
    good = json.loads(text[-1])
    wrong = (None, "x", -1, 1e400, True, [], {}, [[1]], {"a": None})
    lines = []
    for outer in good:
        for value in wrong:
            lines.append(good | {outer: value})
    for inner in good["result"]:
        for value in wrong:
            result = good["result"] | {inner: value}
            lines.append(good | {"result": result})
    for at, line in enumerate(lines):
        # Each is a separate run, if it still has a density.
        if isinstance(line["density"], float):
            line["density"] = (1 + at) / 1_000
        if isinstance(line["folder"], str):
            line["folder"] = f"full/{at:03}"
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(text + [json.dumps(line) for line in lines]))
    found = reading.read(path, "full")
    accuracies = {run.test for run in found.finished}
    assert accuracies <= {92.0, 93.0, 95.5, 94.0, 100.0}  # not True
    made_report = sections.report(found)
    assert "nan" not in str(made_report.lines)
    page.as_html(made_report.page)


class Checked(html.parser.HTMLParser):
    """Finds unclosed tags, and the references of a page."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.refers, self.images = [], [], [], []
        self.ids = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        attributes = dict(attributes)
        for name in ("src", "href"):
            if name in attributes:
                self.refers.append(attributes[name])
        if tag == "img":
            self.images.append(attributes["alt"])
        if "id" in attributes:
            self.ids.append(attributes["id"])

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture
def varied(results):
    """Adds runs for every table and figure."""
    searched(results)
    for row in ("rigl_uniform_wrn", "rigl_sg_uniform_wrn", "set_erk_wrn"):
        made(results, row, 0.1, 0, 0.9)
    made(results, "rigl_erk_wrn", 0.057, 0, 0.9, flops=(0.1701, 0.1))
    made(results, "rigl_uniform_2x_wrn", 0.1, 0, 0.91)
    made(results, "rigl_uniform_resnet50", 0.1, 0, 0.7)
    made(results, "rigl_kernel_erk_wrn", 0.1, 0, 0.89)
    made(results, "dense_50k_wrn", None, 0, 0.95)
    made(
        results,
        "rigl_erk_wrn",
        0.1,
        0,
        0.9,
        changes=(("sgd.learning_rate", 0.01),),
        rate=0.01,
    )
    return results


def test_html_stands_alone(varied, tmp_path):
    made_report = sections.report(reading.read(varied))
    files = report_command.write(made_report, tmp_path / "out")
    text = (tmp_path / "out/report.html").read_text()
    checked = Checked(text)
    assert not checked.open and not checked.wrong
    outside = [
        to
        for to in checked.refers
        if not to.startswith(("#", "data:image/png;base64,"))
    ]
    assert not outside
    inside = [to[1:] for to in checked.refers if to.startswith("#")]
    assert inside == checked.ids
    assert not re.search(r"https?://|url\(|@import", text)
    assert all(len(alt) > 20 for alt in checked.images)
    pictures = [path for path in files if path.suffix == ".png"]
    assert {path.stem for path in pictures} == set(contents.PICTURES)
    assert len(checked.images) == len(pictures)
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_markdown_names_its_figures(varied, tmp_path):
    report_command.write(
        sections.report(reading.read(varied)), tmp_path / "out"
    )
    text = (tmp_path / "out/report.md").read_text()
    named = re.findall(r"\]\((figures/\w+\.png)\)", text)
    assert len(named) == len(contents.PICTURES)
    assert all((tmp_path / "out" / name).is_file() for name in named)
    # All lines of a table have as many cells as its head.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", s)) for s in table.splitlines()}
        assert len(cells) == 1


def test_other_files_stay_and_old_figures_go(varied, results, tmp_path):
    output = tmp_path / "out"
    report_command.write(sections.report(reading.read(varied)), output)
    (output / "mine.txt").write_text("kept")
    (output / "figures/mine.png").write_bytes(b"kept")
    report_command.write(
        sections.report(reading.read(varied), ["table1"]), output
    )
    assert {path.name for path in output.rglob("*.*")} == {
        "mine.txt",
        "mine.png",
        "results.jsonl",
        "report.csv",
        "report.html",
        "report.md",
    }


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("missing", "There are no results at"),
        ("empty", "holds no run of bin/reproduce"),
        ("results/full", "is the folder of a preset"),
        ("results/full/dense_wrn-seed0/about.json", "holds no run"),
    ],
)
def test_nothing_to_read(results, tmp_path, where, what):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=what):
        reading.read(tmp_path / where)


def test_output_that_cannot_be_written(results, tmp_path):
    made_report = sections.report(reading.read(results), ["table1"])
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be written to"):
            report_command.write(made_report, output)


def test_names_of_rows():
    assert rows.row("rigl_erk_2x_wrn").label == "RigL (ERK) 2x"
    assert rows.row("static_erk_50k_wrn").label == "Static (ERK) 50k"
    assert rows.row("rigl_reinit_uniform_resnet50") == rows.Row(
        "rigl_reinit_uniform_resnet50",
        "RigL, re-initialised",
        "uniform",
        network="resnet50",
    )
    assert rows.row("mine").label == "mine"
    unnamed = [gin for gin in rows.known() if not rows.row(gin).network]
    assert unnamed == ["quickstart"]


def test_curves_are_thinned_and_reach_the_end(results):
    path = results / "full/rigl_erk_wrn-density0.1-seed0/run/flops.csv"
    lines = [f"{step},{1e7 + step}" for step in range(5_000)]
    path.write_text("\n".join(["step,inference_flops", *lines]))
    found = reading.read(results)
    run = summaries.of(found, "rigl_erk_wrn", 0.1).finished[0]
    assert len(run.curve) <= 121
    assert run.curve[0] == (0, pytest.approx(0.1))
    assert run.curve[-2][0] == 4_999 and run.curve[-1][0] == 88_000


def test_planned_flops_are_marked(tmp_path):
    made(tmp_path, "rigl_erk_wrn", 0.1, 0, 0.5, preset="small")
    planned = report_command.planned_flops("small")
    made_report = sections.report(
        reading.read(tmp_path), ["table2"], planned=planned
    )
    text = page.as_markdown(made_report.page)
    line = next(s for s in text.splitlines() if s.startswith("| Static |"))
    assert "| - | - | (0.13x) | (0.13x) |" in line
    assert "They are not results" in text
    # A longer run is planned with its length.
    longer = (("train.length", 4),)
    made(tmp_path, "set_erk_wrn", 0.1, 0, 0.5, preset="small")
    made(tmp_path, "set_erk_wrn", 0.2, 0, 0.5, preset="small", changes=longer)
    methods = sections.report(
        reading.read(tmp_path), ["methods"], planned=planned
    )
    assert "| SET (ERK) 4x | (0.63x), (0.16x) | 0.17x, 0.16x |" in (
        page.as_markdown(methods.page)
    )
    (cell,) = lines_of(made_report, row="Static", density="0.1")
    assert cell["training_flops_ratio"] == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:RigL plans 0 updates")
def test_flops_are_those_that_the_library_counts(tmp_path):
    """The result of a run, report.csv and `count` agree."""
    import keras

    from rigl_keras.experiments.runs import train_command

    path = tmp_path / "tiny" / "one"
    keras.config.disable_interactive_logging()
    train_command.run(
        ["gin/quickstart.gin"],
        bindings=[
            "train.model = @mlp",
            "train.epochs = 1",
            "train.diagnostics = False",
        ],
        run_dir=path / "run",
        seed=0,
        density=0.2,
    )
    about = {"row": "rigl_erk_wrn", "preset": "tiny", "density": 0.2}
    (path / "about.json").write_text(
        json.dumps(about | {"seed": 0, "changes": {}})
    )
    result = json.loads((path / "run/result.json").read_text())
    cost = rigl_keras.count(keras.models.load_model(path / "run/model.keras"))
    ratio = cost.inference_flops / cost.dense_inference_flops
    assert result["inference_flops_ratio"] == ratio
    found = sections.report(reading.read(tmp_path))
    (line,) = lines_of(found, table="table2", gin="rigl_erk_wrn")
    assert float(line["inference_flops_ratio"]) == ratio
    assert float(line["training_flops_ratio"]) == result["training_flops_ratio"]


def test_the_command_says_what_is_wrong(results, tmp_path):
    """The command ends with status 2, without a traceback."""
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "rigl_keras.experiments.report_command"]
    command += [f"--results_dir={results}", f"--output={tmp_path / 'file'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = [s for s in done.stderr.splitlines() if s.startswith("report: ")]
    assert len(said) == 1 and "is no folder. Pass --output" in said[0]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == ""
