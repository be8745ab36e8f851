"""Records how masks move in training, and how far they explore.

The measures are functions of masks, `{layer: array of zeros and ones}`.
`TopologyDiagnostics` takes them during training, `figures` draws them.
"""

import io
import math
import os
import warnings
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import _extras, _files
from rigl_keras.diagnostics.events import forget_events
from rigl_keras.diagnostics.measures import explored, measure
from rigl_keras.diagnostics.plots import figures
from rigl_keras.diagnostics.table import (
    ALL,
    COLUMNS,
    as_csv,
    read_rows,
)
from rigl_keras.flops.counting import count
from rigl_keras.masking.masked import KernelMask
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.training.train_function import installed_update

__all__ = ["TopologyDiagnostics"]

_WORD = 32  # bits: workers can share int32 variables, but not bytes
_PREFIX = "topology/"  # prefix of TensorBoard's tags
# Columns for TensorBoard; the others are constant.
_SCALARS = tuple(
    column
    for column in COLUMNS
    if column not in ("step", "layer", "outputs", "inputs")
)


class TopologyDiagnostics(keras.callbacks.Callback):
    """Records how a model's masks move as it trains.

    A row is recorded at the start and after each update of the method that
    trains the model, in any order of the callbacks; without a method, at the
    start only. Masks are read from the device at these steps only. If one
    execution (`steps_per_execution`) has several updates, the row is that of
    the last, and includes the earlier ones.

    At the end of an epoch it logs, for all layers together, `ever_active` and
    the `churn` of the last update.

    A run resumes exactly if `variables` are in its checkpoint, or if `log_dir`
    was last written at the step from which it resumes. Otherwise exploration is
    counted from that step, with a warning.

    Args:
        log_dir: Folder for the record. None: it is kept in memory only.
            `topology.csv` has a row for each update and layer (`COLUMNS`),
            written at the end of each epoch, and `topology.npz` the state for a
            resumed run. TensorBoard's `events.*` hold the same as
            `topology/<column>/<layer>`, and `*.png` are `figures`, drawn when
            training ends if `draw`. A resumed run continues these files; a run
            that begins at step 0 replaces them.
        draw: Whether figures are drawn when training ends, which takes
            seconds.

    Attributes:
        rows: The rows, dicts with the keys `COLUMNS`. Rows of the layer `"all"`
            hold the losses of an update's batch if the method keeps them
            (`update_losses`).

    Raises:
        ImportError: `log_dir` is given and matplotlib or tensorboard is
            missing.
        ValueError: The model has no masked layer, or one named `"all"`.
        UserWarning: A resumed run is counted from its first step, or the FLOPs
            of the model cannot be counted.

    Example:

    >>> model.fit(train, epochs=250, callbacks=[
    ...     RigL(), TopologyDiagnostics("logs/topology")])
    """

    def __init__(
        self, log_dir: str | os.PathLike | None = None, *, draw: bool = True
    ):
        super().__init__()
        if log_dir is not None:
            _extras.check_installed(
                "The record of topology",
                *("tensorboard", *(["matplotlib"] if draw else [])),
                instead="Or pass log_dir=None to keep it in memory alone.",
            )
        self.draw = draw
        self.log_dir = None if log_dir is None else Path(log_dir)
        self.rows: list[dict] = []
        self._layers: dict[str, KernelMask] = {}
        self._method: Any = None  # the `StepUpdate` that changes the masks

    def set_model(self, model: keras.Model) -> None:
        """Creates the state for the masks of a model. `fit` calls it too.

        Args:
            model: A built model with masked layers.
        """
        super().set_model(model)
        layers = masked_layers(model).named
        if not layers:
            raise ValueError(
                "TopologyDiagnostics records masks, and model "
                f"{model.name!r} has no masked layer. Call model = "
                "rigl_keras.sparsify(model, density) first."
            )
        known = [id(m.mask) for m in self._layers.values()]
        if [id(m.mask) for m in layers.values()] == known:
            return
        self._layers = layers
        self._axes = {
            name: (m.found.input_axes, m.found.output_axes)
            for name, m in layers.items()
        }
        bits = sum(math.prod(m.mask.shape) for m in layers.values())
        empty = np.zeros(-(-bits // _WORD), np.int32)
        with tf.device("CPU:0"):
            self._step = tf.Variable(tf.constant(-1, tf.int64), trainable=False)
            self._initial_bits = tf.Variable(
                tf.constant(empty), trainable=False
            )
            self._ever_bits = tf.Variable(tf.constant(empty), trainable=False)

    @property
    def variables(self) -> list[tf.Variable]:
        """The state for a checkpoint, so that a run resumes exactly.

        It has the step and two bits for each connection: whether it was active
        at the start, and ever.

        Raises:
            ValueError: There is no model yet: call `set_model`.
        """
        if not self._layers:
            raise ValueError(
                "The variables of TopologyDiagnostics depend on the model: "
                "call set_model(model) before they are saved."
            )
        return [self._step, self._initial_bits, self._ever_bits]

    # Keras calls these.

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._begun = False
        self._writer = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        # Not when training begins: the method may be set up after this
        # callback, and a checkpoint restored later.
        if not self._begun:
            self._begin()
            self._begun = True

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        # Keras has already waited for the device, to show its logs.
        end = self._iterations()
        last = self._last_update(int(self._step.numpy()), end)
        if last is not None:
            self._record(last)
        self._step.assign(end)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if self._method is not None:
            self._method.fetch()
        self._take_losses()
        self._save()
        if logs is not None:
            last = self.rows[-1]
            logs["ever_active"] = last["ever_active"]
            logs["churn"] = last["churn"]

    def on_train_end(self, logs: dict | None = None) -> None:
        if self._writer is not None:
            self._writer.close()
            if self.draw:
                figures(self._csv, self._csv.parent)

    # The record.

    @property
    def _csv(self) -> Path:
        """The path of the table, if there is a folder."""
        return cast(Path, self.log_dir) / "topology.csv"

    def _iterations(self):
        if self._method is not None:  # `compile` may change the optimizer
            return self._method.steps_taken()
        model: Any = self.model
        return int(model.optimizer.iterations.numpy())

    def _masks(self):
        return {name: m.mask.numpy() > 0 for name, m in self._layers.items()}

    def _last_update(self, begin, end):
        """Returns the last step at which masks changed, or None."""
        if self._method is None:
            return None
        return self._method.last_update(begin, end)

    def _begin(self):
        """Finds the mask update, and the part of the record that continues."""
        model = cast(keras.Model, self.model)
        self._method = installed_update(model)
        if self._method is not None:
            # Early enough: the training step is traced at its first batch.
            self._method.watch_loss = True
        step = self._iterations()
        try:
            self._cost = count(model)
        except ValueError as error:
            warnings.warn(
                f"The column inference_flops stays empty: {error}", stacklevel=2
            )
            self._cost = None
        self._now = self._masks()
        state = self._remembered(step) if step else None
        if step and state is None:
            warnings.warn(
                f"TopologyDiagnostics begins at step {step} without a record "
                "that ends there: ever_active and overlap are counted again, "
                f"from step {step} on. Save its `variables` in the checkpoint, "
                "or resume with the log_dir, at the end of an epoch.",
                stacklevel=2,
            )
        self._initial, ever = state or (self._now, self._now)
        self._ever = explored(ever, self._now)
        self._remember()
        self._step.assign(step)
        self.rows = self._rows_before(step)
        kept = len(self.rows)
        if state is None or not self.rows:
            self.rows += self._measured(step, before=self._now)
        self._written = len(self.rows)
        if self.log_dir is not None:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            text = as_csv(self.rows, header=True)
            _files.write(self._csv, text)
            forget_events(self.log_dir, first_step=step, prefix=_PREFIX)
            self._writer = tf.summary.create_file_writer(str(self.log_dir))
            self._write_scalars(self.rows[kept:])

    def _rows_before(self, step):
        """Returns the rows that a run which begins at a step continues."""
        rows = self.rows
        if not rows and step and self.log_dir is not None:
            rows = read_rows(self._csv) if self._csv.exists() else []
        if {row["layer"] for row in rows} != {*self._layers, ALL}:
            return []
        return [row for row in rows if row["step"] < step]

    def _record(self, step):
        before, self._now = self._now, self._masks()
        self._ever = explored(self._ever, self._now)
        self._remember()
        rows = self._measured(step, before=before)
        self.rows += rows
        self._write_scalars(rows)

    def _measured(self, step, *, before):
        return measure(
            step,
            self._now,
            before=before,
            initial=self._initial,
            ever=self._ever,
            cost=self._cost,
            axes=self._axes,
        )

    def _take_losses(self):
        """Adds the losses of updates that the method has fetched."""
        losses = {
            step: {"loss_before": before, "loss_after": after}
            for step, before, after in getattr(
                self._method, "update_losses", []
            )
        }
        pending = [
            row
            for row in self.rows[self._written :]
            if row["layer"] == ALL and row["step"] in losses
        ]
        for row in pending:
            row |= {k: float(v) for k, v in losses[row["step"]].items()}
        self._write_scalars(pending, ["loss_before", "loss_after"])

    def _save(self):
        if self._writer is None:
            return
        with self._csv.open("a", newline="", encoding="utf-8") as file:
            file.write(as_csv(self.rows[self._written :]))
        _files.keep(self._csv)
        self._written = len(self.rows)
        archive = io.BytesIO()
        np.savez(
            archive,
            step=self._step.numpy(),
            layers=np.array(self._signature()),
            initial=self._initial_bits.numpy(),
            ever=self._ever_bits.numpy(),
        )
        _files.write(self._csv.with_suffix(".npz"), archive.getvalue())
        self._writer.flush()

    def _write_scalars(self, rows, columns=_SCALARS):
        if self._writer is None:
            return
        with tf.device("CPU:0"), self._writer.as_default():
            for row in rows:
                for column in columns:
                    if row[column] is not None:
                        tf.summary.scalar(
                            f"{_PREFIX}{column}/{row['layer']}",
                            row[column],
                            step=row["step"],
                        )

    # The state of a resumed run.

    def _signature(self):
        return [f"{name} {m.mask.shape}" for name, m in self._layers.items()]

    def _remember(self):
        self._initial_bits.assign(_packed(self._initial))
        self._ever_bits.assign(_packed(self._ever))

    def _remembered(self, step):
        """Returns the initial and the explored masks at a step, or None."""
        if int(self._step.numpy()) == step:
            bits = self._initial_bits.numpy(), self._ever_bits.numpy()
        else:
            bits = self._saved_bits(step)
        if bits is None:
            return None
        return tuple(_unpacked(part, self._now) for part in bits)

    def _saved_bits(self, step):
        path = self.log_dir and self.log_dir / "topology.npz"
        if path is None or not path.exists():
            return None
        with np.load(path, allow_pickle=False) as archive:
            fits = int(archive["step"]) == step and (
                archive["layers"].tolist() == self._signature()
            )
            return (archive["initial"], archive["ever"]) if fits else None


def _packed(masks):
    """Returns all masks as one vector of bits, 32 in each int."""
    bits = np.concatenate([m.ravel() for m in masks.values()])
    return np.packbits(np.pad(bits, (0, -bits.size % _WORD))).view(np.int32)


def _unpacked(packed, like):
    """Returns the masks in a vector made by `_packed`."""
    bits = np.unpackbits(packed.view(np.uint8)).astype(bool)
    ends = np.cumsum([mask.size for mask in like.values()])
    return {
        name: part.reshape(mask.shape)
        for (name, mask), part in zip(
            like.items(), np.split(bits, ends)[:-1], strict=True
        )
    }
