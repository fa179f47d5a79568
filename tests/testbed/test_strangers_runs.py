"""Commands on run directories that others made or damaged: nothing but what was named is touched,
and what cannot be known is said."""

import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner, Result

from testbed import protocol
from testbed.cli import app
from testbed.enter import on_host
from testbed.live.tail import Tail
from testbed.live.view import RunView
from testbed.recording import link_server
from testbed.recording.link_server import SOCKET_FILE
from testbed.results.load import load_run
from testbed.results.records import finish_cell
from testbed.results.summary import summarize
from testbed.results.tolerances import taken_share
from tests.testbed.synthetic_run import append, write_run

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execvp", lambda *argv: pytest.fail(f"{argv} was begun"))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def one_line(done: Result) -> str:
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.output.count("\n") == 1, done.output
    return done.output


def ended(path: Path, factor: float = 1.0) -> Path:
    """A short run with tables, in which everything takes ``factor`` as long."""
    write_run(path, methods=("allreduce",), t_end_s=2.0)
    finish_cell(path / "cells/allreduce-s0")
    change_steps(path, lambda steps: steps.assign(t_s=steps["t_s"] * factor))
    return path


def change_steps(run: Path, change: Any) -> None:
    file = run / "cells/allreduce-s0/steps.parquet"
    change(pd.read_parquet(file)).to_parquet(file, index=False)


# report --tensorboard


def test_event_files_do_not_go_where_a_link_leads(tmp_path: Path) -> None:
    run, other = ended(tmp_path / "run"), tmp_path / "other"
    other.mkdir()
    (other / "events.out.tfevents.1").write_text("another's")
    (tmp_path / "tb").mkdir()
    (tmp_path / "tb/allreduce-s0").symlink_to(other)
    done = invoke("report", run, "--tensorboard", tmp_path / "tb")
    assert done.exit_code == 2
    assert "tb/allreduce-s0: is a link, and not followed" in done.output.splitlines()[-1]
    assert [path.read_text() for path in other.iterdir()] == ["another's"]


# compare


@pytest.mark.parametrize("damaged", ["first", "second"])
@pytest.mark.parametrize("value", [None, -5.0])
def test_steps_whose_end_is_not_known_are_not_compared(
    tmp_path: Path, damaged: str, value: float | None
) -> None:
    first, second = ended(tmp_path / "first"), ended(tmp_path / "second", factor=3.0)
    change_steps(
        tmp_path / damaged,
        lambda steps: steps.assign(t_s=steps["t_s"].where(steps.index != 7, value)),
    )
    done = invoke("compare", first, second)
    assert done.exit_code == 1
    assert "Slower or missing: allreduce." in done.output
    (found,) = json.loads(
        invoke("compare", first, second, "--json").stdout,
        parse_constant=lambda word: pytest.fail(f"{word} is no JSON"),
    )
    assert (found["verdict"], found["ratio"], found["ci95"]) == ("missing", None, None)


def test_specs_may_differ_in_keys_that_are_no_text(tmp_path: Path) -> None:
    first, second = ended(tmp_path / "first"), ended(tmp_path / "second")
    with (first / "spec.yaml").open("a") as file:
        file.write('2: x\n~: x\n2001-01-01: x\n"a\\eb": x\n')
    done = invoke("compare", first, second)
    assert done.exit_code in (0, 3)
    assert "The specs differ in 2, 2001-01-01, None, a b: " in done.output


# The live page


def test_a_number_that_no_float_can_hold_is_not_known(tmp_path: Path) -> None:
    assert taken_share({"cpu_busy_share": 10**400, "cpu_foreign_share": 0.5}) == 0.0
    run = write_run(tmp_path / "run", methods=("allreduce",), t_end_s=1.0)
    append(run / "cells/allreduce-s0/host.jsonl", [{"t_s": 1.0, "cpu_busy_share": 10**400}])
    view = RunView(run)
    view.update(5.0)
    assert view.changes()["rows"]["allreduce-s0"]["steps"] > 0


