"""Seconds to fit both laws with bootstrap intervals, and whether P(best) means what it says.

Every `mars fit` pays for this. The lanes are made up: convergence times follow a known Law-C and losses a known Law-P,
with log-normal noise. So it can be counted as well whether the pick at a larger data size has the lowest true loss of
the pairs that were kept as often as P(best) states. How often intervals hold the truth is `coverage`'s to measure.

    python -m benchmarks.speed.law_fits [--short] [--anyway] [--out FOLDER]

Definitions. 48 lanes: ranks 4, 8, 16 and 32 of two modules, D = 256, 1024 and 4096, one seed, each a run of its own; 5
% of noise on times, 1 % on losses. Speed is that of `fit_laws` with 1,000 bootstraps, all of it, after a first call
that compiles. P(best) is that of 200 data sets with 200 bootstraps each. `p_best` is the mean P(best) of the picks,
`truly_best` how often the pick has the lowest true loss.

figure = seconds of `fit_laws` with 1,000 bootstraps, median.
"""

import itertools
import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks.evidence.coverage import LOSS_NOISE, TIME_NOISE, Design, true_loss, true_time
from benchmarks.lib.child import arguments, publish
from benchmarks.lib.results import require_quiet
from mars_jax.laws.fit import Laws, fit_laws
from mars_jax.laws.records import LaneRecord
from mars_jax.search.strategies.laws import pick_by_laws

RANKS = (4, 8, 16, 32)
DESIGN = Design({"vision": RANKS, "llm": RANKS}, sizes=(256, 1024, 4096), nested=False)
REPEATS = 5


def main() -> None:
    """Writes results/law_fits.json; about three minutes on two cores."""
    options = arguments(__doc__)
    load = require_quiet(options.anyway)
    simulations = 5 if options.short else 200
    start = time.perf_counter()
    fit_laws(lanes(0), key=jax.random.key(0), num_bootstraps=1000)
    first = time.perf_counter() - start
    seconds = []
    for repeat in range(REPEATS):
        data = lanes(repeat)
        start = time.perf_counter()
        fit_laws(data, key=jax.random.key(0), num_bootstraps=1000)
        seconds.append(time.perf_counter() - start)
    fits = [fit_laws(lanes(seed), key=jax.random.key(seed), num_bootstraps=200) for seed in range(simulations)]
    publish(
        options,
        "law_fits",
        statistics.median(seconds),
        "seconds of 1,000 bootstraps of both laws on 48 lanes",
        "below 1",
        {
            "foreign_cores_busy": load,
            "seconds": seconds,
            "first_call_seconds": first,
            "tables": {"P(best)": [calibration(fits)]},
        },
    )


def lanes(seed: int) -> list[LaneRecord]:
    """Records of joint lanes with planted times and losses."""
    rng = np.random.default_rng(seed)
    found: list[LaneRecord] = []
    for *vector, samples in itertools.product(*DESIGN.grids.values(), DESIGN.sizes):
        ranks = dict(zip(DESIGN.grids, vector, strict=True))
        times = {
            module: true_time(DESIGN, module, rank, samples) * float(np.exp(TIME_NOISE * rng.normal()))
            for module, rank in ranks.items()
        }
        found.append(
            LaneRecord(
                lane=str(len(found)),
                run=str(len(found)),
                ranks=ranks,
                num_samples=samples,
                steps=10_000,
                convergence_steps=times,
                censored=dict.fromkeys(ranks, False),
                best_loss=true_loss(ranks, samples) * float(np.exp(LOSS_NOISE * rng.normal())),
                status="converged",
            )
        )
    return found


def calibration(fits: list[Laws]) -> dict[str, Any]:
    """Whether the pick at D = 16384 is the best of those kept as often as P(best) states."""
    target = 16384
    stated, right = [], []
    for fit in fits:
        selection = pick_by_laws(fit, DESIGN.grids, target, dict.fromkeys(DESIGN.grids, 100))
        kept = [candidate.ranks for candidate in selection.candidates if candidate.kept]
        best = min(kept, key=lambda ranks: true_loss(ranks, target))
        stated += [candidate.p_best for candidate in selection.candidates if candidate.ranks == selection.pick]
        right.append(dict(selection.pick) == dict(best))
    return {"p_best": statistics.mean(stated), "truly_best": statistics.mean(right), "picks": len(fits)}


if __name__ == "__main__":
    main()
