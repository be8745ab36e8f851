"""Tests of the benchmarks of sparse kernels, without their numbers."""

import csv
import functools
import math
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import rigl_keras
from rigl_keras import kernels, models
from rigl_keras.experiments import exits
from rigl_keras.experiments.benchmarks import (
    inference_speed,
    kernel_command,
    kernel_comparison,
    layer_speed,
    speed_figures,
    torch_network,
    train_speed,
)
from rigl_keras.experiments.benchmarks.networks import MODELS, NETWORKS
from rigl_keras.experiments.benchmarks.speed_tables import (
    Measurement,
    crossover,
    lines_of,
    table_head,
    table_row,
    write_csv,
)
from rigl_keras.experiments.runs import provenance

needs_kernels = pytest.mark.skipif(
    kernels.load() is None, reason="there are no sparse kernels here"
)
needs_torch = pytest.mark.skipif(
    not torch_network.is_installed(), reason="PyTorch is not installed"
)


def tiny_network():
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", name="conv1")(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Dropout(0.1)(x)
    x = layers.Conv2D(8, 3, padding="same", name="conv2")(x)
    x = layers.Conv2D(8, 3, padding="same", name="conv3")(x)
    x = layers.Conv2D(16, 1, strides=2, name="conv4")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", tiny_network)
    for module in (inference_speed, layer_speed):
        monkeypatch.setattr(module, "TURN", 0.001)


# Arithmetic.


@pytest.mark.parametrize(
    "speed_ups, wanted",
    [
        # Halfway between 1/2 and 2, and so between 0.1 and 0.4.
        ({0.1: 2.0, 0.4: 0.5}, 0.2),
        # A third of the way from 4 to 1/16; 0.01 x 1000^(1/3) = 0.1.
        ({0.01: 4.0, 10.0: 1 / 16}, 0.1),
        ({0.1: 2.0, 0.2: 1.0, 0.4: 0.5}, 0.2),  # exactly at one
        ({0.4: 0.5, 0.1: 2.0}, 0.2),  # in any order
        # The first crossing counts: a win above it is noise.
        ({0.1: 2.0, 0.4: 0.5, 0.6: 1.1, 0.8: 0.9}, 0.2),
        ({0.1: 2.0, 0.4: 0.5, 0.6: 1.1}, 0.2),
        ({0.05: 0.9, 0.1: 2.0, 0.4: 0.5}, 0.2),
        ({0.05: 3.0, 0.5: 1.2}, math.inf),
        ({0.05: 0.9, 0.5: 1.2}, math.inf),
        ({0.5: 1.0}, math.inf),
        ({0.05: 0.9, 0.5: 0.2}, None),
    ],
)
def test_crossover(speed_ups, wanted):
    found = crossover(speed_ups)
    assert found == (wanted if wanted is None else pytest.approx(wanted))


def measurement(density, seconds, **changes):
    return Measurement(
        **{
            "model": "tiny",
            "batch_size": 2,
            "side": "forward",
            "density": density,
            "dense_seconds": 0.004,
            "dense_fastest": 0.003,
            "seconds": seconds,
            "fastest": 0.9 * seconds,
            "rounds": 3,
            "machine": "avx2, 2 cores",
            "processor": "Tiny",
            "date": "2026-11-30T00:00:00+00:00",
            "commit": "abc",
            **changes,
        }
    )


def test_the_table():
    measured = [
        measurement(0.4, 0.008, layer="a"),
        measurement(0.1, 0.002, layer="a"),
        measurement(0.1, 0.001, layer="b"),
        measurement(0.4, 0.002, layer="b"),
        measurement(0.1, 0.008, layer="c"),
        measurement(0.4, 0.008, layer="c"),
    ]
    head = table_head("Layers", [0.1, 0.4]).splitlines()
    assert head[0] == "Layers"
    assert head[1].split()[-5:] == ["dense", "ms", "0.1", "0.4", "crossover"]
    rows = [table_row(line) for line in lines_of(measured)]
    assert [row.split() for row in rows] == [
        ["a", "forward", "4.00", "2.00x", "0.50x", "0.2"],
        ["b", "forward", "4.00", "4.00x", "2.00x", "above", "0.4"],
        ["c", "forward", "4.00", "0.50x", "0.50x", "none"],
    ]
    assert rows[0].index("2.00x") + 5 == head[1].index(" 0.1") + 4


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_has_no_empty_columns(tmp_path):
    path = tmp_path / "numbers.csv"
    write_csv([measurement(0.1, 0.002), measurement(0.4, 0.001)], path)
    first, second = read(path)
    assert "layer" not in first and "distribution" not in first
    assert first["machine"] == "avx2, 2 cores" and first["density"] == "0.1"
    assert (first["speed_up"], second["speed_up"]) == ("2", "4")


