"""Trials of `mars compare`: final runs that are trained, scored on the test split and recorded, each once."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mars_jax.adapters.tree import pad
from mars_jax.evals.evaluator import Evaluator
from mars_jax.job import files
from mars_jax.job.job import Job
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.lane import Ranks
from mars_jax.lanes.stopping import AskEach, Patience, StoppingRule, replay
from mars_jax.laws.records import LaneRecord
from mars_jax.runtime.durable import sync_tree
from mars_jax.runtime.jsonfiles import Document, FloatOrNan, append_jsonl, load_jsonl, number_or_nan
from mars_jax.search.finals import adapters_of
from mars_jax.search.lane_trainer import LaneTrainer
from mars_jax.search.trainer import Configuration, Curve

# Beside the name of a trial that didn't run to its end.
_STOPPED = " (stopped)"


@dataclass(frozen=True)
class TrialRecord:
    """A final run of the comparison, a line of compare/trials.jsonl.

    Attributes:
        trial: its configuration's name; with " (stopped)" where a stopping rule ended it.
        ranks: module -> rank.
        factors: module -> factor on its learning rate, where it isn't 1.
        looks: (step, validation loss in nats) of its eval points; None where it had diverged.
        validation_loss: its lowest; None where it diverged or was stopped.
        reason: why it diverged.
        test_losses: summed loss of each test sample, nats.
        test_tokens: supervised tokens of each.
        test_correct: whether each was answered rightly.
        seed: added to the config's for the draw of the adapters.
        sample_losses: `EvalPoint.sample_losses` of each look, where a stopping rule read them.
    """

    trial: str
    ranks: Ranks
    factors: Mapping[str, float]
    looks: Sequence[tuple[int, float | None]]
    validation_loss: float | None = None
    reason: str | None = None
    test_losses: Sequence[FloatOrNan] = field(default_factory=tuple)
    test_tokens: Sequence[float] = field(default_factory=tuple)
    test_correct: Sequence[bool] = field(default_factory=tuple)
    seed: int = 0
    sample_losses: Sequence[Sequence[FloatOrNan]] = field(default_factory=tuple)

    @property
    def is_whole(self) -> bool:
        """Whether no stopping rule ended it."""
        return not self.trial.endswith(_STOPPED)

    @property
    def steps(self) -> int:
        """Steps that it had."""
        return self.looks[-1][0]

    @property
    def curve(self) -> Curve:
        """It as a curve, without adapters."""
        samples = self.sample_losses or [()] * len(self.looks)
        points = tuple(
            EvalPoint(
                step,
                number_or_nan(loss),
                alive=loss is not None,
                reason=None if loss is not None else self.reason,
                sample_losses=tuple(map(number_or_nan, of_look)),
            )
            for (step, loss), of_look in zip(self.looks, samples, strict=True)
        )
        return Curve(Configuration(self.ranks, self.factors, self.seed), points)

    def to_json(self) -> Document:
        """A record of trials.jsonl, of which `load_jsonl` is the inverse."""
        document = asdict(self)
        if not self.is_whole:
            return {name: document[name] for name in ("trial", "ranks", "factors", "looks", "seed", "sample_losses")}
        return document


class TrialTrainer:
    """A trainer that records each final run with its test scores, and runs none of them again."""

    def __init__(self, lanes: LaneTrainer, evaluator: Evaluator) -> None:
        """Trains by `lanes`, whose folder holds the state of trials in progress; scores by `evaluator`."""
        self._lanes = lanes
        self._evaluator = evaluator
        self._job: Job = lanes.job
        self._file: Path = self._job.directory / files.TRIALS

    def records(self) -> dict[str, TrialRecord]:
        """All trials so far, by name; of several of one name the last."""
        return {record.trial: record for record in self._recorded()}

    def _recorded(self) -> list[TrialRecord]:
        return load_jsonl(self._file, self._job.reporter.warn, TrialRecord)

    def probe(self, configurations: Sequence[Ranks], sizes: Sequence[int]) -> list[LaneRecord]:
        """See `Trainer`."""
        return self._lanes.probe(configurations, sizes)

    def train(self, configurations: Sequence[Configuration], stopping: StoppingRule) -> list[Curve]:
        """See `Trainer`. The curves that are returned have no adapters."""
        if not isinstance(stopping, Patience | AskEach):
            return self._raced(configurations, stopping)
        known = self._known(stopping)
        missing = [configuration for configuration in configurations if configuration.name not in known]
        most = self._job.config.probe.lanes_per_program
        widest = self._widest(missing, stopping)
        lanes = replace(self._lanes, padded=widest, together=min(most, len(missing)))
        for start in range(0, len(missing), most):
            group = missing[start : start + most]
            folder = self._lanes.folder / group[0].name
            curves = replace(lanes, folder=folder).train(group, stopping)
            # All at once: those that are missing run in one program, which must be the same after a kill.
            append_jsonl(self._file, *[self._record(curve, widest).to_json() for curve in curves])
            sync_tree(self._file)
            shutil.rmtree(folder)
        known = self._known(stopping)
        curves = [known[configuration.name].curve for configuration in configurations]
        # One may have been trained further, for another strategy.
        seen = replay([curve.points for curve in curves], stopping)
        return [replace(curve, points=tuple(points)) for curve, points in zip(curves, seen, strict=True)]

    def _raced(self, configurations: Sequence[Configuration], stopping: StoppingRule) -> list[Curve]:
        """Final runs under a rule that decides over all of them together; recorded ones serve if all of them do."""
        if (curves := self._replayed(configurations, stopping)) is not None:
            return curves
        widest = {module: max(ranks) for module, ranks in self._job.config.lora.grids.items()}
        folder = self._lanes.folder / f"{configurations[0].name} and {len(configurations) - 1} more"
        trained = replace(self._lanes, folder=folder).train(configurations, stopping)
        append_jsonl(self._file, *[self._record(curve, widest).to_json() for curve in trained])
        sync_tree(self._file)
        shutil.rmtree(folder)
        return [replace(curve, adapters=None) for curve in trained]

    def _replayed(self, configurations: Sequence[Configuration], stopping: StoppingRule) -> list[Curve] | None:
        """Recorded curves as far as a rule lets them run; None where one is not recorded so far, or too coarsely."""
        furthest: dict[str, TrialRecord] = {}
        for record in self._recorded():
            name = record.trial.removesuffix(_STOPPED)
            if _serves(record, stopping) and (name not in furthest or record.steps >= furthest[name].steps):
                furthest[name] = record
        if any(configuration.name not in furthest for configuration in configurations):
            return None
        found = [furthest[configuration.name] for configuration in configurations]
        seen = replay([record.curve.points for record in found], stopping)
        if not all(found[k].is_whole for k in stopping.running(seen)):
            return None
        return [replace(record.curve, points=tuple(points)) for record, points in zip(found, seen, strict=True)]

    def _name(self, curve: Curve) -> str:
        """Name of a curve's record."""
        last = curve.points[-1]
        stopped = last.alive and last.step < self._job.config.finetune.steps
        return curve.configuration.name + (_STOPPED if stopped else "")

    def _known(self, stopping: StoppingRule) -> dict[str, TrialRecord]:
        """Trials that need not be run, by the names of their configurations."""
        records = self.records()
        whole = {name: record for name, record in records.items() if record.is_whole}
        if not isinstance(stopping, AskEach):
            return whole
        return {name.removesuffix(_STOPPED): record for name, record in records.items()} | whole

    def _widest(self, missing: Sequence[Configuration], stopping: StoppingRule) -> dict[str, int]:
        """Ranks that programs are padded to: of runs that come one at a time, the widest that may be asked for."""
        grids = self._job.config.lora.grids
        if isinstance(stopping, AskEach) or not missing:
            return {module: max(ranks) for module, ranks in grids.items()}
        return {module: max(configuration.ranks[module] for configuration in missing) for module in grids}

    def _record(self, curve: Curve, widest: Mapping[str, int]) -> TrialRecord:
        """The record of a run; with the loss and the answer of every test sample, unless it was stopped."""
        looks = [(point.step, point.validation_loss if point.alive else None) for point in curve.points]
        kept = any(point.sample_losses for point in curve.points)
        samples = [point.sample_losses for point in curve.points] if kept else ()
        configuration, name = curve.configuration, self._name(curve)
        if name != configuration.name:
            return TrialRecord(
                name,
                configuration.ranks,
                configuration.factors,
                looks,
                seed=configuration.seed,
                sample_losses=samples,
            )
        # Padded, so that one compiled program scores them all.
        base = self._job.base
        padded = pad(adapters_of(curve), base.targets, widest, base.method)
        outcome = self._evaluator.evaluate({"": {base.method.name: padded}})[""]
        return TrialRecord(
            configuration.name,
            configuration.ranks,
            configuration.factors,
            looks,
            validation_loss=curve.loss if math.isfinite(curve.loss) else None,
            reason=curve.reason,
            test_losses=outcome.losses.tolist(),
            test_tokens=outcome.tokens.tolist(),
            test_correct=outcome.correct.tolist(),
            seed=configuration.seed,
            sample_losses=samples,
        )


def _serves(record: TrialRecord, stopping: StoppingRule) -> bool:
    """Whether a record has what a stopping rule reads, as far as it ran."""
    steps = {step for step, _ in record.looks}
    reached = {step for step in stopping.eval_steps if step <= record.steps}
    return reached <= steps and (bool(record.sample_losses) or not stopping.needs_sample_losses)
