"""Times training steps of a language model: sparse, dense, and PyTorch."""

import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras import _checks, _timing
from rigl_keras.experiments import data
from rigl_keras.experiments.benchmarks import torch_language, torch_network
from rigl_keras.experiments.benchmarks.csv_files import write_rows
from rigl_keras.experiments.benchmarks.kernel_comparison import machine
from rigl_keras.experiments.benchmarks.training_steps import stepper
from rigl_keras.experiments.runs.optimizers import adamw

__all__ = ["Step", "measure_language_steps", "sizes", "write_steps"]

_TEXT = "python_docs"
_NEVER, _ALWAYS = 10**6, 1  # steps between two mask updates
_UPDATES = 0.01  # fraction of steps that are updates, at a frequency of 100
KERAS, TORCH = "Keras, dense", "PyTorch, dense"
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The times of a training step of one side.

    Attributes:
        side: What was measured.
        density: Fraction of the masked weights kept; 1 for a dense side.
        product: As in `sparsify`; empty for a dense side.
        sparse_kernels: Number of kernels with sparse products.
        seconds: Median over turns.
        least_seconds: Minimum over turns.
        dense_seconds: Median of dense Keras, in the same rounds.
        dense_least_seconds: Minimum of dense Keras.
        parameters: Parameters of the dense model.
        batch_size, context, layers, width, heads: Sizes of the step.
        rounds: Turns of each side.
        machine: Instruction set and cores.
        versions: Versions of the packages.
    """

    side: str
    density: float
    product: str
    sparse_kernels: int
    seconds: float
    least_seconds: float
    dense_seconds: float
    dense_least_seconds: float
    parameters: int
    batch_size: int
    context: int
    layers: int
    width: int
    heads: int
    rounds: int
    machine: str
    versions: str

    @property
    def speed_up(self) -> float:
        """How many times faster than dense Keras, by the medians."""
        return self.dense_seconds / self.seconds

    @property
    def least_speed_up(self) -> float:
        """How many times faster than dense Keras, by the minima."""
        return self.dense_least_seconds / self.least_seconds


def measure_language_steps(
    *,
    densities: Sequence[float] = (0.1, 0.05),
    products: Sequence[str] = ("auto",),
    batch_size: int = 8,
    context: int = 256,
    layers: int = 12,
    width: int = 512,
    heads: int = 8,
    rounds: int = 5,
    updates: bool = True,
    torch: bool = False,
    say: Say = print,
) -> list[Step]:
    """Measures training steps of a GPT, dense and with RigL.

    All sides train on the same batch of text, with AdamW and clipped
    gradients, through the function that `fit` calls. Steps with and without a
    mask update are measured as separate sides. The mean time with one update
    in a hundred steps follows from both.

    Args:
        densities: Fractions of the masked weights kept, with ERK masks.
        products: Products to measure, as in `sparsify`.
        batch_size: Windows in a step.
        context, layers, width, heads: As in `models.gpt`.
        rounds: Turns of each side.
        updates: Whether to measure mask updates too. This takes twice the
            memory.
        torch: Whether to measure PyTorch (`torch_gpt_step`).
        say: Called with each line.

    Returns:
        A `Step` of each side, dense Keras first.

    Raises:
        ValueError: An argument is out of range.
    """
    for density in densities:
        _checks.number(
            "densities", density, above=0, at_most=1, rule="must be in (0, 1]"
        )
    for product in products:
        _checks.choice("products", product, ("auto", "sparse", "dense"))
    _checks.integer("batch_size", batch_size, at_least=1)
    _checks.integer("rounds", rounds, at_least=1)
    if torch and not torch_network.is_installed():
        say(f"PyTorch is not measured: {torch_network.INSTALL}")
        torch = False
    text = data.load(_TEXT, context=context)
    batch = text.train(batch_size=batch_size, seed=0, epochs=1).take(1)
    # Copies, because PyTorch does not take read-only arrays.
    tokens, following = map(np.array, next(batch.as_numpy_iterator()))
    symbols = text.recipe.num_classes
    dense = rigl_keras.models.gpt(symbols, context, layers, width, heads)
    batches = tf.data.Dataset.from_tensors(
        (tokens, tf.one_hot(following, symbols))
    ).repeat()

    def side(model, method=None):
        return stepper(
            model,
            batches,
            method,
            {},
            optimizer=adamw(),
            loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        )

    calls: dict[tuple, Callable[[], Any]] = {(KERAS, 1.0, ""): side(dense)}
    models = {}
    for density in densities:
        for product in products:
            kinds = {"RigL": _NEVER} | ({"update": _ALWAYS} if updates else {})
            for said, frequency in kinds.items():
                model = rigl_keras.sparsify(dense, density, product=product)
                models[said, density, product] = model
                calls[said, density, product] = side(
                    model,
                    rigl_keras.RigL(frequency=frequency, end_step=10**7),
                )
    if torch:
        step = torch_language.torch_gpt_step(dense)
        calls[TORCH, 1.0, ""] = functools.partial(step, tokens, following)
    for (said, density, product), call in calls.items():
        say(f"Tracing {said} {density:g} {product}".rstrip() + " ...")
        call()
        call()
    say(f"{rounds} rounds of {len(calls)} sides ...")
    seconds = _timing.turns(calls, rounds=rounds)
    about = {
        "parameters": dense.count_params(),
        "batch_size": batch_size,
        "context": context,
        "layers": layers,
        "width": width,
        "heads": heads,
        "rounds": rounds,
        "machine": machine(),
    }
    steps = _steps(seconds, _sparse_kernels(models), about)
    for line in _lines(steps):
        say(line)
    return steps


def _sparse_kernels(models: Mapping[tuple, keras.Model]) -> dict[tuple, int]:
    """Returns the number of kernels of each model with sparse products."""
    found = {}
    for key, model in models.items():
        # The last choice of a kernel is the one of the training step.
        chosen = [
            list(masked.chosen_products().values())
            for masked in rigl_keras.masked_layers(model)
        ]
        found[key] = sum(bool(c) and c[-1].sparse for c in chosen)
    return found


def _steps(seconds, sparse_kernels, about) -> list[Step]:
    dense = seconds[KERAS, 1.0, ""]
    amortised = {}
    for (said, density, product), turns in seconds.items():
        if said == "RigL" and ("update", density, product) in seconds:
            update = seconds["update", density, product]
            amortised["RigL, 1 update in 100", density, product] = [
                (1 - _UPDATES) * a + _UPDATES * b
                for a, b in zip(turns, update, strict=True)
            ]
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("tensorflow", "keras", "torch")
        if name != "torch" or (TORCH, 1.0, "") in seconds
    )
    return [
        Step(
            side="RigL, a mask update" if said == "update" else said,
            density=density,
            product=product,
            sparse_kernels=sparse_kernels.get(
                ("update" if said == "update" else "RigL", density, product), 0
            ),
            seconds=float(np.median(turns)),
            least_seconds=min(turns),
            dense_seconds=float(np.median(dense)),
            dense_least_seconds=min(dense),
            versions=versions,
            **about,
        )
        for (said, density, product), turns in {**seconds, **amortised}.items()
    ]


def _lines(steps):
    first = steps[0]
    yield (
        f"Training step of a GPT, {sizes(first)}: {first.machine}; "
        f"{first.rounds} interleaved turns"
    )
    yield f"  {'':46}{'median s':>10}{'':>9}{'least s':>10}"
    for step in steps:
        name = step.side
        if step.product:
            name += f" at {step.density:g}, product={step.product}"
        yield (
            f"  {name:46}{step.seconds:10.3f}{step.speed_up:8.2f}x"
            f"{step.least_seconds:10.3f}{step.least_speed_up:8.2f}x"
        )


def sizes(step: Step) -> str:
    """Returns the sizes of a step, for a title."""
    return (
        f"{step.parameters / 1e6:.0f} M parameters, batch {step.batch_size} x "
        f"{step.context} characters"
    )


def write_steps(steps: Sequence[Step], path: str | os.PathLike) -> None:
    """Writes steps as CSV, whole or not at all.

    Args:
        steps: At least one step.
        path: The file.
    """
    write_rows([dataclasses.asdict(step) for step in steps], path)
