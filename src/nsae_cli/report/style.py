"""One look for all figures, and the one way in which a figure reaches the disk.

Figures are drawn without pyplot and under matplotlib's own defaults plus `_SETTINGS`, whatever the user's matplotlibrc
says: the same data give the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator

from nsae_cli.store import commit

#: Colours of Okabe & Ito (2008), distinguishable with every common form of colour blindness.
VERMILION, BLUE, GREEN, ORANGE = "#D55E00", "#0072B2", "#009E73", "#E69F00"
SKY, PURPLE, BLACK = "#56B4E9", "#CC79A7", "#000000"
GREY, INK, FAINT = "#BDBDBD", "#222222", "#666666"
#: For one line per SAE; more than seven repeat the colours with another dash.
SERIES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
DASHES = ("solid", (0, (5, 1.5)), (0, (1, 1)))

DPI = 150
#: Formats of a figure, with what is kept out of the file: its date and the program's version.
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
_BASE_SIZE = 9.5
_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": _BASE_SIZE,
    "axes.titlesize": _BASE_SIZE,
    "axes.labelsize": _BASE_SIZE,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": _BASE_SIZE - 1,
    "ytick.labelsize": _BASE_SIZE - 1,
    "legend.fontsize": _BASE_SIZE - 1,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
    "text.parse_math": False,
    "text.usetex": False,
    "path.simplify": True,
    # Text stays text in SVG, and fonts stay editable in PDF.
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
#: Settings of the process rather than of a figure.
_NOT_LOOK = (
    "backend",
    "interactive",
    "toolbar",
    "timezone",
    "datapath",
    "webagg",
    "tk.",
    "keymap",
    "macosx",
    "docstring",
)


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Draws what stands inside in the house style and leaves matplotlib's settings as they were."""
    look: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith(_NOT_LOOK)}
    look.update(_SETTINGS)
    with matplotlib.rc_context(look):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of width × height inches that arranges its parts without overlap."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def add_header(figure: Figure, title: str, caption: str) -> None:
    """Puts a bold title and a smaller caption at the top left and keeps the axes out of their way.

    Long lines are wrapped to the figure's width; a name without spaces is broken rather than clipped.
    """
    width, height = figure.get_size_inches()
    # Average glyph widths of DejaVu Sans, in units of the font size: bold .64, regular .53.
    usable = width - 0.3
    title_lines = _wrapped(title, int(usable * 72 / (11.5 * 0.64)))
    caption_lines = _wrapped(caption, int(usable * 72 / (8.5 * 0.53)))
    top = 0.12
    for lines, size, weight, colour in ((title_lines, 11.5, "bold", INK), (caption_lines, 8.5, "normal", FAINT)):
        if not lines:
            continue
        figure.text(
            0.15 / width, 1 - top / height, "\n".join(lines), ha="left", va="top", size=size, weight=weight,
            color=colour, linespacing=1.25,
        )  # fmt: skip
        top += len(lines) * size * 1.38 / 72 + 0.03
    reserved = min((top + 0.02) / height, 0.6)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0.005, 0.005, 0.99, 0.99 - reserved)))


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(paragraph, max(width, 10), break_on_hyphens=False) if paragraph else []
    return lines


def log_limits(low: float, high: float, room: float = 0.06) -> tuple[float, float]:
    """Limits of a log axis that leave `room` of the range free at both ends."""
    first, last = math.log10(low), math.log10(high)
    free = max((last - first) * room, 0.02)
    return 10 ** (first - free), 10 ** (last + free)


def log_ticks(low: float, high: float) -> LogLocator:
    """Ticks of a log axis, denser the fewer decades it spans."""
    ratio = high / low
    subs = (
        (1, 1.5, 2, 3, 4, 5, 7) if ratio < 6 else (1, 2, 3, 5, 7) if ratio < 30 else (1, 2, 5) if ratio < 3000 else (1,)
    )
    return LogLocator(subs=subs, numticks=20)


def plain_tick(value: float, _position: int | None = None) -> str:
    """A tick's label without exponent: 0.05, 200, 3,000, 2M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.6g}M"
    return f"{value:,.0f}" if abs(value) >= 1 and float(value).is_integer() else f"{value:.6g}"


def figure_bytes(figure: Figure, form: str) -> bytes:
    """The figure as a PNG, SVG or PDF: no date and no random id; the same figure gives the same bytes.

    Args:
        form: one of `FORMATS`.
    """
    buffer = io.BytesIO()
    with house_style(), warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "nsae"}):
        # A model's or SAE's name may hold characters that the font lacks: a box in the title is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        _settle(figure)
        figure.savefig(buffer, format=form, dpi=DPI, metadata=FORMATS[form])
    return buffer.getvalue()


def _settle(figure: Figure) -> None:
    """Lays the figure out once, on round numbers: the solver's last digits depend on what was drawn before."""
    if figure.get_layout_engine() is None:
        return
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = (round(float(edge), 5) for edge in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG; see `figure_bytes`."""
    return figure_bytes(figure, "png")


def save_png(figure: Figure, path: str | Path) -> None:
    """Writes the figure as a PNG, whole or not at all.

    Raises:
        ResourceError: the folder is missing, not writable or full.
    """
    commit.write_bytes(Path(path), png_bytes(figure))


def save_figure(figure: Figure, path: Path, formats: Sequence[str]) -> list[Path]:
    """Writes the figure in each format, whole or not at all; returns the files.

    Args:
        path: without a suffix.
        formats: of `FORMATS`.

    Raises:
        ResourceError: the folder is missing, not writable or full.
    """
    files = [path.parent / f"{path.name}.{form}" for form in formats]
    for form, file in zip(formats, files, strict=True):
        commit.write_bytes(file, figure_bytes(figure, form))
    return files
