"""Tests of the inference benchmark, without its numbers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from rigl_keras import models
from rigl_keras.experiments import exits
from rigl_keras.experiments.benchmarks import (
    inference_command,
    runtime_tables,
    torch_network,
)
from rigl_keras.experiments.benchmarks.networks import MODELS
from rigl_keras.experiments.benchmarks.runtime_tables import (
    DENSE,
    SIDES,
    TORCH,
    Comparison,
)
from rigl_keras.exporting.formats import FORMATS

needs_torch = pytest.mark.skipif(
    not torch_network.is_installed(), reason="PyTorch is not installed"
)


def tiny_network():
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(32, 3, padding="same", name="conv1")(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    y = layers.Conv2D(32, 3, padding="same", name="conv2")(x)
    x = layers.Add()([x, layers.BatchNormalization()(y)])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", tiny_network)
    monkeypatch.setattr(inference_command, "_TURN", 0.001)


def measured(**changes):
    arguments = {
        "models": ["tiny"],
        "densities": [0.1],
        "batches": [1],
        "rounds": 2,
        "seconds": 0.01,
        **changes,
    }
    return inference_command.compare(**arguments)


@pytest.mark.slow
def test_compares_all_sides(tiny, tmp_path):
    lines = []
    comparison = measured(batches=[1, 3], progress=lines.append)
    sides = set(SIDES)
    if not torch_network.is_installed():
        sides -= {TORCH}
        assert any("pip install torch" in note for note in comparison.notes)
    assert len(comparison.measurements) == 2 * len(sides)
    for batch in (1, 3):
        found = [m for m in comparison.measurements if m.batch == batch]
        assert {m.side for m in found} == sides
    for m in comparison.measurements:
        assert m.seconds > 0 and 0 <= m.difference <= 1e-4 and m.rounds == 2
        assert (m.bytes is None) == (m.side == TORCH)
        assert comparison.ratio(m) > 0
        if m.side == DENSE:
            assert comparison.ratio(m) == 1
    assert any("tiny at density 0.1, batch 3" in line for line in lines)

    def size(side):
        return comparison.of(side=side).bytes

    for runtime in ("SavedModel", "TFLite"):
        assert size(f"{runtime}, sparse") < size(f"{runtime}, dense")

    table = str(comparison)
    assert all(table.count(f"  {side:28}") == 3 for side in sides)
    assert "batch norms are folded" in table and "TFLite" in table

    comparison.save(tmp_path / "numbers.json")
    again = Comparison.load(tmp_path / "numbers.json")
    assert again == comparison

    runtime_tables.draw(again, tmp_path / "figure.png")
    pixels = tf.io.decode_png((tmp_path / "figure.png").read_bytes()).numpy()
    assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels)) > 50


@pytest.mark.parametrize(
    "format, side, wrong",
    [("saved_model", DENSE, 1.001), ("tflite", "TFLite", np.nan)],
)
def test_a_side_that_computes_something_else_is_refused(
    tiny, monkeypatch, format, side, wrong
):
    loaded = FORMATS[format].load

    def load(*arguments):
        run = loaded(*arguments)
        return lambda arrays: {n: wrong * x for n, x in run(arrays).items()}

    monkeypatch.setattr(FORMATS[format], "load", load)
    with pytest.raises(ValueError, match=f"{side}.* disagrees with the Keras"):
        measured()


def test_the_network_is_like_a_trained_one(tiny):
    network = inference_command.sparse_network("tiny", 0.1)
    norms = [
        layer
        for layer in network.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert all(0.4 < abs(norm.gamma.numpy()).min() < 1.6 for norm in norms)
    assert all(norm.momentum == 0.99 for norm in norms)
    # The outputs depend on the inputs.
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 3))
    outputs = network(images.astype(np.float32)).numpy()
    assert outputs.std(axis=0).min() > 0.01 * np.abs(outputs).max()
    kernel = network.get_layer("conv2").kernel.numpy()
    assert 0 < np.count_nonzero(kernel) < 0.3 * kernel.size


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"models": ["resnet51"]},
            "models must be one of .*resnet50.*resnet51",
        ),
        ({"models": []}, "models must have at least one item"),
        ({"densities": [0.0]}, r"densities must be .*\(0, 1\].*=0.0"),
        ({"densities": [1.5]}, r"densities must be .*\(0, 1\].*=1.5"),
        ({"densities": [float("nan")]}, "densities must be .*nan"),
        ({"batches": [0]}, "batches must be an int of at least 1.*=0"),
        (
            {"batches": [1, 1]},
            "batches must have at least one item, and each once",
        ),
        ({"rounds": 0}, "rounds must be .*=0"),
        ({"seconds": 0}, "seconds must be above 0.*=0"),
    ],
)
def test_refuses(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        measured(**changes)


COMMAND = """
import sys
from rigl_keras import models
from rigl_keras.experiments.benchmarks import networks, runtime_command
networks.MODELS["tiny"] = lambda: models.lenet5(num_classes=4)
runtime_command.main()
"""


@pytest.mark.slow
def test_the_command(tmp_path, fresh):
    done = fresh(
        *("-c", COMMAND),
        "--models=tiny",
        "--densities=0.2",
        "--batches=1",
        "--rounds=1",
        "--json=numbers.json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "tiny, batch 1" in done.stdout and "density 0.2" in done.stdout
    assert "writing all formats" in done.stderr
    assert "Sharding" not in done.stderr  # TensorFlow's own message
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"inference.png", "numbers.json"}


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path, fresh):
    done = fresh("-c", COMMAND, "--densities=0.1,0", cwd=tmp_path)
    assert done.returncode == 2
    assert "benchmark_inference: densities must be" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize(
    "figure, numbers, message",
    [
        ("no/such/figure.png", None, "in a folder that exists"),
        ("figure.doc", None, "--figure must end with one of .*png"),
        ("", ".", "A file is needed"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(figure, numbers, message):
    with pytest.raises(ValueError, match=message):
        runtime_tables.check_paths(figure, numbers)


def test_numbers_of_a_flag():
    assert exits.numbers("batches", ["1", "128"], int) == (1, 128)
    with pytest.raises(ValueError, match="--batches takes whole num.*'1,x'"):
        exits.numbers("batches", ["1", "x"], int)


# PyTorch's side.


def padded():
    """Returns a model with layers that the library's models lack."""
    return keras.Sequential(
        [
            keras.Input((9, 7, 3)),
            layers.Conv2D(4, 2, strides=2, padding="same"),
            layers.MaxPooling2D(2, padding="same"),
            layers.Conv2D(4, 3, padding="same", groups=2, dilation_rate=2),
            layers.BatchNormalization(scale=False),
            layers.DepthwiseConv2D(2, depth_multiplier=3, padding="same"),
            layers.Activation("tanh"),
            layers.ReLU(max_value=6),
            layers.Flatten(),
            layers.Dense(5, activation="sigmoid"),
            layers.BatchNormalization(center=False),
        ]
    )


