"""From a lane's rows to its record in probes/lanes.jsonl: convergence times by a rule, norms, status, reason.

A module that should have moved and did not is an error here, not a data point.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mars_jax.config.load import Config
from mars_jax.errors import NoValidResultError
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.lanes.result import Row
from mars_jax.laws.convergence.base import ConvergenceRule, RuleName
from mars_jax.laws.convergence.registry import converge


def lane_records(
    lanes: Sequence[Lane],
    rows: Sequence[Sequence[Row]],
    rule: ConvergenceRule | None,
    learning_rates: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One record a lane.

    Args:
        lanes: K lanes.
        rows: by lane, one row a look; lanes that left have fewer, of the same steps.
        rule: `loss_fraction` speaks of lanes that adapt one module, `splice` and `drift` of every adapted module;
            `splice` reads what remained from the rows. None: no convergence time is told.
        learning_rates: module -> learning rate.

    Raises:
        NoValidResultError: an adapted module of a finite lane has update norm 0.
    """
    times = _convergence_times(lanes, rows, rule) if rule else [{} for _ in lanes]
    silence = "the rule speaks of lanes that adapt one module" if rule else "convergence is not measured"
    return [
        _record(lane, lane_rows, lane_times, silence, learning_rates)
        for lane, lane_rows, lane_times in zip(lanes, rows, times, strict=True)
    ]


def _convergence_times(
    lanes: Sequence[Lane], rows: Sequence[Sequence[Row]], rule: ConvergenceRule
) -> list[dict[str, tuple[float, bool]]]:
    """By lane: module -> (steps, censored), NaN where undefined; modules that the rule says nothing of are absent."""
    steps = np.asarray([row["step"] for row in max(rows, key=len)])
    ends = np.asarray([len(lane_rows) for lane_rows in rows])
    if rule.name == "loss_fraction":
        curves = np.full((len(rows), len(steps)), np.nan, np.float32)
        for k, lane_rows in enumerate(rows):
            curves[k, : ends[k]] = [row["validation_loss"] for row in lane_rows]
        # On the host, because each index into a JAX array is a program to compile.
        found = jax.device_get(converge(rule, steps, curves, ends))
        return [
            {lane.adapted[0]: (float(found.steps[k]), bool(found.censored[k]))} if len(lane.adapted) == 1 else {}
            for k, lane in enumerate(lanes)
        ]
    signal = {"splice": "remaining", "drift": "drift"}[rule.name]
    told = {module for lane_rows in rows for row in lane_rows for module in row[signal]}
    modules = [module for module in lanes[0].ranks if module in told] or list(lanes[0].ranks)
    curves = np.full((len(rows), len(modules), len(steps)), np.nan, np.float32)
    for k, lane_rows in enumerate(rows):
        unit = max(min(row["validation_loss"] for row in lane_rows), 1e-9) if rule.name == "splice" else 1.0
        curves[k, :, : ends[k]] = [[row[signal].get(module, np.nan) / unit for row in lane_rows] for module in modules]
    found = jax.device_get(converge(rule, steps, curves, ends))
    return [
        {m: (float(found.steps[k, i]), bool(found.censored[k, i])) for i, m in enumerate(modules) if m in lane.adapted}
        for k, lane in enumerate(lanes)
    ]


def _record(
    lane: Lane,
    rows: Sequence[Row],
    times: Mapping[str, tuple[float, bool]],
    silence: str,
    learning_rates: Mapping[str, float],
) -> dict[str, Any]:
    last = rows[-1]
    norms = {module: last["update_norm"][module] for module in lane.adapted}
    finite = [row for row in rows if row["alive"]]
    if last["alive"]:
        still = [module for module, norm in norms.items() if not norm > 0]
        if still:
            raise NoValidResultError(
                f"module {still[0]!r} did not move in lane {lane.name} (update norm {norms[still[0]]} after "
                f"{last['step']} steps), so its convergence can't be told. Check that its targets lie on the path from "
                f"the input to the loss, and its learning rate ({learning_rates[still[0]]})."
            )
        status, reason = ("converged", None) if times else ("horizon", silence)
        late = [module for module, (_, censored) in times.items() if censored]
        untold = [module for module, (steps, _) in times.items() if math.isnan(steps)]
        if late:
            status, reason = "horizon", f"{', '.join(late)} had not converged at step {last['step']}"
        elif untold:
            status, reason = "horizon", f"{', '.join(untold)} showed nothing to converge to by step {last['step']}"
    else:
        status = "diverged"
        reason = last["reason"]
        # The lane stood still from then on, which a rule takes for convergence.
        times = {module: (math.nan, False) for module in times}
    best = min(finite, key=lambda row: row["validation_loss"], default=last)
    drop = rows[0]["validation_loss"] - best["validation_loss"]
    interaction = rows[0].get("interaction")
    return {
        "lane": lane.name,
        "ranks": dict(lane.ranks),
        "num_samples": lane.num_samples,
        "seed": lane.seed,
        "learning_rate": dict(learning_rates),
        "adapted": lane.adapted,
        "steps": last["step"],
        "convergence_steps": {m: None if math.isnan(steps) else steps for m, (steps, _) in times.items()},
        "censored": {module: censored for module, (_, censored) in times.items()},
        "best_loss": best["validation_loss"],
        "best_step": best["step"],
        "update_norm": norms,
        **({} if interaction is None else {"interaction": interaction / drop}),
        "status": status,
        "reason": reason,
    }


# The threshold of each rule, where the config has none.
EPSILONS: dict[RuleName, float] = {"loss_fraction": 0.1, "splice": 0.1, "drift": 0.3}


def probed_losses(records: Sequence[Mapping[str, Any]], modules: Sequence[str]) -> list[tuple[Ranks, float]]:
    """(ranks, lowest validation loss in nats) of the lanes that adapt all of some modules, at the largest D."""
    joint = [r for r in records if set(r["adapted"]) == set(modules) and r["status"] != "diverged"]
    largest = max((record["num_samples"] for record in joint), default=0)
    return [
        ({module: record["ranks"][module] for module in modules}, record["best_loss"])
        for record in joint
        if record["num_samples"] == largest
    ]


def convergence_rule(config: Config) -> ConvergenceRule | None:
    """The rule of a config, if it has one; each has its own default threshold."""
    settings = config.convergence
    if settings.rule is None:
        return None
    return ConvergenceRule(settings.rule, settings.epsilon or EPSILONS[settings.rule], settings.sustain)
