"""Traffic by iperf3, for those who want its own; TCP and UDP.

A phase is one client, ended by a signal, because iperf3 counts its time in whole seconds. The bytes
are those that the server prints ten times a second; its rates are good to about 1 %. iperf3 gives
up when its path is cut for long, and then the cell fails.
"""

import ctypes
import math
import os
import re
import selectors
import signal
import subprocess

from netsenseml.records import monotonic_s
from testbed.traffic.flows import Flow, Phase

PROGRAM = "iperf3"
_BUSY = "the server is busy"
_CHECK_S = 0.1
_FOREVER_S = 86_400  # iperf3's longest
_ENDING_S = 1.0
_STREAM = re.compile(r"\[ *(\d+)\] local .* connected to ")
_INTERVAL = re.compile(
    r"\[ *(\d+)\] +([\d.]+)-([\d.]+) +sec .*? ([\d.]+) Kbits/sec(?:.*? (\d+)/(\d+) \()?"
)
_PR_SET_PDEATHSIG = 1
_TOTALS = ("receiver", "sender")


def _end_with_parent() -> None:
    """Have the kernel kill iperf3 when this program ends, in whatever way: nobody else knows of
    it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Sender:
    """One client a phase (``program.Sender``)."""

    def __init__(self, flow: Flow, address: str, selector: selectors.BaseSelector) -> None:
        self.due_s = math.inf
        self._flow, self._address = flow, address
        self._streams = 0
        self._client: subprocess.Popen[str] | None = None

    def begin(self, phase: Phase) -> None:
        self._streams = phase.streams
        self._start()

    def tick(self) -> None:
        self.due_s = monotonic_s() + _CHECK_S
        if self._client is None or (code := self._client.poll()) is None:
            return
        words = self._client.communicate()[1].strip().splitlines() or [
            f"{PROGRAM} ended with exit code {code}"
        ]
        if _BUSY not in words[-1]:
            raise OSError(words[-1])
        self._start()  # the server has not yet noticed the end of the last phase

    def end(self) -> None:
        self.due_s = math.inf
        if self._client is None:
            return
        self._client.terminate()
        try:
            self._client.communicate(timeout=_ENDING_S)
        except subprocess.TimeoutExpired:
            self._client.kill()
            self._client.communicate()
        self._client = None

    def _start(self) -> None:
        flow = self._flow
        command = [
            PROGRAM,
            "-c",
            self._address,
            "-p",
            str(flow.port),
            "-t",
            str(_FOREVER_S),
            "-P",
            str(self._streams),
        ]
        if flow.kind == "udp":
            command += ["-u", "-b", str(flow.rate_bps), "-l", str(flow.packet_bytes)]
        elif flow.congestion is not None:
            command += ["-C", flow.congestion]
        self._client = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 (there are no threads)
        )
        self.due_s = monotonic_s() + _CHECK_S


class Receiver:
    """A server, and what it prints (``program.Receiver``)."""

    def __init__(self, flow: Flow, address: str, selector: selectors.BaseSelector) -> None:
        self._counts = Transcript(flow)
        command = [
            PROGRAM,
            "-s",
            "-B",
            address,
            "-p",
            str(flow.port),
            "-i",
            "0.1",
            "-f",
            "k",
            "--forceflush",
        ]
        self._server = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            preexec_fn=_end_with_parent,  # noqa: PLW1509
        )
        assert self._server.stdout is not None
        self._output = self._server.stdout.fileno()
        self._pending = b""
        while not self._counts.listening:
            self._read()
        selector.register(self._output, selectors.EVENT_READ, self._read)

    @property
    def bytes(self) -> int:
        return self._counts.bytes

    @property
    def streams(self) -> int | None:
        return self._counts.streams

    @property
    def packets(self) -> int | None:
        return self._counts.packets

    @property
    def lost(self) -> int | None:
        return self._counts.lost

    def collect(self) -> None:
        pass

    def _read(self) -> None:
        data = os.read(self._output, 1 << 16)
        if not data:
            raise OSError(f"the server of {PROGRAM} ended with exit code {self._server.wait()}")
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._counts.take(line.decode(errors="replace"))


class Transcript:
    """What a server printed, in numbers: the counters of ``program.Receiver``."""

    def __init__(self, flow: Flow) -> None:
        udp = flow.kind == "udp"
        self.listening = False
        self.bytes = 0
        self.streams: int | None = None if udp else 0
        self.packets: int | None = 0 if udp else None
        self.lost: int | None = 0 if udp else None
        self._packet_bytes = flow.packet_bytes
        self._until_s: dict[str, float] = {}

    def take(self, line: str) -> None:
        """One line of output."""
        if line.startswith("Server listening"):  # before the first test, and after each
            self.listening = True
            self._until_s.clear()
        if self.streams is not None:
            self.streams = len(self._until_s)
        if match := _STREAM.match(line):
            self._until_s[match[1]] = 0.0
        elif (match := _INTERVAL.match(line)) and not line.rstrip().endswith(_TOTALS):
            stream, begin_s, end_s = match[1], float(match[2]), float(match[3])
            if begin_s < self._until_s.get(stream, 0.0):
                return  # a client that was ended makes the server print its last interval again
            self._until_s[stream] = end_s
            if match[5] is None or self.packets is None or self.lost is None:
                self.bytes += round(float(match[4]) * 1e3 / 8 * (end_s - begin_s))
            else:
                arrived = int(match[6]) - int(match[5])
                self.packets += arrived
                self.lost += int(match[5])
                self.bytes += arrived * self._packet_bytes
