"""Parity with the PyTorch reproduction of the report.

`data/densities_and_flops.json` and the traces were computed by
varun19299/rigl-reproducibility (commit 97443be) on PyTorch 2.13.
"""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import rigl_keras
from rigl_keras.conventions import ORIGINAL, REPORT
from rigl_keras.kernels import fast_calls, lane_calls, operations

DATA = pathlib.Path(__file__).parent / "data"


def keras_name(name):
    """Returns our name of a layer, from that of its PyTorch weight."""
    if name in ("conv1.weight", "conv1.0.weight"):
        return "conv1"
    if name == "fc.weight":
        return "classifier"
    parts = name.split(".")
    if parts[0].startswith("block"):  # block2.layer.0.convShortcut.weight
        stage, _, block, layer, _ = parts
        layer = {"convShortcut": "shortcut"}.get(layer, layer)
        return f"{stage}_{block}_{layer}"
    # conv3_x.0.residual_function.3.weight: parts 0, 3 and 6 of a block are
    # convolutions.
    stage, block, path, place, _ = parts
    layer = "shortcut" if path == "shortcut" else f"conv{int(place) // 3 + 1}"
    return f"{stage.removesuffix('_x')}_{block}_{layer}"


def to_keras(weight):
    """Returns a PyTorch weight in Keras order."""
    if weight.ndim == 4:
        return weight.transpose(2, 3, 1, 0)
    return weight.T


PUBLISHED = json.loads((DATA / "densities_and_flops.json").read_text())
MODELS = {
    "wrn-22-2": lambda: rigl_keras.models.wide_resnet(22, 2),
    "resnet50-cifar100": lambda: rigl_keras.models.resnet50(100),
}
CASES = [
    (model, density)
    for model in MODELS
    for density in PUBLISHED[model]["densities"]
]


@pytest.fixture(scope="module")
def dense_counts():
    return {name: rigl_keras.count(make()) for name, make in MODELS.items()}


@pytest.mark.parametrize("model, density", CASES)
@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("uniform", "random"),
        ("erdos_renyi", "erdos-renyi"),
        ("erdos_renyi_kernel", "erdos-renyi-kernel"),
    ],
)
def test_layer_densities_and_flops(dense_counts, model, density, ours, theirs):
    want = PUBLISHED[model]["densities"][density][theirs]
    dense = dense_counts[model]
    shapes = {layer.name: layer.shape for layer in dense.layers}
    wanted = {keras_name(n): d for n, d in want["layer_density"].items()}
    for conventions, tolerance in ((REPORT, 1e-9), (ORIGINAL, 1e-3)):
        got = rigl_keras.distributions.layer_densities(
            shapes, float(density), ours, conventions=conventions
        )
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert got[name] == pytest.approx(value, rel=tolerance)
    got = rigl_keras.distributions.layer_densities(
        shapes, float(density), ours, conventions=REPORT
    )
    flops = sum(layer.flops_at(got[layer.name]) for layer in dense.layers)
    dense_flops = dense.inference_flops
    assert flops == pytest.approx(want["inference_flops"], rel=1e-6)
    assert flops / dense_flops == pytest.approx(
        want["inference_ratio"], rel=1e-6
    )
    for method, ratio in want["train_ratio"].items():
        cost = rigl_keras.training_flops(
            method.removesuffix("_at_init"),
            sparse_flops=flops,
            dense_flops=dense_flops,
            frequency=100,
        )
        assert cost / (3 * dense_flops) == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize("model, density", CASES)
def test_pruning_flops(dense_counts, model, density):
    """They follow the closed form with the reproduction's schedule."""
    want = PUBLISHED[model]["densities"][density]["pruning"]
    schedule = want["schedule"]
    ramp = rigl_keras.SparsityRamp(
        final_density=float(density),
        begin_step=schedule["T_start"],
        end_step=schedule["T_max"],
    )
    steps = np.arange(schedule["total_steps"])
    mean_density = float(np.mean(1 - ramp.sparsity(steps)))
    assert mean_density == pytest.approx(want["inference_ratio"], rel=1e-6)
    dense_flops = dense_counts[model].inference_flops
    cost = rigl_keras.training_flops(
        "MagnitudePruning",
        sparse_flops=mean_density * dense_flops,
        dense_flops=dense_flops,
    )
    assert cost / (3 * dense_flops) == pytest.approx(
        want["train_ratio"], rel=1e-6
    )


