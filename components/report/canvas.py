"""How the figures look: SVG that lives inside a page and takes its colours and font from the page's style sheet.

Matplotlib draws with placeholder colours, which are then replaced with CSS variables, so that one figure suits a light page,
a dark page and paper. Text stays text. The output is deterministic: the same data give the same bytes.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

INK, MUTED, LINE, ACCENT = "#00000a", "#00000b", "#00000c", "#00000d"  # placeholders that no figure would otherwise use
SERIES = tuple(f"#00001{digit}" for digit in range(8))
THEME = {INK: "--ink", MUTED: "--muted", LINE: "--line", ACCENT: "--accent"} | {
    color: f"--series-{index}" for index, color in enumerate(SERIES)
}
MARKERS = "osD^vPX*"  # a second cue for readers who cannot tell the colours apart
LOG_FROM = 25.0  # above this ratio of largest to smallest, a linear axis hides the small values
WIDTH, ROW_HEIGHT, HEIGHT = 5.0, 0.36, 3.0  # inches, at 72 units per inch
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are not formulas: a lone $ is not an error
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same layout on every machine
    "font.size": 10.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "ytick.major.size": 0,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@contextlib.contextmanager
def house_style(name: str) -> Iterator[None]:
    """Draw in the report's style; the ids of a figure's parts are derived from `name`."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        yield


def bars(name: str, labels: list[str], values: list[float], texts: list[str], colors: list[str], log: bool) -> str:
    """Horizontal bars, each labelled with its value, so that no axis is needed. On a log scale they start at 1."""
    start = 1 if log else 0
    with house_style(name):
        figure = Figure(figsize=(WIDTH, 0.3 + ROW_HEIGHT * len(values)), layout="constrained")
        axes = figure.add_subplot(frameon=False)
        places = range(len(values))
        axes.barh(places, [value - start for value in values], left=start, height=0.62, color=colors)
        for place, value, text in zip(places, values, texts, strict=True):
            axes.annotate(text, (value, place), (6, 0), textcoords="offset points", va="center")
        if log:
            axes.set_xscale("log")
        axes.set_xlim(start, max(values) ** 1.3 if log else (max(values) or 1) * 1.3)  # room for the longest bar's text
        axes.set_yticks(places, [short(label) for label in labels])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=10.5)
        axes.xaxis.set_visible(False)
        axes.set_ylim(len(values) - 0.5, -0.5)  # the first on top, and bars equally thick in every report
        return as_svg(figure, name)


def line_axes(x_label: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty figure with integer ticks on its x axis; `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    axes.margins(x=0.02)
    return figure, axes


def series(lines: dict[str, list[tuple[float, float]]], x_label: str) -> tuple[Figure, Axes]:
    """One line of (x, y) points per entry, named in the legend."""
    figure, axes = line_axes(x_label, HEIGHT + 0.2 * ((len(lines) - 1) // 4))
    for index, (name, points) in enumerate(lines.items()):
        if points:
            color, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
            x, y = zip(*points, strict=True)
            axes.plot(x, y, label=short(name), color=color, marker=marker, markersize=3.5, linewidth=1)
    figure.legend(loc="outside lower center", ncols=4, columnspacing=1.2, handletextpad=0.4, handlelength=1.6)
    return figure, axes


def log_if_wide(axes: Axes, values: Sequence[float]) -> bool:
    """Make the y axis logarithmic if the values differ too much for a linear one."""
    if min(values) <= 0 or max(values) / min(values) <= LOG_FROM:
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True


def short(name: str) -> str:
    """A name as a label: on one line, not too long, and without lone surrogates, which font code cannot handle."""
    name = " ".join(name.encode(errors="replace").decode().split())
    return name if len(name) <= 20 else name[:19] + "…"


def as_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element without prologue or metadata, in the page's colours and with ids unique to `name`."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # only the layout uses matplotlib's font; the browser draws the text with its own
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    opening, rest = svg[svg.index("<svg") :].split(">", 1)
    opening = re.sub(r'\s(xmlns(:xlink)?|version|width|height)="[^"]*"', "", opening)  # the style sheet sets the size
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", rest)
    rest = re.sub("|".join(THEME), lambda match: f"var({THEME[match[0]]})", rest)
    return f"{opening}>{rest.strip()}"
