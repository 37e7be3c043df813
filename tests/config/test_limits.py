"""What no config may ask for: values without end, numbers beyond any machine, endless patterns, odd paths."""

import os
import time
from pathlib import Path

import pytest

from mars_jax.config.load import load_config
from mars_jax.config.planned import most_vectors
from mars_jax.errors import ConfigError
from mars_jax.search.probes.design import probed_vectors

MINIMAL = "run_dir: runs/a\nmodel: {checkpoint: base}\ndata: {train: data/train.json}\n"
LAUGHS = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(10))}}}" for i in range(1, 11))]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 11))]
)


def refusal(folder: Path, text: str = "", *overrides: str) -> str:
    """The message, which must come at once."""
    path = folder / "a.yaml"
    path.write_text(MINIMAL + text)
    start = time.monotonic()
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert time.monotonic() - start < 10  # not minutes
    assert len(str(error.value)) < 2000
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, "line 8: with its aliases this holds 42221 values, 6 deep; at most 20000 values, 20 deep"),
        ('"\\uD800": 1', r"line 4: the key '\ud800' has characters that no setting has"),
        ('"a\\0b": {c: 1}', r"line 4: the key 'a\x00b' has characters that no setting has"),
        (MERGES, "line 8: with its aliases this holds "),
        ("a: &a {b: *a}", "line 4: the value holds itself, by an alias. Write it out."),
        ("a: &a [*a]", "line 4: the value holds itself, by an alias. Write it out."),
        ("<<: &a {<<: *a}", "line 4: the value holds itself, by an alias. Write it out."),
        ("a: " + "[" * 10**5, "line 4: more than 20 lists and mappings within each other"),
        ("a: " + "{a: " * 50 + "1" + "}" * 50, "line 4: more than 20 lists and mappings within each other"),
        ("".join(f"{' ' * i}a:\n" for i in range(1000)), "line 24: more than 20 lists and mappings within each other"),
        ("a: " + "x" * 2**20, "a.yaml: the text is not read: it has more than 1048576 characters"),
        (
            "seed: !!int abc",
            "line 4: the tag '!!int' is not read. Write the value without a tag; in quotes it is text.",
        ),
        ("seed: !!bool maybe", "line 4: the tag '!!bool' is not read."),
        ("seed: !!timestamp x", "line 4: the tag '!!timestamp' is not read."),
        ("seed: !!python/object/apply:os.getcwd []", "line 4: the tag '!!python/object/apply:os.getcwd' is not read."),
        ("seed: !mine 3", "line 4: the tag '!mine' is not read."),
        ("seed: 2026-13-45", "line 4: seed is '2026-13-45' but must be a whole number"),
        ("seed: " + "9" * 5000, "line 4: a number of 5000 characters; at most 40 are read."),
        ("seed: 0x" + "f" * 5000, "line 4: a number of 5002 characters; at most 40 are read."),
        ("seed: 010", "line 4: '010' has a colon or begins with 0, for which YAML may read it to another base"),
        ("seed: 1:30", "line 4: '1:30' has a colon or begins with 0, for which YAML may read it to another base"),
        ("seed: =", "line 4: the text is not YAML: could not determine a constructor for the tag"),
        ("? [a, b]\n: 1", "line 4: a key is a list or mapping; keys are text. Put it in quotes."),
        ("? {a: b}\n: 1", "line 4: a key is a list or mapping; keys are text. Put it in quotes."),
        ("1: 2", "line 4: a key is '1', which YAML reads as int; keys are text. Put it in quotes."),
        ("on: 2", "line 4: a key is 'on', which YAML reads as bool; keys are text. Put it in quotes."),
        ("a: *nowhere", "line 4: the text is not YAML: found undefined alias 'nowhere'"),
        ("--- \na: 1", "line 4: the text is not YAML: expected a single document in the stream"),
        ("a: \x00", "a.yaml: the text is not YAML: unacceptable character #x0000"),
        ("'" + "k" * 1000 + "': 1", "line 4: unknown key " + "k" * 60 + "...."),
    ],
)
def test_a_config_beyond_the_limits_is_refused_at_its_line(tmp_path, text, expected):
    assert expected in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed={a: 1, a: 2}", "override 'seed={a: 1, a: 2}', line 1: a is set twice, first at line 1. Keep one."),
        ("seed=!!int abc", "override 'seed=!!int abc', line 1: the tag '!!int' is not read."),
        ("seed=&a [*a]", "override 'seed=&a [*a]', line 1: the value holds itself, by an alias."),
        ("seed=" + "[" * 10**4, "line 1: more than 20 lists and mappings within each other"),
        ("a" + ".a" * 5000 + "=1", "has 5001 names; no setting has more than 20"),
        ("probe.seeds=" + "1" * 39, "probe.seeds is 1111"),
    ],
)
def test_overrides_have_the_same_limits(tmp_path, override, expected):
    assert expected in refusal(tmp_path, "", override)


