"""Strategy `laws`: balance by Law-C, then the smallest loss predicted by Law-P."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Literal

import numpy as np

from mars_jax.errors import ConfigError, NoValidResultError
from mars_jax.laws.fit import Laws
from mars_jax.search.selection import Candidate, Ranks, Selection
from mars_jax.search.strategies.paper import on_balance_curve

_SMALLEST_TAU = math.log(1.25)
_ONE_SIDED_95 = 1.64
# Losses that differ by less than this share are as good as each other: no probe and no final run tells them apart.
_TIE = 0.005


def select(
    laws: Laws,
    grids: Mapping[str, Sequence[int]],
    num_samples: int,
    *,
    method: Literal["laws", "paper"] = "laws",
    parameters_per_rank: Mapping[str, int],
    constant_parameters: int = 0,
    pivot: str = "llm",
    probed: Sequence[tuple[Ranks, float]] = (),
) -> Selection:
    """Picks ranks from the grid at the target number of samples.

    `laws`: keep the vectors whose searched modules converge within tau of each other, tau being the larger of log 1.25
    and 1.64 bootstrap standard deviations of the log-time difference (half the central 68.3 %, median over the grid),
    and take the one with the fewest parameters whose expected loss is within 0.5 % of the smallest. `paper`: for each
    rank of the pivot keep the one vector that balances it best, and take the smallest loss of the multiplicative Law-P.

    Args:
      laws: fitted laws.
      grids: module -> ranks to choose among; a module with one rank is carried through, not searched.
      num_samples: D of the run that the ranks are for.
      method: `laws` or `paper`.
      parameters_per_rank: module -> trainable parameters of one rank.
      constant_parameters: trainable parameters that do not depend on the ranks.
      pivot: the module whose ranks the paper's method loops over; the last searched one where it is not searched.
      probed: (ranks, validation loss in nats) of the probes at the largest D, for the sweep.

    Returns:
      The selection; `fallback` is set, and the least unbalanced vector picked, when none is balanced. Where a searched
      module has no Law-C, the smallest expected loss of the grid decides, and `fallback` is set if one was tried for.

    Raises:
      ConfigError: the grid, the laws and the parameter counts do not belong together.
      NoValidResultError: the paper's method is asked for, and a searched module has no Law-C.
    """
    searched = _check(laws, grids, num_samples, method, parameters_per_rank)
    vectors = [dict(zip(grids, ranks, strict=True)) for ranks in product(*(sorted(set(g)) for g in grids.values()))]
    sizes = [constant_parameters + sum(r * parameters_per_rank[m] for m, r in v.items()) for v in vectors]
    order = np.argsort(sizes, kind="stable")
    vectors, sizes = [vectors[i] for i in order], [sizes[i] for i in order]

    timed = [module for module in searched if module in laws.convergence]
    balance_known = len(timed) == len(searched)
    columns = {module: [vector[module] for vector in vectors] for module in searched}
    log_times = {module: laws.convergence[module].log_steps(columns[module], num_samples) for module in timed}
    imbalance, tau = None, None
    if balance_known:
        stacked = np.stack(list(log_times.values()))
        imbalance = stacked.max(axis=0) - stacked.min(axis=0)
        tau = _tau(laws, searched, columns, stacked, num_samples)

    law = laws.multiplicative if method == "paper" else laws.performance
    draws = law.loss_draws(vectors, num_samples)
    expected = draws.mean(axis=0)
    if imbalance is None or tau is None:
        reasons = " ".join(laws.untimed.values()) or "The lanes tell no convergence times."
        if method == "paper":
            raise NoValidResultError(f"the paper's method needs Law-C of every searched module. {reasons}")
        kept, score, fallback = np.ones(len(vectors), bool), expected, None
        if laws.untimed:
            fallback = (
                "Whether the modules converge together is not known, so the smallest predicted loss alone decides. "
                + reasons
            )
    elif method == "paper":
        pivot = pivot if pivot in searched else searched[-1]
        kept = on_balance_curve(laws, grids, searched, pivot, num_samples, vectors)
        score, fallback = law.loss(vectors, num_samples), None
    else:
        kept, score, fallback = imbalance <= tau, expected, None
    if imbalance is not None and tau is not None and not kept.any():
        least = int(np.argmin(imbalance))
        kept = np.arange(len(vectors)) == least
        fallback = (
            f"No rank vector of the grid is balanced at D = {num_samples}: even at {ranks_text(vectors[least])} the "
            f"modules converge a factor {math.exp(imbalance[least]):.2f} apart (allowed {math.exp(tau):.2f}). "
            "This one, the least unbalanced, is picked. Widen the rank grid, or probe more lanes to narrow the laws."
        )
    indices = np.flatnonzero(kept)
    tie = 0.0 if method == "paper" else _TIE
    winners = indices[_cheapest(draws[:, indices], tie)]
    p_best = np.bincount(winners, minlength=len(vectors)) / len(draws)
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    measured = [[loss for ranks, loss in probed if ranks == vector] for vector in vectors]
    candidates = tuple(
        Candidate(
            ranks=vectors[i],
            convergence_steps={module: float(np.exp(times[i])) for module, times in log_times.items()},
            imbalance=None if imbalance is None else float(imbalance[i]),
            kept=bool(kept[i]),
            reason=_reason(method, bool(kept[i]), None if imbalance is None else float(imbalance[i]), tau, fallback),
            predicted_loss=float(expected[i]),
            predicted_ci=(float(low[i]), float(high[i])),
            parameters=int(sizes[i]),
            p_best=float(p_best[i]),
            probed_loss=float(np.mean(measured[i])) if measured[i] else None,
        )
        for i in range(len(vectors))
    )
    pick = candidates[int(indices[_cheapest(score[None, indices], tie)][0])]
    explanation = _explain(pick, candidates, tau, num_samples, method, fallback)
    return Selection(num_samples, pick.ranks, pick.p_best, fallback, method, tau, candidates, explanation)


def _cheapest(losses: np.ndarray, tie: float) -> np.ndarray:
    """[S, Q] losses, fewest parameters first -> [S] the first that is within a share `tie` of the row's smallest."""
    return np.argmax(losses <= losses.min(axis=1, keepdims=True) * (1.0 + tie), axis=1)


