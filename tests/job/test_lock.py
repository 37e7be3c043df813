"""Who holds a run directory, on file systems with and without locks."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from mars_jax.config.load import load_config
from mars_jax.errors import ConfigError
from mars_jax.job.directory import RunDirectory
from mars_jax.job.lock import CLAIM, OWNER, Holder, holder
from mars_jax.job.status import run_status


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\nmodel: {{checkpoint: base}}\ndata: {{train: t.json}}\n")
    return load_config(path)


def without_flock(monkeypatch, number: int = errno.ENOLCK) -> None:
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ESTALE, errno.ENOSYS], ids=errno.errorcode.get)
def without_locks(request, monkeypatch):
    """A file system whose `flock` fails, as on NFS without its lock daemon."""
    without_flock(monkeypatch, request.param)


def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_file_system_without_locks_ended_in_a_traceback(config, without_locks):
    with RunDirectory.open(config) as run:
        assert holder(run.path) == Holder(os.getpid())
        with pytest.raises(ConfigError) as error:
            RunDirectory.open(config).__enter__()
        assert str(error.value) == (
            f"run directory {run.path} is in use by process {os.getpid()}. Wait for it, stop it, or set another "
            f"run_dir. If that process is gone, delete {run.path / OWNER}."
        )
    assert holder(run.path) is None
    assert not (run.path / OWNER).exists()


def test_what_a_killed_process_left_is_taken_over_without_locks(config, without_locks):
    with RunDirectory.open(config) as run:
        pass
    (run.path / OWNER).write_text(f"{gone()} {socket.gethostname()}")
    with RunDirectory.open(config):
        assert holder(run.path) == Holder(os.getpid())


def test_a_process_of_another_machine_is_believed_without_locks(config, without_locks):
    with RunDirectory.open(config) as run:
        pass
    (run.path / OWNER).write_text("123 elsewhere")
    with pytest.raises(
        ConfigError, match=r"in use by process 123 on elsewhere\. Wait .* is gone, delete .*lock\.owner"
    ):
        RunDirectory.open(config).__enter__()
    status = run_status(run, pytest.fail)
    assert (status["process"], status["machine"]) == (123, "elsewhere")


def test_two_processes_that_took_over_at_once_both_held_the_directory(config, without_locks, monkeypatch):
    with RunDirectory.open(config) as run:
        pass
    (run.path / OWNER).write_text(f"{gone()} {socket.gethostname()}")
    first = RunDirectory.open(config)

    def kill(process, signal):
        # The second has read who is gone; before it goes on, the first takes the directory over.
        monkeypatch.undo()
        without_flock(monkeypatch)
        first.__enter__()
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()}\. Wait for it, stop it, or"):
        RunDirectory.open(config).__enter__()
    assert (run.path / OWNER).read_text() == f"{os.getpid()} {socket.gethostname()}"
    first.__exit__(None, None, None)
    assert not any((run.path / name).exists() for name in (OWNER, CLAIM))


def test_one_that_takes_over_is_waited_for(config, without_locks):
    with RunDirectory.open(config) as run:
        pass
    (run.path / OWNER).write_text(f"{gone()} {socket.gethostname()}")
    (run.path / CLAIM).write_text("123 elsewhere")
    with pytest.raises(
        ConfigError, match=r"in use by process 123 on elsewhere\. .* is gone, delete .*lock\.owner\.claim"
    ):
        RunDirectory.open(config).__enter__()


def test_the_end_of_a_run_removed_the_file_of_another_owner(config, without_locks):
    with RunDirectory.open(config) as run:
        (run.path / OWNER).write_text("123 elsewhere")
    assert (run.path / OWNER).read_text() == "123 elsewhere"


@pytest.mark.parametrize("content", [b"", b"x", b"\xff\xfe", b"9" * 6000, b"-1 here"])
def test_a_lock_with_another_text_ended_in_a_traceback(config, content, without_locks):
    with RunDirectory.open(config) as run:
        pass
    (run.path / OWNER).write_bytes(content)
    with pytest.raises(ConfigError, match=r"is in use by process \(unknown\) on "):
        RunDirectory.open(config).__enter__()


@pytest.mark.parametrize("content", [b"", b"x", b"\xff\xfe", b"9" * 6000])
def test_the_text_of_a_lock_that_is_held_may_be_anything(config, content):
    with RunDirectory.open(config) as run:
        (run.path / "lock").write_bytes(content)
        with pytest.raises(ConfigError, match=r"is in use by process (\(unknown\)|9+)\. Wait for it, stop it, or"):
            RunDirectory.open(config).__enter__()


def test_what_killed_writers_left_was_never_removed(config):
    with RunDirectory.open(config) as run:
        pass
    (run.path / "state.json.123.tmp").write_text("{")
    (run.path / "finetune" / "checkpoints" / "x" / "4.orbax-checkpoint-tmp-17" / "state").mkdir(parents=True)
    (run.path / "adapter.77.tmp").mkdir()
    (run.path / "notes.tmp").write_text("a user's own")
    with RunDirectory.open(config):
        pass
    left = sorted(path.relative_to(run.path).as_posix() for path in run.path.rglob("*"))
    assert left == [
        *("config.resolved.yaml", "events.jsonl", "finetune", "finetune/checkpoints", "finetune/checkpoints/x"),
        *("lock", "notes.tmp", "state.json"),
    ]
