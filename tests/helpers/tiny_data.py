"""A tiny checkpoint folder without weights (tokenizer, image processor, config) and pictures, for the data tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from mars_jax.data.chat import Chat, chat_of
from mars_jax.data.examples import ExampleSource
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.data.records import Record, load_records
from mars_jax.data.shapes import plan_shapes
from mars_jax.models.families.llava.anyres import Geometry

IMAGE_TOKEN_ID = 3
PINPOINTS = [[28, 28], [28, 56], [56, 28], [56, 56]]
_LAYERS = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
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


def chat(tokenizer: PreTrainedTokenizerFast, image_token_id: int = IMAGE_TOKEN_ID) -> Chat:
    """The chat template of a tokenizer with `<image>`."""
    return chat_of(tokenizer, image_token_id)


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
        "text_config": {"vocab_size": 300, "num_key_value_heads": 2, **_LAYERS},
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **_LAYERS},
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


PICTURE_SIZES = [(60, 90), (200, 57), (33, 130), (28, 28)]


def conversations(directory: Path) -> Path:
    """A LLaVA JSON of a record with one picture, one with two, one with none, and one whose picture comes late."""
    for number, size in enumerate(PICTURE_SIZES):
        save_picture(directory / f"{number}.png", *size, seed=number)
    asked = [
        (["0.png"], "<image>\nwhat shape?", "a red square"),
        (["1.png", "2.png"], "<image> and <image>?", "two"),
        ([], "why is this?", "it is red"),
        (["3.png", "0.png"], "what shape is this? <image><image>", "a square"),
    ]
    items = [
        {
            "id": str(number),
            "image": images,
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        }
        for number, (images, question, answer) in enumerate(asked)
    ]
    path = directory / "records.json"
    path.write_text(json.dumps(items))
    return path


def batch(path: Path, checkpoint_directory: Path) -> tuple[tuple[Record, ...], dict[str, np.ndarray], np.ndarray]:
    """The records of a file, all of them as one batch, and bool [B, T]: which tokens aren't padding."""
    records = load_records(path, path.parent)
    preprocessor = load_preprocessor(checkpoint_directory)
    source = ExampleSource(records, preprocessor, plan_shapes(records, preprocessor, 10**6).shapes)
    arrays = {name: np.stack([source[i][name] for i in range(len(records))]) for name in source[0]}
    lengths = [int(np.flatnonzero(row).max()) + 1 for row in arrays["tokens"]]
    return records, arrays, np.arange(arrays["tokens"].shape[1])[None] < np.asarray(lengths)[:, None]
