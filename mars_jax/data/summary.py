"""Summary of a data set: numbers of samples and pictures, formats, notes, dropped samples, shapes."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import TypedDict

from mars_jax.data.shapes import ShapePlan, Shapes


class Dropped(TypedDict):
    """A dropped sample, and the reason."""

    id: str
    split: str
    reason: str


class DataSummary(TypedDict):
    """Summary of a data set, as written to data.json.

    `train`, `validation` and `test` count the samples of each split, `images` their distinct pictures. `shapes` are the
    fields of `Shapes`. `notes` name what was not read, put right or may surprise. `tokens_per_sample` is the mean
    number of tokens, text and image tokens alike, of the training samples up to their last target.
    """

    train: int
    validation: int
    test: int
    images: dict[str, int]
    formats: list[str]
    notes: list[str]
    dropped: list[Dropped]
    shapes: dict[str, int]
    tokens_per_sample: float


def data_summary(
    plans: Mapping[str, ShapePlan], shapes: Shapes, max_tokens: int | None, notes: Sequence[str]
) -> DataSummary:
    """The contents of data.json, without its part on padding.

    Args:
        plans: shape plans of `train`, `validation` and `test`.
        shapes: static sizes of training and validation batches.
        max_tokens: limit above which samples were dropped, in tokens.
        notes: on the files, by `records.load_records` and whoever encoded them; each is kept once.
    """
    return {
        "train": len(plans["train"].kept),
        "validation": len(plans["validation"].kept),
        "test": len(plans["test"].kept),
        "images": {name: len({d for r in plan.kept for d in r.digests}) for name, plan in plans.items()},
        "formats": sorted({record.format for plan in plans.values() for record in plan.kept}),
        "notes": list(dict.fromkeys([*notes, *_prompt_notes(plans.values())])),
        "dropped": [
            {"id": record.id, "split": name, "reason": f"{length} tokens, more than {max_tokens}"}
            for name, plan in plans.items()
            for record, length in plan.dropped
        ],
        "shapes": asdict(shapes),
        "tokens_per_sample": mean(size.tokens for size in plans["train"].sizes),
    }


def _prompt_notes(plans: Iterable[ShapePlan]) -> Iterator[str]:
    """What is odd about the prompts of a data set, and the conversations that became several samples."""
    plans = tuple(plans)
    remarks = sum((Counter(plan.remarks) for plan in plans), Counter())
    for remark, count in sorted(remarks.items()):
        yield remark.format(count)
    conversations, samples = (sum(numbers) for numbers in zip(*(plan.separated for plan in plans), strict=True))
    if conversations:
        yield (
            f"{conversations} conversations became {samples} samples: the chat template renders an earlier answer "
            "otherwise once later turns follow, so each is trained behind the prompt that asks for it"
        )
