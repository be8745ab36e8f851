"""What an epoch logs in addition to Keras's metrics."""

import math
import time
from typing import Any

import keras
import tensorflow as tf

import rigl_keras
from rigl_keras.experiments.runs.run_callbacks import Trajectory
from rigl_keras.experiments.runs.training_cost import TrainingCost

__all__ = ["EpochLogs"]


class EpochLogs(keras.callbacks.Callback):
    """Adds step, rate, seconds, density and cost to the logs of an epoch.

    It does not change what the method logs.

    Args:
        network: The model, masked or not.
        cost: What it costs.
        trajectory: The connections of each layer.
    """

    def __init__(
        self, network: keras.Model, cost: TrainingCost, trajectory: Trajectory
    ):
        super().__init__()
        self._masked = rigl_keras.masked_layers(network).named
        self._cost, self._trajectory = cost, trajectory

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    # Any: Keras's annotations declare both the logs and the model as None.
    def on_epoch_end(self, epoch, logs: Any = None):
        model: Any = self.model
        optimizer = model.optimizer
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
            for layer in self._cost.count.layers
        )
        logs["inference_flops_ratio"] = now / self._cost.dense_flops
        logs["training_flops_ratio"] = self._cost.ratio_so_far(epoch + 1, step)
        logs["seconds"] = round(time.perf_counter() - self._start, 2)

    def _density(self, connections):
        if self._cost.share_of_dense is not None:
            return self._cost.share_of_dense
        weights = sum(math.prod(m.kernel.shape) for m in self._masked.values())
        return connections / weights if weights else 1.0


def _dropped(connections, grown):
    """Returns the share of the connections that the last update dropped."""
    if len(connections) < 2 or not connections[-2]:
        return 0.0
    before, after = connections[-2:]
    return (before - after + grown) / before
