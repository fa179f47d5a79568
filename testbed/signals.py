"""What ends a run in order: Ctrl-C, SIGTERM and a hang-up."""

import contextlib
import signal
import threading
from collections.abc import Iterator


def ending_signals() -> list[signal.Signals]:
    """Those that end a run in order; not a hang-up if the caller, such as nohup(1), has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put these signals off until the end of the block; only the main thread can, and only it is interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda which, _: came.append(which)) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
