"""Tests of `bin/benchmark language`, without its numbers."""

import csv

import keras
import numpy as np
import pytest

from rigl_keras import models
from rigl_keras.experiments.benchmarks import (
    language_command,
    language_figures,
    language_losses,
    language_steps,
    torch_language,
    torch_network,
)
from rigl_keras.experiments.runs.optimizers import adamw

needs_torch = pytest.mark.skipif(
    not torch_network.is_installed(), reason="PyTorch is not installed"
)
TINY = {"context": 8, "layers": 1, "width": 16, "heads": 2, "batch_size": 2}


@pytest.mark.slow
def test_steps_are_measured(tmp_path, monkeypatch):
    said = []
    steps = language_steps.measure_language_steps(
        densities=[0.2], rounds=2, say=said.append, **TINY
    )
    assert [(s.side, s.density, s.product) for s in steps] == [
        ("Keras, dense", 1.0, ""),
        ("RigL", 0.2, "auto"),
        ("RigL, a mask update", 0.2, "auto"),
        ("RigL, 1 update in 100", 0.2, "auto"),
    ]
    assert all(0 < s.least_seconds <= s.seconds < 60 for s in steps)
    assert steps[0].speed_up == steps[0].least_speed_up == 1
    assert {s.parameters for s in steps} == {
        models.gpt(97, 8, 1, 16, 2).count_params()
    }
    assert any("1 update in 100 at 0.2" in line for line in said)
    language_command._write("steps", steps, tmp_path)
    with (tmp_path / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["side"] for row in rows] == [s.side for s in steps]
    assert (tmp_path / "steps.png").stat().st_size > 1000


def step_of(side="Keras, dense", **changes):
    about = {
        "density": 1.0,
        "product": "",
        "sparse_kernels": 0,
        "seconds": 2.0,
        "least_seconds": 1.5,
        "dense_seconds": 2.0,
        "dense_least_seconds": 1.5,
        "parameters": 38_000_000,
        "batch_size": 8,
        "context": 256,
        "layers": 12,
        "width": 512,
        "heads": 8,
        "rounds": 3,
        "machine": "a machine",
        "versions": "none",
    }
    return language_steps.Step(side=side, **{**about, **changes})


def test_speed_ups_and_what_is_said_by_hand():
    seconds = {
        ("Keras, dense", 1.0, ""): [4.0, 2.0, 3.0],
        ("RigL", 0.1, "auto"): [1.0, 1.0, 2.0],
        ("update", 0.1, "auto"): [11.0, 11.0, 12.0],
    }
    about = {
        key: getattr(step_of(), key)
        for key in (
            *("parameters", "batch_size", "context", "layers", "width"),
            *("heads", "rounds", "machine"),
        )
    }
    steps = language_steps._steps(seconds, {("RigL", 0.1, "auto"): 7}, about)
    assert [s.speed_up for s in steps] == pytest.approx([1, 3, 3 / 11, 3 / 1.1])
    assert [s.least_speed_up for s in steps] == pytest.approx(
        [1, 2, 2 / 11, 2 / 1.1]
    )
    assert [s.sparse_kernels for s in steps] == [0, 7, 0, 7]
    lines = list(language_steps._lines(steps))
    assert "38 M parameters, batch 8 x 256 characters" in lines[0]
    assert lines[3].split()[-4:] == ["1.000", "3.00x", "1.000", "2.00x"]
    figure = language_figures.step_times(steps)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [3.0, 1.0, 11.0, 1.1]


def metrics(folder, name, losses, **more):
    path = folder / name
    path.mkdir()
    rows = [
        "epoch,step,density,loss,val_loss,val_accuracy,training_flops_ratio"
    ]
    rows += [
        f"{i},{10 * (i + 1)},0.1,{loss + 0.1},{loss},0.5,{0.01 * (i + 1)}"
        for i, loss in enumerate(losses)
    ]
    (path / "metrics.csv").write_text("\n".join(rows) + "\n")
    return path


def test_losses_of_runs(tmp_path):
    runs = [metrics(tmp_path, "a", [3.0, 2.0]), metrics(tmp_path, "b", [2.5])]
    points = language_losses.read_losses(runs)
    assert [(p.run, p.step, p.validation_loss) for p in points] == [
        ("a", 10, 3.0),
        ("a", 20, 2.0),
        ("b", 10, 2.5),
    ]
    assert points[1].bits_per_character == pytest.approx(2.0 / 0.6931472)
    language_command._write("losses", points, tmp_path)
    with (tmp_path / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["bits_per_character"]) for row in rows] == pytest.approx(
        [p.bits_per_character for p in points], rel=1e-3
    )
    steps, flops = language_figures.losses(points).axes
    assert [list(line.get_xdata()) for line in steps.lines] == [[10, 20], [10]]
    assert list(flops.lines[0].get_ydata()) == [3.0, 2.0]


def test_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="metrics.csv cannot be read"):
        language_losses.read_losses([tmp_path])
    with pytest.raises(ValueError, match="There is no run"):
        language_losses.read_losses([])
    run = metrics(tmp_path, "a", [3.0])
    (run / "metrics.csv").write_text("epoch,step\n0,10\n")
    with pytest.raises(ValueError, match="train.validation > 0"):
        language_losses.read_losses([run])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"densities": [0.0]}, "densities must be in"),
        ({"products": ["fast"]}, "products must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"rounds": 0}, "rounds must be"),
    ],
)
def test_nonsense(options, message):
    with pytest.raises(ValueError, match=message):
        language_steps.measure_language_steps(**{**TINY, **options})


@needs_torch
def test_pytorch_computes_and_trains_the_same():
    keras.utils.set_random_seed(0)
    model = models.gpt(97, 8, 2, 16, 2)
    draw = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign_add(draw.normal(0, 0.1, variable.shape))
    tokens = draw.integers(0, 97, (3, 8)).astype(np.int32)
    following = np.roll(tokens, -1, axis=1)
    import torch

    with torch.no_grad():
        logits = torch_language.torch_gpt(model)(torch.from_numpy(tokens))
    np.testing.assert_allclose(logits, model(tokens), rtol=1e-4, atol=1e-5)
    step = torch_language.torch_gpt_step(model)
    losses = [step(tokens, following) for _ in range(4)]
    model.compile(
        adamw(warmup_steps=0, decay_steps=10**9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    wanted = [float(model.train_on_batch(tokens, following)) for _ in range(4)]
    np.testing.assert_allclose(losses, wanted, rtol=1e-3)


@needs_torch
def test_pytorch_takes_no_dropout():
    with pytest.raises(ValueError, match="GPT of dropout=0"):
        torch_language.torch_gpt(models.gpt(97, 8, 1, 16, 2, dropout=0.1))
