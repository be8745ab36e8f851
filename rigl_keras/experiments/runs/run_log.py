"""The log of a run, in its folder, in TensorBoard and at the terminal."""

from collections.abc import Mapping

import keras
import numpy as np

import rigl_keras
from rigl_keras.experiments.runs.batches import Batches
from rigl_keras.experiments.runs.epoch_logs import EpochLogs
from rigl_keras.experiments.runs.epoch_table import EpochTable
from rigl_keras.experiments.runs.run_callbacks import Metrics, Trajectory
from rigl_keras.experiments.runs.run_directory import RunDirectory
from rigl_keras.experiments.runs.starting_point import StartingPoint
from rigl_keras.experiments.runs.tensorboard_log import TensorBoardLog
from rigl_keras.experiments.runs.training_cost import TrainingCost
from rigl_keras.training.step_update import StepUpdate

__all__ = ["RunLog"]


class RunLog:
    """The log of a run: its connections, cost and metrics.

    Every worker has one, and one worker writes it.

    Args:
        run: The run directory.
        start: What the run started with, restored if it is resumed.
        update: The mask update, or None.
        batches: The batches of the run.
        epochs: The epochs that are left, from the first of this process to the
            last of the run.
        length: Length of the run, relative to the dense model's training.

    Attributes:
        cost: What the run costs.
        callbacks: The callbacks that log, in order. They come after the mask
            update and `TopologyDiagnostics`, whose logs they read.
    """

    cost: TrainingCost
    callbacks: list[keras.callbacks.Callback]

    def __init__(
        self,
        run: RunDirectory,
        start: StartingPoint,
        update: StepUpdate | None,
        *,
        batches: Batches,
        epochs: range,
        length: float,
    ):
        self._run = run
        trajectory = Trajectory(run, start.network, update)
        self.cost = TrainingCost(
            start, trajectory, update, epochs=epochs.stop, length=length
        )
        self.callbacks = [
            trajectory,
            EpochLogs(start.network, self.cost, trajectory),
        ]
        self._board = None
        if not run.writes:
            return
        self._board = TensorBoardLog(
            run,
            trajectory,
            self.cost.count,
            first_epoch=epochs.start,
            epochs=epochs.stop,
        )
        done = run.metrics_before(epochs.start)
        table = EpochTable(
            epochs=epochs,
            steps_per_epoch=batches.steps_per_epoch,
            about=_about(start, update, batches, epochs.stop),
            earlier=[float(row["seconds"]) for row in done],
        )
        self.callbacks += [
            Metrics(run, first_epoch=epochs.start),
            self._board,
            table,
        ]

    def finish(
        self, test: Mapping[str, float], *, curves: tuple[np.ndarray, ...]
    ) -> None:
        """Writes flops.csv, and the test metrics for TensorBoard.

        Args:
            test: Metrics on the test examples.
            curves: Inference and training FLOPs of each step.
        """
        inference, training = curves
        self._run.write_curve(inference, training)
        if self._board is not None:
            self._board.write_test(len(training), test)


def _about(start, update, batches, epochs):
    """Returns a description of a run, to print before it, by labels."""
    network, examples = start.network, batches.examples
    method = start.initialization.kind if update is None else update.name
    trained = f"{method}, {network.name}"
    if rigl_keras.masked_layers(network):
        density = rigl_keras.count(network).density
        trained += f", density {density:.4f} of masked weights"
    steps = batches.steps_per_epoch
    return {
        "method": trained,
        "data": f"{examples.recipe.name}, {examples.training_examples:,} "
        f"examples an epoch, seed {batches.seed}",
        "steps": f"{epochs * steps:,}: {epochs} epochs of {steps:,}, batch "
        f"{batches.batch_size}",
    }
