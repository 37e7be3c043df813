"""The command: speed of its help, exit codes, clean stdout, interrupts. Phases have tests of their own."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import typer

from mars_jax.cli import execute
from mars_jax.config.load import load_config
from mars_jax.errors import ConfigError, DataError, DoesNotFitError, NoValidResultError
from mars_jax.job import files
from mars_jax.job.directory import RunDirectory
from mars_jax.runtime.jsonfiles import append_jsonl
from tests.helpers.lane_record import LANE

MARS = [sys.executable, "-c", "from mars_jax.cli import main; main()"]


def mars(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MARS, *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\nmodel: {{checkpoint: base}}\ndata: {{train: t.json}}\n")
    return path


def test_help_is_quick_and_names_every_command():
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        done = mars("--help")
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1
    commands = [
        "run",
        "check",
        "plan",
        "probe",
        "fit",
        "select",
        "finetune",
        "evaluate",
        "compare",
        "diff",
        "export",
        "report",
        "status",
    ]
    for name in commands:
        assert f"\n  {name} " in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("import mars_jax.cli", "jax numpy transformers matplotlib pydantic yaml rich"),
        (
            "import mars_jax.job.directory, mars_jax.runtime.progress, mars_jax.runtime.tables",
            "jax numpy transformers matplotlib rich",
        ),
    ],
)
def test_nothing_heavy_is_imported(statement, banned):
    code = f"import sys; {statement}; print([name for name in {banned!r}.split() if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_version():
    assert mars("--version").stdout == "mars_jax 0.1.0\n"


def test_wrong_arguments_exit_with_2():
    assert mars("frobnicate").returncode == 2
    assert mars("status").returncode == 2


def test_a_config_error_is_one_line_on_stderr_without_a_traceback(config_file):
    done = mars("run", config_file, "probe.stepz=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("mars: override 'probe.stepz=3': unknown key probe.stepz. Did you mean probe.steps?")
    assert done.stderr.count("\n") == 1


def test_a_config_error_as_json(config_file):
    done = mars("plan", config_file, "--json", "seed=x")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == error["exit_code"] == 2
    assert error["type"] == "ConfigError"
    assert error["message"].startswith("override 'seed=x': seed is 'x' but must be a whole number")
    assert error["message"] in done.stderr


def test_status_of_a_run_from_its_config_or_its_directory(config_file):
    with RunDirectory.open(load_config(config_file)) as run, run.book.phase("probe", {"data": "h"}):
        append_jsonl((run / files.LANES), LANE)
        with (run / files.LANES).open("a") as file:
            file.write('{"lane": ')
    by_config, by_directory = mars("status", config_file, "--json"), mars("status", run.path, "--json")
    document = json.loads(by_config.stdout)
    assert document == json.loads(by_directory.stdout)
    assert document["run_dir"] == str(run.path)
    assert document["phases"]["probe"]["status"] == "done"
    assert document["lanes_done"] == 1
    assert "warning" in by_config.stderr
    assert "lanes.jsonl, line 2: incomplete, as after a kill" in by_config.stderr
    human = mars("status", run.path)
    assert human.returncode == 0
    assert "lanes_done" in human.stdout
    assert "probe" in human.stdout
    assert "\x1b" not in human.stdout + human.stderr


def test_status_needs_a_run_and_whole_files(config_file):
    missing = mars("status", config_file)
    assert missing.returncode == 2
    assert "there is no run in" in missing.stderr
    with RunDirectory.open(load_config(config_file)) as run:
        (run / files.PLAN).write_text("{")
    broken = mars("status", run.path)
    assert broken.returncode == 3
    assert "plan.json is not JSON" in broken.stderr


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError, 2), (DataError, 3), (DoesNotFitError, 4), (NoValidResultError, 5)]
)
@pytest.mark.parametrize("json_output", [False, True])
def test_every_error_of_ours_has_its_exit_code(error, code, json_output, capsys):
    def work(reporter):
        raise error("what, where, what to do")

    with pytest.raises(typer.Exit) as exit_info:
        execute(work, json_output=json_output)
    assert exit_info.value.exit_code == code
    out, err = capsys.readouterr()
    assert err == "mars: what, where, what to do\n"
    document = {"error": {"type": error.__name__, "message": "what, where, what to do", "exit_code": code}}
    assert (json.loads(out) if json_output else out) == (document if json_output else "")


def test_our_bugs_are_named_as_ours_and_keep_their_traceback(capsys):
    with pytest.raises(typer.Exit) as exit_info:
        execute(lambda reporter: {"x": 1 // 0}, json_output=True)
    out, err = capsys.readouterr()
    message = json.loads(out)["error"]["message"]
    assert exit_info.value.exit_code == 1
    assert err == f"mars: {message}\n"
    found = re.match(r"a bug of mars_jax, not of your input: ZeroDivisionError: .* The traceback is in (\S+);", message)
    file = Path(found[1])
    assert "1 // 0" in file.read_text()
    file.unlink()


XLA_FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MemoryError(), ""),
        (MemoryError("9 bytes"), " ('9 bytes')"),
        (jax.errors.JaxRuntimeError(XLA_FULL), f" ({XLA_FULL!r})"),
    ],
    ids=["of the machine", "of the machine, with its cause", "of a device, from XLA"],
)
def test_a_full_memory_is_no_bug(capsys, error, cause):
    def work(reporter):
        raise error

    with pytest.raises(typer.Exit) as exit_info:
        execute(work, json_output=False)
    assert exit_info.value.exit_code == 4
    assert capsys.readouterr().err == (
        f"mars: the memory is full{cause}. Finished work is kept. Ask for less, or take more.\n"
    )


def test_an_error_that_quotes_xlas_word_for_a_full_memory_is_a_bug_all_the_same(capsys):
    def work(reporter):
        raise RuntimeError("no RESOURCE_EXHAUSTED here")

    with pytest.raises(typer.Exit) as exit_info:
        execute(work, json_output=False)
    assert exit_info.value.exit_code == 1
    err = capsys.readouterr().err
    assert err.startswith("mars: a bug of mars_jax, not of your input: RuntimeError")
    Path(re.search(r"The traceback is in (\S+);", err)[1]).unlink()


def test_what_the_file_system_refuses_is_no_bug(capsys, tmp_path):
    with pytest.raises(typer.Exit) as exit_info:
        execute(lambda reporter: {"x": (tmp_path / ("x" * 300)).read_text()}, json_output=False)
    assert exit_info.value.exit_code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"mars: can't use {tmp_path}/xxx")
    assert err.endswith(
        "xxx: File name too long. Finished work is kept. Check the path, its kind and its rights, and run the same "
        "command again to go on.\n"
    )


HOSTILE = "red\x1b]0;mine\x07\x1b[2J\x9b31m\u202egnp\x7f\ud800 caf\xe9"
SHOWN = r"red\x1b]0;mine\x07\x1b[2J\x9b31m\u202egnp\x7f\ud800"


def test_control_characters_are_shown_and_never_sent(capsys):
    def work(reporter):
        reporter.notice(HOSTILE)
        reporter.warn(HOSTILE)
        with reporter.progress(HOSTILE, total=2, unit="steps") as advance:
            advance(2, HOSTILE)
        return {"id": HOSTILE, HOSTILE: {"a": [1], "b": HOSTILE}, "rows": [{HOSTILE: HOSTILE}]}

    execute(work, json_output=False)
    out, err = capsys.readouterr()
    for text in (out, err):
        assert SHOWN in text
        assert not set(text) & set("\x1b\x07\x9b\u202e\x7f\ud800")

    def failing(reporter):
        raise DataError(HOSTILE)

    for json_output in (False, True):
        with pytest.raises(typer.Exit):
            execute(failing, json_output=json_output)
        out, err = capsys.readouterr()
        assert err == f"mars: {SHOWN} caf\xe9\n"
        assert out.isascii()
        assert not json_output or json.loads(out)["error"]["message"] == HOSTILE


STATUS_OF_ODD_NAME = """
import sys
from mars_jax import cli
def work(reporter):
    reporter.warn("caf\\xe9 \\u6f22")
    with reporter.progress("caf\\xe9 \\u6f22", total=2, unit="steps") as advance:
        advance(2, "caf\\xe9 \\u6f22")
    if "--fail" in sys.argv:
        raise cli.ConfigError("caf\\xe9 \\u6f22")
    return {"name": "caf\\xe9 \\u6f22", "rows": [{"a": 1}] * 3}
