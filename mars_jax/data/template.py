"""Tokenises conversations, with a mask of the supervised tokens: the assistant's text and its end token.

Conversations are rendered by the checkpoint's chat template. What is trained is what is asked: before an answer stands
the generation prompt of the template, as inference engines render it. Padding and pictures are handled in `examples`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mars_jax.data.chat import Chat, parts
from mars_jax.data.chat_template import Message
from mars_jax.data.formats.base import IMAGE_PLACEHOLDER, learned
from mars_jax.data.records import Record
from mars_jax.errors import DataError
from mars_jax.runtime.text import short

# Remarks on a conversation, counted over a data set. `{}` stands for the number of samples.
OTHER_PROMPT = (
    "the chat template renders answers behind another text than its own generation prompt in {} samples; they are "
    "trained and asked behind the generation prompt, as inference engines ask"
)
NO_PROMPT = (
    "the chat template renders no generation prompt in {} samples (add_generation_prompt changes nothing); answers are "
    "trained behind the text that it writes before them, which an inference engine may not write"
)
TEXT_BEFORE = (
    "the chat template writes text before the answer that its generation prompt lacks (such as empty reasoning) in {} "
    "samples; it is trained as the beginning of the answer, and scored as such"
)
DATED = (
    "the chat template writes the date into the prompts of {} samples; on another day they have other tokens, also "
    "in a run that goes on"
)
MOVED = "the chat template moves pictures before the text, or out of the order of the text, in {} samples"

_JOINED = "It has several typed parts, which templates join in different ways: make them one. "
# The function that gives the date to templates.
_CLOCK = "strftime_now"
# Characters that a template may write after an answer.
_LONGEST_END = 1000


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
        remarks: `OTHER_PROMPT`, `NO_PROMPT`, `TEXT_BEFORE`, `DATED` and `MOVED`, as they apply.
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


def encode(record: Record, chat: Chat, num_image_tokens: Sequence[int]) -> Encoded:
    """Renders and tokenises a conversation; each `<image>` becomes as many image tokens as its picture needs.

    The tokens before the last answer are those of the messages before it, rendered with the template's generation
    prompt: what an inference engine asks with. Where the whole conversation, rendered, begins with this text, the rest
    is the answer, tokenised in its context. An earlier answer is supervised where the sequence up to it is what would
    be asked. If the tokenizer adds a beginning-of-sequence token and the template does not, it is put first. If the
    template does not end answers with a special token, the tokenizer's end token does.

    Args:
        record: the conversation.
        chat: the tokenizer's chat template.
        num_image_tokens: number of image tokens of each of the record's P pictures.

    Returns:
        The T tokens, image tokens included.

    Raises:
        DataError: the template or the tokenizer changes or refuses this record, or it has nothing to learn.
    """
    _refuse_special_text(record, chat)
    answers = learned(record.turns)
    if not answers:
        raise DataError(f"{record}: no supervised tokens, so nothing to learn. Give it an assistant turn.")
    *earlier, last = answers
    answer = _rendered_answer(record, last, chat)
    _refuse_lost_text(record, last, answer, chat)

    begin = chat.beginning(answer.prompt)
    prompt, text, end = _answer_ids(record, answer, begin, chat)
    token_ids = np.asarray([*prompt, *text, *end, *chat.ids(answer.rest)], np.int32)
    supervised, targets, apart = np.zeros(len(token_ids), bool), token_ids.copy(), []
    supervised[len(prompt) : len(prompt) + len(text) + len(end)] = True
    for number in earlier:
        before, reply, stop = _answer_ids(record, _rendered_answer(record, number, chat), begin, chat)
        border = len(before) + len(reply)
        if token_ids[:border].tolist() != [*before, *reply] or len(stop) != 1:
            apart.append(number)
            continue
        supervised[len(before) : border + 1] = True
        targets[border] = stop[0]
    encoded = Encoded(token_ids, supervised, targets, tuple(apart), _remarks(record, last, answer, chat))
    return _expand_images(record, encoded, chat.image_token_id, num_image_tokens)


def answer_ids(record: Record, text: str, chat: Chat) -> list[int]:
    """Token ids of another last answer to a record, without its end token, in the context of the prompt."""
    turns = (*record.turns[:-1], replace(record.turns[-1], text=text, parts=()))
    other = replace(record, turns=turns)
    answer = _rendered_answer(other, len(turns) - 1, chat)
    return _answer_ids(other, answer, chat.beginning(answer.prompt), chat)[1]


def prompt_messages(record: Record, chat: Chat) -> list[Message]:
    """The turns before the last answer as the chat template takes them."""
    return [chat.message(turn) for turn in record.turns[:-1]]


def prompt_text(record: Record, chat: Chat) -> str:
    """The text before the last answer, as it is trained and asked; each picture is one token."""
    return _rendered_answer(record, len(record.turns) - 1, chat).prompt


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
    record: Record, answer: _Answer, begin: list[int], chat: Chat
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of prompt, answer and end token."""
    prompt = chat.ids(answer.prompt)
    text = chat.after(answer.prompt, prompt, answer.text)
    if text is None:
        raise DataError(
            f"{record}: tokenizer {chat.name} turns the answer {short(answer.text)} into "
            f"{short(chat.decode(chat.ids(answer.text)))}. Use the checkpoint's own tokenizer, or words that it knows."
        )
    return begin + prompt, text, chat.ids(answer.end)


