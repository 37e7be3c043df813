"""Peak memory while reading a checkpoint of a real model's size, over the size of its parameters.

A loader that holds the weights twice halves the model that a machine can read. A checkpoint of LLaVA-OneVision 0.5B's
shapes is written in shards, as on the hub, with random weights. A fresh process reads it in bfloat16 and takes a
training step and an evaluation step of one sample on the CPU, all modules adapted, so the whole path is checked.

    python -m benchmarks.memory.real_checkpoint [--short] [--anyway] [--out FOLDER]

`--short` takes two layers of each part. The full form needs 2 GB of disk.

Definitions. The sample has 256 tokens and one tile of 384 pixels; ranks are 16. Losses of random weights mean nothing,
but must be finite. Memory is resident memory above what the process held before.

figure = peak resident memory while reading / bytes of the parameters.
"""

import json
import math
import threading
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.lib.child import Document, answer, arguments, publish, run_child
from benchmarks.lib.results import require_quiet
from mars_jax.adapters.targets import find_targets
from mars_jax.models.families.registry import model_config, parameters

GOAL = 1.3
SHARD_BYTES = 2**29
CONFIG: Document = {
    "model_type": "llava_onevision",
    "image_token_index": 151646,
    "image_grid_pinpoints": [[384, 384]],
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 152000,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
RANK, TOKENS, SUPERVISED = 16, 256, 32


def main() -> None:
    """Writes results/real_checkpoint.json; a few minutes, 2 GB of disk."""
    options = arguments(__doc__)
    if options.child:
        return answer(options.child, measure)
    load = require_quiet(options.anyway)
    config = json.loads(json.dumps(CONFIG))
    if options.short:
        config["text_config"]["num_hidden_layers"] = config["vision_config"]["num_hidden_layers"] = 2
    with TemporaryDirectory() as folder:
        shards = write_random(Path(folder), config)
        found = run_child(__file__, {"checkpoint": folder})
    detail = {"foreign_cores_busy": load, "shards": shards, "tables": {"One fresh process": [found]}}
    unit = "peak resident memory while reading / bytes of the parameters"
    publish(options, "real_checkpoint", found["peak over parameters"], unit, f"at most {GOAL}", detail)


def write_random(folder: Path, config: Document) -> int:
    """A checkpoint of random weights; returns its number of shards."""
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shards: list[dict[str, np.ndarray]] = [{}]
    weight_map, size = {}, 0

    def flush() -> None:
        save_file(shards[-1], folder / f"model-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards[-1] = {}

    for parameter in parameters(model_config(config)):
        for key in parameter.keys:
            tensor = (0.02 * rng.standard_normal(parameter.stored_shape, np.float32)).astype(ml_dtypes.bfloat16)
            shards[-1][key], weight_map[key] = tensor, f"model-{len(shards)}.safetensors"
            size += tensor.nbytes
            if size > SHARD_BYTES:
                flush()
                shards, size = [*shards, {}], 0
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return len(shards)


def resident_bytes() -> int:
    """Of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def measure(checkpoint: str) -> Document:
    """Reads the checkpoint, and takes both steps."""
    import jax
    import jax.numpy as jnp

    from mars_jax.adapters.tree import init_adapters
    from mars_jax.config.adapted import DEFAULT_MODULES
    from mars_jax.hub.read import read_checkpoint
    from mars_jax.lanes.step import mean_loss
    from mars_jax.models.families.registry import build_model

    before, peak, reading = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not reading.wait(0.01):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    config, base = read_checkpoint(checkpoint, "bfloat16")
    seconds = time.perf_counter() - start
    reading.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(base))

    patterns: dict[str, Any] = {name: module["targets"] for name, module in DEFAULT_MODULES.items()}
    targets = find_targets(base, patterns)
    adapters = init_adapters(jax.random.key(0), targets, dict.fromkeys(DEFAULT_MODULES, RANK))
    side, image_tokens = CONFIG["vision_config"]["image_size"], TOKENS // 2
    index = np.full((1, TOKENS, 1), -1, np.int32)
    index[0, :image_tokens, 0] = np.arange(image_tokens)
    batch = {
        "tokens": jnp.zeros((1, TOKENS), jnp.int32),
        "pixels": jax.random.normal(jax.random.key(1), (1, 1, 3, side, side)),
        "image_index": index,
        "image_weight": (index >= 0).astype(np.float32),
        "targets": jnp.zeros((1, SUPERVISED), jnp.int32),
        "target_positions": jnp.arange(TOKENS - SUPERVISED, TOKENS)[None],
        "target_weights": jnp.ones((1, SUPERVISED)),
    }
    loss = partial(mean_loss, build_model(config))
    train, training = timed(jax.jit(jax.value_and_grad(loss, argnums=1)), base, adapters, batch)
    score, scoring = timed(jax.jit(loss), base, adapters, batch)
    assert math.isfinite(float(train[0]))
    assert math.isfinite(float(score))
    return {
        "parameters": size // 2,
        "bytes": size,
        "seconds to read": seconds,
        "peak over parameters": (peak - before) / size,
        **{f"training step, {name}": value for name, value in training.items()},
        **{f"evaluation step, {name}": value for name, value in scoring.items()},
        "resident GiB at the end": resident_bytes() / 2**30,
    }


def timed(step: Any, *arguments: Any) -> tuple[Any, dict[str, float]]:
    """The result of a jitted function, and its seconds of compiling and running."""
    import jax

    start = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    compiling = time.perf_counter() - start
    start = time.perf_counter()
    result = jax.block_until_ready(compiled(*arguments))
    return result, {"seconds to compile": compiling, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    main()
