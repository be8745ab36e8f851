"""The tables of the report, as the package has them, and their runs."""

import csv

import pytest

from rigl_keras.experiments.protocol import published, rows, variations
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
