"""Tokenises conversations, with a mask of the supervised tokens: the assistant's text and its end token.

Conversations are rendered by the checkpoint's chat template. What is trained is what is asked: before an answer stands
the generation prompt of the template, as inference engines render it. Padding and pictures are handled in `examples`.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mars_jax.data.chat_template import Message, TemplateFaultError, render
from mars_jax.data.formats.base import IMAGE_PLACEHOLDER, Turn
from mars_jax.data.records import Record
from mars_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Remarks on a conversation, counted over a data set. `{}` stands for the number of samples.
OTHER_PROMPT = (
    "the chat template renders answers behind another text than its own generation prompt in {} samples; they are "
    "trained and asked behind the generation prompt, as inference engines ask"
)
NO_PROMPT = (
    "the chat template renders no generation prompt in {} samples (add_generation_prompt changes nothing); answers are "
    "trained behind the text that it writes before them, which an inference engine may not write"
)
MOVED = "the chat template moves pictures before the text, or out of the order of the text, in {} samples"

# Special tokens that stand for pictures, whatever the template does with them.
_PICTURE_TOKEN = re.compile(r"image|img|video|vision|audio|patch", re.IGNORECASE)
# Tokens of the prompt that are enough to tell how its decoded text ends.
_TAIL = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised conversation of T tokens.

    Attributes:
        token_ids: int32 [T].
        supervised: bool [T], true where a token of an answer, or its end token, is to be predicted.
        targets: int32 [T], the token to predict: `token_ids`, except where the template writes no end token after an
            earlier answer.
        apart: turns whose answers can't be trained in this sequence, because the template renders them otherwise once
            later turns follow: see `separate_answers`.
        remarks: `OTHER_PROMPT`, `NO_PROMPT` and `MOVED`, as they apply.
    """

    token_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    targets: NDArray[np.int32]
    apart: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer as the template renders it: `prompt`, `text` and `end` follow each other.

    `text` may begin with white space that belongs to it, and `rest` is what the template writes after the end token.
    """

    prompt: str
    text: str
    end: str
    rest: str
    remark: str = ""


@dataclass(frozen=True, eq=False)
class _Chat:
    """The chat template of a tokenizer, and the kind of content that it takes."""

    tokenizer: "PreTrainedTokenizerBase"
    image_token: str
    template: str
    special: Mapping[str, Any]
    typed: bool

    def message(self, turn: Turn) -> Message:
        return _message(turn, self.image_token, self.typed)

    def render(self, record: Record, turns: Sequence[Turn], *, ask: bool = False) -> str:
        try:
            return render(self.template, [self.message(turn) for turn in turns], self.special, ask=ask)
        except TemplateFaultError as error:
            raise DataError(
                f"{record}: the chat template of {_name(self.tokenizer)} refuses the turns "
                f"{', '.join(turn.role for turn in turns)} ({error}). Leave out the turn that it refuses, or take the "
                "template of the checkpoint's source."
            ) from error

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def after(self, prompt: str, prompt_ids: Sequence[int], text: str) -> list[int] | None:
        """Token ids of a text in the context of a prompt; None if the tokenizer can't write it there.

        Usually the tokens of both together begin with those of the prompt. Where a token spans the border, the text is
        tokenised alone, or after a line break that is then dropped: some tokenizers put a space before every text.
        """
        together = self.ids(prompt + text)
        if together[: len(prompt_ids)] == list(prompt_ids):
            ids = together[len(prompt_ids) :]
            return ids if self._says(prompt_ids, ids, text) or self.decode(ids) == _nfc(text) else None
        line_break, broken = self.ids("\n"), self.ids("\n" + text)
        candidates = [self.ids(text)]
        if broken[: len(line_break)] == line_break:
            candidates.append(broken[len(line_break) :])
        return next((ids for ids in candidates if self._says(prompt_ids, ids, text)), None)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, in NFC: tokenizers may normalise to it."""
        return _nfc(str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if len(ids) else "")

    def _says(self, before: Sequence[int], ids: Sequence[int], text: str) -> bool:
        """Whether tokens that follow others are a text."""
        tail = list(before[-_TAIL:])
        return self.decode([*tail, *ids]) == _nfc(self.decode(tail) + text)