def test_the_figure(tmp_path):
    speeds = {0.02: 4.0, 0.1: 2.0, 0.4: 0.5}
    measured = [
        measurement(
            density, 0.004 * (1 + i) / speed, layer=f"layer {i}", side=side
        )
        for side in ("forward", "forward + backward")
        for i in range(9)  # more than there are line styles
        for density, speed in speeds.items()
    ]
    figure = speed_figures.speed_ups(
        lines_of(measured),
        title="Tiny: avx2",
        rows="size",
        columns="side",
        label="layer",
    )
    left, right = figure.axes
    assert [axes.get_title("left") for axes in figure.axes] == [
        "forward",
        "forward + backward",
    ]
    assert left.get_xscale() == right.get_yscale() == "log"
    marked = [
        line.get_xdata()[0] for line in left.lines if len(line.get_xdata()) == 1
    ]
    # Layer i is 4 / (1 + i) times as fast as dense at 0.02. The first three
    # have a crossover; the first one's is halfway between 2 and 1/2. The
    # fourth is as fast as dense at 0.02, and is not marked.
    assert marked[:2] == pytest.approx([0.2, 0.1]) and len(marked) == 3
    legend = [text.get_text() for text in right.get_legend().get_texts()]
    assert legend[-2:] == ["as fast as dense", "crossover"]
    assert len(legend) == 9 + 2


# Measuring.


def test_the_shapes_are_those_of_the_models():
    found = layer_speed.layer_problems(MODELS["wide_resnet"](), 128)
    assert set(found) == {
        "3x3 32x32x3>16",
        "3x3 32x32x16>32",
        "1x1 32x32x16>32",
        "3x3 32x32x32>32",
        "3x3 34x34x32>64/2",  # padded by the model
        "1x1 32x32x32>64/2",
        "3x3 16x16x64>64",
        "3x3 18x18x64>128/2",
        "1x1 16x16x64>128/2",
        "3x3 8x8x128>128",
    }
    strided = found["3x3 34x34x32>64/2"]
    assert strided == kernels.Problem(
        kernel=(3, 3, 32, 64),
        images=(128, 34, 34),
        strides=(2, 2),
        padding="VALID",
    )
    found = layer_speed.layer_problems(models.resnet50(100), 1)
    # 3x3 kernels of 64 channels, and of 128, 256 and 512 with and without
    # stride; 1x1 kernels of four stages: first, last and later, and shortcuts.
    sizes = [name[:3] for name in found]
    assert sizes.count("3x3") == 1 + 1 + 3 * 2
    assert len(found) == len(set(found)) == sizes.count("3x3") + 15


@needs_kernels
def test_layers(tiny, tmp_path):
    said, kept = [], []
    measured = layer_speed.measure_layers(
        "tiny",
        [0.5, 0.1],
        batch_size=2,
        rounds=2,
        say=said.append,
        keep=lambda measured: kept.append(len(measured)),
    )
    assert kept == [4, 8, 12]  # after each layer
    assert all(m.fastest <= m.seconds for m in measured)
    assert all(m.dense_fastest <= m.dense_seconds for m in measured)
    assert {m.processor for m in measured} == {provenance.processor()}
    assert all(m.date.endswith("+00:00") and m.commit for m in measured)
    # Three shapes, as conv2 and conv3 have the same.
    assert len(measured) == 3 * 2 * 2 and len(said) == 1 + 3 * 2
    assert {m.layer for m in measured} == {
        "3x3 8x8x3>8",
        "3x3 8x8x8>8",
        "1x1 8x8x8>16/2",
    }
    assert {m.size for m in measured} == {"8x8 outputs", "4x4 outputs"}
    assert {m.side for m in measured} == {"forward", "forward + backward"}
    assert [m.density for m in measured[:2]] == [0.1, 0.5]
    assert all(m.seconds > 0 and m.dense_seconds > 0 for m in measured)
    assert kernels.instruction_set() in said[0]
    assert written("kernels", measured, tmp_path) == 12


