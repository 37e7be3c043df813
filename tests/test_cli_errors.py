"""What the command refuses: the text and the exit code of each, before any training step."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from mars_jax.cli import app
from mars_jax.runtime.text import visible
from tests.helpers import tiny_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def base(folder):
    return tiny_job.checkpoint(folder / "base")


@pytest.fixture(scope="module")
def train(folder):
    return tiny_job.records(folder / "data", 60)


@pytest.fixture
def config(tmp_path, base, train):
    return tiny_job.config(tmp_path / "a.yaml", base, train, tmp_path / "run")


def refused(*arguments: object) -> tuple[int, str]:
    """The exit code and the message, which is the same on stderr and in the JSON on stdout."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == result.exit_code
    assert result.stderr.endswith(f"mars: {visible(error['message'])}\n")
    return result.exit_code, error["message"]


# The config: 2.


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("probe.stepz=3", "unknown key probe.stepz. Did you mean probe.steps? Allowed in probe: num_samples, seeds"),
        (
            "lora.modules.vision.ranks=[-1, 2]",
            "lora.modules.vision.ranks.0 is -1 but must be greater than or equal to 0",
        ),
        (
            "lora.modules={vision: {ranks: [0]}, llm: {ranks: [0]}}",
            "lora.modules: at least one module needs a rank above 0",
        ),
        ("laws.bootstraps=5", "laws.bootstraps is 5 but must be greater than or equal to 20"),
        ("convergence.epsilon=1.5", "convergence.epsilon is 1.5 but must be less than 1"),
        (
            "lora.modules.vision.ranks=[1, 99]",
            "lora: rank 99 of module 'vision' is beyond the width 24 of 'vision/layers/mlp/fc1'. Allowed: 0 to 24; or "
            "leave that linear out of the targets.",
        ),
        (
            "adapter.method=full_rank",
            "lora: rank 2 of module 'projector' means nothing to the adapter method 'full_rank', which has no ranks. "
            "Set lora.modules.projector.ranks to [1] to train the module, or to [0] to freeze it.",
        ),
        (
            "lora.modules.llm.targets=[llm/q_proj]",
            "lora: pattern 'llm/q_proj' of module 'llm' matches none of the 17 linears. A pattern must match a whole "
            "path; nearest: llm/layers/mlp/up_proj, llm/layers/self_attn/q_proj",
        ),
        (
            "probe.num_samples=[16, 1000]",
            "probe.num_samples asks for 1000 training samples, but the training split has 46. Choose at most 46, or "
            "give more data.",
        ),
        (
            "selection.target_num_samples=61",
            "selection.target_num_samples asks for 61 training samples, but the training split has 46.",
        ),
        ("probe.num_samples=[16]", "probe.num_samples is [16]; the laws need at least two numbers of samples."),
    ],
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_setting_that_cannot_be_used_is_refused_before_any_training(config, tmp_path, command, override, text):
    code, message = refused(command, config, override)
    assert code == 2
    assert text in message
    assert not (tmp_path / "run" / "probes").exists()


@pytest.mark.parametrize("command", ["plan", "probe", "compare"])
def test_a_search_without_a_choice_is_refused(config, command):
    code, message = refused(command, config, "lora.modules={vision: {ranks: [4]}, llm: {ranks: [8]}}")
    assert code == 2
    assert message == (
        "lora.modules gives every module one rank (vision 4, llm 8), so there is nothing to search. Give at least one "
        "module two ranks or more; or fine-tune with these ranks by `mars run`."
    )


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        ("{lane: 1, tensor: 8}", "  llm/lm_head/kernel [32, 300]: axis 1 has size 300, mesh axis tensor has size 8"),
        ("{lane: 1, fsdp: 8}", "a batch of 4 samples can't be split evenly over mesh data=1 x fsdp=8, 8 parts. "),
        ("{lane: 1, data: 8}", "a batch of 4 samples can't be split evenly over mesh data=8 x fsdp=1, 8 parts. "),
        ("{lane: 9}", "mesh lane=9 x data=1 x fsdp=1 x tensor=1: the sizes multiply to 9, and there are 8 devices."),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_by_name(config, mesh, text):
    code, message = refused("probe", config, f"mesh={mesh}")
    assert code == 2
    assert text in message


