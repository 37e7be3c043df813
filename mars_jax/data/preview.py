"""Samples as the model sees them, for people to look at before anything is trained."""

import re
from collections.abc import Sequence

import numpy as np

from mars_jax.data.examples import ExampleSource, Preprocessor, Shapes
from mars_jax.data.records import Record


def shown(records: Sequence[Record], preprocessor: Preprocessor, shapes: Shapes) -> list[dict[str, str]]:
    """Each record's id, its text with the image tokens counted, and the part that is supervised."""
    source = ExampleSource(records, preprocessor, shapes, cache_bytes=0)
    tokenizer = preprocessor.tokenizer
    found = []
    for record, example in zip(records, (source[i] for i in range(len(records))), strict=True):
        supervised = example["targets"][example["target_weights"] > 0]
        used = np.flatnonzero(example["tokens"] != tokenizer.pad_token_id)[-1] + 1
        text = str(tokenizer.decode(example["tokens"][:used]))
        image = re.escape(str(tokenizer.decode([preprocessor.image_token_id])))
        counted = re.sub(f"({image})+", lambda run: f"[{len(run[0]) // len(run[1])} image tokens]", text)
        found.append(
            {
                "id": record.id,
                "text": counted,
                "supervised": str(tokenizer.decode(supervised)),
            }
        )
    return found
