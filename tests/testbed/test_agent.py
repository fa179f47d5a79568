"""The orchestrator and the agents of nodes: who is let in, what may be said, and what time it
is."""

import contextlib
import json
import queue
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.agent.program import Agent, connect
from testbed.clock import Clock
from testbed.labs.base import LabError, LabPlan, View
from testbed.labs.remote import NodeLost, NodeRefused, Nodes, RemoteLab
from testbed.links.state import LinkState
from testbed.nodes import messages
from testbed.nodes.channel import LOST_S, Channel, make_secret, secured
from testbed.nodes.clock import MeasuredClock

pytestmark = pytest.mark.fast
HELLO = b'{"type": "hello", "node": "n1"}\n'


@contextlib.contextmanager
def agent_in_thread(
    address: str, secret: bytes, directory: Path, make_lab: Any = None
) -> Iterator[Agent]:
    directory.mkdir(exist_ok=True)
    sock = connect(address, secret, patience_s=0)
    agent = Agent("n1", make_lab, directory)
    thread = threading.Thread(target=agent.serve, args=(sock,))
    thread.start()
    try:
        yield agent
    finally:
        agent.leave()
        thread.join(10)
        assert not thread.is_alive()


def call(nodes: Nodes) -> socket.socket:
    return socket.create_connection(("127.0.0.1", nodes.port), timeout=3)


def heard(sock: socket.socket, words: bytes) -> bytes:
    """What is answered to some words, until the other end hangs up."""
    answer = b""
    with contextlib.suppress(OSError):
        sock.sendall(words)
        while data := sock.recv(4096):
            answer += data
    return answer


def anyones_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def with_certificate(secret: bytes, tmp_path: Path) -> ssl.SSLContext:
    context, file = anyones_context(), tmp_path / "pem"
    file.write_bytes(secret)
    context.load_cert_chain(file)
    return context


def test_who_does_not_have_the_secret_gets_nothing(tmp_path: Path) -> None:
    with Nodes("127.0.0.1") as nodes:
        with call(nodes) as plain:
            assert b"{" not in heard(plain, HELLO)
        for context in (anyones_context(), with_certificate(make_secret(), tmp_path)):
            with call(nodes) as sock, contextlib.suppress(ssl.SSLError):
                assert heard(context.wrap_socket(sock), HELLO) == b""
        with pytest.raises(LabError, match=r"no agent has called from n1 in 0\.1 s"):
            nodes.wait(["n1"], 0.1)


def test_an_agent_does_not_obey_who_does_not_have_the_secret() -> None:
    with Nodes("127.0.0.1") as nodes, pytest.raises(OSError, match=r"(?i)certificate"):
        connect(f"127.0.0.1:{nodes.port}", make_secret(), patience_s=0)


def test_a_recorded_conversation_is_worth_nothing(tmp_path: Path) -> None:
    """All that an agent has sent is sent again, as it was: neither is a node let in, nor is
    anything of it answered."""
    recorded: list[bytes] = []
    with Nodes("127.0.0.1") as nodes, socket.create_server(("127.0.0.1", 0)) as proxy:

        def pump(source: socket.socket, target: socket.socket, keep: bool) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    if keep:
                        recorded.append(data)
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        def serve() -> None:
            one, other = proxy.accept()[0], call(nodes)
            threading.Thread(target=pump, args=(other, one, False), daemon=True).start()
            pump(one, other, True)

        threading.Thread(target=serve, daemon=True).start()
        with agent_in_thread(f"127.0.0.1:{proxy.getsockname()[1]}", nodes.secret, tmp_path / "n1"):
            node = nodes.wait(["n1"], 10)["n1"]
        while not node.lost:
            time.sleep(0.01)
        assert len(b"".join(recorded)) > 1000
        with call(nodes) as thief:
            answer = heard(thief, b"".join(recorded))
        assert HELLO not in answer and b"time" not in answer
        with pytest.raises(LabError):
            nodes.wait(["n1"], 0.1)


def test_who_talks_nonsense_is_cut_off() -> None:
    with Nodes("127.0.0.1") as nodes:
        for words in (
            HELLO + HELLO,
            b"{}\n",
            b'{"type": "ask_time", "number": 1}\n',
            b"[" * 2000 + b"\n",
            b"x" * (1 << 21),
        ):
            sock = secured(call(nodes), nodes.secret, server=False)
            with sock:
                begun_s = time.monotonic()
                assert heard(sock, words) == b""
                assert time.monotonic() - begun_s < LOST_S, "it was not cut off, but given up"


