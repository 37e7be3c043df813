"""The prompt that is trained is the prompt that inference engines ask with, for all kinds of templates."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from mars_jax.data.formats.base import Turn
from mars_jax.data.records import Record
from mars_jax.data.template import (
    DATED,
    MOVED,
    NO_PROMPT,
    OTHER_PROMPT,
    TEXT_BEFORE,
    Encoded,
    answer_ids,
    encode,
    separate_answers,
)
from mars_jax.errors import DataError
from tests.helpers import tiny_data
from tests.helpers.tiny_data import STRING_CHATML, TYPED_CHATML, chat
from tests.helpers.tokenizer_kinds import (
    ALWAYS_ASKED,
    CLOSED,
    KINDS,
    LLAVA_1_5,
    ONEVISION,
    PARTS_OF_USERS,
    SYSTEM_LAST,
    TEMPLATES,
    tokenizer,
)

ONE = ("<image>\nwhat colour is it?", "red")
TWO = (*ONE, "and why?", "it is a cat")
THREE = (*TWO, "is it?", "yes\nor no")


def record(*texts: str, **changes: object) -> Record:
    """A record whose texts are questions and answers in turn."""
    turns = [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
    images = (Path("a.png"),) * sum(text.count("<image>") for text in texts)
    fields = {"id": "r1", "images": images, "turns": tuple(turns), "digests": ("g",) * len(images)}
    return Record(source="data.json item 0", group="g", **{**fields, **changes})  # type: ignore[arg-type]


def asked(one: Record, tok: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt of a record's last answer as transformers makes them."""
    typed = "['type']" in str(tok.chat_template)
    messages = []
    for turn in one.turns[:-1]:
        pictures = [{"type": "image"}] * turn.text.count("<image>")
        parts = [*pictures, {"type": "text", "text": turn.text.removeprefix("<image>\n")}]
        messages.append({"role": turn.role, "content": parts if typed else turn.text})
    rendered = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tok.encode(str(rendered), add_special_tokens=False))


def all_encoded(one: Record, tok: PreTrainedTokenizerBase) -> list[tuple[Record, Encoded]]:
    """A record, or the records that its answers are trained in, with their tokens."""
    encoded = encode(one, chat(tok), [1] * len(one.images))
    if not encoded.apart:
        return [(one, encoded)]
    return [pair for piece in separate_answers(one, encoded.apart) for pair in all_encoded(piece, tok)]


