"""Figure of Law-P in step sizes, beside the final runs that it was fitted to."""

from typing import TYPE_CHECKING

import numpy as np

from mars_jax.laws.law_steps import StepLaw
from mars_jax.report.collect import Record, RunRecord
from mars_jax.report.style import LIGHT, WIDTH, mark_handle, plain_log_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOP = 0.6  # losses further above the lowest than this share are drawn at the upper edge


def step_law(run: RunRecord) -> "Figure | None":
    """Share by which final runs were above the lowest against a module's step size, a panel for each module."""
    from matplotlib.figure import Figure

    document = run.selection.get("step_law")
    begun = [one for one in run.sweep.get("runs") or [] if one.get("learning_rate")]
    if not document or not begun:
        return None
    law = StepLaw(**document)
    fitted = [
        (one, share)
        for one in begun
        if all(one["ranks"].get(module) for module in law.modules) and (share := _behind(one, begun)) is not None
    ]
    pick = {module: _pick_step(run, module, begun) for module in law.modules}
    if not fitted:
        return None
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, len(law.modules), squeeze=False, sharey=True)[0]
    last = max(one["looks"][-1][0] for one, _ in fitted)
    for axes, module in zip(panels, law.modules, strict=True):
        steps = [_step(one, module) for one, _ in fitted]
        line = np.geomspace(min(steps), max(steps), 60)
        others = {m: np.full(60, pick[m] or law.unit[m]) for m in law.modules}
        curve = np.expm1(law.log_loss(dict.fromkeys(law.modules, np.ones(60)), others | {module: line}))
        axes.plot(line, np.minimum(curve, _TOP), color=LIGHT["ink"])
        for (one, share), x in zip(fitted, steps, strict=True):
            ended = one["looks"][-1][0] == last
            axes.plot(x, min(share, _TOP), "o", color=LIGHT["ink"], mfc=LIGHT["ink"] if ended else "none")
        if pick[module]:
            axes.axvline(pick[module], color=LIGHT["ink"], linestyle=":", linewidth=1)
        plain_log_axis(axes, "x", sorted(set(steps)) if len(set(steps)) <= 5 else [min(steps), max(steps)])
        axes.set_xlabel(f"{module}: rank times learning rate")
    panels[0].set_ylabel("above the lowest loss (share)")
    handles = [mark_handle("o", "to the end"), mark_handle("o", "stopped", filled=False)]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure


def _behind(one: Record, begun: list[Record]) -> float | None:
    """Share by which a run was above the lowest of all at its last step; None where it diverged."""
    step, loss = one["looks"][-1]
    others = [value for other in begun for at, value in other["looks"] if at == step and value is not None]
    return None if loss is None else float(loss / min(others) - 1.0)


def _step(one: Record, module: str) -> float:
    return float(one["ranks"][module] * one["learning_rate"][module])


def _pick_step(run: RunRecord, module: str, begun: list[Record]) -> float | None:
    """Step size of a module of the pick; None where it stays frozen."""
    rank, factors = run.selection["pick"].get(module, 0), run.selection.get("factors") or {}
    usual = next((one["learning_rate"][module] / one["factors"].get(module, 1.0) for one in begun), None)
    return rank * usual * factors.get(module, 1.0) if rank and usual else None
