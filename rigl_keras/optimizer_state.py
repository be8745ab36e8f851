"""What an optimizer remembers about a kernel, and how to forget it.

Keras has no interface to an optimizer's slots (momentum, second moments).
They are found by name and shape: `add_variable_from_reference` names a slot
after the path of its variable.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

__all__ = ["innermost", "slots", "forget", "momentum"]


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


def slots(
    optimizer: keras.Optimizer, variable: keras.Variable
) -> dict[str, keras.Variable]:
    """Returns what the optimizer remembers for each entry of a variable.

    Args:
        optimizer: A built Keras optimizer.
        variable: One of the variables that it trains.

    Returns:
        `{slot name: slot variable}`, the slots of the variable's shape.
        Memory shared by entries, as Adafactor's row and column averages, is
        no entry's own and left out.

    Raises:
        ValueError: The optimizer is not built, or does not train `variable`.

    Example:

    >>> slots(adam, layer.kernel).keys()
    dict_keys(['momentum', 'velocity'])
    """
    optimizer = innermost(optimizer)
    if not optimizer.built:
        raise ValueError(
            f"Optimizer {optimizer.name!r} is not built, so it remembers "
            "nothing yet: call optimizer.build(model.trainable_variables)."
        )
    trained = optimizer._trainable_variables
    prefix = _prefix(variable)
    twins = [
        v for v in trained if _prefix(v) == prefix and v.shape == variable.shape
    ]
    nth = next((i for i, v in enumerate(twins) if v is variable), None)
    if nth is None:
        raise ValueError(
            f"Optimizer {optimizer.name!r} does not train {variable.path!r}."
        )
    prefixes = {_prefix(v) for v in trained}
    found: dict[str, list] = {}
    for slot in optimizer.variables:
        # `kernel_` also begins the slots of `kernel_2`: the longest prefix
        # is the owner's.
        owner = max(filter(slot.name.startswith, prefixes), key=len, default="")
        if owner == prefix and slot.shape == variable.shape:
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
) -> None:
    """Sets the memory of some entries to what a new optimizer starts with.

    Args:
        optimizer: A built Keras optimizer.
        variable: One of the variables that it trains.
        keep: Bool tensor of the variable's shape, True where the memory
            stays.
        only: Names of the slots to forget. None: all.
    """
    optimizer = innermost(optimizer)
    for name, slot in slots(optimizer, variable).items():
        if only is not None and name not in only:
            continue
        start = tf.cast(_initial_value(optimizer, name), slot.value.dtype)
        slot.assign(tf.where(keep, slot.value, start))


def momentum(optimizer: keras.Optimizer, variable: keras.Variable) -> tf.Tensor:
    """Returns the running mean of a variable's gradients, up to a factor.

    That is SGD's velocity (which holds -learning rate times the mean), Lion's
    momentum and, for optimizers that keep second moments v as well,
    m / (sqrt(v) + 1e-8), as the reproduction has it (core.py:477-491).

    Args:
        optimizer: A built Keras optimizer.
        variable: One of the variables that it trains.

    Returns:
        Float tensor of the variable's shape.

    Raises:
        ValueError: The optimizer keeps no momentum.
    """
    kept = slots(optimizer, variable)
    optimizer = innermost(optimizer)
    if "momentum" not in kept:
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


def _initial_value(optimizer, name):
    """Returns the value with which the slot `name` starts.

    Adagrad and Ftrl start their accumulators above zero; no other slot of
    Keras does.
    """
    if name == "accumulator":
        return getattr(optimizer, "initial_accumulator_value", 0.0)
    return 0.0


def _prefix(variable):
    return variable.path.replace("/", "_") + "_"
