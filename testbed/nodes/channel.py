"""The connection between the orchestrator and the agent of a node: TLS over TCP, messages in both
directions.

The secret of a run is a certificate with its key, made for it. Each end shows the certificate, and
accepts none but it, so only who has the key gets a word in, or reads one; and as TLS 1.3 agrees on
new keys each time, a recorded conversation is worth nothing (RFC 8446).
"""

import contextlib
import datetime
import os
import selectors
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter

from netsenseml.records import monotonic_s
from testbed.nodes.messages import AskTime, Hello, Message, Status, Time, parse

LOST_S = 3.5
"""An end that is not heard for so long is lost."""
MAX_PAYLOAD_BYTES = 1 << 20
"""Behind one message."""
_MOST_LINE_BYTES = 1 << 20
_MOST_MESSAGES_PER_S = 20_000
_MOST_WAITING_BYTES = 1 << 20
_MOST_UNSENT_BYTES = 128 << 10
"""In the kernel: what is there already, nothing overtakes."""
_PIECE_BYTES = 1 << 16
_PIECES = 16
"""So many are received, or sent, before it is the other's turn."""
_HANDSHAKE_S = 5.0
_CHECK_S = 0.5
_CLOSED = "the connection was closed"


def make_secret() -> bytes:
    """A new secret: PEM text of a certificate and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "testbed")])
    # The clocks of the nodes may differ by years, and the run is over long before.
    day = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(day)
        .not_valid_after(day.replace(year=2100))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM) + private


def secured(sock: socket.socket, secret: bytes, *, server: bool) -> ssl.SSLSocket:
    """Agree on TLS with the other end. Raises OSError (ssl.SSLError) if that lacks the secret,
    ValueError if this is none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    file = os.memfd_create("secret")  # the key touches no disk
    try:
        os.write(file, secret)
        context.load_cert_chain(f"/proc/self/fd/{file}")
        context.load_verify_locations(
            cadata=secret.partition(b"-----BEGIN PRIVATE KEY")[0].decode()
        )
    except (ssl.SSLError, UnicodeDecodeError):
        raise ValueError("the secret is none that the orchestrator has made") from None
    finally:
        os.close(file)
    sock.settimeout(_HANDSHAKE_S)
    with contextlib.ExitStack() as stack:
        stack.callback(sock.close)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):  # not every kernel has it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MOST_UNSENT_BYTES)
        made = context.wrap_socket(sock, server_side=server)
        stack.callback(made.close)
        own = ssl.PEM_cert_to_DER_cert(
            secret[: secret.index(b"-----BEGIN PRIVATE KEY")].decode().strip()
        )
        if made.getpeercert(binary_form=True) != own:
            raise ssl.SSLError("the other end shows another certificate")
        stack.pop_all()
    return made


