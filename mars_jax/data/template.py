"""Tokenises conversations, with a mask of the supervised tokens: the assistant's text and its end token.

Conversations are rendered by the checkpoint's chat template. Padding and pictures are handled in `examples`.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from mars_jax.data.formats.base import IMAGE_PLACEHOLDER, Turn
from mars_jax.data.records import Record
from mars_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""A turn as in chat templates: `role`, and `content`, a text or typed parts (which transformers' types lack)."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised conversation of T tokens.

    Attributes:
        token_ids: int32 [T].
        supervised: bool [T], true for the tokens of the answers and for their end tokens.
    """

    token_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Loads a checkpoint's tokenizer, with the chat template of its processor where the folder has one.

    Args:
        directory: the checkpoint's folder.

    Raises:
        ConfigError: the tokenizer cannot be read, or has no chat template or no padding token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory}: no usable tokenizer ({error}). Copy tokenizer.json and tokenizer_config.json from the "
            "checkpoint's source."
        ) from error
    # The tokenizer reads chat_template.jinja itself; older checkpoints keep the multimodal template only in these.
    for name in ("processor_config.json", "chat_template.json"):
        file = directory / name
        if file.is_file() and not (directory / "chat_template.jinja").is_file():
            tokenizer.chat_template = json.loads(file.read_text()).get("chat_template") or tokenizer.chat_template
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{directory}: the tokenizer has no chat template. Copy chat_template.jinja (or chat_template.json) from "
            "the checkpoint's source."
        )
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"{directory}: the tokenizer has no padding token. Set pad_token in tokenizer_config.json.")
    return tokenizer


def encode(
    record: Record, tokenizer: "PreTrainedTokenizerBase", image_token_id: int, num_image_tokens: Sequence[int]
) -> Encoded:
    """Renders and tokenises a conversation; each `<image>` becomes as many image tokens as its picture needs.

    Prompts and answers are tokenised separately, as at inference, so that no token spans the border between them. If
    the tokenizer adds a beginning-of-sequence token and the template does not, it is put first. If the template does
    not end answers with a special token, the tokenizer's end token is appended.

    Args:
        record: the conversation.
        tokenizer: tokenizer whose chat template takes typed content (`{"type": "image"}`) or plain strings.
        image_token_id: id of the token that stands for pictures, from the checkpoint's config.
        num_image_tokens: number of such tokens of each of the record's P pictures.

    Returns:
        The T tokens, image tokens included.

    Raises:
        ConfigError: the tokenizer has no token for pictures, or its template does not render them.
        DataError: the template or the tokenizer changes or refuses this record.
    """
    image_token = _image_token(tokenizer, image_token_id)
    _refuse_special_text(record, tokenizer)
    typed = _takes_typed_content(tokenizer, image_token)
    messages = [_message(turn, image_token, typed) for turn in record.turns]

    token_ids = _beginning(record, messages, tokenizer)
    supervised = [False] * len(token_ids)
    for text, learn in _pieces(record, messages, tokenizer):
        piece = tokenizer.encode(text, add_special_tokens=False) if text else []
        # Tokenizers may normalise to NFC, so compare in that form.
        if learn and _nfc(str(tokenizer.decode(piece, clean_up_tokenization_spaces=False))) != _nfc(text):
            raise DataError(
                f"{record}: tokenizer {_name(tokenizer)} turns the answer {text!r} into "
                f"{tokenizer.decode(piece)!r}. Use the checkpoint's own tokenizer, or words that it knows."
            )
        token_ids.extend(piece)
        supervised.extend([learn] * len(piece))
    return _expand_images(record, np.asarray(token_ids), np.asarray(supervised), image_token_id, num_image_tokens)


