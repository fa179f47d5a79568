"""The server of the live page: HTTP on one address, behind a token, for one run directory.

    GET  /TOKEN/             the page, or while nothing is under way, the report
    GET  /TOKEN/page.js, page.css
    GET  /TOKEN/events       server-sent events: all there is, then once a second what has changed
    POST /TOKEN/link         {"cell", "links": [...], "set": {"rate", "delay", "up"}} → what the
                             cell's link server answers
    GET  /TOKEN/report.html  the report

The token is part of the path, so that a browser sends it with nothing that the page itself did not
ask for. A cookie would do worse: it knows no ports, so any other program's page on this address
would be sent it. What has another Host or Origin than the page's own gets no further, either
(cross-site requests, DNS rebinding). Names of files never come from a request.
"""

import contextlib
import errno
import hmac
import ipaddress
import json
import os
import queue
import re
import secrets
import select
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from testbed.files import LARGEST_BYTES, open_regular
from testbed.live.view import RunView
from testbed.protocol import decode_message, one_line
from testbed.recording.link_server import send_request
from testbed.run.live_page import LINGER_S

UPDATE_S = 1.0
_READ_S = 0.2
"""Of every second, at most, for what was recorded before somebody looked."""
_QUIET_S = 15.0
"""After so long without news a comment shows that the server is there, and that the page still
is."""
_REQUEST_S = 10.0
_MOST_REQUESTS = 32
_MOST_PAGES = 8
_MOST_BODY_BYTES = 1 << 14
_SETTABLE = {"rate": str, "delay": str, "up": bool}
_HOST = re.compile(r"(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]+))(?::\d+)?")
_FILES = {"page.js": "text/javascript", "page.css": "text/css"}
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for"
    " 'script'"
)
_REPORT_POLICY = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline';"
    " style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
"""A report has scripts in it, and a run directory may be a stranger's: in an origin of its own it
can move no link."""


class CannotServe(OSError):
    """The page cannot be served at that address. The message is one line."""

    def __str__(self) -> str:
        return str(self.args[0])


