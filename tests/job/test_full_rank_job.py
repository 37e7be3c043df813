"""A whole job whose adapter method is not LoRA: given modules are trained at full rank, evaluated, and merged."""

import json

import jax
import numpy as np
import pytest

from mars_jax.adapters.files import read_adapters
from mars_jax.data.examples import ExampleSource
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.data.records import load_records
from mars_jax.data.shapes import plan_shapes
from mars_jax.hub.read import read_checkpoint
from mars_jax.models.families.registry import build_model
from mars_jax.runtime.trees import flatten
from tests.helpers import tiny_job

MODULES = {
    "vision": {"targets": ["vision/layers/mlp/fc[12]"], "ranks": [0]},
    "projector": {"targets": ["projector/linear_2"], "ranks": [1]},
    "llm": {"targets": ["llm/layers/self_attn/v_proj"], "ranks": [1]},
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folder of a finished job, and what `mars run` printed."""
    folder = tmp_path_factory.mktemp("full_rank")
    base, train = tiny_job.checkpoint(folder / "base"), tiny_job.records(folder, 60)
    settings = {"lora": {"modules": MODULES}, "optimizer": {"learning_rate": 0.01, "warmup_steps": 2}}
    config = tiny_job.config(
        folder / "job.yaml", base, train, folder / "run", adapter={"method": "full_rank"}, **settings
    )
    done = tiny_job.mars("run", config, "--json", cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_modules_of_rank_1_are_trained_and_evaluated(job):
    folder, _ = job
    summary = json.loads((folder / "run" / "finetune" / "summary.json").read_text())
    assert summary["ranks"] == {"vision": 0, "projector": 1, "llm": 1}
    assert summary["parameters"] == 32 * 32 + 32 * 16
    flat = flatten(read_adapters(folder / "run" / "finetune" / "adapters.safetensors"))
    shapes = {path: leaf.shape for path, leaf in flat.items() if path.endswith("/update")}
    assert shapes == {"projector/linear_2/update": (32, 32), "llm/layers/self_attn/v_proj/update": (1, 32, 16)}
    conditions = json.loads((folder / "run" / "evaluation.json").read_text())["conditions"]
    assert conditions["finetuned"]["loss"] < conditions["base"]["loss"] - 0.1
    metrics = [json.loads(line) for line in (folder / "run" / "finetune" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["update_norm"] == {"vision": 0.0, "projector": 0.0, "llm": 0.0}
    assert metrics[-1]["update_norm"]["vision"] == 0.0
    assert min(metrics[-1]["update_norm"][module] for module in ("projector", "llm")) > 0.01


def test_only_the_merged_checkpoint_is_written_and_the_reason_is_given(job):
    folder, done = job
    result = json.loads(done.stdout)
    assert "adapter" not in result
    assert result["merged"] == str(folder / "run" / "merged")
    assert not (folder / "run" / "adapter").exists()
    assert done.stderr.count("PEFT has no format for the adapter method full_rank, so only the merged checkpoint") == 1


def test_the_report_spoke_of_rank_1_where_a_method_has_no_ranks(job):
    folder, _ = job
    headline = json.loads((folder / "run" / "report" / "report.json").read_text())["verdict"]["headline"]
    assert headline == "Trained by the adapter method full_rank, which has no ranks: projector and llm."


def test_the_merged_checkpoint_computes_what_base_and_adapters_compute(job):
    folder, _ = job
    config, base = read_checkpoint(folder / "base", "float32")
    merged = read_checkpoint(folder / "run" / "merged", "float32")[1]
    adapters = read_adapters(folder / "run" / "finetune" / "adapters.safetensors")
    records, preprocessor = load_records(folder / "train.json", folder)[:4], load_preprocessor(folder / "base")
    source = ExampleSource(records, preprocessor, plan_shapes(records, preprocessor).shapes)
    batch = {name: np.stack([source[i][name] for i in range(4)]) for name in source[0]}
    logits = jax.jit(lambda variables: build_model(config).apply(variables, batch, method="logits"))
    plain = logits({"params": base})
    ours, theirs = logits({"params": base, "full_rank": adapters}), logits({"params": merged})
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert np.abs(ours - plain).max() > 0.1


def test_the_merged_checkpoint_is_verified_in_pytorch(job):
    folder, _ = job
    done = tiny_job.mars("export", folder / "run", "--verify", "--json", cache=folder / "cache", torch=True)
    assert done.returncode == 0, done.stderr
    verified = json.loads(done.stdout)["verified"]
    assert set(verified) == {"merged"}
    assert verified["merged"]["logits_difference"] <= 1e-4
