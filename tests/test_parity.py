"""Parity with the PyTorch reproduction of the report.

`data/densities_and_flops.json` and the traces were computed by
varun19299/rigl-reproducibility (commit 97443be) on PyTorch 2.13.
"""

import json
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import rigl_keras
from rigl_keras import ORIGINAL, REPORT

DATA = pathlib.Path(__file__).parent / "data"


def keras_name(name):
    """Returns our name of a layer from the name of its PyTorch weight."""
    if name == "conv1.weight":
        return "conv1"
    if name == "fc.weight":
        return "classifier"
    stage, _, block, layer, _ = name.split(".")
    layer = {"convShortcut": "shortcut"}.get(layer, layer)
    return f"{stage}_{block}_{layer}"


def to_keras(weight):
    """Returns a PyTorch weight in Keras order."""
    if weight.ndim == 4:
        return weight.transpose(2, 3, 1, 0)
    return weight.T


@pytest.fixture(scope="module")
def published():
    data = json.loads((DATA / "densities_and_flops.json").read_text())
    return data["wrn-22-2"]


@pytest.fixture(scope="module")
def dense_count():
    return rigl_keras.count(rigl_keras.models.wide_resnet(22, 2))


@pytest.mark.parametrize("density", ["0.05", "0.1", "0.2", "0.5"])
@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("uniform", "random"),
        ("erdos_renyi", "erdos-renyi"),
        ("erdos_renyi_kernel", "erdos-renyi-kernel"),
    ],
)
def test_layer_densities_and_flops(
    published, dense_count, density, ours, theirs
):
    want = published["densities"][density][theirs]
    shapes = {layer.name: layer.shape for layer in dense_count.layers}
    for conventions, tolerance in ((REPORT, 1e-9), (ORIGINAL, 1e-3)):
        got = rigl_keras.distributions.layer_densities(
            shapes, float(density), ours, conventions=conventions
        )
        wanted = {keras_name(n): d for n, d in want["layer_density"].items()}
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert got[name] == pytest.approx(value, rel=tolerance)
        if conventions is REPORT:
            flops = sum(
                layer.flops_at(got[layer.name]) for layer in dense_count.layers
            )
            assert flops == pytest.approx(want["inference_flops"], rel=1e-9)
            assert flops / dense_count.dense_inference_flops == pytest.approx(
                want["inference_ratio"], rel=1e-9
            )


def test_dense_model(published, dense_count):
    assert dense_count.parameters == published["total_params"] == 1_079_642
    assert dense_count.inference_flops == published["dense_flops"]
    assert dense_count.inference_flops == 315_460_224


@pytest.mark.parametrize(
    "ours, density, epsilon",
    [
        (REPORT, 0.05, 17.342406),
        (ORIGINAL, 0.05, 17.349126),
        (REPORT, 0.1, 35.931550),
        (ORIGINAL, 0.1, 35.938151),
        (REPORT, 0.2, 75.600969),
        (ORIGINAL, 0.2, 75.607675),
    ],
)
def test_erk_scale_of_both_references(dense_count, ours, density, epsilon):
    shapes = {layer.name: layer.shape for layer in dense_count.layers}
    got = rigl_keras.distributions.layer_densities(
        shapes, density, "erk", conventions=ours
    )
    shape = shapes["block3_2_conv2"]
    assert got["block3_2_conv2"] == pytest.approx(
        epsilon * sum(shape) / np.prod(shape), rel=1e-7
    )


class Recorder(keras.callbacks.Callback):
    """Keeps every mask and the cross-entropy of every step."""

    def __init__(self):
        super().__init__()
        self.losses, self.masks = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(logs["cross_entropy"])
        self.masks.append(
            {
                layer.name: layer.mask.numpy() > 0
                for layer in rigl_keras.masked_layers(self.model)
            }
        )


def replay(trace, method):
    """Trains our model on a trace; returns its record and the model."""
    meta = json.loads(str(trace["meta"]))
    model = rigl_keras.models.wide_resnet(
        meta["depth"],
        meta["widen"],
        dropout=0.0,
        weight_decay=meta["weight_decay"],
    )
    distribution = {
        "erdos-renyi": "erdos_renyi",
        "erdos-renyi-kernel": "erdos_renyi_kernel",
    }[meta["sparse_init"]]
    model = rigl_keras.sparsify(
        model, meta["density"], distribution=distribution, conventions=REPORT
    )
    for key in trace.files:
        kind, _, name = key.partition("/")
        if kind == "init" and trace[key].ndim > 1:
            layer = model.get_layer(keras_name(name))
            layer.kernel.assign(to_keras(trace[key]))
        elif kind == "mask0":
            layer = model.get_layer(keras_name(name))
            layer.mask.assign(to_keras(trace[key]).astype(np.float32))
    bias = model.get_layer("classifier").layer.bias
    bias.assign(trace["init/fc.bias"])
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        keras.optimizers.SGD(
            meta["lr"], momentum=meta["momentum"], nesterov=meta["nesterov"]
        ),
        cross_entropy,
        metrics=[
            keras.metrics.SparseCategoricalCrossentropy(
                from_logits=True, name="cross_entropy"
            )
        ],
    )
    steps = meta["steps"]
    data = tf.data.Dataset.from_tensor_slices((trace["x"], trace["y"]))
    record = Recorder()
    model.fit(
        data,
        steps_per_epoch=1,  # an epoch a step, so that each is logged alone
        epochs=steps,
        callbacks=[*method(meta), record],
        shuffle=False,
        verbose=0,
    )
    return meta, record, model


@pytest.fixture(params=["float64", "float32"])
def floatx(request):
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def rigl(meta):
    return [
        rigl_keras.RigL(
            frequency=meta["interval"],
            drop_fraction=meta["prune_rate"],
            end_step=meta["end"],
            conventions=REPORT,
        )
    ]


@pytest.mark.parametrize(
    "name, method, drift",
    [("static", lambda meta: [], 0.2), ("rigl_erk", rigl, 1e-4)],
)
def test_trace(name, method, drift, floatx):
    """The library's own model, callback and fit repeat the reproduction.

    A ReLU input within rounding of zero makes two float32 runs drift apart at
    this learning rate; theirs is float32 too. In float64 ours meets no such
    input that theirs does not in `rigl_erk`: every mask entry agrees, and the
    final weights do to `drift`. In float32 ours does at the first step, so
    that only losses are compared.
    """
    with np.load(DATA / f"trace_{name}.npz") as trace:
        meta, record, model = replay(trace, method)
        assert len(record.losses) == meta["steps"]
        before_update = meta["interval"] - 1
        np.testing.assert_allclose(
            record.losses[:before_update],
            meta["losses"][:before_update],
            atol=1e-5,
        )
        np.testing.assert_allclose(record.losses, meta["losses"], atol=1e-2)
        if floatx == "float32":
            return
        for step in meta["update_steps"]:
            for key in trace.files:
                kind, _, weight = key.partition("/")
                if kind == f"mask@{step}":
                    np.testing.assert_array_equal(
                        record.masks[step][keras_name(weight)],
                        to_keras(trace[key]),
                    )
        for key in trace.files:
            kind, _, weight = key.partition("/")
            if kind == "final" and trace[key].ndim > 1:
                ours = model.get_layer(keras_name(weight)).kernel.numpy()
                theirs = to_keras(trace[key])
                assert np.linalg.norm(ours - theirs) < drift * np.linalg.norm(
                    theirs
                )
