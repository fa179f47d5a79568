"""The live page: it tells what was recorded, once; who has not its address gets nothing; links move
by requests."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import Browser
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from synthetic_run import BATCH, append, link_rows, steps_file, write_cell, write_run
from typer.testing import CliRunner

from netsenseml.records import RecordFile, monotonic_s, read_records
from testbed.cli import app
from testbed.links.qdiscs import QdiscCounters, compile_tree
from testbed.links.shaper import Applied
from testbed.links.state import LinkParameters, LinkState
from testbed.live.bins import Bins
from testbed.live.server import CannotServe, LivePage
from testbed.live.tail import Tail
from testbed.live.view import RunView
from testbed.live.watch import under_way
from testbed.plan import load_plan
from testbed.protocol import CELL_FILE, EVALS_FILE, RESULT_FILE, host_directory
from testbed.recording.driver import LinkDriver
from testbed.recording.link_server import SOCKET_FILE, LinkServer
from testbed.results.load import load_run
from testbed.results.records import finish_cell
from testbed.results.summary import summarize
from testbed.run import start
from testbed.run.directory import LOCK_FILE, run_lock
from testbed.run.live_page import live_page

ROOT = Path(__file__).parents[2]
MISCHIEF = "</script><img src=x onerror=alert(1)>"


# Records as they grow


@settings(max_examples=40)
@given(
    st.lists(
        st.binary(max_size=20).filter(lambda line: b"\n" not in line) | st.integers(0, 99),
        max_size=20,
    ),
    st.lists(st.integers(0, 400), max_size=8),
)
def test_every_row_is_told_once_however_it_is_written(
    tmp_path_factory: Any, lines: list[bytes | int], cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("tail") / "rows.jsonl"
    data = b"".join(
        (json.dumps({"n": line}).encode() if isinstance(line, int) else line) + b"\n"
        for line in lines
    )
    tail, told = Tail(path), []
    ends = sorted({*(cut for cut in cuts if cut < len(data)), len(data)})
    for begin, end in zip([0, *ends], ends, strict=False):
        with path.open("ab") as file:
            file.write(data[begin:end])
        told += [row["n"] for row in tail.rows(time.monotonic() + 60) if "n" in row]
    assert told == [line for line in lines if isinstance(line, int)]


def test_a_file_that_was_replaced_is_read_anew_and_one_that_is_none_is_left(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    tail = Tail(path)

    def rows() -> list[Any]:
        return list(tail.rows(time.monotonic() + 60))

    assert rows() == []
    append(path, [{"n": 1}, {"n": 2}])
    assert rows() == [{"n": 1}, {"n": 2}] and rows() == []
    path.unlink()
    append(path, [{"n": 3}])
    assert rows() == [{"n": 3}]
    (tmp_path / "secret").write_text('{"n": 4}\n')
    for replace in (
        lambda: path.symlink_to(tmp_path / "secret"),
        lambda: os.mkfifo(path),
        path.mkdir,
    ):
        path.unlink()
        replace()
        assert rows() == []


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.floats(0, 900), st.floats(0, 30), st.floats(0, 1e6)), min_size=1, max_size=30
    )
)
def test_bins_lose_nothing_when_they_widen(amounts: list[tuple[float, float, float]]) -> None:
    bins = Bins(50)
    for begin_s, took_s, amount in amounts:
        bins.spread("samples", begin_s, begin_s + took_s, amount)
        bins.mean("loss", begin_s, amount)
    told = bins.values()
    assert all(len(column) <= 50 for column in told.values())
    assert sum(value or 0 for value in told["samples"]) == pytest.approx(
        sum(amount for *_, amount in amounts), rel=1e-3
    )
    for place, value in enumerate(told["loss"]):
        own = [amount for begin_s, _, amount in amounts if int(begin_s / bins.width_s) == place]
        assert value == (pytest.approx(sum(own) / len(own), rel=1e-3) if own else None)


def merged(before: dict[str, Any], message: Mapping[str, Any]) -> dict[str, Any]:
    """What a page has after a message, as page.js puts it together."""
    parts = {key: value for key, value in message.items() if key not in ("rows", "series", "all")}
    run = {} if message.get("all") else before
    rows = {**run.get("rows", {}), **message.get("rows", {})}
    series = dict(run.get("series", {}))
    for name, told in message.get("series", {}).items():
        old = series.get(name, {"width_s": None, "columns": {}})
        kept = old["columns"] if old["width_s"] == told["width_s"] else {}
        columns = {}
        for column, values in told["columns"].items():
            start = kept.get(column, [])[: told["from"]]
            start = start + [None] * (told["from"] - len(start)) * bool(values)
            columns[column] = start + values
        series[name] = {**told, "from": 0, "columns": columns}
    return {**run, **parts, "rows": rows, "series": series}


def test_who_follows_from_the_beginning_has_what_who_comes_later_is_told(tmp_path: Path) -> None:
    whole = write_cell(tmp_path / "whole", "netsense", t_end_s=155.0)
    rows = {path.relative_to(whole): list(read_records(path)) for path in whole.rglob("*.jsonl")}
    run = write_run(tmp_path / "run", methods=())
    cell = write_cell(run / "cells" / "netsense-s0", "netsense", killed=True, t_end_s=0.1)
    for path in rows:
        (cell / path).unlink(missing_ok=True)
    view, page = RunView(run), {}
    for tenth in range(10):
        for path, own in rows.items():
            append(cell / path, own[len(own) * tenth // 10 : len(own) * (tenth + 1) // 10])
        view.update(60)
        page = merged(page, view.changes())
        assert view.changes() == {}
        assert page == merged({}, view.snapshot())
    assert page["series"]["netsense-s0"]["width_s"] > 0.5, "it had to widen"
    told = page["rows"]["netsense-s0"]
    assert told["steps"] == rows[Path("hosts/w0/steps.jsonl")][-1]["step"] + 1
    assert [event["links"] for event in page["events"]] == ["w0, w1"] * 2
    assert [event["up_bps"] for event in page["events"]] == [10e6, 50e6]


def test_the_page_tells_what_the_report_does(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    stopped = {
        "workload": {"stop": {"seconds": 60.0}},
        "dilation": 2.0,
    }  # what is as slow as that is reported as if it were not
    slow = write_cell(run / "cells" / "slow-s0", "slow", killed=True)
    (slow / CELL_FILE).write_text(
        json.dumps({**json.loads((slow / CELL_FILE).read_text()), **stopped})
    )
    finish_cell(run / "cells" / "topk-s0")  # as in a run that is resumed
    view = RunView(run)
    view.update(60)
    view.changes()
    page = view.snapshot()
    # as at the end of a run; what has been read is not read again
    finish_cell(run / "cells" / "allreduce-s0")
    view.update(60)
    assert view.changes() == {}
    loaded = load_run(run)
    summary = {cell["cell"]: cell for cell in summarize(loaded)["cells"]}
    accuracy = loaded.evals.groupby("cell")["accuracy"].last()
    for name, row in page["rows"].items():
        assert row["samples_per_s"] == pytest.approx(
            summary[name]["throughput_samples_per_s"], rel=1e-3
        )
        assert row["payload_bytes"] == pytest.approx(
            summary[name]["payload_bytes_per_step"], rel=1e-3
        )
        assert row["accuracy"] == pytest.approx(accuracy[name], rel=1e-3)
        assert row["state"] == ("waiting" if name == "slow-s0" else "done")
        columns, width_s = page["series"][name]["columns"], page["series"][name]["width_s"]
        steps = loaded.steps[loaded.steps["cell"] == name]
        assert sum(columns["samples"]) == pytest.approx(steps["samples"].sum(), rel=1e-3)
        assert max(value or 0 for value in columns["carried_bps"]) <= max(columns["limit_bps"])
        assert columns["limit_bps"][int(2 / width_s)] == (100e6 if name == "slow-s0" else 50e6)
    assert page["rows"]["slow-s0"]["share"] == pytest.approx(0.5, rel=0.02)
    assert page["progress"] == {
        "cells": 4,
        "done": 3,
        "share": 0.75,
        "left_s": page["progress"]["left_s"],
    }


def test_problems_are_told_as_they_arise(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", methods=())
    cell = write_cell(run / "cells" / "c", killed=True, t_end_s=6.0, late_s=0.2)
    event = {"planned_s": 5.0, "applied_s": 5.0, "link": "w1", "state": {}}
    append(
        cell / "events.jsonl",
        [
            {**event, "kind": "manual", "verified": True},
            {**event, "kind": "readback", "verified": False},
        ],
    )
    view = RunView(run)
    view.update(60)
    assert view.changes()["rows"]["c"]["problems"] == [
        "its links were changed by hand, so it is no evidence for its spec",
        "a change of its links came 200 ms late",
        "the kernel did not confirm a change of w1",
    ]
    load = {
        "t_s": 1.0,
        "cpu_some_share": 1.0,
        "cpu_busy_share": 1.0,
        "cpu_foreign_share": 0.5,
        "cpu_waited_share": 0.4,
        "processors": 2,
        "softnet_drops": 0,
    }
    append(cell / "host.jsonl", [load] * 200)
    (cell / RESULT_FILE).write_text(
        json.dumps({"status": "failed", "problems": ["w1 was ended\x1b[2J\nby signal 9"]})
    )
    view.update(60)
    row = view.changes()["rows"]["c"]
    assert row["state"] == "failed" and row["problems"][0] == "w1 was ended [2J by signal 9"
    assert any(problem.startswith("other programs took 31 %") for problem in row["problems"])


def test_workers_that_were_started_again_go_on_and_steps_done_twice_count_once(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run", methods=())
    cell = write_cell(run / "cells" / "c", killed=True, t_end_s=3.0)
    view = RunView(run)
    view.update(60)
    before = view.changes()["rows"]["c"]
    again = [
        {
            "rank": 0,
            "step": before["steps"] - 5 + n,
            "t_s": 6.0 + n,
            "samples": BATCH,
            "step_s": 1.0,
        }
        for n in range(10)
    ]
    append(
        cell / "failures.jsonl",
        [{"t_s": 3.5, "worker": "w1", "kind": "failure", "text": "was ended by signal 9"}],
    )
    append(host_directory(cell, "w0") / "steps-1.jsonl", again)
    view.update(60)
    row = view.changes()["rows"]["c"]
    assert row["steps"] == before["steps"] + 5
    assert row["samples_per_s"] * 15.0 == pytest.approx(BATCH * (2 * before["steps"] + 5), rel=1e-3)
    assert row["problems"] == [
        "at 3.5 s w1 was ended by signal 9; all workers were to be started again"
    ]


def test_steps_of_all_ranks_of_a_worker_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce",), ranks_per_worker=2)
    view = RunView(run)
    view.update(60)
    row = view.changes()["rows"]["allreduce-s0"]
    summary = summarize(load_run(run))["cells"][0]
    assert row["samples_per_s"] == pytest.approx(summary["throughput_samples_per_s"], rel=1e-3)
    assert row["accuracy"] is not None


def test_what_failed_before_is_still_to_be_done_when_a_run_is_resumed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce", "topk", "netsense"))
    for method, status, ended_at_s in (
        ("allreduce", "done", 100.0),
        ("topk", "failed", 200.0),
        ("netsense", "done", 310.0),
    ):
        result = run / "cells" / f"{method}-s0" / RESULT_FILE
        result.write_text(json.dumps({**json.loads(result.read_text()), "status": status}))
        os.utime(result, (ended_at_s, ended_at_s))
    (run / LOCK_FILE).write_text("1\n")
    os.utime(run / LOCK_FILE, (300.0, 300.0))
    view = RunView(run)
    view.update(60)
    progress = view.changes()["progress"]
    # 10 s from the epoch's 310th second on
    assert (progress["cells"], progress["done"], progress["left_s"]) == (3, 2, 0)
    os.utime(run / "cells" / "netsense-s0" / RESULT_FILE, (1e10, 1e10))
    os.utime(run / LOCK_FILE, (1e10 - 40.0, 1e10 - 40.0))
    view.update(60)
    assert view.changes()["progress"]["left_s"] >= 40


def test_a_cell_that_is_tried_again_begins_anew(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", methods=())
    cell = write_cell(run / "cells" / "c", t_end_s=6.0)
    view = RunView(run)
    view.update(60)
    assert view.changes()["rows"]["c"]["steps"] > 0
    for path in cell.rglob("*.json*"):
        path.unlink()
    (cell / CELL_FILE).write_text('{"method": {"name": "m"}, "workers": 2, "earlier": ["no luck"]}')
    view.update(60)
    page = merged({}, view.snapshot() if view.changes() else {})
    assert page["rows"]["c"] == {
        **page["rows"]["c"],
        "steps": 0,
        "state": "waiting",
        "problems": ["tried again after: no luck"],
    }
    assert page["series"]["c"]["columns"] == {}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "damage",
    [
        lambda cell: (cell / CELL_FILE).write_text("[" * 100_000),
        lambda cell: (cell / CELL_FILE).write_text(
            '{"workers": 1e9, "dilation": -1, "method": [], "overrides": 3, "earlier": 3}'
        ),
        lambda cell: (cell / CELL_FILE).write_text(
            '{"workers": 2, "dilation": 1e-300, "workload": {"stop": {"seconds": 1e-300}},'
            ' "overrides": {"a": ' + nested(900) + "}}"
        ),
        lambda cell: (cell / CELL_FILE).unlink(),
        lambda cell: (cell / RESULT_FILE).write_text('{"status": [[]], "problems": {"a": 1}}'),
        lambda cell: append(
            steps_file(cell, 0),
            [{"rank": 1, "t_s": 1, "samples": 1e9}, {"rank": 0, "t_s": 1e300, "loss": 1}],
        ),
        lambda cell: append(
            steps_file(cell, 0),
            [{"rank": 0, "t_s": 1, "scheme": ["\ud800"], "samples": 10**400, "loss": "x"}],
        ),
        lambda cell: steps_file(cell, 0).write_bytes(
            b'{"rank": 0, "t_s": NaN}\n\xff\xfe\n' + b"x" * 3_000_000
        ),
        lambda cell: append(
            cell / "links.jsonl",
            [{"t_s": "x", "link": {}, "bytes": []}, {"t_s": 99.0}, {"t_s": 100.0}],
        ),
        lambda cell: append(
            cell / "events.jsonl",
            [{"kind": "manual", "state": {"up": 3, "down": {"rate_bps": "x"}}}],
        ),
    ],
)
def test_a_damaged_cell_harms_no_more_than_itself(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce", "topk"), t_end_s=3.0)
    damage(run / "cells" / "allreduce-s0")
    view = RunView(run)
    view.update(60)
    page = json.loads(json.dumps(view.changes(), allow_nan=False))
    assert page["rows"]["topk-s0"]["samples_per_s"] > 0
    assert max(len(column) for column in page["series"]["topk-s0"]["columns"].values()) == 7
    assert (page["rows"]["allreduce-s0"]["samples_per_s"] or 0) < 2 * page["rows"]["topk-s0"][
        "samples_per_s"
    ]


# The server


@contextlib.contextmanager
def served(run: Path) -> Iterator[LivePage]:
    write_run(run, methods=("allreduce",), t_end_s=3.0)
    write_cell(run / "cells" / "netsense-s0", "netsense", killed=True, t_end_s=3.0)
    with LivePage(run, "127.0.0.1", 0, lambda: True) as page:
        yield page


@pytest.fixture
def page(tmp_path: Path) -> Iterator[LivePage]:
    with served(tmp_path / "run") as page:
        yield page


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePage]:
    """A page of a run in which nothing happens."""
    with served(tmp_path_factory.mktemp("still") / "run") as page:
        yield page


def ask(
    page: LivePage | str, path: str, method: str = "GET", body: Any = None, **headers: str | None
) -> tuple[int, Any, str]:
    """(status, headers, text) of a request as the page makes it; ``path`` begins behind the token,
    or with "/" at the root."""
    address = urlsplit(page if isinstance(page, str) else page.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 0, timeout=20)
    data = json.dumps(body) if isinstance(body, dict) else body
    usual = {"Host": address.netloc, "Origin": f"http://{address.netloc}" if body else None}
    usual |= {"Content-Type": "application/json" if body else None}
    sent = {
        name.replace("_", "-"): value
        for name, value in {**usual, **headers}.items()
        if value is not None
    }
    with contextlib.closing(connection):
        connection.request(
            method, path if path.startswith("/") else address.path + path, data, sent
        )
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


class Listener:
    """A page that follows the events."""

    def __init__(self, page: LivePage | str) -> None:
        address = urlsplit(page if isinstance(page, str) else page.url)
        self.connection = http.client.HTTPConnection(
            address.hostname or "", address.port or 0, timeout=20
        )
        self.connection.request("GET", address.path + "events", headers={"Host": address.netloc})
        self.answer = self.connection.getresponse()
        self.state: dict[str, Any] = {}

    def hear(self) -> dict[str, Any]:
        line = self.answer.readline()
        assert self.answer.readline() == b"\n"
        message = json.loads(line.removeprefix(b"data: "))
        self.state = merged(self.state, message)
        return dict(message)


def test_the_page_is_shipped_whole_and_may_fetch_nothing_from_elsewhere(still: LivePage) -> None:
    for name, kind in (("", "text/html"), ("page.js", "text/javascript"), ("page.css", "text/css")):
        status, headers, text = ask(still, name)
        assert (status, headers["Content-Type"]) == (
            200,
            f"{kind}; charset=utf-8",
        ) and "http" not in text.replace("http-equiv", "")
        assert (
            headers["X-Content-Type-Options"] == "nosniff"
            and headers["Referrer-Policy"] == "no-referrer"
        )
        assert (
            headers["Cache-Control"] == "no-store" and "Access-Control-Allow-Origin" not in headers
        )
        policy = headers["Content-Security-Policy"]
        assert (
            "default-src 'none'" in policy
            and "unsafe" not in policy
            and "frame-ancestors 'none'" in policy
        )
    script = ask(still, "page.js")[2]
    assert not any(
        sink in script
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(")
    )
    assert (
        ask(still, still.url[still.url.index("/", 8) : -1])[1]["Location"]
        == urlsplit(still.url).path
    )


@pytest.mark.parametrize(
    "path", ["/", "/events", "/wrong/", "/wrong/events", "//", "/?token=", "/page.js"]
)
def test_without_the_token_there_is_nothing(still: LivePage, path: str) -> None:
    status, _, text = ask(still, path)
    assert status == 403 and "token" in text and text.count("\n") == 1
    assert ask(still, path, "POST", {"set": {}})[0] == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[
            (host, 403)
            for host in (
                "evil.example",
                "evil.example:80",
                "127.0.0.1.evil.example",
                "",
                "192.168.1.1",
                "[::1",
                "a:b:c",
            )
        ],
        *[
            (host, 200)
            for host in ("127.0.0.1", "LOCALHOST:80", "127.0.0.1:9", "[::1]:8000", "[::1]")
        ],
    ],
)
def test_only_an_address_of_this_machine_is_a_host(still: LivePage, host: str, status: int) -> None:
    assert ask(still, "", Host=host)[0] == status


def test_two_hosts_are_none(still: LivePage) -> None:
    address = urlsplit(still.url)
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
        connection.sendall(
            f"GET {address.path} HTTP/1.1\r\nHost: {address.netloc}\r\nHost: evil\r\n\r\n".encode()
        )
        assert b" 403 " in connection.makefile("rb").readline()


def test_what_is_no_request_gets_a_line_that_does_not_repeat_it(still: LivePage) -> None:
    address = urlsplit(still.url)
    for data in (
        b"GET /\xc3\xa4/\xff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"<b> <b> <b>\r\n\r\n",
        b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
            connection.sendall(data)
            answer = connection.makefile("rb").read()
            assert any(word in answer for word in (b" 403 ", b" 414 ", b"Bad Request")), answer
            assert b"<b>" not in answer and b"/////" not in answer


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://127.0.0.1",
        "https://127.0.0.1:{port}",
        "http://localhost:{port}",
    ],
)
def test_no_other_site_may_ask(still: LivePage, origin: str) -> None:
    told = origin.format(port=urlsplit(still.url).port)
    for path, method, body in (
        ("events", "GET", None),
        ("", "GET", None),
        ("link", "POST", {"set": {}}),
    ):
        status, headers, _ = ask(still, path, method, body, Origin=told)
        assert status == 403 and "Access-Control-Allow-Origin" not in headers
    assert ask(still, "link", "POST", {"set": {}}, Origin=None)[0] == 403, (
        "to change something, a page must say that it is ours"
    )


@pytest.mark.parametrize(
    "path",
    [
        "../",
        "..%2f..%2fspec.yaml",
        "spec.yaml",
        "cells/allreduce-s0/cell.json",
        "./page.js",
        "page.js/",
        "page.js?x",
        "page.html",
        "%00",
    ],
)
def test_a_request_names_no_file(still: LivePage, path: str) -> None:
    assert ask(still, path)[0] == 404
    assert ask(still, "link/../" + path, "POST", {"set": {}})[0] == 404


def test_other_ways_to_ask_are_refused(still: LivePage) -> None:
    for method in ("HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"):
        status, headers, text = ask(still, "", method)
        assert (
            status == 501
            and "Access-Control-Allow-Origin" not in headers
            and "Python" not in str(headers) + text
        )
    for body, headers, status in (
        ("x", {}, 400),
        ("[]", {}, 400),
        ("[" * 10_000, {}, 400),
        ("{}", {"Content_Type": "text/plain"}, 415),
        ("{}", {"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ("x" * 20_000, {}, 413),
        ("{}", {"Content_Length": "-1"}, 413),
        ("{}", {"Content_Length": "\u00b2".encode().decode("latin1")}, 413),
        ('{"cell": "../..", "links": [], "set": {"rate": "5mbit"}}', {}, 400),
        ('{"cell": ["netsense-s0"], "links": [], "set": {"rate": "5mbit"}}', {}, 400),
        ('{"cell": "netsense-s0", "links": "w0", "set": {"rate": "5mbit"}}', {}, 400),
        ('{"cell": "netsense-s0", "links": [], "set": {}}', {}, 400),
        ('{"cell": "netsense-s0", "links": [], "set": {"loss": "5%"}}', {}, 400),
        ('{"cell": "netsense-s0", "links": [], "set": {"rate": 5}}', {}, 400),
        ('{"cell": "netsense-s0", "links": [], "set": {"rate": "5mbit"}}', {}, 409),
    ):
        with contextlib.closing(Listener(still).connection):
            answer = ask(still, "link", "POST", body, **headers)
        assert answer[0] == status, (body, answer)
        assert answer[2].count("\n") == 1


def test_a_page_is_told_all_and_then_what_changes(page: LivePage) -> None:
    follower = Listener(page)
    assert follower.answer.headers["Content-Type"].startswith("text/event-stream")
    assert follower.hear()["all"]
    cell = page.directory / "cells" / "netsense-s0"
    row = {"rank": 0, "step": 1000, "t_s": 4.0, "samples": BATCH, "step_s": 0.1, "scheme": MISCHIEF}
    append(steps_file(cell, 0), [row])
    page.tick()
    told = follower.hear()
    assert set(told) == {"rows", "series"} and set(told["rows"]) == {"netsense-s0"}, (
        "only what changed"
    )
    assert told["rows"]["netsense-s0"]["scheme"] == MISCHIEF[:40]
    assert told["series"]["netsense-s0"]["from"] >= 7
    page.tick()
    append(
        host_directory(cell, "w0") / EVALS_FILE,
        [{"step": 1, "t_s": 4.1, "accuracy": 0.5, "loss": 1.0}],
    )
    page.tick()
    assert follower.hear()["rows"]["netsense-s0"]["accuracy"] == 0.5, (
        "nothing is told while nothing changes"
    )
    later = Listener(page)
    later.hear()
    assert later.state == follower.state
    page.directory.rename(page.directory.with_name("elsewhere"))
    page.tick()
    assert follower.hear()["gone"]
    for listener in (follower, later):
        listener.connection.close()


def test_pages_are_few_and_who_has_gone_makes_room(page: LivePage) -> None:
    followers = [Listener(page) for _ in range(8)]
    assert all(follower.hear()["all"] for follower in followers)
    assert ask(page, "events")[0] == 503
    for follower in followers:
        follower.answer.close()
        follower.connection.close()
    give_up_s = time.monotonic() + 10
    while knock(page) == 503:  # it is noticed when they are told something
        assert time.monotonic() < give_up_s
        row = {"rank": 0, "t_s": 4.0, "step": time.monotonic_ns() // 10**6 % 10**9}
        append(steps_file(page.directory / "cells" / "netsense-s0", 0), [row])
        page.tick()
        time.sleep(0.05)


def knock(page: LivePage) -> int:
    """Begin to follow the events, and leave."""
    listener = Listener(page)
    listener.connection.close()
    return listener.answer.status


class Links:
    """Stands in for a shaper without a kernel: a change is as it was asked for."""

    impaired: frozenset[tuple[str, str]] = frozenset({("w1", "down")})
    line = line_counters = None
    mtu = 1500

    def __init__(self) -> None:
        self.states = {
            name: LinkState(LinkParameters(50_000_000), LinkParameters(50_000_000))
            for name in ("w0", "w1")
        }
        self.trees = {
            (name, side): compile_tree(LinkParameters(50_000_000))
            for name in self.states
            for side in ("up", "down")
        }

    def apply(self, changes: Mapping[str, LinkState]) -> dict[str, Applied]:
        self.states.update(changes)
        return {link: Applied(monotonic_s(), True) for link in changes}

    def deviating(self) -> list[str]:
        return []

    def counters(self) -> dict[tuple[str, str], QdiscCounters]:
        return dict.fromkeys(
            self.trees,
            QdiscCounters(bytes=0, packets=0, drops=0, overlimits=0, backlog_bytes=0, qlen=0),
        )


def test_a_link_is_moved_by_request_and_recorded_as_manual(page: LivePage) -> None:
    cell = page.directory / "cells" / "netsense-s0"
    for name in ("events.jsonl", "links.jsonl"):
        (cell / name).unlink()
    links: Any = Links()
    with (
        LinkServer(cell) as server,
        LinkDriver(links, [], monotonic_s(), cell, server.requests, dilation=2.0),
        contextlib.closing(Listener(page).connection),
    ):

        def move(links: list[str], **wanted: Any) -> Any:
            status, _, text = ask(
                page, "link", "POST", {"cell": "netsense-s0", "links": links, "set": wanted}
            )
            assert status == 200, text
            return json.loads(text)

        assert move(["w0"], rate="5mbit")["links"]["w0"]["state"]["up"]["rate_bps"] == 5_000_000
        assert links.states["w0"].up.rate_bps == 2_500_000, "twice as slow, as the cell is"
        assert set(move([], up=False)["links"]) == {"w0", "w1"}
        assert not links.states["w1"].connected
        assert move(["w1"], delay="20ms")["links"]["w1"]["state"]["down"]["delay_s"] == 0.02
        assert "can have no delay" in move(["w0"], delay="20ms")["error"]
        assert "did you mean" in move(["w9"], rate="5mbit")["error"]
        assert "'<b>' is not a rate" in move(["w0"], rate="<b>")["error"]
        page.tick()
    manual = [row for row in read_records(cell / "events.jsonl") if row["kind"] == "manual"]
    assert [row["link"] for row in manual] == ["w0", "w0", "w1", "w1"] and all(
        row["verified"] for row in manual
    )
    assert (
        ask(page, "link", "POST", {"cell": "netsense-s0", "links": [], "set": {"up": True}})[0]
        == 409
    )


# The report, and the end


def test_a_run_that_has_ended_is_its_report_in_an_origin_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "testbed.report.html.render", lambda run, _: f"a report of {len(run.steps)} rows"
    )
    run = write_run(tmp_path / "run", methods=("allreduce",), t_end_s=3.0)
    with LivePage(run, "127.0.0.1", 0, lambda: under_way(run)) as page:
        status, headers, _ = ask(page, "")
        assert (status, headers["Location"]) == (302, "report.html")
        status, headers, text = ask(page, "report.html")
        assert status == 200 and text.startswith("a report of "), "there is none, so it is made"
        policy = headers["Content-Security-Policy"]
        assert (
            policy.startswith("sandbox allow-scripts")
            and "allow-same-origin" not in policy
            and "connect-src" not in policy
        )
        (run / "report.html").write_text("the report")
        assert ask(page, "report.html")[2] == "the report"
        os.utime(run / "report.html", (1, 1))
        assert ask(page, "report.html")[2] == text, "it is older than what it reports"
        (run / "report.html").unlink()
        (run / "report.html").symlink_to("/etc/passwd")
        assert "root:" not in ask(page, "report.html")[2]
        with run_lock(run):
            assert ask(page, "")[0] == 200
        for path in sorted(run.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        status, _, text = ask(page, "report.html")
        assert status == 404 and text.count("\n") == 1


def test_the_address_must_be_one(tmp_path: Path) -> None:
    for address, port in (("evil.example", 0), ("203.0.113.1", 0), ("127.0.0.1", 99_999)):
        with pytest.raises(CannotServe) as refused:
            LivePage(tmp_path, address, port, lambda: True)
        assert "\n" not in str(refused.value)
    with (
        LivePage(tmp_path, "127.0.0.1", 0, lambda: True) as page,
        pytest.raises(CannotServe, match="choose another port"),
    ):
        LivePage(tmp_path, "127.0.0.1", urlsplit(page.url).port or 0, lambda: True)


def reachable(url: str) -> bool:
    try:
        return ask(url, "")[0] == 200
    except OSError:
        return False


def test_the_page_beside_a_run_becomes_its_report_and_ends_with_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce",), t_end_s=3.0)
    said = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with live_page(run, said) as say_ended:
        url = said.export_text().split()[-1]
        follower = Listener(url)
        follower.hear()
        (run / "report.html").write_text("the report")
        say_ended()
        while not follower.hear().get("ended"):
            pass
        assert ask(url, "report.html")[2] == "the report"
    assert not reachable(url)
    follower.connection.close()


def test_the_page_ends_with_whoever_started_it_however_that_ends(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", methods=(), t_end_s=3.0)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom rich.console import Console\nfrom"
        " testbed.run.live_page import live_page\nwith live_page(Path(sys.argv[1]),"
        " Console(width=200)):\n    sys.stdout.flush()\n    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    url = parent.stdout.readline().split()[-1]
    assert reachable(url)
    parent.kill()
    parent.communicate()
    give_up_s = time.monotonic() + 30
    while reachable(url):
        assert time.monotonic() < give_up_s
        time.sleep(0.1)


def test_a_run_has_its_page_while_its_cells_run_if_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Console(width=300, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    reached: list[bool] = []

    def run_cells(*_: Any, **__: Any) -> int:
        words = said.export_text(clear=False).split()
        reached.append("live" in words and reachable(words[-1]))
        return start.EXIT_DONE

    monkeypatch.setattr(start, "run_cells", run_cells)
    monkeypatch.setattr(start, "check_machine", lambda plan: "netem")
    monkeypatch.setattr(start, "finish", lambda *_, **__: start.EXIT_INVALID)
    spec = ROOT / "experiments" / "smoke.yaml"
    for live in (True, False):
        options = start.RunOptions(live=live)
        assert (
            start.start_run(*load_plan(spec), tmp_path, spec.parent, said, options)[0]
            == start.EXIT_INVALID
        )
        assert not reachable(said.export_text().split()[-1]) if live else said.export_text() == ""
    assert reached == [True, False]
    asked: list[Any] = []
    monkeypatch.setattr(
        start, "start_run", lambda *given: (asked.append(given[-1].live) or 0, tmp_path)
    )
    for more in ([], ["--live"]):
        assert CliRunner().invoke(app, ["run", str(spec), *more]).exit_code == 0
    assert asked == [False, True]


def test_watch_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", methods=(), t_end_s=3.0)
    for arguments, words in (
        ([str(tmp_path / "none")], "is no run directory"),
        ([str(run), "--address", "evil.example"], "no IP address"),
        ([str(run), "--port", "70000"], ""),
    ):
        done = CliRunner().invoke(app, ["watch", *arguments])
        assert done.exit_code == 2 and words in done.output and "Traceback" not in done.output


def test_watch_ends_quietly(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce",), t_end_s=3.0)
    command = [sys.executable, "-m", "testbed", "watch", str(run)]
    watch = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert watch.stdout is not None
    words = watch.stdout.readline().split()
    assert words[0] == "report:"
    assert ask(words[1], "")[0] == 302
    watch.send_signal(signal.SIGINT)
    assert watch.communicate(timeout=10) == ("", "")
    assert watch.returncode == 0 and not reachable(words[1])


# In a browser


@pytest.fixture
def long_run(tmp_path: Path) -> Path:
    """A run of which a cell with 64 links has gone on for 10 min. A sample a second: the page is
    sent no more than two."""
    run = write_run(tmp_path / "run", methods=("allreduce", "topk"), t_end_s=60.0)
    cell = write_cell(
        run / "cells" / "netsense-s0", "netsense", killed=True, t_end_s=3.0, workers=64
    )
    write_cell(
        run / "cells" / "odd-s0", MISCHIEF, overrides={MISCHIEF: MISCHIEF}, killed=True, t_end_s=3.0
    )
    config = {
        **json.loads((cell / CELL_FILE).read_text()),
        "workload": {"stop": {"seconds": 900.0}},
        "impaired": ["w1"],
    }
    (cell / CELL_FILE).write_text(json.dumps(config))
    template = [row for row in link_rows([], 64, 1.0) if row["t_s"] == 0.0]
    file = RecordFile(cell / "links.jsonl")
    for second in range(3, 600):
        file.append(
            [
                {**row, "t_s": float(second), "bytes": second * (10**6 + n * 10**4)}
                for n, row in enumerate(template)
            ]
        )
    file.close()
    steps = [
        {
            "rank": 0,
            "step": n,
            "t_s": 3.0 + n,
            "samples": BATCH,
            "step_s": 1.0,
            "loss": 1 / (n + 1),
            "ratio": 0.1,
        }
        for n in range(597)
    ]
    for rank in range(64):
        steps_file(cell, rank).unlink()
    for rank in range(0, 64, 8):
        append(
            steps_file(cell, rank),
            [{**row, "rank": rank, "bandwidth_bps": 4e7 + 1e5 * rank} for row in steps],
        )
    append(cell / "events.jsonl", list(first_states(64)))
    return run


def first_states(workers: int) -> Iterator[dict[str, Any]]:
    state = LinkState(LinkParameters(50_000_000), LinkParameters(50_000_000)).to_json()
    for rank in range(workers):
        yield {
            "planned_s": 0.0,
            "applied_s": 0.0,
            "link": f"w{rank}",
            "state": state,
            "kind": "initial",
            "verified": True,
        }


@pytest.mark.chromium
def test_a_browser_draws_a_long_run_in_no_time_and_moves_a_link(
    long_run: Path, tmp_path: Path
) -> None:
    cell = long_run / "cells" / "netsense-s0"
    asked: list[Any] = []
    ended = threading.Event()

    def answer(server: LinkServer) -> None:
        while (request := server.requests.get()).body:
            asked.append(request.body)
            state = LinkState(LinkParameters(20_000_000), LinkParameters(20_000_000)).to_json()
            now = monotonic_s()
            change = {
                "planned_s": 600.0,
                "applied_s": 600.0 + now * 1e-9,
                "link": "w1",
                "state": state,
            }
            append(cell / "events.jsonl", [{**change, "kind": "manual", "verified": True}])
            request.answer.put({"links": {"w1": {"state": state, "up": {}, "down": {}}}})

    with (
        LinkServer(cell) as server,
        LivePage(long_run, "127.0.0.1", 0, lambda: not ended.is_set()) as page,
        Browser(tmp_path / "profile") as browser,
    ):
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        stop = threading.Event()
        threading.Thread(
            target=lambda: [page.tick() for _ in iter(lambda: stop.wait(0.25), True)], daemon=True
        ).start()
        browser.tell("Page.navigate", url=page.url)
        browser.wait_for("document.querySelectorAll('#links tr').length === 64")
        browser.wait_for("run.series['netsense-s0']?.columns.carried_bps?.length >= 298")
        browser.wait_for(
            "run.series['netsense-s0'].reported_s > 590 && run.series['topk-s0']?.reported_s > 55"
        )
        assert browser.value("document.querySelectorAll('img').length") == 0
        browser.value("$('scenario').selectedIndex = 2; schedule()")
        browser.wait_for(
            f"document.getElementById('methods').textContent.includes({json.dumps(MISCHIEF)})"
        )
        browser.value("$('scenario').selectedIndex = 0; schedule()")

        browser.value("document.querySelector('#links tr:nth-child(2) button').click()")
        assert browser.value("document.activeElement.id") == "rate-slider"
        for kind in ("keyDown", "keyUp"):
            browser.tell(
                "Input.dispatchKeyEvent",
                type=kind,
                key="ArrowLeft",
                code="ArrowLeft",
                windowsVirtualKeyCode=37,
            )
        browser.wait_for("document.getElementById('events').textContent.includes('by hand')")
        assert (
            browser.value("$('answer').textContent").replace("\xa0", " ")
            == "w1: up 20 Mbit/s, down 20 Mbit/s"
        )
        assert (
            len(asked) == 1
            and asked[0]["links"] == ["w1"]
            and asked[0]["set"]["rate"].endswith("mbit")
        )
        assert browser.value("$('delay').disabled") is False
        browser.value("$('link').value = 'w2'; $('link').dispatchEvent(new Event('change'))")
        assert browser.value("$('delay').disabled") is True, "nothing in its schedule has any"

        frames = browser.value(
            "(async () => { const found = []; for (let n = 0; n < 20; n++) {"
            " FIGURES.forEach(figure => { figure.at = n / 20; }); const begin = performance.now();"
            " draw(); document.body.offsetHeight; found.push(performance.now() - begin);"
            " await new Promise(requestAnimationFrame); } return found; })()"
        )
        assert sorted(frames)[len(frames) // 2] < 50, frames
        assert browser.metric("JSHeapUsedSize") < 100e6
        browser.value("FIGURES[0].at = 0.05; draw()")
        assert browser.value("FIGURES[0].readout.textContent").startswith("30")
        assert "netsense 512 samples/s" in browser.value("FIGURES[0].readout.textContent").replace(
            "\xa0", " "
        )
        (long_run / "report.html").write_text(
            "<title>the report</title><script>document.title += ' ' + origin</script>"
        )
        ended.set()
        browser.wait_for("document.title === 'the report null'")
        assert browser.messages == []
        stop.set()
        server.requests.put(type("End", (), {"body": None})())  # type: ignore[arg-type]
    assert not (cell / SOCKET_FILE).exists()
