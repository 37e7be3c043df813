"""Measurements on held-out records: perplexity and answer accuracy, with image-blind and shuffled-image controls.

Perplexity is exp(sum of -log p / number of supervised tokens) over the corpus, float32. Accuracy is by log-likelihood:
of the closed set of answers, the one whose tokens (and end token) are likeliest given picture and question. It needs no
parsing, and is not comparable with accuracy of generated text.
"""

import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding

from mars_jax import lora
from mars_jax.data.batches import can_shuffle, eval_batches, image_blind, shuffle_images, subset
from mars_jax.data.examples import ExampleSource, Preprocessor, plan_shapes
from mars_jax.data.records import Record
from mars_jax.jsonfiles import append_jsonl, write_json
from mars_jax.rundir import RunDirectory
from mars_jax.sharding import place, row_sharding
from mars_jax.workspace import Workspace

Tree = Any


@dataclass(frozen=True)
class Outcome:
    """What one condition (a model and a way of showing it pictures) reached.

    Attributes:
        losses: summed -log p of the supervised tokens of each record, nats.
        tokens: supervised tokens of each record.
        choices: index of the likeliest candidate answer of each record; empty where accuracy is not scored.
        correct: whether that is the record's answer.
    """

    losses: np.ndarray
    tokens: np.ndarray
    choices: np.ndarray
    correct: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Loss (nats per token), perplexity, accuracy with its Wilson 95 % interval, supervised tokens."""
        loss = float(self.losses.sum() / self.tokens.sum())
        scored = self.correct.size > 0
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": float(self.correct.mean()) if scored else None,
            "accuracy_ci": list(wilson_interval(int(self.correct.sum()), self.correct.size)) if scored else None,
            "supervised_tokens": int(self.tokens.sum()),
        }


def candidate_answers(records: Sequence[Record], most: int) -> tuple[str, ...]:
    """The distinct last answers of the training records, most frequent first; empty if more than `most`."""
    counts: dict[str, int] = {}
    for record in records:
        counts[_answer(record)] = counts.get(_answer(record), 0) + 1
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    return tuple(ordered) if len(ordered) <= most else ()


def scoring_name(candidates: Sequence[str]) -> str:
    """`letter_loglik` when every candidate is one capital letter, else `string_loglik`."""
    letters = all(answer in string.ascii_uppercase and len(answer) == 1 for answer in candidates)
    return "letter_loglik" if letters else "string_loglik"


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), by default at 95 %."""
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return centre - half, centre + half


class Evaluator:
    """Scores adapters on records under several conditions with two compiled programs."""

    def __init__(
        self,
        model: nn.Module,
        base: Tree,
        records: Sequence[Record],
        preprocessor: Preprocessor,
        *,
        candidates: Sequence[str],
        batch_size: int,
        controls: bool,
        seed: int,
        rows: NamedSharding | None = None,
    ) -> None:
        """Plans the shapes of every condition.

        Args:
            model: a Linen module whose `apply` returns logits at the supervised positions.
            base: frozen parameters.
            records: held-out records.
            preprocessor: of the checkpoint.
            candidates: the closed set of answers; empty to measure perplexity only.
            batch_size: B; all candidates follow the record in one sequence.
            controls: whether to measure without pictures and with shuffled ones too.
            seed: of the shuffled pictures.
            rows: how the samples of a batch are split over the devices that the base lies on.
        """
        if rows is not None:
            parts = rows.num_devices
            batch_size = parts * -(-batch_size // parts)
        self._base, self._preprocessor, self._batch_size = base, preprocessor, batch_size
        self._controls, self._rows = controls, rows
        self.candidates = tuple(candidates)
        self._views: dict[str, tuple[Record, ...]] = {"": tuple(records)}
        if controls and can_shuffle(records):
            self._views["shuffled"] = shuffle_images(records, seed)
        tokenizer = preprocessor.tokenizer
        self._answers = [tokenizer.encode(answer, add_special_tokens=False) for answer in self.candidates]
        everything = [record for view in self._views.values() for record in view]
        self._shapes = plan_shapes(everything, preprocessor, max_tokens=2**31).shapes
        # Of every target of a batch of answers, which answer it belongs to; the end token is each one's last.
        owners = np.repeat(np.arange(len(self._answers)), [len(answer) + 1 for answer in self._answers])

        def token_losses(base: Tree, adapters: Tree, batch: Mapping[str, Any]) -> jax.Array:
            logits = model.apply({"params": base, "lora": adapters}, batch)
            per_token = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            return per_token * batch["target_weights"]

        def candidate_losses(base: Tree, adapters: Tree, batch: Mapping[str, Any]) -> jax.Array:
            by_target = token_losses(base, adapters, batch).T
            return jax.ops.segment_sum(by_target, owners, num_segments=len(self._answers))

        self._losses = jax.jit(lambda *arguments: token_losses(*arguments).sum(axis=1))
        self._candidate_losses = jax.jit(candidate_losses)

    def evaluate(
        self, models: Mapping[str, Tree], advance: Callable[[int, str], None] = lambda records, text: None
    ) -> dict[str, Outcome]:
        """Scores every model under every condition, reading the records once.

        Args:
            models: name -> adapters, all of the same shapes; zero `b` gives the base.
            advance: told of records done.

        Returns:
            "NAME", "NAME_blind" and, where pictures differ, "NAME_shuffled" -> outcome.
        """
        parts: dict[str, list[tuple[np.ndarray, ...]]] = {}
        for view, records in self._views.items():
            for batch, answers, valid in self._batches(records):
                for condition in ("", "blind") if view == "" and self._controls else (view,):
                    shown = image_blind(batch) if condition == "blind" else batch
                    for name, adapters in models.items():
                        key = f"{name}_{condition}" if condition else name
                        part = self._score(adapters, shown, answers and {**answers, "pixels": shown["pixels"]})
                        parts.setdefault(key, []).append(tuple(array[:valid] for array in part))
                advance(valid, view)
        return {key: self._outcome(chunks) for key, chunks in parts.items()}

    @property
    def num_reads(self) -> int:
        """Records that `evaluate` reads, for its progress."""
        return sum(len(records) for records in self._views.values())

    def _score(
        self, adapters: Tree, batch: Mapping[str, Any], answers: Mapping[str, Any] | None
    ) -> tuple[np.ndarray, ...]:
        """Losses, supervised tokens and likeliest candidates of a batch, each [B] (candidates [0] when not scored)."""
        losses = np.asarray(self._losses(self._base, adapters, self._on_devices(batch)))
        choices = np.zeros(0, np.int64)
        if answers is not None:
            scores = self._candidate_losses(self._base, adapters, self._on_devices(answers))
            choices = np.asarray(jnp.argmin(scores, axis=0))
        return losses, batch["target_weights"].sum(axis=1), choices

    def _on_devices(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return place(dict(batch), self._rows) if self._rows else batch

    def _outcome(self, chunks: Sequence[tuple[np.ndarray, ...]]) -> Outcome:
        losses, tokens, choices = (np.concatenate(column) for column in zip(*chunks, strict=True))
        # Shuffling pictures keeps the order and the answers of the records.
        truth = [_answer(record) for record in self._views[""]]
        correct = [self.candidates[k] == answer for k, answer in zip(choices, truth, strict=False)]
        return Outcome(losses, tokens, choices, np.asarray(correct, bool))

    def _batches(self, records: Sequence[Record]) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None, int]]:
        """Batches [B, ...], the same with every candidate answer in place of the last, and the number of real rows."""
        size = self._batch_size
        source = ExampleSource(records, self._preprocessor, self._shapes)
        for start, (batch, valid) in zip(range(0, len(records), size), eval_batches(source, size), strict=True):
            answers = None
            if self._answers:
                rows = [source.with_answers(start + min(row, valid - 1), self._answers) for row in range(size)]
                answers = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            yield batch, answers, valid


