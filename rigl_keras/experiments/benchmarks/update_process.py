"""One side of `bin/benchmark updates`: a process that trains one network.

It takes its options as JSON. For each line of input it runs a round, and
answers with a line of JSON. Other output goes to the standard error.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras import _keras
from rigl_keras.experiments.benchmarks.training_steps import stepper
from rigl_keras.masking.tracing import looking_at

__all__ = ["KINDS", "METHODS", "NETWORKS"]

METHODS = {"GSE": rigl_keras.GSE, "RigL": rigl_keras.RigL}
NETWORKS = ("wide_resnet", "dense")
# The steps of a round, in order. Masks are new in the second.
KINDS = ("update", "step after it", "step")


def _network(name, size, batch_size):
    """Returns a model, its loss, and a batch of inputs and labels."""
    draw = np.random.default_rng(0)

    def normal(*shape):
        return draw.standard_normal(shape, np.float32)

    if name == "dense":
        layers = [keras.Input((size,)), keras.layers.Dense(size)]
        batch = normal(batch_size, size), normal(batch_size, size)
        return keras.Sequential(layers), keras.losses.MeanSquaredError(), batch
    batch = normal(batch_size, 32, 32, 3), np.arange(batch_size) % 10
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return rigl_keras.models.wide_resnet(), loss, batch


def _peak(run: Callable[[], object]) -> int | None:
    """Returns the peak memory of a call, above the memory before it.

    It is resident memory, in bytes. None if it is not known.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status()["VmRSS"]
        run()
        return max(0, _status()["VmHWM"] - before)
    except (OSError, KeyError):
        return None


def _status():
    lines = Path("/proc/self/status").read_text().splitlines()
    of = dict(line.split(":", 1) for line in lines)
    return {n: int(of[n].split()[0]) << 10 for n in ("VmRSS", "VmHWM")}


def _backward(model, loss, method, batch, *, update):
    """Returns a function that computes only the gradients of a step."""
    x, y = (tf.constant(part) for part in batch)

    @tf.function(autograph=False)
    def run(x, y):
        layers = list(rigl_keras.masked_layers(model))
        step = tf.cast(model.optimizer.iterations, tf.int64)
        looked = [method.looks_at(m, step) for m in layers] if update else []
        masks = {
            id(m.kernel): mask
            for m, mask in zip(layers, looked, strict=False)
            if mask is not None
        }
        with looking_at(masks), tf.GradientTape() as tape:
            if update:
                with rigl_keras.dense_gradients():
                    outputs = model(x, training=True)
            else:
                outputs = model(x, training=True)
            value = loss(y, outputs)
        return tape.gradient(
            value, [_keras.stored_value(m.kernel) for m in layers]
        )

    def call():
        # All gradients exist at once, as for an optimizer.
        gradients: Any = run(x, y)
        return float(tf.reshape(gradients[-1], [-1])[0])

    return call


def _sides(options) -> Iterator[dict[str, Any]]:
    """Yields the results of each round."""
    keras.utils.set_random_seed(0)
    name, batch_size = options["network"], options["batch_size"]
    model, loss, batch = _network(name, options["size"], batch_size)
    model = rigl_keras.sparsify(model, options["density"])
    method = METHODS[options["method"]](
        frequency=len(KINDS), end_step=10**7, drop_fraction=0.2
    )
    step = stepper(
        model,
        tf.data.Dataset.from_tensors(batch).repeat(),
        method,
        {},
        loss=loss,
    )
    for _ in range(2 * len(KINDS)):  # tracing and warm-up; next is an update
        step()
    passes = {}
    if options["memory"]:
        for kind, update in (("update", True), ("step", False)):
            call = _backward(model, loss, method, batch, update=update)
            call()
            call()
            passes[kind] = call
    yield {"ready": True}
    while True:
        found: dict[str, Any] = {}
        if passes:
            found["backward"] = {k: _peak(call) for k, call in passes.items()}
            found["peak"] = {kind: _peak(step) for kind in KINDS}
        else:
            found["seconds"] = {kind: _seconds(step) for kind in KINDS}
        yield found


def _seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    for found in _sides(json.loads(sys.argv[1])):
        print(json.dumps(found), flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main()