@pytest.mark.parametrize(
    "model, parameters, flops",
    [
        ("wrn-22-2", 1_079_642, 315_460_224),
        ("resnet50-cifar100", 23_705_252, 2_596_030_464),
    ],
)
def test_dense_model(dense_counts, model, parameters, flops):
    assert dense_counts[model].parameters == parameters
    assert PUBLISHED[model]["total_params"] == parameters
    assert dense_counts[model].inference_flops == flops
    assert PUBLISHED[model]["dense_flops"] == flops
    # In the order of the network, as `uniform` keeps the first layer dense.
    order = [keras_name(layer["name"]) for layer in PUBLISHED[model]["layers"]]
    ours = {layer.name: layer.shape for layer in dense_counts[model].layers}
    assert set(order) == set(ours) and order[0] == next(iter(ours))
    for layer in PUBLISHED[model]["layers"]:
        shape = np.zeros(layer["shape"])
        assert ours[keras_name(layer["name"])] == to_keras(shape).shape


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
def test_erk_scale_of_both_references(dense_counts, ours, density, epsilon):
    shapes = {
        layer.name: layer.shape for layer in dense_counts["wrn-22-2"].layers
    }
    got = rigl_keras.distributions.layer_densities(
        shapes, density, "erk", conventions=ours
    )
    shape = shapes["block3_2_conv2"]
    assert got["block3_2_conv2"] == pytest.approx(
        epsilon * sum(shape) / np.prod(shape), rel=1e-7
    )


class Recorder(keras.callbacks.Callback):
    """Records every mask and the cross-entropy of every step."""

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


def replay(trace, method, product="auto"):
    """Trains our model on a trace; returns its record and the model."""
    meta = json.loads(str(trace["meta"]))
    model = rigl_keras.models.wide_resnet(
        meta["depth"],
        meta["widen"],
        dropout=0.0,
        weight_decay=meta["weight_decay"],
    )
    distribution = {
        "random": "uniform",
        "erdos-renyi": "erdos_renyi",
        "erdos-renyi-kernel": "erdos_renyi_kernel",
    }[meta["sparse_init"]]
    model = rigl_keras.sparsify(
        model,
        meta["density"],
        distribution=distribution,
        product=product,
        conventions=REPORT,
    )
    for key in trace.files:
        kind, _, name = key.partition("/")
        if kind == "init" and trace[key].ndim > 1:
            # Also of layers without masks.
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
        steps_per_epoch=1,  # so that each step is logged
        epochs=steps,
        callbacks=[*method(meta), record],
        shuffle=False,
        verbose=0,
    )
    return meta, record, model


@pytest.fixture
def floatx(request):
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def updates(kind, redistribution):
    """Returns a function that makes the callback of a trace."""

    def method(meta):
        return [
            kind(
                frequency=meta["interval"],
                drop_fraction=meta["prune_rate"],
                end_step=meta["end"],
                redistribution=redistribution,
                conventions=REPORT,
            )
        ]

    return method


def pruning(meta):
    # The cubic ramp whose differences are the trace's drop fractions.
    ramp = rigl_keras.SparsityRamp(
        final_density=0.2,
        begin_step=2,
        end_step=meta["end"],
        frequency=meta["interval"],
    )
    at = [float(ramp.sparsity(s - 1)) for s in meta["update_steps"]]
    assert at[:2] == pytest.approx(meta["drop_fractions"][:2])
    return [rigl_keras.MagnitudePruning(ramp, conventions=REPORT)]


TRACES = {
    "static": lambda meta: [],
    "rigl_erk": updates(rigl_keras.RigL, None),
    "rigl_sg": updates(rigl_keras.RigL, "gradient"),
    "rigl_sm": updates(rigl_keras.RigL, "momentum"),
    "snfs": updates(rigl_keras.SNFS, "momentum"),
    "pruning": pruning,
}

