"""What ends a run in order: Ctrl-C, SIGTERM, a hang-up, and the end of the process that has started
it."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

EXIT_INTERRUPTED = 130
_GRACE_S = 4.0
"""From the first interrupt to the hard end; users were promised five seconds."""
DOCKER_GRACE_S = 14.0
"""The daemon takes longer to remove containers than the kernel takes for namespaces."""


def ending_signals() -> list[signal.Signals]:
    """Those that end a run in order; not a hang-up if the caller, such as nohup(1), has it
    ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put these signals off until the end of the block; only the main thread can, and only it is
    interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda which, _: came.append(which))
        for number in ending_signals()
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Until the end of the block SIGTERM and a hang-up raise KeyboardInterrupt, too, as Ctrl-C
    does; in the main thread, which alone is interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, signal.default_int_handler) for number in ending_signals()
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupt_main_thread_once(
    grace_s: float = _GRACE_S,
) -> Iterator[tuple[Callable[[], None], threading.Event]]:
    """Until the end of the block SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt once. The block
    has a function that does so from any thread, and what says that it has been done: libraries may
    wrap the exception in one of their own.

    Whoever cleans up must not be interrupted again, so later signals are ignored; but the process
    ends after a grace time even if the clean-up hangs.
    """
    fired = threading.Event()
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(grace_s, os._exit, (EXIT_INTERRUPTED,))
    timer.daemon = True

    def handler(*_: object) -> None:
        if fired.is_set():
            return
        fired.set()
        timer.start()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in ending_signals()}
    try:
        yield lambda: signal.pthread_kill(main, signal.SIGINT), fired
    finally:
        timer.cancel()
        for number, old in before.items():
            signal.signal(number, old)


def unblock_interrupts() -> None:
    """Let the SIGINT come that ``child_of_ours`` has held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def watch_parent_pipe(stop: Callable[[], None]) -> None:
    """Call ``stop`` when standard input ends, and so whoever started this process, in whatever
    way."""
    while os.read(0, 1):
        pass
    stop()


@contextlib.contextmanager
def child_of_ours(command: Sequence[str], **more: Any) -> Iterator["subprocess.Popen[Any]"]:
    """A process that stops in an orderly way when the block, or this process, ends in whatever way;
    more: as for ``Popen``.

    Its standard input is a pipe that only we hold open, of which it reads the end
    (``watch_parent_pipe``). Signals that would end us close it, and the block goes on until the
    child has ended. SIGINT waits until the child calls ``unblock_interrupts``: a Python that is
    still loading answers it with a traceback.
    """
    read_end, parent_pipe = os.pipe2(os.O_CLOEXEC)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # a child has its parent's
    try:
        # A process group of its own, or a signal to ours would end it before it can clean up.
        started = subprocess.Popen(command, stdin=read_end, process_group=0, **more)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(read_end)
    with started as child, _closing_on_signal(parent_pipe) as close_parent_pipe:
        try:
            yield child
        finally:
            close_parent_pipe()
            child.wait()


class _closing_on_signal:  # noqa: N801
    """While active, signals that would end this process close the pipe to the child instead."""

    def __init__(self, parent_pipe: int) -> None:
        self._parent_pipe = parent_pipe

    def __enter__(self) -> Callable[[], None]:
        self._before = {
            number: signal.signal(number, self._interrupted) for number in ending_signals()
        }
        return self._close

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupted(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        # first, as another signal may come here before it is closed
        pipe, self._parent_pipe = self._parent_pipe, -1
        if pipe >= 0:
            os.close(pipe)
