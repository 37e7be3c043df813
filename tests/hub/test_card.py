"""The model card: how each family's adapter is loaded, and what it says of vLLM."""

import ast
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from mars_jax.hub.card import model_card
from mars_jax.models.families.llava import table as llava
from mars_jax.models.families.qwen2_5_vl import table as qwen2_5_vl
from mars_jax.runtime.text import visible

ALL = {"vision": 20, "projector": 3, "llm": 40}


def card(table, ranks, rule=lambda rank: 2 * rank):
    alphas = {module: rule(rank) for module, rank in ranks.items()}
    return " ".join(model_card(table, "org/base", None, ranks, alphas, 1).split())


@pytest.mark.parametrize("table", [llava.WITH_CLIP, llava.WITH_SIGLIP, qwen2_5_vl.TABLE])
def test_vllm_needs_a_switch_for_what_is_not_the_llm_and_room_for_the_largest_rank(table):
    text = card(table, ALL)
    assert "`LLM(BASE, enable_lora=True, max_lora_rank=64, enable_tower_connector_lora=True)`" in text
    assert "drops the part of vision and projector, with no more than a warning" in text
    assert "refuses fully trained modules (`modules_to_save`), biases and DoRA; this adapter has none" in text
    assert "alpha_pattern" not in text

    alone = card(table, {"llm": 8})
    assert "`LLM(BASE, enable_lora=True, max_lora_rank=8)`" in alone
    assert "enable_tower_connector_lora" not in alone


def test_scales_that_older_releases_get_wrong_are_told():
    told = "don't read `rank_pattern` and `alpha_pattern`"
    assert told in card(llava.WITH_CLIP, ALL, rule=lambda rank: 16)
    # One scale up to rounding.
    assert told not in card(llava.WITH_CLIP, ALL, rule=lambda rank: 0.7 * rank)


@pytest.mark.parametrize(
    ("table", "ranks", "told"),
    [
        (llava.ONEVISION, ALL, "takes no LoRA adapter for `LlavaOnevisionForConditionalGeneration`: serve the merged"),
        (llava.WITH_CLIP, {"llm": 513}, "takes no rank above 512: serve the merged"),
        (llava.WITH_DINOV2, ALL, "takes no vision encoder of this kind, merged or not: use transformers"),
    ],
)
def test_what_vllm_does_not_take(table, ranks, told):
    text = card(table, ranks)
    assert told in text
    assert "enable_lora" not in text


def test_versions_that_place_pictures_wrongly_are_named():
    assert "transformers 5.3 to 5.5 (until 5.5.4)" in card(qwen2_5_vl.TABLE, ALL)
    assert "5.5.4" not in card(llava.ONEVISION, ALL)


HOSTILE = [
    "org/base\nlicense: mit",
    "a: b # c",
    "- x",
    "'\"",
    "true",
    "*alias",
    "{{ x }}",
    "---\n\n# Heading\n",
    "`x` <script>alert(1)</script>",
    "[link](http://e.vil) ![p](http://e.vil/p.png)",
    "www.e.vil/x",
    "```\n# out\n```",
    "\x1b[31m\x9b\u202ered\u2028",
    "a``b`",
    "caf\u00e9 \U0001f600",
    "x'); __import__('os').system('true'); ('",
]


@pytest.mark.parametrize("base", HOSTILE)
@pytest.mark.parametrize("revision", [None, "`\n---\nmain'", "abc"])
def test_no_name_of_a_base_or_revision_adds_a_key_a_line_of_code_or_markdown(base, revision):
    text = model_card(llava.ONEVISION, base, revision, ALL, dict.fromkeys(ALL, 16.0), 1)
    plain = model_card(llava.ONEVISION, "org/base", revision and "abc", ALL, dict.fromkeys(ALL, 16.0), 1)
    assert len(text.splitlines()) == len(plain.splitlines())
    _, front, rest = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"base_model": base, "library_name": "peft", "tags": ["lora", "mars_jax"]}
    # What Markdown makes of it: the same headings and code, and no link, picture or HTML outside code.
    html = MarkdownIt("commonmark").render(rest)
    assert tags(html) == tags(MarkdownIt("commonmark").render(plain.split("---\n", 2)[2]))
    code = next(token.content for token in MarkdownIt("commonmark").parse(rest) if token.type == "fence")
    assigned = ast.parse(code).body[2]
    assert ast.literal_eval(assigned.value.args[0]) == base
    assert [ast.literal_eval(keyword.value) for keyword in assigned.value.keywords] == ([revision] if revision else [])
    assert visible(text) == text


def tags(html: str) -> list[str]:
    return re.findall(r"<[^>]*>", html)


@pytest.mark.parametrize(
    "prompt", ["USER: <image>\nwhat colour? ASSISTANT:", "```\n# out\n````", "a\x1b[31m\u202e", "x" * 9000]
)
def test_the_prompt_that_was_trained_is_in_the_card_as_a_block_of_its_own(prompt):
    text = model_card(llava.WITH_CLIP, "org/base", None, ALL, dict.fromkeys(ALL, 16.0), 1, prompt)
    blocks = [token.content for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"]
    assert len(blocks) == 2
    assert len(blocks[1]) < 4100
    if len(prompt) < 4000:
        assert blocks[1] == visible(prompt) + "\n"
    assert "apply_chat_template(messages, add_generation_prompt=True)" in text
    assert "## Serve" in text
