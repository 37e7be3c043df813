"""What people see: progress on terminals and in logs, and results as tables."""

import io
import time

from rich.console import Console

from mars_jax.runtime.progress import ConsoleReporter
from mars_jax.runtime.tables import check_tables, tables


def shown(result) -> str:
    console = Console(file=io.StringIO(), width=100)
    for table in tables(result):
        console.print(table)
    return console.file.getvalue()


def test_a_log_gets_plain_lines_with_the_time_left():
    console = Console(file=io.StringIO(), width=40)
    with ConsoleReporter(console, seconds_between_lines=0).progress("probe", total=400, unit="steps") as advance:
        time.sleep(0.01)
        advance(100, "loss 1.23 [nats], a line that is longer than the console is wide")
        advance(300, "")
    first, last = console.file.getvalue().splitlines()
    assert (
        first == "probe: 100/400 steps, 0:00:00 left, loss 1.23 [nats], a line that is longer than the console is wide"
    )
    assert last == "probe: 400/400 steps"


def test_time_left_does_not_count_what_an_earlier_run_did():
    console = Console(file=io.StringIO(), width=100)
    with ConsoleReporter(console, seconds_between_lines=0).progress(
        "probe", total=2000, unit="steps", done=900
    ) as advance:
        time.sleep(0.1)
        advance(100, "")
    hours, minutes, seconds = console.file.getvalue().split(", ")[1].removesuffix(" left\n").split(":")
    assert console.file.getvalue().startswith("probe: 1000/2000 steps")
    assert int(hours) * 3600 + int(minutes) * 60 + int(seconds) >= 1


def test_quick_work_stays_silent_in_a_log():
    console = Console(file=io.StringIO())
    with ConsoleReporter(console).progress("probe", total=2, unit="steps") as advance:
        advance(1, "")
        advance(1, "")
    assert console.file.getvalue() == ""


def test_a_terminal_gets_a_bar_and_notices_beside_it():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    reporter = ConsoleReporter(console)
    with reporter.progress("probe [1/2]", total=400, unit="steps") as advance:
        advance(400, "loss [1.23]")
        reporter.warn("lane [3] diverged")
    text = console.file.getvalue()
    assert "probe [1/2]" in text
    assert "400/400" in text
    assert "loss [1.23]" in text
    assert "warning: lane [3] diverged" in text


def test_values_are_shown_before_records():
    text = shown(
        {
            "candidates": [
                {"ranks": {"vision": 8, "llm": 32}, "kept": True, "p": 0.123456},
                {"ranks": {}, "why": "[x]"},
            ],
            "pick": {"vision": 8, "llm": 32},
            "parameters": 1234567,
            "fallback": None,
            "predicted_ci": [0.5, 12345.6],
        }
    )
    assert [line.split() for line in text.splitlines() if line.strip() and "─" not in line] == [
        ["pick", "vision=8", "llm=32"],
        ["parameters", "1,234,567"],
        ["fallback", "-"],
        ["predicted_ci", "0.5,", "12,346"],
        ["candidates"],
        ["ranks", "kept", "p", "why"],
        ["vision=8", "llm=32", "yes", "0.1235", "-"],
        ["-", "-", "[x]"],
    ]


def test_what_a_sample_teaches_stands_out_in_its_text():
    samples = [{"id": "a", "text": "What? Red.", "supervised": "Red.", "learned": [[6, 10]]}]
    console = Console(width=60, color_system="standard", force_terminal=True, file=io.StringIO())
    for table in check_tables({"data": {"train": 3, "notes": []}, "samples": samples}):
        console.print(table)
    text = console.file.getvalue()
    assert "\x1b[2mWhat? \x1b[0m\x1b[1;32mRed.\x1b[0m" in text


def test_control_characters_of_a_sample_are_shown_at_their_place():
    samples = [{"id": "a\x1b[1m", "text": "Wh\x1b[5mat?\nR\u202eed.\x07", "supervised": "Red.", "learned": [[10, 15]]}]
    console = Console(width=80, color_system="standard", force_terminal=True, file=io.StringIO())
    for table in check_tables({"data": {"train": 3, "notes": []}, "samples": samples}):
        console.print(table)
    text = console.file.getvalue()
    assert r"a\x1b[1m" in text
    assert "\x1b[2mWh\\x1b[5mat?" in text
    assert "\x1b[1;32mR\\u202eed.\x1b[0m\x1b[2m\\x07" in text
    assert "\x1b[5m" not in text


def test_mappings_of_records_get_a_row_each_and_deeper_ones_their_path():
    text = shown(
        {"phases": {"probe": {"seconds": 2.0}, "fit": {"seconds": 3.5}}, "laws": {"E": 0.5, "ci": {"E": [0.1, 0.9]}}}
    )
    rows = [line.split() for line in text.splitlines() if line.strip() and "─" not in line]
    assert rows == [
        ["phases"],
        ["seconds"],
        ["probe", "2"],
        ["fit", "3.5"],
        ["laws"],
        ["E", "0.5"],
        ["laws.ci"],
        ["E", "0.1,", "0.9"],
    ]
