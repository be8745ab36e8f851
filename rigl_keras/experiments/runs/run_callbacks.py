"""What a run writes as it goes: metrics, trajectory, weights."""

import math
import time
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras.experiments.runs.run_directory import RunDirectory

__all__ = ["EpochLogs", "KeepWeights", "Metrics", "Trajectory"]


class Metrics(keras.callbacks.Callback):
    """Keeps metrics.csv, a row for each epoch.

    Args:
        run: The run directory.
        first_epoch: With which this process begins. Rows from there on are of
            epochs that are about to be trained again, and forgotten.
    """

    def __init__(self, run: RunDirectory, *, first_epoch: int):
        super().__init__()
        self._run = run
        self._rows = [
            row for row in run.metrics if int(row["epoch"]) < first_epoch
        ]

    def on_epoch_end(self, epoch, logs=None):
        self._rows.append({"epoch": epoch, **logs})
        self._run.write_metrics(self._rows)


class Trajectory(keras.callbacks.Callback):
    """Keeps trajectory.csv, epoch by epoch.

    Args:
        run: The run directory.
        model: The masked model.
        method: Its mask update, or None.
        first_step: The step with which this process begins. Updates from
            there on are about to be repeated, and forgotten.
    """

    def __init__(self, run: RunDirectory, model, method, *, first_step: int):
        super().__init__()
        self._run, self._method = run, method
        masked = rigl_keras.masked_layers(model).named
        self._names = {id(m.kernel): name for name, m in masked.items()}
        counts = {
            name: int(np.count_nonzero(m.mask.numpy()))
            for name, m in masked.items()
        }
        start, *updates = run.trajectory or [(first_step, counts)]
        self._rows = [start, *(row for row in updates if row[0] < first_step)]
        run.write_trajectory(self._rows)

    @property
    def rows(self) -> list[tuple[int, dict[str, int]]]:
        """All rows until now, `[(step, {layer: connections})]`."""
        method = self._method
        updates = method.trajectory[1:] if method else []
        names = (
            [self._names[id(m.kernel)] for m in method.masked] if method else []
        )
        _, counts_at_start = self._rows[0]
        new = [
            # Layers that are not trained keep theirs.
            (
                step,
                counts_at_start | dict(zip(names, counts, strict=True)),
            )
            for step, counts in updates
        ]
        return [*self._rows, *new]

    def on_epoch_end(self, epoch, logs=None):
        self._run.write_trajectory(self.rows)


class KeepWeights(keras.callbacks.Callback):
    """Saves the weights after some epochs, for later runs to rewind to.

    Args:
        run: The run directory.
        epochs: After how many epochs.
    """

    def __init__(self, run: RunDirectory, epochs: Sequence[int]):
        super().__init__()
        self._run, self._epochs = run, set(epochs)

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in self._epochs:
            plain = self.model
            if rigl_keras.masked_layers(plain):
                plain = rigl_keras.strip(plain)
            self._run.save_weights(plain, epoch + 1)


class EpochLogs(keras.callbacks.Callback):
    """Adds step, rate, seconds, density and cost to the logs of an epoch.

    What the method logs is left as it is.

    Args:
        network: The model, masked or not.
        cost: Its `count`.
        trajectory: The connections of each layer.
        dense_flops: Inference FLOPs of the dense model.
        training_ratio: Returns the training FLOPs so far over those of the
            dense model's whole training, given epochs and steps so far.
        share_of_dense: Of a small dense network, its density.
    """

    def __init__(
        self,
        network,
        cost,
        trajectory,
        *,
        dense_flops,
        training_ratio,
        share_of_dense,
    ):
        super().__init__()
        self._masked = rigl_keras.masked_layers(network).named
        self._cost = cost
        self._trajectory = trajectory
        self._dense_flops = dense_flops
        self._training_ratio = training_ratio
        self._share_of_dense = share_of_dense

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        optimizer = self.model.optimizer
        step = int(optimizer.iterations.numpy())
        logs["step"] = step
        logs["learning_rate"] = float(
            tf.convert_to_tensor(optimizer.learning_rate)
        )
        connections = [sum(now.values()) for _, now in self._trajectory.rows]
        logs.setdefault("density", self._density(connections[-1]))
        logs.setdefault("grown", 0.0)
        logs.setdefault("drop_fraction", _dropped(connections, logs["grown"]))
        now = sum(
            layer.flops_at(
                self._masked[layer.name].density if layer.masked else 1.0
            )
            for layer in self._cost.layers
        )
        logs["inference_flops_ratio"] = now / self._dense_flops
        logs["training_flops_ratio"] = self._training_ratio(epoch + 1, step)
        logs["seconds"] = round(time.perf_counter() - self._start, 2)

    def _density(self, connections):
        if self._share_of_dense is not None:
            return self._share_of_dense
        weights = sum(math.prod(m.kernel.shape) for m in self._masked.values())
        return connections / weights if weights else 1.0


def _dropped(connections, grown):
    """Returns the share of the connections that the last update dropped."""
    if len(connections) < 2 or not connections[-2]:
        return 0.0
    before, after = connections[-2:]
    return (before - after + grown) / before
