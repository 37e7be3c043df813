"""The persistent cache between real processes, and its folder: whose it is, who may write, what if it can't be."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mars_jax.errors import ConfigError
from mars_jax.runtime import compile_cache

COMPILE = """
import json
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
from mars_jax.runtime import compile_cache
folder = compile_cache.enable()
with compile_cache.CompileCounter() as counter:
    result = jax.jit(lambda x: x @ x.T)(np.eye(3, dtype=np.float32))
    result = jax.jit(lambda x: x + 1)(result)
total = float(np.asarray(jax.jit(lambda x: x * 2)(result)).sum())
print(json.dumps({"folder": folder, **vars(counter), "compiles": counter.compiles, "sum": total}))
"""


@pytest.fixture
def no_cache_set(monkeypatch):
    """As a user who has set nothing, and the configuration of this process as it was."""
    import jax

    names = ["jax_compilation_cache_dir", *compile_cache._THRESHOLDS]
    before = {name: getattr(jax.config, name) for name in names}
    for name in names:
        monkeypatch.delenv(name.upper(), raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compile_cache.compilation_cache.reset_cache()


def run(**environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE],
        env=kept | {"TF_CPP_MIN_LOG_LEVEL": "3"} | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_a_second_process_compiles_nothing(tmp_path):
    first, second = run(XDG_CACHE_HOME=tmp_path / "c"), run(XDG_CACHE_HOME=tmp_path / "c")
    assert first["compiles"] == first["misses"] == len(first["programs"]) == 2  # what came after isn't counted
    assert first["hits"] == 0
    assert second["compiles"] == second["misses"] == 0
    assert second["hits"] == 2
    assert second["programs"] == first["programs"]
    assert 0 < second["seconds"] < first["seconds"]
    assert second["sum"] == first["sum"] == 24.0
    folder = Path(first["folder"])
    assert second["folder"] == str(folder)
    assert re.fullmatch("xla-[0-9a-f]{16}", folder.name)
    assert folder.parent == tmp_path / "c" / "mars_jax"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o700, 0o700]


def test_an_entry_cut_short_is_compiled_again_and_replaced(tmp_path):
    entries = [*Path(run(XDG_CACHE_HOME=tmp_path)["folder"]).glob("*-cache")]
    cut, empty, whole = entries
    cut.write_bytes(cut.read_bytes()[:-20])
    empty.write_bytes(b"")
    modified = whole.stat().st_mtime_ns
    again = run(XDG_CACHE_HOME=tmp_path)
    assert again["sum"] == 24.0
    assert min(cut.stat().st_size, empty.stat().st_size) > 500
    assert whole.stat().st_mtime_ns == modified
    assert run(XDG_CACHE_HOME=tmp_path)["hits"] == 2


def test_what_the_user_has_set_is_honoured(tmp_path, monkeypatch, no_cache_set):
    import jax

    assert run(JAX_COMPILATION_CACHE_DIR=tmp_path / "mine")["folder"] == str(tmp_path / "mine")
    assert len([*(tmp_path / "mine").glob("*-cache")]) == 3
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/folder")
    assert compile_cache.enable() == jax.config.jax_compilation_cache_dir == "gs://bucket/folder"
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    assert compile_cache.enable(tmp_path / "given") == str(tmp_path / "given")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7.0
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == -1


@pytest.mark.parametrize("mode", [0o770, 0o702])
@pytest.mark.parametrize("level", ["folder", "parent"])
def test_a_folder_that_others_may_write_is_refused(tmp_path, monkeypatch, no_cache_set, mode, level):
    import jax

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = Path(compile_cache.enable())
    jax.config.update("jax_compilation_cache_dir", None)
    shared = folder if level == "folder" else folder.parent
    shared.chmod(mode)
    text = (
        f"can't keep compiled programs in {shared}: others may write to it (mode {mode:o}), and what it holds is "
        "executed; chmod 700 it. Set XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR to a folder that only you can write."
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path, no_cache_set):
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, -1)
    with pytest.raises(
        ConfigError, match="theirs: it belongs to user 12345, not to you, and what it holds is executed"
    ):
        compile_cache.enable(tmp_path / "theirs")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch, no_cache_set):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'file' / 'xla'}: File exists ({tmp_path / 'file'})")):
        compile_cache.enable(tmp_path / "file" / "xla")
    with pytest.raises(ConfigError, match=r"/proc/xla: No such file or directory \(/proc/xla\)"):
        compile_cache.enable(Path("/proc/xla"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'file' / '.cache' / 'mars_jax' / 'xla-'}")):
        compile_cache.enable()
    assert not Path("relative").exists()


def test_a_command_goes_on_without_a_cache_and_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    config = tmp_path / "a.yaml"
    config.write_text(f"run_dir: {tmp_path / 'run'}\nmodel: {{checkpoint: base}}\ndata: {{train: t.json}}\n")
    command = [sys.executable, "-c", "from mars_jax.cli import main; main()", "fit", str(config)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "file")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    warning, error = done.stderr.splitlines()
    assert warning.startswith(f"warning: can't keep compiled programs in {tmp_path / 'file' / 'mars_jax' / 'xla-'}")
    assert warning.endswith("This run goes on and compiles what it needs.")
    assert done.returncode == 2
    assert error.startswith("mars: ")
    assert "compiled" not in error