def test_an_alias_is_a_copy_so_an_override_changes_one_place(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        MINIMAL + "lora:\n  modules:\n    vision: &one {targets: [a], ranks: [4, 8]}\n    llm:\n      <<: *one\n"
        "    audio: *one\n"
    )
    modules = load_config(path, ["lora.modules.vision.ranks=[2]"]).lora.modules
    assert {name: module.ranks for name, module in modules.items()} == {"vision": (2,), "llm": (4, 8), "audio": (4, 8)}


# Every whole number has a bound, with a message that names it.
TOO_LARGE = [
    ("seed=4294967296", "seed is 4294967296 but must be less than or equal to 4294967295"),
    ("data.max_tokens=1_000_000_000_001", "data.max_tokens is 1000000000001 but must be less than or equal to"),
    ("data.max_pixels=9999999999999999", "data.max_pixels is 9999999999999999 but must be less than or equal to"),
    (
        "optimizer.warmup_steps=99999999",
        "optimizer.warmup_steps is 99999999 but must be less than or equal to 10000000",
    ),
    ("probe.num_samples=[9999999999999]", "probe.num_samples.0 is 9999999999999 but must be less than or equal to"),
    (f"probe.num_samples={list(range(1, 1002))}", "but must be a list of at most 1000 items"),
    ("probe.seeds=1_000_000_000", "probe.seeds is 1000000000 but must be less than or equal to 1000"),
    ("probe.steps=1000000000", "probe.steps is 1000000000 but must be less than or equal to 10000000"),
    ("probe.batch_size=1000000000", "probe.batch_size is 1000000000 but must be less than or equal to 1048576"),
    ("probe.looks_per_doubling=1001", "probe.looks_per_doubling is 1001 but must be less than or equal to 1000"),
    ("probe.chunk_steps=1000000000", "probe.chunk_steps is 1000000000 but must be less than or equal to 1000"),
    ("probe.lanes_per_program=100000", "probe.lanes_per_program is 100000 but must be less than or equal to 10000"),
    ("probe.lane_block=100000", "probe.lane_block is 100000 but must be less than or equal to 1000 or 'auto'"),
    ("convergence.sustain=100000", "convergence.sustain is 100000 but must be less than or equal to 1000"),
    ("laws.bootstraps=1000000000", "laws.bootstraps is 1000000000 but must be less than or equal to 100000"),
    ("selection.sweep=1000000000", "selection.sweep is 1000000000 but must be less than or equal to 1000"),
    ("finetune.steps=1000000000", "finetune.steps is 1000000000 but must be less than or equal to 10000000"),
    ("finetune.batch_size=1000000000", "finetune.batch_size is 1000000000 but must be less than or equal to 1048576"),
    ("evaluate.max_new_tokens=1000000000", "evaluate.max_new_tokens is 1000000000 but must be less than or equal to"),
    ("evaluate.max_candidates=1000000000", "evaluate.max_candidates is 1000000000 but must be less than or equal to"),
    ("mesh.lane=1000000000", "mesh.lane is 1000000000 but must be less than or equal to 1048576"),
    ("lora.modules.llm.ranks=[4, 1000000000]", "lora.modules.llm.ranks.1 is 1000000000 but must be less than or equal"),
    (f"lora.modules.llm.ranks={list(range(1, 1002))}", "but must be a list of at most 1000 items"),
    ("optimizer.learning_rate=1e999", "optimizer.learning_rate is inf but must be a finite number"),
    ("optimizer.learning_rate=" + "9" * 39 + "e9", "a number of 41 characters; at most 40 are read."),
    ("optimizer.clip_norm=.inf", "optimizer.clip_norm is inf but must be a finite number"),
    ("probe.averaging=.nan", "probe.averaging is nan but must be a finite number"),
]


@pytest.mark.parametrize(("override", "expected"), TOO_LARGE)
def test_numbers_beyond_any_machine_are_refused_at_their_key(tmp_path, override, expected):
    assert expected in refusal(tmp_path, "", override)


FIFTY_NINE = list(range(1, 60))


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("single_module", [True, False])
@pytest.mark.parametrize(
    "grids",
    [
        {"llm": (1, 2, 4)},
        {"vision": (0,), "llm": (1, 2, 4)},
        {"vision": (8,), "llm": (1, 2, 4)},
        {"vision": (2, 8), "llm": (2, 8)},
        {"vision": (4, 8, 16, 32, 64), "llm": (4, 8, 16, 32, 64)},
        {"vision": (1, 2, 4, 8), "projector": (2, 4, 8, 16), "llm": (1, 2, 4, 8)},
    ],
)
def test_rank_vectors_are_counted_as_they_are_planned(grids, single_module, corners):
    planned = len(probed_vectors(grids, corners=corners, single_module=single_module))
    counted = most_vectors(grids, corners, single_module)
    # Corners that lie on the cross are counted twice.
    assert planned <= counted <= planned + (2 ** sum(len(ranks) > 1 for ranks in grids.values()) if corners else 0)


