"""Loading a file from someone else does not run code from it."""

import ast
import io
import pathlib
import zipfile

import h5py
import keras
import numpy as np
import pytest
from support.small_models import examples, small_model

import rigl_keras

PACKAGE = pathlib.Path(rigl_keras.__file__).parent


@pytest.fixture
def model():
    return rigl_keras.sparsify(small_model(), 0.3)


LOAD = """
import sys
import keras, numpy as np
import rigl_keras
model = keras.models.load_model(sys.argv[1])
for layer in rigl_keras.masked_layers(model):
    print(layer.name, int(layer.mask.numpy().sum()))
x = np.ones([2, 8, 8, 3], np.float32)
print(repr(float(np.sum(model.predict(x, verbose=0), dtype=np.float64))))
"""


def test_a_masked_model_loads_in_safe_mode(model, tmp_path, fresh):
    """It loads in a process that has only imported this package."""
    path = tmp_path / "model.keras"
    model.save(path)
    done = fresh("-c", LOAD, path)
    assert done.returncode == 0, done.stderr
    *layers, output = done.stdout.splitlines()
    assert layers == [
        f"{layer.name} {int(layer.mask.numpy().sum())}"
        for layer in rigl_keras.masked_layers(model)
    ]
    x = np.ones([2, 8, 8, 3], np.float32)
    want = np.sum(model.predict(x, verbose=0), dtype=np.float64)
    assert float(output) == pytest.approx(float(want), rel=1e-5)


FORBIDDEN_NAMES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def dangers(source):
    """Yields the calls of a source that could run code from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            yield from FORBIDDEN_NAMES & {name.split(".")[0] for name in names}
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", None)
            yield from FORBIDDEN_CALLS & {name}
            name = getattr(node.func, "attr", None)
            yield from {"enable_unsafe_deserialization"} & {name}
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if keyword.arg == "allow_pickle" and value is not False:
                    yield "allow_pickle"
                if keyword.arg == "safe_mode" and value is not True:
                    yield "safe_mode"


@pytest.mark.parametrize(
    "source, found",
    [
        ("import pickle", ["pickle"]),
        ("from joblib import load", ["joblib"]),
        ("eval('1')", ["eval"]),
        ("np.load(f, allow_pickle=True)", ["allow_pickle"]),
        ("keras.models.load_model(f, safe_mode=safe)", ["safe_mode"]),
        ("model.compile(); np.load(f); re.compile('a')", []),
    ],
)
def test_dangers_are_seen(source, found):
    assert list(dangers(source)) == found


def test_no_module_runs_what_it_reads():
    paths = list(PACKAGE.rglob("*.py"))
    assert len(paths) > 20
    for path in paths:
        assert not list(dangers(path.read_text())), path


def with_other_mask(content, mask, value):
    """Returns the bytes of an HDF5 file after a change of a mask's first value.

    The mask then has floats, as in earlier versions.
    """
    changed = io.BytesIO(content)
    with h5py.File(changed, "r+") as file:
        names = []
        file.visit(names.append)
        (name,) = (
            name
            for name in names
            if isinstance(file[name], h5py.Dataset)
            and file[name].dtype == bool
            and np.array_equal(file[name], mask)
        )
        del file[name]
        file[name] = mask.astype(np.float32)
        file[name][(0,) * mask.ndim] = value
    return changed.getvalue()


# After the error, Keras tries another way and warns that it failed.
@pytest.mark.filterwarnings("ignore:Skipping nested container")
@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, np.nan, np.inf])
def test_a_mask_is_zeros_and_ones(model, tmp_path, value):
    mask = rigl_keras.masked_layers(model)[1].mask.numpy()
    model.save(tmp_path / "ours.keras")
    with (
        zipfile.ZipFile(tmp_path / "ours.keras") as ours,
        zipfile.ZipFile(tmp_path / "model.keras", "w") as theirs,
    ):
        for name in ours.namelist():
            content = ours.read(name)
            if name.endswith(".h5"):
                content = with_other_mask(content, mask, value)
            theirs.writestr(name, content)
    with pytest.raises(ValueError, match="zeros and ones"):
        keras.models.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("value", [1.0, np.nan, np.inf])
def test_weights_outside_a_mask_are_not_loaded(model, tmp_path, value):
    layers = list(rigl_keras.masked_layers(model))
    wanted = model.predict(examples()[0], verbose=0)
    for layer in layers:
        kernel, mask = layer.kernel.numpy(), layer.mask.numpy()
        layer.kernel.assign(np.where(mask > 0, kernel, value))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for layer, before in zip(
        rigl_keras.masked_layers(loaded), layers, strict=True
    ):
        mask = layer.mask.numpy()
        assert (mask == before.mask.numpy()).all()
        assert not layer.kernel.numpy()[mask == 0].any()
        assert layer.kernel.numpy()[mask == 1].any()
    got = loaded.predict(examples()[0], verbose=0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(model, tmp_path, kept):
    path = tmp_path / "model.keras"
    model.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises((ValueError, OSError), match="."):
        keras.models.load_model(path)
