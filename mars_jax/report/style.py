"""Style of the figures and the page: a palette with light and dark values, axes, legends, and figures as SVG text.

matplotlib is imported inside functions, because `import mars_jax.report` must stay cheap.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mars_jax.runtime.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Ranks are ordered, so their colours are one ramp of rising lightness (viridis, safe for colour-blind readers), cut to
# stay legible on each background. Figures are drawn with the light values; the page swaps each for a CSS variable.
LIGHT = {
    "paper": "#ffffff",
    "panel": "#f5f6f7",
    "ink": "#1b1f24",
    "muted": "#59626c",
    "rule": "#d9dde1",
    "pick": "#b8400b",
    "ramp-0": "#440154",
    "ramp-1": "#472a7a",
    "ramp-2": "#3c4f8a",
    "ramp-3": "#2e6f8e",
    "ramp-4": "#228b8d",
    "ramp-5": "#22a884",
    "ramp-6": "#4ec36b",
}
DARK = {
    "paper": "#14171a",
    "panel": "#1c2024",
    "ink": "#e6e8ea",
    "muted": "#9aa3ac",
    "rule": "#353b42",
    "pick": "#ff9457",
    "ramp-0": "#2f6c8e",
    "ramp-1": "#24868e",
    "ramp-2": "#1fa188",
    "ramp-3": "#38b977",
    "ramp-4": "#70cf57",
    "ramp-5": "#b8de29",
    "ramp-6": "#fde725",
}
RAMP = tuple(value for name, value in LIGHT.items() if name.startswith("ramp-"))
DASHES: tuple[tuple[int, tuple[float, ...]], ...] = (
    (0, ()),
    (0, (5, 2)),
    (0, (1.2, 1.6)),
    (0, (6, 2, 1.2, 2)),
    (0, (2.5, 1.5)),
)
WIDTH = 9.2  # inches; the page scales figures to its column


@contextmanager
def figure_style() -> Iterator[None]:
    """Sets the matplotlib settings of all figures; restores the caller's settings on exit."""
    import matplotlib

    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "text.parse_math": False,  # a dollar sign of a name is no formula
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.labelsize": 8.5,
        "axes.facecolor": LIGHT["paper"],
        "figure.facecolor": LIGHT["paper"],
        "axes.edgecolor": LIGHT["muted"],
        "axes.linewidth": 0.7,
        "axes.labelcolor": LIGHT["ink"],
        "axes.titlecolor": LIGHT["ink"],
        "text.color": LIGHT["ink"],
        "xtick.color": LIGHT["muted"],
        "ytick.color": LIGHT["muted"],
        "xtick.labelcolor": LIGHT["muted"],
        "ytick.labelcolor": LIGHT["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LIGHT["rule"],
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.4,
        "lines.markersize": 4.5,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "axes.formatter.useoffset": False,
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(settings):
        yield


def ramp(values: Sequence[float]) -> dict[float, str]:
    """A colour for each distinct value, spread over the ramp in rising order (more than seven share neighbours)."""
    ordered = sorted(set(values))
    last = max(len(ordered) - 1, 1)
    return {value: RAMP[round(i * (len(RAMP) - 1) / last)] for i, value in enumerate(ordered)}


def dashes(values: Sequence[float]) -> dict[float, tuple[int, tuple[float, ...]]]:
    """A dash pattern for each distinct value, in rising order (more than five repeat)."""
    return {value: DASHES[i % len(DASHES)] for i, value in enumerate(sorted(set(values)))}


def rank_handles(
    hue: str,
    colours: Mapping[float, str],
    line: str | None = None,
    patterns: Mapping[float, tuple[int, tuple[float, ...]]] | None = None,
) -> list["Line2D"]:
    """Legend entries of colours (ranks of module `hue`) and, where there is more than one, dashes (of `line`)."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=f"{hue} {short(rank)}") for rank, colour in colours.items()]
    if patterns and len(patterns) > 1:
        handles += [
            Line2D([], [], color=LIGHT["muted"], linestyle=pattern, label=f"{line} {short(rank)}")
            for rank, pattern in patterns.items()
        ]
    return handles


def mark_handle(marker: str, label: str, colour: str = LIGHT["muted"], filled: bool = True) -> "Line2D":
    """Legend entry of a marker without a line."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", marker=marker, color=colour, mfc=colour if filled else "none", label=label)


def plain_log_axis(axes: "Axes", which: str, ticks: Sequence[float]) -> None:
    """Makes an axis (`x` or `y`) logarithmic, with ticks at the values, written as plain numbers."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FixedFormatter([short(tick) for tick in ticks]))
    axis.set_minor_locator(NullLocator())


def round_ticks(low: float, high: float) -> list[float]:
    """Ticks 1, 2, 5 x 10^n in a range of positive numbers; only 1 x 10^n over more than two decades."""
    import math

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low <= 100 else (1,)
    return [step * 10.0**n for n in decades for step in steps if low * 0.999 <= step * 10.0**n <= high * 1.001]


def short(value: float) -> str:
    """Text of a number for a tick or a legend, without exponent or trailing zeros.

    >>> short(0.5), short(64.0), short(12800)
    ('0.5', '64', '12800')
    """
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def to_svg(figure: "Figure", name: str) -> str:
    """Standalone SVG text of a figure: the same bytes for the same figure, text kept as text.

    Args:
        figure: figure drawn inside `figure_style`.
        name: name unique on a page; the prefix of every id, so that figures can share one document.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # Text stays text: the reader's fonts draw it.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = visible(buffer.getvalue())  # XML has no control characters
    text = re.sub(r'\b(id="|href="#)', rf"\1{name}-", text).replace("url(#", f"url(#{name}-")
    return text.replace("'DejaVu Sans'", "system-ui, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif")


def inline_svg(svg: str, description: str) -> str:
    """SVG element of a standalone figure for the page: no XML prolog, a description, colours as CSS variables.

    Its width is a share of the column, so that text has the same size in all figures; narrow screens scroll it.
    """
    from html import escape

    body = svg[svg.index("<svg") :]
    for name, value in LIGHT.items():
        body = body.replace(value, f"var(--{name})")
    points = float(body.split('viewBox="0 0 ', 1)[1].split(" ", 1)[0])
    share = min(1.0, points / (72 * WIDTH))
    style = f"width: {100 * share:.0f}%; min-width: {40 * share:.0f}rem"
    return body.replace("<svg", f'<svg role="img" aria-label="{escape(description)}" style="{style}"', 1)
