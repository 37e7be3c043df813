"""Reading configs: defaults, overrides, paths, round trip, and the text of every refusal."""

from pathlib import Path

import pytest

from mars_jax.config.load import RESOLVED_CONFIG, load_config
from mars_jax.config.schema import Config, DataConfig, ModelConfig
from mars_jax.errors import ConfigError

MINIMAL = "run_dir: runs/a\nmodel: {checkpoint: base}\ndata: {train: data/train.json}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


def test_defaults_adapt_every_module_of_llava_onevision(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    assert list(config.lora.modules) == ["vision", "projector", "llm"]
    assert config.lora.modules["projector"].ranks == (16,)
    assert config.lora.alpha.rule == "proportional"
    assert config.optimizer.learning_rate == 1e-3


def test_paths_are_from_the_config_folder_but_run_dir_from_here(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(
        write(tmp_path / "configs", MINIMAL), ["data.test=../test.json", "data.validation=/abs/v.json"]
    )
    assert config.run_dir == tmp_path / "runs/a"
    assert config.model.checkpoint == tmp_path / "configs/base"
    assert config.data.train == tmp_path / "configs/data/train.json"
    assert config.data.test == tmp_path / "test.json"
    assert config.data.validation == Path("/abs/v.json")


def test_overrides_win_and_are_yaml(tmp_path):
    path = write(tmp_path, MINIMAL + "probe: {looks_per_doubling: 3, seeds: 2}\n")
    config = load_config(
        path,
        [
            "probe.looks_per_doubling=6",
            "probe.num_samples=[256, 512]",
            "optimizer.learning_rate=2e-4",
            "probe.corners=false",
        ],
    )
    assert (config.probe.looks_per_doubling, config.probe.seeds, config.probe.num_samples) == (6, 2, (256, 512))
    assert config.optimizer.learning_rate == 2e-4
    assert config.probe.corners is False


def test_an_override_of_one_default_module_keeps_the_others(tmp_path):
    modules = load_config(write(tmp_path, MINIMAL), ["lora.modules.llm.ranks=[8]"]).lora.modules
    assert modules["llm"].ranks == (8,)
    assert modules["llm"].targets == load_config(write(tmp_path, MINIMAL)).lora.modules["llm"].targets
    assert list(modules) == ["vision", "projector", "llm"]


def test_only_listed_modules_are_adapted(tmp_path):
    path = write(
        tmp_path, MINIMAL + "lora: {modules: {llm: {ranks: [8]}, audio: {targets: [audio/fc], ranks: [2, 4]}}}\n"
    )
    assert list(load_config(path).lora.modules) == ["llm", "audio"]


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", ".1e-2", "0.001", "10e-4"])
def test_floats_may_be_written_as_people_do(tmp_path, text):
    assert (
        load_config(write(tmp_path, MINIMAL + f"optimizer: {{learning_rate: {text}}}\n")).optimizer.learning_rate
        == 1e-3
    )


def test_resolved_config_reads_back_equal_also_from_its_run_directory(tmp_path):
    config = load_config(
        write(tmp_path, MINIMAL), ["optimizer.learning_rate={vision: 1e-4, projector: 1e-3, llm: 1e-5}"]
    )
    run_dir = tmp_path / "elsewhere"
    run_dir.mkdir()
    (run_dir / RESOLVED_CONFIG).write_text(config.resolved_yaml())
    assert load_config(run_dir / RESOLVED_CONFIG) == config
    assert load_config(run_dir) == config.model_copy(update={"run_dir": run_dir})


def test_configs_are_made_in_python_too_and_are_frozen(tmp_path):
    config = Config(
        run_dir=tmp_path, model=ModelConfig(checkpoint=tmp_path / "base"), data=DataConfig(train=tmp_path / "t.json")
    )
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_unknown_keys_are_named_with_line_nearest_name_and_all_names(tmp_path):
    path = write(tmp_path, MINIMAL + "probe:\n  batchsize: 8\n")
    assert refusal(path) == (
        f"{path}, line 5: unknown key probe.batchsize. Did you mean probe.batch_size? Allowed in probe: num_samples, "
        "seeds, steps, batch_size, looks_per_doubling, validation_samples, averaging, sampling, patience, chunk_steps, "
        "lanes_per_program, lane_block, corners"
    )


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(tmp_path):
    text = refusal(write(tmp_path, MINIMAL + "bootstraps: 9\n"))
    assert "line 4: unknown key bootstraps. Did you mean laws.bootstraps? Allowed: run_dir, seed, model," in text


def test_unknown_keys_of_overrides_name_the_override(tmp_path):
    text = refusal(write(tmp_path, MINIMAL), "probe.stepz=3")
    assert text.startswith("override 'probe.stepz=3': unknown key probe.stepz. Did you mean probe.steps?")


def test_every_fault_is_listed_at_once(tmp_path):
    path = write(
        tmp_path, "run_dir: a\nmodel: {checkpoint: b, dtype: int8}\ndata: {}\nprobe: {num_samples: [1, x], seeds: 0}\n"
    )
    lines = refusal(path, "probe.steps=many", "export.merged=1").splitlines()
    assert sorted(lines) == sorted(
        [
            f"{path}, line 2: model.dtype is 'int8' but must be 'float32' or 'bfloat16' "
            "(dtype of base and activations)",
            f"{path}, line 3: data.train is missing (file or folder of training samples, or hf://datasets/OWNER/NAME)",
            f"{path}, line 4: probe.num_samples.1 is 'x' but must be a whole number "
            "(numbers of training samples D to try, rising)",
            f"{path}, line 4: probe.seeds is 0 but must be greater than 0 "
            "(runs of each (ranks, D), with seeds 0, 1, ...)",
            "override 'probe.steps=many': probe.steps is 'many' but must be a whole number "
            "(optimizer steps of a lane, its horizon, with sampling: separate; null: 500)",
            "override 'export.merged=1': export.merged is 1 but must be true or false "
            "(also write the whole checkpoint with the adapters added)",
        ]
    )


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "optimizer.learning_rate=fast",
            "optimizer.learning_rate is 'fast' but must be a number or a mapping of names",
        ),
        ("optimizer.learning_rate={vision: -1}", "optimizer.learning_rate.vision is -1 but must be greater than 0"),
        ("optimizer.learning_rate={llm: 1e-3}", "name each module of lora.modules (vision, projector, llm); seen llm"),
        ("optimizer.eps=.nan", "optimizer.eps is nan but must be a finite number"),
        ("probe.steps=80", "probe: steps (80) is for sampling: separate; with nested a lane takes"),
        ("optimizer.warmup_steps=501", "optimizer.warmup_steps (501) must be at most the 128 steps of a probe"),
        (
            "lora.modules.llm.ranks=[8, 4]",
            "lora.modules.llm.ranks: ranks must rise without repeats, e.g. [4, 8]; seen [8, 4]",
        ),
        ("lora.modules.llm.ranks=[4, 4]", "ranks must rise without repeats, e.g. [4]; seen [4, 4]"),
        ("lora.modules.llm.rates=[3, 1]", "rates must rise without repeats, e.g. [1.0, 3.0]; seen [3.0, 1.0]"),
        ("lora.modules.llm.rates=[1, 1]", "rates must rise without repeats, e.g. [1.0]; seen [1.0, 1.0]"),
        ("lora.modules.llm.rates=[0, 1]", "lora.modules.llm.rates.0 is 0 but must be greater than 0"),
        ("lora.modules.llm.ranks=[-1]", "lora.modules.llm.ranks.0 is -1 but must be greater than or equal to 0"),
        ("lora.modules.llm.ranks=[2.5]", "lora.modules.llm.ranks.0 is 2.5 but must be a whole number"),
        ("lora.modules.llm.ranks=[true]", "lora.modules.llm.ranks.0 is true but must be a whole number"),
        ("lora.modules.llm.ranks=8", "lora.modules.llm.ranks is 8 but must be a list"),
        ("lora.modules.llm.targets=['(']", "lora.modules.llm.targets: '(' is not a regular expression: missing )"),
        ("lora.modules.audio.ranks=[4]", "lora.modules.audio.targets is missing"),
        ("lora.modules={llm: {ranks: [0]}}", "lora.modules: at least one module needs a rank above 0"),
        ("lora.modules={}", "lora.modules: at least one module needs a rank above 0"),
        ("lora.modules=llm", "lora.modules is 'llm' but must be a mapping of names to values"),
        (
            "adapter.method=lor",
            "adapter.method: adapter method is 'lor'; allowed: lora, full_rank. Did you mean 'lora'?",
        ),
        ("lora=null", "lora is null but must be a section of `key: value` lines"),
        ("data.test_fraction=0.95", "data: validation_fraction + test_fraction must be less than 1"),
        ("data.validation_fraction=0", "data: validation_fraction is 0 and validation is null"),
        ("data.train=3", "data.train is 3 but must be a path"),
        ("probe.num_samples=[64, 32]", "probe: num_samples must rise without repeats; seen [64, 32]"),
        ("finetune.look_every=9000", "finetune: look_every (9000) must be at most steps (1000)"),
        ("finetune.warmup_steps=1001", "finetune: warmup_steps (1001) must be at most steps (1000)"),
        ("finetune.schedule=3", "finetune.schedule is 3 but must be 'cosine', 'constant' or 'linear'"),
        ("probe.steps", "override 'probe.steps' is not of the form key.sub=value, e.g. probe.steps=200"),
        ("probe..steps=3", "override 'probe..steps=3' is not of the form key.sub=value"),
        ("probe.steps=[", "override 'probe.steps=[', line 1: the text is not YAML: while parsing a flow node"),
        ("run_dir.a=3", "override 'run_dir.a=3': run_dir is 'runs/a', which has no settings inside"),
    ],
)
def test_refused_values(tmp_path, override, text):
    assert text in refusal(write(tmp_path, MINIMAL), override)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a: [", "a.yaml, line 1: the text is not YAML: while parsing a flow node, expected the node content"),
        ("a: !!python/name:os.system x", "a.yaml, line 1: the tag '!!python/name:os.system' is not read. Write"),
        ("- a\n- b\n", "must hold `key: value` lines; seen ['a', 'b']"),
        ("", "run_dir is missing (folder that the run writes to, from the current directory)"),
        ("probe:\n  steps: 3\n  steps: 4\n", "line 3: probe.steps is set twice, first at "),
    ],
)
def test_refused_files(tmp_path, content, text):
    assert text in refusal(write(tmp_path, content))


def test_absent_files_and_folders_that_are_no_runs(tmp_path):
    assert refusal(tmp_path / "b.yaml").startswith(f"can't read the config {tmp_path}/b.yaml: No such file")
    assert f"{tmp_path}/{RESOLVED_CONFIG}" in refusal(tmp_path)
