"""The density of each kernel: uniform, ER, ERK, overrides.

`layer_budgets` says what each masked layer keeps: its density
(`layer_densities`), and its number of weights after all layers are rounded
together (`layer_counts`). The module computes with shapes only: no models, no
tensors.
"""

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rigl_keras._checks import INT64, fraction, integer, number
from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions

__all__ = [
    "Budget",
    "DISTRIBUTIONS",
    "checked_density",
    "full_name",
    "layer_budgets",
    "layer_counts",
    "layer_densities",
    "masked_shapes",
    "total_count",
]

DISTRIBUTIONS = (
    "uniform",
    "uniform_all",
    "erdos_renyi",
    "erdos_renyi_kernel",
)
_SHORT_NAMES = {"er": "erdos_renyi", "erk": "erdos_renyi_kernel"}
_DENSITY = (
    "is the fraction of weights kept and must be in (0, 1]; for 90 % sparsity "
    "pass 0.1"
)
Shapes = Mapping[str, Sequence[int]]


class Budget(NamedTuple):
    """What a layer keeps.

    Args:
        density: Fraction of its weights, before rounding.
        count: Number of its weights or, if a pattern makes groups, of the units
            that each group keeps.
    """

    density: float
    count: int


def layer_budgets(
    shapes: Shapes,
    density: float,
    distribution: str = "erdos_renyi_kernel",
    *,
    conventions: Conventions = ORIGINAL,
    densities: Mapping[str, float] | None = None,
    group_sizes: Mapping[str, int] | None = None,
    apart: Collection[str] = (),
) -> dict[str, Budget]:
    """Returns the density of each masked layer and how many weights it keeps.

    1. Each layer gets a density (`layer_densities`). Layers that stay dense and
       are not masked are left out (`masked_shapes`).
    2. All masked layers keep round(density x weights) (`total_count`).
    3. Densities are rounded to counts with that sum (`layer_counts`).

    Args:
        shapes: As in `layer_densities`.
        density: As in `layer_densities`.
        distribution: As in `layer_densities`.
        conventions: As in `layer_densities`.
        densities: As in `layer_densities`.
        group_sizes: `{name: units in each group}` if masks have a pattern
            (`patterns.Layout.size`). Then units are counted instead of weights:
            all layers together keep round(sum of density x units). None: single
            weights.
        apart: Names of layers that have many groups. Each group keeps
            round(density x units), at least one, independently of other layers.

    Returns:
        `{name: Budget}` of the masked layers, in the order of `shapes`.

    Raises:
        ValueError: An argument is out of range, the remaining layers cannot
            make up the overall density, or nothing is left.

    Example:

    >>> shapes = {"a": (3, 3, 3, 16), "b": (3, 3, 16, 16), "c": (16, 10)}
    >>> layer_budgets(shapes, 0.1, "uniform")
    {'b': Budget(density=0.1, count=230), 'c': Budget(density=0.1, count=16)}
    """
    density = checked_density(density)
    solved = layer_densities(
        shapes,
        density,
        distribution,
        conventions=conventions,
        densities=densities,
    )
    masked = masked_shapes(shapes, distribution, densities or {})
    sizes = {name: math.prod(shape) for name, shape in masked.items()}
    weights = sum(sizes.values())
    solved = {name: solved[name] for name in sizes}
    exact = density * weights
    if group_sizes is not None:
        sizes = _checked_groups(group_sizes, sizes)
    if group_sizes is not None or apart:
        exact = sum(
            solved[n] * size for n, size in sizes.items() if n not in apart
        )
    counts = {
        name: max(1, round(solved[name] * size))
        for name, size in sizes.items()
        if name in apart
    }
    together = {n: size for n, size in sizes.items() if n not in apart}
    if together:
        total = total_count(exact, density, sum(together.values()))
        counts |= layer_counts(together, solved, total)
    return {name: Budget(solved[name], counts[name]) for name in sizes}


