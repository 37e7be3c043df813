"""Records of finished probe lanes, the lines of probes/lanes.jsonl: the only input of the fits."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from mars_jax.errors import DataError

Document = dict[str, Any]
"""A JSON object."""


@dataclass(frozen=True)
class LaneRecord:
    """Result of a lane, or of a prefix of one.

    Attributes:
        lane: name of the lane, unique within a run.
        ranks: module -> rank, 0 where the module is frozen.
        num_samples: D.
        steps: optimizer steps done.
        convergence_steps: module -> convergence time t in steps, the horizon where censored; None where undefined.
        censored: module -> True where it had not converged at the horizon.
        best_loss: lowest validation loss, in nats a supervised token; None where none was finite.
        status: `converged`, `horizon` or `diverged`.
        reason: why the status is not `converged`; None otherwise.
        seed: random seed of the adapters and of the order of the data.
        learning_rate: module -> learning rate.
        adapted: trained modules; None where the record does not name them.
        best_step: the step of `best_loss`.
        update_norm: module -> Frobenius norm of its update at the last step; None where it wasn't finite.
        interaction: share of the lane's fall in loss that needs all modules together, where module swaps were measured.
        eval_interval: steps between eval points near the convergence times, where they are not log-spaced.
        run: name of the training run that the lane was read off; lanes of one run are not independent. None: not known.
    """

    lane: str
    ranks: Mapping[str, int]
    num_samples: int
    steps: int
    convergence_steps: Mapping[str, float | None]
    censored: Mapping[str, bool]
    best_loss: float | None
    status: str
    reason: str | None = None
    seed: int = 0
    learning_rate: Mapping[str, float] = field(default_factory=dict)
    adapted: Sequence[str] | None = None
    best_step: int | None = None
    update_norm: Mapping[str, float | None] = field(default_factory=dict)
    interaction: float | None = None
    eval_interval: float | None = None
    run: str | None = None

    @property
    def trained(self) -> tuple[str, ...]:
        """Modules with a rank above 0."""
        return tuple(module for module, rank in self.ranks.items() if rank > 0)

    def to_json(self) -> Document:
        """A record of lanes.jsonl."""
        return {
            "lane": self.lane,
            **({} if self.run is None else {"run": self.run}),
            "ranks": dict(self.ranks),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "learning_rate": dict(self.learning_rate),
            "adapted": self.adapted,
            "steps": self.steps,
            "convergence_steps": dict(self.convergence_steps),
            "censored": dict(self.censored),
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "update_norm": dict(self.update_norm),
            **({} if self.interaction is None else {"interaction": self.interaction}),
            **({} if self.eval_interval is None else {"eval_interval": self.eval_interval}),
            "status": self.status,
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, document: Document, number: int = 1) -> "LaneRecord":
        """The inverse of `to_json`; keys that the laws do not need may be absent, other keys are not read.

        Args:
            document: the record.
            number: line number in the file, from 1, for messages.

        Raises:
            DataError: a needed key is missing, or a number of steps or samples is not above 0.
        """
        needed = [one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING]
        missing = [name for name in needed if name not in document]
        if missing:
            raise DataError(
                f"lane record {number} (lane {document.get('lane', '?')}) lacks {', '.join(missing)}; it has "
                f"{', '.join(sorted(document))}. Run the probes again, or correct the record."
            )
        times = [steps for steps in document["convergence_steps"].values() if steps is not None]
        if document["status"] != "diverged" and min([document["num_samples"], document["steps"], *times]) <= 0:
            raise DataError(
                f"lane record {number} (lane {document['lane']}) has num_samples {document['num_samples']}, steps "
                f"{document['steps']} and convergence_steps {document['convergence_steps']}; all must be above 0 (or "
                "null). Run the probes again, or correct the record."
            )
        return cls(**{name: document[name] for name in cls.__dataclass_fields__ if name in document})


def read_records(documents: Sequence[Document]) -> list[LaneRecord]:
    """Lane records of the documents of a lanes.jsonl, in order.

    Raises:
        DataError: see `LaneRecord.from_json`.
    """
    return [LaneRecord.from_json(document, number) for number, document in enumerate(documents, start=1)]