def tiny_sequences():
    inputs = keras.Input((5, 6))
    x = layers.LSTM(8, return_sequences=True)(inputs)
    x = layers.Dense(12)(x)
    return keras.Model(inputs, layers.Dense(4)(layers.GRU(8)(x)))


@needs_kernels
def test_matrices_and_recurrent_layers(monkeypatch):
    monkeypatch.setitem(NETWORKS, "sequences", tiny_sequences)
    monkeypatch.setattr(layer_speed, "TURN", 0.001)
    options = {"batch_size": 3, "rounds": 1, "say": lambda line: None}
    measured = layer_speed.measure_layers("sequences", [0.5, 0.1], **options)
    assert {(m.layer, m.size) for m in measured} == {
        ("lstm 5x6>8", "5 steps"),
        ("matrix 15x8>12", "15 rows"),
        ("gru 5x12>8", "5 steps"),
    }
    assert len(measured) == 3 * 2 * 2
    with pytest.raises(ValueError, match="masks of single weights"):
        layer_speed.measure_layers(
            "sequences", [0.5], granularities=["element", "4x4"], **options
        )


def test_networks_that_are_no_convolutions():
    """They are what docs/speed.md says of them."""
    found = {
        name: layer_speed.layer_problems(NETWORKS[name](), 128)
        for name in ("vision_transformer", "lstm", "dense")
    }
    assert list(found["vision_transformer"]) == [
        "4x4 32x32x3>384/4",
        "matrix 8320x384>1536",
        "matrix 8320x1536>384",
    ]
    assert list(found["lstm"]) == ["lstm 64x512>512"]
    assert list(found["dense"]) == ["matrix 128x4096>4096"]


@needs_kernels
def test_layers_by_pattern(tiny, tmp_path):
    measured = layer_speed.measure_layers(
        "tiny",
        [0.25],
        granularities=["element", "kernel", "fan_in", "4x4"],
        batch_size=2,
        rounds=1,
        say=lambda line: None,
    )
    assert len(measured) == 3 * 2 * 4
    assert {m.side for m in measured} == {
        f"{side}{pattern}"
        for side in ("forward", "forward + backward")
        for pattern in ("", ", kernel", ", fan_in", ", 4x4")
    }
    # All share one dense side.
    assert len({(m.layer, m.dense_seconds) for m in measured}) == 3 * 2
    with pytest.raises(ValueError, match="and '2:4' has one. Leave it out"):
        layer_speed.measure_layers("tiny", [0.5], granularities=["2:4"])


@needs_kernels
def test_layers_that_compute_something_else_are_refused(tiny, monkeypatch):
    real = kernels.sparse_conv2d
    monkeypatch.setattr(
        kernels, "sparse_conv2d", lambda *a, **k: 1.001 * real(*a, **k)
    )
    with pytest.raises(ValueError, match="A sparse side must compute"):
        layer_speed.measure_layers("tiny", [0.1], batch_size=2, rounds=1)


@pytest.mark.slow
def test_train(tiny, tmp_path):
    said = []
    with_torch = torch_network.is_installed()
    measured = train_speed.measure_training(
        "tiny",
        [0.2],
        ["uniform"],
        batch_size=2,
        rounds=1,
        torch=with_torch,
        say=said.append,
    )
    sides = {
        "product=auto",
        "product=auto, a mask update",
        "product=auto, 1 update in 100",
        "product=dense",
    }
    found = {(m.side, m.density): m.seconds for m in measured}
    torch = {kernel_comparison.TORCH} if with_torch else set()
    assert {side for side, _ in found} == sides | torch
    assert len({m.dense_seconds for m in measured}) == 1
    plain, update, mixed = (
        found["product=auto" + step, 0.2]
        for step in ("", ", a mask update", ", 1 update in 100")
    )
    assert mixed == pytest.approx(0.99 * plain + 0.01 * update)
    assert "masks uniform, batch 2" in said[0]
    assert len(said) == 1 + len(measured)
    assert written("train", measured, tmp_path) == len(measured)


