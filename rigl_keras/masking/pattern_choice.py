"""The pattern of each kernel's mask, and the densities that it fixes."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import keras

from rigl_keras import distributions
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.distributions import Budget
from rigl_keras.layouts import Layout
from rigl_keras.masking.layer_kernels import Kernel
from rigl_keras.masking.selection import by_name
from rigl_keras.patterns import (
    NM,
    Element,
    Granularity,
    Pattern,
    as_pattern,
)
from rigl_keras.patterns import Kernel as WholeKernel

__all__ = [
    "PatternOf",
    "PatternPlan",
    "layer_granularity",
    "patterns_of",
    "plan_patterns",
]

# A pattern for all kernels, or `{layer, its type or its name: pattern}`.
PatternOf = Granularity | Mapping

# How far a density may be from n/m: 0.333 means 1:3.
_ROUNDED = 5e-4


def patterns_of(
    granularity: PatternOf, chosen: Mapping[str, Kernel]
) -> dict[str, Pattern]:
    """Returns the requested pattern of each kernel, by name.

    Args:
        granularity: As in `sparsify`.
        chosen: `{name: kernel}`.

    Raises:
        ValueError: There is no such pattern, a name fits no kernel, or the
            kernels of one layer get different patterns.
    """
    if not isinstance(granularity, Mapping):
        return dict.fromkeys(chosen, as_pattern(granularity))
    given = by_name(granularity, chosen, "granularity")
    unknown = [str(key) for key in given if key not in chosen]
    if unknown:
        raise ValueError(
            f"granularity names {', '.join(unknown)}, which is not a layer to "
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
    """Returns the granularity of a layer with masked kernels."""
    found = {pattern.of(kernel.axes) for kernel in kernels}
    return found.pop() if len(found) == 1 else pattern


@dataclasses.dataclass(frozen=True)
class PatternPlan:
    """The kernels to mask, and their patterns.

    Attributes:
        kernels: `{name: kernel}` of the kernels that their patterns fit.
        patterns: `{name: pattern}` of these kernels.
        begins_dense: Whether an earlier kernel of the model is left out.
    """

    kernels: dict[str, Kernel]
    patterns: dict[str, Pattern]
    begins_dense: bool

    @property
    def layouts(self) -> dict[str, Layout]:
        """The units and groups of each kernel."""
        return {
            name: self.patterns[name].layout(kernel.axes)
            for name, kernel in self.kernels.items()
        }

    def budgets(
        self,
        density: float | None,
        distribution: str,
        *,
        densities: Mapping[str, float],
        conventions: Conventions = ORIGINAL,
    ) -> dict[str, Budget]:
        """Returns the budget of each masked kernel.

        Args:
            density, distribution, conventions: As in `sparsify`.
            densities: `{name: density}` of kernels with a fixed density.

        Raises:
            ValueError: A density is missing, out of reach, or contradicts a
                pattern.
        """
        given = {**densities, **self._fixed(density, densities)}
        first = next(iter(self.kernels))
        if distributions.full_name(distribution) == "uniform":
            if self.begins_dense:  # the first layer is left out already
                share = distributions.checked_density(
                    given[first] if density is None else density
                )
                given.setdefault(first, share)
            elif first not in densities and density != 1:
                self._spare(first, given)
        density = self._overall(density, distribution, given)
        layouts = self.layouts
        sizes = {name: layout.size for name, layout in layouts.items()}
        single = all(p == Element() for p in self.patterns.values())
        return distributions.layer_budgets(
            {name: layout.shape for name, layout in layouts.items()},
            density,
            distribution,
            conventions=conventions,
            densities=given,
            group_sizes=None if single else sizes,
            apart=[n for n, layout in layouts.items() if layout.is_apart],
        )

    def fixed_budgets(self, density: float | None) -> dict[str, Budget]:
        """Returns the budgets of kernels whose pattern fixes them.

        Args:
            density: As in `sparsify`.
        """
        fixed = [n for n, layout in self.layouts.items() if layout.fixed]
        if not fixed:
            return {}
        budgets = self.budgets(density, "erdos_renyi_kernel", densities={})
        return {name: budgets[name] for name in fixed}

    def _spare(self, first, given):
        # Under "uniform" the first layer stays dense, despite n:m.
        if isinstance(self.patterns[first], NM):
            given.pop(first, None)

    def _fixed(self, density, given):
        """Returns the densities that patterns fix, by name."""
        fixed = {}
        for name, pattern in self.patterns.items():
            share = pattern.density_of(self.kernels[name].axes)
            if share is None:
                continue
            found = given.get(name, share)
            if not isinstance(pattern, NM):
                fixed[name] = found
            elif name in given or density != 1:
                fixed[name] = _agreed(name, found, share, pattern)
        return fixed

    def _overall(self, density, distribution, given):
        """Returns the density of all kernels together."""
        shapes = {n: kernel.axes.shape for n, kernel in self.kernels.items()}
        masked = distributions.masked_shapes(shapes, distribution, given)
        fixed = all(isinstance(self.patterns[name], NM) for name in masked)
        if density is None and not fixed:
            raise ValueError(
                "density is the fraction of weights kept, in (0, 1]. Leave it "
                "out only if the pattern of each layer fixes it, as "
                "granularity='2:4' does. Received: density=None."
            )
        if density is not None:
            density = distributions.checked_density(density)
            if density == 1 or not fixed:
                return density
        sizes = {name: math.prod(shape) for name, shape in masked.items()}
        kept = sum(given[name] * size for name, size in sizes.items())
        overall = kept / sum(sizes.values())
        if density is not None and abs(density - overall) > _ROUNDED:
            names = {self.patterns[name].name: None for name in masked}
            raise ValueError(
                f"The pattern {', '.join(map(repr, names))} fixes the density "
                f"of each layer, and the overall density: {overall:.4g}. "
                "Leave density out, or pass 1.0 to prune from there. Received: "
                f"density={density!r}."
            )
        return overall


def plan_patterns(
    chosen: Mapping[str, Kernel],
    granularity: PatternOf,
    named: Iterable[keras.layers.Layer] = (),
    *,
    strict: bool = False,
) -> PatternPlan:
    """Returns the kernels to mask, with their patterns.

    Args:
        chosen: `{name: kernel}` of the candidates, in order.
        granularity: As in `sparsify`.
        named: Layers that the user named one by one.
        strict: Whether a kernel that its pattern does not fit is an error.

    Raises:
        ValueError: There is no such pattern, or it fits none of the kernels or
            not one that the user named.
    """
    patterns = patterns_of(granularity, chosen)
    unfit = {
        name: f"{patterns[name].name!r} does not fit: {why}"
        for name, kernel in chosen.items()
        for why in [patterns[name].why_not(kernel.axes)]
        if why
    }
    fit = {name: k for name, k in chosen.items() if name not in unfit}
    if unfit and isinstance(granularity, Mapping):
        _check_asked(granularity, unfit, chosen)
    if unfit:
        _check_unfit(unfit, chosen, named, strict=strict)
    if all(
        patterns[name] == WholeKernel() and not kernel.is_convolution
        for name, kernel in fit.items()
    ):
        raise ValueError(
            "granularity='kernel' keeps or removes whole kernels of "
            "convolutions, but no layer to mask is a convolution: "
            f"{', '.join(fit)}. Use granularity='element'."
        )
    return PatternPlan(
        fit, {name: patterns[name] for name in fit}, next(iter(chosen)) in unfit
    )


def _check_asked(granularity, unfit, chosen):
    """Refuses a pattern that fits none of the kernels it was given for."""
    for key, pattern in granularity.items():
        names = [*by_name({key: pattern}, chosen, "granularity")]
        if all(name in unfit for name in names):
            raise ValueError(
                "granularity gives a pattern to kernels that it does not fit:\n"
                + "\n".join(f"  {name}: {unfit[name]}" for name in names)
                + "\nGive them another pattern, or leave them out: they then "
                "have masks of single weights."
            )


def _check_unfit(unfit, chosen, named, *, strict):
    asked = {id(layer) for layer in named}
    if strict:
        begin = "strict=True, and these kernels would be left dense"
    elif len(unfit) == len(chosen):
        begin = "No kernel is left to mask"
    elif any(
        asked & {id(chosen[name].layer), id(chosen[name].owner)}
        for name in unfit
    ):
        begin = "`layers` names kernels whose pattern does not fit"
    else:
        return
    raise ValueError(
        f"{begin}:\n"
        + "\n".join(f"  {name}: {why}" for name, why in unfit.items())
        + "\nChange granularity, which may be {layer: pattern}, or layers."
    )


def _agreed(name, density, share, pattern):
    """Returns the density of a layer whose pattern fixes one."""
    for wanted in (1.0, share):
        # 0.333 means 1:3.
        if isinstance(density, (int, float)) and math.isclose(
            density, wanted, abs_tol=_ROUNDED
        ):
            return wanted
    raise ValueError(
        f"densities gives {name!r} the density {density!r}, but its pattern "
        f"{pattern.name!r} fixes {share:.4g}. Leave it out, pass 1.0, or give "
        "the layer another granularity."
    )
