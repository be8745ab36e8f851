"""The process of one of the two workers of `bin/benchmark workers`.

Both take the same steps in the same order. The last line of the output holds
the measurements.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras.experiments.benchmarks import worker_hosts
from rigl_keras.experiments.benchmarks.networks import MODELS
from rigl_keras.replicas import MultiWorkerMirroredStrategy

__all__ = ["ACTIVE", "ALL", "DENSE", "MEASURING", "SIDES", "main"]

# Keras without masks; masks and all gradients; masks and active gradients.
DENSE, ALL, ACTIVE = SIDES = ("dense", "all", "active")
MEASURING = "Measuring."
_STEPS = 2  # in a turn


def main() -> None:
    given = json.loads(sys.argv[1])
    strategy = MultiWorkerMirroredStrategy()
    sides = {side: _stepper(strategy, side, given) for side in given["sides"]}
    for step in sides.values():
        for _ in range(2):  # tracing and warm-up
            step()
    print(MEASURING, flush=True)
    found = []
    for gigabits in given["gigabits"]:
        if gigabits:
            worker_hosts.limit(given["interface"], gigabits)
        turns = _in_turns(sides, given["rounds"], given["interface"])
        found += [
            {"side": side, "gigabits": gigabits, "bytes": b, "seconds": s}
            for side, (b, s) in turns.items()
        ]
    print(json.dumps(found), flush=True)


def _stepper(
    strategy: tf.distribute.Strategy, side: str, given: Mapping
) -> Callable[[], None]:
    """Returns a function that trains on a batch, as `fit` does."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = MODELS[given["model"]]()
        if side != DENSE:
            model = rigl_keras.sparsify(
                model, given["density"], distribution=given["distribution"]
            )
        model.compile(
            keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        model.optimizer.build(model.trainable_variables)
    if side == ALL:
        rigl_keras.exchange_gradients(model, of="all")
    if side == DENSE:
        model.make_train_function()
    else:
        method = rigl_keras.RigL(frequency=10**6, end_step=10**7)
        method.set_model(model)
        method.set_params({"epochs": 1, "steps": 10**7, "verbose": 0})
        method.on_train_begin()
        method.on_epoch_begin(0)
    size = given["batch_size"]
    images = np.random.default_rng(0).standard_normal(
        (size, *model.input_shape[1:]), np.float32
    )
    labels = np.arange(size) % model.output_shape[-1]
    batches = tf.data.Dataset.from_tensor_slices((images, labels))
    batches = batches.batch(size).repeat().with_options(_half_each())
    iterator = iter(strategy.experimental_distribute_dataset(batches))
    trained: Any = model

    def step():
        float(trained.train_function(iterator)["loss"])

    return step


def _half_each():
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return options


def _in_turns(
    sides: Mapping[str, Callable[[], None]], rounds: int, interface: str
) -> dict[str, tuple[list[float], list[float]]]:
    """Returns the bytes sent and the seconds of a step, by side and turn."""
    found = {side: ([], []) for side in sides}
    draw = random.Random(0)  # the same order on both workers
    for _ in range(rounds):
        for side in draw.sample(list(sides), len(sides)):
            before, start = worker_hosts.sent(interface), time.perf_counter()
            for _ in range(_STEPS):
                sides[side]()
            seconds = time.perf_counter() - start
            sent = worker_hosts.sent(interface) - before
            for values, value in zip(found[side], (sent, seconds), strict=True):
                values.append(value / _STEPS)
    return found


if __name__ == "__main__":
    main()