def test_what_nobody_has_foreseen_ends_the_connection_and_nobody_waits_for_it() -> None:
    def stumble(*_: object) -> None:
        raise KeyError("x")

    reasons: queue.Queue[str] = queue.Queue()
    with Nodes("127.0.0.1") as nodes:
        sock = secured(call(nodes), nodes.secret, server=False)
        channel = Channel(sock, messages.FROM_ORCHESTRATOR, stumble, reasons.put)
        channel.start()
        channel.send(messages.Hello(node="n1"))
        channel.send(messages.AskTime(number=1))
        assert reasons.get(timeout=LOST_S) == "KeyError: 'x'"
        for _ in range(3):
            channel.send(messages.FileGrew(path="logs/w0.log"), b"x" * (1 << 20))


def test_what_time_it_is_overtakes_the_files_that_wait() -> None:
    secret = make_secret()
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: secured(server.accept()[0], secret, server=True))
        sock = connect(f"127.0.0.1:{server.getsockname()[1]}", secret, patience_s=0)
        channel = Channel(sock, messages.FROM_ORCHESTRATOR, lambda *_: None, lambda _: None)
        channel.send(messages.FileGrew(path="logs/w0.log"), b"x" * 1000)
        channel.send(messages.AskTime(number=7))
        channel.start()
        with other.result() as end:
            told = b""
            while told.count(b"\n") < 2:
                told += end.recv(4096)
        channel.close()
    assert [json.loads(line)["type"] for line in told.splitlines()[:2]] == ["ask_time", "file_grew"]


@pytest.mark.parametrize(
    "clock",
    ["[NaN, 0, 0, 0, 0]", "[0, 0, 0, Infinity, 0]", "[0, 0.5, 0, 0, 0]", "[0, 0, 0, -1, 0]", "[0]"],
)
def test_a_clock_that_no_machine_has_is_not_believed(clock: str) -> None:
    with pytest.raises(ValueError, match="clock"):
        messages.parse(f'{{"type": "status", "clock": {clock}}}'.encode(), messages.FROM_AGENT)
    assert (
        messages.parse(
            b'{"type": "status", "clock": [1e6, 1e-4, 5, 0.001, 0]}', messages.FROM_AGENT
        ).clock[1]
        == 1e-4
    )


@pytest.mark.parametrize(
    "path",
    [
        "../x.jsonl",
        "/etc/passwd",
        "logs/../result.json",
        "result.json",
        "hosts/w0/.x",
        "logs/a/b.log",
        "",
    ],
)
def test_a_node_writes_only_where_records_belong(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        messages.parse(
            json.dumps({"type": "file_grew", "path": path}).encode(), messages.FROM_AGENT
        )


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a//b", "a/./b", "a/..", "a\0b", ""])
def test_an_agent_takes_no_path_that_leads_out(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        messages.parse(
            json.dumps({"type": "append_file", "path": path}).encode(), messages.FROM_ORCHESTRATOR
        )


@given(
    st.binary(max_size=200)
    | st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=5)).map(json.dumps)
)
def test_what_is_no_message_is_refused_in_one_line(line: bytes | str) -> None:
    for kind in (messages.FROM_AGENT, messages.FROM_ORCHESTRATOR):
        with pytest.raises(ValueError) as refused:
            messages.parse(line.encode() if isinstance(line, str) else line, kind)
        assert len(str(refused.value).splitlines()) == 1


