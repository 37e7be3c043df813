"""A base of the hub at a pinned revision: exports name it, others can read the files, and the card shows a prompt."""

import json
import stat
import subprocess
from pathlib import Path

import pytest

from tests.helpers import tiny_job

COMMIT, MAIN = "0123456789abcdef0123456789abcdef01234567", "f" * 40
FIXED = {"vision": {"ranks": [4]}, "projector": {"ranks": [2]}, "llm": {"ranks": [8]}}
SHORT = {"steps": 4, "look_every": 4, "warmup_steps": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a base in a hub cache whose pinned commit isn't that of main."""
    folder = tmp_path_factory.mktemp("pinned")
    repository = folder / "hub" / "models--someone--tiny"
    tiny_job.checkpoint(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(MAIN)
    config = tiny_job.config(
        folder / "job.yaml",
        Path(f"hf://someone/tiny@{COMMIT}"),
        tiny_job.records(folder, 60),
        folder / "run",
        lora={"modules": FIXED},
        convergence={"rule": None, "epsilon": None},
        probe={"num_samples": [8, 16], "steps": 4},
        finetune=SHORT,
        model={"checkpoint": f"hf://someone/tiny@{COMMIT}"},
    )
    environment = tiny_job.environment(folder / "cache") | {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    for arguments in (("run", config), ("export", folder / "run", "--merged")):
        done = subprocess.run(
            tiny_job.command(*arguments), env=environment, capture_output=True, text=True, umask=0o022
        )
        assert done.returncode == 0, done.stderr
    return folder / "run"


def test_the_pinned_revision_of_the_base_is_kept_in_the_export(run):
    adapter_config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter_config["base_model_name_or_path"], adapter_config["revision"]) == ("someone/tiny", COMMIT)
    assert json.loads((run / "adapter" / "mars.json").read_text())["base_revision"] == COMMIT
    assert f"from_pretrained('someone/tiny', revision='{COMMIT}')" in (run / "adapter" / "README.md").read_text()


def test_files_of_a_run_and_its_exports_can_be_read_by_others(run):
    files = [path for path in run.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert {path.name for path in files} >= {"adapter_model.safetensors", "adapters.safetensors", "model.safetensors"}
    private = [str(path) for path in files if stat.S_IMODE(path.stat().st_mode) != 0o644]
    assert not private


def test_the_card_shows_a_prompt_of_the_data_with_the_generation_prompt(run):
    record = json.loads((run / "adapter" / "mars.json").read_text())
    prompt = record["provenance"]["prompt"]
    assert "a square?" in prompt or "what colour?" in prompt
    assert prompt in (run / "adapter" / "README.md").read_text()
