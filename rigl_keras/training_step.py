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

from rigl_keras import optimizer_state, replicas
from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions
from rigl_keras.layers import Masked, dense_gradients
from rigl_keras.sparsify import masked_layers

__all__ = ["StepUpdate"]

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
    of the callback beyond its `variables`, which are none by default.

    Logs, which History, the progress bar and TensorBoard show: `density` of
    all masked weights, and `grown` (connections) at the last update.

    Args:
        conventions: Where the references differ.

    Attributes:
        dense_gradients: When the method needs gradients at inactive entries:
            `"never"`, at its `"updates"` or `"always"`. It decides what
            training costs (`flops.training_flops`).
        variables: What must be saved for a run to resume exactly, beside the
            model and its optimizer.
        masked: The masked layers that are trained, once training begins.
        optimizer: The optimizer that trains them.
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

    def __init__(self, *, conventions: Conventions = ORIGINAL):
        super().__init__()
        check_conventions(conventions)
        self.conventions = conventions

    # What makes a method.

    def is_due(self, step):
        """Returns whether masks change at a step.

        Args:
            step: The optimizer step, an int or an integer tensor.

        Returns:
            A bool, or a bool tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} must define is_due.")

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
        """Is called when training begins, with `masked` and `optimizer` set."""

    def plan(self, epoch: int, epochs: int | None, steps: int | None) -> None:
        """Is told of the run, before its first step.

        Args:
            epoch: The epoch that begins.
            epochs: The epoch to end before, or None where unknown.
            steps: Steps in an epoch, or None where unknown.
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
    def variables(self) -> list[tf.Variable]:
        return []

    # A loop of one's own.

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
                ordinary steps and for updates.
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
        if replicas.is_distributed(model):
            raise ValueError(
                "wrap takes the training step of one device, and the model "
                "was made in the scope of a "
                f"{type(model.distribute_strategy).__name__}. Override "
                "keras.Model.train_step and call model.fit, or make the model "
                "outside the scope."
            )
        self._attach(model, optimizer)
        self.plan(0, None, None)

        def step_or_update(*args, **kwargs):
            return self._step_or_update(
                lambda: train_step(*args, **kwargs), optimizer
            )

        return step_or_update

    def update(self, optimizer, gradients, variables, step) -> None:
        """Changes every mask once, by the gradients of one batch.

        Gradients that are not finite are refused: nothing changes. Under a
        strategy, where this is called by each replica, they are summed first.

        Args:
            optimizer: The optimizer that trains the model.
            gradients: Gradients taken within `layers.dense_gradients()`, one
                for each of `variables`.
            variables: The variables they belong to; other variables than
                masked kernels are left alone.
            step: The optimizer step, an integer scalar.
        """
        of = {id(v): g for v, g in zip(variables, gradients, strict=True)}
        layers = [m for m in self.masked if of.get(id(m.kernel)) is not None]
        summed = replicas.summed(
            [tf.convert_to_tensor(of[id(m.kernel)]) for m in layers]
        )
        replicas.once(
            functools.partial(self._update, optimizer, layers),
            [step, *summed],
        )
        if tf.distribute.has_strategy():
            same = replicas.agree([m.mask.value for m in self.masked])
            replicas.once(self._note_unless, [same, step])

    def _note_unless(self, same, step):
        self._differ_at.assign(tf.where(same, self._differ_at, step))

    def _update(self, optimizer, layers, step, *gradients):
        gradients = [
            gradient - _regularisation_gradient(m.kernel)
            for gradient, m in zip(gradients, layers, strict=True)
        ]
        finite = tf.reduce_all(
            [tf.reduce_all(tf.math.is_finite(g)) for g in gradients]
            + [tf.reduce_all(tf.math.is_finite(m.kernel.value)) for m in layers]
        )

        def change():
            grown = self.change_masks(optimizer, layers, gradients, step)
            counts = self._counts()
            self._grown.assign(tf.cast(grown, tf.float32))
            self._density.assign(self._density_of(counts))
            rows = self._record.shape[0]
            row = tf.minimum(self._kept, rows - 1)
            here = tf.expand_dims(tf.equal(tf.range(rows), row), axis=1)
            values = tf.concat([[step], counts], axis=0)
            self._record.assign(tf.where(here, values, self._record))
            self._kept.assign(row + 1)

        tf.cond(finite, change, lambda: self.refuse_unless(False, step))

    def refuse_unless(self, defined, step) -> None:
        """Notes that the update at a step was refused, unless `defined`."""
        self._refused_at.assign(tf.where(defined, self._refused_at, step))

    def set_kernel_and_mask(self, optimizer, layer, mask, grown) -> tf.Tensor:
        """Gives a layer its new mask; what is new starts from nothing.

        Weights outside the mask and newly grown ones become zero, and the
        optimizer forgets what it remembered of them. With dense momentum it
        remembers all (Dettmers and Zettlemoyer, 2020).

        Args:
            optimizer: The optimizer that trains the model.
            layer: A masked layer.
            mask: Bool tensor of the kernel's shape.
            grown: Bool tensor of the kernel's shape, within `mask`.

        Returns:
            How many connections were grown, an integer scalar.
        """
        kernel = layer.kernel
        before = layer.mask.value > 0
        kernel.assign(
            tf.where(mask & ~grown, kernel.value, tf.zeros_like(kernel.value))
        )
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
            self._kept.assign(0)
        step = int(self._refused_at.numpy())
        if step >= 0:
            raise ValueError(
                f"{self.name} refused the update at step {step}: the gradient "
                "of a masked kernel, or the kernel, was NaN or infinite, or a "
                "score was NaN. The masks are unchanged. Where training has "
                "diverged, lower the learning rate or clip gradients, and "
                "resume from a checkpoint before this step."
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
        with replicas.scope(model):
            self._attach(model, model.optimizer)
        if _installed(model) is not None:
            raise ValueError(
                "A model takes one mask update at a time. Received both "
                f"{_installed(model).name} and {self.name}."
            )
        self._planned = False
        self._calls = 0
        self._install()

    def on_epoch_begin(self, epoch, logs=None):
        if not self._planned:
            self.plan(
                epoch, self.params.get("epochs"), self.params.get("steps")
            )
            self._planned = True

    def on_train_batch_end(self, batch, logs=None):
        # Not every step: on a GPU the host would wait for it.
        self._calls += 1
        if self._calls % _FETCH_EVERY == 0:
            self.fetch()

    def on_epoch_end(self, epoch, logs=None):
        self.fetch()

    def on_train_end(self, logs=None):
        self._uninstall()
        # An optimizer that averages weights does so before their constraint
        # applies, and has written its averages back by now.
        for layer in self.masked:
            layer.assign_mask(layer.mask.value)

    # The model's own step, exchanged while `fit` runs.

    def _attach(self, model, optimizer):
        """Finds what there is to train and makes room for its records."""
        trained = {id(v) for v in model.trainable_variables}
        self.masked = [
            m for m in masked_layers(model) if id(m.kernel) in trained
        ]
        if not self.masked:
            raise ValueError(
                f"{self.name} found no masked layer to train in model "
                f"{model.name!r}. Call model = rigl_keras.sparsify(model, "
                "density) before compile."
            )
        _check_set_up(self.name, model, optimizer)
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        self.optimizer = optimizer_state.innermost(optimizer)
        counts = self._counts()
        self.trajectory = [
            (int(optimizer.iterations.numpy()), tuple(counts.numpy().tolist()))
        ]
        executed = getattr(model, "steps_per_execution", 1)
        rows = max(_RECORDED, _FETCH_EVERY * executed)
        self._record = tf.Variable(
            tf.zeros([rows, 1 + len(self.masked)], tf.int64), trainable=False
        )
        self._kept = tf.Variable(0, trainable=False)
        self._density = tf.Variable(self._density_of(counts), trainable=False)
        self._grown = tf.Variable(0.0, trainable=False)
        self._refused_at = tf.Variable(-1, trainable=False, dtype=tf.int64)
        self._differ_at = tf.Variable(-1, trainable=False, dtype=tf.int64)
        self.set_up()

    def _install(self):
        model, train_step = self.model, self.model.train_step
        make_train_function = model.make_train_function
        self._replaced = {
            name: vars(model).get(name)
            for name in ("train_step", "make_train_function")
        }

        def with_logs(step):
            def logged(data):
                return {
                    **step(lambda: train_step(data)),
                    "density": self._density.value(),
                    "grown": self._grown.value(),
                    **self.extra_logs(),
                }

            return logged

        with_updates = with_logs(
            lambda step: self._step_or_update(step, model.optimizer)
        )
        with_updates.mask_update = self
        model.train_step = with_updates
        make = functools.partial(make_train_function, force=True)
        if replicas.is_distributed(model):
            make = self._choosing(make_train_function, with_logs)
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

    def _choosing(self, make_train_function, with_logs):
        applied = []
        return replicas.choosing(
            self.model,
            make_train_function,
            ordinary=with_logs(self._ordinary_step),
            update=with_logs(_dense_step),
            is_due=self.is_due,
            updating=lambda: self._updating(self.model.optimizer, applied),
        )

    # In the graph.

    def _step_or_update(self, train_step, optimizer):
        """Runs a training step, or an update in place of its optimizer."""
        return tf.cond(
            self.is_due(tf.cast(optimizer.iterations, tf.int64)),
            lambda: self._update_step(train_step, optimizer),
            lambda: self._ordinary_step(train_step),
        )

    def _ordinary_step(self, train_step):
        if self.dense_gradients != "always":
            return _tensors(train_step())
        return _dense_step(train_step)

    def _update_step(self, train_step, optimizer):
        with self._updating(optimizer, []):
            return _dense_step(train_step)

    @contextlib.contextmanager
    def _updating(self, optimizer, applied):
        """Within the context, an update takes the place of the optimizer.

        `applied` grows as the training step is traced, which happens once.
        """
        optimizer = optimizer_state.innermost(optimizer)
        apply = optimizer.apply

        def update_instead(gradients, trainable_variables=None):
            applied.append(True)
            step = tf.cast(optimizer.iterations, tf.int64)
            variables = trainable_variables or optimizer._trainable_variables
            if self.conventions.update_replaces_step:
                self.update(optimizer, gradients, variables, step)
                optimizer._iterations.assign_add(1)
                return
            masks = {id(m.kernel): m.mask.value for m in self.masked}
            if self.dense_gradients == "always":
                masks = {}
            sparse = [
                g * masks[id(v)] if g is not None and id(v) in masks else g
                for g, v in zip(gradients, variables, strict=True)
            ]
            apply(sparse, variables)
            self.update(optimizer, gradients, variables, step)

        with _applying(optimizer, update_instead):
            yield
        if not applied:
            raise ValueError(
                f"{self.name} takes the place of optimizer.apply, which this "
                "training step never calls. Pass the optimizer that it applies."
            )


def _dense_step(train_step):
    with dense_gradients():
        return _tensors(train_step())


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


def _tensors(logs):
    return tf.nest.map_structure(
        lambda x: x if x is None else tf.convert_to_tensor(x), logs
    )


def _installed(model):
    """Returns the callback whose updates a model's training step runs."""
    return getattr(model.train_step, "mask_update", None)


def _check_set_up(method, model, optimizer):
    for part in (optimizer, optimizer_state.innermost(optimizer)):
        steps = part.gradient_accumulation_steps
        if steps:
            raise ValueError(
                f"{method} does not support gradient accumulation yet: its "
                f"growth gradient would be that of the last of {steps} "
                "micro-batches. Use a larger batch, or "
                "gradient_accumulation_steps=None."
            )
    parts = [optimizer, optimizer_state.innermost(optimizer)]
    replicas.check_set_up(method, model, parts)


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
