"""Mask changes within the training step: of `fit`, or of a loop of one's own.

A Keras callback sees neither batch nor gradient, so `StepUpdate` has its work
done by the training step itself, where the optimizer would be applied. What
changes, and when, its children say (`rigl_keras.methods`).
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable
from typing import Literal

import keras
import tensorflow as tf

from rigl_keras import _keras, replicas
from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions
from rigl_keras.kernels import fast_calls
from rigl_keras.kernels.layer_products import dense_products
from rigl_keras.masking.leaves import leaf_layers
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.tracing import (
    called_kernels,
    zero_outside,
)
from rigl_keras.replicas import check_one_device
from rigl_keras.training import fit_runs, optimizer_state
from rigl_keras.training.graph_updates import (
    applying,
    as_tensors,
    densely,
    regularisation_gradient,
    trainable_keys,
    variable_key,
)
from rigl_keras.training.masked_gradients import seem_masked
from rigl_keras.training.train_function import loss_on, traced_once, untraced
from rigl_keras.training.update_record import (
    APPLIED_TWICE,
    NOT_DENSE,
    NOT_FINITE,
    REASONS,
    TWICE,
)

__all__ = ["StepUpdate", "installed_update"]

_FETCH_EVERY = 64  # calls of the training function
_RECORDED = 1024  # updates that the device remembers, at least


class StepUpdate(keras.callbacks.Callback):
    """Changes masks at some training steps. A method is a child of it.

    At a step that `is_due`, the training step runs as always, with gradients
    that are dense if `dense_gradients` says so, and where the optimizer would
    be applied `change_masks` is called instead; this counts as an optimizer
    step (Evci et al., 2020, arXiv:1911.11134, Algorithm 1). With
    `update_replaces_step=False` the optimizer is applied first.

    The step is `optimizer.iterations`, so that a resumed run needs no state
    of the callback beyond its `variables`, which are none by default. What is
    planned counts from the step at which the run began (`run_start`): a `fit`
    from epoch 0 begins one, whatever the optimizer has done before, and a
    later `initial_epoch`, `BackupAndRestore` or an `attach` before `fit`
    resumes one.

    Within `fit`, callbacks may train the model as well: the steps of
    `train_on_batch` and of a nested `fit` count as all others do, and may be
    updates. After `compile` updates go on with the new optimizer. Layers that
    are thawed join, and frozen ones leave, as the training step is traced
    again (`make_train_function(force=True)`). When `fit` ends, be it by an
    exception, the model has its own training step again.

    Where the optimizer accumulates gradients, a step is several batches, and
    the update goes by the mean of their gradients. Where it scales the loss
    (`LossScaleOptimizer`), a batch whose gradients are not finite moves
    nothing and is no step: the update is put off to the next batch.

    Logs, which History, the progress bar and TensorBoard show: `density` of
    all masked weights, and `grown` (connections) at the last update; with
    loss scaling also `skipped_updates`, how often one was put off.

    Args:
        conventions: Where the references differ.

    Attributes:
        dense_gradients: When the method needs gradients at inactive entries:
            `"never"`, at its `"updates"` or `"always"`. It decides what
            training costs (`flops.training_flops`).
        gradient_batches: At how many steps, an update's own the last, the
            gradients are taken of which it goes by the mean.
        watch_loss: Whether `fit` evaluates the loss of an update's batch
            before and after it. To be set before training begins.
        update_losses: `[(step, before, after)]`, these losses, which are NaN
            where the model is compiled without one.
        variables: What must be saved for a run to resume exactly, beside the
            model and its optimizer.
        masked: The masked layers of the model, once attached to it. Those
            that are frozen, or have no gradient, keep their masks.
        optimizer: The optimizer that trains them, within any loss scaling.
        run_start: The optimizer step from which the method's own steps
            count. It is 0 in a custom loop.
        trajectory: `[(step, counts)]`: the active connections of each masked
            layer before the first step and after each update of this run, and
            where masks were changed otherwise (`set_weights`, `load_weights`),
            as it was seen at the begin or end of an epoch. Where `compile`
            has brought another optimizer, steps go on counting.
        name: The method as the report names it.

    Raises:
        ValueError: In `fit`, when the model has no masked layers, the run's
            length is needed and unknown, gradients are not finite, the
            masks of two replicas differ, or the training step applies its
            optimizer more than once.
        UserWarning: No update falls into the run; a masked layer that is
            trainable has no gradient where the optimizer is applied; or
            `fit(epochs=1)` is called in a loop.
    """

    dense_gradients: Literal["never", "updates", "always"] = "updates"
    _logged = ("grown",)  # of the last update
    gradient_batches: int = 1
    watch_loss: bool = False

    def __init__(self, *, conventions: Conventions = ORIGINAL):
        super().__init__()
        check_conventions(conventions)
        self.conventions = conventions
        self.optimizer = None
        self.run_start = 0
        self.update_losses = []
        self._buffers = []
        self._last = {}
        self._fit, self._prepared = None, None

    # What makes a method.

    def is_due(self, step):
        """Returns whether masks change at a step.

        Args:
            step: The optimizer step, an int or an integer tensor. The run
                began at `run_start`.

        Returns:
            A bool, or a bool tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} must define is_due.")

    def is_gathered(self, step):
        """Returns whether the gradients of a step count for an update.

        Args:
            step: The optimizer step, an integer tensor.

        Returns:
            A bool tensor. By default they do at the update itself.
        """
        return self.is_due(step)

    def change_masks(
        self,
        optimizer: keras.Optimizer,
        layers: list[Masked],
        gradients: list[tf.Tensor],
        step: tf.Tensor,
    ) -> tf.Tensor:
        """Changes every mask once.

        Args:
            optimizer: The optimizer that trains the model.
            layers: The masked layers whose kernels have a gradient.
            gradients: dL/d(masked kernel) of each, without regularisation.
            step: The optimizer step, an int64 scalar.

        Returns:
            How many connections were grown, an integer scalar.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define change_masks."
        )

    def lengthened(self, factor: float) -> "StepUpdate":
        """Returns this method for a run that is `factor` times as long.

        The steps at which updates end scale; those at which they begin, and
        from one to the next, do not (the report, section 5.1).

        Args:
            factor: Positive number.

        Returns:
            A callback of the same kind.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define lengthened."
        )

    def set_up(self) -> None:
        """Is called when attached, with `masked` and `optimizer` set.

        Within `fit` it is called again where the training step is made again.
        """

    def forget(self) -> None:
        """Is called as a run begins that resumes none, after `set_up`."""

    def steps_taken(self) -> int:
        """Returns the optimizer steps so far, as `trajectory` counts them."""
        return int(self._outermost.iterations.numpy()) + self._counted_before

    def last_update(self, begin: int, end: int) -> int | None:
        """Returns the last of some steps that is due, or None.

        Args:
            begin: The first step, as `trajectory` counts them.
            end: The step after the last.
        """
        before = self._counted_before
        with tf.device("CPU:0"):  # where a schedule is made of tensors
            return next(
                (
                    t
                    for t in reversed(range(begin, end))
                    if self.is_due(t - before)
                ),
                None,
            )

    def steps_in(self, batches: int) -> int:
        """Returns how many optimizer steps end within the next batches."""
        taken = int(optimizer_state.batches(self.optimizer).numpy())
        each = optimizer_state.batches_per_step(self.optimizer)
        return (taken + batches) // each - taken // each

    def plan(self, epoch: int, epochs: int | None, steps: int | None) -> None:
        """Is told of the run, before its first step.

        Args:
            epoch: The epoch that begins.
            epochs: The epoch to end before, or None where unknown.
            steps: Batches in an epoch, or None where unknown.
        """

    def extra_logs(self) -> dict[str, tf.Tensor]:
        """Returns what the method logs, beside `density` and `grown`."""
        return {}

    def get_config(self) -> dict:
        """Returns the arguments with which to make an equal callback."""
        return {"conventions": self.conventions}

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def skipped_updates(self) -> int:
        """How often loss scaling has put an update off to the next batch."""
        return int(self._skipped.numpy())

    @property
    def variables(self) -> list[tf.Variable]:
        return [self._gathered, *self._buffers] if self._buffers else []

    @property
    def logged_variables(self) -> list[tf.Variable]:
        """What is logged of the last update, until the next one.

        Training does not depend on it; saved beside `variables` it makes the
        logs of a run that resumes those of one that was never interrupted.
        """
        return list(self._last.values())

    # A loop of one's own.

    def attach(self, model: keras.Model, optimizer: keras.Optimizer) -> None:
        """Makes ready to train a model, as `fit` and `wrap` do by themselves.

        Call it before `update`, or where `variables` are needed before
        training begins, so as to restore them. The method's steps are those
        that the optimizer counts: a `fit` that follows resumes the run which
        the optimizer's steps belong to.

        Args:
            model: A masked model.
            optimizer: The optimizer that trains it.

        Raises:
            ValueError: The model has no masked layer, or is trained in a way
                that is not supported.
        """
        self._refuse_while_running(model)
        self._attach(model, optimizer)
        self._prepared = (model, optimizer)

    def _attach(self, model, optimizer):
        trainable = trainable_keys(model)
        if not any(
            variable_key(m.kernel) in trainable for m in masked_layers(model)
        ):
            raise ValueError(
                f"{self.name} found no masked layer to train in model "
                f"{model.name!r}. Call model = rigl_keras.sparsify(model, "
                "density) before compile, and do not freeze all that it masks."
            )
        with replicas.scope(model):
            self._bind(model, optimizer)
            self._skipped = tf.Variable(0, trainable=False, dtype=tf.int64)
            self._refused = tf.Variable(
                [-1, NOT_FINITE], trainable=False, dtype=tf.int64
            )
            self._differ_at = tf.Variable(-1, trainable=False, dtype=tf.int64)
            self._density = tf.Variable(0.0, trainable=False)
            # The same variables for as long as the callback lives: a
            # checkpoint may hold them already.
            for name in self._logged:
                if name not in self._last:
                    self._last[name] = tf.Variable(0.0, trainable=False)
            self.run_start, self._counted_before = 0, 0
            self.trajectory = [(self.steps_taken(), self._counts_now())]
            self.update_losses = []
            self._planned, self._prepared = False, None
            self._called, self._reached = {}, set()
            self._looks = self._warns_of_unreached = True
            self.set_up()
            if self.steps_taken() == 0:
                self._forget_all()

    def _bind(self, model, optimizer):
        """Takes the optimizer, and makes room for the record of updates."""
        _check_set_up(self.name, model, optimizer, self.gradient_batches)
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        self._model, self._outermost = model, optimizer
        self.optimizer = optimizer_state.innermost(optimizer)
        if any(layer.product != "dense" for layer in _wrappers(model)):
            fast_calls.use_fast_calls(
                model
            )  # one that was loaded, as what it was before
        self._make_room(list(masked_layers(model)))
        executed = getattr(model, "steps_per_execution", 1)
        rows = max(_RECORDED, _FETCH_EVERY * executed)
        self._record = tf.Variable(
            tf.zeros([rows, 1 + len(self.masked)], tf.int64), trainable=False
        )
        self._losses = tf.Variable(tf.zeros([rows, 2]), trainable=False)
        self._seem_masked = tf.Variable(
            tf.zeros([len(self.masked)], tf.bool), trainable=False
        )
        self._kept = tf.Variable(0, trainable=False)

    def _forget_all(self):
        for logged in self._last.values():
            logged.assign(0.0)
        self.forget()

    def wrap(
        self,
        train_step: Callable,
        *,
        model: keras.Model,
        optimizer: keras.Optimizer,
    ) -> Callable:
        """Returns a training step of a custom loop, with mask updates.

        Args:
            train_step: A function of the batch that calls the model within a
                gradient tape and then `optimizer.apply`, or
                `apply_gradients`. It is called twice as it is traced: for
                ordinary steps and for updates. A `tf.function` within it, or
                as a layer's `call`, would be traced once for both, and is
                refused: decorate what this method returns instead.
            model: The masked model that it trains.
            optimizer: The optimizer that it applies.

        Returns:
            A function of the same arguments and results, to be called as it
            is or in a `tf.function`.

        Raises:
            ValueError: The model has no masked layer, or the run's length is
                needed: pass `end_step` to the method. Or the model was made
                in the scope of a strategy.

        Example:

        >>> train_step = tf.function(
        ...     RigL(end_step=750).wrap(
        ...         train_step, model=model, optimizer=optimizer))
        >>> for x, y in batches:
        ...     loss = train_step(x, y)
        """
        check_one_device("wrap", model)
        self.attach(model, optimizer)
        self._plan(0, None, None)
        train_step = untraced(train_step)

        def step_or_update(*args, **kwargs):
            return self._step_or_update(lambda: train_step(*args, **kwargs))

        return step_or_update

    @tf.autograph.experimental.do_not_convert
    def update(self, gradients, variables) -> None:
        """Applies gradients, or changes masks where an update is due.

        To be called in place of `optimizer.apply`, after `attach`. What the
        optimizer gets is zero outside the masks, but for a method of dense
        momentum. A `LossScaleOptimizer` takes the gradients of the loss that
        its `scale_loss` has scaled, as always.

        Args:
            gradients: Gradients of the loss, one for each of `variables`,
                taken within `dense_gradients()`.
            variables: The variables to train.

        Raises:
            ValueError: `attach` was not called, or the run's length is
                needed: pass `end_step` to the method. That gradients were
                not dense is told by `fetch`.

        Example:

        >>> updater = RigL(end_step=750)
        >>> updater.attach(model, optimizer)
        >>> @tf.function
        ... def train_step(x, y):
        ...     with rigl_keras.dense_gradients(), tf.GradientTape() as tape:
        ...         loss = loss_of(y, model(x, training=True))
        ...     variables = model.trainable_variables
        ...     updater.update(tape.gradient(loss, variables), variables)
        """
        if self.optimizer is None:
            raise ValueError(
                f"{self.name} does not know what it trains: call "
                "attach(model, optimizer) before update."
            )
        check_one_device("update", self._model)
        if not self._planned:
            self._plan(0, None, None)
        gradients, variables = list(gradients), list(variables)
        self._either(
            ordinary=lambda: self._outermost.apply(
                self._masked_gradients(gradients, variables), variables
            ),
            dense=lambda: self._outermost.apply(gradients, variables),
            by_hand=True,
        )

    def refuse_unless(self, defined, step, reason=NOT_FINITE) -> None:
        """Notes that the update at a step was refused, unless `defined`.

        The first such update is the one that `fetch` tells of.
        """
        refused = tf.stack([step, tf.constant(reason, tf.int64)])
        keeps = defined | (self._refused[0] >= 0)
        self._refused.assign(tf.where(keeps, self._refused, refused))

    def _note_masked(self, layers, masked):
        """Notes which layers the first update is refused for."""
        of = dict(zip(map(id, layers), tf.unstack(masked), strict=True))
        each = tf.stack(
            [of.get(id(m), tf.constant(False)) for m in self.masked]
        )
        first = self._refused[0] < 0
        self._seem_masked.assign(tf.where(first, each, self._seem_masked))

    def set_kernel_and_mask(
        self, optimizer, layer, mask, grown, values=None
    ) -> tf.Tensor:
        """Gives a layer its new mask; what is new starts anew.

        Weights outside the mask become zero, newly grown ones `values`, and
        the optimizer forgets what it remembered of them. With dense momentum
        it remembers all (Dettmers and Zettlemoyer, 2020).

        Args:
            optimizer: The optimizer that trains the model.
            layer: A masked layer.
            mask: Bool tensor of the kernel's shape.
            grown: Bool tensor of the kernel's shape, within `mask`.
            values: What grown weights start with, of the kernel's shape and
                dtype. None: zero.

        Returns:
            How many connections were grown, an integer scalar.
        """
        kernel = layer.kernel
        before = layer.mask.value > 0
        zeros = tf.zeros_like(kernel.value)
        start = zeros if values is None else tf.where(grown, values, zeros)
        kernel.assign(tf.where(mask & ~grown, kernel.value, start))
        # A connection that left and rejoined keeps its memory, even where the
        # conventions zero its weight.
        optimizer_state.forget(
            optimizer,
            kernel,
            keep=before & mask,
            # Of weights, not of gradients: it is zero where they are.
            only=["average"] if self.dense_gradients == "always" else None,
        )
        layer.mask.assign(mask)
        return tf.math.count_nonzero(grown)

    def fetch(self) -> None:
        """Takes the record of updates from the device into `trajectory`.

        `fit` does so by itself. A loop of one's own calls it now and then, at
        least every 1,024 updates.

        Raises:
            ValueError: An update was refused, or has left replicas with
                different masks.
        """
        kept = int(self._kept.numpy())
        if kept:
            rows = self._record.numpy()[:kept]
            rows[:, 0] += self._counted_before
            rows = rows.tolist()
            for step, *counts in rows:
                self._add_row(step, tuple(counts))
            if self.watch_loss:
                losses = self._losses.numpy()[:kept].tolist()
                self.update_losses += [
                    (row[0], *loss)
                    for row, loss in zip(rows, losses, strict=True)
                ]
            self._kept.assign(0)
        self._see_masks()
        if self._fit is None:
            self._warn_of_unreached()
        step, reason = self._refused.numpy().tolist()
        if step >= 0:
            named = [
                repr(m.name)
                for m, seems in zip(
                    self.masked, self._seem_masked.numpy(), strict=True
                )
                if seems
            ]
            why = REASONS[reason].format(twice=TWICE, layers=", ".join(named))
            raise ValueError(
                f"{self.name} refused the update at step {step}: {why}"
            )
        step = int(self._differ_at.numpy())
        if step >= 0:
            raise ValueError(
                f"After the update at step {step} the replicas hold different "
                "masks. Every process must make the model with the same seed, "
                "load the same checkpoint and be given the same arguments of "
                f"{self.name}. Resume from a checkpoint before this step."
            )

    def _add_row(self, step, counts):
        # Steps before it that are still to come were undone by a checkpoint.
        first = self.trajectory[0]
        earlier = [row for row in self.trajectory[1:] if row[0] < step]
        self.trajectory = [first, *earlier, (step, counts)]

    def _see_masks(self):
        """Brings the record to what the masks are, whoever changed them."""
        with replicas.scope(self._model):
            step, counts = self.steps_taken(), self._counts_now()
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
            # As masks of an update, they hold from the step after it.
            self._add_row(max(step - 1, start), counts)

    def _counts_now(self):
        counts = self._counts()
        self._density.assign(self._density_of(counts))
        return tuple(counts.numpy().tolist())

    def _warn_of_unreached(self):
        """Warns once of masks that stay, though their layers are trained."""
        if not self._reached or not self._warns_of_unreached:
            return
        self._warns_of_unreached = False
        trainable = trainable_keys(self._model) - self._reached
        names = [
            m.name for m in self.masked if variable_key(m.kernel) in trainable
        ]
        if names:
            warnings.warn(
                f"{self.name} does not reach these masked layers: "
                f"{', '.join(names)}. They are trainable, and have no gradient "
                f"where the training step applies {self.optimizer.name!r}, so "
                "that their masks stay as they are. If another optimizer "
                "trains them, give each optimizer a method of its own by "
                "attach and update; otherwise the loss does not depend on "
                "them, or set trainable = False.",
                stacklevel=2,
            )

    # Keras calls these.

    def set_model(self, model):
        if self._fit is not None and self._fit.model is not model:
            self._refuse_while_running(model)
        super().set_model(model)

    def on_train_begin(self, logs=None):
        model = self.model
        self._refuse_while_running(model)
        if model.optimizer is None:
            raise ValueError(
                f"{self.name} needs a compiled model: call model.compile first."
            )
        prepared = self._prepared
        self._attach(model, model.optimizer)
        if installed_update(model) is not None:
            raise ValueError(
                "A model takes one mask update at a time. Received both "
                f"{installed_update(model).name} and {self.name}."
            )
        if prepared is not None and all(
            one is other
            for one, other in zip(
                prepared, (model, model.optimizer), strict=True
            )
        ):
            self._prepared = prepared
        self._calls = 0
        self._install()

    def on_epoch_begin(self, epoch, logs=None):
        self._looks = True
        if not self._planned:
            self._begin(epoch)

    def on_train_batch_begin(self, batch, logs=None):
        if not self._planned:  # a custom loop that knows no epochs
            self._begin(0)
        if self._looks:
            # What masks the epoch really begins with: other callbacks may
            # have set weights, or restored them.
            self._looks = False
            self.fetch()
        if self.model.train_function is None:  # compiled within `fit`
            self.model.make_train_function()

    def on_train_batch_end(self, batch, logs=None):
        # Not every step: on a GPU the host would wait for it.
        self._calls += 1
        if self._calls % _FETCH_EVERY == 0:
            self.fetch()

    def on_epoch_end(self, epoch, logs=None):
        self.fetch()
        if logs is not None and "density" in logs:
            logs["density"] = float(self._density.numpy())
        self._warn_of_unreached()
        # Of a mask that has changed in density, another product may be faster.
        if any([m.product_changes() for m in _wrappers(self.model)]):
            self.model.make_train_function(force=True)

    def on_train_end(self, logs=None):
        if self._fit is None:
            return
        fit_runs.note_end(
            self._model,
            begin=self._first_step,
            end=int(self._outermost.iterations.numpy()),
            epochs=self._epochs,
        )
        self._fit.end()
        self._fit = None

    # The model's own step, exchanged while `fit` runs.

    def _refuse_while_running(self, model):
        """Sees that the callback trains one model at a time."""
        if self._fit is None:
            return
        if self._fit.lasts():
            raise ValueError(
                f"{self.name} trains model {self._fit.model.name!r} in a run "
                "that has not ended, and was given to another, of model "
                f"{model.name!r}. A `fit` within `fit` on the same model needs "
                "no callback: updates go on in it. For another model make "
                "another callback; a loop of your own ends with on_train_end."
            )
        self._fit = None

    def _begin(self, epoch):
        """Plans the run, once all callbacks have restored what they do."""
        params = self.params or {}
        epochs, steps = params.get("epochs"), params.get("steps")
        with replicas.scope(self._model):
            first = self._first_step = self.steps_taken()
            self._epochs = epochs - epoch if epochs else 0
            self.trajectory = [(first, self._counts_now())]
            if self._prepared is None:
                self.run_start = fit_runs.start_of(
                    self._model,
                    int(optimizer_state.batches(self.optimizer).numpy()),
                    each=optimizer_state.batches_per_step(self.optimizer),
                    epoch=epoch,
                    steps=steps,
                    skips=self._outermost is not self.optimizer,
                )
                if self.run_start == first:
                    self._forget_all()
        self._prepared = None
        if self._epochs == 1 and (epoch == 0 or self._measures_the_run):
            fit_runs.warn_of_a_loop(self.name, self._model, begin=first)
        self._plan(epoch, epochs, steps)

    # Whether what is planned depends on how long the run is.
    _measures_the_run = False

    def _plan(self, epoch, epochs, steps):
        self.plan(epoch, epochs, steps)
        self._planned = True

    def _make_room(self, masked):
        """Keeps what was gathered for these kernels, or starts with nothing."""
        same = [id(m.kernel) for m in masked] == [
            id(m.kernel) for m in getattr(self, "masked", [])
        ]
        self.masked = masked
        each = optimizer_state.batches_per_step(self.optimizer)
        if self.gradient_batches == 1 and each == 1:
            self._buffers = []
        elif not (same and self._buffers):
            # How many gradients each buffer is the sum of, and the batch
            # (as the optimizer counts them) that would be the next.
            self._gathered = tf.Variable(
                [0, 0], trainable=False, dtype=tf.int64
            )
            self._buffers = [
                tf.Variable(tf.zeros_like(m.kernel.value), trainable=False)
                for m in masked
            ]

    def _install(self):
        model = self._model
        run = self._fit = fit_runs.FitRun(model)
        with_updates = self._with_logs(run, self._step_or_update)

        def train_step(data):
            if not run.lasts():
                return model.train_step(data)
            return with_updates(data)

        train_step.mask_update = self

        def make_train_function(force=False):
            if not run.lasts():
                return model.make_train_function(force)
            # `train_on_batch` and `fit` ask for a function, not by force, and
            # find the one that there is.
            if force or model.train_function is None:
                run.exchange("train_step", train_step)
                self._take_what_changed()
                self._make(run)

        try:
            run.exchange("train_step", train_step)
            run.exchange("make_train_function", make_train_function)
            self._make(run)
        except BaseException:
            run.end()
            raise

    def _take_what_changed(self):
        """Goes on with the optimizer and the layers that there are now."""
        model = self._model
        self.fetch()
        taken = self.steps_taken()
        with replicas.scope(model):
            self._bind(model, model.optimizer)
            before, self._counted_before = self._counted_before, 0
            self._counted_before = taken - self.steps_taken()
            # The run is as old for the new optimizer as it was for the other.
            self.run_start -= self._counted_before - before
            self.set_up()

    def _make(self, run):
        """Makes the train function, which is traced when it is called."""
        model = self._model
        make = functools.partial(run.own("make_train_function"), force=True)
        together = replicas.is_distributed(model)
        # Within a `tf.cond` XLA computes convolutions on CPUs with one thread:
        # a step would take four times as long.
        alone = model.jit_compile and model.steps_per_execution == 1
        if together or alone:
            make = self._choosing(run, together=together)
        self._called = {}
        make()
        run.guard(self._check_planned)

    def _check_planned(self):
        if not self._planned:
            raise ValueError(
                f"{self.name} plans its updates as the first epoch of fit "
                "begins, and a callback trains the model before that. Call "
                f"train_on_batch later, or list that callback after {self.name}"
                "."
            )

    def _with_logs(self, run, step):
        """Returns a training step that logs what the method does."""

        def logged(data):
            scaled = self._outermost is not self.optimizer
            train_step = untraced(run.own("train_step"))
            loss = loss_on(self._model, data) if self.watch_loss else None
            with traced_once(self._model):
                logs = step(lambda: train_step(data), loss)
            skipped = {"skipped_updates": self._skipped.value()}
            return {
                **logs,
                "density": self._density.value(),
                "grown": self._last["grown"].value(),
                **(skipped if scaled else {}),
                **self.extra_logs(),
            }

        return logged

    def _counts(self):
        return tf.stack(
            [tf.math.count_nonzero(m.mask.value) for m in self.masked]
        )

    def _density_of(self, counts):
        weights = sum(math.prod(m.mask.shape) for m in self.masked)
        return tf.cast(tf.reduce_sum(counts) / weights, tf.float32)

    def _choosing(self, run, *, together):
        # Replicas are traced side by side, so that the host exchanges the
        # optimizer's part for all of them. The loss is not watched there:
        # each replica has a part of the batch.
        applied = []

        def ordinary(train_step, loss):
            return self._ordinary_step(self._as_ordinary(train_step))

        def update(train_step, loss):
            with contextlib.ExitStack() as stack:
                if not together:
                    stack.enter_context(self._updating([], loss))
                return self._counted_step(densely(train_step))

        @contextlib.contextmanager
        def stepping(is_update):
            with contextlib.ExitStack() as stack:
                if together:
                    if is_update:
                        stack.enter_context(self._updating(applied))
                    stack.enter_context(self._watching())
                yield

        return replicas.choosing(
            self._model,
            run.own("make_train_function"),
            ordinary=self._with_logs(run, ordinary),
            update=self._with_logs(run, update),
            is_due=self.is_gathered,
            stepping=stepping,
            check=self._check_steps,
        )

    def _check_steps(self, steps):
        if steps > 1:
            raise ValueError(
                f"{self.name} judges an update by the step that begins a "
                "training step, and this one applies its optimizer more than "
                f"once. {TWICE}"
            )

    # In the graph.

    def _step_or_update(self, train_step, loss=None):
        """Runs a training step, or an update in place of its optimizer."""
        return self._either(
            ordinary=self._as_ordinary(train_step),
            dense=densely(train_step),
            loss=loss,
        )

    def _as_ordinary(self, train_step):
        """Returns a training step with the gradients of most steps."""
        always = self.dense_gradients == "always"
        return densely(train_step) if always else train_step

    def _either(self, ordinary, dense, *, loss=None, by_hand=False):
        """Runs an ordinary step, or one whose gradients count for an update."""

        def gather_or_update():
            with self._updating([], loss, by_hand):
                return self._counted_step(dense)

        return tf.cond(
            self.is_gathered(tf.cast(self._outermost.iterations, tf.int64)),
            gather_or_update,
            lambda: self._ordinary_step(ordinary),
        )

    def _ordinary_step(self, train_step):
        jit = getattr(self.model, "jit_compile", False)
        alone = not tf.distribute.has_strategy()
        with (
            called_kernels() as called,
            dense_products() if jit else contextlib.nullcontext(),
            self._watching() if alone else contextlib.nullcontext(),
        ):
            outputs = as_tensors(train_step())
        self._check_called(called)
        self._project_averages()
        return outputs

    def _check_called(self, called):
        """Sees that each kind of step was traced down to the kernels."""
        missing = [n for k, n in self._called.items() if k not in called]
        if missing:
            raise ValueError(
                f"{self.name} needs the layers to be traced once for ordinary "
                "steps and once for updates, and what calls "
                f"{', '.join(missing)} is traced only once: it is within a "
                "tf.function of its own. Remove that decorator; the training "
                "step as a whole is compiled anyway."
            )
        self._called.update(called)

    def _counted_step(self, train_step):
        """Runs a step that loss scaling may put off, which is counted."""
        step = tf.cast(self._outermost.iterations, tf.int64)
        batches = tf.identity(optimizer_state.batches(self.optimizer).value)
        outputs = self._ordinary_step(train_step)
        if self._outermost is not self.optimizer:
            replicas.once(self._count_skipped, [batches, step])
        if not tf.distribute.has_strategy():
            # In a loop of the graph, one trace is applied many times.
            after = tf.cast(self._outermost.iterations, tf.int64)
            self.refuse_unless(after - step <= 1, step, APPLIED_TWICE)
        return outputs

    @contextlib.contextmanager
    def _watching(self):
        """Within the context, sees what the training step applies.

        That is which kernels have a gradient, and whether it is applied once.
        """
        optimizer = self._outermost
        apply, graphs = optimizer.apply, []

        def watched(gradients, trainable_variables=None):
            gradients = list(gradients)
            variables = trainable_variables or _keras.trained_variables(
                optimizer
            )
            variables = list(variables)
            self._reached |= {
                variable_key(v)
                for v, gradient in zip(variables, gradients, strict=True)
                if gradient is not None
            }
            # Of two branches of the graph, one is executed; replicas are
            # traced side by side.
            graph = tf.compat.v1.get_default_graph()
            if not tf.distribute.has_strategy():
                here = [graph, *(g for g in graphs if g is graph)]
                self._check_steps(len(here))
                graphs.append(graph)
            return apply(gradients, trainable_variables)

        with applying(optimizer, watched):
            yield

    def _count_skipped(self, batches, step):
        after = optimizer_state.batches(self.optimizer).value
        skipped = self.is_due(step) & tf.equal(batches, after)
        self._skipped.assign_add(tf.cast(skipped, tf.int64))

    @contextlib.contextmanager
    def _updating(self, applied, loss=None, by_hand=False):
        """Within the context, an update takes the place of the optimizer.

        `applied` grows as the training step is traced, which on several
        replicas happens once, for all the times that it runs.
        """
        optimizer = self.optimizer
        apply = optimizer.apply

        def gather_or_update(gradients, trainable_variables=None):
            applied.append(True)
            step = tf.cast(self._outermost.iterations, tf.int64)
            variables = trainable_variables or _keras.trained_variables(
                optimizer
            )
            layers, dense = self._of_kernels(gradients, variables)
            if not layers:  # all of them were frozen within `fit`
                apply(gradients, variables)
                return

            batches = tf.identity(optimizer_state.batches(optimizer).value)
            each = optimizer_state.batches_per_step(optimizer)
            last = tf.equal((batches + 1) % each, 0)

            def apply_masked():
                apply(self._masked_gradients(gradients, variables), variables)

            def gather():
                self._gather(layers, dense, batches)
                apply_masked()

            def update():
                growth = dense
                if self._buffers:
                    growth = self._gathered_mean(layers, dense, batches)
                if not self.conventions.update_replaces_step:
                    apply_masked()
                self._change_once(layers, growth, step, loss, by_hand)
                if self.conventions.update_replaces_step:
                    optimizer_state.count_step(optimizer)

            if self._buffers:
                tf.cond(self.is_due(step) & last, update, gather)
            else:
                update()

        with applying(optimizer, gather_or_update):
            yield
        scaled = self._outermost is not optimizer
        # Eagerly, loss scaling passes over gradients that are not finite.
        if not applied and not (scaled and tf.executing_eagerly()):
            raise ValueError(
                f"{self.name} takes the place of optimizer.apply, which this "
                "training step never calls. Pass the optimizer that it "
                "applies: fit knows the one that compile was given. Where "
                "there are several, give each a method of its own by "
                "attach(model, optimizer), and call update(gradients, "
                "variables) in place of its apply."
            )

    def _of_kernels(self, gradients, variables):
        """Returns the layers that have a gradient, and dL/d(masked kernel)."""
        of = {
            variable_key(v): g
            for v, g in zip(variables, gradients, strict=True)
        }
        layers = [
            m for m in self.masked if of.get(variable_key(m.kernel)) is not None
        ]
        trainable = trainable_keys(self._model)
        if not any(variable_key(m.kernel) in trainable for m in self.masked):
            return [], []
        if not layers:
            raise ValueError(
                f"{self.name} needs the gradient of a masked kernel. Received "
                f"gradients of {[v.name for v in variables]}: does the loss "
                "depend on the masked layers?"
            )
        scale = self.optimizer.loss_scale_factor or 1.0  # a fixed one
        summed = replicas.summed(
            [tf.convert_to_tensor(of[variable_key(m.kernel)]) for m in layers]
        )
        dense = [
            gradient / tf.cast(scale, gradient.dtype)
            - regularisation_gradient(m.kernel)
            for gradient, m in zip(summed, layers, strict=True)
        ]
        return layers, dense

    def _masked_gradients(self, gradients, variables):
        """Returns what the optimizer gets, zero outside the masks."""
        masks = {}
        if self.dense_gradients != "always":
            masks = {variable_key(m.kernel): m.mask for m in self.masked}

        def masked(gradient, variable):
            if gradient is None:
                return None
            if variable_key(variable) not in masks:
                # Within a branch, which the optimizer takes all or none from.
                return tf.identity(gradient)
            return zero_outside(masks[variable_key(variable)], gradient)

        return [masked(g, v) for g, v in zip(gradients, variables, strict=True)]

    def _gather(self, layers, gradients, batches):
        """Adds the gradients of a batch to those of the batches before it.

        Returns the sums so far, and of how many gradients.
        """
        count, following = tf.unstack(self._gathered)
        # What an earlier run has left is of no use.
        goes_on = (count > 0) & tf.equal(following, batches)
        count = tf.where(goes_on, count, 0) + 1
        self._gathered.assign([count, tf.cast(batches, tf.int64) + 1])
        buffers = dict(zip(map(id, self.masked), self._buffers, strict=True))
        sums = []
        for layer, gradient in zip(layers, gradients, strict=True):
            buffer = buffers[id(layer)]
            before = tf.where(goes_on, buffer, tf.zeros_like(buffer))
            sums.append(before + tf.cast(gradient, buffer.dtype))
            buffer.assign(sums[-1])
        return sums, count

    def _gathered_mean(self, layers, gradients, batches):
        sums, count = self._gather(layers, gradients, batches)
        self._gathered.assign([0, 0])
        return [total / tf.cast(count, total.dtype) for total in sums]

    def _change_once(self, layers, gradients, step, loss, by_hand):
        """Changes masks for all replicas, and sees whether they agree."""
        replicas.once(
            functools.partial(self._change, layers, loss, by_hand),
            [step, *gradients],
        )
        if tf.distribute.has_strategy():
            same = replicas.agree([m.mask.value for m in self.masked])
            replicas.once(self._note_unless, [same, step])

    def _note_unless(self, same, step):
        self._differ_at.assign(tf.where(same, self._differ_at, step))

    def _change(self, layers, loss, by_hand, step, *gradients):
        """Changes every mask once, unless the gradients are refused."""
        finite = tf.reduce_all(
            [tf.reduce_all(tf.math.is_finite(g)) for g in gradients]
            + [tf.reduce_all(tf.math.is_finite(m.kernel.value)) for m in layers]
        )
        self.refuse_unless(finite, step)
        accepted = finite
        if by_hand and self.dense_gradients != "never":
            masked = seem_masked([m.mask.value for m in layers], gradients)
            dense = ~tf.reduce_any(masked)
            accepted &= dense
            self._note_masked(layers, masked)
            self.refuse_unless(dense, step, NOT_DENSE)

        def change():
            before = loss() if loss else math.nan
            grown = self.change_masks(self.optimizer, layers, gradients, step)
            after = loss() if loss else math.nan
            counts = self._counts()
            self._last["grown"].assign(tf.cast(grown, tf.float32))
            self._density.assign(self._density_of(counts))
            rows = self._record.shape[0]
            row = tf.minimum(self._kept, rows - 1)
            here = tf.expand_dims(tf.equal(tf.range(rows), row), axis=1)
            values = tf.concat([[step], counts], axis=0)
            self._record.assign(tf.where(here, values, self._record))
            if self.watch_loss:
                self._losses.assign(
                    tf.where(here, [[before, after]], self._losses)
                )
            self._kept.assign(row + 1)

        tf.cond(accepted, change, lambda: None)

    def _project_averages(self):
        """Zeroes averaged weights outside the masks.

        An optimizer averages before constraints apply, so that what dense
        momentum or Muon moved there has reached the average.
        """
        parts = optimizer_state.parts(self.optimizer)
        if any(part.use_ema for part in parts):
            replicas.once(self._project_each_average, [])

    def _project_each_average(self):
        parts = optimizer_state.parts(self.optimizer)
        known = {
            id(v) for part in parts for v in _keras.trained_variables(part)
        }
        for layer in self.masked:
            if id(layer.kernel) not in known:
                continue
            slots = optimizer_state.slots(self.optimizer, layer.kernel)
            average = slots.get("average")
            if average is not None:
                average.assign(zero_outside(layer.mask, average.value))


