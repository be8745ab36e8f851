"""Times inference of whole networks with sparse and with dense products."""

import functools
import tempfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras.experiments.benchmarks.kernel_comparison import (
    CALLED,
    DENSE,
    SERVED,
    TURN,
    Keep,
    Say,
    check,
    check_same_outputs,
    machine,
    measurements,
    timed_in_turns,
)
from rigl_keras.experiments.benchmarks.networks import MODELS
from rigl_keras.experiments.benchmarks.speed_tables import (
    Measurement,
    table_head,
)
from rigl_keras.exporting.base_format import WriteOptions
from rigl_keras.exporting.formats import FORMATS
from rigl_keras.exporting.signatures import signature_of

__all__ = ["measure_inference"]


def measure_inference(
    model: str = "wide_resnet",
    densities: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    distributions: Sequence[str] = ("uniform", "erdos_renyi_kernel"),
    *,
    batch_sizes: Sequence[int] = (1, 16, 128),
    rounds: int = 15,
    say: Say = print,
    keep: Keep | None = None,
) -> list[Measurement]:
    """Times calls of a network at inference, dense and sparse.

    Args:
        model: One of `networks.MODELS`.
        densities: Fractions of the masked weights kept.
        distributions: How density is spread over layers.
        batch_sizes: Images in a call. All sides of a batch size take turns.
        rounds: Turns of each side.
        say: Called with each line of the tables.
        keep: Called with all measurements so far, each time new ones come.

    Returns:
        Measurements.

    Raises:
        ValueError: An argument is out of range, or a side disagrees with the
            network.
    """
    check(model, densities, rounds, distributions, batch_sizes=batch_sizes)
    densities = sorted(densities)
    about = machine()
    dense = MODELS[model]()
    measured = []
    for distribution in distributions:
        calls: dict[Hashable, Callable] = {DENSE: _called(dense)}
        plain = {}
        for density in densities:
            network = rigl_keras.sparsify(
                dense, density, distribution=distribution
            )
            plain[density] = rigl_keras.strip(network)
            calls[CALLED, density] = _called(network)
            calls[SERVED, density] = _served(network, batch_sizes)
        for batch_size in batch_sizes:
            say(
                table_head(
                    f"Inference of {model}, masks {distribution}, batch "
                    f"{batch_size}: {about}",
                    densities,
                )
            )
            images = tf.constant(
                np.random.default_rng(0).standard_normal(
                    (batch_size, *dense.input_shape[1:]), np.float32
                )
            )
            for density, network in plain.items():
                wanted = network(images[:1], training=False)
                for side in (CALLED, SERVED):
                    check_same_outputs(calls[side, density](images)[:1], wanted)
            sides = {
                key: functools.partial(call, images)
                for key, call in calls.items()
            }
            seconds = timed_in_turns(
                sides,
                rounds,
                f"{model}, {distribution}, batch {batch_size}",
                turn=TURN,
            )
            measured += measurements(
                seconds,
                dict.fromkeys((CALLED, SERVED), DENSE),
                densities,
                say,
                model=model,
                distribution=distribution,
                batch_size=batch_size,
                rounds=rounds,
            )
            if keep:
                keep(measured)
    return measured


def _called(model):
    """Returns a model's inference as a graph, like that of `predict`."""
    # A lambda avoids the bookkeeping of a layer's call.
    return tf.function(lambda x: model(x, training=False))


def _served(
    model: keras.Model, batch_sizes: Sequence[int]
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a masked model as `format="sparse_saved_model"` serves it."""
    if rigl_keras.kernels.load() is None:
        return _called(model)
    signature = signature_of(model)
    with tempfile.TemporaryDirectory() as scratch:
        FORMATS["sparse_saved_model"].write(
            model,
            signature,
            Path(scratch),
            WriteOptions(batch_sizes=batch_sizes),
        )
        loaded = tf.saved_model.load(scratch)
        serve = loaded.signatures["serving_default"]
        (name,) = signature.inputs
        # Reads the network before the files are removed.
        serve(**{n: tf.constant(x) for n, x in signature.random(1).items()})

    # The default argument keeps `loaded` alive, which `serve` needs.
    def call(images: tf.Tensor, loaded: object = loaded) -> tf.Tensor:
        return serve(**{name: images})["output_0"]

    return call