class LivePage:
    """Serves from entering to leaving; ``tick`` has to be called about once a second.

    under_way: whether the run still goes on; asked for when somebody looks.
    """

    def __init__(
        self, directory: Path, address: str, port: int, under_way: Callable[[], bool]
    ) -> None:
        """Raises CannotServe."""
        self.directory = directory
        self.under_way = under_way
        self.token = secrets.token_urlsafe(24)
        self._view = RunView(directory)
        self._lock = threading.Lock()
        self._pages: set[queue.Queue[str | None]] = set()
        self._reports = 0
        self._link_requests = threading.Lock()
        self._rendering = threading.Lock()
        self.loopback = True
        try:
            host = ipaddress.ip_address("127.0.0.1" if address == "localhost" else address)
            self.loopback = host.is_loopback
            self._server = _Server((str(host), port), self, host.version == 6)
        except ValueError:
            raise CannotServe(
                f"{one_line(address)!r} is no IP address; use 127.0.0.1, or one of this machine's"
            ) from None
        except (OSError, OverflowError) as error:
            hint = (
                "; choose another port, or leave it out"
                if getattr(error, "errno", 0) == errno.EADDRINUSE
                else ""
            )
            raise CannotServe(
                f"cannot serve at {address}, port {port}: {getattr(error, 'strerror', error)}{hint}"
            ) from None

    def __enter__(self) -> "LivePage":
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._say(None)
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Where the page is, with its token."""
        address, port = self._server.server_address[:2]
        host = f"[{address!s}]" if ":" in str(address) else str(address)
        return f"http://{host}:{port}/{self.token}/"

    def tick(self) -> None:
        """Read what was recorded and tell the pages that are open; if there are none, nothing is
        read."""
        with self._lock:
            if not self._pages:
                return
            self._view.update(_READ_S)
            if changes := self._view.changes():
                self._say(_event(changes))
            if not self.under_way():
                self._say(_event({"ended": True}))

    def linger(self) -> None:
        """Wait until the pages that are open have the report of a run that has ended; not for
        ever."""
        with self._lock:
            wanted = self._reports + len(self._pages)
        self.tick()
        give_up_s = time.monotonic() + LINGER_S
        while self._reports < wanted and time.monotonic() < give_up_s:
            time.sleep(0.05)

    def _say(self, text: str | None) -> None:
        for page in list(self._pages):
            try:
                page.put_nowait(text)
            except queue.Full:  # it does not listen; when it does again, it begins anew
                self._pages.discard(page)

    @contextlib.contextmanager
    def listening(self) -> "Iterator[queue.Queue[str | None]]":
        """The events of a page, in a queue that begins with all there is; None is the last."""
        page: queue.Queue[str | None] = queue.Queue(8)
        with self._lock:
            if len(self._pages) >= _MOST_PAGES:
                raise _Refused(
                    HTTPStatus.SERVICE_UNAVAILABLE, f"{_MOST_PAGES} pages are open; close one"
                )
            if not self._pages:  # nobody has looked for a while
                self._view.update(_READ_S)
                self._view.changes()
            page.put_nowait(_event(self._view.snapshot()))
            self._pages.add(page)
        try:
            yield page
        finally:
            with self._lock:
                self._pages.discard(page)

    def is_listening(self, page: "queue.Queue[str | None]") -> bool:
        """Whether news still come to a page."""
        return page in self._pages

    def report(self) -> bytes:
        """The report's page. Raises ValueError, one line, if there can be none."""
        file = self.directory / "report.html"
        with contextlib.suppress(OSError):
            results = [path.lstat().st_mtime for path in self.directory.glob("cells/*/result.json")]
            if not results or file.lstat().st_mtime >= max(results):
                with open_regular(file) as found:
                    return found.read(LARGEST_BYTES)
        from testbed.report.html import render
        from testbed.results.load import NotARun, load_run
        from testbed.results.summary import summarize

        try:
            with self._rendering:
                run = load_run(self.directory)
                return render(run, summarize(run)).encode()
        except (NotARun, OSError) as error:
            raise ValueError(str(error)) from None

    def sent_report(self) -> None:
        """A page has the report."""
        with self._lock:
            self._reports += 1

    def move(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Change links of the cell that runs. Raises _Refused, one line."""
        name, links, wanted = body.get("cell"), body.get("links"), body.get("set")
        cell = self._view.cells.get(name) if isinstance(name, str) else None
        if cell is None:
            raise _Refused(HTTPStatus.BAD_REQUEST, "there is no such cell")
        if not isinstance(links, list) or not all(
            isinstance(link, str) and len(link) < 100 for link in links
        ):
            raise _Refused(HTTPStatus.BAD_REQUEST, "links must be a list of names")
        if (
            not isinstance(wanted, dict)
            or not wanted
            or not all(_is_settable(*one) for one in wanted.items())
        ):
            raise _Refused(HTTPStatus.BAD_REQUEST, f"set must have some of {', '.join(_SETTABLE)}")
        try:
            # one at a time: the thread that answers is the one that keeps the links on time
            with self._link_requests:
                return send_request(cell.directory, {"links": links, "set": wanted})
        except (OSError, ValueError):
            raise _Refused(
                HTTPStatus.CONFLICT, f"{cell.name} does not run any more, or not yet"
            ) from None


def _is_settable(key: object, value: object) -> bool:
    kind = _SETTABLE.get(key) if isinstance(key, str) else None
    return kind is not None and isinstance(value, kind) and len(str(value)) < 40


def _event(message: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(message, allow_nan=False, separators=(',', ':'))}\n\n"


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], page: LivePage, six: bool) -> None:
        if six:
            self.address_family = socket.AF_INET6
        self.page = page
        self._free = threading.BoundedSemaphore(_MOST_REQUESTS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer's would ask the network for its own name
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who goes in the middle of an answer is no fault; and whatever else it is, it ends one
        request."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _REQUEST_S
    server_version = "testbed"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(
            {
                "": self._page,
                "events": self._events,
                "report.html": self._report,
                **dict.fromkeys(_FILES, self._file),
            }
        )

    def do_POST(self) -> None:
        self._answer({"link": self._link})

    def _answer(self, ways: Mapping[str, Callable[[], None]]) -> None:
        try:
            self._check_host()
            token, slash, self._name = self.path.removeprefix("/").partition("/")
            if not hmac.compare_digest(
                token.encode(errors="replace"), self.server.page.token.encode()
            ):
                raise _Refused(
                    HTTPStatus.FORBIDDEN,
                    "the token is missing or wrong; take the whole address that was printed",
                )
            self._check_origin()
            if not slash and self.command == "GET":
                self._redirect(f"/{token}/")
                return
            if self._name not in ways:
                raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page")
            ways[self._name]()
        except _Refused as refused:
            self._send(refused.status, f"{refused}\n".encode(), "text/plain")

    def _check_host(self) -> None:
        """A name that leads here by a stranger's DNS is none of these: an IP address, or
        localhost."""
        hosts = self.headers.get_all("Host") or []
        host = _HOST.fullmatch(hosts[0].strip().lower()) if len(hosts) == 1 else None
        name = (host["six"] or host["name"]) if host else ""
        with contextlib.suppress(ValueError):
            if (
                name == "localhost"
                or ipaddress.ip_address(name).is_loopback
                or not self.server.page.loopback
            ):
                return
        raise _Refused(HTTPStatus.FORBIDDEN, "this is not the address that was printed")

    def _check_origin(self) -> None:
        """No other site may ask; to change something, a page must say that it is ours (RFC
        6454)."""
        origins = self.headers.get_all("Origin") or []
        ours = f"http://{(self.headers['Host'] or '').strip().lower()}"
        if (origins or self.command != "GET") and origins != [ours]:
            raise _Refused(HTTPStatus.FORBIDDEN, "no other site may ask for this")

    def _page(self) -> None:
        if not self.server.page.under_way():
            self._redirect("report.html")
            return
        self._send(HTTPStatus.OK, _shipped("page.html"), "text/html", _PAGE_POLICY)

    def _redirect(self, place: str) -> None:
        self.send_response(HTTPStatus.FOUND)
        self._end_headers({"Location": place, "Content-Length": "0"})

    def _file(self) -> None:
        self._send(HTTPStatus.OK, _shipped(self._name), _FILES[self._name], _PAGE_POLICY)

    def _report(self) -> None:
        try:
            content = self.server.page.report()
        except ValueError as error:
            raise _Refused(HTTPStatus.NOT_FOUND, one_line(str(error), 500)) from None
        self._send(HTTPStatus.OK, content, "text/html", _REPORT_POLICY)
        self.server.page.sent_report()

    def _link(self) -> None:
        if self.headers.get_content_type() != "application/json":
            raise _Refused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "what is sent must be application/json"
            )
        length = self.headers["Content-Length"] or ""
        if not length.isdecimal() or len(length) > 9 or int(length) > _MOST_BODY_BYTES:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"what is sent must have at most {_MOST_BODY_BYTES} bytes",
            )
        try:
            body = decode_message(self.rfile.read(int(length)))
        except ValueError:
            raise _Refused(HTTPStatus.BAD_REQUEST, "what is sent must be a JSON object") from None
        answer = self.server.page.move(body)
        self._send(HTTPStatus.OK, json.dumps(answer).encode(), "application/json")

    def _events(self) -> None:
        page = self.server.page
        with page.listening() as news:
            self.send_response(HTTPStatus.OK)
            self._end_headers({"Content-Type": "text/event-stream; charset=utf-8"})
            while True:
                try:
                    text = news.get(timeout=_QUIET_S)
                except queue.Empty:
                    text = ": still here\n\n"
                if text is None or not page.is_listening(news):
                    return
                self.wfile.write(text.encode())

    def _send(
        self,
        status: HTTPStatus,
        content: bytes,
        kind: str,
        policy: str = "default-src 'none'; sandbox",
    ) -> None:
        self.send_response(status)
        length = str(len(content))
        self._end_headers(
            {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": length,
                "Content-Security-Policy": policy,
            }
        )
        self.wfile.write(content)

    def _end_headers(self, headers: Mapping[str, str]) -> None:
        for name, value in {**_HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, such as a line that is too long: without repeating
        it."""
        self.close_connection = True
        with contextlib.suppress(OSError, AttributeError):
            self._send(HTTPStatus(code), f"{HTTPStatus(code).phrase}\n".encode(), "text/plain")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is the run's, and addresses have the token in them."""


def _shipped(name: str) -> bytes:
    return resources.files("testbed.live").joinpath(name).read_bytes()


def serve(page: LivePage, until: int | None = None) -> bool:
    """Tick until something comes from a descriptor, or its end; returns whether something came."""
    while True:
        page.tick()
        ready, _, _ = select.select([] if until is None else [until], [], [], UPDATE_S)
        if until in ready:
            assert until is not None
            return bool(os.read(until, 1))
