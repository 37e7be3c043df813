"""The page of the kill benchmark is made from what the benchmark publishes."""

from benchmarks.compat.kills import _detail
from benchmarks.lib import pages


def test_the_page_shows_what_is_published():
    end = {"during": "probe", "checkpoints": 2}
    run = {"failed": None, "differ": [], "done_again": []}
    runs = [{**run, "kind": "kill", "ends": [end, end]}, {**run, "kind": "cut", "ends": [end], "done_again": ["fit"]}]
    detail = {"seconds_of_a_job": {"programs from disk": 9.0}, **_detail({"kill": 2, "cut": 1}, runs)}
    section = pages.kills(detail)
    kills, cuts = section.tables[""]
    assert (kills["number"], kills["survived"], cuts["number"], cuts["survived"]) == (2, 2, 1, 0)
    assert section.meaning.startswith("Kills and power cuts by phase: probe 3. A job that nobody stops takes 9")
