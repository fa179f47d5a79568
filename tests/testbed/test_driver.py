"""The thread that owns the links: what it does when reading their counters takes long."""

import itertools
import queue
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from netsenseml.records import monotonic_s, read_records
from testbed.links.qdiscs import QdiscCounters, compile_tree
from testbed.links.shaper import Applied, Prepared
from testbed.links.state import LinkParameters, LinkState
from testbed.recording.driver import LinkDriver
from testbed.recording.link_server import Request, Requests
from testbed.timeline import Change

pytestmark = pytest.mark.alone
READING_S = 0.04
APPLYING_S = 0.08


class SlowLinks:
    """Stands in for a shaper whose counters take long to read; changes take no time."""

    impaired: frozenset[tuple[str, str]] = frozenset()
    line = None
    line_counters = None
    mtu = 1500

    def __init__(self, reading_s: float = READING_S) -> None:
        self.reading_s = reading_s
        self.states = {"w0": LinkState()}
        self.trees = dict.fromkeys((("w0", "up"), ("w0", "down")), compile_tree(LinkParameters()))

    def prepare(self, changes: dict[str, LinkState]) -> Prepared:
        return Prepared(changes, {}, [], {}, 0)

    def commit(self, prepared: Prepared) -> dict[str, Applied]:
        self.states.update(prepared.changes)
        return {link: Applied(monotonic_s(), True) for link in prepared.changes}

    def apply(self, changes: dict[str, LinkState]) -> dict[str, Applied]:
        time.sleep(APPLYING_S)
        return self.commit(self.prepare(changes))

    def deviating(self) -> list[str]:
        return []

    def counters(self) -> dict[tuple[str, str], QdiscCounters]:
        time.sleep(self.reading_s)
        nothing = QdiscCounters(bytes=0, packets=0, drops=0, overlimits=0, backlog_bytes=0, qlen=0)
        return {("w0", "up"): nothing, ("w0", "down"): nothing}


def drive(directory: Path, every_s: float, seconds: float) -> tuple[list[float], list[float]]:
    """Lateness of each change, in s, and the gaps between samples."""
    timeline = [
        Change(round(0.1 + i * every_s, 6), "w0", LinkState(LinkParameters(10**7 + i)))
        for i in range(int(seconds / every_s))
    ]
    links: Any = SlowLinks()
    with LinkDriver(links, timeline, monotonic_s(), directory) as driver:
        time.sleep(seconds + 0.3)
    assert driver.failure is None
    events = [row for row in read_records(directory / "events.jsonl") if row["kind"] == "schedule"]
    times = [
        row["t_s"] for row in read_records(directory / "links.jsonl") if row["direction"] == "up"
    ]
    assert len(events) == len(timeline)
    return [row["applied_s"] - row["planned_s"] for row in events], [
        b - a for a, b in itertools.pairwise(times)
    ]


def test_no_reading_is_begun_shortly_before_a_change(tmp_path: Path) -> None:
    """Readings are due every 100 ms and changes every 90: without care every second change would
    have to wait for a reading."""
    late_s, gaps_s = drive(tmp_path, 0.09, 2.7)
    assert sum(late > READING_S / 4 for late in late_s) <= len(late_s) / 10
    assert statistics.median(gaps_s) < 0.25


def test_changes_in_quick_succession_do_not_keep_the_counters_from_being_read(
    tmp_path: Path,
) -> None:
    _, gaps_s = drive(tmp_path, 0.02, 2.5)
    assert max(gaps_s) < 0.9


def ask(requests: Requests, **body: Any) -> Any:
    request = Request(body)
    requests.put(request)
    return request.answer.get(timeout=5)


def test_a_request_does_not_wait_for_the_next_sample(tmp_path: Path) -> None:
    links: Any = SlowLinks()
    requests: Requests = queue.Queue()
    with LinkDriver(links, [], monotonic_s(), tmp_path, requests):
        answers = [ask(requests, links=[]) for _ in range(50)]
    assert all("links" in answer for answer in answers)
    samples = [row for row in read_records(tmp_path / "links.jsonl") if row["direction"] == "up"]
    assert len(samples) < 25


def test_requests_that_take_long_are_answered_between_changes_that_are_on_time(
    tmp_path: Path,
) -> None:
    """A request takes 80 of the 100 ms between two changes: there is room for one, but not with a
    margin, and it must come to its turn all the same."""
    timeline = [Change(0.1 * i, "w0", LinkState(LinkParameters(10**7 + i))) for i in range(1, 60)]
    links: Any = SlowLinks()
    requests: Requests = queue.Queue()
    with LinkDriver(links, timeline, monotonic_s(), tmp_path, requests):
        answers = [ask(requests, links=[], set={"rate": "5mbit"}) for _ in range(6)]
    assert all("links" in answer for answer in answers), answers
    late_s = [
        row["applied_s"] - row["planned_s"]
        for row in read_records(tmp_path / "events.jsonl")
        if row["kind"] == "schedule"
    ]
    assert statistics.median(late_s) < 0.01


def test_who_asks_at_the_very_end_is_answered(tmp_path: Path) -> None:
    links: Any = SlowLinks()
    requests: Requests = queue.Queue()
    with LinkDriver(links, [], monotonic_s(), tmp_path, requests) as driver:
        time.sleep(0.05)
        driver._stopping.set()
        last = Request({"links": []})
        requests.put(last)
    assert "links" in last.answer.get(timeout=0)


def test_requests_are_answered_where_reading_takes_all_the_time(tmp_path: Path) -> None:
    links: Any = SlowLinks(reading_s=0.25)
    requests: Requests = queue.Queue()
    with LinkDriver(links, [], monotonic_s(), tmp_path, requests):
        assert all("links" in ask(requests, links=[]) for _ in range(3))


def test_a_request_before_the_first_sample_is_answered(tmp_path: Path) -> None:
    links: Any = SlowLinks()
    requests: Requests = queue.Queue()
    with LinkDriver(links, [], monotonic_s() + 1.0, tmp_path, requests):
        answer = ask(requests, links=["w0"])
    assert answer["links"]["w0"]["up"]["carried_bps"] == 0.0
