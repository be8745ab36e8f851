"""Mask changes within the training step: of `fit`, or of a loop of one's own.

A Keras callback sees neither batch nor gradient, so `StepUpdate` has its work
done by the training step itself, where the optimizer would be applied. What
changes, and when, its children say (`callbacks.py`).
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import keras
import tensorflow as tf

from rigl_keras import between, optimizer_state, replicas
from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions
from rigl_keras.layers import (
    Masked,
    called_kernels,
    dense_gradients,
    zero_outside,
)
from rigl_keras.products import dense_products
from rigl_keras.sparsify import leaf_layers, masked_layers

__all__ = ["StepUpdate", "installed_update"]

_FETCH_EVERY = 64  # calls of the training function
_RECORDED = 1024  # updates that the device remembers, at least

# Why an update was refused: the device notes the index.
_NOT_FINITE, _NOT_DENSE = range(2)
_REASONS = (
    "the gradient of a masked kernel, or the kernel, was NaN or infinite, or "
    "a score was NaN. The masks are unchanged. Where training has diverged, "
    "lower the learning rate or clip gradients, and resume from a checkpoint "
    "before this step.",
    "every gradient was exactly zero where masks are zero, so that there is "
    "nothing to grow by. The masks are unchanged. Call the model within "
    "`with rigl_keras.dense_gradients():`, around the gradient tape.",
)


class StepUpdate(keras.callbacks.Callback):
    """Changes masks at some training steps. A method is a child of it.

    At a step that `is_due`, the training step runs as always, with gradients
    that are dense if `dense_gradients` says so, and where the optimizer would
    be applied `change_masks` is called instead; this counts as an optimizer
    step (Evci et al., 2020, arXiv:1911.11134, Algorithm 1). With
    `update_replaces_step=False` the optimizer is applied first.

    The step is `optimizer.iterations`, so that a resumed run needs no state
    of the callback beyond its `variables`, which are none by default.

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
        masked: The masked layers that are trained, once attached to a model.
        optimizer: The optimizer that trains them, within any loss scaling.
        trajectory: `[(step, counts)]`: the active connections of each masked
            layer before the first step and after each update of this run.
        name: The method as the report names it.

    Raises:
        ValueError: In `fit`, when the model has no masked layers, the run's
            length is needed and unknown, gradients are not finite, or the
            masks of two replicas differ.
        UserWarning: No update falls into the run.
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
        self.update_losses = []
        self._buffers = []
        self._last = {}

    # What makes a method.

    def is_due(self, step):
        """Returns whether masks change at a step.

        Args:
            step: The optimizer step, an int or an integer tensor.

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
        """Is called when attached, with `masked` and `optimizer` set."""

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
        training begins, so as to restore them.

        Args:
            model: A masked model.
            optimizer: The optimizer that trains it.

        Raises:
            ValueError: The model has no masked layer, or is trained in a way
                that is not supported.
        """
        trained = {id(v) for v in model.trainable_variables}
        masked = [m for m in masked_layers(model) if id(m.kernel) in trained]
        if not masked:
            raise ValueError(
                f"{self.name} found no masked layer to train in model "
                f"{model.name!r}. Call model = rigl_keras.sparsify(model, "
                "density) before compile."
            )
        _check_set_up(self.name, model, optimizer, self.gradient_batches)
        with replicas.scope(model):
            self._attach(model, optimizer, masked)

    def _attach(self, model, optimizer, masked):
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        self._model, self._outermost = model, optimizer
        self.optimizer = optimizer_state.innermost(optimizer)
        if any(layer.product != "dense" for layer in _wrappers(model)):
            between.hasten(model)  # one that was loaded, as what it was before
        self._make_room(masked)
        counts = self._counts()
        self.trajectory = [
            (int(optimizer.iterations.numpy()), tuple(counts.numpy().tolist()))
        ]
        executed = getattr(model, "steps_per_execution", 1)
        rows = max(_RECORDED, _FETCH_EVERY * executed)
        self._record = tf.Variable(
            tf.zeros([rows, 1 + len(self.masked)], tf.int64), trainable=False
        )
        self._losses = tf.Variable(tf.zeros([rows, 2]), trainable=False)
        self._kept = tf.Variable(0, trainable=False)
        self._density = tf.Variable(self._density_of(counts), trainable=False)
        # The same variables for as long as the callback lives: a checkpoint
        # may hold them already.
        for name in self._logged:
            if name not in self._last:
                self._last[name] = tf.Variable(0.0, trainable=False)
            elif int(optimizer.iterations.numpy()) == 0:
                self._last[name].assign(0.0)
        self._skipped = tf.Variable(0, trainable=False, dtype=tf.int64)
        self._refused = tf.Variable(
            [-1, _NOT_FINITE], trainable=False, dtype=tf.int64
        )
        self._differ_at = tf.Variable(-1, trainable=False, dtype=tf.int64)
        self._planned = False
        self._called = {}
        self.update_losses = []
        self.set_up()

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
        _check_one_device("wrap", model)
        self.attach(model, optimizer)
        self._plan(0, None, None)
        train_step = _untraced(train_step)

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
        _check_one_device("update", self._model)
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

    def refuse_unless(self, defined, step, reason=_NOT_FINITE) -> None:
        """Notes that the update at a step was refused, unless `defined`.

        The first such update is the one that `fetch` tells of.
        """
        refused = tf.stack([step, tf.constant(reason, tf.int64)])
        keeps = defined | (self._refused[0] >= 0)
        self._refused.assign(tf.where(keeps, self._refused, refused))

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
        layer.mask.assign(tf.cast(mask, layer.mask.dtype))
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
            rows = self._record.numpy()[:kept].tolist()
            self.trajectory += [(step, tuple(counts)) for step, *counts in rows]
            if self.watch_loss:
                losses = self._losses.numpy()[:kept].tolist()
                self.update_losses += [
                    (row[0], *loss)
                    for row, loss in zip(rows, losses, strict=True)
                ]
            self._kept.assign(0)
        step, reason = self._refused.numpy().tolist()
        if step >= 0:
            raise ValueError(
                f"{self.name} refused the update at step {step}: "
                f"{_REASONS[reason]}"
            )
        step = int(self._differ_at.numpy())
        if step >= 0:
            raise ValueError(
                f"After the update at step {step} the replicas hold different "
                "masks. Every process must make the model with the same seed, "
                "load the same checkpoint and be given the same arguments of "
                f"{self.name}. Resume from a checkpoint before this step."
            )

    # Keras calls these.

    def on_train_begin(self, logs=None):
        model = self.model
        if model.optimizer is None:
            raise ValueError(
                f"{self.name} needs a compiled model: call model.compile first."
            )
        self.attach(model, model.optimizer)
        if installed_update(model) is not None:
            raise ValueError(
                "A model takes one mask update at a time. Received both "
                f"{installed_update(model).name} and {self.name}."
            )
        self._calls = 0
        self._install()

    def on_epoch_begin(self, epoch, logs=None):
        if not self._planned:
            self._plan(
                epoch, self.params.get("epochs"), self.params.get("steps")
            )

    def on_train_batch_end(self, batch, logs=None):
        # Not every step: on a GPU the host would wait for it.
        self._calls += 1
        if self._calls % _FETCH_EVERY == 0:
            self.fetch()

    def on_epoch_end(self, epoch, logs=None):
        self.fetch()
        # Of a mask that has changed in density, another product may be faster.
        if any([m.product_changes() for m in _wrappers(self.model)]):
            self.model.make_train_function(force=True)

    def on_train_end(self, logs=None):
        self._uninstall()

    # The model's own step, exchanged while `fit` runs.

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
        model, train_step = self.model, _untraced(self.model.train_step)
        make_train_function = model.make_train_function
        self._replaced = {
            name: vars(model).get(name)
            for name in ("train_step", "make_train_function")
        }

        scaled = self._outermost is not self.optimizer

        def with_logs(step):
            def logged(data):
                loss = _loss_on(model, data) if self.watch_loss else None
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

        with_updates = with_logs(self._step_or_update)
        with_updates.mask_update = self
        model.train_step = with_updates
        make = functools.partial(make_train_function, force=True)
        together = replicas.is_distributed(model)
        # Within a `tf.cond` XLA computes convolutions on CPUs with one thread:
        # a step would take four times as long.
        alone = model.jit_compile and model.steps_per_execution == 1
        if together or alone:
            make = self._choosing(
                make_train_function, with_logs, together=together
            )
        make()

        def next_fit(force=False):
            # `fit` asks for its function, not by force, before it calls any
            # callback: an earlier one was cut off before `on_train_end`. By
            # force others ask within a `fit`, as after freezing a layer.
            if force:
                return make()
            self._uninstall()
            return make_train_function()

        model.make_train_function = next_fit

    def _uninstall(self):
        for name, own in self._replaced.items():
            if own is None:
                vars(self.model).pop(name, None)
            else:
                setattr(self.model, name, own)
        self._replaced = {}
        self.model.train_function = None

    def _counts(self):
        return tf.stack(
            [tf.math.count_nonzero(m.mask.value) for m in self.masked]
        )

    def _density_of(self, counts):
        weights = sum(math.prod(m.mask.shape) for m in self.masked)
        return tf.cast(tf.reduce_sum(counts) / weights, tf.float32)

    def _choosing(self, make_train_function, with_logs, *, together):
        applied = []

        def ordinary(train_step, loss):
            return self._ordinary_step(self._as_ordinary(train_step))

        # Replicas are traced side by side, so that the host exchanges the
        # optimizer's part for all of them. The loss is not watched there:
        # each replica has a part of the batch.
        def update(train_step, loss):
            alone = (
                contextlib.nullcontext()
                if together
                else (self._updating([], loss))
            )
            with alone:
                return self._counted_step(_densely(train_step))

        def updating():
            return (
                self._updating(applied)
                if together
                else (contextlib.nullcontext())
            )

        return replicas.choosing(
            self.model,
            make_train_function,
            ordinary=with_logs(ordinary),
            update=with_logs(update),
            is_due=self.is_gathered,
            updating=updating,
        )

    # In the graph.

    def _step_or_update(self, train_step, loss=None):
        """Runs a training step, or an update in place of its optimizer."""
        return self._either(
            ordinary=self._as_ordinary(train_step),
            dense=_densely(train_step),
            loss=loss,
        )

    def _as_ordinary(self, train_step):
        """Returns a training step with the gradients of most steps."""
        always = self.dense_gradients == "always"
        return _densely(train_step) if always else train_step

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
        with (
            called_kernels() as called,
            dense_products() if jit else contextlib.nullcontext(),
        ):
            outputs = _tensors(train_step())
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
        return outputs

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
            variables = trainable_variables or optimizer._trainable_variables
            layers, dense = self._of_kernels(gradients, variables)

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

        with _applying(optimizer, gather_or_update):
            yield
        scaled = self._outermost is not optimizer
        # Eagerly, loss scaling passes over gradients that are not finite.
        if not applied and not (scaled and tf.executing_eagerly()):
            raise ValueError(
                f"{self.name} takes the place of optimizer.apply, which this "
                "training step never calls. Pass the optimizer that it applies."
            )

    def _of_kernels(self, gradients, variables):
        """Returns the layers that have a gradient, and dL/d(masked kernel)."""
        of = {_key(v): g for v, g in zip(variables, gradients, strict=True)}
        layers = [m for m in self.masked if of.get(_key(m.kernel)) is not None]
        if not layers:
            raise ValueError(
                f"{self.name} needs the gradient of a masked kernel. Received "
                f"gradients of {[v.name for v in variables]}: does the loss "
                "depend on the masked layers?"
            )
        scale = self.optimizer.loss_scale_factor or 1.0  # a fixed one
        summed = replicas.summed(
            [tf.convert_to_tensor(of[_key(m.kernel)]) for m in layers]
        )
        dense = [
            gradient / tf.cast(scale, gradient.dtype)
            - _regularisation_gradient(m.kernel)
            for gradient, m in zip(summed, layers, strict=True)
        ]
        return layers, dense

    def _masked_gradients(self, gradients, variables):
        """Returns what the optimizer gets, zero outside the masks."""
        masks = {}
        if self.dense_gradients != "always":
            masks = {_key(m.kernel): m.mask for m in self.masked}

        def masked(gradient, variable):
            if gradient is None:
                return None
            if _key(variable) not in masks:
                # Within a branch, which the optimizer takes all or none from.
                return tf.identity(gradient)
            return zero_outside(masks[_key(variable)], gradient)

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
            dense = _is_dense(layers, gradients)
            accepted &= dense
            self.refuse_unless(dense, step, _NOT_DENSE)

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
        for layer in self.masked:
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
    return getattr(model.train_step, "mask_update", None)


