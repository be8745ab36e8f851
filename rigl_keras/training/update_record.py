"""Records of updates, written by the device and read by the host.

A training step does not wait for the host. It records each update in variables,
which the host reads from time to time.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from rigl_keras._tensor_checks import count_kept
from rigl_keras.masking.masked import KernelMask
from rigl_keras.training.attachment import Attachment

__all__ = [
    "APPLIED_TWICE",
    "FETCH_EVERY",
    "NOT_DENSE",
    "NOT_FINITE",
    "ONE_UPDATE_A_STEP",
    "UpdateRecord",
]

FETCH_EVERY = 64  # calls of the training function
_ROWS = 1024  # fewest updates that the device remembers

# Why an update was refused. The device records the index.
NOT_FINITE, NOT_DENSE, APPLIED_TWICE = range(3)
_REASONS = (
    "the gradient of a masked kernel, or the kernel, was NaN or infinite, or "
    "a score was NaN. The masks are unchanged. If training has diverged, "
    "lower the learning rate or clip gradients, and resume from a checkpoint "
    "before this step.",
    "every gradient of {layers} was exactly zero where the mask is zero, so "
    "no connection can grow by it. The masks are unchanged. Call the model "
    "within `with rigl_keras.dense_gradients():`, around the gradient tape. A "
    "tf.function that was traced outside of it must be traced again.",
    "the training step applied its optimizer more than once, so masks may "
    "have changed each time. {way_out}",
)
ONE_UPDATE_A_STEP = (
    "Make the method with end_step, call attach(model, optimizer), and in the "
    "training step call update(gradients, variables) instead of each "
    "optimizer.apply: each is then judged by its own step. Then remove it "
    "from fit's callbacks."
)


class UpdateRecord:
    """The updates of a run: refusals, counts, losses and logs.

    Args:
        attached: What is trained. Make the record in the scope of its strategy.
        last: The logged variables of the last update, by name, including
            `"grown"`.

    Attributes:
        skipped: Variable: how often loss scaling delayed an update.
        density: Variable: the density of all masked weights.
        trajectory: `[(step, counts)]`, the active connections of each masked
            layer before the first step and after each update.
        losses: `[(step, before, after)]`, the loss of an update's batch.
    """

    def __init__(self, attached: Attachment, last: Mapping[str, tf.Variable]):
        self._last = last
        self.skipped = _counter(0)
        self._refused = _counter([-1, NOT_FINITE])  # step and reason
        self._differ_at = _counter(-1)
        self.density = tf.Variable(tf.zeros([]), trainable=False)
        self.trajectory, self.losses = [], []
        self.bind(attached)

    def bind(self, attached: Attachment) -> None:
        """Switches to another optimizer, or other masked layers.

        Args:
            attached: What is trained from now on. Call this in the scope of its
                strategy, after `fetch`.
        """
        self._attached = attached
        masked = len(attached.masked)
        executed = getattr(attached.model, "steps_per_execution", 1)
        rows = max(_ROWS, FETCH_EVERY * executed)
        self._rows = _counter(tf.zeros([rows, 1 + masked], tf.int64))
        # NaN where no loss is evaluated.
        self._losses = tf.Variable(
            tf.fill([rows, 2], math.nan), trainable=False
        )
        self._seem_masked = tf.Variable(
            tf.zeros([masked], tf.bool), trainable=False
        )
        self._kept = tf.Variable(tf.constant(0), trainable=False)

    # In the graph.

    def refuse_unless(
        self, defined: tf.Tensor, step: tf.Tensor, reason: int = NOT_FINITE
    ) -> None:
        """Records that the update at a step was refused, unless `defined`.

        `check` reports the first such update.

        Args:
            defined: A bool scalar.
            step: The optimizer step, an int64 scalar.
            reason: Index of the reason.
        """
        refused = tf.stack([step, tf.constant(reason, tf.int64)])
        keeps = defined | (self._refused[0] >= 0)
        self._refused.assign(tf.where(keeps, self._refused, refused))

    def note_masked(
        self, layers: Sequence[KernelMask], masked: tf.Tensor
    ) -> None:
        """Records the layers whose gradients caused the first refusal.

        Args:
            layers: The layers that have a gradient.
            masked: A bool for each: whether its gradient seems masked.
        """
        of = dict(zip(map(id, layers), tf.unstack(masked), strict=True))
        each = tf.stack(
            [of.get(id(m), tf.constant(False)) for m in self._attached.masked]
        )
        first = self._refused[0] < 0
        self._seem_masked.assign(tf.where(first, each, self._seem_masked))

    def note_skipped(self, skipped: tf.Tensor) -> None:
        """Counts an update that loss scaling delayed.

        Args:
            skipped: A bool scalar: whether there was one.
        """
        self.skipped.assign_add(tf.cast(skipped, tf.int64))

    def note_differing(self, same: tf.Tensor, step: tf.Tensor) -> None:
        """Records that replicas have different masks, unless `same`.

        Args:
            same: A bool scalar.
            step: The optimizer step, an int64 scalar.
        """
        self._differ_at.assign(tf.where(same, self._differ_at, step))

    def note_update(
        self,
        step: tf.Tensor,
        grown: tf.Tensor,
        losses: Sequence[tf.Tensor] = (),
    ) -> None:
        """Records the masks after an update.

        Args:
            step: The optimizer step, an int64 scalar.
            grown: Number of connections that grew, an integer scalar.
            losses: The loss of its batch before and after; empty if unknown.
        """
        counts = self._counts()
        self._last["grown"].assign(tf.cast(grown, tf.float32))
        self.density.assign(self._density_of(counts))
        rows: Any = self._rows.shape[0]
        row = tf.minimum(self._kept, rows - 1)
        here = tf.expand_dims(tf.equal(tf.range(rows), row), axis=1)
        values = tf.concat([[step], counts], axis=0)
        self._rows.assign(tf.where(here, values, self._rows))
        if losses:
            self._losses.assign(tf.where(here, [[*losses]], self._losses))
        self._kept.assign(row + 1)

    def _counts(self):
        return tf.stack(
            [count_kept(m.mask.value) for m in self._attached.masked]
        )

    def _density_of(self, counts):
        weights = sum(math.prod(m.mask.shape) for m in self._attached.masked)
        return tf.cast(tf.reduce_sum(counts) / weights, tf.float32)

    # On the host.

    def not_dense(self) -> str:
        """Returns the error of gradients that were not dense."""
        # TensorFlow would escape quotes.
        names = ", ".join(m.name for m in self._attached.masked)
        return _REASONS[NOT_DENSE].format(layers=f"one of {names}")

    def begin(self, step: int) -> None:
        """Begins the trajectory with the current masks.

        Args:
            step: The optimizer step.
        """
        self.trajectory = [(step, self._counts_now())]

    def fetch(self, *, losses: bool) -> None:
        """Reads the recorded updates from the device.

        Args:
            losses: Whether to keep losses too.
        """
        kept = int(self._kept.numpy())
        if not kept:
            return
        rows = self._rows.numpy()[:kept]
        rows[:, 0] += self._attached.steps_before
        rows = rows.tolist()
        for step, *counts in rows:
            self._add(step, tuple(counts))
        if losses:
            self.losses += [
                (row[0], *loss)
                for row, loss in zip(
                    rows, self._losses.numpy()[:kept].tolist(), strict=True
                )
            ]
        self._kept.assign(0)

    def follow_masks(self, step: int) -> None:
        """Adds the current masks to the trajectory, whoever changed them.

        Args:
            step: Number of steps so far.
        """
        counts = self._counts_now()
        start = self.trajectory[0][0]
        if step <= start:
            self.trajectory = [(step, counts)]
            return
        if self.trajectory[-1][0] >= step:
            self.trajectory = [
                self.trajectory[0],
                *(row for row in self.trajectory[1:] if row[0] < step),
            ]
        if self.trajectory[-1][1] != counts:
            # Like masks of an update, they count from the next step.
            self._add(max(step - 1, start), counts)

    def check(self, method: str) -> None:
        """Raises errors that happened on the device.

        Args:
            method: Name of the method.

        Raises:
            ValueError: An update was refused, or left replicas with different
                masks.
        """
        step, reason = self._refused.numpy().tolist()
        if step >= 0:
            step += self._attached.steps_before
            seem = self._seem_masked.numpy()
            names = [
                repr(m.name)
                for m, seems in zip(self._attached.masked, seem, strict=True)
                if seems
            ]
            why = _REASONS[reason].format(
                way_out=ONE_UPDATE_A_STEP, layers=", ".join(names)
            )
            raise ValueError(
                f"{method} refused the update at step {step}: {why}"
            )
        step = int(self._differ_at.numpy())
        if step >= 0:
            step += self._attached.steps_before
            raise ValueError(
                f"After the update at step {step} the replicas hold different "
                "masks. Every process must make the model with the same seed, "
                "load the same checkpoint and pass the same arguments to "
                f"{method}. Resume from a checkpoint before this step."
            )

    def _add(self, step, counts):
        # A checkpoint may have undone this and later steps.
        while len(self.trajectory) > 1 and self.trajectory[-1][0] >= step:
            self.trajectory.pop()
        self.trajectory.append((step, counts))

    def _counts_now(self):
        counts = self._counts()
        self.density.assign(self._density_of(counts))
        return tuple(counts.numpy().tolist())


def _counter(value):
    return tf.Variable(value, trainable=False, dtype=tf.int64)
