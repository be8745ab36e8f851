"""Native exports, which need no TensorFlow."""

import importlib.util
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from support.small_models import small_model

import rigl_keras
from rigl_keras import kernels
from rigl_keras.exporting import measurement, networks
from rigl_keras.exporting.formats import FORMATS
from rigl_keras.kernels import library
from rigl_keras.serving.network import Cell, Operation
from rigl_keras.serving.network_file import from_bytes
from rigl_keras.serving.runtime import Network

FILES = {
    *("network.rigl", "rigl_keras_network.so", "rigl_network.h"),
    *("network.py", "serve.c", "README.txt", "export.json"),
}


@pytest.fixture(scope="module", autouse=True)
def built():
    try:
        return library.build_network()
    except kernels.BuildError as error:
        pytest.skip(f"no library: {error}")


@pytest.fixture(scope="module")
def export(tmp_path_factory, built):
    """Returns a model, the report of its export and the folder."""
    keras.utils.set_random_seed(0)
    model = rigl_keras.sparsify(small_model(), 0.3, product="dense")
    folder = tmp_path_factory.mktemp("native") / "exported"
    report = rigl_keras.export(model, folder, format="native", measure=False)
    return model, report, folder


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    return draw.standard_normal((5, 8, 8, 3)).astype(np.float32)


def test_what_is_in_the_folder(export):
    model, report, folder = export
    assert {path.name for path in folder.iterdir()} == FILES
    assert report.max_difference < 1e-5 and report.notes == ()
    assert report == rigl_keras.check_export(folder)
    network = from_bytes((folder / "network.rigl").read_bytes())
    assert [output.name for output in network.outputs] == ["output_0"]
    note = (folder / "README.txt").read_text()
    (shown,) = network.inputs()
    assert f"{shown.name!r} float32 [batch, 8, 8, 3]" in note
    assert "Its outputs: 'output_0'." in note


def test_two_lines_load_it(export, images):
    """The lines in the folder's note work, with the files in the folder."""
    model, _, folder = export
    lines = [
        line.strip()
        for line in (folder / "README.txt").read_text().splitlines()
        if line.startswith("    ") and "cc " not in line and "./" not in line
    ]
    assert len(lines) == 2
    names = {"images": images}
    here = importlib.util.spec_from_file_location(
        "network", folder / "network.py"
    )
    module = importlib.util.module_from_spec(here)
    sys.modules["network"] = module
    try:
        here.loader.exec_module(module)
        code = "\n".join(lines).replace(
            '"network.rigl"', repr(str(folder / "network.rigl"))
        )
        exec(code, names)
    finally:
        del sys.modules["network"]
    np.testing.assert_allclose(
        names["outputs"]["output_0"], model(images), rtol=1e-4, atol=1e-5
    )


ALONE = """
import sys
sys.modules["tensorflow"] = sys.modules["rigl_keras"] = None
import numpy as np
from network import Network
x = np.load(sys.argv[1])
np.save(sys.argv[2], Network("network.rigl", threads=2)(x)["output_0"])
"""


def test_without_tensorflow(export, images, tmp_path):
    model, _, folder = export
    np.save(tmp_path / "x.npy", images)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "x.npy", tmp_path / "y.npy"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "y.npy")
    np.testing.assert_allclose(got, model(images), rtol=1e-4, atol=1e-5)


