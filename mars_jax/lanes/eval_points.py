"""Eval points: what was measured of a lane at one step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mars_jax.runtime.jsonfiles import Document, number_or_nan


@dataclass(frozen=True, slots=True)
class ModuleSwaps:
    """Losses of a lane's best adapters with one module put back to where it was at an eval point, in nats.

    Attributes:
        remaining: module -> how far the loss is above the best eval point's with that module as it was then, and the
            others at the best eval point.
        interaction: what these add up to beyond what the whole lane was above the best eval point; None where nothing
            was measured.
        losses: modules taken from the best eval point, joined by "+" -> loss, so that other measures can be derived.
    """

    remaining: Mapping[str, float] = field(default_factory=dict)
    interaction: float | None = None
    losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EvalPoint:
    """What was measured of one lane at one step.

    Attributes:
        step: optimizer steps done.
        validation_loss: nats a supervised token.
        train_loss: mean since the eval point before, nats a supervised token; None at step 0.
        update_norm: module -> Frobenius norm of its update.
        drift: module -> relative change of its update since half the step; NaN where that was no eval point.
        alive: whether the lane may go on.
        reason: why it may not, else None.
        swaps: losses of module swaps, where a convergence rule needs them.
        sample_losses: of the validation samples, in order, for paired comparisons: a sample's summed loss over the mean
            number of supervised tokens, so that their mean is `validation_loss`. Empty where nothing asked for them.
    """

    step: int
    validation_loss: float
    train_loss: float | None = None
    update_norm: Mapping[str, float] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)
    alive: bool = True
    reason: str | None = None
    swaps: ModuleSwaps | None = None
    sample_losses: tuple[float, ...] = ()

    @property
    def remaining(self) -> Mapping[str, float]:
        """See `ModuleSwaps`; empty where nothing was measured."""
        return self.swaps.remaining if self.swaps else {}

    def to_json(self) -> Document:
        """Keys of a record of curves.jsonl."""
        swaps = self.swaps and {
            "remaining": dict(self.swaps.remaining),
            "interaction": self.swaps.interaction,
            "hybrids": dict(self.swaps.losses),
        }
        return {
            "step": self.step,
            "train_loss": self.train_loss,
            "validation_loss": self.validation_loss,
            "update_norm": dict(self.update_norm),
            "drift": dict(self.drift),
            "alive": self.alive,
            "reason": self.reason,
            **(swaps or {}),
            **({"sample_losses": list(self.sample_losses)} if self.sample_losses else {}),
        }

    @classmethod
    def from_json(cls, document: Document) -> "EvalPoint":
        """The inverse of `to_json`; null, which stands for NaN and infinities, becomes NaN."""
        return cls(
            step=document["step"],
            validation_loss=number_or_nan(document["validation_loss"]),
            train_loss=document["train_loss"],
            update_norm={module: number_or_nan(norm) for module, norm in document["update_norm"].items()},
            drift={module: number_or_nan(drift) for module, drift in document["drift"].items()},
            alive=document["alive"],
            reason=document["reason"],
            swaps=ModuleSwaps(
                {module: number_or_nan(loss) for module, loss in document["remaining"].items()},
                document.get("interaction"),
                {modules: number_or_nan(loss) for modules, loss in document.get("hybrids", {}).items()},
            )
            if "remaining" in document
            else None,
            sample_losses=tuple(map(number_or_nan, document.get("sample_losses", ()))),
        )


Points = Sequence[EvalPoint]
"""Eval points of one lane, in order."""


def best_loss(points: Points, step: int) -> float:
    """The lowest validation loss of a lane up to a step, nats; infinite for one that diverged by then."""
    known = [point for point in points if point.step <= step]
    return min(point.validation_loss for point in known) if known[-1].alive else math.inf
