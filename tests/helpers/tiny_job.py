"""A whole tiny job on disk (random checkpoint, pictures, a YAML config), and the command run on it as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.helpers import tiny_data, tiny_llava

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}

_COMMAND = "from mars_jax.cli import main; main()"
_HIDE_TORCH = """
import importlib.machinery
find_spec = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
"""


def checkpoint(directory: Path, decoder_layers: int = 1) -> Path:
    """A random LLaVA-OneVision of an encoder layer, with the tokenizer and image processor of `tiny_data`."""
    model = tiny_llava.torch_model(
        text={"vocab_size": 300, "num_hidden_layers": decoder_layers},
        vision={"num_hidden_layers": 1},
        image_token_index=tiny_data.IMAGE_TOKEN_ID,
        video_token_index=299,
    )
    model.save_pretrained(directory)
    config = (directory / "config.json").read_text()
    tiny_data.checkpoint(directory)
    (directory / "config.json").write_text(config)
    return directory


def records(directory: Path, number: int, seed: int = 0, name: str = "train") -> Path:
    """Pictures of one noisy colour each, and a LLaVA JSON that asks for it; every third record has two questions."""
    rng = np.random.default_rng(seed)
    items = []
    for i in range(number):
        colour = list(COLOURS)[i % 3]
        pixels = np.clip(np.asarray(COLOURS[colour]) + rng.integers(-25, 26, (28, 28, 3)), 0, 255).astype(np.uint8)
        picture = Path("images") / f"{name}{i}.png"
        (directory / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(directory / picture)
        first = [("human", "<image>\na square?"), ("gpt", "yes")] if i % 3 == 1 else []
        turns = [*first, ("human", "what colour?" if first else "<image>\nwhat colour?"), ("gpt", colour)]
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        items.append({"id": f"{name}{i}", "image": str(picture), "conversations": conversation})
    path = directory / f"{name}.json"
    path.write_text(json.dumps(items))
    return path


def config(path: Path, base: Path, train: Path, run_dir: Path, **sections: dict[str, Any]) -> Path:
    """Writes the YAML of a job of seconds; keyword arguments change settings within their section."""
    document: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"checkpoint": str(base)},
        "data": {"train": str(train), "validation_fraction": 0.15, "test_fraction": 0.15},
        "lora": {
            "modules": {
                "vision": {"targets": ["vision/layers/mlp/fc[12]"], "ranks": [1, 2, 4]},
                "projector": {"targets": ["projector/linear_2"], "ranks": [2]},
                "llm": {"targets": ["llm/layers/self_attn/v_proj"], "ranks": [1, 4]},
            }
        },
        "optimizer": {"learning_rate": 0.03, "warmup_steps": 2},
        "probe": {
            "sampling": "separate",
            "num_samples": [8, 16, 32],
            "steps": 16,
            "batch_size": 4,
            "looks_per_doubling": 2,
            "validation_samples": 8,
            "lanes_per_program": 6,
        },
        "convergence": {"rule": "drift", "epsilon": 0.7, "sustain": 1},
        "laws": {"bootstraps": 20},
        "selection": {"method": "best_probes", "sweep": 3},
        "finetune": {"steps": 16, "batch_size": 4, "warmup_steps": 2, "look_every": 8},
        "evaluate": {"batch_size": 4},
    }
    for section, settings in sections.items():
        document[section] = {**document.get(section, {}), **settings}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def environment(cache: Path) -> dict[str, str]:
    """For processes that share compiled programs, as repeated commands on one machine may."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def command(*arguments: object, torch: bool = False) -> list[str]:
    """The argument list of a `mars` process, to which torch isn't installed unless asked for."""
    return [sys.executable, "-c", _COMMAND if torch else _HIDE_TORCH + _COMMAND, *map(str, arguments)]


def mars(
    *arguments: object, cache: Path, torch: bool = False, timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """Runs `mars`, waiting for its end."""
    return subprocess.run(
        command(*arguments, torch=torch), capture_output=True, text=True, timeout=timeout, env=environment(cache)
    )