class Channel:
    """Messages over one TLS connection; a thread of its own sends and receives.

    kind: of the messages that may come. heard: called with each and the bytes behind it, in order,
    on the channel's thread; it must not wait. What it raises ends the connection. lost: called
    once, there, with the reason as one line, when it has ended.
    """

    def __init__(
        self,
        sock: ssl.SSLSocket,
        kind: TypeAdapter[Any],
        heard: Callable[[Any, bytes], None],
        lost: Callable[[str], None],
    ) -> None:
        self._socket, self._kind, self._heard, self._lost = sock, kind, heard, lost
        self._waiting: deque[bytes] = deque()
        self._urgent: deque[bytes] = deque()
        self._rest = memoryview(b"")
        """Of the message that is being sent. TLS wants the same bytes again after a refusal, so it
        is sent to its end."""
        self._waiting_bytes = 0
        self._room = threading.Condition()
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self._buffer = bytearray()
        self._head: Message | None = None
        self._second_s, self._in_second = 0.0, 0
        self._closing = False
        self.ended = False
        self._thread = threading.Thread(target=self._run, name="channel", daemon=True)

    def start(self) -> None:
        """Begin to send and to receive."""
        self._socket.setblocking(False)
        self._thread.start()

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Send a message with bytes behind it. Waits while too much is under way, but not on the
        channel's own thread.

        What tells that this end lives, and what time it is, overtakes all else, and does not wait.

        What is sent over a connection that has ended is gone: ``lost`` has told of that.
        """
        if payload:
            message = message.model_copy(update={"bytes": len(payload)})
        data = message.model_dump_json(exclude_defaults=False).encode() + b"\n" + payload
        urgent = isinstance(message, Hello | AskTime | Time | Status)
        with self._room:
            if not urgent and threading.current_thread() is not self._thread:
                self._room.wait_for(lambda: self._waiting_bytes < _MOST_WAITING_BYTES or self.ended)
            if self.ended:
                return
            (self._urgent if urgent else self._waiting).append(data)
            self._waiting_bytes += len(data)
        self._wake()

    def flush(self, timeout_s: float) -> None:
        """Wait until all has been handed to the kernel."""
        with self._room:
            self._room.wait_for(lambda: not self._waiting_bytes or self.ended, timeout_s)

    def close(self) -> None:
        """Hang up; ``lost`` is called, too."""
        self._closing = True
        self._wake()
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join(LOST_S)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake already; closed: it has ended
            self._waker.send(b"x")

    def _run(self) -> None:
        reason = _CLOSED
        try:
            reason = self._converse()
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            pass
        except (OSError, ValueError) as error:
            reason = str(error)
        except Exception as error:
            # what nobody has foreseen must not leave others waiting for this thread
            reason = f"{type(error).__name__}: {error}"
        finally:
            with self._room:
                self.ended = True
                self._waiting.clear()
                self._urgent.clear()
                self._waiting_bytes = 0
                self._room.notify_all()
            for end in (self._socket, self._woken, self._waker):
                end.close()
            self._lost(reason)

    def _converse(self) -> str:
        """Returns why it has ended, or raises OSError or ValueError."""
        heard_s = monotonic_s()
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            selector.register(self._socket, selectors.EVENT_READ)
            while not self._closing:
                events = selectors.EVENT_READ | (
                    selectors.EVENT_WRITE if self._waiting_bytes else 0
                )
                selector.modify(self._socket, events)
                # decrypted already, so the kernel does not tell of it
                left = self._socket.pending() > 0
                ready = {
                    key.fileobj: happened
                    for key, happened in selector.select(0 if left else _CHECK_S)
                }
                if self._woken in ready:
                    self._woken.recv(4096)
                if left or ready.get(self._socket, 0) & selectors.EVENT_READ:
                    if not self._receive():
                        return _CLOSED
                    heard_s = monotonic_s()
                self._send()
                if monotonic_s() - heard_s > LOST_S:
                    return f"not heard for {LOST_S:g} s"
        return "hung up"

    def _send(self) -> None:
        for _ in range(_PIECES):
            if not self._rest:
                with self._room:
                    queue = self._urgent or self._waiting
                    if not queue:
                        return
                    self._rest = memoryview(queue.popleft())
            try:
                sent = self._socket.send(self._rest[:_PIECE_BYTES])
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return
            self._rest = self._rest[sent:]
            with self._room:
                self._waiting_bytes -= sent
                self._room.notify_all()

    def _receive(self) -> bool:
        """Take what has come, but no more than leaves time to send; False at the end."""
        for _ in range(_PIECES):
            try:
                data = self._socket.recv(_PIECE_BYTES)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return True
            if not data:
                return False
            self._buffer += data
            self._take()
        return True

    def _take(self) -> None:
        while True:
            if self._head is None:
                end = self._buffer.find(b"\n")
                if end < 0:
                    if len(self._buffer) > _MOST_LINE_BYTES:
                        raise ValueError(f"a message is longer than {_MOST_LINE_BYTES} bytes")
                    return
                self._head = parse(bytes(self._buffer[:end]), self._kind)
                del self._buffer[: end + 1]
                self._count()
            if len(self._buffer) < self._head.bytes:
                return
            payload = bytes(self._buffer[: self._head.bytes])
            del self._buffer[: self._head.bytes]
            head, self._head = self._head, None
            self._heard(head, payload)

    def _count(self) -> None:
        now_s = monotonic_s()
        if now_s - self._second_s >= 1:
            self._second_s, self._in_second = now_s, 0
        self._in_second += 1
        if self._in_second > _MOST_MESSAGES_PER_S:
            raise ValueError(f"more than {_MOST_MESSAGES_PER_S} messages a second")