def test_the_example_in_c(export, tmp_path, images):
    """The two commands in the note work."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    model, _, folder = export
    folder = shutil.copytree(folder, tmp_path / "copy")
    lines = (folder / "README.txt").read_text().splitlines()
    build = next(line.strip() for line in lines if line.startswith("    cc "))
    done = subprocess.run(
        build.replace("cc ", f"{compiler} -Wall -Werror ", 1),
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rigl_keras.check_export(folder)  # nothing was added to it
    images.tofile(folder / "x.bin")
    done = subprocess.run(
        ["../serve", "network.rigl", "5", "x.bin"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "output_0" in done.stdout


def recurrent(x):
    x = layers.Bidirectional(layers.LSTM(10, return_sequences=True))(x)
    return layers.GRU(9, reset_after=False)(layers.GRU(9, **ALL)(x))


ALL = {"return_sequences": True}


def test_recurrent_layers(tmp_path):
    """Sequences of any length, with masks of input and recurrent kernels."""
    inputs = keras.Input((None, 4))
    outputs = layers.Dense(3, name="head")(recurrent(inputs))
    model = rigl_keras.sparsify(keras.Model(inputs, outputs), 0.3)
    rigl_keras.export(model, tmp_path / "e", format="native", measure=False)
    network = from_bytes((tmp_path / "e" / "network.rigl").read_bytes())
    loops = [n for n in network.nodes if n.operation == Operation.RECURRENT]
    assert [n.cell for n in loops].count(Cell.LSTM) == 2
    assert {n.cell for n in loops} == set(Cell)
    assert all(0 < np.mean(n.kernel == 0) < 1 for n in loops)
    draw = np.random.default_rng(0)
    with Network(
        tmp_path / "e" / "network.rigl",
        library=library.build_network(),
        threads=2,
    ) as run:
        for shape in ((1, 7, 4), (11, 1, 4), (30, 5, 4)):
            x = draw.standard_normal(shape).astype(np.float32)
            got = run(x)["output_0"]
            np.testing.assert_allclose(got, model(x), rtol=1e-4, atol=1e-5)


REFUSED = {
    "GRU 'loop', because its activation is not tanh": (
        lambda x: layers.GRU(5, activation="relu", name="loop")(x)
    ),
    "LSTM 'loop', because its recurrent activation is not sigmoid": (
        lambda x: layers.LSTM(
            5, recurrent_activation="hard_sigmoid", name="loop"
        )(x)
    ),
    "LSTM 'loop', because it keeps or returns its states": (
        lambda x: layers.LSTM(5, return_state=True, name="loop")(x)[2]
    ),
    "LSTM 'loop', because it reads a mask of steps": (
        lambda x: layers.LSTM(5, name="loop")(layers.Masking()(x))
    ),
    "SimpleRNN 'loop', because networks have LSTM and GRU only": (
        lambda x: layers.SimpleRNN(5, name="loop")(x)
    ),
    "PartitionedCall .1. in loop.*: it begins with a state that is not zero": (
        lambda x: layers.GRU(4, name="loop")(x, initial_state=x[:, 0])
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_needs_tensorflow_is_refused(text, tmp_path):
    inputs = keras.Input((6, 4))
    outputs = layers.Dense(3, name="head")(REFUSED[text](inputs))
    model = rigl_keras.sparsify(keras.Model(inputs, outputs), 0.5)
    with pytest.raises(
        ValueError, match=f"as native: these .* need TensorFlow: .*{text}"
    ) as raised:
        rigl_keras.export(model, tmp_path / "e", format="native")
    assert not list(tmp_path.iterdir())
    # The format that the error names takes it.
    (way_out,) = re.findall(r"Pass format='(\w+)'", str(raised.value))
    rigl_keras.export(model, tmp_path / "e", format=way_out, measure=False)


def test_what_is_small_needs_no_tensorflow(tmp_path):
    """The error names only the layer that no network supports."""
    inputs = keras.Input((6,))
    x = layers.Dense(5, activation="softsign", name="hidden")(inputs)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    model = rigl_keras.sparsify(model, 0.5)
    with pytest.raises(
        ValueError,
        match=r"need TensorFlow: Softsign \(1\) in hidden.*: no network comp"
        r"utes it\. Pass",
    ):
        rigl_keras.export(model, tmp_path / "e", format="native")


def test_a_fixed_batch_size_is_the_one_that_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "_SECONDS", 0.02)
    monkeypatch.setattr(measurement, "_SECONDS", 0.0)
    monkeypatch.setattr(measurement, "_TURN", 0.0)
    inputs = keras.Input(batch_shape=(4, 6))
    model = keras.Model(inputs, layers.Dense(5, name="head")(inputs))
    model = rigl_keras.sparsify(model, 0.5)
    report = rigl_keras.export(model, tmp_path / "e", format="native")
    assert list(report.latency) == list(report.dense_latency) == [4]


def test_no_library(monkeypatch, tmp_path):
    def fail():
        raise kernels.BuildError("no C++ compiler was found")

    monkeypatch.setattr(library, "build_network", fail)
    model = rigl_keras.sparsify(small_model(), 0.3)
    with pytest.raises(
        ValueError, match="format='native' needs .*no C.. compiler was found"
    ):
        rigl_keras.export(model, tmp_path / "e", format="native")
    assert not list(tmp_path.iterdir())


def test_it_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "_SECONDS", 0.02)
    monkeypatch.setattr(measurement, "_SECONDS", 0.0)
    monkeypatch.setattr(measurement, "_TURN", 0.0)
    model = rigl_keras.sparsify(small_model(), 0.3)
    report = rigl_keras.export(
        model, tmp_path / "e", format="native", batch_sizes=(1, 3)
    )
    assert list(report.latency) == list(report.dense_latency) == [1, 3]
    assert min(report.latency.values()) > 0
    data = (tmp_path / "e" / "network.rigl").read_bytes()
    assert " costs " in from_bytes(data).hints


@pytest.mark.parametrize(
    "sizes", [[], 3, "12", [0], [1, -2], [1.5], [True], None, {1: 2}, ["1"]]
)
def test_batch_sizes_that_are_none(sizes, tmp_path):
    model = rigl_keras.sparsify(small_model(), 0.3)
    with pytest.raises(ValueError, match="^batch_sizes must be"):
        rigl_keras.export(
            model, tmp_path / "e", format="native", batch_sizes=sizes
        )
    assert not list(tmp_path.iterdir())


def test_it_is_a_format():
    assert FORMATS["native"].folds