def _wrappers(model):
    return [leaf for leaf in leaf_layers(model) if isinstance(leaf, Masked)]


def installed_update(model: keras.Model) -> StepUpdate | None:
    """Returns the callback whose updates a model's training step runs.

    Args:
        model: A model in `fit`.

    Returns:
        The mask update, from its `on_train_begin` to its `on_train_end`.
    """
    update = getattr(model.train_step, "mask_update", None)
    fit = update and update._fit
    # One that was cut off is no longer installed.
    return update if fit and fit.model is model and fit.lasts() else None


def _check_set_up(method, model, optimizer, gradient_batches):
    innermost = optimizer_state.innermost(optimizer)
    for part in optimizer_state.parts(innermost):
        if part is not innermost and part.gradient_accumulation_steps:
            raise ValueError(
                f"{method} does not support gradient accumulation within "
                f"{type(innermost).__name__}, whose optimizers may differ in "
                "what a step is. Received gradient_accumulation_steps="
                f"{part.gradient_accumulation_steps} of {part.name!r}. Use a "
                "larger batch, or one optimizer."
            )
    replicas.check_set_up(
        method, model, [optimizer, innermost], gradient_batches
    )


def warn_of_no_update(method: str, steps: int, first: int, rule: str) -> None:
    """Warns that masks will not change in a run.

    Args:
        method: Name of the method.
        steps: Steps of the run.
        first: Its first step.
        rule: When updates come, in words.
    """
    warnings.warn(
        f"{method} plans 0 updates in the {steps} steps of this run from step "
        f"{first} on: {rule}. The masks will not change.",
        stacklevel=4,
    )
