"""The methods of a model that `fit` replaces and restores."""

import contextlib
import functools
import math
from collections.abc import Callable

import keras
import tensorflow as tf

from rigl_keras import _keras, replicas
from rigl_keras._patience import said_if_slow
from rigl_keras.training.fit_runs import FitRun
from rigl_keras.training.graph_updates import GraphUpdates
from rigl_keras.training.method_hooks import MethodHooks

__all__ = ["StepExchange", "installed_update", "untraced"]


class StepExchange:
    """Gives a model a training step with updates while `fit` runs.

    The new `model.train_step` runs the model's own step, or an update. The new
    `model.make_train_function` keeps updates running after `compile`, and when
    other callbacks ask for a new function. `FitRun` restores both.

    Args:
        run: The run of `fit`.
        updates: Runs a step, or an update.
        watches_loss: Returns whether to evaluate the loss of an update's batch.
        renew: Called before the train function is made again: the model may
            have another optimizer, or other layers to train.
        check: Called before each step.
    """

    def __init__(
        self,
        run: FitRun,
        updates: GraphUpdates,
        *,
        watches_loss: Callable[[], bool],
        renew: Callable[[], None],
        check: Callable[[], None],
    ):
        self._run, self._updates = run, updates
        self._watches_loss = watches_loss
        self._renew, self._check = renew, check

    def install(self, owner: MethodHooks) -> None:
        """Replaces the step, and makes the train function.

        Args:
            owner: The callback that `installed_update` returns.

        Raises:
            ValueError: The train function cannot be made. The model's own step
                is restored.
        """
        run, model = self._run, self._run.model
        with_updates = self._traced(self._updates.step_or_update)

        def train_step(data):
            if not run.lasts():
                return model.train_step(data)
            return with_updates(data)

        vars(train_step).update(mask_update=owner, fit_run=run)

        def make_train_function(force=False):
            if not run.lasts():
                return model.make_train_function(force)
            # `train_on_batch` and `fit` do not force a new function, and get
            # the existing one.
            if force or model.train_function is None:
                run.exchange("train_step", train_step)
                self._renew()
                self._make()

        try:
            run.exchange("train_step", train_step)
            run.exchange("make_train_function", make_train_function)
            self._make()
        except BaseException:
            run.end()
            raise

    def _make(self):
        """Makes the train function, which is traced when it is called."""
        run, model = self._run, self._run.model
        make = functools.partial(run.own("make_train_function"), force=True)
        together = replicas.is_distributed(model)
        if together or self._chooses_on_the_host():
            make = self._choosing(together=together)
        self._updates.forget_traces()
        make()
        run.guard(self._check)

    def _chooses_on_the_host(self):
        """Returns whether the host chooses between steps and updates.

        A `tf.cond` would trace both before the first step, which takes three
        times as long as tracing the step alone. Here an update is traced when
        the first one is due. Also, within a `tf.cond` XLA computes convolutions
        on CPUs with one thread, in four times the time. But the host cannot
        choose within a block of steps, and would wait for a GPU at each step.
        """
        model = self._run.model
        if model.steps_per_execution > 1:
            return False
        return model.jit_compile or not tf.config.list_physical_devices("GPU")

    def _choosing(self, *, together):
        """Returns a maker of train functions that choose on the host.

        Replicas are traced side by side, so the host replaces the optimizer for
        all of them (`together`). Then the loss is not watched: each replica has
        only a part of the batch.
        """
        updates, applied = self._updates, []
        active = together and updates.exchanges_active()

        def ordinary(train_step, loss):
            return updates.ordinary_step(train_step)

        def update(train_step, loss):
            if together:
                return updates.replica_update_step(train_step)
            return updates.update_step(train_step, loss)

        @contextlib.contextmanager
        def stepping(is_update):
            with contextlib.ExitStack() as stack:
                if active:
                    stack.enter_context(updates.exchanging_active())
                if together:
                    if is_update:
                        stack.enter_context(updates.updating(applied))
                    stack.enter_context(updates.watching())
                yield

        return replicas.choosing(
            self._run.model,
            self._run.own("make_train_function"),
            ordinary=self._traced(ordinary),
            update=self._traced(update),
            is_due=lambda step: bool(updates.is_gathered(step)),
            stepping=stepping,
            check=updates.check_steps,
        )

    def _traced(self, step):
        """Returns a training step of `fit` with the logs of the model's."""
        run, model = self._run, self._run.model

        def traced(data):
            train_step = untraced(run.own("train_step"))
            loss = _loss_on(model, data) if self._watches_loss() else None
            with _traced_once(model), _announced_if_slow():
                return step(lambda: train_step(data), loss)

        return traced


def _announced_if_slow() -> contextlib.AbstractContextManager:
    """Within the context, slow tracing is announced."""
    if tf.executing_eagerly():  # a step runs, which is not slow tracing
        return contextlib.nullcontext()
    return said_if_slow(
        "Tracing the training step, and again for mask updates (each fit) ..."
    )


def installed_update(model: keras.Model) -> MethodHooks | None:
    """Returns the callback whose updates a model's training step runs.

    Args:
        model: A model in `fit`.

    Returns:
        The `StepUpdate`, from its `on_train_begin` to its `on_train_end`.
    """
    run = getattr(model.train_step, "fit_run", None)
    # A run that was cut off has ended.
    if run is not None and run.model is model and run.lasts():
        return model.train_step.mask_update
    return None


def untraced(train_step: Callable) -> Callable:
    """Returns the Python function within a `tf.function`.

    It would have one trace for both ordinary steps and updates.

    Args:
        train_step: A function, which may be a `tf.function`.
    """
    return getattr(train_step, "python_function", train_step)


def _loss_on(model, data):
    """Returns a function that evaluates the current loss on a batch."""
    if (
        not _keras.has_loss(model)
        and type(model).compute_loss is keras.Model.compute_loss
    ):
        return lambda: tf.constant(math.nan)

    def loss():
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        # The scope keeps what the call would assign; from it, Keras takes the
        # penalties.
        given = [(v, v.value) for v in model.trainable_variables]
        with keras.StatelessScope(given, collect_losses=True):
            outputs = model(x, training=False)
            value = _keras.compute_loss(
                model,
                x=x,
                y=y,
                y_pred=outputs,
                sample_weight=weight,
                training=False,
            )
        return tf.cast(value, tf.float32)

    return loss


def _traced_once(model) -> contextlib.AbstractContextManager:
    """Within the context, variables are made outside of the trace.

    Keras makes the variables of metrics when the first step is traced, and
    TensorFlow traces a function twice if it makes variables.
    """
    # Replicas make variables together, by their strategy.
    if tf.executing_eagerly() or replicas.is_distributed(model):
        return contextlib.nullcontext()

    def make(next_creator, **options):
        if not callable(options.get("initial_value")):  # a tensor of the trace
            return next_creator(**options)
        options["experimental_enable_variable_lifting"] = False
        with tf.init_scope():
            return next_creator(**options)

    return tf.variable_creator_scope(make)
