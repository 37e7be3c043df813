"""Figures of the loss curves of the probes and of the final run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mars_jax.report.collect import Record, RunRecord
from mars_jax.report.facts import is_pick
from mars_jax.report.style import LIGHT, WIDTH, dashes, mark_handle, ramp, rank_handles, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = {"diverged": "x", "horizon": "^"}


def probe_groups(run: RunRecord) -> list[tuple[str, ...]]:
    """Sets of modules that lanes adapt, the largest first; each has a figure."""
    return sorted({_adapted(lane) for lane in run.lanes}, key=lambda group: (-len(group), group))


def _adapted(lane: Record) -> tuple[str, ...]:
    """Modules that a lane trains, in the order of its ranks."""
    return tuple(module for module in lane["ranks"] if module in lane["adapted"])


def probe_curves(run: RunRecord, group: tuple[str, ...]) -> "Figure | None":
    """Validation loss against steps of the lanes that adapt `group`: a panel for each D, colour and dash by rank.

    Returns:
        The figure, or None where no eval point of such a lane was logged.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves: dict[str, list[Record]] = {}
    for point in run.curves:
        if point.get("validation_loss") is not None:
            curves.setdefault(point["lane"], []).append(point)
    lanes = [lane for lane in run.lanes if _adapted(lane) == group and lane["lane"] in curves]
    if not lanes:
        return None
    hue, line = _two_modules(lanes, group)
    colours = ramp([lane["ranks"][hue] for lane in lanes])
    patterns = dashes([lane["ranks"][line] for lane in lanes] if line else [0])
    sizes = sorted({lane["num_samples"] for lane in lanes})
    columns = len(sizes) if len(sizes) <= 4 else 3 if len(sizes) <= 6 else 4
    rows = -(-len(sizes) // columns)
    # The losses of diverged lanes must not set the scale.
    stable = [lane["lane"] for lane in lanes if lane.get("status") != "diverged"] or [lane["lane"] for lane in lanes]
    all_losses = [point["validation_loss"] for lane in stable for point in curves[lane]]
    margin = 0.06 * ((max(all_losses) - min(all_losses)) or 1.0)
    bottom, top = min(all_losses) - margin, max(all_losses) + margin
    figure = Figure(figsize=(WIDTH, 2.35 * rows + 0.35), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for i, axes in enumerate(panels.ravel()):
        axes.set_visible(i < len(sizes))
        axes.set_ylim(bottom, top)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if i % columns == 0:
            axes.set_ylabel("validation loss")
        if i + columns >= len(sizes):
            axes.set_xlabel("optimizer steps")
    for axes, size in zip(panels.ravel(), sizes, strict=False):
        axes.set_title(f"D = {short(size)}")
        for lane in (lane for lane in lanes if lane["num_samples"] == size):
            points = sorted(curves[lane["lane"]], key=lambda point: point["step"])
            steps, losses = [point["step"] for point in points], [point["validation_loss"] for point in points]
            colour, status = colours[lane["ranks"][hue]], lane.get("status")
            axes.plot(steps, losses, color=colour, linestyle=patterns[lane["ranks"][line] if line else 0])
            # The validation loss of a joint lane depends on all modules, so no point of it is one module's convergence.
            converged = lane["convergence_steps"].get(group[0]) if len(group) == 1 else None
            if converged is not None and not lane["censored"].get(group[0]):
                axes.plot(converged, np.interp(converged, steps, losses), "o", color=colour)
            if status in MARKS:
                axes.plot(
                    steps[-1],
                    min(losses[-1], top),
                    MARKS[status],
                    color=LIGHT["pick"] if status == "diverged" else colour,
                    markerfacecolor="none",
                    clip_on=False,
                    zorder=5,
                )
    statuses = {lane.get("status") for lane in lanes}
    handles = rank_handles(hue, colours, line, patterns)
    if len(group) == 1:
        handles.append(mark_handle("o", "converged"))
    if "horizon" in statuses:
        handles.append(mark_handle("^", "not converged", filled=False))
    if "diverged" in statuses:
        handles.append(mark_handle("x", "diverged", LIGHT["pick"]))
    figure.legend(handles=handles, loc="outside upper left", ncols=8)
    return figure


def _two_modules(lanes: Sequence[Record], group: tuple[str, ...]) -> tuple[str, str | None]:
    """The modules whose ranks are shown as colour and as dash: those with the most probed ranks."""
    ordered = sorted(group, key=lambda module: -len({lane["ranks"][module] for lane in lanes}))
    second = ordered[1] if len(ordered) > 1 and len({lane["ranks"][ordered[1]] for lane in lanes}) > 1 else None
    return ordered[0], second


def finetune_curves(run: RunRecord) -> "Figure | None":
    """Train and validation loss of the final run with its best step, and validation losses of the other final runs."""
    from matplotlib.figure import Figure

    train = _series(run.metrics, "train_loss")
    validation = _series(run.metrics, "validation_loss")
    if not train[0] and not validation[0]:
        return None
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes: Axes = figure.subplots()
    other_curves = [other["looks"] for other in run.sweep.get("runs") or [] if not is_pick(run, other)]
    for i, points in enumerate(other_curves):
        label = "validation of other final runs" if i == 0 else None
        finite = [(step, loss) for step, loss in points if loss is not None]
        axes.plot(*zip(*finite, strict=True), color=LIGHT["ramp-6"], linewidth=0.8, label=label)
    if train[0]:
        axes.plot(*train, color=LIGHT["muted"], linewidth=0.8, label="train")
    if validation[0]:
        axes.plot(*validation, color=LIGHT["ramp-3"], marker=".", label="validation")
    best, loss = run.summary.get("best_step"), run.summary.get("best_validation_loss")
    if best is not None and loss is not None:
        axes.plot([best], [loss], "o", color=LIGHT["pick"], markerfacecolor="none", markersize=8, label="best")
        axes.annotate(
            f"{loss:.3f} at step {short(best)}",
            (best, loss),
            (0, 12),
            textcoords="offset points",
            ha="right" if best > 0.6 * max(train[0] + validation[0]) else "left",
            color=LIGHT["pick"],
        )
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats a token)")
    axes.legend(loc="upper right", ncols=2)
    return figure


def _series(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    points = sorted((record["step"], record[name]) for record in records if record.get(name) is not None)
    return [step for step, _ in points], [value for _, value in points]
