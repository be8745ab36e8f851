"""How figures look: one palette, one legend, one size of text."""

import io
import warnings

from matplotlib import ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rigl_keras._text import exact

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
    "VERMILION",
    "as_png",
    "dress",
    "legend_above",
    "legend_below",
    "new_figure",
    "ticks_at",
]

_TITLE, TEXT, TICKS = 10, 9, 8  # sizes of letters
_DPI = 130
_LONGEST, _LARGEST = 400, 5_000  # inches and square inches of a figure
BLACK, GREY = "#000000", "#777777"
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"


def as_png(figure: Figure) -> bytes:
    """Returns a figure as the bytes of an image."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        # Names may have letters that its font lacks, which shows boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        # Nothing of the machine, so that the same numbers are the same bytes.
        figure.savefig(
            image, format="png", dpi=_DPI, metadata={"Software": None}
        )
    return image.getvalue()


def new_figure(width, height):
    if max(width, height) > _LONGEST or width * height > _LARGEST:
        raise ValueError(
            f"it would be {width:.0f} by {height:.0f} inches: too many panels"
        )
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def dress(axes, title=None, x=None, y=None):
    axes.set_title(title, fontsize=_TITLE, loc="left")
    axes.set_xlabel(x, fontsize=TEXT)
    axes.set_ylabel(y, fontsize=TEXT)
    axes.tick_params(labelsize=TICKS)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def legend_below(axes, ncols=2, down=0.2):
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


def legend_above(figure, ncols=None):
    """Says once what all axes show; None: in one line."""
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


def ticks_at(axis, values):
    """Puts ticks of a logarithmic axis at values, written out."""
    axis.set_major_locator(ticker.FixedLocator(values))
    axis.set_major_formatter(
        ticker.FixedFormatter([exact(value) for value in values])
    )
    axis.set_minor_locator(ticker.NullLocator())
