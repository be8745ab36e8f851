"""A SavedModel with sparse kernels that plain TensorFlow loads."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import compiled, examples, small_model
from keras import layers

import rigl_keras
from rigl_keras.export import export

LOAD = """
import sys, numpy as np, tensorflow as tf
serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
inputs = dict(np.load(sys.argv[2]))
got = serve(**{k: tf.constant(v) for k, v in inputs.items()})
np.savez(sys.argv[3], **{k: v.numpy() for k, v in got.items()})
print("rigl_keras" in sys.modules, "keras" in sys.modules)
"""


def two_headed():
    a, b = keras.Input((6,), name="a"), keras.Input((4,), name="b")
    x = layers.Concatenate()([layers.Dense(8, name="left")(a), b])
    heads = layers.Dense(3, name="one")(x), layers.Dense(2, name="two")(x)
    return keras.Model({"a": a, "b": b}, heads)


def nested():
    inner = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.Flatten()]
    )
    shared = layers.Dense(144, name="shared")
    inputs = keras.Input((8, 8, 3), name="image")
    return keras.Model(inputs, shared(shared(inner(inputs))))


@pytest.mark.parametrize(
    "build", [small_model, two_headed, nested, rigl_keras.models.lenet5]
)
def test_serves_without_this_package(build, tmp_path):
    model = rigl_keras.sparsify(build(), 0.2)
    report = export(model, tmp_path / "exported")
    assert report.max_difference < 1e-5
    draw = np.random.default_rng(3)
    inputs = {
        t.name: draw.standard_normal((5, *t.shape[1:])).astype(np.float32)
        for t in model.inputs
    }
    np.savez(tmp_path / "in.npz", **inputs)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LOAD,
            tmp_path / "exported",
            tmp_path / "in.npz",
            tmp_path / "out.npz",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False")
    single = len(inputs) == 1
    wanted = model(next(iter(inputs.values())) if single else inputs)
    with np.load(tmp_path / "out.npz") as got:
        for i, want in enumerate(tf.nest.flatten(wanted)):
            np.testing.assert_allclose(got[f"output_{i}"], want, atol=1e-4)


def test_size(tmp_path):
    model = rigl_keras.sparsify(
        rigl_keras.models.mlp(hidden=(300, 100)), 0.1, distribution="er"
    )
    report = export(model, tmp_path / "exported")
    cost = rigl_keras.count(model)
    # Values, a bit for each masked weight, and TensorFlow's index.
    assert cost.bits / 8 < report.variable_bytes < cost.bits / 8 + 5_000
    assert report.dense_bytes == 4 * cost.parameters
    assert report.density == pytest.approx(0.1, abs=1e-4)
    assert "x dense" in str(report)


def test_refuses(tmp_path):
    model = compiled(rigl_keras.sparsify(small_model(), 0.2))
    model.fit(*examples(), verbose=0)
    with pytest.raises(ValueError, match="format must be"):
        export(model, tmp_path / "a", format="onnx")
    with pytest.raises(ValueError, match="no masked layer"):
        export(small_model(), tmp_path / "a")
    export(model, tmp_path / "a")
    with pytest.raises(ValueError, match="overwrite=True"):
        export(model, tmp_path / "a")
    export(model, tmp_path / "a", overwrite=True)

    head = model.get_layer("head")
    kernel = head.kernel.numpy()
    head.kernel.assign(np.ones_like(kernel))
    with pytest.raises(ValueError, match="'head' holds .* outside its mask"):
        export(model, tmp_path / "b")
    head.kernel.assign(np.full_like(kernel, np.nan) * head.mask.numpy())
    with pytest.raises(ValueError, match="NaN"):
        export(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_model_that_disagrees_is_not_written(tmp_path, monkeypatch):
    model = rigl_keras.sparsify(small_model(), 0.2)
    monkeypatch.setattr(
        np, "packbits", lambda bits, real=np.packbits: real(bits)[::-1]
    )
    with pytest.raises(ValueError, match="disagrees with the model"):
        export(model, tmp_path / "exported")
    assert not list(tmp_path.iterdir())
