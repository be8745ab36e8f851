"""How figures look: one palette, one legend, one size of text.

The colours are Okabe and Ito's, which colour-blind people can tell apart.
Markers, line styles and hatches distinguish them without colour. matplotlib is
imported when a figure is drawn, so it is needed for figures only.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rigl_keras import _files
from rigl_keras._text import exact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "SKY",
    "TEXT",
    "TICKS",
    "TITLE",
    "VERMILION",
    "WHITE",
    "as_png",
    "dress",
    "legend_above",
    "legend_below",
    "new_figure",
    "save",
    "ticks_at",
]

TITLE, TEXT, TICKS = 10, 9, 8  # sizes of letters
_DPI = 130
_LONGEST, _LARGEST = 400, 5_000  # inches and square inches of a figure
BLACK, GREY, WHITE = "#000000", "#777777", "#FFFFFF"
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"


def as_png(figure: Figure) -> bytes:
    """Returns a figure as the bytes of an image."""
    image = io.BytesIO()
    # No metadata of the machine: equal numbers give equal bytes.
    _save(figure, image, format="png", metadata={"Software": None})
    return image.getvalue()


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure, whole or not at all; the suffix gives the format."""
    if Path(path).suffix == ".png":
        _files.write(path, as_png(figure))
        return
    with _files.whole(path) as unfinished:
        _save(figure, unfinished)


def _save(figure, target, **options):
    with warnings.catch_warnings():
        # The font shows a box for each letter that it lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(target, dpi=_DPI, **options)


def new_figure(width: float, height: float) -> Figure:
    """Returns a figure of a size in inches, with constrained layout.

    Raises:
        ValueError: It would be too large to be drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if max(width, height) > _LONGEST or width * height > _LARGEST:
        raise ValueError(
            f"it would be {width:.0f} by {height:.0f} inches: too many panels"
        )
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def dress(
    axes: Axes,
    title: str | None = None,
    x: str | None = None,
    y: str | None = None,
) -> None:
    """Sets the title, labels and grid of axes."""
    axes.set_title(title or "", fontsize=TITLE, loc="left")
    axes.set_xlabel(x or "", fontsize=TEXT)
    axes.set_ylabel(y or "", fontsize=TEXT)
    axes.tick_params(labelsize=TICKS)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def legend_below(axes: Axes, ncols: int = 2, down: float = 0.2) -> None:
    """Draws the legend below axes."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -down),
            ncols=ncols,
            frameon=False,
            fontsize=TICKS,
            handlelength=3,
        )


def legend_above(figure: Figure, ncols: int | None = None) -> None:
    """Draws one legend for all axes; `ncols=None`: in one line."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(
            *axes.get_legend_handles_labels(), strict=True
        ):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=ncols or len(handles),
        frameon=False,
        fontsize=TEXT,
    )


def ticks_at(axis: Axis, values: Sequence[float]) -> None:
    """Sets the ticks of a logarithmic axis, with labels written out."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.FixedLocator(values))
    axis.set_major_formatter(
        ticker.FixedFormatter([exact(value) for value in values])
    )
    axis.set_minor_locator(ticker.NullLocator())