def test_inference(tiny, tmp_path):
    said = []
    measured = inference_speed.measure_inference(
        "tiny",
        [0.2, 0.1],
        ["uniform"],
        batch_sizes=[1, 3],
        rounds=1,
        say=said.append,
    )
    assert len(measured) == 2 * 2 * 2
    assert {m.side for m in measured} == {
        kernel_comparison.CALLED,
        kernel_comparison.SERVED,
    }
    assert {m.batch_size for m in measured} == {1, 3}
    assert written("inference", measured, tmp_path) == 8


def written(part, measured, folder):
    """Checks both files, and returns the number of lines of the table."""
    table = folder / f"{part}.csv"
    write_csv(measured, table)
    image = kernel_command._drawn(part, measured, folder)
    assert image.name == f"{part}.png"
    pixels = tf.io.decode_png(image.read_bytes()).numpy()
    assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels)) > 50
    return len(read(table))


def test_an_artefact_that_computes_something_else_is_refused(tiny, monkeypatch):
    real = inference_speed._served
    monkeypatch.setattr(
        inference_speed,
        "_served",
        lambda *given: lambda x: np.nan * real(*given)(x),
    )
    with pytest.raises(ValueError, match="must compute what the dense one"):
        inference_speed.measure_inference(
            "tiny", [0.1], ["uniform"], batch_sizes=[1], rounds=1
        )


def test_without_torch(tiny, monkeypatch):
    monkeypatch.setattr(torch_network, "is_installed", lambda: False)
    monkeypatch.setattr(
        train_speed, "_train_sides", lambda *given: {("dense", None): given}
    )
    said = []

    def stop(sides, *rest):
        assert sides["dense", None][-1] is False
        raise InterruptedError

    monkeypatch.setattr(train_speed, "timed_in_turns", stop)
    with pytest.raises(InterruptedError):
        train_speed.measure_training("tiny", [0.1], torch=True, say=said.append)
    assert said[0] == "PyTorch is not measured: pip install torch"


@needs_torch
def test_the_step_of_torch():
    """The loss falls and equals Keras's, and masks do not change."""
    import torch

    model = rigl_keras.sparsify(
        models.wide_resnet(10, 1, dropout=0.0), 0.2, distribution="uniform"
    )
    images = np.random.default_rng(0).standard_normal(
        (4, 32, 32, 3), np.float32
    )
    labels = np.arange(4)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    wanted = float(loss(labels, model(images, training=True)))
    made = []
    real = torch.optim.SGD

    class SGD(real):
        def __init__(self, parameters, *given, **named):
            made.extend(parameters)
            super().__init__(made, *given, **named)

    torch.optim.SGD = SGD
    try:
        step = torch_network.torch_training_step(model, learning_rate=0.05)
    finally:
        torch.optim.SGD = real
    assert len(made) == len(model.trainable_variables)
    before = [(p.detach() == 0).numpy() for p in made if p.ndim > 1]
    losses = [step(images, labels) for _ in range(8)]
    assert losses[0] == pytest.approx(wanted, rel=1e-4)
    assert losses[-1] < losses[0]
    after = [(p.detach() == 0).numpy() for p in made if p.ndim > 1]
    assert all((a | ~b).all() for a, b in zip(after, before, strict=True))
    assert sum(b.sum() for b in before) > 0.7 * sum(b.size for b in before)


