"""Checks of the arguments of `train`."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence

from rigl_keras.experiments.runs import devices
from rigl_keras.experiments.runs.starting_point import Initialization
from rigl_keras.patterns import as_pattern
from rigl_keras.schedules import lengthened

__all__ = [
    "check_batches",
    "check_epochs",
    "check_fits",
    "check_initialization",
    "check_length",
    "check_makers",
]


def check_makers(
    *, model: object, optimizer: object, method: object, one_shot: object
) -> None:
    """Raises ValueError for an argument of `train` that is not callable.

    In gin, the @ before a name is easily forgotten.
    """
    for name, value in (("model", model), ("optimizer", optimizer)):
        if not callable(value):
            raise ValueError(
                f"{name} must be something that makes one, in gin "
                f"train.{name} = @wide_resnet or @sgd. Received: {value!r}."
            )
    if method is not None and not callable(method):
        raise ValueError(
            "method must be something that makes a mask update, in gin "
            f"train.method = @RigL, or None. Received: {method!r}."
        )
    if one_shot is not None and not callable(one_shot):
        raise ValueError(
            "one_shot must be something that makes masks from a batch, in gin "
            f"train.one_shot = @snip, or None. Received: {one_shot!r}."
        )


def check_batches(*, batch_size: int, label_smoothing: float) -> None:
    """Raises ValueError if the batches are too small or labels too smooth."""
    if batch_size < devices.replica_count():
        raise ValueError(
            "batch_size counts the examples of all replicas and must leave "
            f"each at least one. Received: batch_size={batch_size} for "
            f"{devices.replica_count()} replicas."
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            "label_smoothing must be in [0, 1). Received: "
            f"label_smoothing={label_smoothing!r}."
        )


def check_epochs(
    epochs: int, *, length: float, keep_weights: Sequence[int]
) -> None:
    """Raises ValueError for a wrong number of epochs, or a wrong list."""
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(
            f"epochs must be an int of at least 1. Received: {epochs!r}."
        )
    check_length(length, epochs)
    whole = isinstance(keep_weights, Sequence) and all(
        isinstance(epoch, int) and epoch > 0 for epoch in keep_weights
    )
    if not whole:
        raise ValueError(
            "keep_weights lists the epochs after which weights are kept, such "
            f"as [1, 2]. Received: keep_weights={keep_weights!r}."
        )


def check_initialization(
    how: Initialization, *, model: Callable, method: Callable | None
) -> None:
    """Raises ValueError for arguments that conflict.

    Args:
        how: The arguments that determine the initial network.
        model: Makes the dense model.
        method: Makes the mask update. None: the masks do not change.
    """
    as_pattern(how.granularity)  # raises for an unknown name
    _check_one_way(how)
    if how.small_dense:
        if "channel_scale" not in inspect.signature(model).parameters:
            raise ValueError(
                "small_dense scales the channels of wide_resnet, resnet18 or "
                "resnet50, or of a model of yours that takes `channel_scale`. "
                f"Received: model={getattr(model, '__name__', model)!r}."
            )
        if method is not None:
            raise ValueError(
                "A small dense network has no masks to update. Set "
                "train.method = None, or train.small_dense = False."
            )
    if how.density is None and method is not None:
        raise ValueError(
            "A method changes masks, and density=None trains the dense model. "
            "Set train.density, or train.method = None."
        )
    unmasked = how.density is None or how.small_dense
    if how.scale_to_fan_in and (unmasked or how.one_shot):
        raise ValueError(
            "scale_to_fan_in scales the weights that masks keep: set "
            "train.density, and neither train.small_dense nor train.one_shot."
        )
    if how.shuffle_masks and how.masks_from is None:
        raise ValueError(
            "shuffle_masks shuffles the masks of another run: set "
            "train.masks_from."
        )


def _check_one_way(how):
    """Raises ValueError if there are two ways to start, or no density."""
    ways = {
        "small_dense": how.small_dense,
        "one_shot": how.one_shot,
        "masks_from": how.masks_from,
    }
    given = [name for name, value in ways.items() if value]
    if len(given) > 1:
        raise ValueError(
            f"A run starts in one way, and {' and '.join(given)} are two. Set "
            "one of them."
        )
    if given and how.density is None:
        raise ValueError(
            f"train.{given[0]} needs train.density, which is None (the dense "
            "model)."
        )


def check_length(length: float, epochs: int) -> None:
    """Raises ValueError for a run that would have no epoch.

    Args:
        length: Factor on the epochs.
        epochs: Epochs of a run of length 1.
    """
    if not 0 < length < math.inf or lengthened(epochs, length) < 1:
        raise ValueError(
            "length is a factor on the epochs of the run and must leave at "
            f"least one. Received: length={length!r} of epochs={epochs}."
        )


def check_fits(model: Callable, dataset: str, names: Iterable[str]) -> None:
    """Raises ValueError if a model does not fit a data set.

    Args:
        model: Makes the dense model.
        dataset: Name of the data set.
        names: Names of the arguments that the data set passes to `model`.
    """
    takes = inspect.signature(model).parameters
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return
    missing = [name for name in names if name not in takes]
    if missing:
        raise ValueError(
            f"The data set {dataset!r} needs a model that takes "
            f"{' and '.join(names)}, such as "
            f"{'gpt' if 'vocabulary' in names else 'wide_resnet'}. Received: "
            f"model={getattr(model, '__name__', model)!r}, without "
            f"{' and '.join(missing)}."
        )
