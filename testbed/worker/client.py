"""A worker's end of the control socket."""

import os
import select
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testbed import protocol

_LONGEST = 200


class ControlClient:
    """Talks to the orchestrator from a thread of its own; messages are described in ``protocol``.

    A worker without an orchestrator would train on, or hang in a collective, for ever. Therefore
    silence for ``silence_s`` or a lost socket ends the process at once with exit status
    ``EXIT_ORPHANED``: no other thread can be trusted to end it while it waits in a collective.
    Records are written row by row, so nothing is left to flush.
    """

    EXIT_ORPHANED = 70

    def __init__(self, path: Path, rank: int, silence_s: float = protocol.SILENCE_S) -> None:
        """Connect to the socket at ``path``, with the token of the environment; raises OSError if
        nobody listens there."""
        self._rank = rank
        self._silence_s = silence_s
        self._socket = protocol.connect_unix(path)
        self._sending = threading.Lock()
        self._state = threading.Condition()
        self.step = 0
        """Steps done; told with every heartbeat."""
        self._t0: float | None = None
        self._holding = False
        self._last_step: int | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="netsense-control", daemon=True)
        self.send({"type": "hello", "token": os.environ.get(protocol.ENV_TOKEN, "")})

    def ready(self, parameters: str) -> float:
        """Tell that this worker is ready and wait for the start; returns t0, CLOCK_MONOTONIC
        seconds of t = 0."""
        self.send({"type": "ready", "pid": os.getpid(), "parameters": parameters})
        self._thread.start()
        with self._state:
            self._state.wait_for(lambda: self._t0 is not None)
            assert self._t0 is not None
            return self._t0

    def step_done(self, steps: int) -> bool:
        """Tell that ``steps`` steps are done; returns False if that was the last one.

        While the orchestrator asks to hold, this waits until it says which step is the last.
        """
        with self._state:
            self.step = steps
            self._state.wait_for(lambda: not self._holding or self._last_step is not None)
            return self._last_step is None or steps < self._last_step

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message. A socket that is gone is not reported here: the thread ends the
        process."""
        with self._sending:
            try:
                self._socket.sendall(protocol.encode_message(message))
            except OSError:
                if not self._thread.is_alive():
                    raise

    def failed(self, error: str, *, by_peer: bool = False) -> None:
        """Tell in one line why this worker cannot go on; by_peer: because another one failed."""
        self.send({"type": "failed", "error": error, "by_peer": by_peer})

    def close(self) -> None:
        """From here on, silence is no reason to end. The connection stays until the process ends,
        to tell of a late failure."""
        self._closed = True

    def _serve(self) -> None:
        reason = self._listen()
        if not self._closed:
            print(f"testbed: rank {self._rank} ends: {reason}", file=sys.stderr, flush=True)
            os._exit(self.EXIT_ORPHANED)

    def _listen(self) -> str:
        """Handle messages until there can be no more; returns why."""
        buffer = protocol.MessageBuffer()
        heard = sent = time.monotonic()
        while (now := time.monotonic()) - heard < self._silence_s:
            if now - sent >= protocol.HEARTBEAT_S:
                self.send({"type": "heartbeat", "step": self.step})
                sent = now
            try:
                data = self._receive(
                    min(sent + protocol.HEARTBEAT_S, heard + self._silence_s) - now
                )
                if data is None:
                    continue
                if not data:
                    return "the orchestrator closed the control socket"
                for message in buffer.feed(data):
                    self._handle(message)
            except (OSError, ValueError, LookupError, TypeError) as error:
                return f"the control socket failed: {error!r}"
            heard = time.monotonic()
        return f"no word from the orchestrator for {self._silence_s:g} s"

    def _receive(self, timeout_s: float) -> bytes | None:
        """Bytes that arrived, b"" at the end of the stream, None if nothing came in time."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return self._socket.recv(65536) if poll.poll(max(0.0, timeout_s) * 1e3) else None

    def _handle(self, message: Mapping[str, Any]) -> None:
        with self._state:
            match message.get("type"):
                case "start":
                    self._t0 = float(message["t0"])
                case "hold":
                    # Under the lock, so that the step named is the one that step_done lets nobody
                    # leave.
                    self._holding = True
                    self.send({"type": "holding", "step": self.step})
                case "stop":
                    self._last_step = int(message["steps"])
                case "where":
                    self.send({"type": "where", "at": _main_thread_at()})
            self._state.notify_all()


def _main_thread_at() -> str:
    """File, line and function of the innermost Python frame."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "no Python code"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"[
        :_LONGEST
    ]