@cli.app.command()
def work_on(fail: bool = False, json: bool = False): cli.execute(work, json_output=json)
cli.main()
"""


def odd_name(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command whose texts have letters beyond ASCII and Latin-1, its streams redirected by a shell."""
    command = shlex.join([sys.executable, "-c", STATUS_OF_ODD_NAME, "work-on", *arguments])
    return subprocess.run(
        ["bash", "-c", f"{command} {shell}"], capture_output=True, timeout=60, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, rb"caf\xe9 \u6f22"),
        ({"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}, b"caf\xe9 \\u6f22"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, rb"caf\xe9 \u6f22"),
        ({"LC_ALL": "C.UTF-8"}, "caf\xe9 \u6f22".encode()),
    ],
)
def test_streams_of_any_encoding_take_every_message(environment, said):
    done = odd_name(**environment)
    assert done.returncode == 0
    assert said in done.stdout
    assert b"warning: " + said in done.stderr
    failed = odd_name("--fail", "--json", **environment)
    assert failed.returncode == 2
    assert b"mars: " + said in failed.stderr
    assert json.loads(failed.stdout)["error"]["message"] == "caf\xe9 \u6f22"


WARNING = "warning: caf\xe9 \u6f22\n".encode()
FULL = WARNING + b"mars: can't write the result to stdout: No space left on device. Finished work is kept.\n"


