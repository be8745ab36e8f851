"""bin/report and the library where TensorFlow is not installed."""

import ast
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import rigl_keras

ROOT = pathlib.Path(rigl_keras.__file__).parents[1]
# Runs a module in a process that cannot import these.
WITHOUT = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "keras", "gin"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Missing())
"""


def run_without_tensorflow(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


REPORT = """
runpy.run_module("rigl_keras.experiments.report_command", run_name="__main__")
"""


def test_the_page_is_made_without_tensorflow(tmp_path):
    """The page has the same bytes as the one in the repository."""
    kept = ROOT / "docs/results_small"
    data = f"--results_dir={kept / 'results.jsonl'}"
    done = run_without_tensorflow(REPORT, data, f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    for name in ("report.md", "report.csv", "results.jsonl"):
        assert (tmp_path / name).read_bytes() == (kept / name).read_bytes()
    planned = run_without_tensorflow(
        REPORT, data, f"--output={tmp_path}", "--planned"
    )
    assert planned.returncode == 2
    (line,) = planned.stderr.splitlines()
    assert line.startswith("report: --planned")
    assert "No module named 'tensorflow'" in line


@pytest.mark.parametrize(
    "code",
    [
        "import rigl_keras; rigl_keras.sparsify",
        "from rigl_keras import RigL",
        "import rigl_keras; rigl_keras.kernels.load()",
        "from rigl_keras import *",
    ],
)
def test_the_library_says_that_it_needs_tensorflow(code):
    done = run_without_tensorflow(code)
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line.startswith("ImportError: rigl_keras."), line
    assert line.endswith(
        "needs TensorFlow and Keras 3, which cannot be imported (No module "
        "named 'tensorflow'): pip install tensorflow keras."
    )


ENDS = (
    """
import atexit, runpy, sys
atexit.register(lambda: print("tensorflow" in sys.modules))
"""
    + REPORT
)


@pytest.mark.slow_but("without")
@pytest.mark.parametrize(
    "options, loaded",
    [([], "False"), (["--planned"], "True")],
    ids=["without", "planned"],
)
def test_the_script_does_not_wait_for_tensorflow(options, loaded, tmp_path):
    """It loads TensorFlow only for --planned."""
    data = f"--results_dir={ROOT / 'docs/results_small/results.jsonl'}"
    done = subprocess.run(
        [sys.executable, "-c", ENDS, data, f"--output={tmp_path}", *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RIGL_KERAS_WITHOUT_TENSORFLOW": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == loaded
    script = (ROOT / "bin/report").read_text()
    assert "export RIGL_KERAS_WITHOUT_TENSORFLOW=1" in script


def test_the_script_needs_no_installed_project(tmp_path):
    """Any Python with absl, matplotlib and NumPy can run it."""
    root = tmp_path / "a clone"
    (root / "bin").mkdir(parents=True)
    ours = pathlib.Path(rigl_keras.__file__).parent
    shutil.copy(ours.parent / "bin/report", root / "bin")
    (root / "rigl_keras").symlink_to(ours)
    environment = tmp_path / "environment/bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
    )
    (environment / "python").chmod(0o755)
    data = ours.parent / "docs/results_small/results.jsonl"
    done = subprocess.run(
        [
            root / "bin/report",
            f"--results_dir={data}",
            f"--output={tmp_path / 'page'}",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VIRTUAL_ENV": str(environment.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page/report.md").exists()


def test_editors_find_every_name():
    """Import statements, which editors read, have every public name."""
    tree = ast.parse(pathlib.Path(rigl_keras.__file__).read_text())
    found = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(rigl_keras.__all__) <= found
    assert not set(rigl_keras.__all__) - set(vars(rigl_keras))
