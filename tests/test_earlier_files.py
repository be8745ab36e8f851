"""Files of an earlier version are loaded, resumed and checked."""

import json
import pathlib
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

import rigl_keras
from rigl_keras.experiments.runs import train_command

# Files of version 0.1.0: a model with its optimizer, an export, and a run that
# was killed in its third epoch, with its bindings in config.gin. `finished/` is
# the same run without the kill.
EARLIER = pathlib.Path(__file__).parent / "data" / "earlier"


@pytest.fixture(scope="module")
def recorded():
    with np.load(EARLIER / "outputs.npz") as file:
        return file["inputs"], file["outputs"]


def test_a_model(recorded):
    inputs, outputs = recorded
    model = keras.models.load_model(EARLIER / "model.keras")
    np.testing.assert_allclose(model(inputs), outputs, atol=1e-5)
    layers = rigl_keras.masked_layers(model)
    assert [layer.name for layer in layers] == ["conv", "head"]
    for layer in layers:
        kernel = layer.kernel.numpy()
        assert not kernel[layer.mask.numpy() == 0].any()
        momentum = rigl_keras.optimizer_state.momentum(
            model.optimizer, layer.kernel
        )
        assert np.asarray(momentum).any()
    assert int(model.optimizer.iterations) == 8


def test_an_export(recorded):
    inputs, outputs = recorded
    report = rigl_keras.check_export(EARLIER / "exported")
    assert report.format == "saved_model"
    served = tf.saved_model.load(EARLIER / "exported").signatures[
        "serving_default"
    ]
    (found,) = served(tf.constant(inputs)).values()
    np.testing.assert_allclose(found, outputs, atol=1e-5)


def test_a_run(tmp_path):
    """Masks, weights, momentum and RigL's state are resumed."""
    run = tmp_path / "run"
    shutil.copytree(EARLIER / "run", run)
    bindings = json.loads((EARLIER / "bindings.json").read_text())
    result = train_command.run(
        bindings=bindings, run_dir=run, seed=3, resume=True
    )
    assert result["steps"] == 69
    wanted, found = (
        tf.train.load_checkpoint(str(folder / "epoch-3"))
        for folder in (EARLIER / "finished", run / "checkpoints")
    )
    shapes = wanted.get_variable_to_shape_map()
    assert shapes == found.get_variable_to_shape_map()
    for name in shapes:
        if name != "_CHECKPOINTABLE_OBJECT_GRAPH":
            # The last bits differ on other processors.
            np.testing.assert_allclose(
                found.get_tensor(name),
                wanted.get_tensor(name),
                rtol=1e-4,
                atol=1e-5,
                err_msg=name,
            )
    trajectory = (run / "trajectory.csv").read_text()
    assert trajectory == (EARLIER / "finished/trajectory.csv").read_text()
