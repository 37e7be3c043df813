"""Tiny random LLaVA-OneVision models in torch, with inputs and adapters: what the hub and parity tests compare with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from mars_jax.adapters.lora import LORA
from mars_jax.adapters.targets import find_targets
from mars_jax.adapters.tree import pad
from mars_jax.models.families.llava.anyres import Geometry, image_tokens
from mars_jax.models.families.llava.config import LlavaOnevisionConfig
from mars_jax.models.families.llava.table import ONEVISION as TABLE
from mars_jax.models.families.pictures import NEWLINE
from mars_jax.models.families.registry import model_config
from mars_jax.runtime.trees import unflatten

IMAGE_TOKEN = 100
PINPOINTS = [[28, 28], [28, 56], [56, 28], [56, 56]]


def torch_model(
    seed: int = 0, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **top: Any
) -> transformers.LlavaOnevisionForConditionalGeneration:
    text_config = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    } | (text or {})
    vision_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    } | (vision or {})
    settings = {"image_grid_pinpoints": PINPOINTS, "image_token_index": IMAGE_TOKEN, "video_token_index": 101} | top
    config = transformers.LlavaOnevisionConfig(text_config=text_config, vision_config=vision_config, **settings)
    config._attn_implementation = "eager"
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    # The library's own initialisation is so small that a wrong norm or bias would hide within the tolerance.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.15, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def config_json(model: transformers.PreTrainedModel) -> dict[str, Any]:
    return model.config.to_dict()


def in_layout(key: str, layout: str) -> str:
    """A key in one of the three layouts: `hub`, `memory`, or `saved` by `save_pretrained` of transformers 5."""
    key = TABLE.hub_key(key)
    if layout == "hub":
        return key
    key = key.replace("vision_tower.vision_model.", "vision_tower.")
    if layout == "saved":
        return key
    if key.startswith("language_model.lm_head"):
        return key.removeprefix("language_model.")
    return "model." + key.replace("language_model.model.", "language_model.")


def rewrite(directory: Path, change: Any) -> None:
    """Replaces the tensors of a single-file checkpoint by what `change` makes of them."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def inputs(
    model: transformers.PreTrainedModel, samples: list[list[tuple[int, int]]], seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same random batch for the Hugging Face model and for ours.

    Args:
        model: the torch model.
        samples: the image sizes (height, width) of each sample; no image, one (tiled), or several (one tile each).
        seed: of pixels and tokens.
    """
    rng = np.random.default_rng(seed)
    config = model.config
    architecture = model_config(config.to_dict())
    assert isinstance(architecture, LlavaOnevisionConfig)
    geometry = Geometry.from_config(architecture)
    side, patches = geometry.image_size, geometry.num_patches
    rows, weights, tiles, text = [], [], [], []
    for sizes in samples:
        if len(sizes) == 1:
            picture = image_tokens(*sizes[0], geometry)
            rows.append(picture.index), weights.append(picture.weight), tiles.append(picture.num_tiles)
        else:
            index = [np.append(np.arange(patches) + patches * image, NEWLINE) for image in range(len(sizes))]
            rows.append(np.concatenate(index or [np.zeros(0)]).astype(np.int32)[:, None])
            weights.append(np.ones_like(rows[-1], np.float32)), tiles.append(len(sizes))
        text.append(rng.integers(3, IMAGE_TOKEN, size=(2, rng.integers(3, 7))))
    most = max(*tiles, 1)
    corners = max(index.shape[1] for index in rows)
    length = max(index.shape[0] + words.size for index, words in zip(rows, text, strict=True))
    tokens = np.zeros((len(samples), length), np.int32)
    mask = np.zeros((len(samples), length), np.int64)
    image_index = np.full((len(samples), length, corners), -1, np.int32)
    image_weight = np.zeros((len(samples), length, corners), np.float32)
    pixels = np.zeros((len(samples), most, 3, side, side), np.float32)
    for i, (index, weight, (before, after)) in enumerate(zip(rows, weights, text, strict=True)):
        start, stop = len(before), len(before) + len(index)
        used = stop + len(after)
        tokens[i, :used] = np.concatenate([before, np.full(len(index), IMAGE_TOKEN), after])
        mask[i, :used] = 1
        image_index[i, start:stop, : index.shape[1]] = np.where(index == NEWLINE, most * patches, index)
        image_index[i, start:stop, index.shape[1] :] = 0
        image_weight[i, start:stop, : index.shape[1]] = weight
        pixels[i, : tiles[i]] = rng.normal(size=(tiles[i], 3, side, side))
    theirs: dict[str, np.ndarray] = {"input_ids": tokens.astype(np.int64), "attention_mask": mask}
    sizes = [size for sample in samples for size in sample]
    if any(len(sample) > 1 for sample in samples):
        theirs["pixel_values"] = np.concatenate([pixels[i, :n, None] for i, n in enumerate(tiles)])
        theirs["batch_num_images"] = np.array([len(sample) for sample in samples])
    else:
        theirs["pixel_values"] = pixels[[i for i, sample in enumerate(samples) if sample]]
    theirs["image_sizes"] = np.array(sizes).reshape(-1, 2)
    if not sizes:
        del theirs["pixel_values"], theirs["image_sizes"]
    ours = {"tokens": tokens, "pixels": pixels, "image_index": image_index, "image_weight": image_weight}
    return theirs, ours


def random_adapters(
    params: dict[str, Any], ranks: dict[str, int], scale: float = 2.0, padded: int | None = None
) -> dict[str, Any]:
    """LoRA of every linear of the modules, with random trained leaves up to the rank and zeros there to `padded`."""
    rng = np.random.default_rng(0)
    targets = find_targets(params, {module: [f"{module}/.*"] for module in ranks})
    targets = {path: target for path, target in targets.items() if path in TABLE.linears}
    flat = {
        f"{path}/{name}": rng.normal(0.0, 0.1, leaf.shape).astype(np.float32)
        if leaf.trained
        else np.full(leaf.shape, scale, np.float32)
        for path, target in targets.items()
        for name, leaf in LORA.leaves(target, ranks[target.module]).items()
    }
    adapters = unflatten(flat)
    return pad(adapters, targets, dict.fromkeys(ranks, padded)) if padded else adapters


def torch_logits(model: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return model(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits.numpy()
