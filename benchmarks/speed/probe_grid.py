"""Time of a grid of probe runs: PEFT's, one run after the other, over ours.

The grid is every pair of vision and LLM ranks at every data size, on the demo's base and data: what a user would train
to learn how a model responds to its ranks. PEFT trains one run after the other in one process. Ours trains many lanes
in one compiled program, and switches on one saving after the other: a lane on each core; every data size read off one
run (`nested`, the figure); and only the pairs that the laws are fitted to (`cross`, which yields fewer cells). Drawn
adapters, order of the samples, optimizer and eval points are the same on both sides, in float32 on the same cores.

    python -m benchmarks.speed.probe_grid [--short] [--anyway] [--repeats N] [--out FOLDER]

Definitions. Vision ranks x LLM ranks {2, 8, 16, 32} with projector rank 8, each pair at D = 256, 512 and 1024 samples:
48 cells. A cell is a single pass over its D samples in batches of 16, at a constant rate after 10 steps of warm-up,
with 2 eval points on 64 validation samples for each doubling of the step. No lane stops early.

PEFT computes logits at all positions, as users do. Its seconds are those of adding the adapter, of steps and of eval
points; fetching batches and turning them into tensors are recorded apart. Our seconds are all of `run_group`, input
pipeline included. Compiling and first calls are recorded apart, and added in `compile_included`. The variants:
  one_lane  the same 48 cells, a lane at a time, whose products the cores share;
  cores     the same 48 cells, the 16 pairs of a D as one group, a lane on each core at a time;
  nested    the same 48 cells from 16 lanes of the largest D, which are read at every D;
  cross     as nested, but only the pairs of the laws' design (each module's ranks in turn, and the corners), so fewer
            cells: the statistics that the performance law is fitted to, not the same grid. The rule `loss_fraction`
            needs lanes that adapt one module as well; they are not in it.
PEFT could nest and cross as well: `if_peft_saved_too` is the ratio that would be left.

Whether the sides train the same is checked first: the loss of every step of three pairs, to 1e-4 for 100 steps, at a
tenth of the demo's learning rate. At the whole rate two float32 runs part sooner, whatever computes them: the detail
has the step, for ours, and for PEFT against itself with another attention kernel, which differs in rounding alone. It
has the same for validation losses, and the cells whose convergence times (rule `loss_fraction`) lie more than an eval
point apart. FLOPs are the closed form: `minimum` at each lane's ranks (a floor for PEFT, which does more), `executed`
at the padded ranks and with the empty places of blocks.

figure = PEFT's seconds / our seconds of the variant FIGURE, medians, compiling apart.
"""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks.lib.child import publish
from benchmarks.lib.demo_job import Conditions, arguments, rank_vector
from benchmarks.lib.results import spread
from benchmarks.speed.probe_grid_runs import Cell, Form, Grid, OurSide, PeftSide, Round, Variant
from mars_jax.laws.convergence.base import converge
from mars_jax.runtime.compile_cache import CompileCounter
from mars_jax.search.probes.design import planned_lanes
from mars_jax.search.probes.records import convergence_rule

# "nested" has the same 48 cells on both sides, "cross" fewer on ours; "compile_apart" or "compile_included".
FIGURE = ("nested", "compile_apart")
TOLERANCE = 1e-4
GATE_RATE = 0.1

FULL = Form((2, 8, 16, 32), (256, 512, 1024), gate_steps=100, slow_rounds=2)
SHORT = Form((8, 32), (128, 256), gate_steps=16, slow_rounds=1)


