"""Times a training step, dense and with RigL."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras._timing import interleaved

__all__ = ["print_steps", "stepper", "measure_steps"]


def measure_steps(
    *,
    depth: int = 22,
    width: int = 2,
    batch_size: int = 128,
    density: float = 0.1,
    rounds: int = 15,
    jit_compile: bool = False,
    steps_per_execution: int = 1,
) -> dict[str, float]:
    """Times a training step of a wide ResNet, dense and with RigL.

    All go through the function that `fit` calls for a batch. The timed steps
    of `RigL` have no mask update; those of `update` are mask updates.

    Args:
        depth: Depth of the network.
        width: Width of the network.
        batch_size: Images in a step.
        density: Fraction of the weights kept.
        rounds: Timed calls of each side.
        jit_compile: As in `model.compile`.
        steps_per_execution: Steps of a call, as in `model.compile`.

    Returns:
        `{"dense" | "RigL" | "update": median seconds of a step}`.
    """
    options = {
        "jit_compile": jit_compile,
        "steps_per_execution": steps_per_execution,
    }
    images = np.random.default_rng(0).standard_normal(
        (batch_size, 32, 32, 3), np.float32
    )
    labels = np.arange(batch_size) % 10
    batches = tf.data.Dataset.from_tensors((images, labels)).repeat()
    dense = rigl_keras.models.wide_resnet(depth, width)
    sides = {
        "dense": stepper(dense, batches, None, options),
        "RigL": stepper(
            rigl_keras.sparsify(dense, density),
            batches,
            rigl_keras.RigL(frequency=10**6, end_step=10**7),
            options,
        ),
        "update": stepper(
            rigl_keras.sparsify(dense, density),
            batches,
            rigl_keras.RigL(frequency=1, end_step=10**7),
            options,
        ),
    }
    seconds = interleaved(sides, rounds=rounds)
    return {name: s / steps_per_execution for name, s in seconds.items()}


def stepper(
    model: keras.Model,
    batches: tf.data.Dataset,
    method: rigl_keras.MaskUpdate | None,
    options: Mapping,
    *,
    optimizer: keras.Optimizer | None = None,
    loss: keras.losses.Loss | None = None,
) -> Callable[[], None]:
    """Returns a function that trains a model on one batch, as `fit` does.

    Args:
        model: A model, dense or masked. This function compiles it.
        batches: An infinite dataset of pairs of inputs and labels.
        method: The mask update, or None.
        options: Options for `model.compile`.
        optimizer: The optimizer. None: SGD with Nesterov momentum.
        loss: The loss. None: sparse categorical cross-entropy from logits.
    """
    model.compile(
        optimizer or keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
        loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **options,
    )
    model.optimizer.build(model.trainable_variables)
    model.test_step(next(iter(batches)))  # builds the metrics, traces nothing
    model.make_train_function(force=True)
    if method is not None:
        method.set_model(model)
        method.set_params({"epochs": 1, "steps": 10**7, "verbose": 0})
        method.on_train_begin()
        method.on_epoch_begin(0)
    iterator: Iterator = iter(batches)
    made: Any = model  # Any: Keras declares `train_function` as None

    def step():
        float(made.train_function(iterator)["loss"])

    return step


def print_steps(
    said: str, batch_size: int, rounds: int, **options
) -> dict[str, float]:
    seconds = measure_steps(batch_size=batch_size, rounds=rounds, **options)
    print(
        f"Training step, WRN-22-2 at batch {batch_size}{said}, median of "
        f"{rounds}, interleaved"
    )
    for name, label in (
        ("dense", "dense"),
        ("RigL", "RigL at density 0.1, a step without update"),
        ("update", "RigL at density 0.1, a step that is an update"),
    ):
        print(
            f"  {label:46}{1e3 * seconds[name]:9.1f} ms"
            f"{seconds[name] / seconds['dense']:8.3f}x",
            flush=True,
        )
    return seconds
