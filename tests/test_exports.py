"""bin/export, and exports at the end of a run."""

import functools
import json
import os
import pathlib
import shutil

import keras
import numpy as np
import pytest
from support.kinds import KINDS
from support.small_models import small_model

import gin
import rigl_keras
from rigl_keras.experiments.runs import train_command
from rigl_keras.experiments.runs.exports import (
    Exports,
    load_model,
    read_inputs,
)
from rigl_keras.exporting import measurement

pytestmark = pytest.mark.usefixtures("blank_figures")

SMALL = [
    "train.epochs = 1",
    "train.diagnostics = False",
    "train.method = None",
    "Exports.measure = False",
]


def run(run_dir, *bindings):
    return train_command.run(bindings=[*SMALL, *bindings], run_dir=run_dir)


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the directory of a finished run that has exported."""
    path = tmp_path_factory.mktemp("runs") / "run"
    run(path, 'Exports.formats = ["saved_model", "keras"]')
    return path


@pytest.fixture
def bin_export(fresh):
    return functools.partial(
        fresh, "-m", "rigl_keras.experiments.runs.export_command"
    )


def test_a_run_exports_when_asked(finished):
    exported = finished / "exported"
    assert {p.name for p in exported.iterdir()} == {"saved_model", "keras"}
    report = rigl_keras.check_export(exported / "saved_model")
    result = json.loads((finished / "result.json").read_text())
    assert report.density == pytest.approx(result["density"])
    assert report.nonzeros == result["nonzeros"]
    assert report.inference_flops == result["inference_flops"]
    # The export is the saved model.
    x = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    plain = keras.models.load_model(exported / "keras" / "model.keras")
    np.testing.assert_allclose(
        plain(x), load_model(finished)(x), rtol=1e-5, atol=1e-6
    )


def test_a_finished_run_exports_what_is_missing(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(path / "exported" / "keras")
    before = (path / "exported" / "saved_model" / "export.json").stat()
    run(path, 'Exports.formats = ["saved_model", "keras"]')
    rigl_keras.check_export(path / "exported" / "keras")
    after = (path / "exported" / "saved_model" / "export.json").stat()
    assert after.st_mtime_ns == before.st_mtime_ns


def test_a_dense_run_is_refused_before_it_trains(tmp_path):
    for binding in ("train.density = None", "train.small_dense = True"):
        with pytest.raises(ValueError, match="this run is dense"):
            run(tmp_path / "run", binding, 'Exports.formats = ["saved_model"]')
    with pytest.raises(ValueError, match="formats must be one of"):
        run(tmp_path / "run", 'Exports.formats = ["tensorrt"]')
    assert not (tmp_path / "run").exists()


# Runs `bin/export`, with measurements of a tenth of the usual seconds.
EXPORT = """
from rigl_keras.exporting import measurement
from rigl_keras.experiments.runs import export_command
measurement._SECONDS /= 10
export_command.main()
"""


@pytest.mark.slow
def test_the_command(finished, tmp_path, fresh, bin_export):
    done = fresh(
        "-c",
        EXPORT,
        finished,
        "--output=out",
        "--formats=saved_model,tflite",
        "--quantization=int8",  # calibrated on the run's own data
        "--fold_batch_norm",
        "--remove_dead_units",
        "--batch_sizes=2,32",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "saved_model",
        "tflite_int8",
    }
    for said in ("latency at batch 32", "batch norms folded", "tflite, int8"):
        assert said in done.stdout
    # No messages of TensorFlow between the tables.
    assert "Sharding" not in done.stderr and "Warning" not in done.stderr
    report = rigl_keras.check_export(tmp_path / "out" / "saved_model")
    assert report.folded and list(report.dense_latency) == [2, 32]

    done = bin_export("--check=out/saved_model", cwd=tmp_path)
    assert done.returncode == 0 and "All files are as they" in done.stdout
    (tmp_path / "out" / "saved_model" / "saved_model.pb").write_bytes(b"")
    done = bin_export("--check=out/saved_model", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [s for s in done.stderr.splitlines() if s.startswith("export:")]
    assert "saved_model.pb has changed" in line


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "Pass one run directory or .keras file"),
        (["nowhere"], "There is no 'nowhere'"),
        (["RUN", "--formats=pickle"], "formats must be one of"),
        (["RUN", "--quantization=float16"], "needs the format 'tflite'"),
        (["RUN", "--formats="], "Pass at least one format"),
        (["RUN", "--batch_sizes=1,x"], "--batch_sizes takes whole numbers"),
        (["RUN", "--batch_sizes=0"], "batch_sizes must be an int of at least"),
        (["RUN", "--batch_sizes="], "batch_sizes must be a list of sizes"),
        (
            ["RUN", "--batch_sizes=2", "--nomeasure"],
            "--nomeasure turns measuring off. Pass one of them",
        ),
        (["RUN", "--check=out"], "--check exports nothing"),
        (["RUN"], "exported/saved_model' exists. Pass overwrite=True"),
    ],
)
def test_nonsense(arguments, said, finished, tmp_path, bin_export):
    arguments = [finished if a == "RUN" else a for a in arguments]
    done = bin_export(*arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_read(finished, tmp_path):
    whole = (finished / "model.keras").read_bytes()
    for name, content, said in (
        ("cut.keras", whole[: len(whole) // 2], "is cut short"),
        ("text.keras", b"Not a model", "not a .keras file"),
        ("flipped.keras", flipped(whole), "cannot be loaded"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=said):
            load_model(tmp_path / name)
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    with pytest.raises(ValueError, match="is not the directory of a run"):
        load_model(unfinished)
    (unfinished / "config.gin").write_text("")
    with pytest.raises(ValueError, match="is not finished"):
        load_model(unfinished)
    # A dense model has no zeros to leave out.
    small_model().save(tmp_path / "dense.keras")
    with pytest.raises(ValueError, match="no masked layer"):
        Exports(formats=["saved_model"]).write(tmp_path / "dense.keras")
    assert not (tmp_path / "exported").exists()


def flipped(content):
    """Returns an archive with damaged weights."""
    content = bytearray(content)
    at = content.index(b"model.weights.h5") + 500
    content[at : at + 200] = bytes(200)
    return bytes(content)


def test_one_format_fails_and_the_others_do_not(finished, tmp_path):
    """int8 has no examples for its calibration if the source is a file."""
    file = shutil.copy(finished / "model.keras", tmp_path)
    (tmp_path / "exported" / "keras").mkdir(parents=True)
    exports = Exports(formats=["keras", "saved_model"], measure=False)
    with pytest.raises(ValueError, match="keras' exists"):
        exports.write(file)
    rigl_keras.check_export(tmp_path / "exported" / "saved_model")


def test_inputs_from_files(tmp_path):
    model = rigl_keras.sparsify(KINDS["several inputs and outputs"](), 0.5)
    one, two = np.ones((2, 5)), np.ones((2, 4))
    np.savez(tmp_path / "both.npz", one=one, two=two)
    read = read_inputs(tmp_path / "both.npz", model)
    np.testing.assert_array_equal(read["one"], one)
    np.savez(tmp_path / "one.npz", one=one)
    np.save(tmp_path / "array.npy", one)
    (tmp_path / "text.npz").write_text("Not an archive")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name, said in (
        ("one.npz", "an array for each input of the model: one, two"),
        ("array.npy", "an array for each input"),
        ("text.npz", "cannot be read"),
        ("empty.npy", "cannot be read"),
        ("nowhere.npy", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=said):
            read_inputs(tmp_path / name, model)
    single = rigl_keras.sparsify(small_model(), 0.5)
    x = np.ones((2, 8, 8, 3))
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", anything=x)
    for name in ("x.npy", "x.npz"):
        np.testing.assert_array_equal(read_inputs(tmp_path / name, single), x)


def test_batch_sizes_are_those_that_are_measured(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(measurement, "_SECONDS", 0.0)
    monkeypatch.setattr(measurement, "_TURN", 0.0)
    exports = Exports(formats=["keras"], batch_sizes=[3, 2, 3])
    (report,) = exports.write(finished, tmp_path)
    assert list(report.latency) == [3, 2]


def test_what_exports_refuses():
    for options, said in (
        ({"formats": "saved_model"}, "is a list"),
        ({"formats": [None]}, "formats must be one of"),
        ({"fold_batch_norm": "no"}, "fold_batch_norm must be True or False"),
        ({"batch_sizes": 16}, "batch_sizes must be a list of sizes"),
        ({"batch_sizes": [1, 2.5]}, "batch_sizes must be an int"),
        ({"quantization": "int8"}, "needs the format 'tflite'"),
        ({"formats": ["tflite"], "quantization": "int4"}, "quantization must"),
    ):
        with pytest.raises(ValueError, match=said):
            Exports(**options)
    assert Exports().write("nowhere") == []


def test_the_script_is_there():
    script = pathlib.Path(rigl_keras.__file__).parents[1] / "bin" / "export"
    assert os.access(script, os.X_OK)
    assert "experiments.runs.export_command" in script.read_text()