# At this learning rate, runs with different rounding drift apart once a ReLU
# input near zero changes its sign. Rounding in float32 depends on the
# instruction set, the product library and the kernels, so float32 has only the
# bounds below. float64 is close to exact arithmetic on every processor: there,
# all mask entries agree for this many updates, until the float32 of the
# reproduction drifts.
EXACT_UPDATES = {
    "static": 0,
    "rigl_erk": 3,  # all updates
    "rigl_sg": 1,
    "rigl_sm": 3,
    "snfs": 2,
    "pruning": 1,
}
# The distance of the final weights in float64, over their norm.
DRIFT = {
    "static": 0.04,
    "rigl_erk": 1e-5,
    "rigl_sg": 0.04,
    "rigl_sm": 0.01,
    "snfs": 0.02,
    "pruning": 0.1,
}
# The same in float32, and the least share of equal mask entries. In two traces
# a ReLU input may change its sign in the first batch.
FLOAT32_DRIFT = 0.2
FLOAT32_AGREE = {"rigl_erk": 0.98, "rigl_sm": 0.98}


# The other traces are tested in float32 with our operations.
IN_FLOAT32 = ("rigl_erk", "snfs", "pruning")


@pytest.mark.slow_but("float64-rigl_erk")
@pytest.mark.parametrize(
    "floatx, name",
    [
        *(("float64", name) for name in TRACES),
        *(("float32", name) for name in IN_FLOAT32),
    ],
    indirect=["floatx"],
)
def test_trace(name, floatx):
    """Our model, callback and `fit` repeat the reproduction."""
    assert_follows(name, floatx)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACES)
def test_trace_with_all_operations_of_ours(name):
    """Sparse products and batch norms of the op library repeat it too."""
    needs_sparse_kernels()
    assert_follows_with_all_operations(name)