def evaluate_run(workspace: Workspace, adapters: Tree, directory: RunDirectory) -> dict[str, Any]:
    """Base and fine-tuned model on the test split; also one line a sample."""
    evaluator, records = held_out_evaluator(workspace, controls=workspace.config.evaluate.controls)
    candidates = evaluator.candidates
    trainable, scales = lora.split_trainable(adapters)
    untrained = lora.join_trainable(jax.tree.map(jnp.zeros_like, trainable), scales)
    with workspace.reporter.progress("evaluate", evaluator.num_reads, "samples") as advance:
        outcomes = evaluator.evaluate({"base": untrained, "finetuned": adapters}, advance)
    document = {
        "split": "test",
        "num_samples": len(records),
        "conditions": {name: outcome.to_json() for name, outcome in outcomes.items()},
        "scoring": scoring_name(candidates) if candidates else None,
        "num_candidates": len(candidates),
    }
    directory.samples_file.unlink(missing_ok=True)
    for i, record in enumerate(records):
        line: dict[str, Any] = {"id": record.id, "prompt": record.turns[-2].text, "target": record.turns[-1].text}
        for name, outcome in outcomes.items():
            response = candidates[outcome.choices[i]] if candidates else None
            line[name] = {"loss": float(outcome.losses[i] / outcome.tokens[i]), "response": response}
        append_jsonl(directory.samples_file, line)
    write_json(directory.evaluation_file, document)
    return document


def held_out_evaluator(workspace: Workspace, *, controls: bool) -> tuple[Evaluator, list[Record]]:
    """The evaluator of the test samples that a config asks for, and those samples."""
    settings = workspace.config.evaluate
    every = workspace.test_records
    # At random: files are often sorted by kind.
    chosen = subset(len(every), min(settings.max_samples or len(every), len(every)), workspace.config.seed)
    records = [every[i] for i in sorted(chosen)]
    candidates = candidate_answers(workspace.search.train, settings.max_candidates)
    if not candidates:
        workspace.reporter.warn(
            f"answers are not scored: the training split has more than {settings.max_candidates} distinct answers "
            f"(evaluate.max_candidates). Perplexity is measured all the same."
        )
    strange = [record.id for record in records if candidates and _answer(record) not in candidates]
    if strange:
        workspace.reporter.warn(
            f"{len(strange)} of {len(records)} test answers are not among the {len(candidates)} of the training split "
            f"and count as wrong: {', '.join(strange[:5])}{', ...' if len(strange) > 5 else ''}"
        )
    evaluator = Evaluator(
        workspace.model,
        workspace.base,
        records,
        workspace.preprocessor,
        candidates=candidates,
        batch_size=settings.batch_size,
        controls=controls,
        seed=workspace.config.seed,
        rows=row_sharding(workspace.mesh),
    )
    return evaluator, records


def _answer(record: Record) -> str:
    return record.turns[-1].text
