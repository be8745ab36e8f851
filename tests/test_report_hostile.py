"""bin/report on folders that nobody has tidied: always a page, always a note.

A made-up folder of valid runs is damaged in one place at a time, in every
place, and read again. None of it draws figures, but for those tests that are
about figures.
"""

import csv
import io
import json
import shutil

import pytest
from test_report import made

from rigl_keras.experiments import (
    records,
    report,
)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are not drawn, which takes seconds each."""
    monkeypatch.setattr(report, "_picture", lambda *args, **options: None)


@pytest.fixture
def results(tmp_path):
    """RigL (ERK) at 0.1 with three seeds, SET with one, and a dense one."""
    folder = tmp_path / "results"
    for seed, accuracy in enumerate((0.92, 0.93, 0.925)):
        made(folder, "rigl_erk_wrn", 0.1, seed, accuracy)
    made(folder, "set_erk_wrn", 0.1, 0, 0.9)
    made(folder, "dense_wrn", None, 0, 0.94, flops=(1.0, 1.0))
    return folder


def written(found, output, names=()):
    """Writes a report, and returns its Markdown and the lines of its table."""
    made_report = report.report(found, names)
    report.write(made_report, output)
    (output / "report.html").read_text(encoding="utf-8")
    text = (output / "report.md").read_text(encoding="utf-8")
    table = (output / "report.csv").read_text(encoding="utf-8")
    again = records.read(output / "results.jsonl", found.preset)
    # What is left out of the folder is left out of the file as well.
    assert again.finished == found.finished
    return text, list(csv.DictReader(io.StringIO(table)))


# Every field of every file, one at a time.

HUGE = int("9" * 400)
HOSTILE = [
    None,
    True,
    "",
    "0.1",
    "a" * 5_000,
    "\ud800[x](http://evil)|<b>\x1b[31m\n# y",
    "=HYPERLINK(1)",
    "$\\frac$",
    0,
    -1,
    1.5,
    1e308,
    -1e308,
    5e-324,
    HUGE,
    -HUGE,
    float("nan"),
    float("inf"),
    [],
    {},
    [[1, 2], "x"],
    {"a": [None]},
    {"$x$": HUGE},
]


def places(content, path=()):
    """Yields the path of each value in a JSON object, and each key."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield (*path, key)
            yield from places(value, (*path, key))
    elif isinstance(content, list):
        for at, value in enumerate(content):
            yield (*path, at)
            yield from places(value, (*path, at))


def at(content, path):
    for key in path:
        content = content[key]
    return content


GONE = object()


def damage(file, path, value):
    """Replaces one value of a JSON file, or removes it."""
    content = json.loads(file.read_text())
    outer = at(content, path[:-1])
    if value is GONE:
        del outer[path[-1]]
    else:
        outer[path[-1]] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("value", [*HOSTILE, GONE], ids=lambda v: repr(v)[:20])
def test_every_value_of_a_run_may_be_anything(
    results, tmp_path, value, undrawn
):
    """It counts as it did, or is left out and named: never a third thing."""
    changes = (("UPDATE_FRACTION", 0.3), ("train.length", 2))
    whole = records.read(results).finished
    first = made(results, "rigl_erk_wrn", 0.1, 1, 0.93, changes=changes)
    hurt = {}
    for file in ("about.json", "run/result.json"):
        for number, path in enumerate(
            places(json.loads((first / file).read_text()))
        ):
            # Each a run of its own, so that one report shows all of them.
            density = 0.2 + number / 1_000 + len(file) / 100_000
            new = made(
                results, "rigl_erk_wrn", density, 1, 0.93, changes=changes
            )
            damage(new / file, path, value)
            hurt[new.name] = (file, *path)
    shutil.rmtree(first)
    found = records.read(results)
    assert [run for run in found.finished if run.name not in hurt] == list(
        whole
    )
    text, lines = written(found, tmp_path / "out")
    told = "\n".join(found.notes)
    told += "\n".join(f"{r.name}: {r.failure}" for r in found.runs if r.failure)
    counted = {run.name: run for run in found.finished if run.name in hurt}
    for name, path in hurt.items():
        if name in counted:
            assert 0 <= counted[name].test <= 100, path
        else:
            assert name in told, path
    for line in lines:
        numbers = [line["accuracy_mean"], line["training_flops_ratio"]]
        assert all(0 <= float(n) <= 1e6 for n in numbers if n), line
    assert "Left out" in text or "Failed runs" in text
