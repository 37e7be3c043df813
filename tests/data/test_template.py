"""Label masks decoded back, for templates of both kinds; and the text of every refusal."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mars_jax.data.formats.base import Turn
from mars_jax.data.records import Record
from mars_jax.data.template import encode
from mars_jax.data.tokenizer import load_tokenizer
from mars_jax.errors import ConfigError, DataError
from tests.helpers import tiny_data
from tests.helpers.tiny_data import IMAGE_TOKEN_ID, PICTURES_FIRST, STRING_CHATML, TYPED_CHATML, chat
from tests.helpers.tokenizer_kinds import LLAVA_1_5

TOKENIZERS = {
    name: tiny_data.tokenizer(globals()[name]) for name in ("TYPED_CHATML", "STRING_CHATML", "PICTURES_FIRST")
}


def record(*turns: tuple[str, str]) -> Record:
    images = (Path("a.png"),) if any("<image>" in text for _, text in turns) else ()
    return Record(
        "r1", images, tuple(Turn(role, text) for role, text in turns), "data.json item 0", "g", ("g",) * len(images)
    )


CONVERSATIONS = [
    [("user", "<image>\nwhat shape?"), ("assistant", "a red square")],
    [("system", "be short"), ("user", "hi"), ("assistant", "a"), ("user", "<image>\nnow?"), ("assistant", "end")],
    [("user", "né中🙂"), ("assistant", " 中 é\u0301 🙂\n\nassistant "), ("user", ""), ("assistant", "<b>im_end</b>")],
    [("user", "what is this?\n<image>"), ("assistant", "assistant")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("template", TOKENIZERS)
def test_supervised_tokens_decode_to_the_answers_and_their_end_tokens(
    template: str, turns: list[tuple[str, str]]
) -> None:
    tokenizer = TOKENIZERS[template]
    one = record(*turns)
    encoded = encode(one, chat(tokenizer), [1] * len(one.images))
    answers = "".join(text + "<|im_end|>" for role, text in turns if role == "assistant")
    assert tokenizer.decode(encoded.token_ids[encoded.supervised]) == answers
    assert encoded.token_ids.dtype == np.int32
    assert encoded.supervised.shape == encoded.token_ids.shape
    # The rest is the prompt: nothing of the conversation is lost or written twice.
    whole = tokenizer.decode(encoded.token_ids)
    for role, text in turns:
        assert text.replace("<image>", "").strip("\n") in whole
        assert whole.count(f"<|im_start|>{role}") == sum(other == role for other, _ in turns)


def words(least: int) -> st.SearchStrategy[str]:
    """Any text without a control token: those are refused, see below. (Hypothesis tries the constants of our code.)"""
    special = TOKENIZERS["TYPED_CHATML"].all_special_tokens
    return st.text(min_size=least, max_size=20).filter(lambda text: not any(token in text for token in special))


@settings(max_examples=40)
@given(st.lists(st.tuples(words(0), words(1)), min_size=1, max_size=3))
def test_any_text_survives(pairs: list[tuple[str, str]]) -> None:
    turns = [turn for user, answer in pairs for turn in (("user", user), ("assistant", answer))]
    encoded = encode(record(*turns), chat(TOKENIZERS["TYPED_CHATML"]), [])
    supervised = TOKENIZERS["TYPED_CHATML"].decode(encoded.token_ids[encoded.supervised])
    assert supervised == "".join(answer + "<|im_end|>" for _, answer in pairs)


def test_tokens_are_those_of_the_whole_rendering_with_the_image_expanded() -> None:
    tokenizer = TOKENIZERS["TYPED_CHATML"]
    one = record(*CONVERSATIONS[1])
    encoded = encode(one, chat(tokenizer), [5])
    rendering = (
        "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        f"<|im_start|>user\n{'<image>' * 5}\nnow?<|im_end|>\n<|im_start|>assistant\nend<|im_end|>\n"
    )
    assert encoded.token_ids.tolist() == tokenizer.encode(rendering)
    assert not encoded.supervised[encoded.token_ids == IMAGE_TOKEN_ID].any()
    assert not encoded.supervised[-1]  # the newline after the last end token


def test_a_template_that_trims_answers() -> None:
    tokenizer = tiny_data.tokenizer(STRING_CHATML.replace("message['content']", "(message['content'] | trim)"))
    encoded = encode(record(("user", "?"), ("assistant", " yes \n")), chat(tokenizer), [])
    assert tokenizer.decode(encoded.token_ids[encoded.supervised]) == "yes<|im_end|>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            STRING_CHATML.replace("message['content']", "message['content'] | replace('yes', 'Yes')"),
            r"renders the answer as '.*Yes<\|im",
        ),
        (
            STRING_CHATML.replace("in messages", "in messages if message['role'] != 'system'"),
            r"leaves out the text of turn 0 \(system\)",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + STRING_CHATML,
            r"refuses the turns system, user \(no system\)",
        ),
    ],
)
def test_templates_that_hide_the_answer_are_data_errors_that_name_the_tokenizer(template: str, text: str) -> None:
    tokenizer = tiny_data.tokenizer(template)
    tokenizer.name_or_path = "some/tokenizer"
    with pytest.raises(DataError, match=text) as caught:
        encode(record(("system", "be short"), ("user", "?"), ("assistant", "yes")), chat(tokenizer), [])
    assert "'some/tokenizer'" in str(caught.value)
    assert "data.json item 0 (id 'r1')" in str(caught.value)


def test_a_template_without_pictures_is_a_config_error() -> None:
    tokenizer = tiny_data.tokenizer(TYPED_CHATML.replace("<image>", "[picture]"))
    with pytest.raises(
        ConfigError, match="shows a user turn with one picture neither from typed content nor from text"
    ):
        encode(record(*CONVERSATIONS[0]), chat(tokenizer), [1])


def test_a_tokenizer_that_loses_text_is_a_data_error() -> None:
    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<image>": 3, "yes": 4}, "<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>", "<image>"]
    )
    tokenizer.chat_template = STRING_CHATML
    assert encode(record(("user", "?"), ("assistant", "yes")), chat(tokenizer, 3), []).supervised.sum() == 2
    with pytest.raises(DataError, match=r"turns the answer 'yellow' into '<unk>'. Use the checkpoint's own tokenizer"):
        encode(record(("user", "?"), ("assistant", "yellow")), chat(tokenizer, 3), [])


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_control_tokens_in_the_text_are_refused(role: str) -> None:
    texts = {"user": "?", "assistant": "yes", role: "a <|im_end|> b"}
    with pytest.raises(DataError, match=r"contains '<\|im_end\|>', which tokenizer .* reads as a control token"):
        encode(record(*texts.items()), chat(TOKENIZERS["TYPED_CHATML"]), [])


def test_wrong_image_token_id_and_count() -> None:
    with pytest.raises(ConfigError, match="tokens, but the config's image token is 151646"):
        encode(record(*CONVERSATIONS[0]), chat(TOKENIZERS["TYPED_CHATML"], 151646), [1])
    with pytest.raises(DataError, match=r"1 image tokens for 2 pictures\. Write <image> once for each picture, in a"):
        encode(record(*CONVERSATIONS[0]), chat(TOKENIZERS["TYPED_CHATML"]), [1, 1])


def test_a_template_with_pictures_of_its_own_blamed_the_row() -> None:
    plain = chat(TOKENIZERS["TYPED_CHATML"])
    doubled = replace(plain, template=plain.template.replace("<image>", "<image><image>"))
    with pytest.raises(DataError, match=r"2 image tokens for 1 pictures\. The chat template adds or drops some: take"):
        encode(record(*CONVERSATIONS[0]), doubled, [1])


def test_typed_parts_that_a_template_joins_otherwise_are_named() -> None:
    tokenizer = tiny_data.tokenizer(tiny_data.TYPED_CHATML.replace("{{ part['text'] }}", "{{ part['text'] + ' ' }}"))
    turns = Turn("user", "?"), Turn("assistant", "one.two.", parts=("one.", "two."))
    with pytest.raises(DataError, match="It has several typed parts, which templates join in different ways: make"):
        encode(replace(record(("user", "?"), ("assistant", "x")), turns=turns), chat(tokenizer), [])


def test_load_tokenizer_prefers_the_processors_template(tmp_path: Path) -> None:
    tiny_data.tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"the tokenizer has no chat template. Copy chat_template.jinja"):
        load_tokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": PICTURES_FIRST}))
    assert load_tokenizer(tmp_path).chat_template == PICTURES_FIRST
    (tmp_path / "chat_template.jinja").write_text(TYPED_CHATML)
    assert load_tokenizer(tmp_path).chat_template == TYPED_CHATML


def test_a_tokenizer_with_code_of_its_own_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_data.tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    file.write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with contextlib.suppress(ConfigError):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "chat_template.json: not JSON at line 1, column 2"),
        ("[" * 100_000, "chat_template.json: is nested too deeply"),
        ("[]", "holds a JSON list; an object is needed"),
        ('{"chat_template": {"tools": "x", "rag": "y"}}', r"several chat templates \(rag, tools\), none of them named"),
        (
            '{"chat_template": [{"name": "rag", "template": "y"}]}',
            r"several chat templates \(rag\), none of them named",
        ),
        ('{"chat_template": 3}', r"the chat template is 3 \(number\); a text is expected"),
    ],
)
def test_odd_template_files_are_config_errors(tmp_path: Path, content: str, text: str) -> None:
    tiny_data.tokenizer(None).save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(content)
    with pytest.raises(ConfigError, match=text):
        load_tokenizer(tmp_path)


def test_the_default_of_several_templates_is_used(tmp_path: Path) -> None:
    tiny_data.tokenizer(None).save_pretrained(tmp_path)
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": TYPED_CHATML}]
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == TYPED_CHATML


def test_load_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer = tiny_data.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"the tokenizer has no padding token. Set pad_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(" ")
    with pytest.raises(ConfigError, match="the chat template is empty; a text is expected"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("length", ["x", -1, 1, None])
def test_a_greatest_length_of_another_type_ended_in_a_traceback(tmp_path: Path, length: object) -> None:
    tiny_data.tokenizer().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": length}))
    assert load_tokenizer(tmp_path).encode("a red square")


def test_a_tokenizer_that_draws_its_tokens_at_random_was_taken(tmp_path: Path) -> None:
    tiny_data.tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "model": {**content["model"], "dropout": 0.5}}))
    with pytest.raises(ConfigError, match=r"tokenizer.json: model.dropout is 0.5, by which .* Set it to null"):
        load_tokenizer(tmp_path)


def test_a_dtype_that_is_none_was_blamed_on_the_tokenizers_files(tmp_path: Path) -> None:
    tiny_data.checkpoint(tmp_path, dtype="banana")
    with pytest.raises(ConfigError, match=r"no attribute 'banana'\)\. Copy .* and config.json from the checkpoint"):
        load_tokenizer(tmp_path)


def test_answers_end_and_texts_begin_as_at_inference_where_the_template_writes_neither() -> None:
    tokenizer = tiny_data.tokenizer(LLAVA_1_5)
    turns = [("user", "<image>\nwhat?"), ("assistant", "a red square"), ("user", "and?"), ("assistant", "that")]
    encoded = encode(record(*turns), chat(tokenizer), [2])
    supervised = tokenizer.decode(encoded.targets[encoded.supervised])
    assert supervised == " a red square<|im_end|> that<|im_end|>"
    # The history has no end token, as inference engines render it; the first answer ends all the same.
    whole = "USER: <image><image>\nwhat? ASSISTANT: a red square USER: and? ASSISTANT: that<|im_end|> "
    assert tokenizer.decode(encoded.token_ids) == whole

    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    begun = encode(record(*turns), chat(tokenizer), [2])
    assert begun.token_ids.tolist() == [1, *encoded.token_ids.tolist()]
    assert begun.supervised.tolist() == [False, *encoded.supervised.tolist()]
    tokenizer.chat_template = "<|im_start|>" + LLAVA_1_5  # writes it itself
    assert encode(record(*turns), chat(tokenizer), [2]).token_ids.tolist() == begun.token_ids.tolist()


def test_an_answer_that_nothing_ends_is_a_data_error() -> None:
    tokenizer = tiny_data.tokenizer(STRING_CHATML.replace("'<|im_end|>\n'", "'\n'"))
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="the answer itself and then a special end token are expected"):
        encode(record(("user", "?"), ("assistant", "yes")), chat(tokenizer), [])
