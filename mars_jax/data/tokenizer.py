"""Loads the tokenizer of a checkpoint with its chat template."""

from pathlib import Path
from typing import TYPE_CHECKING

from mars_jax.errors import ConfigError
from mars_jax.runtime.json_object import read_json_object
from mars_jax.runtime.text import json_type, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNLIMITED = 2**62


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Loads a checkpoint's tokenizer, with the chat template of its processor where the folder has one.

    Code in the folder is never run, whatever its files ask for.

    Args:
        directory: the checkpoint's folder.

    Raises:
        ConfigError: the tokenizer cannot be read, draws its tokens at random, or has no chat template or no
            padding token.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except UnicodeDecodeError as error:
        names = [file.name for file in sorted(directory.iterdir()) if _is_no_utf8(file)]
        raise ConfigError(
            f"{directory}: {', '.join(names) or 'a file of the tokenizer'} is not UTF-8 ({error}). Save it as UTF-8, "
            "or copy it from the checkpoint's source."
        ) from error
    except StrictDataclassError as error:  # of the config, in which the tokenizer's class is looked up
        raise ConfigError(
            f"{directory / 'config.json'}: transformers refuses it: {str(error)[:500]}. Copy config.json from the "
            "checkpoint's source."
        ) from error
    except Exception as error:  # the readers of its files raise anything on damaged ones
        raise ConfigError(
            f"{directory}: no usable tokenizer ({type(error).__name__}: {str(error)[:500]}). Copy tokenizer.json, "
            "tokenizer_config.json and config.json from the checkpoint's source."
        ) from error
    dropout = getattr(tokenizer.backend_tokenizer.model, "dropout", None) if tokenizer.is_fast else None
    if dropout:
        raise ConfigError(
            f"{directory / 'tokenizer.json'}: model.dropout is {dropout:g}, by which the same text gives other tokens "
            "each time. Set it to null."
        )
    # Texts are never cut to this length, and a file may give anything as its value.
    tokenizer.model_max_length = _UNLIMITED
    # The tokenizer reads chat_template.jinja itself; older checkpoints keep the multimodal template only in these.
    template = tokenizer.chat_template
    for name in ("processor_config.json", "chat_template.json"):
        file = directory / name
        if file.is_file() and not (directory / "chat_template.jinja").is_file():
            template = read_json_object(file).get("chat_template") or template
    if template is None:
        raise ConfigError(
            f"{directory}: the tokenizer has no chat template. Copy chat_template.jinja (or chat_template.json) from "
            "the checkpoint's source."
        )
    tokenizer.chat_template = _default_of(template, directory)
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"{directory}: the tokenizer has no padding token. Set pad_token in tokenizer_config.json.")
    return tokenizer


def _is_no_utf8(file: Path) -> bool:
    if file.suffix not in (".json", ".jinja", ".txt") or not file.is_file():
        return False
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return True
    return False


def _default_of(template: object, directory: Path) -> str:
    """The template itself, or the one named "default" of several: {name: text} or [{"name", "template"}]."""
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {str(entry.get("name")): entry.get("template") for entry in named}
    if isinstance(template, dict):
        names = ", ".join(sorted(map(str, template)))
        template = template.get("default")
        if template is None:
            raise ConfigError(
                f"{directory}: there are several chat templates ({names}), none of them named 'default'. Write the one "
                "to use to chat_template.jinja."
            )
    if not isinstance(template, str) or not template.strip():
        seen = "empty" if isinstance(template, str) else f"{short(template)} ({json_type(template)})"
        raise ConfigError(
            f"{directory}: the chat template is {seen}; a text is expected. Copy chat_template.jinja from the "
            "checkpoint's source."
        )
    return template
