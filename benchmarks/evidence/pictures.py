"""Draws docs/evidence.svg: excess against compute by strategy, and order of unseen configurations by form of Law-P.

    python -m benchmarks.evidence.pictures [--results FOLDER] [--out FOLDER]

Nothing is measured here. Run it again when results/evidence.json or results/law_forms.json has changed.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.lib.results import RESULTS
from mars_jax.report.style import LIGHT, RAMP, WIDTH, figure_style, mark_handle, plain_log_axis, to_svg
from mars_jax.runtime.jsonfiles import read_json, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[2]
FORMS = (
    "ranks alone, r^-1/2 (the paper's)",
    "s^-1/2",
    "quadratic in log r and log rate",
    "quadratic in log s",
    "s^-0.5 and s^1",
)
"""Of law_forms.json, those that are drawn."""


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the picture")
    options = parser.parse_args()
    found = [read_json(options.results / f"{name}.json")["detail"] for name in ("evidence", "law_forms")]
    write_text(options.out / "evidence.svg", picture(*found))
    print(f"wrote {options.out / 'evidence.svg'}")


def picture(evidence: Mapping[str, Any], forms: Mapping[str, Any]) -> str:
    """SVG text of both panels, from the details of two results."""
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        _strategies(left, evidence)
        _forms(right, forms)
        return to_svg(figure, "evidence")


def _strategies(axes: "Axes", detail: Mapping[str, Any]) -> None:
    rows, handles = detail["tables"]["Strategies"], []
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    colours = [LIGHT["pick"], LIGHT["ink"], *RAMP]
    for name, colour in zip(names, colours, strict=False):
        some = sorted((row["runs"], 100 * row["excess"], row["interval"]) for row in rows if row["strategy"] == name)
        compute, excess, intervals = zip(*some, strict=True)
        axes.plot(compute, excess, "o-", color=colour)
        if name == detail["strategy"]:
            for x, (low, high) in zip(compute, intervals, strict=True):
                axes.plot([x, x], [100 * low, 100 * high], color=colour, linewidth=1)
        handles.append(mark_handle("o", name, colour))
    axes.axhline(0.0, color=LIGHT["muted"], linewidth=0.8, linestyle=(0, (5, 2)))
    plain_log_axis(axes, "x", [1, 2, 4, 8, 16])
    axes.set(
        title="what a search comes to, and what it costs",
        xlabel="compute, final runs",
        ylabel="% above an average run of the best",
    )
    axes.legend(handles=handles, loc="upper right")


def _forms(axes: "Axes", detail: Mapping[str, Any]) -> None:
    rows, handles = detail["tables"]["Order and pick by form"], []
    for name, colour in zip(FORMS, [*RAMP[:4], LIGHT["pick"]], strict=True):
        points = [(row["runs"], row["order"]) for row in rows if row["form"] == name and row["part"] == 0.5]
        axes.plot(*zip(*points, strict=True), "o-", color=colour)
        handles.append(mark_handle("o", name, colour))
    axes.set(
        title="order of configurations that a law has not seen",
        xlabel="runs that it was fitted to, at half of their steps",
        ylabel="Kendall's tau with the end (1: the same order)",
        ylim=(0, 1),
    )
    axes.set_xticks(sorted({row["runs"] for row in rows}))
    axes.legend(handles=handles, loc="upper left")


if __name__ == "__main__":
    main()
