"""Times single layers with sparse and with dense products."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import _keras, kernels
from rigl_keras._timing import warm_turns
from rigl_keras.experiments.benchmarks.inference_command import check_each_once
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
from rigl_keras.experiments.benchmarks.networks import NETWORKS
from rigl_keras.experiments.benchmarks.speed_tables import (
    Measurement,
    table_head,
)
from rigl_keras.experiments.progress_bar import ProgressBar
from rigl_keras.kernels.problems import AnyProblem
from rigl_keras.masking.drawing import draw_mask
from rigl_keras.patterns import NM, Element, as_pattern

__all__ = ["layer_problems", "measure_layers"]


def layer_problems(
    model: keras.Model, batch_size: int
) -> dict[str, AnyProblem]:
    """Returns what the distinct layers of a model compute.

    These are `Conv2D` without groups, `Dense`, `LSTM` and `GRU`, but not the
    layer of the logits, unless there is no other.

    Args:
        model: A dense Functional model whose inputs have a fixed size.
        batch_size: Examples in a batch.

    Returns:
        `{"3x3 16x16x64>64": problem}`, in the order of the model. The name of
        a convolution has rows and columns of the kernel, rows, columns and
        channels of its input images (after padding by the model), filters, and
        `/2` for a stride of 2. That of a product of matrices is
        `"matrix 8320x384>1536"`, with rows, inputs and units, that of a
        recurrent layer `"lstm 64x512>512"`, with steps, inputs and units.
    """
    network = _keras.flatten_layers(model)
    found = [f for f in (_named_problem(n, batch_size) for n in network) if f]
    if len(found) > 1 and type(network[-1]) is keras.layers.Dense:
        found.pop()
    return dict(found)


def _named_problem(layer: Any, batch_size) -> tuple[str, AnyProblem] | None:
    # Any: Keras's annotations lack attributes of built layers.
    kind = type(layer)
    if kind is keras.layers.Conv2D:
        rows, columns, channels, filters = layer.kernel.shape
        images = tuple(layer.input.shape[1:3])
        stride = f"/{layer.strides[0]}" if max(layer.strides) > 1 else ""
        size = f"{images[0]}x{images[1]}x{channels}>{filters}{stride}"
        return f"{rows}x{columns} {size}", kernels.Problem(
            kernel=(rows, columns, channels, filters),
            images=(batch_size, *images),
            strides=tuple(layer.strides),
            padding=layer.padding.upper(),
            dilations=tuple(layer.dilation_rate),
        )
    if kind is keras.layers.Dense:
        rows = batch_size * math.prod(layer.input.shape[1:-1])
        inputs, units = layer.kernel.shape
        return f"matrix {rows}x{inputs}>{units}", kernels.Problem(
            kernel=(1, 1, inputs, units), images=(rows, 1, 1), matrix=True
        )
    if kind in (keras.layers.LSTM, keras.layers.GRU):
        name = kind.__name__.lower()
        _, steps, inputs = layer.input.shape
        return f"{name} {steps}x{inputs}>{layer.units}", kernels.Recurrence(
            name,
            (batch_size, steps, inputs),
            layer.units,
            returns=layer.return_sequences,
        )
    return None


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
    """Measures each layer of a network, dense and sparse.

    Args:
        model: One of `networks.NETWORKS`.
        densities: Densities of random masks.
        granularities: Names of the masks' patterns.
        batch_size: Examples in a call.
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
    check(model, densities, rounds, batch_sizes=[batch_size], networks=NETWORKS)
    densities = sorted(densities)
    patterns = _patterns(granularities)
    about = machine()
    found = layer_problems(NETWORKS[model](), batch_size)
    if patterns != [Element()] and any(map(_is_recurrent, found.values())):
        raise ValueError(
            "Recurrent layers are measured with masks of single weights. "
            f"Received: granularities={list(granularities)!r}. Leave them out, "
            "or choose a model without recurrent layers."
        )
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


def _is_recurrent(problem):
    return isinstance(problem, kernels.Recurrence)


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
    if _is_recurrent(problem):
        return _recurrent_sides(problem, densities)
    draw = np.random.default_rng(0)

    def normal(*shape):
        return tf.constant(draw.standard_normal(shape, np.float32))

    if problem.matrix:
        shape, inputs = problem.kernel[2:], problem.images[:1]
        dense, sparse = tf.matmul, kernels.sparse_dense
    else:
        shape, inputs = problem.kernel, problem.images
        settings = {
            "strides": problem.strides,
            "padding": problem.padding,
            "dilations": problem.dilations,
        }
        dense = functools.partial(tf.nn.convolution, **settings)
        sparse = functools.partial(kernels.sparse_conv2d, **settings)
    inputs, kernel = normal(*inputs, shape[-2]), normal(*shape)
    outputs = dense(inputs, kernel)
    upstream = normal(*outputs.shape)

    def calls(product):
        @tf.function(autograph=False)
        def forward(inputs, kernel):
            return product(inputs, kernel)

        @tf.function(autograph=False)
        def both(inputs, kernel, upstream):
            with tf.GradientTape() as tape:
                tape.watch([inputs, kernel])
                outputs = product(inputs, kernel)
            return outputs, tape.gradient(
                outputs, [inputs, kernel], output_gradients=upstream
            )

        return {
            FORWARD: lambda: forward(inputs, kernel),
            BOTH: lambda: both(inputs, kernel, upstream),
        }

    sides: dict[tuple[str, float | None], Callable] = {
        (side, None): call for side, call in calls(dense).items()
    }
    for pattern, density in itertools.product(patterns, densities):
        mask = tf.constant(_drawn(draw, shape, density, pattern))
        product = functools.partial(sparse, mask=mask)
        check_same_outputs(
            product(inputs, kernel), dense(inputs, tf.where(mask, kernel, 0.0))
        )
        for side, call in calls(product).items():
            sides[_named(side, pattern), density] = call
    if problem.matrix:
        return sides, f"{problem.batch} rows"
    rows, columns = outputs.shape[1:3]
    return sides, f"{rows}x{columns} outputs"


def _recurrent_sides(problem, densities):
    """The same of a recurrent layer. Keras's dense one multiplies by masks."""
    sides = {}
    for side, density in itertools.product((FORWARD, BOTH), densities):
        made = problem.sides(density, backward=side == BOTH, in_lanes=False)
        if side == FORWARD:
            check_same_outputs(made["sparse"](), made["dense"]())
        sides[side, density] = made["sparse"]
        sides[side, None] = made["dense"]
    return sides, f"{problem.sequences[1]} steps"