def test_a_run_directory_of_another_config_is_refused_with_the_difference(config, tmp_path):
    assert CliRunner().invoke(app, ["plan", str(config)]).exit_code == 0
    code, message = refused("run", config, "probe.steps=20", "seed=7")
    assert code == 2
    assert message.splitlines() == [
        f"run directory {tmp_path / 'run'} was made with another config (there -> here):",
        "  seed: 0 -> 7",
        "  probe.steps: 16 -> 20",
        f"Set another run_dir, take the settings back, or delete {tmp_path / 'run'} to start again.",
    ]


def test_lanes_of_data_that_changed_since_are_refused(tmp_path, base, train):
    # The lanes that are there would have been mixed with lanes of the new answers.
    copy = tmp_path / "train.json"
    shutil.copy(train, copy)
    config = tiny_job.config(tmp_path / "a.yaml", base, copy, tmp_path / "run", data={"image_root": str(train.parent)})
    assert CliRunner().invoke(app, ["plan", str(config)]).exit_code == 0
    copy.write_text(copy.read_text().replace("red", "rot"))
    assert CliRunner().invoke(app, ["plan", str(config)]).exit_code == 0  # no lane has run yet
    (tmp_path / "run" / "probes").mkdir()
    (tmp_path / "run" / "probes" / "lanes.jsonl").write_text("{}\n")
    copy.write_text(copy.read_text().replace("rot", "rouge"))
    code, message = refused("probe", config)
    assert code == 2
    assert message == (
        f"run directory {tmp_path / 'run'} has lanes of other data or of another base: {copy} changed since. Set "
        f"another run_dir, take the files back, or delete {tmp_path / 'run'} to start again."
    )


ODD_FILES = ["file", "folder", "fifo", "device", "binary", "empty", "absent", "file/below"]


def odd(folder: Path, kind: str) -> Path:
    """A path of a kind that is no config, checkpoint, data file or run directory; its name is odd too."""
    path = folder / f"{kind.partition('/')[0]} with\na line, \xe9"
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir(exist_ok=True)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    elif kind != "absent":
        path.write_bytes({"binary": bytes(range(256)), "empty": b""}.get(kind, b"- a\n"))
    return path / "below" if "/" in kind else path


NO_CONFIG = {
    "file": "{} must hold `key: value` lines; seen ['a']",
    "folder": "can't read the config {}/config.resolved.yaml: No such file or directory. Give a YAML file or a run "
    "directory.",
    "fifo": "the config {} is no regular file. Give a YAML file or a run directory.",
    "device": "the config {} is no regular file. Give a YAML file or a run directory.",
    "binary": "{}: the text is not YAML: 'utf-8' codec can't decode byte 0x80 in position 128: invalid start byte. "
    "Save it as UTF-8.",
    "empty": "{0}: run_dir is missing (folder that the run writes to, from the current directory)\n"
    "{0}: model is missing\n{0}: data is missing",
    "absent": "can't read the config {}: No such file or directory. Give a YAML file or a run directory.",
    "file/below": "can't read the config {}: Not a directory. Give a YAML file or a run directory.",
}


@pytest.mark.parametrize("kind", ODD_FILES)
@pytest.mark.parametrize("command", ["check", "run", "fit", "export", "report", "status"])
def test_what_is_no_config_is_refused_by_every_command(tmp_path, command, kind):
    path = odd(tmp_path, kind)
    assert refused(command, path) == (2, NO_CONFIG[kind].format(path))


@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_is_no_run_is_compared_with_nothing(tmp_path, kind):
    path = odd(tmp_path, kind)
    samples = path / "samples.jsonl"
    expected = (
        (2, f"{samples} is missing: run `mars evaluate {path}` first.")
        if kind in ("folder", "absent", "file/below")
        else (3, f"can't read {samples}: a file lies where one of its folders belongs. Move it away.")
    )
    assert refused("diff", path, path) == expected


@pytest.mark.parametrize("kind", [kind for kind in ODD_FILES if kind not in ("folder", "absent")])
@pytest.mark.parametrize("command", ["plan", "status", "report"])
def test_what_is_no_run_directory_is_refused(config, tmp_path, command, kind):
    path = odd(tmp_path, kind)
    code, message = refused(command, config, f"run_dir={json.dumps(str(path))}")
    assert code == 2
    assert str(path.parent) in message
    assert "a bug of mars_jax" not in message


# The checkpoint: 2.


def test_a_missing_checkpoint_is_refused(config, tmp_path):
    code, message = refused("run", config, f"model.checkpoint={tmp_path / 'nowhere'}")
    assert code == 2
    assert message.startswith(
        f"{tmp_path / 'nowhere' / 'config.json'}: no such file. A checkpoint is a local directory"
    )
    assert "hf download REPO --local-dir DIR" in message