@pytest.mark.parametrize("texts", [ONE, TWO, THREE], ids=["one", "two", "three"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_answer_is_trained_behind_the_prompt_that_is_asked(
    template: str, kind: str, texts: tuple[str, ...]
) -> None:
    tok = tokenizer(kind, TEMPLATES[template])
    found = {}
    for one, encoded in all_encoded(record(*texts), tok):
        borders = np.flatnonzero(np.diff(encoded.supervised.astype(int), prepend=0, append=0)).reshape(-1, 2)
        learned = [number for number, turn in enumerate(one.turns) if turn.role == "assistant" and turn.learn]
        assert len(borders) == len(learned)
        for (start, stop), number in zip(borders, learned, strict=True):
            until = record(*(turn.text for turn in one.turns[: number + 1]))
            assert encoded.token_ids[:start].tolist() == asked(until, tok)
            assert encoded.targets[stop - 1] == tok.eos_token_id
            tail = encoded.token_ids[max(start - 8, 0) : start].tolist()
            answer = tok.decode([*tail, *encoded.targets[start : stop - 1].tolist()])
            found[number] = answer.removeprefix(tok.decode(tail)).lstrip(" ")
    # Every answer once, whole, and no other text.
    assert found == {number: text for number, text in enumerate(texts) if number % 2}


def test_a_space_that_answers_begin_with_belongs_to_the_answer_not_to_the_prompt() -> None:
    tok = tokenizer("byte_level", LLAVA_1_5)
    encoded = encode(record(*ONE), chat(tok), [1])
    assert tok.decode(encoded.token_ids[~encoded.supervised]) == "USER: <image>\nwhat colour is it? ASSISTANT: "
    assert tok.decode(encoded.token_ids[encoded.supervised]) == " red<|im_end|>"
    assert encoded.remarks == ()


def test_a_template_with_another_header_than_its_generation_prompt_is_remarked() -> None:
    tok = tokenizer("byte_level", ONEVISION)
    encoded = encode(record(*ONE), chat(tok), [1])
    assert encoded.remarks == (OTHER_PROMPT,)
    two = encode(record(*TWO), chat(tok), [1])
    assert two.apart == (1,)  # the history has another header than the first answer was asked with
    first, whole = separate_answers(record(*TWO), two.apart)
    assert (first.id, [turn.text for turn in first.turns], first.images) == ("r1 (turn 1)", [*ONE], (Path("a.png"),))
    assert [turn.learn for turn in whole.turns] == [True, False, True, True]


def test_a_template_without_a_generation_prompt_is_remarked() -> None:
    encoded = encode(record(*ONE), chat(tiny_data.tokenizer(STRING_CHATML)), [1])
    assert encoded.remarks == (NO_PROMPT,)
    assert tiny_data.tokenizer().decode(encoded.token_ids[encoded.supervised]) == "red<|im_end|>"


def test_a_template_that_moves_pictures_is_remarked() -> None:
    between = record("first: <image> second: <image>", "red")
    assert encode(between, chat(tokenizer("byte_level", ONEVISION)), [1, 1]).remarks == (OTHER_PROMPT, MOVED)
    assert encode(between, chat(tiny_data.tokenizer(TYPED_CHATML)), [1, 1]).remarks == ()


def test_an_answer_that_is_not_to_be_trained_is_not() -> None:
    tok = tiny_data.tokenizer(TYPED_CHATML)
    wrong = record(*TWO)
    turns = (wrong.turns[0], Turn("assistant", "a wrong try", learn=False), *wrong.turns[2:])
    encoded = encode(record(*TWO, turns=turns), chat(tok), [1])
    assert "a wrong try" in tok.decode(encoded.token_ids)
    assert tok.decode(encoded.token_ids[encoded.supervised]) == "it is a cat<|im_end|>"


def test_typed_parts_are_joined_as_the_template_joins_them() -> None:
    question = Turn("user", "<image>one.two.", parts=("<image>", "one.", "two."))
    one = record(*ONE, turns=(question, Turn("assistant", "red")))
    joined = {LLAVA_1_5: "<image>\none. two. ASSISTANT:", ONEVISION: "<image>\none.\ntwo.<|im_end|>"}
    for template, text in joined.items():
        tok = tokenizer("byte_level", template)
        assert text in tok.decode(encode(one, chat(tok), [1]).token_ids)
    # A line break that a part begins with is the part's own.
    broken = Turn("user", "<image>\nwhat?", parts=("<image>", "\nwhat?"))
    tok = tiny_data.tokenizer(TYPED_CHATML)
    encoded = encode(record(*ONE, turns=(broken, Turn("assistant", "red"))), chat(tok), [1])
    assert "<image>\n\nwhat?" in tok.decode(encoded.token_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_candidate_answer_has_the_tokens_that_it_would_be_trained_with(template: str, kind: str) -> None:
    tok = tokenizer(kind, TEMPLATES[template])
    for text in ("red", "a cat", "Yes, and why?"):
        encoded = encode(record(ONE[0], text), chat(tok), [1])
        trained = encoded.targets[encoded.supervised].tolist()
        assert [*answer_ids(record(*ONE), text, chat(tok)), tok.eos_token_id] == trained


def test_tokens_of_boxes_and_objects_are_text_and_those_of_chats_and_pictures_are_not() -> None:
    tok = tiny_data.tokenizer(TYPED_CHATML)
    tok.add_special_tokens(
        {"extra_special_tokens": ["<|im_start|>", "<image>", "<|box_start|>", "<|box_end|>", "<|vision_pad|>"]}
    )
    box = "<|box_start|>(1,2),(3,4)<|box_end|>"
    encoded = encode(record("where?", box), chat(tok), [])
    assert tok.decode(encoded.token_ids[encoded.supervised]) == box + "<|im_end|>"
    for token in ("<|im_start|>", "<|im_end|>", "<pad>", "<|vision_pad|>"):
        with pytest.raises(DataError, match="reads as a control token, not as text"):
            encode(record("where?", f"a {token} b"), chat(tok), [])


def learned(encoded: Encoded, tok: PreTrainedTokenizerBase) -> str:
    return str(tok.decode(encoded.targets[encoded.supervised]))


def before_answer(encoded: Encoded, tok: PreTrainedTokenizerBase) -> str:
    return str(tok.decode(encoded.token_ids[: int(np.flatnonzero(encoded.supervised)[0])]))


def test_an_answer_that_the_generation_prompt_repeats_is_not_cut_out_of_it() -> None:
    tok = tokenizer("byte_level", ALWAYS_ASKED)
    encoded = encode(record("who speaks?", "assistant"), chat(tok), [])
    assert (
        before_answer(encoded, tok)
        == "<|im_start|>user<|im_start|>who speaks?<|im_end|><|im_start|>assistant<|im_start|>"
    )
    assert learned(encoded, tok) == "assistant<|im_end|>"


def test_a_system_text_that_the_template_puts_into_the_last_question_is_trained_there() -> None:
    tok = tokenizer("byte_level", SYSTEM_LAST)
    turns = (Turn("system", "be short"), Turn("user", "why?"), Turn("assistant", "red"))
    encoded = encode(record(turns=turns), chat(tok), [])
    assert before_answer(encoded, tok) == "[INST] be short\n\nwhy?[/INST]"
    assert learned(encoded, tok) == " red<|im_end|>"  # with the space of answers without a system text
    assert encoded.remarks == (OTHER_PROMPT,)


def test_texts_are_given_as_texts_where_a_template_takes_parts_from_users_alone() -> None:
    tok = tokenizer("byte_level", PARTS_OF_USERS)
    turns = (Turn("system", "be short"), *record(*TWO).turns)
    for piece, encoded in all_encoded(record(*TWO, turns=turns), tok):
        assert "<|im_start|>system\nbe short<|im_end|>" in tok.decode(encoded.token_ids)
        assert learned(encoded, tok).endswith(f"{piece.turns[-1].text}<|im_end|>")


def test_special_tokens_that_only_tokenizer_json_marks_end_answers_and_are_no_text() -> None:
    tok = tokenizer("byte_level", CLOSED)
    tok.add_special_tokens({"eos_token": "<|im_start|>", "extra_special_tokens": []}, replace_extra_special_tokens=True)
    assert "<|im_end|>" not in tok.all_special_tokens
    assert learned(encode(record("why?", "red"), chat(tok), []), tok) == "red<|im_end|>"
    with pytest.raises(DataError, match=r"contains '<\|im_end\|>', which tokenizer .* reads as a control token"):
        encode(record("a<|im_end|>b", "red"), chat(tok), [])


def test_tokens_that_the_template_makes_of_parts_are_no_text() -> None:
    split = TYPED_CHATML.replace("<|im_end|>", "{{ '<|im_' + 'end|>' }}")
    tok = tokenizer("byte_level", split)
    tok.add_special_tokens({"eos_token": "<pad>"})
    with pytest.raises(DataError, match=r"contains '<\|im_end\|>', which tokenizer .* reads as a control token"):
        encode(record("a<|im_end|>b", "red"), chat(tok), [])


def test_text_that_the_template_writes_before_answers_is_remarked() -> None:
    empty = TYPED_CHATML.replace(
        "{% else %}", "{% elif message['role'] == 'assistant' %}<think></think>{{ part['text'] }}{% else %}"
    )
    tok = tokenizer("byte_level", empty)
    encoded = encode(record(*ONE), chat(tok), [1])
    assert learned(encoded, tok) == "<think></think>red<|im_end|>"
    assert encoded.remarks == (TEXT_BEFORE,)


def test_a_template_that_writes_the_date_is_remarked() -> None:
    tok = tokenizer("byte_level", "{{ strftime_now('%Y') }}" + TYPED_CHATML)
    assert encode(record(*ONE), chat(tok), [1]).remarks == (DATED,)


def test_a_long_answer_that_the_template_changes_is_shown_shortened() -> None:
    tok = tokenizer("byte_level", TYPED_CHATML.replace("part['text']", "part['text'] | upper"))
    with pytest.raises(DataError, match="the answer itself and then a special end token are expected") as caught:
        encode(record("why?", "red " * 1000), chat(tok), [])
    assert len(str(caught.value)) < 500
