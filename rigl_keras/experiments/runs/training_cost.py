"""The cost of a run, relative to that of the dense model."""

import numpy as np

import rigl_keras
from rigl_keras import flops
from rigl_keras.experiments.runs.run_callbacks import Trajectory
from rigl_keras.experiments.runs.starting_point import StartingPoint
from rigl_keras.flops.counting import Count
from rigl_keras.training.step_update import StepUpdate

__all__ = ["TrainingCost"]


class TrainingCost:
    """FLOPs of a run, from the masks of each of its steps.

    Args:
        start: What the run started with, restored if it is resumed.
        trajectory: The connections of each layer.
        update: The mask update, or None.
        epochs: Epochs of the run.
        length: Its length, relative to the dense model's training.

    Attributes:
        count: The `count` of the network when this process begins.
        parameters: Parameters of the dense model.
        dense_flops: Inference FLOPs of the dense model.
        share_of_dense: Parameters of a small dense network over those of the
            dense model. None for other networks.
    """

    count: Count
    parameters: int
    dense_flops: float
    share_of_dense: float | None

    def __init__(
        self,
        start: StartingPoint,
        trajectory: Trajectory,
        update: StepUpdate | None,
        *,
        epochs: int,
        length: float,
    ):
        self.count = rigl_keras.count(start.network)
        over = start.full_width or self.count
        self.parameters = over.parameters
        self.dense_flops = over.dense_inference_flops
        self.share_of_dense = None
        if start.full_width is not None:
            self.share_of_dense = self.count.nonzeros / over.parameters
        self._trajectory, self._update = trajectory, update
        self._epochs, self._length = epochs, length

    def curves(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the inference and training FLOPs of each step.

        Args:
            steps: The number of steps.
        """
        update = self._update
        return flops.training_curve(
            self.count,
            self._trajectory.rows,
            steps=steps,
            dense_gradients=update.dense_gradients if update else "never",
            gradient_batches=update.gradient_batches if update else 1,
        )

    def training_ratio(self, training: np.ndarray, *, epochs: int) -> float:
        """Returns the FLOPs of some epochs over those of the dense training.

        Args:
            training: FLOPs of each step, from `curves`.
            epochs: The number of epochs that have these steps.
        """
        share = self._length * epochs / self._epochs
        return share * float(np.mean(training)) / (3 * self.dense_flops)

    def ratio_so_far(self, epochs: int, steps: int) -> float:
        """Returns `training_ratio` after some epochs, which have `steps`."""
        _, training = self.curves(steps)
        return self.training_ratio(training, epochs=epochs)

    def closed_form(self, inference: np.ndarray) -> float | None:
        """Returns the ratio by the paper's formula, at the mean forward cost.

        It is None for methods without a formula, such as custom ones.
        """
        update = self._update
        try:
            cost = flops.training_flops(
                type(update).__name__ if update else "static",
                sparse_flops=float(np.mean(inference)),
                dense_flops=self.dense_flops,
                frequency=getattr(update, "frequency", None),
                gradient_batches=getattr(update, "gradient_batches", 1),
            )
        except ValueError:
            return None
        return self._length * cost / (3 * self.dense_flops)