def _rendered_answer(record: Record, number: int, chat: Chat) -> _Answer:
    """The answer of a turn, cut out of the rendered conversation."""
    before, text = record.turns[:number], record.turns[number].text
    asked = chat.render(record, before, ask=True)
    whole = chat.render(record, record.turns[: number + 1])
    begins = whole.startswith(asked)
    found = _cut(whole, len(asked) if begins else 0, text, chat)
    if found is None or not found[2]:
        seen = whole[len(asked) :] if begins else whole
        raise DataError(
            f"{record}: turn {number}: the chat template of {chat.name} renders the answer as {short(seen)}; the "
            "answer itself and then a special end token are expected. "
            f"{_JOINED if len(record.turns[number].parts) > 1 else ''}Write the answer as the template shows it, or "
            "use the checkpoint's own template."
        )
    header, text, end, rest = found
    if not begins:
        space = header[len(header.rstrip()) :] if asked == asked.rstrip() else ""
        return _Answer(asked, space + text, end, rest, OTHER_PROMPT)
    lead = header[len(asked) :]
    if not lead.strip():
        return _Answer(asked, lead + text, end, rest)
    if asked == chat.render(record, before):
        return _Answer(header, text, end, rest, NO_PROMPT)
    return _Answer(asked, lead + text, end, rest, TEXT_BEFORE)


def _cut(whole: str, start: int, text: str, chat: Chat) -> tuple[str, str, str, str] | None:
    """Header, answer, end token and rest of a rendered conversation; None if the answer isn't in it.

    Between the answer and its end token some templates write white space, which is dropped.
    """
    for position, form in _places(whole, start, text):
        after = whole[position + len(form) :]
        body = after.lstrip()
        end = next((token for token in chat.ends if body.startswith(token)), "")
        if end or not body:
            return whole[:position], form, end or chat.end, body.removeprefix(end) if body else after
    return None


def _places(whole: str, start: int, text: str) -> Iterator[tuple[int, str]]:
    """Where an answer may be, as it is or stripped: after the prompt and white space, then from the end backwards."""
    forms = (text, text.strip())
    first = len(whole) - len(whole[start:].lstrip())
    yield from ((place, form) for form in forms for place in range(start, first + 1) if whole.startswith(form, place))
    for form in forms:
        place = whole.rfind(form, start)
        while place >= 0 and len(whole) - place - len(form) <= _LONGEST_END:
            yield place, form
            place = whole.rfind(form, start, place + len(form) - 1)


def _refuse_lost_text(record: Record, number: int, answer: _Answer, chat: Chat) -> None:
    """Refuses a conversation of which the template leaves out a turn before the last answer."""
    for other, turn in enumerate(record.turns[:number]):
        if not all(part.strip() in answer.prompt for part in parts(turn) if part != IMAGE_PLACEHOLDER):
            raise DataError(
                f"{record}: the chat template of {chat.name} leaves out the text of turn {other} "
                f"({turn.role}), or a part of it, such as reasoning. Leave it out yourself, or move it into a turn "
                "that the template shows."
            )


def _remarks(record: Record, number: int, answer: _Answer, chat: Chat) -> tuple[str, ...]:
    """What is odd about the prompt of a conversation."""
    position, moved = 0, False
    for turn in record.turns[:number]:
        for part in parts(turn):
            wanted = chat.image_token if part == IMAGE_PLACEHOLDER else part.strip()
            found = answer.prompt.find(wanted, position)
            moved |= found < 0
            position = max(position, found + len(wanted))
    applies = {answer.remark: True, DATED: _CLOCK in chat.template, MOVED: moved}
    return tuple(remark for remark, does in applies.items() if remark and does)


def _expand_images(record: Record, encoded: Encoded, image_token_id: int, num_image_tokens: Sequence[int]) -> Encoded:
    repeats = np.ones(len(encoded.token_ids), dtype=np.int64)
    image_positions = np.flatnonzero(encoded.token_ids == image_token_id)
    if len(image_positions) != len(num_image_tokens):
        written = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in record.turns)
        way_out = (
            "The chat template adds or drops some: take the template of the checkpoint's source."
            if written == len(num_image_tokens)
            else f"Write {IMAGE_PLACEHOLDER} once for each picture, in a user turn."
        )
        raise DataError(
            f"{record}: {len(image_positions)} image tokens for {len(num_image_tokens)} pictures. {way_out}"
        )
    repeats[image_positions] = num_image_tokens
    return replace(
        encoded,
        token_ids=np.repeat(encoded.token_ids, repeats),
        supervised=np.repeat(encoded.supervised, repeats),
        targets=np.repeat(encoded.targets, repeats),
    )


def _refuse_special_text(record: Record, chat: Chat) -> None:
    """Refuses texts that the tokenizer would read as the template's own tokens, or as pictures."""
    for number, turn in enumerate(record.turns):
        text = turn.text.replace(IMAGE_PLACEHOLDER, "") if turn.role == "user" else turn.text
        for token in chat.control:
            if token in text:
                raise DataError(
                    f"{record}: turn {number} contains {token!r}, which tokenizer {chat.name} reads as a "
                    "control token, not as text. Remove it from the text."
                )
