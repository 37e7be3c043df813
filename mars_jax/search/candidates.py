"""Rank vectors of a grid with what the laws predict of them, and the pick among those that a method keeps.

Pure functions of a `Laws` and numbers; no lane is run here. Which vectors are kept, and by which form of Law-P they are
ordered, is the business of the strategies `laws` and `paper`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from mars_jax.errors import ConfigError
from mars_jax.lanes.lane import Ranks
from mars_jax.laws.balance import TOGETHER
from mars_jax.laws.fit import Laws, determined
from mars_jax.laws.resamples import central_interval
from mars_jax.search.selection import Candidate, Selection, ranks_text

_ONE_SIDED_95 = 1.64

ProbedLosses = Sequence[tuple[Ranks, float]]
"""(ranks, lowest validation loss in nats) of the probes at the largest D."""


@dataclass(frozen=True)
class RankGrid:
    """The rank vectors to choose among, with what Law-C says of them.

    Attributes:
        grids: module -> ranks to choose among; a module with one rank is carried through, not searched.
        num_samples: D of the run that the ranks are for.
        searched: modules with two ranks or more.
        vectors: Q rank vectors, fewest parameters first.
        parameters: trainable parameters of each.
        log_times: searched module with a Law-C -> log convergence times [Q].
        imbalance: [Q] largest minus smallest log time; None where a searched module has no Law-C.
        tau: largest imbalance that counts as balanced; None as well.
    """

    grids: Mapping[str, Sequence[int]]
    num_samples: int
    searched: tuple[str, ...]
    vectors: tuple[dict[str, int], ...]
    parameters: tuple[int, ...]
    log_times: Mapping[str, np.ndarray]
    imbalance: np.ndarray | None
    tau: float | None

    def apart(self, place: int) -> str:
        """How far apart the modules of a vector converge, in words."""
        if self.imbalance is None:
            return "balance not known"
        return f"modules converge a factor {math.exp(self.imbalance[place]):.2f} apart"


def rank_grid(
    laws: Laws, grids: Mapping[str, Sequence[int]], num_samples: int, parameters_per_rank: Mapping[str, int]
) -> RankGrid:
    """The rank vectors of a grid at D samples.

    Tau is the larger of log 1.25 and 1.64 bootstrap standard deviations of the log-time difference (half the central
    68.3 %, median over the grid).

    Args:
        laws: fitted laws.
        grids: module -> ranks to choose among.
        num_samples: D of the run that the ranks are for.
        parameters_per_rank: module -> trainable parameters of one rank.

    Raises:
        ConfigError: the grid, the laws and the parameter counts do not belong together.
    """
    searched = _check(laws, grids, num_samples, parameters_per_rank)
    vectors = [dict(zip(grids, ranks, strict=True)) for ranks in product(*(sorted(set(g)) for g in grids.values()))]
    sizes = [sum(rank * parameters_per_rank[module] for module, rank in vector.items()) for vector in vectors]
    order = np.argsort(sizes, kind="stable")
    vectors, sizes = [vectors[i] for i in order], [sizes[i] for i in order]
    timed = [module for module in searched if module in laws.convergence]
    columns = {module: [vector[module] for vector in vectors] for module in searched}
    log_times = {module: laws.convergence[module].log_steps(columns[module], num_samples) for module in timed}
    imbalance, tau = None, None
    if len(timed) == len(searched):
        stacked = np.stack(list(log_times.values()))
        imbalance = stacked.max(axis=0) - stacked.min(axis=0)
        tau = _tau(laws, columns, stacked, num_samples)
    return RankGrid(grids, num_samples, tuple(searched), tuple(vectors), tuple(sizes), log_times, imbalance, tau)


@dataclass(frozen=True)
class Pruning:
    """Which rank vectors a method keeps, and how it orders them.

    Attributes:
        method: its name.
        kept: bool [Q].
        reasons: why each vector is kept or not.
        score: [Q] losses that decide, nats.
        draws: [S, Q] bootstrap predictions of the losses, nats.
        tie: losses within this share of the smallest are as good as it.
        fallback: what went wrong, in words; None if nothing did.
        allowed: the imbalance that was allowed, in words.
        lowest: what the pick's predicted loss is, in words.
    """

    method: str
    kept: np.ndarray
    reasons: Sequence[str]
    score: np.ndarray
    draws: np.ndarray
    tie: float
    fallback: str | None
    allowed: str
    lowest: str


def pick_among(grid: RankGrid, pruning: Pruning, probed: ProbedLosses = ()) -> Selection:
    """The vector with the fewest parameters whose loss ties with the smallest of those kept.

    Args:
        grid: the rank vectors.
        pruning: those kept, and their losses.
        probed: losses of probes, for the record.
    """
    indices = np.flatnonzero(pruning.kept)
    winners = indices[_cheapest(pruning.draws[:, indices], pruning.tie)]
    p_best = np.bincount(winners, minlength=len(grid.vectors)) / len(pruning.draws)
    expected = pruning.draws.mean(axis=0)
    low, high = central_interval(pruning.draws)
    measured = [[loss for ranks, loss in probed if ranks == vector] for vector in grid.vectors]
    candidates = tuple(
        Candidate(
            ranks=vector,
            convergence_steps={module: float(np.exp(times[i])) for module, times in grid.log_times.items()},
            imbalance=None if grid.imbalance is None else float(grid.imbalance[i]),
            kept=bool(pruning.kept[i]),
            reason=pruning.reasons[i],
            predicted_loss=float(expected[i]),
            predicted_ci=(float(low[i]), float(high[i])),
            parameters=int(grid.parameters[i]),
            p_best=float(p_best[i]),
            probed_loss=float(np.mean(measured[i])) if measured[i] else None,
        )
        for i, vector in enumerate(grid.vectors)
    )
    pick = candidates[int(indices[_cheapest(pruning.score[None, indices], pruning.tie)][0])]
    return Selection(
        target_num_samples=grid.num_samples,
        pick=pick.ranks,
        p_best=pick.p_best,
        fallback=pruning.fallback,
        method=pruning.method,
        tau=grid.tau,
        candidates=candidates,
        explanation=pruning.fallback or _explanation(grid, pruning, pick, candidates),
    )


def least_unbalanced(grid: RankGrid, imbalance: np.ndarray, tau: float) -> tuple[np.ndarray, str]:
    """The one vector to keep where none is balanced, bool [Q]; and what to do about it, in words."""
    least = int(np.argmin(imbalance))
    fallback = (
        f"No rank vector of the grid is balanced at D = {grid.num_samples}: even at {ranks_text(grid.vectors[least])} "
        f"the modules converge a factor {math.exp(imbalance[least]):.2f} apart (allowed {math.exp(tau):.2f}). "
        "This one, the least unbalanced, is picked. Widen the rank grid, or probe more lanes to narrow the laws."
    )
    return np.arange(len(grid.vectors)) == least, fallback


def _explanation(grid: RankGrid, pruning: Pruning, pick: Candidate, candidates: Sequence[Candidate]) -> str:
    balance = ""
    if pick.imbalance is not None:
        steps = ", ".join(f"{module} in {steps:.0f}" for module, steps in pick.convergence_steps.items())
        balance = (
            f", the modules converge within a factor {math.exp(pick.imbalance):.2f} of each other ({pruning.allowed}): "
            f"{steps} steps. Of the {sum(c.kept for c in candidates)} rank vectors kept from {len(candidates)}"
        )
    return (
        f"At D = {grid.num_samples} samples, with ranks {ranks_text(pick.ranks)}{balance}, the expected validation "
        f"loss, {pick.predicted_loss:.4f} nats (95 % interval {pick.predicted_ci[0]:.4f} to "
        f"{pick.predicted_ci[1]:.4f}), is {pruning.lowest}. It comes out so in {100 * (pick.p_best or 0):.0f} % of the "
        "bootstrap draws."
    )


def _cheapest(losses: np.ndarray, tie: float) -> np.ndarray:
    """[S, Q] losses, fewest parameters first -> [S] the first that is within a share `tie` of the row's smallest."""
    return np.argmax(losses <= losses.min(axis=1, keepdims=True) * (1.0 + tie), axis=1)


