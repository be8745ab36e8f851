"""The measurements of engines: rows, files and tables."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rigl_keras import _files
from rigl_keras._text import aligned, exact
from rigl_keras.experiments.benchmarks.engines.catalogue import ENGINES, OURS

__all__ = [
    "Case",
    "LeftOut",
    "Machine",
    "Measurement",
    "Records",
    "Turn",
    "speed_up",
    "table",
]

_QUIET = 0.5  # the load average below which a machine is idle enough


class Turn(NamedTuple):
    """Seconds of a call in one turn: the median and the minimum."""

    median: float
    shortest: float


class Case(NamedTuple):
    """A network and a batch size, the same for all engines."""

    model: str
    distribution: str
    density: float
    batch: int

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.distribution}, density "
            f"{exact(self.density)}, batch {self.batch}"
        )


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine that the times depend on.

    Attributes:
        processor: The system's name of the processor.
        isa: Instruction set to which engines were limited, or the newest one
            of the processor.
        threads: Threads of each engine.
    """

    processor: str
    isa: str
    threads: int

    def __str__(self) -> str:
        some = "s" if self.threads > 1 else ""
        return f"{self.processor}, {self.isa}, {self.threads} thread{some}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One engine in one case.

    Attributes:
        case, machine: What was measured, and where.
        date, commit: The time, and the commit of this project.
        load: Load average at the beginning. It should be close to 0.
        engine: One of `catalogue.ENGINES`.
        version: Version of its package.
        precision: The precision of its products.
        held: Whether the engine was limited to the machine's `isa`. Some
            engines cannot be limited.
        difference: Difference of its outputs from the Keras model's, in units
            of their spread.
        same_class: Fraction of examples with the same largest output.
        turns: The turns of the engine, one in each round of the case.
    """

    case: Case
    machine: Machine
    date: str
    commit: str
    load: float
    engine: str
    version: str
    precision: str
    held: bool
    difference: float
    same_class: float
    turns: tuple[Turn, ...]

    @property
    def median(self) -> float:
        """Median seconds of a call, over turns."""
        return float(np.median([turn.median for turn in self.turns]))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile over turns, in seconds."""
        medians = [turn.median for turn in self.turns]
        low, high = np.percentile(medians, (25, 75))
        return float(low), float(high)

    @property
    def minimum(self) -> float:
        """Seconds of the shortest call."""
        return min(turn.shortest for turn in self.turns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An engine that could not be measured in a case, and why.

    Attributes:
        case, machine, engine: As in a `Measurement`.
        reason: The reason.
        tried: Whether the engine was available, but failed.
    """

    case: Case
    machine: Machine
    engine: str
    reason: str
    tried: bool


def speed_up(measured: Measurement, over: Measurement) -> float:
    """Returns how many times faster one engine is than another.

    It is the median over rounds of the ratio of the two times in a round, so
    that other work on the machine, which slows down both, does not count.

    Args:
        measured, over: Measurements of one case, from the same rounds.
    """
    return float(
        np.median(
            [
                other.median / own.median
                for own, other in zip(measured.turns, over.turns, strict=True)
            ]
        )
    )


class Records:
    """All measurements of a machine, in a folder.

    `engines.json` holds everything, and a later command continues from it.
    `engines.csv` has a line for each measurement. Both are written after each
    case.

    Args:
        folder: The folder. None: nothing is written.
        machine: This machine.

    Raises:
        ValueError: The folder has measurements of another machine, or a file
            that this class did not write.
    """

    def __init__(self, folder: Path | None, machine: Machine):
        self._folder, self._machine = folder, machine
        self.measurements: list[Measurement] = []
        self.left_out: list[LeftOut] = []
        if folder is not None and (folder / "engines.json").exists():
            self._read(folder / "engines.json")

    def _read(self, path):
        try:
            content = json.loads(path.read_text())
            for row in content["measurements"]:
                row["turns"] = tuple(Turn(*turn) for turn in row["turns"])
                self.measurements.append(Measurement(**_read_row(row)))
            for row in content["left_out"]:
                self.left_out.append(LeftOut(**_read_row(row)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is not a file of measurements. Remove it, or "
                "pass another folder."
            ) from error
        for found in (*self.measurements, *self.left_out):
            if found.machine != self._machine:
                raise ValueError(
                    f"{str(path)!r} holds measurements of another machine, "
                    f"{found.machine}. This is {self._machine}. Pass another "
                    "folder."
                )

    def of(self, case: Case) -> list[Measurement]:
        """Returns the measurements of a case."""
        return [m for m in self.measurements if m.case == case]

    def left_out_of(self, case: Case) -> list[LeftOut]:
        """Returns the engines that could not be measured in a case."""
        return [found for found in self.left_out if found.case == case]

    def has(self, case: Case, engines: Sequence[str]) -> bool:
        """Returns whether all engines were measured, or tried, in a case."""
        tried = {m.engine for m in self.of(case)}
        tried |= {x.engine for x in self.left_out_of(case) if x.tried}
        return tried >= {*engines}

    def put(
        self,
        case: Case,
        measurements: Sequence[Measurement],
        left_out: Sequence[LeftOut],
    ) -> None:
        """Replaces the records of a case, and writes the files.

        Earlier records are removed, because engines of two commands did not
        take turns.
        """
        self.measurements = [m for m in self.measurements if m.case != case]
        self.measurements += measurements
        self.left_out = [m for m in self.left_out if m.case != case]
        self.left_out += left_out
        if self._folder is not None:
            content = {
                "measurements": [_written_row(m) for m in self.measurements],
                "left_out": [_written_row(m) for m in self.left_out],
            }
            lines = json.dumps(content, indent=1)
            _files.write(self._folder / "engines.json", lines + "\n")
            _files.write(self._folder / "engines.csv", _csv(self.measurements))


def _written_row(found):
    return {
        name: value._asdict() if isinstance(value, Case) else value
        for name, value in {
            **vars(found),
            "machine": vars(found.machine),
        }.items()
    }


def _read_row(row):
    return {
        **row,
        "case": Case(**row["case"]),
        "machine": Machine(**row["machine"]),
    }


def _csv(measurements):
    file = io.StringIO()
    rows = [
        {
            **m.case._asdict(),
            "engine": m.engine,
            "version": m.version,
            "precision": m.precision,
            "median_ms": _milliseconds(m.median),
            "minimum_ms": _milliseconds(m.minimum),
            "lower_quartile_ms": _milliseconds(m.quartiles[0]),
            "upper_quartile_ms": _milliseconds(m.quartiles[1]),
            "rounds": len(m.turns),
            "difference": f"{m.difference:.1e}",
            "same_class": f"{m.same_class:.3f}",
            "date": m.date,
            "commit": m.commit,
            **vars(m.machine),
            "held": m.held,
            "load": f"{m.load:.2f}",
        }
        for m in measurements
    ]
    names = list(rows[0]) if rows else ["model"]
    written = csv.DictWriter(file, names, lineterminator="\n")
    written.writeheader()
    written.writerows(rows)
    return file.getvalue()


def _milliseconds(seconds):
    return f"{1e3 * seconds:.4g}"


def table(
    case: Case,
    measurements: Sequence[Measurement],
    left_out: Sequence[LeftOut] = (),
) -> str:
    """Returns a table of the engines of a case, the fastest first.

    Engines with another precision than float32 come in a second part.

    Args:
        case: The case.
        measurements: The measurements of this case.
        left_out: The engines that could not be measured in this case.
    """
    lines = [f"{case}: milliseconds of a call"]
    rated = sorted(measurements, key=lambda m: m.median)
    ours = _ours(rated)
    plain = [m for m in rated if m.precision == "float32"]
    other = [m for m in rated if m.precision != "float32"]
    if rated:
        heading = ["  engine", "version", "median", "minimum", "quartiles"]
        heading.append("difference")
        if ours:
            heading.append(f"{ENGINES[ours.engine].label} is")
        rows = [_row(m, ours) for m in (*plain, *other)]
        head, *rest = aligned([heading, *rows])
        lines += [head, *rest[: len(plain)]]
        if other:
            lines += ["  in another precision:", *rest[len(plain) :]]
    lines += [
        f"  {ENGINES[found.engine].label} is not measured: {found.reason}."
        for found in left_out
    ]
    load = max((m.load for m in measurements), default=0.0)
    if load > _QUIET:
        lines.append(
            f"  Other programs were running (load {load:.2f}): medians are too "
            "high, minima more reliable."
        )
    return "\n".join(lines)


def _ours(measurements):
    """Returns our measurement, with which others are compared, or None."""
    for name in OURS:
        for m in measurements:
            if m.engine == name:
                return m
    return None


def _row(m, ours):
    low, high = (_milliseconds(seconds) for seconds in m.quartiles)
    row = [
        f"  {ENGINES[m.engine].label}"
        + ("" if m.held else " (any instructions)"),
        m.version,
        _milliseconds(m.median),
        _milliseconds(m.minimum),
        f"{low} to {high}",
        f"{m.difference:.0e}",
    ]
    if ours:
        row.append("" if m is ours else f"{speed_up(ours, m):.2f}x as fast")
    return row