def test_what_a_node_cannot_make_is_said_with_its_name(tmp_path: Path) -> None:
    def cannot(*_: object) -> None:
        raise LabError("the kernel has no veth")

    run = tmp_path / "run"
    shared = run / "cells" / "c" / "shared"
    shared.mkdir(parents=True)
    (run / "script").mkdir()
    (run / "script" / "train.py").write_text("print()")
    plan = LabPlan(
        {"w0": LinkState()},
        view=View(run, (run / "script",), shared, {"w0": (run / "cells/c/hosts/w0",)}),
    )
    seen = []

    def place() -> dict[str, tuple[str, dict[str, Any]]]:
        time.sleep(0.2)
        seen.append(
            sorted(
                path.relative_to(tmp_path / "n1").as_posix()
                for path in (tmp_path / "n1").rglob("*")
            )
        )
        return {"w0": ("n1", {})}

    with (
        Nodes("127.0.0.1") as nodes,
        agent_in_thread(f"127.0.0.1:{nodes.port}", nodes.secret, tmp_path / "n1", cannot),
    ):
        found = nodes.wait(["n1"], 10)
        with (
            pytest.raises(LabError, match=r"^node n1: the kernel has no veth$"),
            RemoteLab(plan, run, found, place),
        ):
            pass
        assert list((tmp_path / "n1").iterdir()) == []
        node = found["n1"]
        # once a lab is made, that ends its cell alone
        with pytest.raises(NodeRefused, match=r"^node n1: there is no cell$"):
            node.answer(node.ask(messages.ReadCounters(request=node.number())))
    made = [
        "cells",
        "cells/c",
        "cells/c/control.sock",
        "cells/c/hosts",
        "cells/c/hosts/w0",
        "cells/c/logs",
        "cells/c/shared",
    ]
    assert seen == [[*made, "script", "script/train.py"]]
    with pytest.raises(NodeLost, match="node n1 is lost"):
        found["n1"].send(messages.Kill(number=1))


@settings(max_examples=25)
@given(
    offset_s=st.floats(-1e6, 1e6),
    drift=st.floats(-5e-4, 5e-4),
    slowest_s=st.floats(1e-4, 0.2),
    seed=st.integers(0, 1000),
)
def test_a_measured_clock_is_never_farther_off_than_it_says(
    offset_s: float, drift: float, slowest_s: float, seed: int
) -> None:
    chance, clock, own_s = random.Random(seed), MeasuredClock(), 5e5

    def true_s(at_s: float) -> float:
        return at_s + offset_s + drift * (at_s - 5e5)

    for _ in range(60):
        there_s, back_s = chance.uniform(5e-5, slowest_s), chance.uniform(5e-5, slowest_s)
        clock.add(own_s, true_s(own_s + there_s), own_s + there_s + back_s)
        own_s += there_s + back_s + 0.8
        # Which of both moments of a trip it is about, does not matter at such a drift.
        allowed_s = clock.now.uncertainty_s(own_s) + 1e-3 * slowest_s + 1e-9
        assert abs(clock.now.reference(own_s) - true_s(own_s)) <= allowed_s
    assert clock.now.uncertainty_s(own_s) <= slowest_s
    assert clock.now.own(clock.now.reference(own_s)) == pytest.approx(own_s, abs=1e-6)


def test_a_drift_is_found_and_followed() -> None:
    """200 ppm are 12 ms a minute; with round trips of half a millisecond it is known to a few ppm
    after that time."""
    chance, clock = random.Random(0), MeasuredClock()
    for number in range(300):
        own_s = 0.2 * number
        there_s, back_s = chance.uniform(1e-4, 4e-4), chance.uniform(1e-4, 4e-4)
        clock.add(own_s, (own_s + there_s) * (1 + 200e-6), own_s + there_s + back_s)
    assert clock.now.drift == pytest.approx(200e-6, abs=10e-6)
    assert clock.now.unsure_drift < 10e-6 and clock.now.unsure_s < 3e-4
    assert clock.now.reference(70.0) == pytest.approx(70.0 * (1 + 200e-6), abs=3e-4)


def test_a_clock_that_changes_its_pace_is_followed_by_what_it_did_last() -> None:
    clock = MeasuredClock()
    for number in range(200):
        own_s = 0.2 * number
        drifted_s = 200e-6 * (10 - abs(own_s - 10))
        clock.add(own_s, own_s + 2e-4 + drifted_s, own_s + 4e-4)
    assert clock.now.drift == pytest.approx(-200e-6, abs=20e-6)
    assert clock.now.reference(own_s) == pytest.approx(own_s + drifted_s, abs=3e-4)


def test_the_clock_of_this_machine_is_its_own() -> None:
    assert Clock().reference(12345.678) == Clock().own(12345.678) == 12345.678
    assert Clock().uncertainty_s(1e9) == 0.0
