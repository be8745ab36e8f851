"""Damaged weight files raise ValueError, and leave the model as it was."""

import random
import struct
import warnings
import zipfile
import zlib

import h5py
import keras
import numpy as np
import pytest
from keras import layers

import rigl_keras


@pytest.fixture(scope="module")
def model():
    """Returns a trained model with optimizer state and a layer without bias."""
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, activation="relu", name="a")(inputs)
    outputs = layers.Dense(4, use_bias=False, name="b")(hidden)
    model = rigl_keras.sparsify(keras.Model(inputs, outputs), 0.5)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(8, 6)), draw.normal(size=(8, 4))
    model.train_on_batch(x.astype("f"), y.astype("f"))
    return model


def values(model):
    variables = model.variables + model.optimizer.variables
    return [variable.numpy().copy() for variable in variables]


@pytest.fixture
def before(model):
    """Yields the model's state, and restores it after the test."""
    before = values(model)
    yield before
    for variable, value in zip(
        model.variables + model.optimizer.variables, before, strict=True
    ):
        variable.assign(value)


def same(model, before):
    return all(map(np.array_equal, values(model), before))


LOADING = {
    "rigl_keras.load_weights": rigl_keras.load_weights,
    "model.load_weights": lambda model, path: model.load_weights(path),
}
ERRORS = (
    zipfile.BadZipFile("not a zip file"),
    struct.error("unpack requires 4 bytes"),
    RuntimeError("Unable to get link info"),
    OverflowError("int too large to convert"),
    NotImplementedError("compression type 99"),
    zlib.error("invalid block type"),
    EOFError(),
    MemoryError(),
    TypeError("no dtype"),
    AttributeError("no shape"),
    IndexError("out of range"),
    RecursionError("too deep"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
)


@pytest.mark.parametrize("load", LOADING.values(), ids=LOADING)
@pytest.mark.parametrize(
    "error", ERRORS, ids=lambda error: type(error).__name__
)
def test_whatever_a_reader_raises(model, before, load, error, monkeypatch):
    """The error comes after half of the file, whose loading is undone."""

    def half(self, *args, **kwargs):
        self.variables[0].assign(self.variables[0] + 1)
        raise error

    monkeypatch.setattr(keras.Model, "load_weights", half)
    with pytest.raises(ValueError, match="cannot be read: .*unchanged") as got:
        load(model, "x.weights.h5")
    assert got.value.__cause__ is error
    assert same(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ImportError])
def test_what_is_no_damage_is_passed_on(model, before, error, monkeypatch):
    def half(self, *args, **kwargs):
        self.variables[0].assign(self.variables[0] + 1)
        raise error

    monkeypatch.setattr(keras.Model, "load_weights", half)
    with pytest.raises(error):
        rigl_keras.load_weights(model, "x.weights.h5")
    assert same(model, before)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """Returns the bytes of the model's files, by suffix."""
    folder = tmp_path_factory.mktemp("saved")
    model.save(folder / "m.keras")
    model.save_weights(folder / "m.weights.h5")
    return {
        ending: (folder / f"m{ending}").read_bytes()
        for ending in (".keras", ".weights.h5")
    }


@pytest.mark.parametrize("load", LOADING.values(), ids=LOADING)
@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_cut_short(model, before, saved, tmp_path, load, ending, kept):
    path = tmp_path / f"m{ending}"
    whole = saved[ending]
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match="cannot be read"):
        load(model, path)
    assert same(model, before)


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_bytes_at_random(model, before, saved, tmp_path, ending):
    """A damaged file is refused, or holds possible weights.

    No reader notices other values of kernels. Masks are checked.
    """
    draw, path = random.Random(0), tmp_path / f"m{ending}"
    refused = []
    # Most of a file of HDF5 is empty, and most of the rest is structure.
    filled = [at for at, byte in enumerate(saved[ending]) if byte]
    kernel = rigl_keras.masked_layers(model)[0].kernel.numpy().tobytes()
    within = saved[ending].find(kernel)
    assert within >= 0
    starts = [within, *(draw.choice(filled) for _ in range(25))]
    for start in starts:
        content = bytearray(saved[ending])
        damage = draw.choice([b"\xff" * 64, b"\0" * 64, draw.randbytes(8)])
        content[start : start + len(damage)] = damage
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of missing state
                rigl_keras.load_weights(model, path)
        except ValueError:
            refused.append(start)
            assert same(model, before), start
            continue
        for layer in rigl_keras.masked_layers(model):
            mask = layer.mask.numpy()
            assert np.isin(mask, [0, 1]).all(), start
            assert not layer.kernel.numpy()[mask == 0].any(), start
        for variable, value in zip(
            model.variables + model.optimizer.variables, before, strict=True
        ):
            variable.assign(value)
    assert len(refused) > 2
    # A zip file has a checksum, which shows the change.
    assert (within in refused) == (ending == ".keras")


@pytest.mark.parametrize("value", [np.nan, 0.5, 2.0, -1.0, np.inf])
def test_masks_are_zeros_and_ones(model, before, saved, tmp_path, value):
    path = tmp_path / "m.weights.h5"
    path.write_bytes(saved[".weights.h5"])
    with h5py.File(path, "r+") as file:
        # Earlier versions wrote masks in float32.
        mask = file["layers/masked_1/vars/0"][:].astype(np.float32)
        mask[0, 0] = value
        del file["layers/masked_1/vars/0"]
        file["layers/masked_1/vars/0"] = mask
    with pytest.raises(ValueError, match="The model is unchanged"):
        model.load_weights(path)
    assert same(model, before)


def test_masks_are_bytes_of_0_and_1(model, before, saved, tmp_path):
    path = tmp_path / "m.weights.h5"
    content = bytearray(saved[".weights.h5"])
    mask = rigl_keras.masked_layers(model)[1].mask.numpy().tobytes()
    content[content.index(mask)] = 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="The model is unchanged"):
        model.load_weights(path)
    assert same(model, before)


def test_weights_outside_masks_are_not_loaded(model, before, saved, tmp_path):
    path = tmp_path / "m.weights.h5"
    path.write_bytes(saved[".weights.h5"])
    with h5py.File(path, "r+") as file:
        file["layers/masked_1/layer/vars/0"][:] += 1.0
    model.load_weights(path)
    layer = rigl_keras.masked_layers(model)[1]
    kernel, mask = layer.kernel.numpy(), layer.mask.numpy()
    assert not kernel[mask == 0].any()
    assert kernel[mask == 1].all()


@keras.saving.register_keras_serializable("test_damaged_weights")
class Masked(layers.Dense):
    """A layer with the class name of our wrapper, which files use."""


def test_a_mask_is_not_taken_for_a_kernel(tmp_path):
    """The mask is at the path of a dense kernel."""
    inputs = keras.Input((6,))
    dense = keras.Model(inputs, Masked(4, use_bias=False)(inputs))
    model = rigl_keras.sparsify(dense, 0.5)
    path = tmp_path / "m.weights.h5"
    model.save_weights(path)
    kernel = rigl_keras.masked_layers(model)[0].kernel
    want = kernel.numpy()
    with h5py.File(path, "r+") as file:
        del file["layers/masked/layer"]
    with pytest.raises(ValueError, match="zeros and ones alone"):
        model.load_weights(path)
    np.testing.assert_array_equal(kernel.numpy(), want)
