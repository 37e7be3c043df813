"""Searched modules and the data points of each law, for figures and sentences."""

import numpy as np

from mars_jax.report.collect import Record, RunRecord


def searched_modules(run: RunRecord) -> list[str]:
    """Modules with more than one rank among the candidates."""
    candidates = run.selection.get("candidates") or []
    modules = candidates[0]["ranks"] if candidates else ()
    return [module for module in modules if len({candidate["ranks"][module] for candidate in candidates}) > 1]


def joint_lanes(run: RunRecord) -> list[Record]:
    """Lanes of Law-P: not diverged, with a loss, and adapting every module that some lane adapts."""
    trained = {module for lane in run.lanes for module, rank in lane.get("ranks", {}).items() if rank}
    return [
        lane
        for lane in run.lanes
        if lane.get("status") != "diverged"
        and lane.get("best_loss") is not None
        and all(lane["ranks"].get(module) for module in trained)
    ]


def convergence_points(run: RunRecord, module: str) -> list[tuple[float, float, float, bool]]:
    """(rank, D, t in steps, censored) of every lane with a convergence time of a module."""
    points = []
    for lane in run.lanes:
        steps = lane.get("convergence_steps", {}).get(module)
        censored = bool(lane.get("censored", {}).get(module))
        value = lane.get("steps") if censored else steps
        if lane.get("status") != "diverged" and lane["ranks"].get(module) and value:
            points.append((lane["ranks"][module], lane["num_samples"], value, censored))
    return points


def measured_losses(run: RunRecord) -> dict[tuple[tuple[str, int], ...], float]:
    """Mean best validation loss over seeds of the joint lanes at the largest D, by sorted (module, rank) items."""
    lanes = joint_lanes(run)
    largest = max((lane["num_samples"] for lane in lanes), default=0)
    cells: dict[tuple[tuple[str, int], ...], list[float]] = {}
    for lane in lanes:
        if lane["num_samples"] == largest:
            cells.setdefault(tuple(sorted(lane["ranks"].items())), []).append(lane["best_loss"])
    return {ranks: float(np.mean(losses)) for ranks, losses in cells.items()}
