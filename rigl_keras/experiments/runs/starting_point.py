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
from rigl_keras.patterns import as_pattern

__all__ = ["StartingPoint", "starting_point"]


# The papers' names of the methods in `one_shot`.
_NAMES = {
    "snip": "SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "magnitude": "Magnitude",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """The network of a run before its first step.

    Attributes:
        kind: `"dense"`, `"small-dense"`, `"static"` (masks are drawn),
            `"lottery"` (masks of another run), or the name of the one-shot
            method that made the masks, such as `"SNIP"`.
        dense: The dense model from which the network was made.
        network: The network to train: `dense` itself, or a masked copy.
        sources: Results of the runs whose masks or trained weights this run
            uses, by their path.
    """

    kind: str
    dense: keras.Model
    network: keras.Model
    sources: Mapping[Path, dict]


def starting_point(
    make: Callable[..., keras.Model],
    *,
    density: float | None,
    small_dense: bool,
    one_shot: Callable[..., keras.Model] | None,
    examples: Callable[[], tuple],
    masks_from: str | None,
    shuffle_masks: bool,
    weights_from: str | None,
    weights_epoch: int,
    distribution: str,
    granularity: str,
    scale_to_fan_in: bool,
    conventions: Conventions,
    seed: int,
) -> StartingPoint:
    """Returns what a run starts with.

    Args:
        make: Makes the dense model. With `small_dense`, it gets
            `channel_scale`.
        examples: Returns a batch of training data and the loss, for one-shot
            methods.
        density, small_dense, one_shot, masks_from, shuffle_masks, weights_from,
            weights_epoch, distribution, granularity, scale_to_fan_in,
            conventions, seed: As in `train`.

    Raises:
        ValueError: An earlier run does not hold the masks or weights.
    """
    sources = {}
    scale = {}
    if small_dense:
        scale["channel_scale"] = math.sqrt(cast(float, density))
    dense = make(**scale)
    if weights_from is not None:
        source = EarlierRun(weights_from)
        source.load_weights(dense, weights_epoch)
        if weights_epoch:
            sources[source.path] = source.result
    if density is None:
        kind, network = "dense", dense
    elif small_dense:
        kind, network = "small-dense", dense
    elif masks_from is not None:
        source = EarlierRun(masks_from)
        sources[source.path] = source.result
        masks = _masks_of(source, density)
        if shuffle_masks:
            masks = _shuffled(masks, dense, granularity, seed)
        kind = "lottery"
        network = rigl_keras.with_masks(
            dense,
            masks,
            granularity=granularity,
            scale_to_fan_in=scale_to_fan_in,
            seed=seed,
        )
    elif one_shot is not None:
        kind = _NAMES.get(one_shot.__name__, one_shot.__name__)
        options: dict[str, Any] = {"seed": seed}
        if granularity != "element":
            options["granularity"] = granularity
        takes_batch = "batch" in inspect.signature(one_shot).parameters
        given = examples() if takes_batch else ()
        network = one_shot(dense, density, *given, **options)
    else:
        kind = "static"
        network = rigl_keras.sparsify(
            dense,
            density,
            distribution=distribution,
            granularity=granularity,
            scale_to_fan_in=scale_to_fan_in,
            seed=seed,
            conventions=conventions,
        )
    return StartingPoint(
        kind=kind, dense=dense, network=network, sources=sources
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