# Errors.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "resnet51"}, "model must be one of .*resnet50.*resnet51"),
        (
            {"densities": []},
            "densities must have at least one item, and each once",
        ),
        (
            {"densities": [0.1, 0.1]},
            "densities must have at least one item, and each once",
        ),
        ({"densities": [0.0]}, r"densities must be .*\(0, 1\].*=0.0"),
        ({"densities": [float("nan")]}, "densities must be .*nan"),
        ({"distributions": ["erk"]}, "distributions must be one of .*'erk'"),
        ({"batch_sizes": [0]}, "batch_size must be an int of at least 1.*=0"),
        ({"rounds": 0}, "rounds must be .*=0"),
    ],
)
def test_refuses(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        inference_speed.measure_inference(**{"model": "tiny", **changes})


COMMAND = """
import sys
from rigl_keras import models
from rigl_keras.experiments.benchmarks import benchmark_command
from rigl_keras.experiments.benchmarks import networks
networks.MODELS["tiny"] = lambda: models.lenet5(num_classes=4)
benchmark_command.main()
"""


@pytest.fixture
def command(fresh, tmp_path):
    return functools.partial(fresh, "-c", COMMAND, cwd=tmp_path)


@needs_kernels
def test_the_command(tmp_path, command):
    done = command(
        "kernels",
        "--model=tiny",
        "--densities=0.1,0.5",
        "--batch_size=2",
        "--rounds=1",
        "--output=made/here",
    )
    assert done.returncode == 0, done.stderr
    assert "Layers of tiny, batch 2: " in done.stdout
    assert "5x5 28x28x1>6" in done.stdout and "crossover" in done.stdout
    assert "Traceback" not in done.stderr and "retracing" not in done.stderr
    drawn = {path.name for path in (tmp_path / "made/here").iterdir()}
    assert drawn == {"kernels.csv", "kernels.png"}


def test_there_are_no_kernels_to_measure(command):
    done = command("kernels", "--model=tiny", env={"RIGL_KERAS_KERNELS": "off"})
    assert done.returncode == 1 and not done.stdout
    assert (
        "benchmark kernels: There are no sparse kernels to measure: "
        "RIGL_KERAS_KERNELS=off.\n"
    ) in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("RIGL_KERAS_KERNELS=off") == 1


def test_the_others_go_on_without_kernels(tiny, monkeypatch):
    monkeypatch.setattr(kernels.library, "_module", None)
    monkeypatch.setattr(kernels.library, "_reason", "there is no compiler")
    said = []
    measured = inference_speed.measure_inference(
        "tiny", [0.1], ["uniform"], batch_sizes=[1], rounds=1, say=said.append
    )
    assert "no sparse kernels" in said[0] and len(measured) == 2


@pytest.mark.parametrize(
    "part, changes, message",
    [
        (
            "kernels",
            {"densities": ["0.1", "x"]},
            "--densities takes numbers, separated by commas. Received: '0.1,x",
        ),
        ("train", {"rounds": 0}, "rounds must be an int of at least 1"),
        ("inference", {"batch_sizes": ["1", "2.5"]}, "--batch_sizes takes"),
        ("train", {"output": __file__}, "--output must be a folder"),
        ("kernels", {"argv": ["", "here"]}, "There is nothing to name but"),
    ],
)
def test_flags_that_are_wrong(capsys, part, changes, message):
    values = {
        "model": "wide_resnet",
        "densities": ["0.1"],
        "rounds": 1,
        "output": None,
        "argv": [""],
    }
    if part == "inference":
        values["batch_sizes"] = ["1"]
    else:
        values["batch_size"] = 1
    values.update(changes)
    argv = values.pop("argv")
    given = {name: types.SimpleNamespace(value=v) for name, v in values.items()}
    output = given.pop("output")
    run = functools.partial(kernel_command.run, part, given, output)
    with pytest.raises(SystemExit) as ended:
        exits.one_line(f"benchmark {part}", run)(argv)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"benchmark {part}: {message}"), told.err
    assert told.err.count("\n") == 1 and not told.out


def test_what_to_measure_is_named_first(command):
    done = command("--rounds=3", "kernels")
    assert done.returncode == 2 and not done.stdout
    assert "benchmark: Name what to measure before" in done.stderr
    assert "Traceback" not in done.stderr
