"""A headless Chromium that is told what to do over a pipe (Chrome DevTools Protocol), for what
--dump-dom cannot: a page that goes on, input, and what a page costs."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Browser:
    """One page from entering to leaving. ``messages`` has what it wrote to its console, and every
    error."""

    def __init__(self, profile: Path) -> None:
        self.messages: list[str] = []
        self._profile = profile
        self._number = 0
        self._data = b""
        self._session: str | None = None

    def __enter__(self) -> Self:
        chromium = shutil.which("chromium")
        assert chromium is not None
        command = [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--disable-dev-shm-usage",
        ]
        command += [
            "--enable-precise-memory-info",
            "--proxy-server=127.0.0.1:9",
            "--proxy-bypass-list=127.0.0.1",
        ]
        command += [
            f"--user-data-dir={self._profile}",
            "--no-first-run",
            "--disable-background-networking",
        ]
        # Chromium reads from descriptor 3 and writes to 4; ours must not be these when they are put
        # there.
        ends = [
            fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20)
            for pair in (os.pipe(), os.pipe())
            for end in pair
        ]
        theirs_in, self._out, self._in, theirs_out = ends

        def connect() -> None:
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        self._process = subprocess.Popen(
            command,
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Runtime", "Log", "Page", "Performance"):
            self.tell(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            if answer.get("method") in (
                "Runtime.consoleAPICalled",
                "Runtime.exceptionThrown",
                "Log.entryAdded",
            ):
                self.messages.append(json.dumps(answer["params"])[:500])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._data:
            assert select.select([self._in], [], [], 60)[0], "Chromium does not answer"
            piece = os.read(self._in, 1 << 16)
            assert piece, "Chromium has ended"
            self._data += piece
        line, self._data = self._data.split(b"\0", 1)
        return dict(json.loads(line))

    def value(self, expression: str) -> Any:
        """What an expression is on the page; a promise is waited for."""
        told = self.tell(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 20.0) -> Any:
        """Wait until an expression is true, and return it."""
        give_up_s = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < give_up_s, (expression, self.messages)
            time.sleep(0.1)
        return found

    def metric(self, name: str) -> float:
        """A counter of the page, such as TaskDuration (s) or JSHeapUsedSize (bytes)."""
        return float(
            {one["name"]: one["value"] for one in self.tell("Performance.getMetrics")["metrics"]}[
                name
            ]
        )

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        size = self.tell("Page.getLayoutMetrics")["cssContentSize"]
        clip = {
            "x": 0,
            "y": 0,
            "width": size["width"],
            "height": min(size["height"], 3000),
            "scale": 1,
        }
        told = self.tell("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))
