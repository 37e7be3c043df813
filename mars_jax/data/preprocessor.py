"""Tokenizer and image processor of a checkpoint."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mars_jax.data.chat import Chat, chat_of
from mars_jax.data.tokenizer import load_tokenizer
from mars_jax.hub.read import read_config
from mars_jax.models.families.pictures import Pictures
from mars_jax.models.families.registry import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Preprocessor:
    """Tokenizer and image processor of a checkpoint, with the settings that turn records into arrays.

    Attributes:
        tokenizer: the tokenizer, with its chat template.
        pictures: converts pictures to tiles and image tokens.
        encoder_inputs: the arrays of an example that only the vision encoder reads.
        image_token_id: the token that stands for a feature of a picture.
        num_rows: rows of the embedding; token ids are below.
        around_pictures: ids of the tokens before and after the image tokens of a picture, where the family has such.
        axes: axes of a rotary position: 1, or 3 (time, row, column).
    """

    tokenizer: "PreTrainedTokenizerBase"
    pictures: Pictures
    encoder_inputs: tuple[str, ...]
    image_token_id: int
    num_rows: int
    around_pictures: tuple[int, int] | None = None
    axes: int = 1

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer's chat template.

        Raises:
            ConfigError: the tokenizer has no token for pictures, or its template does not render them.
        """
        return chat_of(self.tokenizer, self.image_token_id)

    @property
    def pad_token_id(self) -> int:
        """The token that fills rows up: the tokenizer's, or 0 where it has no row; padding is masked."""
        pad = self.tokenizer.pad_token_id
        return pad if pad < self.num_rows else 0


def load_preprocessor(directory: Path, max_pixels: int | None = None) -> Preprocessor:
    """Reads config.json, the tokenizer and the image processor of a checkpoint folder.

    Args:
        directory: the folder.
        max_pixels: limit above which pictures are scaled down; None: the limit in the processor's file.

    Raises:
        ConfigError: a file is missing or unusable, or the family refuses a limit of pixels.
    """
    config = read_config(directory)
    family = family_of(config)
    return Preprocessor(
        tokenizer=load_tokenizer(directory),
        pictures=family.load_pictures(directory, config, max_pixels),
        encoder_inputs=family.encoder_inputs,
        image_token_id=config.image_token_id,
        num_rows=config.text.vocab_size,
        around_pictures=config.around_pictures,
        axes=len(config.text.mrope_section or (1,)),
    )
