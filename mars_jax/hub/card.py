"""Model card of an exported adapter: ranks, loading and serving.

The statements about vLLM follow the source of vLLM 0.33.0: `config/lora.py`, `lora/` and the model classes.
"""

import json
import re
from collections.abc import Mapping

from mars_jax.models.configs import ModelConfig
from mars_jax.models.families.tables import CheckpointTable
from mars_jax.runtime.text import visible

# Names and paths that YAML reads as text without quotes.
_NAME = re.compile(r"[A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)+")
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_TEMPLATE = """\
---
base_model: {scalar}
library_name: peft
tags: [lora, mars_jax]
---

# LoRA adapter for {code}

Trained with mars_jax, which picked one rank for each part of the model.

| module | rank | alpha | alpha / rank |
|---|---|---|---|
{rows}

Base: {code}{revision}. Parameters: {size:,}, float32.

## Load

```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained({base!r}{revision_argument})
model = PeftModel.from_pretrained(base, "PATH/TO/THIS/DIRECTORY")
```

Names and patterns fit transformers 4.57 to 5.23 with peft 0.18 or newer. peft only warns about tensors that it cannot
assign, so check once that the outputs differ from the base's, with `mars export RUN --verify`.{loading}

{prompt}## Serve

- transformers with peft: as above.
- {vllm}
- Anything else was not checked: take the merged checkpoint of the same run (`mars export RUN --merged`).

Where the adapter comes from (run, data, settings) is in `mars.json`.
"""


_PROMPT = """\
## Prompt

It was trained on answers that follow the generation prompt of the base's chat template. `AutoProcessor` of the base
gives it: `processor.apply_chat_template(messages, add_generation_prompt=True)`. For one of its samples, each picture as
the one token that the processor repeats, it is

{block}

"""
# Of a longer prompt only the two ends are shown.
_LONGEST_PROMPT = 4000


def model_card(
    table: CheckpointTable[ModelConfig],
    base: str,
    revision: str | None,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    size: int,
    prompt: str | None = None,
) -> str:
    """Markdown for the adapter's README.

    Args:
        table: checkpoint table of the base's family.
        base: hub id or path of the base.
        revision: commit of the base.
        ranks: module -> rank, for adapted modules.
        alphas: module -> alpha, for the same modules.
        size: number of adapter parameters.
        prompt: a prompt as it was trained, to be shown.
    """
    rows = [f"| {module} | {rank} | {alphas[module]:g} | {alphas[module] / rank:g} |" for module, rank in ranks.items()]
    return _TEMPLATE.format(
        auto_class=table.auto_class,
        loading=f"\n{table.loading}" if table.loading else "",
        vllm=_vllm(table, ranks, alphas),
        base=base,
        scalar=_scalar(base),
        code=_code(base),
        rows="\n".join(rows),
        revision=f" at revision {_code(revision)}" if revision else "",
        revision_argument=f", revision={revision!r}" if revision else "",
        size=size,
        prompt=_PROMPT.format(block=_block(prompt)) if prompt else "",
    )


def _block(text: str) -> str:
    """A fenced Markdown block of any text."""
    if len(text) > _LONGEST_PROMPT:
        half = _LONGEST_PROMPT // 2
        text = f"{text[:half]}\n[{len(text) - 2 * half} characters]\n{text[-half:]}"
    fence = _fence(text, 3)
    return f"{fence}text\n{visible(text)}\n{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than any run of them in a text."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _scalar(text: str) -> str:
    """A YAML scalar: as it is where YAML reads it back so, else in quotes."""
    return text if _NAME.fullmatch(text) else visible(json.dumps(text, ensure_ascii=False))


def _code(text: str) -> str:
    """A Markdown code span of any text, on one line, in which nothing has a meaning."""
    shown = visible(text.replace("\n", "\\n").replace("\t", "\\t"))
    fence = _fence(shown, 1)
    # The spaces are not part of a span that they are on both sides of.
    return f"`{shown}`" if fence == "`" else f"{fence} {shown} {fence}"


def _vllm(table: CheckpointTable[ModelConfig], ranks: Mapping[str, int], alphas: Mapping[str, float]) -> str:
    """How to serve this adapter with vLLM, or why vLLM cannot serve it."""
    if table.vllm == "nothing":
        return (
            f"vLLM 0.33's `{table.auto_class}` takes no vision encoder of this kind, merged or not: use transformers."
        )
    if table.vllm == "merged" or max(ranks.values()) > _VLLM_RANKS[-1]:
        unsupported = (
            f"no LoRA adapter for `{table.auto_class}`"
            if table.vllm == "merged"
            else f"no rank above {_VLLM_RANKS[-1]}"
        )
        return (
            f"vLLM 0.33 takes {unsupported}: serve the merged checkpoint of the same run (`mars export RUN --merged`)."
        )
    needed = next(rank for rank in _VLLM_RANKS if rank >= max(ranks.values()))
    arguments, text = f"enable_lora=True, max_lora_rank={needed}", ""
    switched = " and ".join(module for module in ranks if module != "llm")
    if switched:
        arguments += ", enable_tower_connector_lora=True"
        text = f" Without the last it drops the part of {switched}, with no more than a warning."
    if len({f"{alphas[module] / rank:g}" for module, rank in ranks.items()}) > 1:
        text += (
            " Releases that don't read `rank_pattern` and `alpha_pattern` scale every module alike, which is wrong "
            "here: serve them the merged checkpoint."
        )
    return (
        f"vLLM 0.33: `LLM(BASE, {arguments})`.{text} It refuses fully trained modules (`modules_to_save`), biases and "
        "DoRA; this adapter has none of them."
    )