@contextlib.contextmanager
def _applying(optimizer, action) -> Iterator[None]:
    """Within the context, `optimizer.apply` is `action`."""
    before = vars(optimizer).get("apply")
    optimizer.apply = action
    try:
        yield
    finally:
        del optimizer.apply
        if before is not None:
            optimizer.apply = before


def _regularisation_gradient(kernel):
    """Returns the gradient of a kernel's own penalty, or 0 without one."""
    if kernel.regularizer is None:
        return 0.0
    value = tf.convert_to_tensor(kernel.value)
    with tf.GradientTape() as tape:
        tape.watch(value)
        penalty = kernel.regularizer(value)
    return tape.gradient(
        penalty, value, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )


def _is_dense(layers, gradients):
    """Returns whether gradients reach entries that masks remove.

    They may all be zero, as those of a dead network, and nothing may be
    removed.
    """
    removed = [m.mask.value <= 0 for m in layers]
    moved = [g != 0 for g in gradients]
    reached = tf.reduce_any(
        [tf.reduce_any(m & r) for m, r in zip(moved, removed, strict=True)]
    )
    any_removed = tf.reduce_any([tf.reduce_any(r) for r in removed])
    any_moved = tf.reduce_any([tf.reduce_any(m) for m in moved])
    return reached | ~(any_removed & any_moved)


