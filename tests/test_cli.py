"""The command: speed of its help, exit codes, clean stdout, interrupts. Phases have tests of their own."""

import json
import signal
import subprocess
import sys
import time

import pytest
import typer

from mars_jax.cli import execute
from mars_jax.config.load import load_config
from mars_jax.errors import ConfigError, DataError, DoesNotFitError, NoValidResultError
from mars_jax.job import files
from mars_jax.job.directory import RunDirectory
from mars_jax.runtime.jsonfiles import append_jsonl

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
    with RunDirectory.open(load_config(config_file)) as run, run.book.phase("probe", "h"):
        append_jsonl((run / files.LANES), {"lane": "vision1-D8-s0"})
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


def test_our_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        execute(lambda reporter: {"x": 1 // 0}, json_output=True)


def test_json_on_stdout_is_alone_whatever_is_printed(capsys):
    def work(reporter):
        print("a chatty library")
        reporter.notice("a notice [with brackets]")
        with reporter.progress("probe", total=2, unit="steps") as advance:
            advance(2, "loss 1.0")
        return {"loss": float("nan"), "ranks": {"vision": 8, "llm": 32}}

    execute(work, json_output=True)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": None, "ranks": {"vision": 8, "llm": 32}}
    assert "a chatty library" in err
    assert "a notice [with brackets]" in err
    assert "vision=8 llm=32" in err


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
