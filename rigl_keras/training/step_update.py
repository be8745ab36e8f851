"""The callback that changes masks within the training step.

A Keras callback sees neither batch nor gradient. So the training step itself
does the work of `StepUpdate`, at the place where it would apply the optimizer.
What changes, and when, its children say (`rigl_keras.methods`).
"""

import warnings
from collections.abc import Callable
from typing import Literal

import keras
import tensorflow as tf

from rigl_keras import replicas
from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions
from rigl_keras.masking.masked import KernelMask
from rigl_keras.training import fit_runs, optimizer_state
from rigl_keras.training.attachment import Attachment, variable_key
from rigl_keras.training.dense_gradients import GradientBuffers
from rigl_keras.training.graph_updates import GraphUpdates
from rigl_keras.training.train_function import StepExchange, untraced
from rigl_keras.training.update_record import (
    FETCH_EVERY,
    NOT_FINITE,
    UpdateRecord,
)

__all__ = ["StepUpdate", "installed_update", "warn_of_no_update"]


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
        self.run_start = 0
        # What is attached, and the collaborators that work on it.
        self._attached: Attachment | None = None
        self._buffers: GradientBuffers | None = None
        self._record: UpdateRecord | None = None
        self._updates: GraphUpdates | None = None
        # The run of `fit`, and what `attach` was called with before it.
        self._fit: fit_runs.FitRun | None = None
        self._prepared: Attachment | None = None
        # The logged variables of the last update, by name: the same for as
        # long as the callback lives, as a checkpoint may hold them.
        self._last: dict[str, tf.Variable] = {}

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
        layers: list[KernelMask],
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
        return (
            int(self._attached.applied.iterations.numpy())
            + self._counted_before
        )

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
    def optimizer(self) -> keras.Optimizer | None:
        return self._attached.optimizer if self._attached else None

    @property
    def masked(self) -> list[KernelMask]:
        return self._attached.masked if self._attached else []

    @property
    def trajectory(self) -> list[tuple[int, tuple[int, ...]]]:
        return self._record.trajectory if self._record else []

    @property
    def update_losses(self) -> list[tuple[int, float, float]]:
        return self._record.losses if self._record else []

    @property
    def skipped_updates(self) -> int:
        """How often loss scaling has put an update off to the next batch."""
        return int(self._record.skipped.numpy()) if self._record else 0

    @property
    def variables(self) -> list[tf.Variable]:
        return self._buffers.variables if self._buffers else []

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
        self._prepared = self._attached

    def _attach(self, model, optimizer):
        attached = Attachment(model, optimizer)
        if not attached.trainable():
            raise ValueError(
                f"{self.name} found no masked layer to train in model "
                f"{model.name!r}. Call model = rigl_keras.sparsify(model, "
                "density) before compile, and do not freeze all that it masks."
            )
        with replicas.scope(model):
            self._bind(attached)
            for name in self._logged:
                if name not in self._last:
                    self._last[name] = tf.Variable(0.0, trainable=False)
            self._record = UpdateRecord(attached, self._last)
            self._updates = GraphUpdates(
                attached,
                self._record,
                self._buffers,
                method=self.name,
                is_due=self.is_due,
                is_gathered=self.is_gathered,
                change_masks=self.change_masks,
                dense_gradients=self.dense_gradients,
                update_replaces_step=self.conventions.update_replaces_step,
            )
            self.run_start, self._counted_before = 0, 0
            self._record.begin(self.steps_taken())
            self._planned, self._prepared = False, None
            self._looks = self._warns_of_unreached = True
            self.set_up()
            if self.steps_taken() == 0:
                self._forget_all()

    def _bind(self, attached):
        """Takes what is trained from now on, with room for its gradients."""
        attached.prepare(self.name, self.gradient_batches)
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
        replicas.check_one_device("wrap", model)
        self.attach(model, optimizer)
        self._plan(0, None, None)
        train_step = untraced(train_step)

        def step_or_update(*args, **kwargs):
            return self._updates.step_or_update(
                lambda: train_step(*args, **kwargs)
            )

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
        if self._attached is None:
            raise ValueError(
                f"{self.name} does not know what it trains: call "
                "attach(model, optimizer) before update."
            )
        replicas.check_one_device("update", self._attached.model)
        if not self._planned:
            self._plan(0, None, None)
        self._updates.apply_or_update(list(gradients), list(variables))

    # For `change_masks`, in the graph.

    def refuse_unless(
        self, defined: tf.Tensor, step: tf.Tensor, reason: int = NOT_FINITE
    ) -> None:
        """Notes that the update at a step was refused, unless `defined`.

        `fetch` reports the first such update.

        Args:
            defined: A bool scalar.
            step: The optimizer step, an int64 scalar.
            reason: Index of the reason (`training.update_record`).
        """
        self._record.refuse_unless(defined, step, reason)

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

    # The record of updates.

    def fetch(self) -> None:
        """Takes the record of updates from the device into `trajectory`.

        `fit` does so by itself. A custom loop calls it now and then, at least
        every 1,024 updates.

        Raises:
            ValueError: An update was refused, or has left replicas with
                different masks.
        """
        self._record.fetch(
            steps_before=self._counted_before, losses=self.watch_loss
        )
        with replicas.scope(self._attached.model):
            self._record.follow_masks(self.steps_taken())
        if self._fit is None:
            self._warn_of_unreached()
        self._record.check(self.name)

    def _warn_of_unreached(self):
        """Warns once of masks that stay, though their layers are trained."""
        reached = self._updates.reached
        if not reached or not self._warns_of_unreached:
            return
        self._warns_of_unreached = False
        names = [
            m.name
            for m in self._attached.trainable()
            if variable_key(m.kernel) not in reached
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
        other = installed_update(model)
        if other is not None:
            raise ValueError(
                "A model takes one mask update at a time. Received both "
                f"{other.name} and {self.name}."
            )
        if (
            prepared is not None
            and prepared.model is model
            and prepared.applied is model.optimizer
        ):
            self._prepared = prepared
        self._calls = 0
        self._fit = fit_runs.FitRun(model)
        StepExchange(
            self._fit,
            self._updates,
            logs=self._logs,
            watches_loss=lambda: self.watch_loss,
            renew=self._take_what_changed,
            check=self._check_planned,
        ).install(self)

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
        if self._calls % FETCH_EVERY == 0:
            self.fetch()

    def on_epoch_end(self, epoch, logs=None):
        self.fetch()
        if logs is not None and "density" in logs:
            logs["density"] = float(self._record.density.numpy())
        self._warn_of_unreached()
        # Of a mask that has changed in density, another product may be faster.
        if any([m.product_changes() for m in self._attached.wrappers]):
            self.model.make_train_function(force=True)

    def on_train_end(self, logs=None):
        if self._fit is None:
            return
        fit_runs.note_end(
            self._attached.model,
            begin=self._first_step,
            end=int(self._attached.applied.iterations.numpy()),
            epochs=self._epochs,
        )
        self._fit.end()
        self._fit = None

    # While `fit` runs.

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
        with replicas.scope(self.model):
            first = self._first_step = self.steps_taken()
            self._epochs = epochs - epoch if epochs else 0
            self._record.begin(first)
            if self._prepared is None:
                self.run_start = fit_runs.start_of(
                    self.model,
                    int(optimizer_state.batches(self.optimizer).numpy()),
                    each=self._attached.batches_per_step,
                    epoch=epoch,
                    steps=steps,
                    skips=self._attached.scales_loss,
                )
                if self.run_start == first:
                    self._forget_all()
        self._prepared = None
        if self._epochs == 1 and (epoch == 0 or self._measures_the_run):
            fit_runs.warn_of_a_loop(self.name, self.model, begin=first)
        self._plan(epoch, epochs, steps)

    # Whether what is planned depends on how long the run is.
    _measures_the_run = False

    def _plan(self, epoch, epochs, steps):
        self.plan(epoch, epochs, steps)
        self._planned = True

    def _check_planned(self):
        if not self._planned:
            raise ValueError(
                f"{self.name} plans its updates as the first epoch of fit "
                "begins, and a callback trains the model before that. Call "
                f"train_on_batch later, or list that callback after {self.name}"
                "."
            )

    def _take_what_changed(self):
        """Goes on with the optimizer and the layers that there are now."""
        model = self._attached.model
        self.fetch()
        taken = self.steps_taken()
        with replicas.scope(model):
            self._bind(Attachment(model, model.optimizer))
            self._record.bind(self._attached)
            self._updates.bind(self._attached, self._buffers)
            before, self._counted_before = self._counted_before, 0
            self._counted_before = taken - self.steps_taken()
            # The run is as old for the new optimizer as it was for the other.
            self.run_start -= self._counted_before - before
            self.set_up()

    def _logs(self):
        """Returns what a step logs beside what the model's own does."""
        skipped = {"skipped_updates": self._record.skipped.value()}
        return {
            "density": self._record.density.value(),
            "grown": self._last["grown"].value(),
            **(skipped if self._attached.scales_loss else {}),
            **self.extra_logs(),
        }


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