def _check(
    laws: Laws, grids: Mapping[str, Sequence[int]], num_samples: int, method: str, parameters: Mapping[str, int]
) -> list[str]:
    """Refuses what does not belong together; returns the searched modules."""
    if method not in ("laws", "paper"):
        raise ConfigError(f"selection method is {method!r}; allowed: laws, paper.")
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
    known = list(laws.performance.modules)
    unknown = [module for module in searched if module not in known]
    if unknown or any(module not in grids for module in known):
        raise ConfigError(
            f"the grid searches {', '.join(searched)} and names {', '.join(grids)}, but the laws are of "
            f"{', '.join(known)}. Give the grid the modules that were probed, or probe those of the grid."
        )
    return searched


def _tau(
    laws: Laws, searched: Sequence[str], columns: Mapping[str, Sequence[int]], log_times: np.ndarray, num_samples: float
) -> float:
    """The larger of log 1.25 and 1.64 bootstrap sd of the slowest minus the fastest log time, median over vectors."""
    draws = np.stack([laws.convergence[module].log_steps_draws(columns[module], num_samples) for module in searched])
    vector = np.arange(log_times.shape[1])
    gaps = draws[log_times.argmax(axis=0), :, vector] - draws[log_times.argmin(axis=0), :, vector]
    low, high = np.percentile(gaps, [15.87, 84.13], axis=1)
    return max(_SMALLEST_TAU, _ONE_SIDED_95 * float(np.median((high - low) / 2)))


def _reason(method: str, kept: bool, imbalance: float | None, tau: float | None, fallback: str | None) -> str:
    if imbalance is None or tau is None:
        return "balance not known"
    apart = f"modules converge a factor {math.exp(imbalance):.2f} apart"
    if method == "paper":
        return f"{apart}; {'nearest balance for this rank of the pivot' if kept else 'another rank balances better'}"
    if kept and fallback:
        return f"{apart}; more than {math.exp(tau):.2f}, but the least of the grid"
    return f"{apart}; {'within' if kept else 'more than'} {math.exp(tau):.2f}"


def ranks_text(ranks: Ranks) -> str:
    """Ranks as text: "vision 8, llm 4"."""
    return ", ".join(f"{module} {rank}" for module, rank in ranks.items())


def _explain(
    pick: Candidate,
    candidates: Sequence[Candidate],
    tau: float | None,
    num_samples: int,
    method: str,
    fallback: str | None,
) -> str:
    if fallback:
        return fallback
    balance = ""
    if pick.imbalance is not None and tau is not None:
        steps = ", ".join(f"{module} in {steps:.0f}" for module, steps in pick.convergence_steps.items())
        allowed = f"allowed {math.exp(tau):.2f}" if method == "laws" else "nearest balance"
        balance = (
            f", the modules converge within a factor {math.exp(pick.imbalance):.2f} of each other ({allowed}): "
            f"{steps} steps. Of the {sum(c.kept for c in candidates)} rank vectors kept from {len(candidates)}"
        )
    lowest = "the smallest"
    if method == "laws":
        lowest += f", or within {100 * _TIE:.1f} % of it with the fewest parameters"
    return (
        f"At D = {num_samples} samples, with ranks {ranks_text(pick.ranks)}{balance}, the expected validation loss, "
        f"{pick.predicted_loss:.4f} nats (95 % interval {pick.predicted_ci[0]:.4f} to {pick.predicted_ci[1]:.4f}), is "
        f"{lowest}. It comes out so in {100 * pick.p_best:.0f} % of the bootstrap draws."
    )