def main() -> None:
    """Writes results/probe_grid.json; about thirty-five minutes on two quiet cores."""
    options = arguments(__doc__, repeats=5, short_repeats=1)
    form = SHORT if options.short else FULL
    with Conditions(options.anyway) as conditions:
        grid = Grid(form)
        peft = PeftSide(grid)
        ours = OurSide(grid, peft.tokens, peft.eval_tokens)
        variants = ours.variants()
        first_use = {name: ours.first_use(variants[name]) for name in ("one_lane", "cores")}
        # These run the programs of "cores", so they would compile the same.
        first_use |= dict.fromkeys(("nested", "cross"), first_use["cores"])
        steps_gate = gate_steps(grid, peft, ours, variants["cores"])
        check(steps_gate[GATE_RATE])
        peft.lane(grid.lanes[0], [0, 8])  # warm

        sides: dict[str, list[Round]] = {name: [] for name in ("peft", *variants)}
        cell_seconds: list[dict[Cell, float]] = []
        with CompileCounter() as counter:
            for repeat in range(options.repeats):
                slow = ["one_lane", "cores"] if repeat < form.slow_rounds else []
                for name in ["peft", *slow, "nested", "cross"][:: -1 if repeat % 2 else 1]:
                    if name == "peft":
                        ran, seconds = peft.cells()
                        cell_seconds.append(seconds)
                    else:
                        ran = ours.cells(variants[name])
                    sides[name].append(ran)
                    print(f"round {repeat + 1}, {name}: {ran.seconds.wall:.1f} s", file=sys.stderr)
        rounding = peft.rounding_curves()
        observed = conditions.summary()

    peft_curves = sides["peft"][0].curves
    cells_gate = {name: gate_cells(grid, sides[name][0].curves, peft_curves) for name in variants}
    cells_gate["peft_with_other_rounding"] = gate_cells(grid, rounding, peft_curves)
    ratios = {name: speed(sides["peft"], sides[name], first_use[name]) for name in variants}
    variant, compiling = FIGURE
    cells = {name: len(of_side[0].curves) for name, of_side in sides.items()}
    publish(
        options,
        "probe_grid",
        ratios[variant][compiling],
        f"PEFT's seconds for {cells['peft']} cells / our seconds for "
        + (f"the same {cells[variant]}" if cells[variant] == cells["peft"] else f"{cells[variant]} of them")
        + f" (variant {variant}), {compiling.replace('_', ' ')}",
        "at least 5, aim for 10",
        {
            "repeats": options.repeats,
            "conditions": observed,
            "grid": {
                "ranks": list(form.ranks),
                "pairs": len(grid.lanes),
                "num_samples": list(form.num_samples),
                "steps": {size: grid.steps(size) for size in form.num_samples},
                "looks": grid.eval_steps(form.num_samples[-1]),
                "lane_block": variants["cores"].programs[0].engine.lane_block,
                "programs": [dict(program.bucket.padded_ranks) for program in variants["cores"].programs],
            },
            "cells": cells,
            "same_cells": ratios["nested"],
            "ratios": ratios,
            "if_peft_saved_too": if_peft_saved_too(variants, cell_seconds, sides, form.num_samples[-1]),
            "lanes_of_the_design": {
                "cross": len(variants["cross"].lanes),
                "with the one-module lanes that loss_fraction needs": len(planned_lanes(grid.job.config)),
            },
            "sides": {name: summary(of_side) for name, of_side in sides.items()},
            "first_use": {name: first_use[name] for name in ("one_lane", "cores")},
            "compiles_while_timed": counter.programs,
            "gate": {"tolerance": TOLERANCE, "steps_by_rate_factor": steps_gate, "cells": cells_gate},
            "backend": jax.default_backend(),
        },
    )