def encode(
    record: Record, tokenizer: "PreTrainedTokenizerBase", image_token_id: int, num_image_tokens: Sequence[int]
) -> Encoded:
    """Renders and tokenises a conversation; each `<image>` becomes as many image tokens as its picture needs.

    The tokens before the last answer are those of the messages before it, rendered with the template's generation
    prompt: what an inference engine asks with. Where the whole conversation, rendered, begins with this text, the rest
    is the answer, tokenised in its context. An earlier answer is supervised where the sequence up to it is what would
    be asked. If the tokenizer adds a beginning-of-sequence token and the template does not, it is put first. If the
    template does not end answers with a special token, the tokenizer's end token does.

    Args:
        record: the conversation.
        tokenizer: tokenizer whose chat template takes typed content (`{"type": "image"}`) or plain strings.
        image_token_id: id of the token that stands for pictures, from the checkpoint's config.
        num_image_tokens: number of such tokens of each of the record's P pictures.

    Returns:
        The T tokens, image tokens included.

    Raises:
        ConfigError: the tokenizer has no token for pictures, or its template does not render them.
        DataError: the template or the tokenizer changes or refuses this record, or it has nothing to learn.
    """
    chat = _chat_of(tokenizer, image_token_id)
    _refuse_special_text(record, chat)
    learned = [number for number, turn in enumerate(record.turns) if turn.role == "assistant" and turn.learn]
    if not learned:
        raise DataError(f"{record}: no supervised tokens, so nothing to learn. Give it an assistant turn.")
    *earlier, last = learned
    answer = _rendered_answer(record, last, chat)
    _refuse_lost_text(record, last, answer, chat)

    begin = _beginning(answer.prompt, tokenizer)
    prompt, text, end = _answer_ids(record, answer, begin, chat)
    token_ids = np.asarray([*prompt, *text, *end, *chat.ids(answer.rest)], np.int32)
    supervised, targets, apart = np.zeros(len(token_ids), bool), token_ids.copy(), []
    supervised[len(prompt) : len(prompt) + len(text) + len(end)] = True
    for number in earlier:
        before, said, stop = _answer_ids(record, _rendered_answer(record, number, chat), begin, chat)
        border = len(before) + len(said)
        if token_ids[:border].tolist() != [*before, *said] or len(stop) != 1:
            apart.append(number)
            continue
        supervised[len(before) : border + 1] = True
        targets[border] = stop[0]
    encoded = Encoded(token_ids, supervised, targets, tuple(apart), _remarks(record, last, answer, chat))
    return _expand_images(record, encoded, image_token_id, num_image_tokens)


def answer_ids(record: Record, text: str, tokenizer: "PreTrainedTokenizerBase", image_token_id: int) -> list[int]:
    """Token ids of another last answer to a record, without its end token, in the context of the prompt."""
    turns = (*record.turns[:-1], replace(record.turns[-1], text=text, parts=()))
    chat = _chat_of(tokenizer, image_token_id)
    other = replace(record, turns=turns)
    answer = _rendered_answer(other, len(turns) - 1, chat)
    return _answer_ids(other, answer, _beginning(answer.prompt, tokenizer), chat)[1]


def prompt_messages(record: Record, tokenizer: "PreTrainedTokenizerBase", image_token_id: int) -> list[Message]:
    """The turns before the last answer as the chat template takes them."""
    chat = _chat_of(tokenizer, image_token_id)
    return [chat.message(turn) for turn in record.turns[:-1]]


def prompt_text(record: Record, tokenizer: "PreTrainedTokenizerBase", image_token_id: int) -> str:
    """The text before the last answer, as it is trained and asked; each picture is one token."""
    return _rendered_answer(record, len(record.turns) - 1, _chat_of(tokenizer, image_token_id)).prompt


