"""A whole job on a tiny Qwen2.5-VL as a user runs it: pictures of many sizes, two in a record, none in another."""

import json
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny_job, tiny_qwen

MODULES = {
    "vision": {"ranks": [1, 4]},
    "projector": {"ranks": [2]},
    "llm": {"ranks": [1, 4]},
}


def records(folder, number):
    """Colours to name: one picture, two, or only words for it."""
    rng = np.random.default_rng(0)
    items = []
    for i in range(number):
        colour = list(tiny_job.COLOURS)[i % 3]
        images = []
        for place in range((1, 2, 0, 1)[i % 4]):
            shape = (*rng.integers(20, 90, 2), 3)
            pixels = np.clip(np.asarray(tiny_job.COLOURS[colour]) + rng.integers(-25, 26, shape), 0, 255)
            images.append(f"{i}-{place}.png")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / images[-1])
        question = "<image>" * len(images) + "what colour?" if images else f"what colour is {colour}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": colour}]
        items.append({"id": str(i), "image": images, "conversations": turns})
    path = folder / "train.json"
    path.write_text(json.dumps(items))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen_job")
    base = tiny_qwen.checkpoint(
        folder / "base",
        tiny_qwen.torch_model(vision={"depth": 1, "fullatt_block_indexes": [0]}, text={"num_hidden_layers": 1}),
    )
    probe = {"num_samples": [8, 16], "steps": 8, "looks_per_doubling": 1}
    config = tiny_job.config(
        folder / "job.yaml", base, records(folder, 60), folder / "run", lora={"modules": MODULES}, probe=probe
    )
    environment = tiny_job.environment(folder / "cache")
    for command in (("run", config), ("export", folder / "run", "--merged", "--verify", "--json")):
        done = subprocess.run(
            tiny_job.command(*command, torch="--verify" in command), env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_the_exports_compute_in_torch_what_the_run_computed(run):
    _, exported = run
    document = json.loads(exported.stdout)
    verified = document["verified"]
    assert [document["answers"][part]["samples"] for part in ("adapter", "merged")] == [4, 4]
    for part in ("adapter", "merged"):
        assert max(verified[part]["logits_difference"], verified[part]["base_difference"]) <= 1e-4
        assert verified[part]["moved"] > 0.01


def test_the_adapter_learns(run):
    directory, _ = run
    conditions = json.loads((directory / "evaluation.json").read_text())["conditions"]
    assert conditions["finetuned"]["loss"] < conditions["base"]["loss"] - 1


def test_ranks_are_picked_for_all_modules(run):
    pick = json.loads((run[0] / "selection.json").read_text())["pick"]
    assert pick.keys() == {"vision", "projector", "llm"}
