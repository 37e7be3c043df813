"""How often the 95 % intervals of the laws hold the truth, for the designs that probes are planned with.

Data sets are made up: convergence times follow a known Law-C and losses a known Law-P, and runs differ from them by
log-normal errors, 5 % in times and 1 % in losses. With nested sampling, points at several D are read off one run, and
their errors are correlated, 0.8 from a D to the next; with separate sampling every point is a run. Errors of the
modules' times in one run are correlated by a half. Each design is that of `mars plan` for some grids of ranks.

For each data set both laws are fitted with 99 bootstrap resamples. Counted are the 95 % intervals
of Law-C's exponents (gamma, delta), Law-P's (alpha, beta), and predictions of both, times and losses, at every rank of
the grid at the largest D that was probed and at four times as many samples.

A share of 400 data sets has a standard error of 1.1 %, that of predictions at several ranks a smaller one.

figure = the lowest share of all intervals and designs.

    python -m benchmarks.evidence.coverage [--short] [--anyway] [--out FOLDER]
"""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.lib.child import Document, arguments, publish
from mars_jax.laws.fit import Laws, determined, fit_laws
from mars_jax.laws.records import LaneRecord
from mars_jax.laws.resamples import central_interval
from mars_jax.search.probes.design import probed_vectors

CONVERGENCE = {"vision": (20.0, -0.2, 0.5), "projector": (30.0, -0.1, 0.4), "llm": (6.0, -0.35, 0.65)}
ALPHA, BETA, A, E = {"vision": 0.1, "projector": 0.15, "llm": 0.25}, 0.45, 30.0, 0.8
TIME_NOISE, LOSS_NOISE, NEXT_SIZE, MODULES_ALIKE = 0.05, 0.01, 0.8, 0.5
WIDE, FEW = (4, 8, 16, 32, 64), (2, 8, 32)
SIZES = (512, 1024, 2048)
DATA_SETS, RESAMPLES = 400, 99
GOAL = 0.92, 0.97


class Design(NamedTuple):
    """Probes of a run."""

    grids: Mapping[str, Sequence[int]]
    sizes: Sequence[int] = SIZES
    nested: bool = True
    seeds: int = 1
    corners: bool = True
    single_module: bool = False
    offset: float = 0.0
    horizon: float = 1e6


TWO = {"vision": WIDE, "llm": WIDE}
DESIGNS = {
    "13 pairs, 3 D": Design(TWO),
    "13 pairs, 3 D, separate": Design(TWO, nested=False),
    "13 pairs, 3 D, 2 seeds": Design(TWO, seeds=2),
    "13 pairs, 3 D, 2 seeds, separate": Design(TWO, seeds=2, nested=False),
    "13 pairs, 5 D": Design(TWO, sizes=(128, 256, 512, 1024, 2048)),
    "9 pairs (demo), 3 D": Design({"vision": FEW, "llm": FEW}),
    "9 pairs (demo), 3 D, separate": Design({"vision": FEW, "llm": FEW}, nested=False),
    "9 pairs, no corners, 3 D": Design(TWO, corners=False),
    "5 pairs, no corners, 3 D": Design({"vision": FEW, "llm": FEW}, corners=False),
    "5 pairs, no corners, 3 D, separate": Design({"vision": FEW, "llm": FEW}, corners=False, nested=False),
    "21 triples, 3 D": Design({"vision": WIDE, "projector": WIDE, "llm": WIDE}),
    "21 triples, 3 D, separate": Design({"vision": WIDE, "projector": WIDE, "llm": WIDE}, nested=False),
    "5 ranks of one module, 3 D": Design({"llm": WIDE}),
    "13 pairs and single modules, 3 D": Design(TWO, single_module=True),
    "13 pairs, 3 D, times with an offset": Design(TWO, offset=100.0),
    "13 pairs, 3 D, a fifth censored": Design(TWO, horizon=500.0),
}


def main() -> None:
    """Writes results/coverage.json."""
    options = arguments(__doc__)
    rows: list[Document] = []
    data_sets = 5 if options.short else DATA_SETS
    seconds = {}
    for name, design in DESIGNS.items():
        start = time.perf_counter()
        rows += [{"design": name, **row} for row in coverage(design, data_sets)]
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr)
    worst = min(rows, key=lambda row: row["holds"])
    low, high = GOAL
    beyond = [row for row in rows if not low <= row["holds"] <= high]
    publish(
        options,
        "coverage",
        worst["holds"],
        "share of data sets in which a 95 % interval holds the truth, the lowest of all intervals and designs",
        f"at least {low}",
        {
            "data_sets": data_sets,
            "standard_error": (0.95 * 0.05 / data_sets) ** 0.5,
            "seconds": seconds,
            "tables": {
                "Shares of data sets whose 95 % interval holds the truth": [
                    by_design(name, [row for row in rows if row["design"] == name]) for name in DESIGNS
                ],
                f"Intervals outside {low} to {high}": beyond,
            },
            "rows": rows,
        },
    )


