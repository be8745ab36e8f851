"""The examples run at a small size, and are valid notebooks."""

import pathlib
import re
import runpy
import types

import jupytext
import keras
import nbformat
import numpy as np
import pytest

import rigl_keras
from rigl_keras import kernels
from rigl_keras.exporting.export_report import foreign_files

EXAMPLES = pathlib.Path(rigl_keras.__file__).parents[1] / "examples"
# Changes that make each example take seconds and download nothing.
SMALL = {
    "own_cnn": {"DATA": "'digits'", "IMAGES": "512", "EPOCHS": "1"},
    "own_method": {"SEEDS": "(0,)", "EPOCHS": "2"},
    "serve_without_tensorflow": {"EPOCHS": "1", "WIDTH": "8", "SECONDS": "0"},
    "sparse_transformer": {
        "CONTEXT": "8",
        "WIDTH": "8",
        "BLOCKS": "1",
        "STEPS": "4",
        "EVALUATE_EVERY": "4",
        "SAMPLE": "3",
    },
    "transfer_learning": {
        "DATA": "'digits'",
        "WEIGHTS": "None",
        "SIZE": "32",
        "IMAGES": "256",
        "HEAD_EPOCHS": "1",
        "EPOCHS": "1",
    },
}


def scripts():
    return sorted(EXAMPLES.glob("*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an example at its small size; returns its names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run(name):
        code = (EXAMPLES / f"{name}.py").read_text()
        for constant, value in SMALL[name].items():
            code, found = re.subn(
                rf"^{constant} = [^#\n]*",
                f"{constant} = {value} ",
                code,
                flags=re.M,
            )
            assert found == 1, constant
        (tmp_path / f"{name}.py").write_text(code)
        names = runpy.run_path(f"{name}.py", run_name=name)
        assert (tmp_path / names["FIGURE"]).stat().st_size > 5_000
        assert names["FIGURE"] == f"{name}.png"
        return names

    return run


def test_your_own_cnn(run):
    names = run("own_cnn")
    assert names["curves"].keys() == {"RigL, density 0.1", "dense"}
    kept = names["keras"].models.load_model("own_cnn.keras")
    assert rigl_keras.count(kept).density == pytest.approx(0.1, abs=0.01)


def test_a_method_of_your_own(run):
    names = run("own_method")
    assert np.isfinite(names["curves"]["Sensitivity"]).all()
    # As the text of the example says.
    kernel = keras.Variable(np.linspace(-1, 1, 6, dtype="float32"))
    layer = types.SimpleNamespace(kernel=kernel, layout=None)
    gradient = kernel.value**3

    def scores(method):
        return method.drop_scores(layer, gradient, 0).numpy()

    of_rigl = scores(rigl_keras.RigL())
    assert (scores(names["Sensitivity"](sharpness=0.0)) == of_rigl).all()
    assert not (scores(names["Sensitivity"]()) == of_rigl).all()


@pytest.mark.skipif(kernels.load() is None, reason="no kernels can be built")
def test_prune_and_serve(run):
    names = run("serve_without_tensorflow")
    assert names["difference"] < 1e-3
    # Python's cache file does not keep the next run from replacing the export.
    (made,) = pathlib.Path("native/__pycache__").iterdir()
    assert foreign_files(pathlib.Path("native")) == []
    made.with_name("other.pyc").write_text("")
    assert foreign_files(pathlib.Path("native")) == ["__pycache__/other.pyc"]
    density = rigl_keras.count(names["model"]).density
    assert density == pytest.approx(names["DENSITY"], abs=0.01)


@pytest.fixture
def eagerly(monkeypatch):
    """Runs steps eagerly, as tracing these models takes longer."""
    compiled = keras.Model.compile

    def compile_eagerly(model, *args, **options):
        return compiled(model, *args, run_eagerly=True, **options)

    monkeypatch.setattr(keras.Model, "compile", compile_eagerly)


@pytest.mark.slow
def test_a_sparse_transformer(run, eagerly):
    names = run("sparse_transformer")
    assert len(names["continued"](names["sparse"], "Py", count=3)) == 5
    dense, sparse = (
        rigl_keras.count(names[name]).nonzeros for name in ("dense", "sparse")
    )
    assert dense < sparse


@pytest.mark.slow
def test_transfer_learning(run, eagerly):
    names = run("transfer_learning")
    assert names["history"]["density"] == [pytest.approx(0.2, abs=0.01)]
    assert len(names["accuracy"]) == 2


def test_all_are_run():
    assert {path.stem for path in scripts()} == SMALL.keys()


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.stem)
def test_each_is_a_notebook(path):
    notebook = jupytext.read(path)
    nbformat.validate(notebook)
    first, *others = notebook.cells
    assert first.cell_type == "markdown"
    assert re.match(r"# [^\n]+\n\n\*\*Description:\*\* ", first.source)
    assert sum(cell.cell_type == "code" for cell in others) >= 4
    assert "savefig" in path.read_text()
