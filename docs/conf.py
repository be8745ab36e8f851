"""How Sphinx builds the documentation; `bin/docs` runs it."""

import os
import pathlib
import re

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import rigl_keras  # noqa: E402 (its docstrings are read)
from rigl_keras import _figure_style  # noqa: E402
from rigl_keras.experiments.report.front_figure import (  # noqa: E402
    front_figure,
)

project = "rigl_keras"
author = copyright = "The authors of rigl_keras. Apache License 2.0"
release = version = rigl_keras.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "rigl_keras"
html_theme_options = {"source_repository": "", "navigation_with_keys": True}
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "code"
myst_heading_anchors = 2


def _as_restructured_text(app, what, name, obj, options, lines):
    """Docstrings here quote code with single backticks, and write |w|."""
    for number, line in enumerate(lines):
        line = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line)
        parts = line.split("``")  # code is at odd places
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        lines[number] = "``".join(parts)


def setup(app):
    """Called by Sphinx."""
    docs = pathlib.Path(__file__).parent
    figure = front_figure(
        docs / "kernels" / "avx512" / "train.csv",
        docs / "results_small" / "report.csv",
    )
    _figure_style.save(figure, docs / "front.png")
    before_napoleon = 400
    app.connect(
        "autodoc-process-docstring", _as_restructured_text, before_napoleon
    )