@pytest.fixture
def copy(tmp_path, base):
    """A checkpoint to spoil."""
    shutil.copytree(base, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_checkpoint_without_weights_is_refused_before_the_data_are_read(config, copy, command, tmp_path):
    (copy / "model.safetensors").unlink()
    code, message = refused(command, config, f"model.checkpoint={copy}", f"data.train={tmp_path / 'none.json'}")
    assert code == 2
    assert message.startswith(f"{copy}: neither model.safetensors nor model.safetensors.index.json is there; found: ")
    assert "Only safetensors are read" in message


def test_truncated_weights_are_refused(config, copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, message = refused("check", config, f"model.checkpoint={copy}")
    assert code == 2
    assert message.startswith(f"{file}: not a complete safetensors file (")
    assert message.endswith("The download broke off, or the file is a Git LFS pointer; fetch it again.")


def test_weights_of_another_model_are_refused(config, copy):
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("v_proj.bias"))
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    code, message = refused("probe", config, f"model.checkpoint={copy}")
    assert code == 2
    assert message.startswith(f"{copy}: the tensors do not fit config.json. Missing 1: ")


@pytest.mark.parametrize("command", ["check", "run"])
def test_another_family_is_refused_with_those_supported(config, copy, command):
    document = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**document, "model_type": "qwen2_vl"}))
    code, message = refused(command, config, f"model.checkpoint={copy}")
    assert code == 2
    assert message.startswith(
        f"{copy / 'config.json'}: model_type is 'qwen2_vl' (LlavaOnevisionForConditionalGeneration), which is not "
        "supported. Supported families: llava, llava_onevision, qwen2_5_vl"
    )


# The data: 3.


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image": "images/none.png"}, "image 'images/none.png' does not exist in"),
        ({"image": "text.png"}, "image 'text.png' cannot be decoded"),
        (
            {"conversations": [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "red"}]},
            "2 <image> in the user turns but 1 images. Write <image> once for each image.",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image> colour?"}, {"from": "gpt", "value": " "}]},
            "turn 1: the answer is empty. Write it, or remove the record.",
        ),
    ],
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_bad_record_is_refused_by_name(config, tmp_path, train, command, change, text):
    (train.parent / "text.png").write_text("not a picture")
    items = json.loads(train.read_text())
    items[5].update(change)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(items))
    code, message = refused(command, config, f"data.train={file}", f"data.image_root={train.parent}")
    assert code == 3
    assert "bad.json item 5 (id 'train5')" in message
    assert text in message
    assert not (tmp_path / "run" / "probes").exists()


def test_a_missing_data_file_is_refused(config, tmp_path):
    code, message = refused("run", config, f"data.train={tmp_path / 'none.json'}")
    assert code == 3
    assert str(tmp_path / "none.json") in message


# The machine: 4.


def test_lanes_beyond_the_memory_are_refused(config):
    # A lane holds snapshots of its adapters at the eval points of a doubling, 1000 of them here; 566 GiB in all.
    wide = (
        "lora.modules={vision: {targets: ['vision/layers/.*'], ranks: [24]}, "
        "llm: {targets: ['llm/layers/.*'], ranks: [1, 16]}}"
    )
    lanes = ["probe.seeds=1000", "probe.num_samples=[8, 16, 24, 32, 40]", "probe.lanes_per_program=10000"]
    code, message = refused("plan", config, wide, *lanes, "probe.corners=false", "probe.looks_per_doubling=1000")
    assert code == 4, message
    assert message.startswith("10000 lanes together need at least ")
    assert "and this machine has" in message
    assert "Lower probe.lanes_per_program or the largest ranks" in message


# Phases out of turn: 2.


@pytest.mark.parametrize(
    ("command", "file", "before"),
    [
        ("fit", "probes/lanes.jsonl", "probe"),
        ("select", "laws.json", "fit"),
        ("finetune", "selection.json", "select"),
        ("evaluate", "finetune/summary.json", "finetune"),
        ("export", "finetune/summary.json", "finetune"),
    ],
)
def test_a_phase_without_what_it_needs_names_the_one_before(config, tmp_path, command, file, before):
    code, message = refused(command, config)
    assert code == 2
    assert message == (
        f"{tmp_path / 'run' / file} is missing: run `mars {before}` first, or `mars run` for every phase."
    )
