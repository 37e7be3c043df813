"""Figures of the two laws and of the rank grid."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from mars_jax.laws.resamples import central_interval
from mars_jax.report.collect import Record, RunRecord
from mars_jax.report.laws_data import convergence_points, joint_lanes, measured_losses, searched_modules
from mars_jax.report.style import (
    LIGHT,
    WIDTH,
    dashes,
    mark_handle,
    plain_log_axis,
    ramp,
    rank_handles,
    round_ticks,
    short,
)
from mars_jax.report.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

    from mars_jax.laws.law_c import ConvergenceLaw
    from mars_jax.laws.law_p import PerformanceLaw

WHITE, BLACK = "#fefefe", "#0b0d0f"  # text on heat map cells: the same on a light and a dark page


def law_c(run: RunRecord, laws: Mapping[str, "ConvergenceLaw"]) -> "Figure | None":
    """Law-C: convergence time against D, a panel for each module, colour by rank, with fitted lines and 95 % bands."""
    from matplotlib.figure import Figure

    data = {module: points for module in laws if (points := convergence_points(run, module))}
    if not data:
        return None
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, len(data), squeeze=False, sharey=True)[0]
    sizes = sorted({size for points in data.values() for _, size, _, _ in points})
    times = [steps for points in data.values() for _, _, steps, _ in points]
    colours = ramp([rank for points in data.values() for rank, _, _, _ in points])
    line = np.geomspace(sizes[0], sizes[-1], 40)
    for axes, (module, points) in zip(panels, data.items(), strict=True):
        law, ranks = laws[module], np.array(sorted({rank for rank, _, _, _ in points}), np.float64)
        fitted = np.exp([law.log_steps(ranks, size) for size in line])
        times += [fitted.min(), fitted.max()]
        axes.set_title(f"{module}: rank exponent {number(law.gamma, 2)}, data exponent {number(law.delta, 2)}")
        for rank, curve in zip(ranks, fitted.T, strict=True):
            axes.plot(line, curve, color=colours[rank])
        if len(law.draws):
            low, high = central_interval(np.exp([law.log_steps_draws(ranks, size) for size in line]).swapaxes(0, 1))
            for i, rank in enumerate(ranks):
                axes.fill_between(line, low[:, i], high[:, i], color=colours[rank], alpha=0.16, linewidth=0)
        for rank, size, steps, censored in points:
            colour = colours[rank]
            axes.plot(size, steps, "^" if censored else "o", color=colour, mfc="none" if censored else colour)
        plain_log_axis(axes, "x", sizes if len(sizes) <= 7 else round_ticks(sizes[0], sizes[-1]))
        axes.set_xlabel("training samples D")
    bottom, top = min(times) * 0.85, max(times) * 1.15
    plain_log_axis(panels[0], "y", round_ticks(bottom, top))
    panels[0].set_ylim(bottom, top)
    panels[0].set_ylabel("convergence time t (steps)")
    handles = [*rank_handles("rank", colours), mark_handle("o", "lane")]
    if any(censored for points in data.values() for _, _, _, censored in points):
        handles.append(mark_handle("^", "at least this long", filled=False))
    figure.legend(handles=handles, loc="outside upper left", ncols=8)
    return figure


def law_p(run: RunRecord, law: "PerformanceLaw") -> "Figure | None":
    """Law-P: predicted against measured loss (bars: bootstrap interval), and loss against D with the fitted lines."""
    from matplotlib.figure import Figure

    lanes = joint_lanes(run)
    if not lanes:
        return None
    # Colour and dash go to the modules with the most ranks.
    modules = sorted(law.modules, key=lambda module: -len({lane["ranks"][module] for lane in lanes}))
    hue, line = modules[0], modules[1] if len(modules) > 1 else None
    colours = ramp([lane["ranks"][hue] for lane in lanes])
    patterns = dashes([lane["ranks"][line] for lane in lanes] if line else [0])
    target = run.selection.get("target_num_samples")
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _predicted_against_measured(left, law, lanes, [colours[lane["ranks"][hue]] for lane in lanes])

    sizes = sorted({lane["num_samples"] for lane in lanes})
    reach = np.geomspace(sizes[0], max(target or sizes[-1], sizes[-1]), 40)
    designs = _distinct(lane["ranks"] for lane in lanes)
    for ranks, curve in zip(designs, np.array([law.loss(designs, size) for size in reach]).T, strict=True):
        style = patterns[ranks[line] if line else 0]
        right.plot(reach, curve, color=colours[ranks[hue]], linestyle=style, linewidth=1.0)
    for lane in lanes:
        right.plot(lane["num_samples"], lane["best_loss"], "o", color=colours[lane["ranks"][hue]], markersize=3.5)
    if target and target > sizes[-1]:
        right.axvline(target, color=LIGHT["pick"], linewidth=0.9)
        right.annotate(
            "target D",
            (target, 1),
            (-4, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            va="top",
            color=LIGHT["pick"],
        )
    ticks = sorted({*sizes, *([target] if target else [])})
    plain_log_axis(right, "x", ticks if len(ticks) <= 8 else round_ticks(ticks[0], ticks[-1]))
    right.set_xlabel("training samples D")
    right.set_ylabel("validation loss")
    right.set_title("final loss against D")
    figure.legend(handles=rank_handles(hue, colours, line, patterns), loc="outside upper left", ncols=8)
    return figure


def _predicted_against_measured(
    axes: "Axes", law: "PerformanceLaw", lanes: Sequence[Record], colours: Sequence[str]
) -> None:
    ends: list[float] = []
    for lane, colour in zip(lanes, colours, strict=True):
        predicted = law.loss([lane["ranks"]], lane["num_samples"])[0]
        if len(law.draws):
            low, high = central_interval(law.loss_draws([lane["ranks"]], lane["num_samples"])[:, 0])
            axes.plot([lane["best_loss"]] * 2, [low, high], color=colour, linewidth=1.0, alpha=0.6)
        axes.plot(lane["best_loss"], predicted, "o", color=colour)
        ends += [lane["best_loss"], predicted]
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=LIGHT["muted"], linewidth=0.8)
    axes.set_xlabel("measured best validation loss")
    axes.set_ylabel("loss predicted by Law-P")
    axes.set_title("predicted against measured")


def _distinct(all_ranks: Iterator[Mapping[str, int]]) -> list[Mapping[str, int]]:
    return list({tuple(sorted(ranks.items())): ranks for ranks in all_ranks}.values())


def rank_grid(run: RunRecord) -> "Figure | None":
    """Predicted loss over the rank grid: balanced cells outlined, the pick marked, measured losses below.

    With more than two searched modules there is a panel for each pair, with the others at the picked ranks.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    modules, pick = searched_modules(run), run.selection.get("pick") or {}
    candidates = [c for c in run.selection.get("candidates", []) if c.get("predicted_loss") is not None]
    if not modules or not candidates:
        return None
    # Low loss is dark, in one hue, so that the order is clear without a colour key.
    colours = LinearSegmentedColormap.from_list("loss", ["#12406f", "#4f8fc0", "#b9d6ea", "#eef4f9"])
    losses = [candidate["predicted_loss"] for candidate in candidates]
    norm = Normalize(min(losses), max(losses))
    pairs: list[tuple[str, ...]] = [*combinations(modules, 2)] or [(modules[0],)]
    columns = min(3, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(min(WIDTH, 5.2 * columns), (4.0 if columns == 1 else 3.2) * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, pair in zip(panels, pairs, strict=False):
        in_slice = [c for c in candidates if all(c["ranks"][m] == pick.get(m) for m in modules if m not in pair)]
        _heat_map(axes, run, in_slice, pair, colours, norm, detail=len(pairs) == 1)
        if len(modules) > 2:
            others = ", ".join(f"{module} {pick.get(module)}" for module in modules if module not in pair)
            axes.set_title(f"with {others}")
    for axes in panels[len(pairs) :]:
        axes.set_visible(False)
    return figure


def _heat_map(
    axes: "Axes",
    run: RunRecord,
    candidates: Sequence[Record],
    pair: tuple[str, ...],
    colours: "Colormap",
    norm: "Normalize",
    detail: bool,
) -> None:
    """Draws one slice of the grid: x is the last module of `pair`, y the first (or a single row)."""
    from matplotlib.patches import Rectangle

    across, down = pair[-1], pair[0] if len(pair) == 2 else None
    xs = sorted({c["ranks"][across] for c in candidates})
    ys = sorted({c["ranks"][down] for c in candidates}) if down else [0]
    measured = measured_losses(run)
    kept = set()
    for candidate in candidates:
        ranks = candidate["ranks"]
        x, y = xs.index(ranks[across]), ys.index(ranks[down]) if down else 0
        kept |= {(x, y)} if candidate.get("kept") else set()
        shade = colours(norm(candidate["predicted_loss"]))
        text = WHITE if 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.55 else BLACK
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor=LIGHT["paper"], linewidth=0.8))
        loss = measured.get(tuple(sorted(ranks.items()))) if detail else None
        lift = 0.13 if loss is not None else 0.0
        axes.text(x, y + lift, f"{candidate['predicted_loss']:.3f}", ha="center", va="center", color=text, fontsize=8)
        if loss is not None:
            axes.text(x, y - 0.2, f"({loss:.3f})", ha="center", va="center", color=text, fontsize=6.5)
    # The outline of the balanced cells: their edges with no balanced neighbour.
    for x, y in kept:
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            if (x + dx, y + dy) not in kept:
                edge_x = [x + dx / 2] * 2 if dx else [x - 0.5, x + 0.5]
                edge_y = [y + dy / 2] * 2 if dy else [y - 0.5, y + 0.5]
                axes.plot(edge_x, edge_y, color=WHITE, linewidth=4, solid_capstyle="projecting", zorder=3)
                axes.plot(edge_x, edge_y, color=BLACK, linewidth=1.8, solid_capstyle="projecting", zorder=4)
    pick = run.selection.get("pick") or {}
    if pick.get(across) in xs and (down is None or pick.get(down) in ys):
        corner = (xs.index(pick[across]) - 0.44, (ys.index(pick[down]) if down else 0) - 0.44)
        axes.add_patch(Rectangle(corner, 0.88, 0.88, fill=False, edgecolor="#ff7a2f", linewidth=2.6, zorder=5))
    axes.set_xlim(-0.55, len(xs) - 0.45)
    axes.set_ylim(-0.55, len(ys) - 0.45)
    axes.set_xticks(range(len(xs)), [short(x) for x in xs])
    axes.set_yticks(range(len(ys)) if down else [], [short(y) for y in ys] if down else [])
    axes.set_xlabel(f"{across} rank")
    axes.set_ylabel(f"{down} rank" if down else "")
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
