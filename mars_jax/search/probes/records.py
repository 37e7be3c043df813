"""From the eval points of a lane to its record in probes/lanes.jsonl: convergence times, norms, status, reason.

A module that should have moved and did not is an error here, not a data point.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np

from mars_jax.config.load import Config
from mars_jax.errors import NoValidResultError
from mars_jax.lanes.eval_points import Points
from mars_jax.lanes.inputs import Rates
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.laws.convergence.base import ConvergenceRule, converge
from mars_jax.laws.convergence.registry import RULES
from mars_jax.laws.records import LaneRecord

Times = Mapping[str, tuple[float, bool]]
"""Module -> (convergence time in steps, censored); NaN where undefined."""


def convergence_rule(config: Config) -> ConvergenceRule | None:
    """The rule of a config, if it has one; each has its own default threshold."""
    settings = config.convergence
    if settings.rule is None:
        return None
    return ConvergenceRule(settings.rule, settings.epsilon or RULES[settings.rule].epsilon, settings.sustain)


def lane_records(
    lanes: Sequence[Lane],
    points: Sequence[Points],
    rule: ConvergenceRule | None,
    rates: Rates,
    runs: Sequence[str] | None = None,
) -> list[LaneRecord]:
    """One record a lane.

    Args:
        lanes: K lanes.
        points: eval points of each lane; lanes that stopped early have fewer, at the same steps.
        rule: when a module counts as converged; None: no convergence time is measured.
        rates: module -> learning rate.
        runs: name of the run that each lane was read off; None: each is a run by itself.

    Raises:
        NoValidResultError: an adapted module of a finite lane has update norm 0.
    """
    times = _convergence_times(lanes, points, rule) if rule else [{} for _ in lanes]
    without = "the rule speaks of lanes that adapt one module" if rule else "convergence is not measured"
    return [
        replace(_record(lane, of_lane, lane_times, without, rates), run=run)
        for lane, of_lane, lane_times, run in zip(
            lanes, points, times, runs or [lane.name for lane in lanes], strict=True
        )
    ]


def _convergence_times(lanes: Sequence[Lane], points: Sequence[Points], rule: ConvergenceRule) -> list[Times]:
    """Convergence times of each lane; modules that the rule does not apply to are absent."""
    steps = [point.step for point in max(points, key=len)]
    ends = np.asarray([len(of_lane) for of_lane in points])
    measured = [rule.rule.curves(of_lane, lane.adapted) for lane, of_lane in zip(lanes, points, strict=True)]
    known = {module for of_lane in measured for module in of_lane}
    modules = [module for module in lanes[0].ranks if module in known] or list(lanes[0].ranks)
    curves = np.full((len(lanes), len(modules), len(steps)), np.nan, np.float32)
    for k, of_lane in enumerate(measured):
        for i, module in enumerate(modules):
            curves[k, i, : ends[k]] = of_lane.get(module, np.nan)
    # On the host, because each index into a JAX array is a program to compile.
    found = jax.device_get(converge(rule, np.asarray(steps), curves, ends))
    return [
        {m: (float(found.steps[k, i]), bool(found.censored[k, i])) for i, m in enumerate(modules) if m in lane.adapted}
        if len(lane.adapted) == 1 or not rule.rule.needs_single_module
        else {}
        for k, lane in enumerate(lanes)
    ]


def _record(lane: Lane, points: Points, times: Times, without: str, rates: Rates) -> LaneRecord:
    last = points[-1]
    norms = {module: last.update_norm[module] for module in lane.adapted}
    finite = [point for point in points if point.alive]
    if last.alive:
        still = [module for module, norm in norms.items() if not norm > 0]
        if still:
            raise NoValidResultError(
                f"module {still[0]!r} did not move in lane {lane.name} (update norm {norms[still[0]]} after "
                f"{last.step} steps), so its convergence time is undefined. Check that its targets lie on the path "
                f"from the input to the loss, and its learning rate ({rates[still[0]]})."
            )
        status, reason = ("converged", None) if times else ("horizon", without)
        late = [module for module, (_, censored) in times.items() if censored]
        undefined = [module for module, (steps, _) in times.items() if math.isnan(steps)]
        if late:
            status, reason = "horizon", f"{', '.join(late)} had not converged at step {last.step}"
        elif undefined:
            status, reason = "horizon", f"{', '.join(undefined)} showed nothing to converge to by step {last.step}"
    else:
        status = "diverged"
        reason = last.reason
        # The lane stood still from then on, which a rule takes for convergence.
        times = {module: (math.nan, False) for module in times}
    best = min(finite, key=lambda point: point.validation_loss, default=last)
    drop = points[0].validation_loss - best.validation_loss
    swaps = points[0].swaps
    return LaneRecord(
        lane=lane.name,
        ranks=dict(lane.ranks),
        num_samples=lane.num_samples,
        seed=lane.seed,
        learning_rate=dict(rates),
        adapted=lane.adapted,
        steps=last.step,
        convergence_steps={m: None if math.isnan(steps) else steps for m, (steps, _) in times.items()},
        censored={module: censored for module, (_, censored) in times.items()},
        best_loss=best.validation_loss,
        best_step=best.step,
        update_norm=norms,
        interaction=None if swaps is None or swaps.interaction is None else swaps.interaction / drop,
        status=status,
        reason=reason,
    )


def probed_losses(records: Sequence[LaneRecord], modules: Sequence[str]) -> list[tuple[Ranks, float]]:
    """(ranks, lowest validation loss in nats) of the lanes that adapt all of some modules, at the largest D."""
    joint = [
        r for r in records if set(r.trained) == set(modules) and r.status != "diverged" and r.best_loss is not None
    ]
    largest = max((record.num_samples for record in joint), default=0)
    return [
        ({module: record.ranks[module] for module in modules}, record.best_loss)
        for record in joint
        if record.num_samples == largest and record.best_loss is not None
    ]