def by_design(name: str, rows: Sequence[Document]) -> Document:
    """A row of the page: the lowest and the highest share of each kind of interval."""

    def shares(*kinds: str) -> str:
        found = [row["holds"] for row in rows if row["interval"].startswith(kinds)]
        return f"{min(found):.3f} to {max(found):.3f}" if found else "none"

    return {
        "design": name,
        "gamma": shares("gamma"),
        "delta": shares("delta"),
        "times": shares("t of"),
        "alpha": shares("alpha"),
        "beta": shares("beta"),
        "losses": shares("loss"),
    }


def coverage(design: Design, data_sets: int, first: int = 0, resamples: int = RESAMPLES) -> list[Document]:
    """By interval: the share of data sets whose interval holds the truth, its median width, and how many have none."""
    held: dict[str, list[tuple[bool, float]]] = {}
    for seed in range(first, first + data_sets):
        laws = fit_laws(lanes(design, seed), key=jax.random.key(seed), num_bootstraps=resamples)
        for name, truth, (low, high) in intervals(design, laws):
            held.setdefault(name, []).append((bool(low <= truth <= high), float(high - low)))
    return [
        {
            "interval": name,
            "holds": statistics.mean(inside for inside, _ in found),
            "width": statistics.median(width for _, width in found),
            "data_sets": len(found),
        }
        for name, found in held.items()
    ]


def lanes(design: Design, seed: int) -> list[LaneRecord]:
    """Records of a data set."""
    rng = np.random.default_rng(seed)
    steps_apart = np.abs(np.subtract.outer(range(len(design.sizes)), range(len(design.sizes))))
    root = np.linalg.cholesky(NEXT_SIZE**steps_apart) if design.nested else np.eye(len(design.sizes))
    found = []
    for vector in probed_vectors(design.grids, corners=design.corners, single_module=design.single_module):
        for of_seed in range(design.seeds):
            common, loss_error = rng.normal(size=(2, len(design.sizes)))
            trained = [module for module, rank in vector.items() if rank]
            own = rng.normal(size=(len(trained), len(design.sizes)))
            errors = np.sqrt(MODULES_ALIKE) * common + np.sqrt(1 - MODULES_ALIKE) * own
            for place, size in enumerate(design.sizes):
                times = {
                    module: true_time(design, module, vector[module], size)
                    * float(np.exp(TIME_NOISE * root[place] @ of_module))
                    for module, of_module in zip(trained, errors, strict=True)
                }
                if design.single_module and len(trained) > 1:
                    times = {}
                name = f"{vector}-s{of_seed}"
                found.append(
                    LaneRecord(
                        lane=f"{name}-D{size}",
                        run=name if design.nested else f"{name}-D{size}",
                        ranks=vector,
                        num_samples=size,
                        seed=of_seed,
                        steps=int(min(design.horizon, 1e6)),
                        convergence_steps={m: min(t, design.horizon) for m, t in times.items()},
                        censored={module: t > design.horizon for module, t in times.items()},
                        best_loss=true_loss({m: max(r, 1) for m, r in vector.items()}, size)
                        * float(np.exp(LOSS_NOISE * root[place] @ loss_error)),
                        status="converged",
                    )
                )
    return found


def true_time(design: Design, module: str, rank: int, samples: float) -> float:
    """Steps."""
    k, gamma, delta = CONVERGENCE[module]
    return k * rank**gamma * samples**delta + design.offset


def true_loss(ranks: Mapping[str, int], samples: float) -> float:
    """Nats."""
    return A / float(np.prod([rank ** ALPHA[module] for module, rank in ranks.items()]) * samples**BETA) + E


def intervals(design: Design, laws: Laws) -> list[tuple[str, float, tuple[float, float]]]:
    """(name, truth, 95 % interval) of everything that is counted."""
    found = []
    targets = {"largest D": design.sizes[-1], "4 x largest D": 4 * design.sizes[-1]}
    for module, law in laws.convergence.items():
        _, gamma, delta = CONVERGENCE[module]
        found += [(f"gamma of {module}", gamma, law.ci["gamma"]), (f"delta of {module}", delta, law.ci["delta"])]
        for where, size in targets.items():
            draws = law.log_steps_draws(design.grids[module], size)
            for rank, (low, high) in zip(design.grids[module], np.transpose(central_interval(draws)), strict=True):
                found.append(
                    (f"t of {module}, {where}", float(np.log(true_time(design, module, rank, size))), (low, high))
                )
    power = determined(laws.multiplicative)
    found += [(f"alpha of {module}", ALPHA[module], power.ci[f"alpha/{module}"]) for module in power.modules]
    found.append(("beta", BETA, power.ci["beta"]))
    vectors = probed_vectors(design.grids, corners=design.corners)
    for where, size in targets.items():
        draws = determined(laws.performance).loss_draws(vectors, size)
        for vector, (low, high) in zip(vectors, np.transpose(central_interval(draws)), strict=True):
            found.append((f"loss, {where}", true_loss(vector, size), (low, high)))
    return found


if __name__ == "__main__":
    main()
