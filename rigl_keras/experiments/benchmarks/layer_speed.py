"""Times single layers with sparse and with dense products."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import _keras, kernels
from rigl_keras._timing import warm_turns
from rigl_keras.experiments.benchmarks.inference_command import (
    MODELS,
    check_each_once,
)
from rigl_keras.experiments.benchmarks.kernel_comparison import (
    BOTH,
    FORWARD,
    TURN,
    Keep,
    Say,
    check,
    check_same_outputs,
    machine,
    measurements,
)
from rigl_keras.experiments.benchmarks.speed_tables import (
    Measurement,
    table_head,
)
from rigl_keras.experiments.progress_bar import ProgressBar
from rigl_keras.masking.drawing import draw_mask
from rigl_keras.patterns import NM, Element, as_pattern

__all__ = ["layer_problems", "measure_layers"]


def layer_problems(
    model: keras.Model, batch_size: int
) -> dict[str, kernels.Problem]:
    """Returns the distinct convolutions of a model.

    Args:
        model: A dense model with a fixed image size.
        batch_size: Images in a batch.

    Returns:
        `{"3x3 16x16x64>64": problem}`, in the order of the model. A name has
        rows and columns of the kernel, rows, columns and channels of its input
        images (after padding by the model), filters, and `/2` for a stride of
        2.
    """
    found = {}
    for layer in _keras.flatten_layers(model):
        if type(layer) is not keras.layers.Conv2D:
            continue
        conv: Any = layer  # Keras's annotations lack attributes of built layers
        rows, columns, channels, filters = conv.kernel.shape
        images = tuple(conv.input.shape[1:3])
        stride = f"/{conv.strides[0]}" if max(conv.strides) > 1 else ""
        name = (
            f"{rows}x{columns} {images[0]}x{images[1]}x{channels}>{filters}"
            f"{stride}"
        )
        found[name] = kernels.Problem(
            kernel=(rows, columns, channels, filters),
            images=(batch_size, *images),
            strides=tuple(conv.strides),
            padding=conv.padding.upper(),
            dilations=tuple(conv.dilation_rate),
        )
    return found


def measure_layers(
    model: str = "wide_resnet",
    densities: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
    *,
    granularities: Sequence[str] = ("element",),
    batch_size: int = 128,
    rounds: int = 15,
    say: Say = print,
    keep: Keep | None = None,
) -> list[Measurement]:
    """Measures each convolution of a network, dense and sparse.

    Args:
        model: One of `inference_command.MODELS`.
        densities: Densities of random masks.
        granularities: Names of the masks' patterns.
        batch_size: Images in a call.
        rounds: Turns of each side.
        say: Called with each line of the table as it is measured.
        keep: Called with all measurements so far, each time new ones come.

    Returns:
        Measurements of the forward pass, and of both passes.

    Raises:
        ValueError: An argument is out of range, or sparse and dense kernels
            disagree.
        RuntimeError: There are no sparse kernels.
    """
    check(model, densities, rounds, batch_sizes=[batch_size])
    densities = sorted(densities)
    patterns = _patterns(granularities)
    about = machine()
    found = layer_problems(MODELS[model](), batch_size)
    say(
        table_head(f"Layers of {model}, batch {batch_size}: {about}", densities)
    )
    measured = []
    with ProgressBar(unit="layers", total=len(found)) as bar:
        for name, problem in bar.over(found.items()):
            sides, size = _layer_sides(problem, densities, patterns)
            seconds = warm_turns(sides, rounds=rounds, turn=TURN)
            measured += measurements(
                seconds,
                {
                    _named(side, pattern): (side, None)
                    for pattern in patterns
                    for side in (FORWARD, BOTH)
                },
                densities,
                say,
                model=model,
                layer=name,
                size=size,
                batch_size=batch_size,
                rounds=rounds,
            )
            if keep:
                keep(measured)
    return measured


def _patterns(granularities):
    check_each_once({"granularities": granularities})
    patterns = [as_pattern(name) for name in granularities]
    for pattern in patterns:
        if isinstance(pattern, NM):
            raise ValueError(
                "granularities are measured at every density, and "
                f"{pattern.name!r} has one. Leave it out."
            )
    return patterns


def _named(side, pattern):
    return side if pattern == Element() else f"{side}, {pattern.name}"


def _drawn(draw, shape, density, pattern):
    """Returns a random mask."""
    layout = pattern.layout(shape)
    count = max(1, round(density * layout.size))
    if pattern == Element():
        return (draw.permutation(layout.size) < count).reshape(shape)
    return draw_mask(layout, count, int(draw.integers(2**32)))


def _layer_sides(problem, densities, patterns):
    """Returns `{(side, density or None): call}`, and the size of the output."""
    draw = np.random.default_rng(0)

    def normal(*shape):
        return tf.constant(draw.standard_normal(shape, np.float32))

    images = normal(*problem.images, problem.kernel[2])
    kernel = normal(*problem.kernel)
    settings = {
        "strides": problem.strides,
        "padding": problem.padding,
        "dilations": problem.dilations,
    }

    def dense(images, kernel):
        return tf.nn.convolution(images, kernel, **settings)

    outputs = dense(images, kernel)
    upstream = normal(*outputs.shape)

    def calls(product):
        @tf.function(autograph=False)
        def forward(images, kernel):
            return product(images, kernel)

        @tf.function(autograph=False)
        def both(images, kernel, upstream):
            with tf.GradientTape() as tape:
                tape.watch([images, kernel])
                outputs = product(images, kernel)
            return outputs, tape.gradient(
                outputs, [images, kernel], output_gradients=upstream
            )

        return {
            FORWARD: lambda: forward(images, kernel),
            BOTH: lambda: both(images, kernel, upstream),
        }

    sides: dict[tuple[str, float | None], Callable] = {
        (side, None): call for side, call in calls(dense).items()
    }
    for pattern, density in itertools.product(patterns, densities):
        kept = _drawn(draw, problem.kernel, density, pattern)
        mask = tf.constant(kept)
        sparse = functools.partial(kernels.sparse_conv2d, mask=mask, **settings)
        check_same_outputs(
            sparse(images, kernel), dense(images, tf.where(mask, kernel, 0.0))
        )
        for side, call in calls(sparse).items():
            sides[_named(side, pattern), density] = call
    rows, columns = outputs.shape[1:3]
    return sides, f"{rows}x{columns} outputs"
