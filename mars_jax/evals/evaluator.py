"""Scores a model's adapters on held-out records: losses, likeliest answers, and answers that it writes itself.

The same records are seen under several conditions: as they are, without pictures, with each other's pictures. What is
right is told by `scoring`; what is written down, by `evaluate`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding

from mars_jax.data.batches import Batch, eval_batches
from mars_jax.data.examples import Example, ExampleSource
from mars_jax.data.preprocessor import Preprocessor
from mars_jax.data.records import Record
from mars_jax.data.shapes import plan_shapes
from mars_jax.evals.controls import can_shuffle, image_blind, shuffle_images
from mars_jax.evals.generation import generate
from mars_jax.evals.stats import share
from mars_jax.runtime.sharding import place
from mars_jax.runtime.trees import Tree


@dataclass(frozen=True)
class Outcome:
    """What one condition (a model and a way of showing it pictures) reached.

    Attributes:
        losses: summed -log p of the supervised tokens of each record, nats.
        tokens: supervised tokens of each record.
        choices: index of the likeliest candidate answer of each record; empty where accuracy is not scored.
        correct: whether that is the record's answer.
        answers: what the model says itself, greedily, to each record; empty where it isn't asked to.
    """

    losses: np.ndarray
    tokens: np.ndarray
    choices: np.ndarray
    correct: np.ndarray
    answers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Loss (nats per token), perplexity, accuracy with its Wilson 95 % interval, supervised tokens."""
        loss = float(self.losses.sum() / self.tokens.sum())
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            **(share(self.correct) if self.correct.size else {"accuracy": None, "accuracy_ci": None}),
            "supervised_tokens": int(self.tokens.sum()),
        }


def candidate_answers(records: Sequence[Record], most: int) -> tuple[str, ...]:
    """The answers to choose from: options, and where records have none, their distinct last answers.

    Returns:
        Most frequent first; empty if more than `most`.
    """
    counts: dict[str, int] = {}
    for record in records:
        for answer in record.options or (last_answer(record),):
            counts[answer] = counts.get(answer, 0) + 1
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    return tuple(ordered) if len(ordered) <= most else ()


def last_answer(record: Record) -> str:
    """What the assistant said last: the answer that is scored."""
    return record.turns[-1].text


class _Asked(NamedTuple):
    """The same records as batches [B, ...] for each thing that is measured; None for what isn't."""

    batch: Batch  # with their own answers, for the loss
    answers: Batch | None  # with every candidate in place of the last answer
    prompts: Batch | None  # without it
    valid: int  # rows that are real

    def blind(self) -> "_Asked":
        """Without pictures."""
        return self._replace(
            batch=image_blind(self.batch),
            answers=self.answers and image_blind(self.answers),
            prompts=self.prompts and image_blind(self.prompts),
        )


class Evaluator:
    """Scores adapters on records under several conditions with a compiled program for each thing that is measured."""

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
        max_new_tokens: int | None = None,
        end_tokens: Sequence[int] = (),
    ) -> None:
        """Plans the shapes of every condition.

        Args:
            model: a Linen module whose `apply` returns logits at the supervised positions; one that writes answers has
                the methods of `Multimodal`.
            base: frozen parameters.
            records: held-out records.
            preprocessor: of the checkpoint.
            candidates: the closed set of answers, of which a record with options has those alone; empty to measure
                perplexity only.
            batch_size: B; all candidates follow the record in one sequence.
            controls: whether to measure without pictures and with shuffled ones too.
            seed: of the shuffled pictures.
            rows: how the samples of a batch are split over the devices that the base lies on.
            max_new_tokens: of the answers that the model writes greedily; None to ask for none.
            end_tokens: those that end such an answer.
        """
        if rows is not None:
            parts = rows.num_devices
            batch_size = parts * -(-batch_size // parts)
        self._base, self._preprocessor, self._batch_size = base, preprocessor, batch_size
        self._controls, self._rows, self._asks = controls, rows, max_new_tokens is not None
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
        if max_new_tokens is not None:
            options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "end_tokens": end_tokens}
            self._generate = jax.jit(partial(generate, model, pad_token=tokenizer.pad_token_id, **options))

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
            for asked in self._batches(records):
                for condition in ("", "blind") if view == "" and self._controls else (view,):
                    shown = asked.blind() if condition == "blind" else asked
                    for name, adapters in models.items():
                        key = f"{name}_{condition}" if condition else name
                        parts.setdefault(key, []).append(self._score(adapters, shown))
                advance(asked.valid, view)
        return {key: self._outcome(chunks) for key, chunks in parts.items()}

    @property
    def num_reads(self) -> int:
        """Records that `evaluate` reads, for its progress."""
        return sum(len(records) for records in self._views.values())

    def _score(self, adapters: Tree, asked: _Asked) -> tuple[np.ndarray, ...]:
        """Losses, supervised tokens, losses of candidates [., C] and tokens of answers [., N] of a batch's real rows.

        C and N are 0 for what isn't measured.
        """
        losses = np.asarray(self._losses(self._base, adapters, self._on_devices(asked.batch)))
        scores, said = np.zeros((len(losses), 0)), np.zeros((len(losses), 0), np.int32)
        if asked.answers is not None:
            scores = np.asarray(self._candidate_losses(self._base, adapters, self._on_devices(asked.answers))).T
        if asked.prompts is not None:
            said = np.asarray(self._generate(self._base, adapters, self._on_devices(asked.prompts)))
        part = losses, asked.batch["target_weights"].sum(axis=1), scores, said
        return tuple(array[: asked.valid] for array in part)

    def _on_devices(self, batch: Batch) -> Mapping[str, Any]:
        return place(dict(batch), self._rows) if self._rows else batch

    def _outcome(self, chunks: Sequence[tuple[np.ndarray, ...]]) -> Outcome:
        losses, tokens, scores, said = (np.concatenate(column) for column in zip(*chunks, strict=True))
        # Shuffling pictures keeps the order, the options and the answers of the records.
        records = self._views[""]
        choices, correct = np.zeros(0, np.int64), np.zeros(0, bool)
        if self.candidates:
            allowed = [[not r.options or answer in r.options for answer in self.candidates] for r in records]
            choices = np.where(allowed, scores, np.inf).argmin(axis=1)
            correct = np.asarray([self.candidates[k] == last_answer(r) for k, r in zip(choices, records, strict=True)])
        decode = partial(self._preprocessor.tokenizer.decode, skip_special_tokens=True)
        answers = tuple(str(decode(row)).strip() for row in said) if self._asks else ()
        return Outcome(losses, tokens, choices, correct, answers)

    def _batches(self, records: Sequence[Record]) -> Iterator[_Asked]:
        size = self._batch_size
        source = ExampleSource(records, self._preprocessor, self._shapes)

        def stacked(rows: Iterable[Example]) -> Batch:
            made = list(rows)
            return {name: np.stack([row[name] for row in made]) for name in made[0]}

        for start, (batch, valid) in zip(range(0, len(records), size), eval_batches(source, size), strict=True):
            places = [start + min(row, valid - 1) for row in range(size)]
            answers = stacked(source.with_answers(n, self._answers) for n in places) if self._answers else None
            prompts = stacked(source.prompt(n) for n in places) if self._asks else None
            yield _Asked(batch, answers, prompts, valid)