def separate_answers(record: Record, apart: Sequence[int]) -> tuple[Record, ...]:
    """The conversations in which all answers of a record can be trained.

    Args:
        record: the conversation.
        apart: its turns whose answers can't be trained beside the last one: see `Encoded.apart`.

    Returns:
        For each of these turns the conversation up to it, in which only it is trained, and then the whole one, in which
        they are not.
    """
    records = []
    for number in apart:
        turns = [replace(turn, learn=False) for turn in record.turns[:number]] + [record.turns[number]]
        pictures = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
        images, digests = record.images[:pictures], record.digests[:pictures]
        name = f"{record.id} (turn {number})"
        records.append(replace(record, id=name, turns=tuple(turns), images=images, digests=digests, options=()))
    kept = [replace(turn, learn=turn.learn and number not in apart) for number, turn in enumerate(record.turns)]
    return (*records, replace(record, turns=tuple(kept)))


def _answer_ids(
    record: Record, answer: _Answer, begin: list[int], chat: _Chat
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of prompt, answer and end token."""
    prompt = chat.ids(answer.prompt)
    text = chat.after(answer.prompt, prompt, answer.text)
    if text is None:
        raise DataError(
            f"{record}: tokenizer {_name(chat.tokenizer)} turns the answer {answer.text.strip()!r} into "
            f"{chat.decode(chat.ids(answer.text))!r}. Use the checkpoint's own tokenizer, or words that it knows."
        )
    return begin + prompt, text, chat.ids(answer.end)


def _beginning(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The beginning-of-sequence token, if the tokenizer adds it at inference and the template does not."""
    before = tokenizer.bos_token_id
    if before is None or tokenizer.encode("")[:1] != [before]:
        return []
    return [] if prompt.startswith(str(tokenizer.bos_token)) else [int(before)]


def _rendered_answer(record: Record, number: int, chat: _Chat) -> _Answer:
    """The answer of a turn, cut out of the rendered conversation."""
    before = record.turns[:number]
    asked, plain = chat.render(record, before, ask=True), chat.render(record, before)
    whole = chat.render(record, record.turns[: number + 1])
    body = whole.rstrip()
    end_in_text = next((token for token in chat.tokenizer.all_special_tokens if body.endswith(token)), "")
    end = end_in_text or str(chat.tokenizer.eos_token or "")
    text = record.turns[number].text
    before_end = body.removesuffix(end_in_text)
    if not before_end.endswith(text):  # some templates strip white space
        text = text.strip()
    if not (end and before_end.endswith(text)):
        raise DataError(
            f"{record}: turn {number}: the chat template of {_name(chat.tokenizer)} renders the answer as "
            f"{whole[len(plain) :] if whole.startswith(plain) else whole!r}; the answer itself and then a special end "
            "token are expected. Use the checkpoint's own template."
        )
    header, rest = before_end.removesuffix(text), whole[len(body) :]
    if header.startswith(asked) and (asked != plain or not header[len(asked) :].strip()):
        return _Answer(asked, header[len(asked) :] + text, end, rest)
    if asked == plain:
        return _Answer(header, text, end, rest, NO_PROMPT)
    return _Answer(asked, text, end, rest, OTHER_PROMPT)


def _refuse_lost_text(record: Record, number: int, answer: _Answer, chat: _Chat) -> None:
    """Refuses a conversation of which the template leaves out a turn before the last answer."""
    for other, turn in enumerate(record.turns[:number]):
        if not all(part.strip() in answer.prompt for part in _parts(turn) if part != IMAGE_PLACEHOLDER):
            raise DataError(
                f"{record}: the chat template of {_name(chat.tokenizer)} leaves out the text of turn {other} "
                f"({turn.role}). Move it into a turn that the template shows."
            )


def _remarks(record: Record, number: int, answer: _Answer, chat: _Chat) -> tuple[str, ...]:
    """What is odd about the prompt of a conversation."""
    position, moved = 0, False
    for turn in record.turns[:number]:
        for part in _parts(turn):
            wanted = chat.image_token if part == IMAGE_PLACEHOLDER else part.strip()
            found = answer.prompt.find(wanted, position)
            moved |= found < 0
            position = max(position, found + len(wanted))
    return (*([answer.remark] if answer.remark else []), *([MOVED] if moved else []))


def _expand_images(record: Record, encoded: Encoded, image_token_id: int, num_image_tokens: Sequence[int]) -> Encoded:
    repeats = np.ones(len(encoded.token_ids), dtype=np.int64)
    image_positions = np.flatnonzero(encoded.token_ids == image_token_id)
    if len(image_positions) != len(num_image_tokens):
        raise DataError(
            f"{record}: {len(image_positions)} image tokens for {len(num_image_tokens)} pictures. Write "
            f"{IMAGE_PLACEHOLDER} once for each picture, in a user turn."
        )
    repeats[image_positions] = num_image_tokens
    return replace(
        encoded,
        token_ids=np.repeat(encoded.token_ids, repeats),
        supervised=np.repeat(encoded.supervised, repeats),
        targets=np.repeat(encoded.targets, repeats),
    )


def _message(turn: Turn, image_token: str, typed: bool) -> Message:
    if not typed:
        return {"role": turn.role, "content": turn.text.replace(IMAGE_PLACEHOLDER, image_token)}
    content = [
        {"type": "image"} if part == IMAGE_PLACEHOLDER else {"type": "text", "text": part} for part in _parts(turn)
    ]
    return {"role": turn.role, "content": content}


def _parts(turn: Turn) -> list[str]:
    """The typed parts of a turn: texts, and `<image>` for pictures."""
    parts = list(turn.parts)
    if not parts:
        for number, text in enumerate(turn.text.split(IMAGE_PLACEHOLDER)):
            # The template sets a picture off from the text.
            parts += [IMAGE_PLACEHOLDER, text.removeprefix("\r").removeprefix("\n")] if number else [text]
    return [part for part in parts if part]


def _chat_of(tokenizer: "PreTrainedTokenizerBase", image_token_id: int) -> _Chat:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    image_token = _image_token(tokenizer, image_token_id)
    return _cached_chat(tokenizer, image_token, str(tokenizer.get_chat_template()), tuple(special.items()))


@lru_cache(maxsize=8)
def _cached_chat(
    tokenizer: "PreTrainedTokenizerBase", image_token: str, template: str, special: tuple[tuple[str, str], ...]
) -> _Chat:
    """The chat with the kind of content that its template takes.

    A template for strings either fails on typed content or prints the list.
    """
    probe = Turn("user", f"{IMAGE_PLACEHOLDER}\nPROBE")
    problem = ""
    for typed in (True, False):
        try:
            text = render(template, [_message(probe, image_token, typed)], dict(special), ask=True)
        except TemplateFaultError as error:
            problem = f" ({error})"
            continue
        if "PROBE" in text and text.count(image_token) == 1 and "'type'" not in text:
            return _Chat(tokenizer, image_token, template, dict(special), typed)
    raise ConfigError(
        f"tokenizer {_name(tokenizer)}: its chat template shows a user turn with one picture neither from typed "
        f"content nor from text with {image_token!r}{problem}. Use the chat template of the checkpoint's source."
    )


def _refuse_special_text(record: Record, chat: _Chat) -> None:
    """Refuses texts that the tokenizer would read as the template's own tokens, or as pictures.

    Other special tokens, such as those of boxes and objects, are vocabulary that texts may use.
    """
    control = [
        token
        for token in chat.tokenizer.all_special_tokens
        if token in chat.template or token in chat.special.values() or _PICTURE_TOKEN.search(token)
    ]
    for number, turn in enumerate(record.turns):
        text = turn.text.replace(IMAGE_PLACEHOLDER, "") if turn.role == "user" else turn.text
        for token in control:
            if token in text:
                raise DataError(
                    f"{record}: turn {number} contains {token!r}, which tokenizer {_name(chat.tokenizer)} reads as a "
                    "control token, not as text. Remove it from the text."
                )


def _image_token(tokenizer: "PreTrainedTokenizerBase", image_token_id: int) -> str:
    token = tokenizer.convert_ids_to_tokens(image_token_id) if image_token_id < len(tokenizer) else None
    if token is None:
        raise ConfigError(
            f"tokenizer {_name(tokenizer)} has {len(tokenizer)} tokens, but the config's image token is "
            f"{image_token_id}. Take the tokenizer and config.json from the same checkpoint."
        )
    return str(token)


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
