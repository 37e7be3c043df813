"""From the laws to one rank per module: balance, prune, predict, pick; and the local sweep, which has the last word.

Pure functions of a `Laws` and numbers. No lane is run here: for a sweep the caller runs the candidates that it is
given and hands the losses back.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Ranks = Mapping[str, int]
Method = Literal["laws", "paper", "local_sweep", "given"]


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
      parameters: trainable LoRA parameters.
      p_best: share of bootstrap draws in which, of those kept, it is the one with the fewest parameters whose loss is
        within 0.5 % of the smallest (the smallest itself by the paper's method); 0 when not kept.
      probed_loss: validation loss of its probe at the largest D, nats, seeds averaged; None where there was none.
    """

    ranks: Ranks
    convergence_steps: Mapping[str, float]
    imbalance: float | None
    kept: bool
    reason: str
    predicted_loss: float
    predicted_ci: tuple[float, float]
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
      fallback: what went wrong when no candidate was balanced or the balance could not be told, else None.
      method: `laws`, `paper`, `local_sweep` once a sweep has decided, or `given` where the config names the ranks.
      tau: largest imbalance that counts as balanced, in log time; None where the balance is not known.
      candidates: every rank vector of the grid, fewest parameters first.
      explanation: why this pick, in plain words.
    """

    target_num_samples: int
    pick: Ranks
    p_best: float | None
    fallback: str | None
    method: Method
    tau: float | None
    candidates: tuple[Candidate, ...]
    explanation: str

    def to_json(self) -> dict[str, Any]:
        """The document selection.json."""
        document = dataclasses.asdict(self)
        for candidate in document["candidates"]:
            candidate["predicted_ci"] = list(candidate["predicted_ci"])
        document["candidates"] = list(document["candidates"])
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Selection":
        """The inverse of `to_json`."""
        candidates = tuple(
            Candidate(**{**entry, "predicted_ci": tuple(entry["predicted_ci"])}) for entry in document["candidates"]
        )
        return cls(**{**document, "candidates": candidates})


def given(ranks: Ranks, target_num_samples: int) -> Selection:
    """The selection where the config gives every module one rank."""
    return Selection(
        target_num_samples=target_num_samples,
        pick=dict(ranks),
        p_best=None,
        fallback=None,
        method="given",
        tau=None,
        candidates=(),
        explanation="lora.modules gives every module one rank, so these were taken and nothing was searched.",
    )
