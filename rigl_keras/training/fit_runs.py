"""A run of `fit`: where it begins, when it ends, and what it replaces.

Keras tells a callback when `fit` begins and ends, but not when an exception
ends it. So each method that a run replaces checks, when it is called, whether
that `fit` is still running, and restores itself if not.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from rigl_keras import _keras
from rigl_keras._warn import warn
from rigl_keras.masking.masked import KernelMask

__all__ = [
    "FitRun",
    "note_end",
    "start_of",
    "warn_of_a_loop",
    "warn_of_an_idle_optimizer",
    "warn_of_full_masks",
    "warn_of_no_update",
]

# This many fits of one epoch in a row are probably a loop.
_LOOP = 3
# For each model: the number of fits of one epoch with a mask update in a row,
# and the optimizer step at which the last one ended.
_one_epoch_fits = weakref.WeakKeyDictionary()
_warned = weakref.WeakSet()


class FitRun:
    """A running `fit`, and the methods of the model that it replaces.

    Make it in a callback's `on_train_begin`. A custom loop that calls callbacks
    lasts until it calls `on_train_end`, or until its `CallbackList` is deleted.

    Args:
        model: The model that is trained.
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self._own, self._before, self._given = {}, {}, {}
        self._over = False
        self._thread = threading.get_ident()
        self._callbacks, self._code = None, None
        callbacks, caller = _who_begins()
        if callbacks is not None:
            self._callbacks = weakref.ref(callbacks)
            # Called once the frame of `fit` is gone; a traceback may keep it.
            self._finalizer = weakref.finalize(callbacks, self.end)
            self._finalizer.atexit = False
        # A helper function that begins a loop returns before the loop ends.
        if caller is not None and caller.co_name == "fit":
            self._code = caller

    def lasts(self) -> bool:
        """Returns whether the run continues; ends it if it was cut off."""
        if not self._over and not self._is_executed():
            self.end()
        return not self._over

    def check_over(self, method: str, model: keras.Model) -> None:
        """Checks that the method of this run may train another model.

        Args:
            method: Name of the method.
            model: The model that it is to train.

        Raises:
            ValueError: The run has not ended.
        """
        if self.lasts():
            raise ValueError(
                f"{method} trains model {self.model.name!r} in a run that has "
                f"not ended, but was given to another, of model {model.name!r}"
                ". A `fit` within `fit` on the same model needs no callback: "
                "updates continue in it. For another model make another "
                "callback. A custom loop must end with on_train_end."
            )

    def _is_executed(self):
        callbacks = self._callbacks and self._callbacks()
        if self._callbacks is not None and callbacks is None:
            return False
        if self._code is None:
            return True
        frame = sys._current_frames().get(self._thread)
        while frame is not None:
            if frame.f_code is self._code and any(
                value is callbacks for value in frame.f_locals.values()
            ):
                return True
            frame = frame.f_back
        return False

    def exchange(self, name: str, function: Callable) -> None:
        """Replaces a method of the model until the run ends.

        Args:
            name: Name of the method.
            function: The replacement. If somebody else has set another since, a
                second call replaces that one.
        """
        ours = self._given.get(name)
        if ours is None or vars(self.model).get(name) is not ours:
            self._own[name] = getattr(self.model, name)
            self._before[name] = vars(self.model).get(name)
        self._given[name] = function
        setattr(self.model, name, function)

    def own(self, name: str) -> Callable:
        """Returns the model's method that was replaced."""
        return self._own[name]

    def log_first(self, logs: Callable[[], dict[str, float]]) -> None:
        """Adds to the logs of an epoch before any callback reads them.

        Args:
            logs: Returns the logs to add.
        """
        callbacks: Any = self._callbacks and self._callbacks()
        if callbacks is not None:
            # A new list: Keras is iterating over this one.
            others = [
                each
                for each in callbacks.callbacks
                if not isinstance(each, _EpochLogs)
            ]
            callbacks.callbacks = [_EpochLogs(logs), *others]

    def warn_of_what_is_lost(self, method: str, variables: Sequence) -> None:
        """Warns where Keras would restore a run without what a method keeps.

        Args:
            method: Name of the method.
            variables: What it keeps beside the model and its optimizer.
        """
        others = self._other_callbacks()
        if variables and any(
            isinstance(each, keras.callbacks.BackupAndRestore)
            for each in others
        ):
            warn(
                f"BackupAndRestore keeps the model and its optimizer, but not "
                f"the {len(variables)} variables of {method}: a restored run "
                "continues with new ones, to other masks. To resume exactly, "
                f"save the `variables` of the {method} callback as well, such "
                "as with tf.train.Checkpoint.",
            )

    def check_drawn(self) -> None:
        """Refuses images of all weights, which the masks are among.

        Raises:
            ValueError: TensorBoard would draw bools, which TensorFlow cannot.
        """
        for each in self._other_callbacks():
            if not isinstance(each, keras.callbacks.TensorBoard):
                continue
            if each.write_images and each.histogram_freq:
                raise ValueError(
                    "TensorBoard(write_images=True) draws all weights, but "
                    "TensorFlow cannot draw masks, which are bools. Pass "
                    "write_images=False; TopologyDiagnostics draws masks."
                )

    def _other_callbacks(self):
        callbacks: Any = self._callbacks and self._callbacks()
        return [] if callbacks is None else callbacks.callbacks

    def guard(self, check: Callable[[], None]) -> None:
        """Makes `model.train_function` check, too, whether the run lasts.

        Args:
            check: Called before each step of the run.
        """
        model: Any = self.model
        function = model.train_function

        def train_function(iterator):
            if not self.lasts():
                return model.train_function(iterator)
            check()
            return function(iterator)

        self._given["train_function"] = train_function
        model.train_function = train_function

    def end(self) -> None:
        """Restores what was replaced, unless somebody else has set it."""
        if self._over:
            return
        self._over = True
        if self._callbacks is not None:
            self._finalizer.detach()
        attributes: dict[str, Any] = self.model.__dict__
        for name in self._own:
            if attributes.get(name) is not self._given[name]:
                continue
            before = self._before[name]
            if before is None:
                attributes.pop(name)
            else:
                setattr(self.model, name, before)
        if self.model.train_function is self._given.get("train_function"):
            # An outer `fit` may need a function.
            self.model.train_function = None
            self.model.make_train_function()


