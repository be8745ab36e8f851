"""An optimizer's memory of a kernel, and how to reset it.

Keras has no interface to an optimizer's slots (momentum, second moments).
They are found by name and shape: `add_variable_from_reference` names a slot
after the path of its variable.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

from rigl_keras import _keras, replicas
from rigl_keras.masking.kernel_part import KernelPart
from rigl_keras.masking.masked import KernelMask
from rigl_keras.masking.tracing import zero_outside

__all__ = [
    "batches",
    "batches_per_step",
    "count_step",
    "forget",
    "innermost",
    "momentum",
    "owner",
    "parts",
    "project_averages",
    "rate",
    "slots",
]


def innermost(optimizer: keras.Optimizer) -> keras.Optimizer:
    """Returns the optimizer within any `LossScaleOptimizer`.

    Args:
        optimizer: A Keras optimizer.

    Returns:
        The optimizer that moves the weights.
    """
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def parts(optimizer: keras.Optimizer) -> list[keras.Optimizer]:
    """Returns the optimizers of a `MultiOptimizer`, or the one that is given.

    Args:
        optimizer: A Keras optimizer without loss scaling.

    Returns:
        Keras optimizers. Each moves other variables.
    """
    return list(getattr(optimizer, "optimizers", [optimizer]))


def owner(
    optimizer: keras.Optimizer, variable: keras.Variable
) -> keras.Optimizer:
    """Returns the one of an optimizer's `parts` that trains a variable.

    Args:
        optimizer: A built Keras optimizer.
        variable: One of the variables that it trains.

    Returns:
        A Keras optimizer.

    Raises:
        ValueError: The optimizer is not built, or does not train `variable`.
    """
    optimizer = innermost(optimizer)
    if not optimizer.built:
        raise ValueError(
            f"Optimizer {optimizer.name!r} is not built, so it remembers "
            "nothing yet: call optimizer.build(model.trainable_variables)."
        )
    for part in parts(optimizer):
        if any(v is variable for v in _keras.trained_variables(part)):
            return part
    raise ValueError(
        f"Optimizer {optimizer.name!r} does not train {variable.path!r}."
    )


def batches(optimizer: keras.Optimizer) -> keras.Variable:
    """Returns the variable that counts the batches an optimizer has seen.

    Its `iterations` are whole steps. If it accumulates gradients, each has
    several batches.

    Args:
        optimizer: A Keras optimizer without loss scaling.

    Returns:
        An integer scalar variable.
    """
    return _keras.accumulated_batches(optimizer)


def batches_per_step(optimizer: keras.Optimizer) -> int:
    """Returns how many batches make up an optimizer step.

    Args:
        optimizer: A Keras optimizer without loss scaling.
    """
    return optimizer.gradient_accumulation_steps or 1


def rate(optimizer: keras.Optimizer) -> tf.Tensor:
    """Returns the learning rate of the next step.

    Args:
        optimizer: A Keras optimizer without loss scaling. In a
            `MultiOptimizer`, the first one counts.

    Returns:
        A float32 scalar.
    """
    return tf.cast(
        tf.convert_to_tensor(parts(optimizer)[0].learning_rate), tf.float32
    )


def count_step(optimizer: keras.Optimizer) -> None:
    """Counts a step that moves nothing.

    The gradients that were accumulated for it are dropped.

    Args:
        optimizer: A built Keras optimizer without loss scaling.
    """
    for part in parts(optimizer):
        if part.gradient_accumulation_steps:
            _keras.drop_accumulated_gradients(part)
        if part is not optimizer and part.built:
            batches(part).assign_add(1)
    batches(optimizer).assign_add(1)


def project_averages(
    optimizer: keras.Optimizer, masked: Sequence[KernelMask]
) -> None:
    """Sets averaged weights to zero outside the masks.

    An optimizer averages before constraints apply, so the average contains what
    dense momentum or Muon moved there.

    Args:
        optimizer: A built Keras optimizer without loss scaling.
        masked: The masked layers of the model that it trains.
    """
    if any(part.use_ema for part in parts(optimizer)):
        replicas.once(lambda: _project_each(optimizer, masked), [])


def _project_each(optimizer, masked):
    trained = {
        id(variable)
        for part in parts(optimizer)
        for variable in _keras.trained_variables(part)
    }
    for layer in masked:
        if id(layer.kernel) not in trained:
            continue
        average = slots(optimizer, layer.kernel).get("average")
        if average is not None:
            average.assign(zero_outside(layer.mask, average.value))


def slots(
    optimizer: keras.Optimizer, variable: keras.Variable
) -> dict[str, keras.Variable]:
    """Returns the optimizer's memory of each entry of a variable.

    Args:
        optimizer: A built Keras optimizer.
        variable: One of the variables that it trains.

    Returns:
        `{slot name: slot variable}`, the slots of the variable's shape.
        Memory that entries share, such as Adafactor's averages of rows and
        columns, is left out.

    Raises:
        ValueError: The optimizer is not built, or does not train `variable`.

    Example:

    >>> slots(adam, layer.kernel).keys()
    dict_keys(['momentum', 'velocity'])
    """
    optimizer = owner(optimizer, variable)
    trained = _keras.trained_variables(optimizer)
    prefix = _prefix(variable)
    twins = [
        v for v in trained if _prefix(v) == prefix and v.shape == variable.shape
    ]
    nth = next(i for i, v in enumerate(twins) if v is variable)
    prefixes = {_prefix(v) for v in trained}
    found: dict[str, list] = {}
    for slot in optimizer.variables:
        # Slots of `kernel_2` also begin with `kernel_`: the longest prefix
        # decides.
        whose = max(filter(slot.name.startswith, prefixes), key=len, default="")
        if whose == prefix and slot.shape == variable.shape:
            found.setdefault(slot.name.removeprefix(prefix), []).append(slot)
    # Variables of one path (layers of one name in two submodels) have their
    # slots in the order of the variables.
    return {name: group[nth] for name, group in found.items()}


def forget(
    optimizer: keras.Optimizer,
    variable: keras.Variable,
    keep: tf.Tensor,
    *,
    only: Sequence[str] | None = None,
    part: KernelPart | None = None,
) -> None:
    """Resets the memory of some entries to that of a new optimizer.

    That is zero; for Adagrad and Ftrl their `initial_accumulator_value`; and
    for a memory of weights (averages, `ScheduleFreeAdamW`'s momentum) the
    value of the variable.

    Args:
        optimizer: A built Keras optimizer.
        variable: One of the variables that it trains.
        keep: Bool tensor of the variable's shape, True where the memory
            stays.
        only: Names of the slots to forget. None: all.
        part: Where entries may be forgotten at all; `keep` has an entry for
            each of its places. None: anywhere.
    """
    optimizer = owner(optimizer, variable)
    for name, slot in slots(optimizer, variable).items():
        if only is not None and name not in only:
            continue
        start = _initial_value(optimizer, name, variable)
        start = tf.cast(start, slot.value.dtype)
        if part is None:
            slot.assign(tf.where(keep, slot.value, start))
            continue
        if start.shape.rank:
            start = part.of(start)
        kept = tf.where(keep, part.of(slot.value), start)
        slot.assign(part.put(slot.value, kept))


def momentum(optimizer: keras.Optimizer, variable: keras.Variable) -> tf.Tensor:
    """Returns the running mean of a variable's gradients, up to a factor.

    For SGD it is the velocity (-learning rate times the mean), for Lion the
    momentum, and for optimizers that keep second moments v as well it is
    m / (sqrt(v) + 1e-8), as in the reproduction (core.py:477-491).

    Args:
        optimizer: A built Keras optimizer.
        variable: One of the variables that it trains.

    Returns:
        Float tensor of the variable's shape.

    Raises:
        ValueError: The optimizer keeps no momentum.
    """
    kept = slots(optimizer, variable)
    optimizer = owner(optimizer, variable)
    of_weights = _remembers_weights(optimizer, "momentum")
    if "momentum" not in kept or of_weights:
        raise ValueError(
            f"{type(optimizer).__name__} keeps no momentum of "
            f"{variable.path!r}. Use SGD(momentum=0.9) or Adam."
        )
    mean = tf.convert_to_tensor(kept["momentum"].value)
    # RMSprop's momentum is of gradients that are divided already.
    if "velocity" in kept and not isinstance(
        optimizer, keras.optimizers.RMSprop
    ):
        mean /= tf.sqrt(kept["velocity"].value) + 1e-8
    return mean


def _initial_value(optimizer, name, variable):
    """Returns the initial value of the slot `name` of a variable."""
    if _remembers_weights(optimizer, name):
        return variable.value
    if name == "accumulator":
        return getattr(optimizer, "initial_accumulator_value", 0.0)
    return 0.0


def _remembers_weights(optimizer, name):
    # By name: not every version of Keras has the class.
    schedule_free = type(optimizer).__name__ == "ScheduleFreeAdamW"
    return name == "average" or (schedule_free and name == "momentum")


def _prefix(variable):
    return variable.path.replace("/", "_") + "_"
