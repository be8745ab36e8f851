"""The published page of small results: each number is that of its data."""

import json
import pathlib
import re

import pytest

from rigl_keras.experiments.report import page, reading, sections
from rigl_keras.experiments.reproduction import plans
from rigl_keras.experiments.runs import config

DOCS = pathlib.Path(__file__).parents[1] / "docs"
DATA = DOCS / "results_small" / "results.jsonl"


@pytest.fixture(scope="module")
def made():
    return sections.report(reading.read(DATA, "small"))


def tables(text):
    """The tables of a page in Markdown, as lines."""
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_page_has_the_numbers_of_its_data(made):
    shown = tables((DOCS / "results_small.md").read_text())
    assert len(shown) > 20
    assert set(shown) <= set(tables(page.as_markdown(made.page)))


def test_the_data_is_as_it_was_written(made):
    """The same page comes of it again, and the csv is of the same runs."""
    folder = DATA.parent
    assert made.results == DATA.read_text()
    written = (folder / "report.md").read_text()
    assert written == page.as_markdown(made.page)


def test_the_runs_are_of_the_preset_in_the_repository():
    """Their epochs and steps are those that the file states."""
    preset = plans.Preset("small")
    runs = [json.loads(line) for line in DATA.read_text().splitlines()]
    assert len(runs) > 40
    for run in runs:
        config.parse([f"gin/{run['row']}.gin", str(preset.path)], [])
        settings = run["result"]["settings"]
        assert settings["batch_size"] == 64
        epochs = int(3 * run["changes"].get("train.length", 1))
        assert settings["epochs"] == epochs
        assert run["result"]["steps"] == 704 * epochs


def test_figures_and_links_are_there():
    for name in ("results_small.md", "../README.md"):
        file = (DOCS / name).resolve()
        for link in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
            if not link.startswith("http"):
                assert (file.parent / link).exists(), (name, link)
