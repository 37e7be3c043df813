"""The tokens that end an answer, by the generation settings of a checkpoint and by its tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mars_jax.errors import ConfigError
from mars_jax.models.families.hf_json import TokenId
from mars_jax.runtime.json_object import Settings, checked, read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_FILE = "generation_config.json"


class _Generation(Settings):
    eos_token_id: TokenId | Annotated[list[TokenId], Field(max_length=1024)] | None = None


def load_end_tokens(directory: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The token ids that end an answer: those in generation_config.json, if it exists, and the tokenizer's end token.

    The tokenizer's end token is always included, because training ends answers with it.

    Raises:
        ConfigError: the file cannot be read or holds no token ids, or there is no end token at all.
    """
    path = directory / GENERATION_FILE
    stored = checked(_Generation, read_json_object(path), str(path)).eos_token_id if path.is_file() else None
    ids = stored if isinstance(stored, list) else [stored]
    tokens = {token for token in (*ids, tokenizer.eos_token_id) if token is not None}
    if not tokens:
        raise ConfigError(
            f"{directory}: neither {GENERATION_FILE} nor the tokenizer has a token that ends an answer. Set eos_token "
            "in tokenizer_config.json."
        )
    return tuple(sorted(tokens))
