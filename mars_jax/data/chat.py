"""The chat template of a tokenizer: the content that it takes, its tokens, and the tokens of texts in their context."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mars_jax.data.chat_template import Message, TemplateFaultError, render
from mars_jax.data.formats.base import IMAGE_PLACEHOLDER, ROLES, Role, Turn
from mars_jax.data.records import Record
from mars_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Special tokens that stand for pictures, whatever the template does with them.
_PICTURE_TOKEN = re.compile(r"image|img|video|vision|audio|patch", re.IGNORECASE)
# Tokens of the prompt that are enough to know how its decoded text ends.
_TAIL = 16
_PROBE = "PROBE"


@dataclass(frozen=True, eq=False)
class Chat:
    """The chat template of a tokenizer.

    Attributes:
        tokenizer: the tokenizer.
        image_token_id: id of the token that stands for a picture, from the checkpoint's config.
        image_token: its text.
        template: the text of the template.
        special: special tokens by name, as templates read them.
        typed: roles whose content the template takes as typed parts; that of the others is a text.
        control: tokens of the template and of pictures, which texts may not hold. Other special tokens, such as those
            of boxes and objects, are vocabulary.
        ends: tokens that may end an answer.
        begins: whether the tokenizer adds its beginning-of-sequence token to texts.
    """

    tokenizer: "PreTrainedTokenizerBase"
    image_token_id: int
    image_token: str
    template: str
    special: Mapping[str, Any]
    typed: frozenset[Role] = frozenset()
    control: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    begins: bool = False

    @property
    def end(self) -> str:
        """The tokenizer's end token, or ""."""
        return str(self.tokenizer.eos_token or "")

    @property
    def name(self) -> str:
        """The tokenizer's name, for messages."""
        return tokenizer_name(self.tokenizer)

    def message(self, turn: Turn) -> Message:
        """A turn as the template takes it."""
        if turn.role not in self.typed:
            return {"role": turn.role, "content": turn.text.replace(IMAGE_PLACEHOLDER, self.image_token)}
        content = [
            {"type": "image"} if part == IMAGE_PLACEHOLDER else {"type": "text", "text": part} for part in parts(turn)
        ]
        return {"role": turn.role, "content": content}

    def render_turns(self, turns: Sequence[Turn], *, ask: bool) -> str:
        """The text of some turns, with or without the generation prompt.

        Raises:
            TemplateFaultError: the template refuses them.
        """
        return render(self.template, [self.message(turn) for turn in turns], self.special, ask=ask)

    def render(self, record: Record, turns: Sequence[Turn], *, ask: bool = False) -> str:
        """The text of some turns of a record.

        Raises:
            DataError: the template refuses them.
        """
        try:
            return self.render_turns(turns, ask=ask)
        except TemplateFaultError as error:
            roles = ", ".join(turn.role for turn in turns[:10])
            raise DataError(
                f"{record}: the chat template of {self.name} refuses the turns {roles} ({error}). Remove the turn that "
                "it refuses, or take the template of the checkpoint's source."
            ) from error

    def beginning(self, prompt: str) -> list[int]:
        """The beginning-of-sequence token, if the tokenizer adds it at inference and the template does not."""
        if not self.begins or prompt.startswith(str(self.tokenizer.bos_token)):
            return []
        return [int(self.tokenizer.bos_token_id)]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text alone."""
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def after(self, prompt: str, prompt_ids: Sequence[int], text: str) -> list[int] | None:
        """Token ids of a text in the context of a prompt; None if the tokenizer can't write it there.

        Usually the tokens of both together begin with those of the prompt. Where a token spans the border, the text is
        tokenised alone, or after a line break that is then dropped: some tokenizers put a space before every text.
        """
        together = self.ids(prompt + text)
        if together[: len(prompt_ids)] == list(prompt_ids):
            ids = together[len(prompt_ids) :]
            return ids if self._decodes_to(prompt_ids, ids, text) or self.decode(ids) == nfc(text) else None
        line_break, broken = self.ids("\n"), self.ids("\n" + text)
        candidates = [self.ids(text)]
        if broken[: len(line_break)] == line_break:
            candidates.append(broken[len(line_break) :])
        return next((ids for ids in candidates if self._decodes_to(prompt_ids, ids, text)), None)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, in NFC: tokenizers may normalise to it."""
        return nfc(str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if len(ids) else "")

    def _decodes_to(self, before: Sequence[int], ids: Sequence[int], text: str) -> bool:
        """Whether tokens that follow others are a text."""
        tail = list(before[-_TAIL:])
        return self.decode([*tail, *ids]) == nfc(self.decode(tail) + text)