@pytest.mark.slow
@pytest.mark.parametrize("one_dnn", ["0", "1"])
@pytest.mark.parametrize("instruction_set", ["avx2", "avx512"])
def test_trace_in_every_way_to_compute(instruction_set, one_dnn):
    """The trace that is most sensitive to rounding, on all libraries."""
    needs_sparse_kernels()
    have = ["portable", "avx2", "avx512"]
    best = rigl_keras.kernels.instruction_set()
    if have.index(best) < have.index(instruction_set):
        pytest.skip(f"the processor has {best}")
    way = [instruction_set, "oneDNN" if one_dnn == "1" else "Eigen"]
    if way == [best, rigl_keras.kernels.dense_library()]:
        return  # the test above covers the libraries of this process
    code = (
        "import test_parity as t\n"
        "t.assert_follows_with_all_operations('snfs')\n"
        "k = t.rigl_keras.kernels\n"
        "print(k.instruction_set(), k.dense_library())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pathlib.Path(__file__).parent,
        env={
            **os.environ,
            "RIGL_KERAS_ISA": instruction_set,
            "TF_ENABLE_ONEDNN_OPTS": one_dnn,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == way


def needs_sparse_kernels():
    if rigl_keras.kernels.load() is None:
        pytest.skip(f"no sparse kernels: {rigl_keras.kernels.unavailable()}")


def assert_follows_with_all_operations(name):
    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_calls, "_LEAST_NUMBERS", 1)
        # For normal images, and in lanes.
        for module in (operations, lane_calls):
            patch.setattr(
                module,
                "batch_norm",
                lambda *x, of=module.batch_norm, **how: (
                    called.append(1) or of(*x, **how)
                ),
            )
        model = assert_follows(name, "float32", product="sparse")
    assert called
    for layer in rigl_keras.masked_layers(model):
        (choice,) = layer.chosen_products().values()
        assert choice.sparse


def assert_follows(name, floatx, product="auto"):
    """Replays a trace; returns the model."""
    exact = floatx == "float64"
    with np.load(DATA / f"trace_{name}.npz") as trace:
        meta, record, model = replay(trace, TRACES[name], product)
        assert len(record.losses) == meta["steps"]
        before_update = meta["interval"] - 1
        np.testing.assert_allclose(
            record.losses[:before_update],
            meta["losses"][:before_update],
            atol=1e-5,
        )
        np.testing.assert_allclose(
            record.losses, meta["losses"], atol=6e-3 if exact else 1e-2
        )
        assert [f"mask@{s}" for s in meta["update_steps"]] == sorted(
            {key.partition("/")[0] for key in trace.files if "@" in key},
            key=lambda kind: int(kind.removeprefix("mask@")),
        )
        for update, step in enumerate(meta["update_steps"]):
            ours, theirs = [], []
            for key in trace.files:
                kind, _, weight = key.partition("/")
                if kind == f"mask@{step}":
                    mask = record.masks[step][keras_name(weight)]
                    ours.append(mask.ravel())
                    theirs.append(to_keras(trace[key]).ravel())
            ours, theirs = np.concatenate(ours), np.concatenate(theirs)
            assert ours.sum() == pytest.approx(theirs.sum(), rel=1e-3)
            equal = np.mean(ours == theirs)
            if exact and update < EXACT_UPDATES[name]:
                assert equal == 1
            else:
                least = 0.99 if exact else FLOAT32_AGREE.get(name, 0.99)
                assert equal >= least
        drift = DRIFT[name] if exact else FLOAT32_DRIFT
        for key in trace.files:
            kind, _, weight = key.partition("/")
            if kind == "final" and trace[key].ndim > 1:
                layer = model.get_layer(keras_name(weight))
                ours, theirs = layer.kernel.numpy(), to_keras(trace[key])
                apart = np.linalg.norm(ours - theirs)
                assert apart < drift * np.linalg.norm(theirs)
    return model


# The FLOPs columns of the report's Table 2: train and test, at densities 0.1
# and 0.2, with our names of distribution and method.
TABLE_2 = {
    "Small-Dense": ("small-dense", None, 1, "0.11 0.11 0.20 0.20"),
    "Static": ("static", "uniform", 1, "0.10 0.10 0.20 0.20"),
    "SET": ("SET", "uniform", 1, "0.10 0.10 0.20 0.20"),
    "RigL": ("RigL", "uniform", 1, "0.10 0.10 0.20 0.20"),
    "SET (ERK)": ("SET", "erk", 1, "0.17 0.17 0.35 0.35"),
    "RigL (ERK)": ("RigL", "erk", 1, "0.17 0.17 0.35 0.35"),
    "Static, 2x": ("static", "uniform", 2, "0.20 0.10 0.40 0.20"),
    "SET, 2x": ("SET", "uniform", 2, "0.20 0.10 0.41 0.20"),
    "RigL, 2x": ("RigL", "uniform", 2, "0.20 0.10 0.41 0.20"),
    "RigL (ERK), 2x": ("RigL", "erk", 2, "0.34 0.17 0.70 0.35"),
}


@pytest.mark.slow
def test_flops_of_table_2(dense_counts):
    """They agree to the two printed digits, or the docs say how they differ."""
    dense = dense_counts["wrn-22-2"]
    shapes = {layer.name: layer.shape for layer in dense.layers}
    differ = set()
    for row, (method, distribution, length, printed) in TABLE_2.items():
        printed = printed.split()
        for i, density in enumerate((0.1, 0.2)):
            if distribution is None:
                model = rigl_keras.models.wide_resnet(
                    channel_scale=density**0.5
                )
                sparse = rigl_keras.count(model).inference_flops
            else:
                densities = rigl_keras.distributions.layer_densities(
                    shapes, density, distribution, conventions=REPORT
                )
                sparse = sum(
                    layer.flops_at(densities[layer.name])
                    for layer in dense.layers
                )
            cost = rigl_keras.training_flops(
                method,
                sparse_flops=sparse,
                dense_flops=dense.inference_flops,
                frequency=100,
            )
            ours = (
                length * cost / (3 * dense.inference_flops),
                sparse / dense.inference_flops,
            )
            for column, got, want in zip(
                ("train", "test"), ours, printed[2 * i :], strict=False
            ):
                if f"{got:.2f}" != want:
                    differ.add((row, str(density), column, want, f"{got:.2f}"))
    page = (DATA.parents[1] / "docs" / "flops.md").read_text()
    table = page[page.index("| row | density |") :].split("\n\n")[0]
    named = {
        tuple(cell.strip() for cell in line.strip("|").split("|"))[:5]
        for line in table.splitlines()[2:]
    }
    assert named == differ