def _beginning(record: Record, messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The beginning-of-sequence token, if the tokenizer adds it at inference and the template does not."""
    before = tokenizer.bos_token_id
    if before is None or tokenizer.encode("")[:1] != [before]:
        return []
    return [] if _render(record, messages, tokenizer).startswith(str(tokenizer.bos_token)) else [int(before)]


def _pieces(record: Record, messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, bool]]:
    """The rendered conversation cut into (text, learn) pieces; an answer and its end token are two pieces."""
    pieces: list[tuple[str, bool]] = []
    rendered, pending = "", ""
    for number, turn in enumerate(record.turns):
        if turn.role != "assistant":
            continue
        prompt = _render(record, messages[:number], tokenizer)
        whole = _render(record, messages[: number + 1], tokenizer)
        if not (prompt.startswith(rendered) and whole.startswith(prompt)):
            raise DataError(
                f"{record}: turn {number}: the chat template of {_name(tokenizer)} renders earlier turns differently "
                "once later ones are added, so the answer cannot be located. Use a template that only appends."
            )
        lost = [other for other in range(number) if not _contains(prompt, record.turns[other].text)]
        if lost:
            raise DataError(
                f"{record}: the chat template of {_name(tokenizer)} leaves out the text of turn {lost[0]} "
                f"({record.turns[lost[0]].role}). Move it into a turn that the template shows."
            )
        head, answer, end, rest = _split_answer(whole[len(prompt) :], record, number, tokenizer)
        pieces += [(pending + prompt[len(rendered) :] + head, False), (answer, True), (end, True)]
        rendered, pending = whole, rest
    return [*pieces, (pending, False)]


def _contains(prompt: str, text: str) -> bool:
    return all(part.strip() in prompt for part in text.split(IMAGE_PLACEHOLDER))


def _split_answer(
    text: str, record: Record, number: int, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, str, str, str]:
    """Cuts a rendered assistant turn into header, answer, end token, and what follows it."""
    body = text.rstrip()
    end_in_text = next((token for token in tokenizer.all_special_tokens if body.endswith(token)), "")
    end = end_in_text or str(tokenizer.eos_token or "")
    answer = record.turns[number].text
    before_end = body.removesuffix(end_in_text)
    if not before_end.endswith(answer):  # some templates strip white space
        answer = answer.strip()
    if not (end and before_end.endswith(answer)):
        raise DataError(
            f"{record}: turn {number}: the chat template of {_name(tokenizer)} renders the answer as {text!r}; the "
            "answer itself and then a special end token are expected. Use the checkpoint's own template."
        )
    return before_end.removesuffix(answer), answer, end, text[len(body) :]


def _expand_images(
    record: Record,
    token_ids: NDArray[np.int64],
    supervised: NDArray[np.bool_],
    image_token_id: int,
    num_image_tokens: Sequence[int],
) -> Encoded:
    repeats = np.ones(len(token_ids), dtype=np.int64)
    image_positions = np.flatnonzero(token_ids == image_token_id)
    if len(image_positions) != len(num_image_tokens):
        raise DataError(
            f"{record}: {len(image_positions)} image tokens for {len(num_image_tokens)} pictures. Write "
            f"{IMAGE_PLACEHOLDER} once for each picture, in a user turn."
        )
    repeats[image_positions] = num_image_tokens
    return Encoded(np.repeat(token_ids, repeats).astype(np.int32), np.repeat(supervised, repeats).astype(bool))


def _message(turn: Turn, image_token: str, typed: bool) -> Message:
    if not typed:
        return {"role": turn.role, "content": turn.text.replace(IMAGE_PLACEHOLDER, image_token)}
    content: list[dict[str, str]] = []
    for number, text in enumerate(turn.text.split(IMAGE_PLACEHOLDER)):
        if number > 0:
            content.append({"type": "image"})
            text = text.removeprefix("\n")  # the template sets the picture off from the text
        if text:
            content.append({"type": "text", "text": text})
    return {"role": turn.role, "content": content}


def _takes_typed_content(tokenizer: "PreTrainedTokenizerBase", image_token: str) -> bool:
    """Whether the template renders typed content; one for strings either fails on it or prints the list."""
    probe = Turn("user", f"{IMAGE_PLACEHOLDER}\nPROBE")
    for typed in (True, False):
        try:
            text = str(tokenizer.apply_chat_template([_message(probe, image_token, typed)], tokenize=False))
        except (TypeError, jinja2.TemplateError):
            continue
        if "PROBE" in text and text.count(image_token) == 1 and "'type'" not in text:
            return typed
    raise ConfigError(
        f"tokenizer {_name(tokenizer)}: its chat template shows a user turn with one picture neither from typed "
        f"content nor from text with {image_token!r}. Use the chat template of the checkpoint's source."
    )


def _render(record: Record, messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TypeError, jinja2.TemplateError) as error:
        raise DataError(
            f"{record}: the chat template of {_name(tokenizer)} refuses the turns "
            f"{', '.join(message['role'] for message in messages)} ({error}). Leave out the turn that it refuses."
        ) from error


def _refuse_special_text(record: Record, tokenizer: "PreTrainedTokenizerBase") -> None:
    for number, turn in enumerate(record.turns):
        text = turn.text.replace(IMAGE_PLACEHOLDER, "") if turn.role == "user" else turn.text
        for token in tokenizer.all_special_tokens:
            if token in text:
                raise DataError(
                    f"{record}: turn {number} contains {token!r}, which tokenizer {_name(tokenizer)} reads as a "
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
