"""Scores adapters on held-out records: losses, likeliest candidate answers, and generated answers.

The records are scored under several conditions: as they are, without pictures, and with the pictures of other records.
`summary` judges the answers and makes the documents; `run` writes them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding

from mars_jax.data.batches import Batch, eval_batches
from mars_jax.data.examples import Example, ExampleSource
from mars_jax.data.preprocessor import Preprocessor
from mars_jax.data.records import Record
from mars_jax.data.shapes import answer_end, plan_shapes
from mars_jax.data.template import answer_ids
from mars_jax.evals.controls import can_shuffle, image_blind, shuffle_images
from mars_jax.evals.generation import generate
from mars_jax.evals.stats import share
from mars_jax.runtime.jsonfiles import Document
from mars_jax.runtime.sharding import place
from mars_jax.runtime.trees import Tree


@dataclass(frozen=True)
class Outcome:
    """The scores of one condition: a model, and the pictures it is given.

    Attributes:
        losses: float [n], summed -log p of the supervised tokens of each of n records, nats.
        tokens: [n], number of supervised tokens of each record.
        choices: int [n], index of the likeliest candidate answer of each record; [0] if accuracy is not scored.
        correct: bool [n], whether that is the record's answer; [0] if accuracy is not scored.
        answers: answer generated greedily for each record; empty if none were generated.
    """

    losses: np.ndarray
    tokens: np.ndarray
    choices: np.ndarray
    correct: np.ndarray
    answers: tuple[str, ...] = ()

    def to_json(self) -> Document:
        """Loss (nats per token), perplexity, accuracy with its Wilson 95 % interval, supervised tokens."""
        loss = float(self.losses.sum() / self.tokens.sum())
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            **(share(self.correct) if self.correct.size else {"accuracy": None, "accuracy_ci": None}),
            "supervised_tokens": int(self.tokens.sum()),
        }


def candidate_answers(records: Sequence[Record], most: int) -> tuple[str, ...]:
    """The closed set of answers: the options of records, and the distinct last answers of records without options.

    Args:
        records: the records.
        most: largest allowed number of answers.

    Returns:
        Most frequent first; empty if there are more than `most`.
    """
    counts: dict[str, int] = {}
    for record in records:
        for answer in record.options or (last_answer(record),):
            counts[answer] = counts.get(answer, 0) + 1
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    return tuple(ordered) if len(ordered) <= most else ()


def last_answer(record: Record) -> str:
    """The text of the last turn: the answer that is scored."""
    return record.turns[-1].text


class _Inputs(NamedTuple):
    """The same B records as a batch [B, ...] for each measurement; None for those that are not made."""

    batch: Batch  # with the reference answers, for the loss
    answers: Batch | None  # with every candidate in place of the last answer
    prompts: Batch | None  # without the last answer
    valid: int  # number of rows that hold records

    def blind(self) -> "_Inputs":
        """The same inputs without pictures."""
        return self._replace(
            batch=image_blind(self.batch),
            answers=self.answers and image_blind(self.answers),
            prompts=self.prompts and image_blind(self.prompts),
        )


@dataclass(frozen=True)
class EvaluatorSettings:
    """What an evaluator measures.

    Attributes:
        batch_size: B; all candidates follow the record in one sequence.
        candidates: the closed set of answers, restricted to a record's options if it has any; empty to measure
            perplexity only.
        controls: whether to score also without pictures and with shuffled ones.
        seed: seed of the shuffled pictures.
        max_new_tokens: limit of tokens of a generated answer; None: no answers are generated.
        end_tokens: tokens that end a generated answer, besides the one by which training ends them.
    """

    batch_size: int
    candidates: Sequence[str] = ()
    controls: bool = True
    seed: int = 0
    max_new_tokens: int | None = None
    end_tokens: Sequence[int] = ()


class Evaluator:
    """Scores adapters on records under several conditions, with one compiled program for each measurement."""

    def __init__(
        self,
        model: nn.Module,
        base: Tree,
        records: Sequence[Record],
        preprocessor: Preprocessor,
        settings: EvaluatorSettings,
        rows: NamedSharding | None = None,
    ) -> None:
        """Plans the shapes of every condition.

        Args:
            model: a Linen module whose `apply` returns logits at the supervised positions; to generate answers it needs
                the methods of `Multimodal`.
            base: frozen parameters.
            records: held-out records.
            preprocessor: of the checkpoint.
            settings: what is measured.
            rows: sharding of a batch's rows over the devices of the base.
        """
        batch_size, candidates, controls = settings.batch_size, settings.candidates, settings.controls
        max_new_tokens = settings.max_new_tokens
        if rows is not None:
            parts = rows.num_devices
            batch_size = parts * -(-batch_size // parts)
        self._base, self._preprocessor, self._batch_size = base, preprocessor, batch_size
        self._controls, self._rows, self._generates = controls, rows, max_new_tokens is not None
        # Trained answers end as the template ends them, which neither tokenizer nor checkpoint may know.
        self._ends = (*settings.end_tokens, answer_end(records[0], preprocessor))
        self.candidates = tuple(candidates)
        self._views: dict[str, tuple[Record, ...]] = {"": tuple(records)}
        if controls and can_shuffle(records):
            self._views["shuffled"] = shuffle_images(records, settings.seed)
        # One template puts the same text before all answers, so that any record gives their tokens.
        self._answers = [answer_ids(records[0], answer, preprocessor.chat) for answer in self.candidates]
        everything = [record for view in self._views.values() for record in view]
        self._shapes = plan_shapes(everything, preprocessor).shapes
        # Index of the candidate to which each target of an answer batch belongs; its last target is the end token.
        owners = np.repeat(np.arange(len(self._answers)), [len(answer) + 1 for answer in self._answers])

        def token_losses(base: Tree, adapters: Tree, batch: Mapping[str, jax.Array]) -> jax.Array:
            logits = model.apply({"params": base, **adapters}, batch)
            per_token = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            return per_token * batch["target_weights"]

        def candidate_losses(base: Tree, adapters: Tree, batch: Mapping[str, jax.Array]) -> jax.Array:
            by_target = token_losses(base, adapters, batch).T
            return jax.ops.segment_sum(by_target, owners, num_segments=len(self._answers))

        self._losses = jax.jit(lambda *arguments: token_losses(*arguments).sum(axis=1))
        self._candidate_losses = jax.jit(candidate_losses)
        if max_new_tokens is not None:
            self._generate = jax.jit(
                partial(
                    generate,
                    model,
                    pad_token=preprocessor.pad_token_id,
                    max_new_tokens=max_new_tokens,
                    end_tokens=self._ends,
                )
            )

    def evaluate(
        self, models: Mapping[str, Tree], advance: Callable[[int, str], None] = lambda records, text: None
    ) -> dict[str, Outcome]:
        """Scores every model under every condition; each condition's records are encoded once.

        Args:
            models: name -> adapters by collection, such as {"lora": tree}, all of the same shapes; {} is the base.
            advance: called after each batch with the number of records scored and the name of the pictures' variant.

        Returns:
            "NAME" and, with controls, "NAME_blind" and (if pictures can be shuffled) "NAME_shuffled" -> outcome.
        """
        parts: dict[str, list[tuple[np.ndarray, ...]]] = {}
        for view, records in self._views.items():
            for inputs in self._batches(records):
                for condition in ("", "blind") if view == "" and self._controls else (view,):
                    conditioned = inputs.blind() if condition == "blind" else inputs
                    for name, adapters in models.items():
                        key = f"{name}_{condition}" if condition else name
                        parts.setdefault(key, []).append(self._score(adapters, conditioned))
                advance(inputs.valid, view)
        return {key: self._outcome(chunks) for key, chunks in parts.items()}

    @property
    def num_reads(self) -> int:
        """Number of records that `evaluate` scores for each model, for its progress bar."""
        return sum(len(records) for records in self._views.values())

    def _score(self, adapters: Tree, inputs: _Inputs) -> tuple[np.ndarray, ...]:
        """Losses, supervised tokens, candidate losses [., C] and generated tokens [., N] of a batch's valid rows.

        C or N is 0 if it is not measured.
        """
        losses = np.asarray(self._losses(self._base, adapters, self._on_devices(inputs.batch)))
        scores, generated = np.zeros((len(losses), 0)), np.zeros((len(losses), 0), np.int32)
        if inputs.answers is not None:
            scores = np.asarray(self._candidate_losses(self._base, adapters, self._on_devices(inputs.answers))).T
        if inputs.prompts is not None:
            generated = np.asarray(self._generate(self._base, adapters, self._on_devices(inputs.prompts)))
        part = losses, inputs.batch["target_weights"].sum(axis=1), scores, generated
        return tuple(array[: inputs.valid] for array in part)

    def _on_devices(self, batch: Batch) -> Mapping[str, jax.Array | np.ndarray]:
        return place(dict(batch), self._rows) if self._rows else batch

    def _outcome(self, chunks: Sequence[tuple[np.ndarray, ...]]) -> Outcome:
        losses, tokens, scores, generated = (np.concatenate(column) for column in zip(*chunks, strict=True))
        # Shuffling pictures keeps the order, the options and the answers of the records.
        records = self._views[""]
        choices, correct = np.zeros(0, np.int64), np.zeros(0, bool)
        if self.candidates:
            allowed = [[not r.options or answer in r.options for answer in self.candidates] for r in records]
            choices = np.where(allowed, scores, np.inf).argmin(axis=1)
            correct = np.asarray([self.candidates[k] == last_answer(r) for k, r in zip(choices, records, strict=True)])
        answers = tuple(self._text(row) for row in generated) if self._generates else ()
        return Outcome(losses, tokens, choices, correct, answers)

    def _text(self, tokens: np.ndarray) -> str:
        """The answer that generated tokens stand for, up to its end, which may not be a special token."""
        ended = np.isin(tokens, self._ends)
        kept = tokens[: int(ended.argmax())] if ended.any() else tokens
        return str(self._preprocessor.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    def _batches(self, records: Sequence[Record]) -> Iterator[_Inputs]:
        size = self._batch_size
        source = ExampleSource(records, self._preprocessor, self._shapes)

        def stacked(rows: Iterable[Example]) -> Batch:
            examples = list(rows)
            return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

        for start, (batch, valid) in zip(range(0, len(records), size), eval_batches(source, size), strict=True):
            indices = [start + min(row, valid - 1) for row in range(size)]
            answers = stacked(source.with_answers(n, self._answers) for n in indices) if self._answers else None
            prompts = stacked(source.prompt(n) for n in indices) if self._generates else None
            yield _Inputs(batch, answers, prompts, valid)
