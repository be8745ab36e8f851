"""How sure a difference of two means is.

Intervals and tests are SciPy's. Where it is not installed, differences stand
without them, and the page says so.
"""

import dataclasses
import math
import statistics

from rigl_keras.experiments.report.summaries import Summary

try:
    from scipy import stats
except ImportError:
    stats = None

__all__ = ["Difference", "has_intervals", "paired", "to_published"]

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Difference:
    """One mean minus another, in percentage points.

    Args:
        mean: The difference.
        n: How many seeds both have; of unpaired ones, how many the first has.
        ahead: In how many of these the first is above the second.
        low: Lower end of the interval; None: it cannot be known.
        high: Upper end of the interval.
        p: Of a two-sided test that the difference is none.
    """

    mean: float
    n: int
    ahead: int = 0
    low: float | None = None
    high: float | None = None
    p: float | None = None


def has_intervals() -> bool:
    """Returns whether SciPy is there, without which there are none."""
    return stats is not None


def paired(one: Summary, other: Summary) -> Difference | None:
    """Returns how much better one is, seed by seed; None: no seed in common.

    With d the differences of n seeds in common, the interval is
    mean(d) ± t(0.975, n - 1) s(d) / sqrt(n), s the sample deviation, and p is
    of the paired t-test. One seed has neither, and so have differences that
    are all the same.

    Args:
        one: The runs of a row.
        other: The runs of another row.
    """
    first, second = ({r.seed: r.test for r in s.finished} for s in (one, other))
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return None
    found = [first[seed] - second[seed] for seed in seeds]
    mean, n = statistics.fmean(found), len(found)
    ahead = sum(difference > 0 for difference in found)
    spread = statistics.stdev(found) if n > 1 else 0.0
    if spread < 1e-9:
        return Difference(mean, n, ahead)
    return Difference(mean, n, ahead, *_t(mean, spread / math.sqrt(n), n - 1))


def to_published(
    summary: Summary, accuracy: float, std: float | None, seeds: int = 3
) -> Difference | None:
    """Returns how far a mean is from a published one; None: there is none.

    The interval and p are of Welch's test, for means of unequal variances.

    Args:
        summary: The runs of a row.
        accuracy: The published mean in percent.
        std: Its sample deviation. None: not printed, and no interval.
        seeds: How many seeds it is of.
    """
    if summary.mean is None:
        return None
    mean, n = summary.mean - accuracy, summary.n
    if summary.std is None or std is None:
        return Difference(mean, n)
    parts = summary.std**2 / n, std**2 / seeds
    if sum(parts) < 1e-18:
        return Difference(mean, n)
    freedom = sum(parts) ** 2 / (
        parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (seeds - 1)
    )
    return Difference(mean, n, 0, *_t(mean, math.sqrt(sum(parts)), freedom))


def _t(mean, error, freedom):
    """Returns the ends of the interval, and p."""
    if stats is None:
        return None, None, None
    low, high = stats.t.interval(CONFIDENCE, freedom, loc=mean, scale=error)
    p = 2 * stats.t.sf(abs(mean) / error, freedom)
    return float(low), float(high), float(p)
