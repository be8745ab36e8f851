"""Several devices: what `tf.distribute` asks of a training step.

Each replica trains on its part of the batch. Keras divides each loss by the
number of replicas and sums the gradients: the sum is the gradient of the whole
batch. Masks change once for all replicas, by these sums.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import keras
import tensorflow as tf

from rigl_keras._random import random_bits

__all__ = [
    "MultiWorkerMirroredStrategy",
    "agree",
    "check_one_device",
    "check_set_up",
    "choosing",
    "is_distributed",
    "once",
    "scope",
    "summed",
]


class MultiWorkerMirroredStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """TensorFlow's strategy of this name, made to work with `fit` of Keras 3.

    Keras reduces a batch, which is a structure, and logs, which are scalars,
    over their first axis. TensorFlow's strategy accepts neither (Keras issue
    20585).

    Args: As in TensorFlow's.

    Example:

    >>> strategy = MultiWorkerMirroredStrategy()  # TF_CONFIG names the workers
    >>> with strategy.scope():
    ...     model = rigl_keras.sparsify(make_model(), density=0.1)
    """

    def reduce(self, reduce_op: str, value: Any, axis: int | None) -> Any:
        """Reduces each value of a structure over all replicas.

        Args:
            reduce_op: `"SUM"` or `"MEAN"`.
            value: A structure of tensors, or of values per replica.
            axis: An axis to reduce too, or None. Scalars ignore it.

        Returns:
            The structure with a tensor for each value.
        """

        def reduced(part):
            scalar = self.experimental_local_results(part)[0].shape.rank == 0
            over = None if scalar else axis
            return tf.distribute.MultiWorkerMirroredStrategy.reduce(
                self, reduce_op, part, axis=over
            )

        return tf.nest.map_structure(reduced, value)


def is_distributed(model: keras.Model) -> bool:
    """Returns whether a model was made in the scope of a strategy.

    It also works within a replica's part of the model's step.

    Args:
        model: The model.
    """
    if tf.distribute.has_strategy():  # a replica cannot enter the scope
        return True
    with scope(model):
        return tf.distribute.has_strategy()


def scope(model: keras.Model) -> AbstractContextManager:
    """Returns the scope that places new variables as the model's are."""
    return model.distribute_strategy.scope()


def check_set_up(
    method: str,
    model: keras.Model,
    optimizers: Sequence[keras.Optimizer],
    gradient_batches: int,
) -> None:
    """Refuses settings that do not work on several replicas.

    Args:
        method: Name of the method.
        model: The model to be trained.
        optimizers: Its optimizer, and inner optimizers.
        gradient_batches: Number of batches whose mean gradient growth uses.

    Raises:
        ValueError: Gradients are gathered or accumulated over batches.
    """
    if not is_distributed(model):
        return
    if gradient_batches > 1:
        raise ValueError(
            f"{method} does not gather gradients over batches under a "
            f"{type(model.distribute_strategy).__name__}. Received: "
            f"gradient_batches={gradient_batches}. Use 1, and a larger batch: "
            "the replicas share it."
        )
    for optimizer in optimizers:
        if optimizer.gradient_accumulation_steps:
            raise ValueError(
                f"{method} does not accumulate gradients under a "
                f"{type(model.distribute_strategy).__name__}. Received: "
                "gradient_accumulation_steps="
                f"{optimizer.gradient_accumulation_steps}. Use None: the "
                "batch is shared by the replicas as it is."
            )


# Functions for a replica's part of a step.