def layer_densities(
    shapes: Shapes,
    density: float,
    distribution: str = "erdos_renyi_kernel",
    *,
    conventions: Conventions = ORIGINAL,
    densities: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Returns the density of each layer for an overall density.

    `uniform` keeps the first layer dense, outside the budget (unless
    `densities` names it), and gives every other layer the density d.
    `uniform_all` gives every layer the density d, the first one too (the
    reproduction's struct-random, funcs/init_scheme.py).
    `erdos_renyi` and `erdos_renyi_kernel` give layer l the density
    min(1, epsilon p_l), where

        ER:  p_l = (n_in + n_out) / (n_in n_out)
        ERK: p_l = (n_in + n_out + kernel height + width) / (their product)

    where epsilon makes the kept weights add up to d times all weights: solve,
    make the layers of largest p_l dense if epsilon p_l > 1, repeat. Evci et
    al., 2020, arXiv:1911.11134, section 3, sparsity distribution; ER after
    Mocanu et al., 2018.

    Args:
        shapes: `{name: kernel shape}` in Keras order (spatial dimensions,
            then input and output channels) and in the order of the model.
        density: Fraction of the weights kept overall, in (0, 1].
        distribution: `"uniform"`, `"uniform_all"`, `"erdos_renyi"` (`"er"`)
            or `"erdos_renyi_kernel"` (`"erk"`).
        conventions: `erk_rounding` decides how counts are rounded.
        densities: `{name: density}` of layers with a fixed density. They count
            towards the overall density; the other layers share the rest.

    Returns:
        `{name: density}` in the order of `shapes`, each in [0, 1].

    Raises:
        ValueError: An argument is out of range, or the remaining layers cannot
            make up the overall density.

    Example:

    >>> shapes = {"a": (3, 3, 3, 16), "b": (3, 3, 16, 16), "c": (16, 10)}
    >>> layer_densities(shapes, 0.1, "uniform")
    {'a': 1.0, 'b': 0.1, 'c': 0.1}
    """
    density = checked_density(density)
    distribution = full_name(distribution)
    check_conventions(conventions)
    shapes = _checked_shapes(shapes)
    given = _checked_given(densities, shapes)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}

    if distribution == "uniform":
        first = next(iter(shapes))
        if first not in given:
            del sizes[first]
        solved = {first: 1.0, **_solve_uniform(sizes, density, given)}
    elif distribution == "uniform_all":
        solved = _solve_uniform(sizes, density, given)
    elif density == 1.0 and not given:
        solved = dict.fromkeys(shapes, 1.0)
    else:
        weight = (
            _erdos_renyi
            if distribution == "erdos_renyi"
            else _erdos_renyi_kernel
        )
        raw = {name: weight(shape) for name, shape in shapes.items()}
        solved = _solve_scaled(sizes, raw, density, given, conventions)
    return {name: float(solved[name]) for name in shapes}


def masked_shapes(
    shapes: Shapes, distribution: str, densities: Mapping[str, float]
) -> dict[str, Sequence[int]]:
    """Returns the shapes of the layers that a distribution masks.

    Under `uniform` the first layer stays dense and is not masked, unless its
    density is given.

    Args:
        shapes: `{name: kernel shape}` in the order of the model.
        distribution: As in `layer_densities`.
        densities: `{name: density}` of layers whose density is given.

    Returns:
        `{name: kernel shape}` in the order of `shapes`.

    Raises:
        ValueError: None is left.
    """
    masked = _checked_shapes(shapes)
    first = next(iter(masked))
    given = _checked_given(densities, masked)
    if full_name(distribution) == "uniform" and first not in given:
        del masked[first]
    if not masked:
        raise ValueError(
            "There is nothing to mask: under 'uniform' the first layer "
            f"stays dense and {first!r} is the only one. Use "
            "distribution='erdos_renyi_kernel', or give its density in "
            "densities."
        )
    return masked


def total_count(exact: float, density: float, weights: int) -> int:
    """Returns how many connections all layers together keep.

    Args:
        exact: The number to round.
        density: The density behind it, in (0, 1].
        weights: Number of weights.

    Returns:
        round(exact), at least 1.

    Raises:
        ValueError: It rounds to zero, or an argument is out of range.
    """
    density = checked_density(density)
    weights = integer("weights", weights, at_least=1)
    exact = number(
        "exact",
        exact,
        at_least=0,
        at_most=weights,
        rule=f"must be a number from 0 to {weights}, all weights",
    )
    total = round(exact)
    if total == 0:
        raise ValueError(
            f"density={density} of {weights} weights rounds to no connection "
            f"at all. Pass at least {1 / weights:.2g}. Received: "
            f"density={density!r}."
        )
    return total


def layer_counts(
    sizes: Mapping[str, int], densities: Mapping[str, float], total: int
) -> dict[str, int]:
    """Returns how many weights each layer keeps, `total` exactly.

    Largest-remainder rounding: each layer first gets floor(density x size). The
    layers with the largest remainders then get one more each (or those with the
    smallest lose one) until the sum is `total`. Ties go to the earlier layer.

    Args:
        sizes: `{name: number of weights}`.
        densities: `{name: density in [0, 1]}` of at least these names.
        total: The sum to reach, between 0 and the sum of `sizes`.

    Returns:
        `{name: count}`, each between 0 and the layer's size.

    Raises:
        ValueError: An argument is out of range.

    Example:

    >>> layer_counts({"a": 5, "b": 5}, {"a": 0.5, "b": 0.5}, 5)
    {'a': 3, 'b': 2}
    """
    for name, value in (("sizes", sizes), ("densities", densities)):
        _check_mapping(name, value)
    if not set(sizes) <= set(densities):
        raise ValueError(
            "densities must name every layer of sizes. Received: "
            f"sizes={sizes!r}, densities={densities!r}."
        )
    sizes = {
        name: integer(f"{name}", n, at_least=0) for name, n in sizes.items()
    }
    densities = {name: fraction(f"{name}", densities[name]) for name in sizes}
    everything = sum(sizes.values())
    total = integer(
        "total",
        total,
        at_least=0,
        at_most=everything,
        rule=f"is how many of {everything} weights are kept",
    )
    quotas = {name: densities[name] * size for name, size in sizes.items()}
    counts = {name: math.floor(quota) for name, quota in quotas.items()}
    short = total - sum(counts.values())
    step = 1 if short > 0 else -1
    while short:
        # Skips layers at their limit. The others come in the order of how far
        # rounding has left them from their quota.
        open_layers = [
            name for name in sizes if 0 <= counts[name] + step <= sizes[name]
        ]
        open_layers.sort(key=lambda n: step * (counts[n] - quotas[n]))
        for name in open_layers[: abs(short)]:
            counts[name] += step
            short -= step
    return counts


def checked_density(density: float) -> float:
    """Returns a density as a float.

    Args:
        density: Fraction of weights kept.

    Raises:
        ValueError: It is not a number in (0, 1].
    """
    return number("density", density, above=0, at_most=1, rule=_DENSITY)


def full_name(distribution: str) -> str:
    """Returns the full name of a distribution.

    Args:
        distribution: One of `DISTRIBUTIONS`, `"er"` or `"erk"`.

    Returns:
        One of `DISTRIBUTIONS`.

    Raises:
        ValueError: There is no such distribution.
    """
    name = distribution
    if isinstance(name, str):
        name = _SHORT_NAMES.get(name, name)
    if not isinstance(name, str) or name not in DISTRIBUTIONS:
        near = difflib.get_close_matches(
            str(distribution), (*DISTRIBUTIONS, *_SHORT_NAMES), n=1, cutoff=0.4
        )
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"distribution must be one of {DISTRIBUTIONS} (or 'er', 'erk'). "
            f"Received: distribution={distribution!r}.{hint}"
        )
    return name


def _erdos_renyi(shape):
    n_in, n_out = shape[-2:]
    return (n_in + n_out) / (n_in * n_out)


def _erdos_renyi_kernel(shape):
    return float(np.sum(shape) / np.prod(shape, dtype=np.float64))


def _solve_uniform(sizes, density, fixed):
    if not fixed:
        return dict.fromkeys(sizes, density)
    free = sum(size for name, size in sizes.items() if name not in fixed)
    budget = density * sum(sizes.values())
    left = budget - sum(d * sizes[name] for name, d in fixed.items())
    _check_reachable(left, free, density, fixed)
    share = min(1.0, left / free) if free else 0.0
    return {n: fixed.get(n, share) for n in sizes}


def _solve_scaled(sizes, raw, density, given, conventions):
    """Solves sum of min(1, epsilon raw) x size = budget for epsilon."""
    dense = set()
    budget = 0.0
    for name, size in sizes.items():
        # No reference has given layers, so there is no rounding to match.
        budget += (
            density * size if given else _rounded(size, density, conventions)[1]
        )
        if name in given:
            budget -= given[name] * size
    if given:
        free = sum(size for name, size in sizes.items() if name not in given)
        _check_reachable(budget, free, density, given)
    while True:
        free = [n for n in sizes if n not in dense and n not in given]
        if not free:
            break
        left = budget
        for name in dense:
            # A dense layer keeps the zeros it would have; the others pay.
            left -= (
                sizes[name]
                if given
                else sum(_rounded(sizes[name], density, conventions))
            )
        epsilon = left / sum(raw[name] * sizes[name] for name in free)
        largest = max(raw[name] for name in free)
        if epsilon * largest <= 1:
            break
        dense.update(name for name in free if raw[name] == largest)
    return {
        name: given[name]
        if name in given
        else 1.0
        if name in dense
        else min(1.0, epsilon * raw[name])
        for name in sizes
    }


def _rounded(size, density, conventions):
    """Returns how many zeros and ones a layer has at the overall density."""
    zeros = int(size * (1 - density))
    if conventions.erk_rounding == "zeros":
        return zeros, size - zeros
    return zeros, int(size * density)


def _checked_shapes(shapes):
    """Returns `{name: tuple of ints}`."""
    _check_mapping("shapes", shapes)
    if not shapes:
        raise ValueError(
            "A distribution needs at least one kernel shape. Received: "
            f"shapes={shapes!r}."
        )
    checked = {}
    for name, shape in shapes.items():
        try:
            checked[name] = tuple(
                integer("A dimension", n, at_least=1) for n in shape
            )
        except (TypeError, ValueError):
            checked[name] = ()
        shortest = len(checked[name]) < 2
        if shortest or math.prod(checked[name]) > INT64:
            raise ValueError(
                "A kernel shape has at least two dimensions (input and output "
                f"channels last), each at least 1. Received: {name!r} with "
                f"shape {shape!r}."
            )
    return checked


def _checked_given(given, shapes):
    """Returns `{name: float}`."""
    if given is None:
        return {}
    _check_mapping("densities", given)
    checked = {}
    for name, value in given.items():
        if name not in shapes:
            near = difflib.get_close_matches(
                str(name), [str(shape) for shape in shapes], n=1
            )
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"densities names {name!r}, which is not a masked layer.{hint} "
                f"Masked layers: {', '.join(map(str, shapes))}."
            )
        checked[name] = number(
            str(name),
            value,
            above=0,
            at_most=1,
            rule="must be in (0, 1], as each of densities",
        )
    return checked


def _checked_groups(group_sizes, sizes):
    """Returns `{name: int}`, no more than a layer has weights."""
    _check_mapping("group_sizes", group_sizes)
    if not set(sizes) <= set(group_sizes):
        raise ValueError(
            "group_sizes must name every masked layer. Received: "
            f"group_sizes={group_sizes!r}, layers {', '.join(sizes)}."
        )
    return {
        name: integer(
            str(name),
            group_sizes[name],
            at_least=1,
            at_most=size,
            rule=f"must be an int from 1 to {size}, the weights of the layer",
        )
        for name, size in sizes.items()
    }


def _check_mapping(name, value):
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{name} must map names of layers. Received: {name}={value!r}."
        )


def _check_reachable(left, free, density, given):
    """Checks that `free` weights can hold `left` ones."""
    # A tolerance for the rounding of counts.
    if -0.5 < left < free + 0.5 and not (left <= 0 and free):
        return
    raise ValueError(
        f"No densities of the other layers reach density={density}: the "
        f"layers given ({given}) leave {left:.0f} connections for "
        f"{free} weights. Change density, or the densities of these layers."
    )
