"""What a run starts with: dense, small, drawn, one-shot or a ticket."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras.conventions import Conventions
from rigl_keras.experiments.runs.run_directory import EarlierRun
from rigl_keras.flops.counting import Count
from rigl_keras.patterns import as_pattern

__all__ = ["Initialization", "StartingPoint", "starting_point"]


# The papers' names of the methods in `one_shot`.
_NAMES = {
    "snip": "SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "magnitude": "Magnitude",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initialization:
    """The arguments of `train` that determine the initial network.

    Args:
        density, small_dense, one_shot, masks_from, shuffle_masks, weights_from,
            weights_epoch, distribution, granularity, scale_to_fan_in,
            conventions, seed: As in `train`.
    """

    density: float | None
    small_dense: bool
    one_shot: Callable[..., keras.Model] | None
    masks_from: str | None
    shuffle_masks: bool
    weights_from: str | None
    weights_epoch: int
    distribution: str
    granularity: str
    scale_to_fan_in: bool
    conventions: Conventions
    seed: int

    @property
    def kind(self) -> str:
        """The name of training without a mask update.

        `"dense"`, `"small-dense"`, `"static"` (masks are drawn), `"lottery"`
        (masks of another run), or the name of the one-shot method that makes
        the masks, such as `"SNIP"`.
        """
        if self.density is None:
            return "dense"
        if self.small_dense:
            return "small-dense"
        if self.masks_from is not None:
            return "lottery"
        if self.one_shot is not None:
            name = self.one_shot.__name__
            return _NAMES.get(name, name)
        return "static"

    @property
    def settings(self) -> dict[str, object]:
        """The arguments to keep in the result."""
        drawn = self.kind == "static"
        return {
            "density": self.density,
            "distribution": self.distribution if drawn else None,
            "granularity": self.granularity,
            "scale_to_fan_in": self.scale_to_fan_in,
            "masks_from": self.masks_from,
            "shuffle_masks": self.shuffle_masks,
            "weights_from": self.weights_from,
            "weights_epoch": self.weights_epoch,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """The network of a run before its first step.

    Attributes:
        initialization: The arguments from which it was made.
        dense: The dense model from which the network was made.
        network: The network to train: `dense` itself, or a masked copy.
        full_width: The `count` of the dense model of full width, if the
            network is a small dense one. None for other networks.
        sources: Results of the runs whose masks or trained weights this run
            uses, by their path.
    """

    initialization: Initialization
    dense: keras.Model
    network: keras.Model
    full_width: Count | None
    sources: Mapping[Path, dict]


def starting_point(
    make: Callable[..., keras.Model],
    how: Initialization,
    *,
    examples: Callable[[], tuple],
) -> StartingPoint:
    """Returns what a run starts with.

    Args:
        make: Makes the dense model. With `small_dense`, it gets
            `channel_scale`.
        how: The arguments that determine the network.
        examples: Returns a batch of training data and the loss, for one-shot
            methods.

    Raises:
        ValueError: An earlier run does not hold the masks or weights.
    """
    sources = {}
    full_width = None
    if how.small_dense:
        dense = make(channel_scale=math.sqrt(cast(float, how.density)))
        full_width = rigl_keras.count(make(channel_scale=1.0))
    else:
        dense = make()
    if how.weights_from is not None:
        source = EarlierRun(how.weights_from)
        source.load_weights(dense, how.weights_epoch)
        if how.weights_epoch:
            sources[source.path] = source.result
    if how.masks_from is not None:
        source = EarlierRun(how.masks_from)
        sources[source.path] = source.result
    return StartingPoint(
        initialization=how,
        dense=dense,
        network=_initialized(dense, how, examples),
        full_width=full_width,
        sources=sources,
    )


def _initialized(dense, how, examples):
    """Returns the network to train: a dense model, or a masked copy."""
    if how.density is None or how.small_dense:
        return dense
    if how.masks_from is not None:
        masks = _masks_of(EarlierRun(how.masks_from), how.density)
        if how.shuffle_masks:
            masks = _shuffled(masks, dense, how.granularity, how.seed)
        return rigl_keras.with_masks(
            dense,
            masks,
            granularity=how.granularity,
            scale_to_fan_in=how.scale_to_fan_in,
            seed=how.seed,
        )
    if how.one_shot is not None:
        options: dict[str, Any] = {"seed": how.seed}
        if how.granularity != "element":
            options["granularity"] = how.granularity
        takes_batch = "batch" in inspect.signature(how.one_shot).parameters
        given = examples() if takes_batch else ()
        return how.one_shot(dense, how.density, *given, **options)
    return rigl_keras.sparsify(
        dense,
        how.density,
        distribution=how.distribution,
        granularity=how.granularity,
        scale_to_fan_in=how.scale_to_fan_in,
        seed=how.seed,
        conventions=how.conventions,
    )


def _masks_of(source, density):
    """Returns the masks of an earlier run, after a check of their density."""
    masks = source.masks
    ones = sum(int(np.count_nonzero(mask)) for mask in masks.values())
    found = ones / sum(mask.size for mask in masks.values())
    if abs(found - density) > 0.01 * density:
        raise ValueError(
            f"The masks of {str(source.path)!r} keep {found:.4f} of the "
            f"weights, and train.density is {density}. Pass "
            f"--density={found:.4g}, or the directory of another run."
        )
    return masks


def _shuffled(masks, dense, granularity, seed):
    """Returns masks with the same counts and their units in random places."""
    draw = np.random.default_rng(seed)
    kernels = rigl_keras.named_kernels(dense)
    pattern = as_pattern(granularity)
    shuffled = {}
    for name, mask in masks.items():
        layout = pattern.layout(kernels[name].axes)
        units = layout.units(tf.constant(mask != 0)).numpy()
        if layout.groups == 1:
            placed = draw.permutation(units.ravel()).reshape(units.shape)
        else:
            rows = draw.permuted(layout.grouped(units), axis=1)
            placed = layout.ungrouped(rows)
        shuffled[name] = layout.by_element(placed).copy()
    return shuffled
