"""Times training steps of whole networks, with sparse and dense products."""

import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras.experiments.benchmarks import torch_network
from rigl_keras.experiments.benchmarks.kernel_comparison import (
    AMORTISED,
    AUTO,
    DENSE,
    MASKED,
    TORCH,
    UPDATE,
    UPDATES,
    Keep,
    Say,
    check,
    machine,
    measurements,
    timed_in_turns,
)
from rigl_keras.experiments.benchmarks.networks import NETWORKS
from rigl_keras.experiments.benchmarks.speed_tables import (
    Measurement,
    table_head,
)
from rigl_keras.experiments.benchmarks.training_steps import stepper

__all__ = ["measure_training"]


def measure_training(
    model: str = "wide_resnet",
    densities: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    distributions: Sequence[str] = ("uniform", "erdos_renyi_kernel"),
    *,
    batch_size: int = 128,
    rounds: int = 7,
    torch: bool = False,
    say: Say = print,
    keep: Keep | None = None,
) -> list[Measurement]:
    """Measures training steps of a network, dense and with RigL.

    All sides go through the function that `fit` calls for a batch. RigL
    updates masks in one of a hundred steps, which then needs dense gradients.
    Steps with an update are measured as a separate side, and the mean over a
    hundred steps is computed. Another side has masks, but dense products.

    Args:
        model: One of `networks.NETWORKS`.
        densities: Fractions of the masked weights kept.
        distributions: How density is spread over layers. All sides of a
            distribution take turns.
        batch_size: Examples in a step.
        rounds: Turns of each side.
        torch: Whether to measure PyTorch (`torch_training_step`).
        say: Called with each line of the tables.
        keep: Called with all measurements so far, each time new ones come.

    Returns:
        Measurements.

    Raises:
        ValueError: An argument is out of range.
    """
    check(
        model,
        densities,
        rounds,
        distributions,
        batch_sizes=[batch_size],
        networks=NETWORKS,
    )
    densities = sorted(densities)
    about = machine()
    if torch and not torch_network.is_installed():
        say(f"PyTorch is not measured: {torch_network.INSTALL}")
        torch = False
    measured = []
    for distribution in distributions:
        say(
            table_head(
                f"Training step of {model}, masks {distribution}, batch "
                f"{batch_size}: {about}",
                densities,
            )
        )
        sides = _train_sides(model, densities, distribution, batch_size, torch)
        seconds = timed_in_turns(sides, rounds, f"{model}, {distribution}")
        for density in densities:
            turns = zip(
                seconds[AUTO, density], seconds[UPDATE, density], strict=True
            )
            seconds[AMORTISED, density] = [
                (1 - UPDATES) * plain + UPDATES * update
                for plain, update in turns
            ]
            if torch:  # its step does not depend on the density
                seconds[TORCH, density] = seconds[TORCH, None]
        names = [AUTO, UPDATE, AMORTISED, MASKED, *([TORCH] * torch)]
        measured += measurements(
            seconds,
            dict.fromkeys(names, DENSE),
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


def _train_sides(name, densities, distribution, batch_size, torch):
    """Returns `{(side, density or None): call}`."""
    dense = NETWORKS[name]()
    draw = np.random.default_rng(0)
    inputs = draw.standard_normal(
        (batch_size, *dense.input_shape[1:]), np.float32
    )
    labels = np.arange(batch_size) % dense.output_shape[-1]
    batches = tf.data.Dataset.from_tensors((inputs, labels)).repeat()

    def sparse(density, product):
        return rigl_keras.sparsify(
            dense, density, distribution=distribution, product=product
        )

    sides = {}
    for density in densities:
        # Updates have a separate model, as the step after an update orders
        # the weights again. This is a cost of the update.
        for side, product, frequency in (
            (AUTO, "auto", 10**6),
            (UPDATE, "auto", 1),
            (MASKED, "dense", 10**6),
        ):
            method = rigl_keras.RigL(frequency=frequency, end_step=10**7)
            sides[side, density] = stepper(
                sparse(density, product), batches, method, {}
            )
    if torch:
        step = torch_network.torch_training_step(
            sparse(min(densities), "dense")
        )
        sides[TORCH, None] = functools.partial(step, inputs, labels)
    sides[DENSE] = stepper(dense, batches, None, {})
    return sides