def test_a_few_lines_do_not_make_the_page_follow_any_number_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce",), t_end_s=1.0)
    cell = run / "cells/allreduce-s0"
    config = json.loads((cell / "cell.json").read_text())
    (cell / "cell.json").write_text(json.dumps({**config, "workers": 10**9}))
    (cell / "result.json").unlink()
    append(cell / "failures.jsonl", [{"kind": "failure"}] * 100)
    followed = 0
    begin = Tail.__init__

    def counted(self: Tail, *arguments: Any) -> None:
        nonlocal followed
        followed += 1
        begin(self, *arguments)

    monkeypatch.setattr(Tail, "__init__", counted)
    view = RunView(run)
    view._find_cells()
    assert not followed, "a cell that is not read yet is not followed"
    view.update(5.0)
    assert 0 < followed < 25_000
    assert len(view.changes()["rows"]["allreduce-s0"]["problems"]) == 20


# Sockets in a run directory


@contextmanager
def answering(path: Path, answer: object) -> Iterator[None]:
    """A server that says the same to everybody."""
    with protocol.listen_unix(path) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    if connection.recv(65536):
                        connection.sendall(json.dumps(answer).encode() + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def cell(tmp_path: Path) -> Path:
    path = tmp_path / "run/cells/c"
    path.mkdir(parents=True)
    return path


ZERO = dict.fromkeys(("delay_s", "jitter_s", "duplicate", "corrupt", "reorder"), 0.0)
STATE = {"rate_bps": 1e6, **ZERO, "loss": {"share": 0.0}}
NOW = {"carried_bps": 1.0, "backlog_bytes": 0, "drops": 0}
LINK = {"state": {"connected": True, "up": STATE, "down": STATE}, "up": NOW, "down": NOW}
HOST = {"interface": "eth0", "addresses": {"w1": "10.77.0.2"}, "container": "lab-w0"}


def test_answers_of_a_cell_are_understood(cell: Path) -> None:
    with answering(cell / SOCKET_FILE, {"links": {"w0": LINK}, "host": HOST}):
        assert "w0" in invoke("link", "--run", cell.parents[1]).output
        # the program is not a host, whatever it is called
        assert on_host(cell, "w0", ["w1", "w1"])[-3:] == ["lab-w0", "w1", "10.77.0.2"]


@pytest.mark.parametrize(
    "answer",
    [
        [],
        {},
        {"links": []},
        {"links": {"w0": 3}},
        {"links": {"w0": {**LINK, "up": {**NOW, "drops": "[/]"}}}},
        {"links": {"w0": {**LINK, "down": {**NOW, "carried_bps": 10**400}}}},
    ],
)
def test_what_answers_no_links_is_no_cell(cell: Path, answer: object) -> None:
    with answering(cell / SOCKET_FILE, answer):
        done = invoke("link", "--run", cell.parents[1])
    assert done.exit_code == 1
    assert "what answers at its links.sock is no cell" in one_line(done)


@pytest.mark.parametrize(
    "change",
    [
        {"container": "--privileged"},
        {"container": 3},
        {"container": "a b"},
        {"addresses": {"w1": "/tmp/evil"}},
        {"addresses": ["w1"]},
        {"interface": "--help"},
        {"interface": None},
    ],
)
@pytest.mark.parametrize("command", [["exec", "w0", "true"], ["capture", "w0"]])
def test_what_a_cell_would_not_say_of_a_host_goes_into_no_command(
    cell: Path, change: Mapping[str, Any], command: list[str]
) -> None:
    with answering(cell / SOCKET_FILE, {"host": {**HOST, **change}}):
        done = invoke(command[0], "--run", cell.parents[1], *command[1:])
    assert done.exit_code == 1
    assert "what answers at its links.sock is no cell" in one_line(done)


def test_the_namespace_of_a_host_is_a_number(cell: Path) -> None:
    host = {**HOST, "namespace": "3/../../../1/ns/net"}
    del host["container"]
    with answering(cell / SOCKET_FILE, {"host": host}):
        done = invoke("exec", "--run", cell.parents[1], "w0", "true")
    assert "what answers at its links.sock is no cell" in one_line(done)


@pytest.mark.parametrize("command", [["link"], ["exec", "w0", "true"]])
def test_a_refusal_is_one_plain_line(cell: Path, command: list[str]) -> None:
    with answering(cell / SOCKET_FILE, {"error": "no\n\x1b[2Jsuch link"}):
        done = invoke(command[0], "--run", cell.parents[1], *command[1:])
    assert (done.exit_code, one_line(done)) == (2, "no [2Jsuch link\n")


def test_a_link_to_a_socket_is_no_cell(cell: Path, tmp_path: Path) -> None:
    with answering(tmp_path / "s", {"links": {"w0": LINK}}):
        (cell / SOCKET_FILE).symlink_to(tmp_path / "s")
        done = invoke("link", "--run", cell.parents[1])
        assert done.exit_code == 2 and one_line(done).startswith("no cell is running in ")
        with pytest.raises(OSError, match="is no socket"):
            link_server.send_request(cell, {"links": []})


def test_a_program_of_another_user_is_not_asked(
    cell: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_server, "_peer", lambda connection: (1, os.geteuid() + 1))
    with answering(cell / SOCKET_FILE, {"links": {"w0": LINK}}):
        done = invoke("link", "--run", cell.parents[1])
    assert done.exit_code == 4
    assert f"a program of user {os.geteuid() + 1} answers" in one_line(done)


def test_a_table_that_names_more_links_than_a_lab_can_have_is_a_problem(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce",), t_end_s=2.0)
    cell = run / "cells" / "allreduce-s0"
    names = (f"w{number}" for number in range(5000))
    rows = [{"t_s": 1.0, "link": name, "direction": "up", "bytes": 1} for name in names]
    append(cell / "links.jsonl", rows)
    (found,) = summarize(load_run(run))["cells"]
    assert "links: has 5000 values of link, more than 4096" in " ".join(found["problems"])


@pytest.mark.parametrize(
    "spec, keep_load, said",
    [
        ({}, False, "the load of this machine was not recorded for 29 s of 30 s"),
        ({"methods": ["allreduce"], "seeds": [0]}, True, ""),
        ({"methods": ["allreduce", "bf16"], "seeds": [0, 1, 2]}, True, "5 of the 6 cells of its"),
        (
            {"methods": ["topk"], "seeds": [0], "matrix": {"dilation": [1.0, 2.0]}},
            True,
            "1 of the 2 cells of its spec are not there",
        ),
        ({"dilation": 4.0}, True, "its cell.json has dilation 1, and the spec 4.0"),
        ({"workers": 8}, True, "its cell.json has workers 2, and the spec 8"),
    ],
)
def test_a_run_that_is_not_whole_is_not_valid(
    tmp_path: Path, spec: dict[str, Any], keep_load: bool, said: str
) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce",))
    written = yaml.safe_load((run / "spec.yaml").read_text())
    (run / "spec.yaml").write_text(yaml.safe_dump({**written, **spec}))
    load = run / "cells" / "allreduce-s0" / "host.jsonl"
    if not keep_load:
        load.write_text(load.read_text().splitlines(keepends=True)[5])
    summary = summarize(load_run(run))
    assert summary["valid"] == (not said)
    assert said in " ".join(summary["problems"])


def test_changes_of_links_that_are_missing_are_noticed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce",))
    assert summarize(load_run(run))["valid"]
    events = run / "cells" / "allreduce-s0" / "events.jsonl"
    rows = events.read_text().splitlines(keepends=True)
    events.write_text("".join(row for row in rows if '"schedule"' not in row))
    problems = summarize(load_run(run))["problems"]
    assert any("changes of links are missing" in problem for problem in problems), problems
