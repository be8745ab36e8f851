"""The numbers of `benchmark_inference`, as tables, a file and a figure."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from rigl_keras import _extras, _figure_style, _files
from rigl_keras._figure_style import (
    BLACK,
    BLUE,
    ORANGE,
    SKY,
    TEXT,
    TICKS,
    VERMILION,
    WHITE,
    dress,
    legend_above,
    new_figure,
)

__all__ = [
    "COMPACT",
    "Comparison",
    "DENSE",
    "Measurement",
    "SIDES",
    "SPARSE",
    "TFLITE_DENSE",
    "TFLITE_SPARSE",
    "TORCH",
    "check_paths",
    "draw",
]

DENSE = "SavedModel, dense"  # what the others are compared with
SPARSE = "SavedModel, sparse"
COMPACT = "SavedModel, sparse, compact"
TFLITE_DENSE = "TFLite, dense"
TFLITE_SPARSE = "TFLite, sparse"
TORCH = "PyTorch"
SIDES = (DENSE, SPARSE, COMPACT, TFLITE_DENSE, TFLITE_SPARSE, TORCH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One side on one network and batch.

    Attributes:
        model: One of `MODELS`.
        density: Fraction of its masked weights that is kept.
        batch: Examples in a call.
        side: One of `SIDES`.
        seconds: Median time of a call.
        bytes: Size of the files on disk; None for PyTorch, which has none.
        difference: Largest difference of the outputs from those of the Keras
            model, in units of the largest output.
        rounds: Number of turns for the median.
    """

    model: str
    density: float
    batch: int
    side: str
    seconds: float
    bytes: int | None
    difference: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All measurements; printing it shows tables.

    Attributes:
        measurements: `Measurement`s, sides in the order of `SIDES`.
        notes: What was done to the networks, and what could not be measured.
        environment: Versions, and the threads of each runtime.
    """

    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...]
    environment: dict

    def values(self, field: str) -> list:
        """Returns the values of a field of the measurements, each once."""
        return list(dict.fromkeys(getattr(m, field) for m in self.measurements))

    def of(self, **fields) -> Measurement | None:
        """Returns the measurement with these values of fields, or None."""
        wanted = fields.items()
        return next(
            (
                m
                for m in self.measurements
                if all(getattr(m, name) == value for name, value in wanted)
            ),
            None,
        )

    def ratio(self, measured: Measurement) -> float:
        """Returns a time relative to that of the dense SavedModel."""
        # Each case has a dense side.
        dense: Any = self.of(
            model=measured.model,
            density=measured.density,
            batch=measured.batch,
            side=DENSE,
        )
        return measured.seconds / dense.seconds

    def save(self, path: str | os.PathLike) -> None:
        """Writes the comparison as JSON."""
        content = json.dumps(dataclasses.asdict(self), indent=2)
        _files.write(path, content + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Comparison":
        """Returns a comparison that `save` has written."""
        content = json.loads(Path(path).read_text())
        rows = tuple(Measurement(**row) for row in content["measurements"])
        return cls(rows, tuple(content["notes"]), content["environment"])

    def __str__(self) -> str:
        def time_and_ratio(m):
            return f"{1e3 * m.seconds:9.2f} {self.ratio(m):5.2f}x"

        def megabytes(m):
            return "-" if m.bytes is None else f"{m.bytes / 1e6:.2f}"

        lines = []
        batches = self.values("batch")
        for model in self.values("model"):
            for batch in batches:
                title = (
                    f"{model}, batch {batch}: milliseconds of a call, and in "
                    f"units of {DENSE}"
                )
                lines += self._table(title, model, batch, time_and_ratio)
            title = f"{model}: MB on disk"
            lines += self._table(title, model, batches[0], megabytes)
        return "\n".join([*lines, *self.notes, *self._about()])

    def _table(self, title, model, batch, shown):
        densities = self.values("density")
        heads = [f"density {density:g}" for density in densities]
        lines = [title, f"  {'':28}" + "".join(f"{h:>18}" for h in heads)]
        for side in self.values("side"):
            cells = [
                self.of(model=model, density=d, batch=batch, side=side)
                for d in densities
            ]
            lines.append(
                f"  {side:28}" + "".join(f"{shown(m):>18}" for m in cells)
            )
        return [*lines, ""]

    def _about(self):
        def listed(name):
            found = self.environment[name].items()
            return ", ".join(f"{key} {value}" for key, value in found)

        rounds = self.values("rounds")
        return [
            f"Medians of {min(rounds)} to {max(rounds)} rounds, interleaved.",
            f"Threads: {listed('threads')}; {self.environment['cores']} cores.",
            f"Versions: {listed('versions')}.",
        ]


def check_paths(figure: str | None, json_path: str | None) -> None:
    """Raises ValueError for a path that could not be written later.

    Args:
        figure: Path of the image for `draw`, or None.
        json_path: Path of the file for `Comparison.save`, or None.
    """
    for path in filter(None, (figure, json_path)):
        if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
            raise ValueError(
                f"A file is needed, in a folder that exists. Received: {path!r}"
            )
    if not figure:
        return
    _extras.check_installed(
        "The figure",
        "matplotlib",
        instead="Or pass --figure= to draw none.",
    )
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    types = FigureCanvasAgg.get_supported_filetypes()
    if Path(figure).suffix[1:] not in types:
        raise ValueError(
            f"--figure must end with one of {', '.join(sorted(types))}. "
            f"Received: {figure!r}."
        )


# The colour and the hatch of each side in the figure.
_LOOKS = {
    SPARSE: (BLUE, ""),
    COMPACT: (SKY, "///"),
    TFLITE_DENSE: (VERMILION, "xxx"),
    TFLITE_SPARSE: (ORANGE, "..."),
    TORCH: (WHITE, ""),
}


def draw(comparison: Comparison, path: str | os.PathLike) -> None:
    """Draws latencies relative to the dense SavedModel's.

    There is a panel for each network and batch. It has bars for all other
    sides at each density.

    Args:
        comparison: What `compare` returned.
        path: Image to write, of a type that matplotlib knows.
    """
    models, batches = comparison.values("model"), comparison.values("batch")
    figure = new_figure(1 + 5 * len(batches), 1.2 + 2.9 * len(models))
    panels = figure.subplots(len(models), len(batches), squeeze=False)
    for row, model in zip(panels, models, strict=True):
        for axes, batch in zip(row, batches, strict=True):
            _draw_panel(axes, comparison, model, batch)
    for axes in panels[:, 0]:
        axes.set_ylabel("time of a call / dense SavedModel", fontsize=TEXT)
    for axes in panels[-1]:
        axes.set_xlabel(
            "density (below it, the dense SavedModel's time)", fontsize=TEXT
        )
    legend_above(figure, ncols=3)
    _figure_style.save(figure, path)


def _draw_panel(axes, comparison, model, batch):
    densities = comparison.values("density")
    others = [side for side in comparison.values("side") if side != DENSE]
    width = 0.84 / len(others)
    highest = 1.0
    for i, side in enumerate(others):
        ratios = [
            comparison.ratio(
                comparison.of(model=model, density=d, batch=batch, side=side)
            )
            for d in densities
        ]
        highest = max(highest, *ratios)
        at = np.arange(len(densities)) + (i - (len(others) - 1) / 2) * width
        colour, hatch = _LOOKS[side]
        bars = axes.bar(
            at,
            ratios,
            0.9 * width,
            label=side,
            color=colour,
            hatch=hatch,
            edgecolor=BLACK,
            linewidth=0.7,
        )
        labels = axes.bar_label(
            bars, fmt="%.2f", fontsize=TICKS - 1, rotation=90, padding=3
        )
        for label in labels:  # a background, over the line at 1
            label.set_bbox({"facecolor": WHITE, "edgecolor": "none", "pad": 1})
    axes.axhline(
        1, color=BLACK, lw=1.2, ls="--", label=DENSE + " (1)", zorder=0.5
    )
    dense = [
        comparison.of(model=model, density=d, batch=batch, side=DENSE)
        for d in densities
    ]
    axes.set_xticks(
        np.arange(len(densities)),
        [f"{m.density:g}\n{_milliseconds(m.seconds)}" for m in dense],
    )
    axes.set_ylim(0, 1.2 * highest)
    dress(axes, f"{model}, batch {batch}")
    axes.grid(False, axis="x")


def _milliseconds(seconds):
    digits = max(0, 2 - math.floor(math.log10(1e3 * seconds)))
    return f"{1e3 * seconds:,.{min(digits, 3)}f} ms"