def _loss_on(model, data):
    """Returns a function that evaluates the loss on a batch, as it is then."""
    compiles_none = getattr(model, "_compile_loss", None) is None
    if compiles_none and type(model).compute_loss is keras.Model.compute_loss:
        return lambda: tf.constant(math.nan)

    def loss():
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        # What the call would assign stays in the scope; of what it is given,
        # Keras takes the penalties.
        given = [(v, v.value) for v in model.trainable_variables]
        with keras.StatelessScope(given, collect_losses=True):
            outputs = model(x, training=False)
            # Keras's own way to a `compute_loss` with or without `training`.
            value = model._compute_loss(
                x=x,
                y=y,
                y_pred=outputs,
                sample_weight=weight,
                training=False,
            )
        return tf.cast(value, tf.float32)

    return loss


def _untraced(train_step):
    """Returns the Python function within a `tf.function`.

    One trace would serve ordinary steps and updates alike.
    """
    return getattr(train_step, "python_function", train_step)


def _key(variable):
    # An optimizer takes Keras variables and those that they hold.
    return id(
        variable.value if isinstance(variable, keras.Variable) else variable
    )


def _densely(train_step):
    def with_dense_gradients():
        with dense_gradients():
            return train_step()

    return with_dense_gradients


def _tensors(logs):
    return tf.nest.map_structure(
        lambda x: x if x is None else tf.convert_to_tensor(x), logs
    )


def _check_one_device(function, model):
    if replicas.is_distributed(model):
        raise ValueError(
            f"{function} is for training steps of one device, and the model "
            "was made in the scope of a "
            f"{type(model.distribute_strategy).__name__}. Override "
            "keras.Model.train_step and call model.fit, or make the model "
            "outside the scope."
        )


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
