"""What ends a run leaves the program that has started it as it was."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, time
from testbed.signals import interrupt_main_thread_once, interruptible
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
try:
    with {block}:
        os.kill(os.getpid(), signal.{name})
        time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
time.sleep(0.6)  # longer than the time after which a clean-up that hangs is ended
after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
print("as before" if after == before else after)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("block", ["interrupt_main_thread_once(0.3)", "interruptible()"])
def test_an_interrupted_block_leaves_the_program_as_it_was(block: str, name: str) -> None:
    code = PROGRAM.format(block=block, name=name)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\nas before\n"), done.stderr
