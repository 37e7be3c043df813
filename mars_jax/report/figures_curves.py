"""Loss curves of the probes and of the final fine-tune. Draws what it is given; the choice of words is facts.py's."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mars_jax.report.collect import Record, RunRecord
from mars_jax.report.style import LIGHT, WIDTH, dashes, mark_handle, ramp, rank_handles, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = {"diverged": "x", "horizon": "^"}


def probe_groups(run: RunRecord) -> list[tuple[str, ...]]:
    """The sets of modules that lanes adapt, joint lanes first: each is one figure."""
    return sorted({_adapted(lane) for lane in run.lanes}, key=lambda group: (-len(group), group))


def _adapted(lane: Record) -> tuple[str, ...]:
    """Modules that a lane trains, in the order of its ranks."""
    return tuple(module for module in lane["ranks"] if module in lane["adapted"])


def probe_curves(run: RunRecord, group: tuple[str, ...]) -> "Figure | None":
    """Validation loss against steps of the lanes that adapt `group`: a panel a D, colour and dash by rank.

    Returns:
        None where no look of such a lane was logged.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves: dict[Any, list[Record]] = {}
    for look in run.curves:
        if look.get("validation_loss") is not None:
            curves.setdefault(look["lane"], []).append(look)
    lanes = [lane for lane in run.lanes if _adapted(lane) == group and lane["lane"] in curves]
    if not lanes:
        return None
    hue, line = _two_modules(lanes, group)
    colours = ramp([lane["ranks"][hue] for lane in lanes])
    patterns = dashes([lane["ranks"][line] for lane in lanes] if line else [0])
    sizes = sorted({lane["num_samples"] for lane in lanes})
    columns = len(sizes) if len(sizes) <= 4 else 3 if len(sizes) <= 6 else 4
    rows = -(-len(sizes) // columns)
    # A diverged lane must not squash the others.
    sound = [lane["lane"] for lane in lanes if lane.get("status") != "diverged"] or [lane["lane"] for lane in lanes]
    shown = [look["validation_loss"] for lane in sound for look in curves[lane]]
    margin = 0.06 * ((max(shown) - min(shown)) or 1.0)
    bottom, top = min(shown) - margin, max(shown) + margin
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
            looks = sorted(curves[lane["lane"]], key=lambda look: look["step"])
            steps, losses = [look["step"] for look in looks], [look["validation_loss"] for look in looks]
            colour, status = colours[lane["ranks"][hue]], lane.get("status")
            axes.plot(steps, losses, color=colour, linestyle=patterns[lane["ranks"][line] if line else 0])
            # In a joint lane the validation loss is every module's, so no point of it is one module's convergence.
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
    """The module whose rank is the colour and the one whose rank is the dash: those with the most ranks probed."""
    varied = sorted(group, key=lambda module: -len({lane["ranks"][module] for lane in lanes}))
    second = varied[1] if len(varied) > 1 and len({lane["ranks"][varied[1]] for lane in lanes}) > 1 else None
    return varied[0], second


def finetune_curves(run: RunRecord) -> "Figure | None":
    """Train and validation loss of the final fine-tune, the best step marked, and those that a sweep began with it."""
    from matplotlib.figure import Figure

    train = _series(run.metrics, "train_loss")
    validation = _series(run.metrics, "validation_loss")
    if not train[0] and not validation[0]:
        return None
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes: Axes = figure.subplots()
    others = [one["looks"] for one in run.sweep.get("runs") or [] if one["ranks"] != run.summary.get("ranks")]
    for i, looks in enumerate(others):
        label = "validation of other ranks" if i == 0 else None
        sound = [(step, loss) for step, loss in looks if loss is not None]
        axes.plot(*zip(*sound, strict=True), color=LIGHT["ramp-6"], linewidth=0.8, label=label)
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
