"""The model card of an exported adapter: what it is, how to load it, where it can't be served."""

from collections.abc import Mapping

from mars_jax.hub.tables import Family

_TEMPLATE = """\
---
base_model: {base}
library_name: peft
tags: [lora, mars_jax]
---

# LoRA adapter for {base}

Trained with mars_jax, which picked one rank for each part of the model.

| module | rank | alpha | alpha / rank |
|---|---|---|---|
{rows}

Base: `{base}`{revision}. Parameters: {size:,}, float32.

## Load

```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained({base!r}{revision_argument})
model = PeftModel.from_pretrained(base, "PATH/TO/THIS/DIRECTORY")
```

Names and patterns fit transformers 4.57 to 5.23 with peft 0.18 or newer. peft only warns when tensors find no place,
so check once that the outputs differ from the base's; `mars export RUN --verify` does.

## Serve

{serving}
Where the adapter comes from (run, data, settings) is in `mars.json`.
"""


def model_card(
    family: Family, base: str, revision: str | None, ranks: Mapping[str, int], alphas: Mapping[str, float], size: int
) -> str:
    """Markdown for the adapter's README.

    Args:
        family: of the base.
        base: hub id or path of the base.
        revision: its commit.
        ranks: module -> rank, of the modules that are adapted.
        alphas: module -> alpha, of the same.
        size: number of adapter parameters.
    """
    rows = [f"| {module} | {rank} | {alphas[module]:g} | {alphas[module] / rank:g} |" for module, rank in ranks.items()]
    return _TEMPLATE.format(
        auto_class=family.auto_class,
        serving=family.serving,
        base=base,
        rows="\n".join(rows),
        revision=f" at revision `{revision}`" if revision else "",
        revision_argument=f", revision={revision!r}" if revision else "",
        size=size,
    )