def test_a_config_of_many_values_took_seconds_to_be_refused(tmp_path):
    assert "line 19992: more than 20000 keys and values" in refusal(tmp_path, "x:\n" + "- 1\n" * 200_000)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["probe.seeds=1000", "convergence.rule=null"],
            "up to 13,000 lanes are planned (13 rank vectors, 1 data sizes, 1000 seeds); at most 10,000 are allowed.",
        ),
        (
            [
                f"lora.modules={{{', '.join(f'm{i}: {{targets: [x], ranks: [1, 2]}}' for i in range(60))}}}",
                "convergence.rule=null",
            ],
            "up to 1,152,921,504,606,846,976 lanes are planned (1,152,921,504,606,846,976 rank vectors",
        ),
        (
            [
                f"lora.modules={{{', '.join(f'm{i}: {{targets: [x], ranks: {FIFTY_NINE}}}' for i in range(4))}}}",
                "probe.corners=false",
            ],
            "lora.modules has 12,117,361 combinations of ranks and rates to choose from; at most 100,000 are allowed.",
        ),
        (
            ["finetune.steps=10_000_000", "finetune.look_every=1"],
            "10,000,000 steps with an eval point every 1 are 10,000,000 eval points; at most 100,000 are allowed.",
        ),
    ],
)
def test_a_plan_of_too_much_is_refused_before_it_is_listed(tmp_path, overrides, expected):
    assert expected in refusal(tmp_path, "", *overrides)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ('"a\\0b"', "the path 'a\\x00b' has a NUL character, which no path may have"),
        ("x" * 10_000, "has 10000 bytes; a path has at most 4095, and each name in it 255"),
        ("x" * 300, "has 300 bytes; a path has at most 4095, and each name in it 255"),
        ("~nosuchuser/x", "the path '~nosuchuser/x' begins with the home of an unknown user"),
        ('"\\uD800"', "the path '\\ud800' is not UTF-8. Rename the file or folder"),
    ],
)
@pytest.mark.parametrize("key", ["run_dir", "model.checkpoint", "data.train", "data.image_root"])
def test_what_cannot_be_a_path_is_refused_at_its_key(tmp_path, key, path, expected):
    message = refusal(tmp_path, "", f"{key}={path}")
    assert f": {key}: the path " in message
    assert expected in message


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (
            "(",
            "llm.targets: '(' is not a regular expression: missing ), unterminated subpattern at position 0",
        ),
        ("a(?=b)", "'a(?=b)' can't be matched in linear time: invalid perl operator: (?= at position 1."),
        ("(a)\\1", "can't be matched in linear time: invalid escape sequence: \\1 at position 3."),
        ("((a{1000}){1000}){1000}", "can't be matched in linear time: invalid repetition size: {1000}"),
        ("(" * 3000 + ")" * 3000, "is not a regular expression: its brackets nest too deeply"),
        ("a" * 10_001, "has 10001 characters; allowed are 10000"),
        # Python and RE2 would read these differently.
        ("a{,3}", "'a{,3}' has a repetition without a lower bound at position 1: write {0,N}"),
        ("[[:alpha:]]", "'[[:alpha:]]' has a set that can be read in two ways: Possible nested set at position 1"),
        ("\\uD800", "is not text: lone surrogate at position 0"),
    ],
)
def test_patterns_that_are_none_or_cannot_be_matched_quickly_are_refused(tmp_path, pattern, expected):
    quoted = f"['{pattern}']" if "uD800" not in pattern else f'["{pattern}"]'
    assert expected in refusal(tmp_path, "", f"lora.modules.llm.targets={quoted}")


@pytest.mark.parametrize("name", ["a b", "", "$x^", "<b>", "ä", "1a", "a/b", "x" * 41, "a-b"])
def test_module_names_are_plain(tmp_path, name):
    message = refusal(tmp_path, "", f"lora.modules={{'{name}': {{targets: [x], ranks: [2]}}}}")
    assert "can't name a module; a name has up to 40 letters, digits and underscores, the first a letter" in message


def test_a_config_that_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/zero")):
        with pytest.raises(ConfigError, match=rf"the config {path} is no regular file\. Give a YAML file or a run"):
            load_config(path)


@pytest.mark.parametrize("path", ["x" * 10_000, "a\0b", "\udc80.yaml", "", "a/" * 3000])
def test_a_config_path_that_cannot_be_one_is_refused(path):
    with pytest.raises(ConfigError, match=r"can't read the config .*Give a YAML file or a run directory"):
        load_config(path)


def test_a_binary_config_is_refused(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match=r"a\.yaml: the text is not YAML: 'utf-8' codec can't decode"):
        load_config(file)


def test_many_faults_filled_the_screen(tmp_path):
    (tmp_path / "a.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "a.yaml", [f"lora.modules.llm.targets={list(range(200))}"])
    first, *rest = str(error.value).splitlines()
    assert "targets.0 is 0 but must be text" in first
    assert len(rest) == 20
    assert rest[-1] == "and 180 more"


def test_a_long_name_filled_the_screen(tmp_path):
    for key in ("adapter.method", "convergence.rule"):
        assert "'xxxx" in refusal(tmp_path, "", f"{key}={'x' * 3000}")


def test_half_a_character_in_an_override_blamed_the_whole_config(tmp_path):
    text = refusal(tmp_path, "", "\udcff=1")
    assert text == r"override '\udcff=1': the key has characters that no setting has"