def gate_steps(grid: Grid, peft: PeftSide, ours: OurSide, variant: Variant) -> dict[float, dict[str, Any]]:
    """Relative differences of the losses of every step, for the corners and the middle of the diagonal, by rate."""
    steps, ranks = grid.form.gate_steps, grid.form.ranks
    chosen = [rank_vector(rank, rank) for rank in sorted({ranks[0], ranks[len(ranks) // 2], ranks[-1]})]
    lanes = [lane for lane in grid.lanes if lane.ranks in chosen]
    found: dict[float, dict[str, Any]] = {}
    for factor in (GATE_RATE, 1.0):
        our_losses = ours.losses(replace(variant, lanes=frozenset(lane.name for lane in lanes)), steps, factor)
        found[factor] = {}
        for lane in lanes:
            reference, rounded = (
                np.asarray(peft.lane(lane, [0, steps], rate_factor=factor, rounding=rounding).losses)
                for rounding in (False, True)
            )
            found[factor][lane.name] = {
                "ours": apart(our_losses[lane.name], reference),
                "peft_with_other_rounding": apart(rounded, reference),
                "losses_of_peft": {
                    "first": float(reference[0]),
                    "last": float(reference[-1]),
                    "lowest": float(reference.min()),
                },
            }
    return found


def apart(losses: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """How far losses [steps] are from others."""
    differences = np.abs(losses / reference - 1.0)
    beyond = np.flatnonzero(differences > TOLERANCE)
    return {
        "steps": len(losses),
        "largest_relative_difference": float(differences.max()),
        "first_step_beyond_tolerance": int(beyond[0]) + 1 if beyond.size else None,
    }


def gate_cells(grid: Grid, curves: Mapping[Cell, list[float]], reference: Mapping[Cell, list[float]]) -> dict[str, Any]:
    """Validation losses and convergence times of the cells that both have."""
    rule = convergence_rule(grid.job.config)
    assert rule, "the demo's config has a rule"
    largest, censored = 0.0, 0
    disagreements = []
    for size in grid.form.num_samples:
        steps = np.asarray(grid.eval_steps(size))
        names = [lane.name for lane in grid.lanes if (lane.name, size) in curves]
        losses = [np.asarray([side[name, size] for name in names]) for side in (curves, reference)]
        largest = max(largest, float(np.abs(losses[0] / losses[1] - 1.0).max()))
        times, others = (converge(rule, steps, of_side) for of_side in losses)
        censored += int(np.asarray(others.censored).sum())
        for name, *pair in zip(names, np.asarray(times.steps), np.asarray(others.steps), strict=True):
            # NaN, where undefined, sorts behind the last eval point.
            places = np.searchsorted(steps, pair)
            if abs(places[0] - places[1]) > 1 or np.isnan(pair).sum() == 1:
                disagreements.append({"lane": name, "num_samples": size, "steps": [str(time) for time in pair]})
    return {
        "cells": sum(cell in curves for cell in reference),
        "censored_cells": censored,
        "largest_relative_difference_of_validation_losses": largest,
        "disagreements": len(disagreements),
        "convergence_times_more_than_a_look_apart": disagreements,
    }


def check(lanes: Mapping[str, Any]) -> None:
    """Ends the process when the sides don't train the same."""
    if any(lane["ours"]["first_step_beyond_tolerance"] for lane in lanes.values()):
        sys.exit(f"probe_grid: the two sides disagree, so their seconds can't be compared: {lanes}")


def speed(peft: Sequence[Round], ours: Sequence[Round], first_use: Mapping[str, Any]) -> dict[str, float]:
    """PEFT's seconds over ours."""
    theirs, mine = ([ran.seconds for ran in side] for side in (peft, ours))
    wall = [statistics.median(seconds.wall for seconds in side) for side in (theirs, mine)]
    cpu = [statistics.median(seconds.cpu for seconds in side) for side in (theirs, mine)]
    return {
        "compile_apart": wall[0] / wall[1],
        "compile_included": wall[0] / (wall[1] + first_use["wall_seconds"]),
        "compile_apart_of_minima": min(s.wall for s in theirs) / min(s.wall for s in mine),
        "cpu_compile_apart": cpu[0] / cpu[1],
        "cpu_compile_included": cpu[0] / (cpu[1] + first_use["cpu_seconds"]),
    }


def if_peft_saved_too(
    variants: Mapping[str, Variant],
    cell_seconds: Sequence[Mapping[Cell, float]],
    sides: Mapping[str, Sequence[Round]],
    largest: int,
) -> dict[str, float]:
    """Ratios against the runs that PEFT would need if it nested D, and took the design's pairs only, as well."""
    ratios = {}
    for name in ("nested", "cross"):
        theirs = [
            math.fsum(seconds for (lane, size), seconds in of_cells.items() if size == largest and lane in lanes)
            for lanes in [variants[name].lanes]
            for of_cells in cell_seconds
        ]
        ratios[name] = statistics.median(theirs) / statistics.median(ran.seconds.wall for ran in sides[name])
    return ratios


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Seconds of all rounds, and the counts, which are those of any round."""
    return {
        "wall_seconds": spread(ran.seconds.wall for ran in rounds),
        "cpu_seconds": spread(ran.seconds.cpu for ran in rounds),
        **rounds[0].counts,
        **{f"{part}_seconds": spread(ran.parts[part] for ran in rounds) for part in rounds[0].parts},
    }


if __name__ == "__main__":
    main()
