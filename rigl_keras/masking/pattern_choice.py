"""Which pattern the mask of each kernel has, and what that fixes."""

import math
from collections.abc import Iterable, Mapping

import keras

from rigl_keras import distributions
from rigl_keras.layouts import Layout
from rigl_keras.masking.layer_kernels import Kernel
from rigl_keras.masking.selection import by_name
from rigl_keras.patterns import NM, Granularity, Pattern, as_pattern

__all__ = [
    "PatternOf",
    "fitting_kernels",
    "layer_granularity",
    "layouts_of",
    "pattern_densities",
    "patterns_of",
]

# One for all kernels, or `{layer, its type or its name: one}`.
PatternOf = Granularity | Mapping

# How far a density may be from n/m, as 0.333 is from 1:3.
_ROUNDED = 5e-4


def patterns_of(
    granularity: PatternOf, chosen: Mapping[str, Kernel]
) -> dict[str, Pattern]:
    """Returns the pattern that is asked of each kernel, by name.

    Args:
        granularity: As in `sparsify`.
        chosen: `{name: kernel}`.

    Raises:
        ValueError: There is no such pattern, a name fits no kernel, or the
            kernels of one layer are asked for several.
    """
    if not isinstance(granularity, Mapping):
        return dict.fromkeys(chosen, as_pattern(granularity))
    given = by_name(granularity, chosen, "granularity")
    unknown = [str(key) for key in given if key not in chosen]
    if unknown:
        raise ValueError(
            f"granularity names {', '.join(unknown)}, which is no layer to "
            f"mask. These are: {', '.join(chosen)}."
        )
    patterns = {name: as_pattern(given.get(name, "element")) for name in chosen}
    of_layers = {}
    for name, kernel in chosen.items():
        first = of_layers.setdefault(id(kernel.layer), patterns[name])
        if first != patterns[name]:
            raise ValueError(
                f"The kernels of layer {kernel.layer.name!r} have one pattern. "
                f"Received: {first.name!r} and {patterns[name].name!r}."
            )
    return patterns


def layer_granularity(
    kernels: Iterable[Kernel], pattern: Pattern
) -> Granularity:
    """Returns the granularity of a layer, of which some kernels are masked."""
    found = {pattern.of(kernel.axes) for kernel in kernels}
    return found.pop() if len(found) == 1 else pattern


def fitting_kernels(
    chosen: Mapping[str, Kernel],
    patterns: Mapping[str, Pattern],
    named: Iterable[keras.layers.Layer] = (),
    *,
    strict: bool = False,
) -> dict[str, Kernel]:
    """Returns the kernels whose pattern fits them; the others stay dense.

    Args:
        chosen: `{name: kernel}`.
        patterns: `{name: pattern}` of these.
        named: Layers that were asked for one by one.
        strict: Whether a kernel that does not fit raises.

    Raises:
        ValueError: None is left, or one that does not fit was asked for.
    """
    unfit = {
        name: f"{patterns[name].name!r} does not fit: {why}"
        for name, kernel in chosen.items()
        for why in [patterns[name].why_not(kernel.axes)]
        if why
    }
    fit = {name: k for name, k in chosen.items() if name not in unfit}
    asked = {id(layer) for layer in named}
    asked_for = [
        name
        for name in unfit
        if id(chosen[name].layer) in asked or id(chosen[name].owner) in asked
    ]
    if unfit and (strict or not fit or asked_for):
        begin = (
            "strict=True, and these kernels would be left dense"
            if strict
            else "`layers` names kernels whose pattern does not fit"
            if asked_for and fit
            else "No kernel is left to mask"
        )
        raise ValueError(
            f"{begin}:\n"
            + "\n".join(f"  {name}: {why}" for name, why in unfit.items())
            + "\nChange granularity, which may be {layer: pattern}, or layers."
        )
    return fit


def layouts_of(
    chosen: Mapping[str, Kernel], patterns: Mapping[str, Pattern]
) -> dict[str, Layout]:
    """Returns the units and groups of each kernel, by name."""
    return {
        name: patterns[name].layout(kernel.axes)
        for name, kernel in chosen.items()
    }


def pattern_densities(
    density: float | None,
    given: Mapping[str, float],
    chosen: Mapping[str, Kernel],
    patterns: Mapping[str, Pattern],
    *,
    dense_first: bool = False,
) -> tuple[float, dict[str, float]]:
    """Returns the overall density, and those of layers that are fixed.

    Args:
        density: Fraction of the weights kept overall. None: patterns fix it.
            1: masks of ones, with which pruning begins.
        given: `{name: density}` of layers whose density was given.
        chosen: `{name: kernel}` of the layers to mask.
        patterns: `{name: pattern}` of these.
        dense_first: Whether the first layer stays dense, outside the budget,
            unless its density is given.

    Raises:
        ValueError: A density disagrees with a pattern, or is missing.
    """
    if density is not None:
        density = distributions.checked_density(density)
    fixed = {}
    for i, (name, kernel) in enumerate(chosen.items()):
        share = patterns[name].density_of(kernel.axes)
        if isinstance(patterns[name], NM):
            if name in given:
                share = _agreed(name, given[name], share, patterns[name])
            elif density == 1 or (dense_first and i == 0):
                share = None
        else:
            share = given.get(name, share)
        if share is not None:
            fixed[name] = share
    given = {**given, **fixed}
    masked = list(chosen)[dense_first and next(iter(chosen)) not in given :]
    of_patterns = [name for name in masked if isinstance(patterns[name], NM)]
    if density == 1 or not masked or len(of_patterns) < len(masked):
        if density is None:
            raise ValueError(
                "density is the fraction of weights kept, in (0, 1], and may "
                "be left out only where each layer's pattern fixes it, as "
                "granularity='2:4' does. Received: density=None."
            )
        return density, given
    sizes = {name: chosen[name].axes.weights for name in masked}
    overall = sum(given[n] * size for n, size in sizes.items())
    overall /= sum(sizes.values())
    if density is not None and abs(density - overall) > _ROUNDED:
        names = ", ".join(sorted({repr(patterns[n].name) for n in masked}))
        raise ValueError(
            f"Patterns fix the density of each layer, {names} here, and of all "
            f"together {overall:.4g}. Leave density out (or pass 1.0, to prune "
            f"from there). Received: density={density!r}."
        )
    return overall, given


def _agreed(name, density, share, pattern):
    for wanted in (1.0, share):
        # 0.333 is meant by 1:3.
        if isinstance(density, (int, float)) and math.isclose(
            density, wanted, abs_tol=_ROUNDED
        ):
            return wanted
    raise ValueError(
        f"densities gives {name!r} the density {density!r}, and its pattern "
        f"{pattern.name!r} fixes {share:.4g}. Leave it out, pass 1.0, or give "
        "the layer another granularity."
    )