@needs_torch
@pytest.mark.parametrize(
    "build",
    [
        lambda: models.wide_resnet(10, 1),
        models.lenet5,
        lambda: models.resnet18(
            10, channel_scale=0.25, zero_init_residual=False
        ),
        padded,
    ],
    ids=["wide_resnet", "lenet5", "resnet18", "padded"],
)
def test_torch_computes_the_same(build):
    model = build()
    draw = np.random.default_rng(0)
    for weight in model.weights:  # also statistics and biases
        if len(weight.shape) == 1:
            weight.assign(draw.uniform(0.5, 1.5, weight.shape))
    images = draw.standard_normal((3, *model.input_shape[1:]), np.float32)
    wanted = model(images).numpy()
    got = torch_network.torch_network(model)(images)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


@needs_torch
def test_the_module_of_torch_computes_the_same():
    import torch

    model = padded()
    images = np.random.default_rng(0).standard_normal((3, 9, 7, 3), np.float32)
    module = torch_network.torch_module(model)
    with torch.no_grad():
        got = module(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(got, model(images).numpy(), atol=1e-5)


def chain(*several):
    return keras.Sequential([keras.Input((8, 8, 3)), *several])


def two_outputs():
    x = keras.Input((4,))
    return keras.Model(x, [layers.Dense(2)(x), layers.Dense(3)(x)])


def operation():
    x = keras.Input((4,))
    return keras.Model(x, x + 1.0)


@needs_torch
@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: chain(layers.SeparableConv2D(2, 3, name="d")), "'d', Separab"),
        (operation, "does not know layer 'add.*Build the network of Act"),
        (two_outputs, "one input and one output.*with 1 and 2"),
        (
            lambda: chain(layers.Conv2D(4, 3, activation="swish", name="c")),
            "'c', Conv2D with activation 'silu'",
        ),
        (
            lambda: chain(layers.ReLU(negative_slope=0.1, name="r")),
            "'r', ReLU with max_value=None, negative_slope=0.1",
        ),
        (
            lambda: chain(layers.BatchNormalization(axis=1, name="b")),
            "'b', BatchNormalization with axis=1",
        ),
        (lambda: chain(layers.Dense(2, name="e")), "'e', Dense on inputs of"),
        (
            lambda: chain(layers.Dropout(0.1, dtype="float16", name="h")),
            "'h', Dropout computing in float16",
        ),
    ],
)
def test_torch_refuses_what_it_does_not_know(build, message):
    with pytest.raises(ValueError, match=message):
        torch_network.torch_network(build())


def test_without_torch(tiny, monkeypatch):
    monkeypatch.setattr(torch_network, "is_installed", lambda: False)
    with pytest.raises(ImportError, match="pip install torch"):
        torch_network.torch_network(models.lenet5())
    comparison = measured(rounds=1)
    assert TORCH not in comparison.values("side")
    assert "pip install torch" in str(comparison)
    assert "torch" not in comparison.environment["versions"]