@pytest.mark.parametrize(
    ("shell", "code", "err"),
    [
        # Whether the pipe is closed by then is for the system to decide.
        ("| head -c 0; exit ${PIPESTATUS[0]}", 141, WARNING),
        (">/dev/full", 4, FULL),
        (">&-", 0, WARNING),
        ("2>/dev/full", 0, b""),
        ("2>&-", 0, b""),
        ("2> >(exec true)", 0, b""),
        (">&- 2>&-", 0, b""),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_stream_that_cannot_be_written_ends_in_a_message_or_in_silence(shell, code, err, arguments):
    done = odd_name(*arguments, shell=shell)
    assert done.returncode in ({code, 0} if "head" in shell else {code})
    # With --json the table goes to stderr, after the JSON.
    table = odd_name().stdout if arguments and done.returncode == 0 and err else b""
    assert done.stderr == err + table
    out = odd_name(*arguments).stdout if shell.startswith("2>") else b""
    assert done.stdout == out


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_to_a_full_device_is_no_traceback(option):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*MARS, option], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 4
    assert done.stderr == "mars: can't write the result to stdout: No space left on device. Finished work is kept.\n"


def test_json_on_stdout_is_alone_whatever_is_printed(capfd):
    def work(reporter):
        print("a chatty library")
        os.write(1, b"one in another language\n")  # as tokenizers does where it does not know an option
        reporter.notice("a notice [with brackets]")
        with reporter.progress("probe", total=2, unit="steps") as advance:
            advance(2, "loss 1.0")
        return {"loss": float("nan"), "ranks": {"vision": 8, "llm": 32}}

    execute(work, json_output=True)
    out, err = capfd.readouterr()
    assert json.loads(out) == {"loss": None, "ranks": {"vision": 8, "llm": 32}}
    assert "a chatty library" in err
    assert "one in another language" in err
    assert "a notice [with brackets]" in err
    assert "vision=8 llm=32" in err


def test_what_c_prints_came_behind_the_json_from_its_own_buffer(tmp_path):
    code = (
        "import ctypes; from mars_jax import cli\n"
        "def work(reporter):\n"
        "    ctypes.CDLL(None).puts(b'from C'); return {'result': 1}\n"
        "cli.execute(work, json_output=True)"
    )
    # A file, and no PYTHONUNBUFFERED: otherwise C keeps nothing back.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with (tmp_path / "out").open("w") as out:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert json.loads((tmp_path / "out").read_text()) == {"result": 1}
    assert "from C\n" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_how_to_go_on(number):
    code = (
        "import time; from mars_jax import cli\n"
        "def work(reporter):\n"
        "    reporter.notice('working'); time.sleep(60)\n"
        "@cli.app.command()\n"
        "def wait(): cli.execute(work, json_output=True)\n"
        "cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "working\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "mars: state saved; run the same command again to go on\n"
    assert json.loads(out)["error"]["exit_code"] == 130
