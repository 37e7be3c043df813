"""Draws docs/evidence.svg from results/evidence.json: the grid of each task, and regret against compute.

    python -m benchmarks.evidence.pictures [--results FOLDER] [--out FOLDER]

Nothing is measured here. Run it again when the result has changed.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.lib.results import RESULTS
from mars_jax.report.style import LIGHT, RAMP, WIDTH, figure_style, mark_handle, plain_log_axis, to_svg
from mars_jax.runtime.jsonfiles import read_json, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[2]
# What methods' names match, by colour; the first family that does has it.
FAMILIES = {
    "best probes, swept (the tool)": (r"[\w ]+: best probe, sweep", LIGHT["ink"]),
    "parts of it": (r"[\w ]+: (quadratic|best probe|.*balance alone)", RAMP[3]),
    "laws, nested probes": (r"(half |quarter )?nested: ", LIGHT["pick"]),
    "laws, separate probes": (r"separate: ", RAMP[1]),
    "halving, no probes": (r"successive halving", RAMP[4]),
    "random search": (r"random search", RAMP[0]),
    "TPE and halving": (r"TPE", RAMP[5]),
    "fixed ranks, separate rates": (r"", LIGHT["muted"]),
}


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the picture")
    options = parser.parse_args()
    write_text(options.out / "evidence.svg", picture(read_json(options.results / "evidence.json")))
    print(f"wrote {options.out / 'evidence.svg'}")


def picture(document: Mapping[str, Any]) -> str:
    """Loss over the grid of every task, mean of its seeds and relative to the best; then every method."""
    cells = document["detail"]["cells"]
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, 6.4), layout="constrained")
        upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.25)))
        for axes, task in zip(upper.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            grid_panel(axes, task, [cell["grid"] for cell in cells if cell["task"] == task])
        regret_panel(lower.subplots(), document["detail"]["tables"]["Methods, over the cells that have them"])
        return to_svg(figure, "evidence")


def grid_panel(axes: "Axes", task: str, grids: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Percent above the best pair, mean over seeds."""
    ranks = sorted({run["ranks"]["llm"] for run in grids[0]})
    above = np.zeros((len(ranks), len(ranks)))
    for grid in grids:
        best = min(run["loss"] for run in grid)
        for run in grid:
            place = ranks.index(run["ranks"]["vision"]), ranks.index(run["ranks"]["llm"])
            above[place] += 100 * (run["loss"] / best - 1) / len(grids)
    axes.imshow(above, origin="lower", cmap="viridis_r", vmin=0, vmax=above.max())
    for (i, j), value in np.ndenumerate(above):
        dark = value > 0.55 * above.max()
        axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if dark else "black", fontsize=7.5)
    axes.set(title=f"{task}: % above the best pair", xlabel="LLM rank", ylabel="vision rank")
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.grid(visible=False)


def regret_panel(axes: "Axes", methods: Sequence[Mapping[str, Any]]) -> None:
    """Mean regret of each method against its compute; methods of one family that differ in compute are joined."""
    handles, left = [], list(methods)
    for family, (pattern, colour) in FAMILIES.items():
        some = [method for method in left if re.match(pattern, method["method"])]
        left = [method for method in left if method not in some]
        points = sorted((method["compute, final runs"], 100 * method["mean regret"]) for method in some)
        if not points:
            continue
        line = "-" if family in ("random search", "TPE and halving") else "none"
        axes.plot(*zip(*points, strict=True), linestyle=line, marker="o", color=colour)
        handles.append(mark_handle("o", family, colour))
    axes.axhline(0.5, color=LIGHT["muted"], linewidth=0.8, linestyle=(0, (5, 2)))
    plain_log_axis(axes, "x", [1, 2, 4, 8, 16])
    plain_log_axis(axes, "y", [0.5, 1, 2, 5, 10, 20, 50])
    axes.set(title="mean regret (dashed: 0.5 %)", xlabel="compute, final runs", ylabel="% above the best pair")
    axes.legend(handles=handles, loc=(0.01, 0.12))


if __name__ == "__main__":
    main()