def _check(
    laws: Laws, grids: Mapping[str, Sequence[int]], num_samples: int, parameters: Mapping[str, int]
) -> list[str]:
    """Refuses what does not belong together; returns the searched modules."""
    if num_samples < 1:
        raise ConfigError(f"the target number of samples is {num_samples}; allowed: 1 or more.")
    for module, grid in grids.items():
        if not grid or min(grid) < 1:
            raise ConfigError(f"the rank grid of module {module!r} is {list(grid)}; allowed: one or more ranks >= 1.")
        if module not in parameters:
            raise ConfigError(
                f"parameters_per_rank has no module {module!r}; it has {', '.join(parameters) or 'none'}."
            )
    searched = [module for module, grid in grids.items() if len(set(grid)) > 1]
    if not searched:
        raise ConfigError("every module has one rank in its grid, so there is nothing to select. Give two or more.")
    known = list(determined(laws.performance).modules)
    unknown = [module for module in searched if module not in known]
    if unknown or any(module not in grids for module in known):
        raise ConfigError(
            f"the grid searches {', '.join(searched)} and names {', '.join(grids)}, but the laws are of "
            f"{', '.join(known)}. Give the grid the modules that were probed, or probe those of the grid."
        )
    return searched


def _tau(laws: Laws, columns: Mapping[str, Sequence[int]], log_times: np.ndarray, num_samples: float) -> float:
    """The larger of log 1.25 and 1.64 bootstrap sd of the slowest minus the fastest log time, median over vectors."""
    draws = np.stack(
        [laws.convergence[module].log_steps_draws(ranks, num_samples) for module, ranks in columns.items()]
    )
    vector = np.arange(log_times.shape[1])
    gaps = draws[log_times.argmax(axis=0), :, vector] - draws[log_times.argmin(axis=0), :, vector]
    low, high = np.percentile(gaps, [15.87, 84.13], axis=1)
    return max(math.log(TOGETHER), _ONE_SIDED_95 * float(np.median((high - low) / 2)))