def chat_of(tokenizer: "PreTrainedTokenizerBase", image_token_id: int) -> Chat:
    """The chat template of a tokenizer, with the kind of content that it takes.

    Some templates take typed parts from users alone, so each role is tried.

    Args:
        tokenizer: whose chat template takes typed content (`{"type": "image"}`) or plain strings.
        image_token_id: id of the token that stands for pictures, from the checkpoint's config.

    Raises:
        ConfigError: the tokenizer has no token for pictures, or its template does not render them.
    """
    chat = Chat(
        tokenizer,
        image_token_id,
        _image_token(tokenizer, image_token_id),
        str(tokenizer.get_chat_template()),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        frozenset(ROLES.values()),
        begins=tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id],
    )
    plain, texts = Turn("user", "?"), replace(chat, typed=frozenset())
    question = Turn("user", f"{IMAGE_PLACEHOLDER}\n{_PROBE}")
    if not _takes(chat, [question]):
        chat = texts
    if not _takes(chat, [question]):
        raise ConfigError(
            f"tokenizer {chat.name}: its chat template shows a user turn with one picture neither from typed content "
            f"nor from text with {chat.image_token!r}{_problem(chat, [question])}. Use the chat template of the "
            "checkpoint's source."
        )
    for turns, role in (([plain, Turn("assistant", _PROBE)], "assistant"), ([Turn("system", _PROBE), plain], "system")):
        narrower = replace(chat, typed=chat.typed - {role})
        if not _takes(chat, turns) and _takes(narrower, turns):
            chat = narrower
    added = tokenizer.added_tokens_decoder.values()
    special_tokens = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    # A template may make its tokens of parts: "<|" + role + "|>".
    written = chat.template + _rendered(chat, [question]) + _rendered(chat, [plain, Turn("assistant", _PROBE), plain])
    control = [
        token
        for token in sorted(special_tokens)
        if token in written or token in chat.special.values() or _PICTURE_TOKEN.search(token)
    ]
    ends = special_tokens | {token.content for token in added if token.content in written}
    return replace(chat, control=tuple(control), ends=tuple(sorted(ends, key=len, reverse=True)))


def parts(turn: Turn) -> list[str]:
    """The typed parts of a turn: texts, and `<image>` for pictures."""
    found = list(turn.parts)
    if not found:
        for number, text in enumerate(turn.text.split(IMAGE_PLACEHOLDER)):
            # The template sets a picture off from the text.
            found += [IMAGE_PLACEHOLDER, text.removeprefix("\r").removeprefix("\n")] if number else [text]
    return [part for part in found if part]


def tokenizer_name(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The name of a tokenizer, for messages."""
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


def nfc(text: str) -> str:
    """A text in Unicode's form NFC."""
    return unicodedata.normalize("NFC", text)


def _takes(chat: Chat, turns: Sequence[Turn]) -> bool:
    """Whether the template shows turns as they are: templates for texts fail on typed parts or print the list."""
    text = _rendered(chat, turns)
    pictures = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    return _PROBE in text and text.count(chat.image_token) == pictures and not re.search(r"""['"]type['"]:""", text)


def _rendered(chat: Chat, turns: Sequence[Turn]) -> str:
    """The text of turns, or "" where the template refuses them."""
    try:
        return chat.render_turns(turns, ask=True)
    except TemplateFaultError:
        return ""


def _problem(chat: Chat, turns: Sequence[Turn]) -> str:
    """Why the template refuses turns, in brackets, or ""."""
    try:
        chat.render_turns(turns, ask=True)
    except TemplateFaultError as error:
        return f" ({error})"
    return ""


def _image_token(tokenizer: "PreTrainedTokenizerBase", image_token_id: int) -> str:
    token = tokenizer.convert_ids_to_tokens(image_token_id) if image_token_id < len(tokenizer) else None
    if token is None:
        raise ConfigError(
            f"tokenizer {tokenizer_name(tokenizer)} has {len(tokenizer)} tokens, but the config's image token is "
            f"{image_token_id}. Take the tokenizer and config.json from the same checkpoint."
        )
    return str(token)
