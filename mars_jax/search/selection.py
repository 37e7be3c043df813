"""The pick of a search and all that it was picked from: the document selection.json."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from mars_jax.lanes.lane import Ranks
from mars_jax.laws.balance import TOGETHER
from mars_jax.laws.fit import Laws
from mars_jax.laws.law_steps import StepLaw
from mars_jax.runtime.jsonfiles import Document, FloatOrNan


@dataclass(frozen=True)
class Candidate:
    """One rank vector of the grid at the target D.

    Attributes:
        ranks: module -> rank, carried modules included.
        convergence_steps: searched module -> predicted convergence time in steps, where it has a Law-C.
        imbalance: largest minus smallest log convergence time; None where a searched module has no Law-C.
        kept: whether it survived the pruning.
        reason: why it was kept or not.
        predicted_loss: mean of the bootstrap predictions of the validation loss, nats.
        predicted_ci: their 95 % interval.
        parameters: trainable parameters.
        p_best: share of bootstrap draws in which, of those kept, it is the one with the fewest parameters whose loss is
            within 0.5 % of the smallest (the smallest itself by the paper's method); 0 when not kept.
        probed_loss: validation loss of its probe at the largest D, nats, seeds averaged; None where there was none.
    """

    ranks: Ranks
    convergence_steps: Mapping[str, FloatOrNan]
    imbalance: float | None
    kept: bool
    reason: str
    predicted_loss: FloatOrNan
    predicted_ci: tuple[FloatOrNan, FloatOrNan]
    parameters: int
    p_best: float
    probed_loss: float | None = None


@dataclass(frozen=True)
class Selection:
    """The pick, and everything it was picked from.

    Attributes:
        target_num_samples: D of the run that the ranks are for.
        pick: module -> rank.
        p_best: `p_best` of the picked candidate; None where there was nothing to choose from.
        fallback: what went wrong when no candidate was balanced or the balance is not known, else None.
        method: what decided: `laws`, `paper`, `local_sweep` (final runs of the best probes), the name of another
            strategy, or `given` where the config names the ranks.
        tau: largest imbalance that counts as balanced, in log time; None where the balance is not known.
        candidates: every rank vector of the grid, fewest parameters first; empty where the laws took no part.
        explanation: why this pick, in plain words.
        factors: module -> picked factor on its learning rate, for those where it isn't 1.
        seed: added to the config's for the draw of the final run's adapters.
        step_law: Law-P in step sizes of the final runs, where the strategy fitted one.
        convergence_steps: searched module -> convergence time by Law-C of the picked ranks, in steps, at the usual
            learning rates; empty where none was measured beside the pick.
    """

    target_num_samples: int
    pick: Ranks
    p_best: float | None
    fallback: str | None
    method: str
    tau: float | None
    candidates: tuple[Candidate, ...]
    explanation: str
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    step_law: StepLaw | None = None
    convergence_steps: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> Document:
        """The document selection.json, of which `load_json` is the inverse."""
        document = dataclasses.asdict(self)
        for candidate in document["candidates"]:
            candidate["predicted_ci"] = list(candidate["predicted_ci"])
        document["candidates"] = list(document["candidates"])
        return document


def without_laws(
    method: str,
    ranks: Ranks,
    target_num_samples: int,
    explanation: str,
    factors: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Selection:
    """A selection that no law took part in."""
    return Selection(
        target_num_samples=target_num_samples,
        pick=dict(ranks),
        p_best=None,
        fallback=None,
        method=method,
        tau=None,
        candidates=(),
        explanation=explanation,
        factors=dict(factors or {}),
        seed=seed,
    )


def with_convergence(selection: Selection, laws: Laws) -> Selection:
    """A selection with the convergence times of its ranks by Law-C, which took no part in it."""
    steps = {
        module: math.exp(law.log_steps(rank, selection.target_num_samples))
        for module, law in laws.convergence.items()
        if (rank := selection.pick.get(module, 0))
    }
    text = " ".join(f"{selection.explanation} {_balance_text(steps)} {' '.join(laws.untimed.values())}".split())
    return dataclasses.replace(selection, convergence_steps=steps, explanation=text)


def _balance_text(steps: Mapping[str, float]) -> str:
    if not steps:
        return ""
    times = " and ".join(f"{module} takes about {time:,.0f} steps" for module, time in steps.items())
    text = f"By Law-C, at these ranks and the usual learning rates, {times} to converge"
    if len(steps) == 1:
        return f"{text}."
    slowest, fastest = (chosen(steps, key=lambda module: steps[module]) for chosen in (max, min))
    lag = steps[slowest] / steps[fastest]
    return f"{text}: {f'{slowest} lags by a factor {lag:.1f}' if lag > TOGETHER else 'they converge together'}."


def ranks_text(ranks: Ranks) -> str:
    """Ranks as text: "vision 8, llm 4"."""
    return ", ".join(f"{module} {rank}" for module, rank in ranks.items())


def choice_text(ranks: Ranks, factors: Mapping[str, float]) -> str:
    """Ranks and factors as text: "vision 8 at 0.3 times its learning rate, llm 4"."""
    rates = {module: f" at {factor:.3g} times its learning rate" for module, factor in factors.items()}
    return ", ".join(f"{module} {rank}{rates.get(module, '')}" for module, rank in ranks.items())
