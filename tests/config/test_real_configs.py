"""The configs of real models against checkpoints of their shapes: real settings and names, files that are all holes."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mars_jax import pipeline
from mars_jax.config.load import load_config
from mars_jax.models.families.registry import model_config, parameters
from mars_jax.models.shardings import base_shardings
from mars_jax.runtime.sharding import make_mesh
from mars_jax.runtime.trees import unflatten
from mars_jax.search import cost
from tests.helpers import tiny_data

CONFIGS = Path(__file__).parents[2] / "configs"


def qwen2_text(size: str, **changes) -> dict:
    """The decoders' settings as the hub's files have them."""
    sizes = {
        "0.5b": (896, 4864, 24, 14, 2),
        "3b": (2048, 11008, 36, 16, 2),
        "7b": (3584, 18944, 28, 28, 4),
    }
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {**dict(zip(names, sizes[size], strict=True)), "rms_norm_eps": 1e-6, "rope_theta": 1e6, **changes}


def onevision(size: str, vocabulary: int, tied: bool) -> dict:
    return {
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_token_index": 151646,
        "image_grid_pinpoints": [[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)],
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": tied,
        "text_config": qwen2_text(size, model_type="qwen2", vocab_size=vocabulary, use_sliding_window=False),
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


def qwen_vl(size: str, vocabulary: int, tied: bool) -> dict:
    text = qwen2_text(size, vocab_size=vocabulary, use_sliding_window=False, tie_word_embeddings=tied)
    return text | {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "image_token_id": 151655,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }


# Settings, and parameters in billions as their makers count them.
MODELS = {
    "llava-onevision-0.5b": (onevision("0.5b", 152000, tied=True), 0.89),
    "llava-onevision-7b": (onevision("7b", 152128, tied=False), 8.03),
    "qwen2.5-vl-3b": (qwen_vl("3b", 151936, tied=True), 3.75),
    "qwen2.5-vl-7b": (qwen_vl("7b", 152064, tied=False), 8.29),
}


def sparse_checkpoint(directory: Path, config: dict) -> Path:
    """A folder with all files of the model; its weights take no space on disk."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shards, weight_map, size = [{}], {}, 0
    for parameter in parameters(model_config(config)):
        for key in parameter.keys:
            stop = size + 2 * math.prod(parameter.stored_shape)
            shards[-1][key] = {"dtype": "BF16", "shape": list(parameter.stored_shape), "data_offsets": [size, stop]}
            weight_map[key], size = f"model-{len(shards)}.safetensors", stop
            if size > 4 * 2**30:
                shards, size = [*shards, {}], 0
    for number, shard in enumerate(filter(None, shards), 1):
        header = json.dumps({"__metadata__": {"format": "pt"}, **shard}).encode()
        header += b" " * (-len(header) % 8)
        with (directory / f"model-{number}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + max(entry["data_offsets"][1] for entry in shard.values()))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tokenizer(151646 if config["model_type"] == "llava_onevision" else 151655).save_pretrained(directory)
    processor = LlavaOnevisionImageProcessorPil() if config["model_type"] == "llava_onevision" else None
    (processor or Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)).save_pretrained(directory)
    return directory


def tokenizer(image_token_id: int) -> PreTrainedTokenizerFast:
    """Bytes, tokens of no use up to the picture's, and that, at the id of the real tokenizer."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    words = [*special, *sorted(alphabet)]
    words += [f"unused {number}" for number in range(image_token_id - len(words))]
    bpe = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate([*words, "<image>"])}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([*special, "<image>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<|im_end|>", chat_template=tiny_data.TYPED_CHATML
    )


class Told:
    """A reporter that keeps its messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def notice(self, text: str) -> None:
        self.texts.append(text)

    warn = notice

    def progress(self, name: str, total: int, unit: str, done: int = 0):
        return nullcontext(lambda units, detail: None)


@pytest.fixture(params=MODELS)
def job(request, tmp_path):
    settings, billions = MODELS[request.param]
    checkpoint = sparse_checkpoint(tmp_path / "base", settings)
    records = json.loads(tiny_data.conversations(tmp_path).read_text())
    words = next(record for record in records if not record["image"])
    pictured = [record for record in records if record["image"]]
    records += [one | {"id": f"picture {number}-{copy}"} for number, one in enumerate(pictured) for copy in range(50)]
    records += [words | {"id": f"text {number}"} for number in range(2800)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    files = {"model.checkpoint": checkpoint, "data.train": tmp_path / "train.json", "run_dir": tmp_path / "run"}
    config = load_config(CONFIGS / f"{request.param}.yaml", [f"{key}={path}" for key, path in files.items()])
    return config, model_config(settings), billions


def test_check_and_plan_accept_the_config(job, monkeypatch):
    monkeypatch.setattr(cost, "physical_memory_bytes", lambda: 2**40)  # the machine that such a model is run on
    config, architecture, billions = job
    table = parameters(architecture)
    assert sum(math.prod(p.shape) for p in table) / 1e9 == pytest.approx(billions, abs=0.02)
    found = pipeline.check(config, Told())
    assert {row["module"] for row in found["targets"]} == {"vision", "projector", "llm"}
    assert "image tokens" in found["samples"][0]["text"] + found["samples"][1]["text"] + found["samples"][2]["text"]
    plan = pipeline.run_pipeline("plan", config, Told())
    # Each module alone at all its ranks, read at three numbers of samples.
    assert (plan["runs"], plan["lanes"]) == (10, 30)
    assert plan["base_bytes"] == sum(2 * math.prod(p.shape) for p in table)
    assert plan["base_bytes"] < plan["memory_floor_bytes"] < plan["step_memory_bytes"]


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "llava-onevision-7b"])
def test_the_base_is_split_evenly_over_eight_devices(name):
    architecture = model_config(MODELS[name][0])
    base = unflatten({p.path: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16) for p in parameters(architecture)})
    shardings = base_shardings(architecture, make_mesh({"fsdp": 4, "tensor": 2}))
    leaves = zip(jax.tree.leaves(base), jax.tree.leaves(shardings), strict=True)
    own = sum(2 * math.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in leaves)
    whole = sum(2 * leaf.size for leaf in jax.tree.leaves(base))
    assert whole / 8 <= own < 1.03 * whole / 8  # fused queries, keys and values are split by four
