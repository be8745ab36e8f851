"""The callback that changes masks within the training step.

A Keras callback sees neither batch nor gradient. So the training step itself
does the work of `StepUpdate`, where it would apply the optimizer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from rigl_keras import _keras, replicas
from rigl_keras._checks import choice
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.masking.dead_units import warn_of_dead_units
from rigl_keras.masking.masked import KernelMask
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.training import fit_runs, optimizer_state
from rigl_keras.training.attachment import Attachment
from rigl_keras.training.dense_gradients import GradientBuffers
from rigl_keras.training.gradient_exchange import check_exchange
from rigl_keras.training.graph_updates import GraphUpdates
from rigl_keras.training.method_hooks import MethodHooks
from rigl_keras.training.train_function import (
    StepExchange,
    installed_update,
    untraced,
)
from rigl_keras.training.update_record import (
    FETCH_EVERY,
    NOT_FINITE,
    UpdateRecord,
)

__all__ = ["StepUpdate"]


class StepUpdate(MethodHooks):
    """Changes masks at some training steps. Methods are subclasses of it.

    At a step that `is_due`, the training step computes its gradients as usual;
    they are dense if `dense_gradients` says so. Then `change_masks` is called
    instead of the optimizer. This counts as an optimizer step (Evci et al.,
    2020, arXiv:1911.11134, Algorithm 1). With `update_replaces_step=False` the
    optimizer is applied first.

    Steps are `optimizer.iterations`, so a resumed run needs no state of the
    callback except its `variables`. Plans count from the step at which the run
    began (`run_start`). A `fit` from epoch 0 begins a run, regardless of
    earlier optimizer steps. A later `initial_epoch`, `BackupAndRestore` or an
    `attach` before `fit` resumes one.

    Callbacks may train the model within `fit`: the steps of `train_on_batch`
    and of a nested `fit` count like all others. After `compile`, updates
    continue with the new optimizer. When the training step is traced again
    (`make_train_function(force=True)`), unfrozen layers join and frozen ones
    leave. When `fit` ends or fails, the model gets its training step back.

    If the optimizer accumulates gradients, a step has several batches, and an
    update uses the mean of their gradients. If it scales the loss
    (`LossScaleOptimizer`), a batch with gradients that are not finite is not a
    step, and the update waits for the next batch.

    Logs: `density` of all masked weights; `grown`, the connections grown at
    the last update; with loss scaling `skipped_updates`, how often one waited.

    Args:
        conventions: Choices where the references differ.

    Attributes:
        watch_loss: Whether `fit` evaluates the loss of an update's batch
            before and after it. Set it before training begins.
        update_losses: `[(step, before, after)]`, NaN without a loss.
        variables: State that must be saved for a run to resume exactly, besides
            the model and its optimizer.
        masked: The masked layers of the model, frozen ones included.
        optimizer: The optimizer that trains them, within any loss scaling.
        run_start: The optimizer step at which the run began, or 0.
        trajectory: `[(step, counts)]`: the active connections of each masked
            layer before the first step and after each update of this run. Masks
            changed in other ways (`set_weights`) appear at the next begin or
            end of an epoch.

    Raises:
        ValueError: In `fit`: the model has no masked layers, the run's length
            is needed but unknown, gradients are not finite, replicas differ in
            masks, or the training step applies its optimizer twice.
        UserWarning: The run has no update; a trainable masked layer has no
            gradient where the optimizer is applied; `fit(epochs=1)` is called
            in a loop; or, once, when `fit` ends or a custom loop calls
            `fetch`: at least a tenth of a layer's units have no active input.
    """

    watch_loss: bool = False
    # Set by `attach`.
    _attached: Attachment
    _record: UpdateRecord
    _updates: GraphUpdates

    def __init__(self, *, conventions: Conventions = ORIGINAL):
        super().__init__(conventions=conventions)
        for name in ("_attached", "_record", "_updates"):
            vars(self).pop(name, None)  # of what `lengthened` copies
        self.run_start = 0
        self._buffers: GradientBuffers | None = None
        self._fit: fit_runs.FitRun | None = None
        self._prepared: Attachment | None = None
        self._said_dead = self._said_idle = False
        # Of the epoch that runs: the optimizer, its batches, calls of the step.
        self._epoch_start: tuple[keras.Optimizer, int, int] | None = None
        # The logged variables of the last update, by name. They last as long as
        # the callback, because a checkpoint may hold them.
        self._last: dict[str, tf.Variable] = {}

    @property
    def optimizer(self) -> keras.Optimizer | None:
        return self._attached.optimizer if hasattr(self, "_attached") else None

    @property
    def masked(self) -> list[KernelMask]:
        return self._attached.masked

    @property
    def trajectory(self) -> list[tuple[int, tuple[int, ...]]]:
        return self._record.trajectory

    @property
    def update_losses(self) -> list[tuple[int, float, float]]:
        return self._record.losses if hasattr(self, "_record") else []

    @property
    def skipped_updates(self) -> int:
        """How often an update had to wait because of loss scaling."""
        return int(self._record.skipped.numpy())

    @property
    def variables(self) -> list[tf.Variable]:
        return self._buffers.variables if self._buffers else []

    @property
    def logged_variables(self) -> list[tf.Variable]:
        """The logs of the last update, until the next one.

        Training does not need them. A run that restores them logs the same.
        """
        return list(self._last.values())

    def steps_taken(self) -> int:
        """Returns the optimizer steps so far, counted as in `trajectory`."""
        return self._attached.steps_taken()

    def last_update(self, begin: int, end: int) -> int | None:
        """Returns the last of some steps that is due, or None.

        Args:
            begin: The first step, counted as in `trajectory`.
            end: The step after the last.
        """
        before = self._attached.steps_before
        with tf.device("CPU:0"):  # a schedule may use tensors
            for step in reversed(range(begin, end)):
                if self.is_due(step - before):
                    return step
        return None

    def steps_in(self, batches: int) -> int:
        """Returns how many optimizer steps end within the next batches.

        Args:
            batches: Number of batches.
        """
        taken = int(optimizer_state.batches(self.optimizer).numpy())
        each = self._attached.batches_per_step
        return (taken + batches) // each - taken // each

    # Custom loops.

    def attach(self, model: keras.Model, optimizer: keras.Optimizer) -> None:
        """Prepares to train a model, as `fit` and `wrap` do automatically.

        Call it before `update`, or to create and restore `variables` before
        training begins. The method's steps are those that the optimizer counts:
        a later `fit` resumes the run that they belong to.

        Args:
            model: A masked model.
            optimizer: The optimizer that trains it.

        Raises:
            ValueError: The model has no masked layer, or its training is not
                supported.
        """
        self._refuse_while_running(model)
        self._attach(model, optimizer)
        self._prepared = self._attached

    def _attach(self, model, optimizer):
        attached = Attachment(model, optimizer)
        attached.check_trainable(self.name)
        choice(
            "dense_gradients",
            self.dense_gradients,
            ("never", "updates", "always"),
        )
        with replicas.scope(model):
            self._bind(attached)
            for name in self._logged:
                if name not in self._last:
                    self._last[name] = tf.Variable(tf.zeros([]), False)
            self._record = UpdateRecord(attached, self._last)
            self._updates = GraphUpdates(
                attached,
                self._record,
                self._buffers,
                method=self.name,
                is_due=self.is_due,
                is_gathered=self.is_gathered,
                change_masks=self.change_masks,
                looks_at=self.looks_at,
                changes_parts=self.changes_parts,
                apply_gradients=self._own_steps(),
                dense_gradients=self.dense_gradients,
                update_replaces_step=self.conventions.update_replaces_step,
            )
            self.run_start = 0
            self._record.begin(self.steps_taken())
            self._planned, self._prepared = False, None
            self._looks = True
            self.set_up()
            if self.steps_taken() == 0:
                self._forget_all()

    def _bind(self, attached):
        """Switches to another model or optimizer, and makes its buffers."""
        attached.prepare(self.name, self.gradient_batches)
        check_exchange(self.name, attached.optimizer, self.dense_gradients)
        super().set_model(attached.model)
        self._attached = attached
        if self.gradient_batches == 1 and attached.batches_per_step == 1:
            self._buffers = None
        elif not (self._buffers and self._buffers.are_for(attached.masked)):
            self._buffers = GradientBuffers(attached.masked)

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
                gradient tape and then `optimizer.apply`, or `apply_gradients`.
                It is traced twice: for ordinary steps and for updates. A
                `tf.function` within it, or as a layer's `call`, would be traced
                only once, and is refused: decorate the result of this method
                instead.
            model: The masked model that it trains.
            optimizer: The optimizer that it applies.

        Returns:
            A function with the same arguments and results.

        Raises:
            ValueError: The model has no masked layer, was made in the scope of
                a strategy, or the run's length is needed: pass `end_step` to
                the method.

        Example:

        >>> train_step = tf.function(
        ...     RigL(end_step=750).wrap(
        ...         train_step, model=model, optimizer=optimizer))
        >>> for x, y in batches:
        ...     loss = train_step(x, y)
        """
        replicas.check_one_device("wrap", model)
        self.attach(model, optimizer)
        self._plan(0, None, None)
        train_step = untraced(train_step)

        def step_or_update(*args, **kwargs):
            # AutoGraph has the user's step to convert, and not this package.
            converted = _keras.converted_as_here(train_step)
            return self._step_or_update(lambda: converted(*args, **kwargs))

        return step_or_update

    @tf.autograph.experimental.do_not_convert
    def _step_or_update(self, train_step):
        return self._updates.step_or_update(train_step)

    @tf.autograph.experimental.do_not_convert
    def update(
        self,
        gradients: Sequence[tf.Tensor | None],
        variables: Sequence[keras.Variable],
    ) -> None:
        """Applies gradients, or changes masks if an update is due.

        Call it instead of `optimizer.apply`, after `attach`. The optimizer gets
        gradients that are zero outside the masks, unless the method keeps dense
        momentum. For a `LossScaleOptimizer`, pass gradients of the loss scaled
        by its `scale_loss`, as usual.

        Args:
            gradients: Gradients of the loss, one for each of `variables`,
                taken within `dense_gradients()`.
            variables: The variables to train.

        Raises:
            ValueError: `attach` was not called, the run's length is needed
                (pass `end_step` to the method), or an update was refused: its
                gradients were not dense, or not finite. A `tf.function` raises
                an InvalidArgumentError for gradients that were not dense, and
                `fetch` reports all others.

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
        replicas.check_one_device("update", self._attached.model)
        if not self._planned:
            self._plan(0, None, None)
        self._updates.apply_or_update(list(gradients), list(variables))
        if tf.executing_eagerly():
            self._record.check(self.name)

    def refuse_unless(
        self, defined: tf.Tensor, step: tf.Tensor, reason: int = NOT_FINITE
    ) -> None:
        """Records that the update at a step was refused, unless `defined`.

        `change_masks` calls it in the graph. `fetch` reports the first refused
        update.

        Args:
            defined: A bool scalar.
            step: The optimizer step, an int64 scalar.
            reason: Index of the reason (`training.update_record`).
        """
        self._record.refuse_unless(defined, step, reason)

    def fetch(self) -> None:
        """Reads the record of updates from the device into `trajectory`.

        `fit` does so automatically. A custom loop must call it at least every
        1,024 updates.

        Raises:
            ValueError: An update was refused, or left replicas with different
                masks.
        """
        self._record.fetch(losses=self.watch_loss)
        with replicas.scope(self._attached.model):
            self._record.follow_masks(self.steps_taken())
        if self._fit is None:
            self._updates.warn_of_unreached()
        self._warn_of_an_idle_optimizer()
        self._record.check(self.name)
        if self._fit is None and self.trajectory[1:]:
            self._warn_of_dead_units()

    def last_logs(self) -> dict[str, float]:
        """Returns the logs of an epoch: density, and the last update's.

        They are in the logs of each epoch of `fit`, for all callbacks.
        """
        logs = {"density": self._record.density, "grown": self._last["grown"]}
        if self._attached.scales_loss:
            logs["skipped_updates"] = self._record.skipped
        return {
            name: float(tf.convert_to_tensor(value))
            for name, value in (logs | self.extra_logs()).items()
        }

    # Keras calls these.

    def set_model(self, model):
        if self._fit is not None and self._fit.model is not model:
            self._refuse_while_running(model)
        super().set_model(model)

    def on_train_begin(self, logs=None):
        model: Any = self.model
        self._refuse_while_running(model)
        if model.optimizer is None:
            raise ValueError(
                f"{self.name} needs a compiled model: call model.compile first."
            )
        prepared, other = self._prepared, installed_update(model)
        self._attach(model, model.optimizer)
        if other is not None:
            raise ValueError(
                "A model can have one mask update at a time. Received both "
                f"{other.name} and {self.name}."
            )
        if prepared is not None and prepared.is_of(model, model.optimizer):
            self._prepared = prepared
        self._calls = 0
        self._fit = fit_runs.FitRun(model)
        self._fit.log_first(self.last_logs)
        self._fit.check_drawn()
        self._fit.warn_of_what_is_lost(self.name, self.variables)
        StepExchange(
            self._fit,
            self._updates,
            watches_loss=lambda: self.watch_loss,
            renew=self._take_what_changed,
            check=self._check_planned,
        ).install(self)

    def on_epoch_begin(self, epoch, logs=None):
        self._looks = True
        if not self._planned:
            self._begin(epoch)
        optimizer = self._attached.optimizer
        self._epoch_start = optimizer, self._batches(), self._calls

    def on_train_batch_begin(self, batch, logs=None):
        if not self._planned:  # a custom loop without epochs
            self._begin(0)
        if self._looks:
            # Other callbacks may have set weights, or restored them.
            self._looks = False
            self.fetch()
        model = self._attached.model
        if model.train_function is None:  # compiled within `fit`
            model.make_train_function()

    def on_train_batch_end(self, batch, logs=None):
        # Not at every step: the host would wait for a GPU.
        self._calls += 1
        if self._calls % FETCH_EVERY == 0:
            self.fetch()

    def on_epoch_end(self, epoch, logs=None):
        self.fetch()
        if logs is not None:
            # Again, because earlier callbacks may have set weights. Not in the
            # logs of a step: the bar would not fit a terminal.
            logs.update(self.last_logs())
        self._updates.warn_of_unreached()
        # At another density, another product may be faster.
        if any([m.product_changes() for m in self._attached.wrappers]):
            self._attached.model.make_train_function(force=True)

    def on_train_end(self, logs=None):
        if self._fit is None:
            return
        if self._planned:  # a fit of no epoch, or no step, plans nothing
            fit_runs.note_end(
                self._attached.model,
                begin=self._first_step,
                end=self._attached.steps_taken() - self._attached.steps_before,
                epochs=self._epochs,
            )
        self._fit.end()
        self._fit = None
        self._warn_of_dead_units()

    def _batches(self):
        return int(optimizer_state.batches(self.optimizer).numpy())

    def _warn_of_an_idle_optimizer(self):
        if self._epoch_start is None:  # a custom loop without epochs
            return
        optimizer, batches, calls = self._epoch_start
        took_steps = self._attached.optimizer is not optimizer or (
            self._batches() != batches or self._attached.scales_loss
        )
        if not took_steps and self._calls > calls and not self._said_idle:
            self._said_idle = True
            fit_runs.warn_of_an_idle_optimizer(self.name, optimizer.name)

    def _warn_of_dead_units(self):
        if not self._said_dead and not self._ablates_units:
            layers = masked_layers(self._attached.model).named
            self._said_dead = warn_of_dead_units(self.name, layers)

    # While `fit` runs.

    def _refuse_while_running(self, model):
        """Checks that the callback trains one model at a time."""
        if self._fit is not None:
            self._fit.check_over(self.name, model)
            self._fit = None

    def _begin(self, epoch):
        """Plans the run, after all callbacks have restored their state."""
        params = self.params or {}
        epochs, steps = params.get("epochs"), params.get("steps")
        model = self._attached.model
        with replicas.scope(model):
            first = self._first_step = self.steps_taken()
            self._epochs = epochs - epoch if epochs else 0
            self._record.begin(first)
            if self._prepared is None:
                self.run_start = fit_runs.start_of(
                    model,
                    self._batches(),
                    each=self._attached.batches_per_step,
                    epoch=epoch,
                    steps=steps,
                    skips=self._attached.scales_loss,
                )
                if self.run_start == first:
                    self._forget_all()
        self._prepared = None
        if self._epochs == 1 and (epoch == 0 or self._measures_the_run):
            fit_runs.warn_of_a_loop(self.name, model, begin=first)
        self._plan(epoch, epochs, steps)

    def _plan(self, epoch, epochs, steps):
        self.plan(epoch, epochs, steps)
        self._planned = True

    def _check_planned(self):
        if not self._planned:
            raise ValueError(
                f"{self.name} plans its updates when the first epoch of fit "
                "begins, but a callback trains the model before. Call "
                f"train_on_batch later, or list that callback after {self.name}"
                "."
            )

    def _take_what_changed(self):
        """Continues with the current optimizer and layers."""
        self.fetch()
        taken, before = self.steps_taken(), self._attached.steps_before
        model = self._attached.model
        attached = Attachment(model, model.optimizer)
        with replicas.scope(model):
            self._bind(attached)
            attached.steps_before = taken - attached.steps_taken()
            self._record.bind(attached)
            self._updates.bind(attached, self._buffers)
            # The run has the same age for the new optimizer as for the old one.
            self.run_start -= attached.steps_before - before
            self.set_up()