def summed(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns the sums of tensors over all replicas.

    Args:
        tensors: One replica's tensors.

    Returns:
        A list of tensors, the same on every replica. Without a strategy, the
        tensors themselves.
    """
    tensors = list(tensors)
    if not tf.distribute.has_strategy() or not tensors:
        return tensors
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def once(action: Callable, tensors: Sequence[tf.Tensor]) -> None:
    """Runs an action once for all replicas; it assigns on each of them.

    Args:
        action: A function of these tensors. Its result is ignored.
        tensors: Tensors that are the same on every replica.
    """
    if not tf.distribute.has_strategy():
        action(*tensors)
        return

    def act(strategy, *values):
        # The replicas of other workers are not here.
        action(*(strategy.experimental_local_results(v)[0] for v in values))

    tf.distribute.get_replica_context().merge_call(act, args=tuple(tensors))


def agree(masks: Sequence[tf.Variable]) -> tf.Tensor:
    """Returns whether all replicas hold the same masks.

    Each replica sums random 32-bit numbers over the entries that its copies
    keep. Different masks have equal sums with probability 2^-32.

    Args:
        masks: Bool variables.

    Returns:
        A bool scalar, the same on every replica.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    own = tf.add_n([_checksum(m, seed) for seed, m in enumerate(masks)])
    (total,) = summed([own])
    # On every replica: the sum is n times its value only if all are equal.
    (dissenters,) = summed([tf.cast(total != own * replicas, tf.int64)])
    return tf.equal(dissenters, 0)


def _checksum(mask, seed):
    numbers = random_bits(mask.shape, (seed, 0), dtype=tf.int32)
    kept = tf.cast(tf.convert_to_tensor(mask), tf.int64)
    return tf.reduce_sum(kept * tf.cast(numbers, tf.int64))


# Functions for the host.


def choosing(
    model: keras.Model,
    make_train_function: Callable[..., None],
    *,
    ordinary: Callable,
    update: Callable,
    is_due: Callable[[int], bool],
    stepping: Callable[[bool], contextlib.AbstractContextManager],
    check: Callable[[int], None],
) -> Callable[[], None]:
    """Returns a maker of train functions that choose between two steps.

    Replicas meet where gradients are summed, which `tf.cond` does not allow:
    the host chooses before each step. So the steps of `steps_per_execution` run
    one by one. Keras 3.15 also fails on blocks of steps on several replicas.

    Args:
        model: The compiled model.
        make_train_function: The model's method, which compiles
            `model.train_step`.
        ordinary: The step that runs when no update is due, a function of the
            data.
        update: The step that runs when one is due.
        is_due: Returns whether an update is due at a step.
        stepping: Makes the context in which a step runs, given whether it is an
            `update`.
        check: Called with the number of optimizer steps, at the first step of
            each kind.

    Returns:
        A function that sets `model.train_function`.
    """

    def function_of(train_step):
        before = model.train_step
        model.train_step = train_step
        try:
            make_train_function(force=True)
        finally:
            model.train_step = before
        return cast(Callable, model.train_function)

    def make():
        steps = {False: function_of(ordinary), True: function_of(update)}
        unchecked = {False, True}

        def one_step(iterator):
            before = int(model.optimizer.iterations.numpy())
            due = bool(is_due(before))
            with stepping(due):
                logs = steps[due](iterator)
            if due in unchecked:
                unchecked.remove(due)
                check(int(model.optimizer.iterations.numpy()) - before)
            return logs

        def next_steps(iterator):
            if model.steps_per_execution == 1:
                return one_step(iterator)
            with _one_by_one(model) as count:
                logs = None
                for batch in _first(count, iterator):
                    logs = one_step(iter([batch]))
            if logs is None:
                raise StopIteration
            return logs

        trained: Any = model
        trained.train_function = next_steps

    return make


def _first(count, iterator):
    """Yields the next `count` batches, or all if there are fewer."""
    if not isinstance(iterator, tf.distribute.DistributedIterator):
        yield from itertools.islice(iterator, count)
        return
    for _ in range(count):
        # On several replicas, a step without data would still count.
        batch = iterator.get_next_as_optional()
        if not batch.has_value():
            return
        yield batch.get_value()


@contextlib.contextmanager
def _one_by_one(model) -> Iterator[int]:
    """Within the context, a train function runs one step, not a block."""
    steps = model.steps_per_execution
    model.steps_per_execution = 1
    try:
        yield steps
    finally:
        model.steps_per_execution = steps


def check_one_device(function: str, model: keras.Model) -> None:
    """Raises ValueError if a model is on several devices.

    Args:
        function: Name of what is for one device only, for the message.
        model: The model.
    """
    if is_distributed(model):
        raise ValueError(
            f"{function} is for training steps of one device, and the model "
            "was made in the scope of a "
            f"{type(model.distribute_strategy).__name__}. Override "
            "keras.Model.train_step and call model.fit, or make the model "
            "outside the scope."
        )
