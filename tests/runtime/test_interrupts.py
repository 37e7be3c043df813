"""Real signals: one asks, two stop at once, handlers come back, and no request is lost."""

import json
import signal
import subprocess
import sys
import threading

import pytest

from mars_jax.config.load import load_config
from mars_jax.errors import Interrupted
from mars_jax.job.directory import RunDirectory
from mars_jax.runtime.interrupts import Interrupts

HANDLED = (signal.SIGINT, signal.SIGTERM)

# Chunks of 10 ms; `heeds` says whether the work checks for requests.
WORK = """
import sys, time
from mars_jax import cli
from mars_jax.errors import Interrupted
from mars_jax.runtime.interrupts import Interrupts
heeds = sys.argv.pop() == "heeds"
def work(reporter):
    with Interrupts() as interrupts:
        for chunk in range(3000):
            time.sleep(0.01)
            if chunk == 0: print("ready", flush=True)
            if interrupts.requested and heeds:
                raise Interrupted(f"{interrupts.requested.name}: checkpoint saved; run the same command again to go on")
            if interrupts.requested: print("busy", flush=True)
@cli.app.command()
def wait(): cli.execute(work, json_output=True)
cli.main()
"""


@pytest.fixture
def restored():
    """Handlers are the test's own; those of pytest come back."""
    former = [signal.getsignal(number) for number in HANDLED]
    yield
    for number, handler in zip(HANDLED, former, strict=True):
        signal.signal(number, handler)


def start(heeds):
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, "wait", heeds], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(process, "ready")
    return process


def wait_for(process, line):
    assert process.stderr is not None
    for read in process.stderr:
        if read.strip() == line:
            return
    raise AssertionError(f"the process ended before it said {line!r}")


def stopped(then):
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.requested is signal.SIGTERM
        then()


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_is_heeded_between_chunks_and_the_command_says_what_was_saved(number):
    process = start("heeds")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    message = f"{number.name}: checkpoint saved; run the same command again to go on"
    assert process.returncode == 130
    assert json.loads(out) == {"error": {"type": "Interrupted", "message": message, "exit_code": 130}}
    assert err == f"mars: {message}\n"


@pytest.mark.parametrize("second", HANDLED)
def test_a_second_signal_stops_at_once(second):
    process = start("does not heed")
    process.send_signal(signal.SIGINT)
    wait_for(process, "busy")
    process.send_signal(second)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    message = "stopped at once: what was done since the last checkpoint is lost; run the same command again to go on"
    assert json.loads(out)["error"]["message"] == message


def test_former_handlers_come_back_however_the_block_ends(restored):
    def mine(number, frame):
        raise AssertionError

    for number in HANDLED:
        signal.signal(number, mine)
    with Interrupts():
        assert all(signal.getsignal(number) is not mine for number in HANDLED)
    assert all(signal.getsignal(number) is mine for number in HANDLED)
    with pytest.raises(Interrupted):
        stopped(lambda: signal.raise_signal(signal.SIGTERM))
    assert all(signal.getsignal(number) is mine for number in HANDLED)


def test_a_request_that_the_block_did_not_answer_goes_to_the_former_handler(restored):
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with Interrupts():
        signal.raise_signal(signal.SIGTERM)
        assert seen == []
    assert seen == [signal.SIGTERM]
    with Interrupts() as outer:
        with Interrupts():
            signal.raise_signal(signal.SIGTERM)
        assert outer.requested is signal.SIGTERM
    assert seen == [signal.SIGTERM] * 2
    with pytest.raises(ZeroDivisionError):
        stopped(lambda: 1 // 0)
    assert seen == [signal.SIGTERM] * 2


def test_an_ignored_signal_stays_ignored(restored):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_changes_no_handler():
    before = [signal.getsignal(number) for number in HANDLED]
    inside = []

    def work():
        with Interrupts() as interrupts:
            inside.extend(signal.getsignal(number) for number in HANDLED)
            inside.append(interrupts.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [*before, None]


def test_the_run_directory_books_it_as_interrupted(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text(f"run_dir: {tmp_path / 'run'}\nmodel: {{checkpoint: base}}\ndata: {{train: t.json}}\n")
    with RunDirectory.open(load_config(config)) as run:
        with pytest.raises(Interrupted), run.book.phase("probe", {"data": "h"}):
            raise Interrupted("saved")
        assert run.book.state()["phases"]["probe"]["status"] == "interrupted"
