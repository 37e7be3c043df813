"""Whether what Law-P in step sizes proposes ends lower than as many more runs, from many random beginnings.

Definitions. The first runs of a race are fixed by design, and may be lucky on all tasks alike. Here they are drawn: the
middle configuration and others at random, of those that train both modules. Each drawn set is raced alone, together
with as many more as the law would propose, and with the law's proposals (the strategy laws+race). Excess is as in
`evidence`; means over cells and draws.

figure = excess of five begun and two proposed, as a share of that of seven begun.

    python -m benchmarks.evidence.beginnings
"""

import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.evidence.design import LENGTHS
from benchmarks.evidence.replays import Truth, space_of, truths_of, with_samples
from benchmarks.evidence.table import Cell, read_table
from benchmarks.lib.child import arguments, publish
from mars_jax.lanes.race import PairedRace
from mars_jax.runtime.jsonfiles import Document
from mars_jax.search.recorded_trainer import RecordedTrainer
from mars_jax.search.strategies.laws_race import BEGUN, PROPOSED, propose_and_race
from mars_jax.search.strategies.race import raced_outcome
from mars_jax.search.trainer import Configuration

DRAWS = 20
SIZES = ((BEGUN, 0), (BEGUN, PROPOSED), (BEGUN + PROPOSED, 0))
"""Runs that are begun, and that the law proposes."""


def main() -> None:
    """Replays, and publishes the means."""
    options = arguments(__doc__)
    cells = [cell for cell in read_table() if cell.steps == LENGTHS[0]]
    truths = truths_of(cells)
    draws = 2 if options.short else DRAWS
    rows = [_row(begun, proposed, cells, truths, draws) for begun, proposed in SIZES]
    detail: Document = {"cells": [cell.name for cell in cells], "draws": draws, "tables": {"Beginnings": rows}}
    ratio = rows[1]["excess"] / rows[2]["excess"]
    publish(options, "beginnings", ratio, "excess with proposals over that without", "below 1", detail)


def _row(begun: int, proposed: int, cells: Sequence[Cell], truths: dict[str, Truth], draws: int) -> Document:
    found = [_raced(cell, begun, proposed, draw) for cell in cells for draw in range(draws)]
    excesses = [
        truths[cell.task].excess(cell.seed, loss)
        for cell, (loss, _) in zip([cell for cell in cells for _ in range(draws)], found, strict=True)
    ]
    return {
        "begun": begun,
        "proposed": proposed,
        "runs": statistics.mean(runs for _, runs in found),
        "excess": statistics.mean(excesses),
    }


def _raced(cell: Cell, begun: int, proposed: int, draw: int) -> tuple[float, float]:
    """Final loss of a race from a drawn beginning, and its compute in final runs."""
    space = space_of(cell)
    trainer = RecordedTrainer(with_samples(run.curve) for run in cell.runs)
    curves = trainer.train(_drawn(space.every(), space.middle, begun, draw), PairedRace(space.steps))
    if proposed:
        curves = propose_and_race(curves, space, trainer, proposed)
    final = raced_outcome("race", curves, space).final
    assert final is not None
    return final.loss, sum(curve.steps for curve in trainer.trained) / cell.steps


def _drawn(every: Sequence[Configuration], middle: Configuration, number: int, draw: int) -> list[Configuration]:
    """The middle and others; a larger number adds to a smaller one's."""
    others = [one for one in every if one.name != middle.name]
    order = np.random.default_rng(draw).permutation(len(others))
    return [middle, *(others[place] for place in order[: number - 1])]


if __name__ == "__main__":
    main()
