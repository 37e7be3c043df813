"""A tiny checkpoint folder without weights (tokenizer, image processor, config) and pictures, for the data tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from mars_jax.data.images import Geometry

IMAGE_TOKEN_ID = 3
PINPOINTS = [[28, 28], [28, 56], [56, 28], [56, 56]]
GEOMETRY = Geometry(28, 14, tuple((h, w) for h, w in PINPOINTS), 9)

TYPED_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRING_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
# The shape of the released LLaVA-OneVision template: pictures first, a space after the role, no newline at the end.
PICTURES_FIRST = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
)


def tokenizer(chat_template: str | None = TYPED_CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ids 0 to 3 for <pad>, <|im_start|>, <|im_end|> and <image>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>", "<image>"],
        show_progress=False,
    )
    bpe.train_from_iterator(["what shape is this? a red square"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<image>"],
        chat_template=chat_template,
    )


def checkpoint(directory: Path, **config: object) -> Path:
    """Writes the folder that `load_preprocessor` reads; keyword arguments change config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(directory)
    processor = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS)
    processor.save_pretrained(directory)
    values = {
        "model_type": "llava_onevision",
        "image_token_index": IMAGE_TOKEN_ID,
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
        **config,
    }
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def save_picture(path: Path, height: int = 40, width: int = 60, seed: int = 0) -> Path:
    """A picture of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
