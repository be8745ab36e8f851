"""The published pages of results, their data, and the numbers in their text."""

import functools
import json
import pathlib
import re

import gin
from rigl_keras.experiments.report import reading, sections
from rigl_keras.experiments.reproduction import plans
from rigl_keras.experiments.runs import config

__all__ = [
    "DOCS",
    "data",
    "links",
    "made",
    "numbers",
    "planned_updates",
    "runs",
    "tables",
    "text",
]

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def text(name):
    """Returns the text of a page, such as that of "small"."""
    return (DOCS / f"results_{name}.md").read_text()


def data(name):
    """Returns the file with the runs of a page."""
    return DOCS / f"results_{name}" / "results.jsonl"


def runs(name):
    """Returns the runs of a page, as dictionaries."""
    return [json.loads(line) for line in data(name).read_text().splitlines()]


@functools.cache
def made(name, preset, **settings):
    """Returns the report that is made from the data of a page."""
    return sections.report(reading.read(data(name), preset), **settings)


def planned_updates(row, preset):
    """Returns how many updates a run of RigL has, and the last step of one."""
    path = str(plans.Preset(preset).path)
    config.parse([f"gin/{row}.gin", path], [])
    updates = gin.get_bindings("RigL")
    gin.clear_config()
    return updates["end_step"] // updates["frequency"], updates["end_step"]


def tables(text):
    """Returns the lines of the tables of a page in Markdown."""
    return [line for line in text.splitlines() if line.startswith("|")]


def numbers(text):
    """Returns the decimal numbers outside tables, code and links."""
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)
    lines = [line for line in prose.splitlines() if not line.startswith("|")]
    return re.findall(r"(?<![\w.])\d+\.\d+x?", "\n".join(lines))


def links(text):
    """Returns the files that a page links to."""
    found = re.findall(r"\]\(([^)#]+)\)", text)
    return [link for link in found if not link.startswith("http")]