class _EpochLogs(keras.callbacks.Callback):
    """Adds a method's logs before any logger reads them."""

    def __init__(self, logs: Callable[[], dict[str, float]]):
        super().__init__()
        self._logs = logs

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs.update(self._logs())


def _who_begins():
    """Returns the list that called `on_train_begin`, and the code around it.

    Unknown values are None.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "on_train_begin":
            callbacks = frame.f_locals.get("self")
            if isinstance(callbacks, keras.callbacks.CallbackList):
                around = frame.f_back
                return callbacks, around and around.f_code
        frame = frame.f_back
    return None, None


def start_of(
    model: keras.Model,
    batches: int,
    *,
    each: int,
    epoch: int,
    steps: int | None,
    skips: bool,
) -> int:
    """Returns the optimizer step at which the run of a `fit` began.

    A `fit` from epoch 0 begins a run, regardless of earlier optimizer steps. A
    `fit` from a later epoch (`initial_epoch`, `BackupAndRestore`) resumes a
    run, which began as many steps ago as the earlier epochs have. If all steps
    of the optimizer fit into these epochs and the current one, they belong to
    the run, which was cut off within an epoch.

    Args:
        model: The model in `fit`.
        batches: The batches that its optimizer has seen.
        each: Batches per optimizer step.
        epoch: The epoch with which `fit` begins.
        steps: Batches in an epoch, or None where unknown.
        skips: Whether batches may be skipped (loss scaling).

    Returns:
        An int. It is negative if the optimizer is younger than the run.
    """
    # Only BackupAndRestore sets it, and may have restored epoch 0.
    resumes = epoch > 0 or _keras.restored_epoch(model) is not None
    if not resumes:
        return batches // each
    if not steps:
        return 0
    start = batches - epoch * steps
    if 0 <= start < steps or (skips and start < 0 < batches):
        return 0
    return start // each


def note_end(model: keras.Model, *, begin: int, end: int, epochs: int) -> None:
    """Records that a `fit` with a mask update has ended.

    Args:
        model: The model that was trained.
        begin: The optimizer step at which it began.
        end: The optimizer step at which it ended.
        epochs: Number of its epochs.
    """
    count, last = _one_epoch_fits.pop(model, (0, -1))
    if epochs == 1:
        _one_epoch_fits[model] = (count + 1 if last == begin else 1, end)


def warn_of_a_loop(method: str, model: keras.Model, *, begin: int) -> None:
    """Warns once that several fits of one epoch are planned separately.

    Args:
        method: Name of the method.
        model: The model in a `fit` of one epoch.
        begin: The optimizer step at which it begins.
    """
    count, last = _one_epoch_fits.get(model, (0, -1))
    if model in _warned or last != begin or count + 1 < _LOOP:
        return
    _warned.add(model)
    warn(
        f"fit(epochs=1) has trained model {model.name!r} {count + 1} times in "
        f"a row, and {method} plans its updates within each fit separately, "
        "from begin_step to end_step. For one run of many fits, pass "
        "fit(initial_epoch=e, epochs=e + 1) with the number e of the epoch, "
        "and pass end_step to the method: the last step of the whole run at "
        "which masks may change.",
    )


def warn_of_an_idle_optimizer(method: str, optimizer: str) -> None:
    """Warns that a model is trained by another optimizer than a method's.

    Args:
        method: Name of the method.
        optimizer: Name of its optimizer.
    """
    warn(
        f"{method} changes masks in steps of {optimizer!r}, the optimizer of "
        "compile, but the training step took none in this epoch, so no mask "
        "can change. Compile the model with the optimizer that it "
        "applies. If there are several, give each a separate method by "
        "attach(model, optimizer), and call update(gradients, variables) "
        "instead of its apply.",
    )


def warn_of_no_update(method: str, steps: int, first: int, rule: str) -> None:
    """Warns that masks will not change in a run.

    Args:
        method: Name of the method.
        steps: Steps of the run.
        first: Its first step.
        rule: When updates come, in words.
    """
    warn(
        f"{method} plans 0 updates in the {steps} steps of this run from step "
        f"{first} on: {rule}. The masks will not change.",
    )


def warn_of_full_masks(method: str, trained: Sequence[KernelMask]) -> None:
    """Warns if no mask that is trained has connections to move.

    Args:
        method: Name of the method.
        trained: The masked layers that are not frozen.
    """
    with tf.init_scope():  # a user's loop may be tracing
        densities = {m.density for m in trained}
    if trained and densities <= {0.0, 1.0}:
        names = ", ".join(m.name for m in trained[:3])
        warn(
            f"{method} can move no connection: the masks of {names}"
            f"{', ...' if len(trained) > 3 else ''} keep all weights or none, "
            "and no other masked layer is trained. Sparsify with a lower "
            "density, or train more layers.",
        )
