"""What a data set turned out to be, as a document: numbers of samples and pictures, formats, what was left out, shapes.

It only tells; what is read and dropped is decided in `records` and `examples`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from statistics import mean
from typing import Any

from mars_jax.data.shapes import ShapePlan, Shapes


def data_summary(plans: Mapping[str, ShapePlan], shapes: Shapes, max_tokens: int | None) -> dict[str, Any]:
    """The document of data.json but for what the batches are.

    `tokens_per_sample`, text and image tokens alike, is the mean of the training samples up to their last target.

    Args:
        plans: of the splits by name.
        shapes: of training and validation batches.
        max_tokens: the limit that samples were dropped by.
    """
    return {
        **{name: len(plan.kept) for name, plan in plans.items()},
        "images": {name: len({d for r in plan.kept for d in r.digests}) for name, plan in plans.items()},
        "formats": sorted({record.format for plan in plans.values() for record in plan.kept}),
        "dropped": [
            {"id": record.id, "split": name, "reason": f"{length} tokens, more than {max_tokens}"}
            for name, plan in plans.items()
            for record, length in plan.dropped
        ],
        "shapes": asdict(shapes),
        "tokens_per_sample": mean(size.tokens for size in plans["train"].sizes),
    }
