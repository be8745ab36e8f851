"""The numbers of `bin/benchmark kernels|train|inference`, as tables and CSV."""

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping, Sequence

from rigl_keras.experiments.benchmarks.csv_files import write_rows

__all__ = [
    "Line",
    "Measurement",
    "crossover",
    "lines_of",
    "table_head",
    "table_row",
    "write_csv",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One side at one density, and the dense side that took turns with it.

    Attributes:
        model: One of `networks.NETWORKS`.
        layer: Shape of a layer; empty for a whole model.
        size: Size of the images that the layer returns.
        distribution: How density is spread over layers; empty for one layer.
        batch_size: Examples in a call.
        side: What was measured.
        density: Fraction of the masked weights kept.
        dense_seconds: Median time of the dense side.
        dense_fastest: Minimum time of the dense side, in seconds.
        seconds: Median time of this side.
        fastest: Minimum time of this side, in seconds.
        rounds: Number of turns.
        machine: Instruction set, library of dense products, and cores.
        processor: Name of the processor.
        date: Time of the measurement, UTC.
        commit: Commit of this project.
    """

    model: str
    layer: str = ""
    size: str = ""
    distribution: str = ""
    batch_size: int
    side: str
    density: float
    dense_seconds: float
    dense_fastest: float
    seconds: float
    fastest: float
    rounds: int
    machine: str
    processor: str
    date: str
    commit: str

    @property
    def speed_up(self) -> float:
        """How many times faster than the dense side."""
        return self.dense_seconds / self.seconds


@dataclasses.dataclass(frozen=True)
class Line:
    """One side over all densities: a line of a table and of a figure.

    Attributes:
        first: One of the measurements, for the fields that all share.
        speed_ups: `{density: speed-up}`, in increasing order of density.
    """

    first: Measurement
    speed_ups: Mapping[float, float]

    @property
    def crossover(self) -> float | None:
        """The crossover, as the function `crossover` defines it."""
        return crossover(self.speed_ups)


def crossover(speed_ups: Mapping[float, float]) -> float | None:
    """Returns the density at which sparse and dense take the same time.

    It is the first density, in increasing order, at which sparse is slower.
    If sparse is faster at a higher density again, this is noise, or the layer
    uses dense products. Between densities, the logarithm of the speed-up is
    interpolated linearly over the logarithm of the density.

    Args:
        speed_ups: `{density: speed-up over dense}`.

    Returns:
        The density; infinity if sparse is faster up to the highest density,
        None if it is slower at the lowest.

    Example:

    >>> round(crossover({0.1: 2.0, 0.4: 0.5}), 3)  # halfway, on both scales
    0.2
    """
    densities = sorted(speed_ups)
    for low, high in itertools.pairwise(densities):
        if speed_ups[low] >= 1 > speed_ups[high]:
            above, below = math.log(speed_ups[low]), math.log(speed_ups[high])
            return low * (high / low) ** (above / (above - below))
    return math.inf if speed_ups[densities[-1]] >= 1 else None


def lines_of(measurements: Sequence[Measurement]) -> list[Line]:
    """Returns the lines of measurements, in the order of their first ones."""
    found: dict[tuple, list[Measurement]] = {}
    for m in measurements:
        key = m.model, m.layer, m.distribution, m.batch_size, m.side
        found.setdefault(key, []).append(m)
    return [
        Line(
            line[0],
            {
                m.density: m.speed_up
                for m in sorted(line, key=lambda m: m.density)
            },
        )
        for line in found.values()
    ]


# Tables are printed line by line, as measuring a line may take minutes.

_LABEL, _CELL = 46, 8


def table_head(title: str, densities: Sequence[float]) -> str:
    """Returns the first lines of a table.

    Args:
        title: Title of the table.
        densities: The densities of the speed-ups, in order.
    """
    heads = "".join(f"{density:>{_CELL}g}" for density in densities)
    return (
        f"{title}\n  {'speed-up over dense at density':{_LABEL}}"
        f"{'dense ms':>{_CELL + 2}}{heads}   crossover"
    )


def table_row(line: Line) -> str:
    """Returns a line of a table with the head of `table_head`."""
    m = line.first
    label = "  ".join(filter(None, (m.layer, m.side)))
    cells = "".join(f"{s:{_CELL - 1}.2f}x" for s in line.speed_ups.values())
    return (
        f"  {label:{_LABEL}}{1e3 * m.dense_seconds:{_CELL + 2}.2f}{cells}"
        f"   {_written(line)}"
    )


def _written(line):
    at = line.crossover
    if at is None:
        return "none"
    if math.isinf(at):
        return f"above {max(line.speed_ups):g}"
    return f"{at:.2g}"


def write_csv(
    measurements: Sequence[Measurement], path: str | os.PathLike
) -> None:
    """Writes measurements as CSV with a header.

    Columns that are empty in all rows are left out.

    Args:
        measurements: At least one.
        path: File to write.
    """
    rows = [
        {**dataclasses.asdict(m), "speed_up": m.speed_up} for m in measurements
    ]
    names = [name for name in rows[0] if any(row[name] != "" for row in rows)]
    write_rows([{name: row[name] for name in names} for row in rows], path)
