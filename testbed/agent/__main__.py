"""The agent of a node: what it is told by the orchestrator of a lab of several machines.

    python -m testbed.agent ORCHESTRATOR --name NODE --secret FILE --lab MODULE:CLASS
                            --directory DIRECTORY

Not for people: a lab of several machines starts it on each, as root in the machine's network.
"""

import argparse
import contextlib
import importlib
import os
import resource
import signal
import sys
import threading
from pathlib import Path

from testbed.agent.program import Agent, MakeNodeLab, connect
from testbed.protocol import one_line

_END_S = 1.2
"""So long the lab has to end when the orchestrator is lost; then the agent ends anyway, less than 5
s after the last word."""


def main() -> int:
    """Serve one orchestrator; exit code 1 if it cannot be reached."""
    parser = argparse.ArgumentParser(prog="python -m testbed.agent")
    parser.add_argument("orchestrator", help="its address, host:port")
    parser.add_argument("--name", required=True, help="what the orchestrator calls this node")
    parser.add_argument(
        "--secret", required=True, type=Path, help="file with the secret of the run"
    )
    parser.add_argument(
        "--lab", required=True, help="class that makes this node's part of a lab, module:class"
    )
    parser.add_argument(
        "--directory", required=True, type=Path, help="for this node's copy of the run directory"
    )
    given = parser.parse_args()
    module, _, name = given.lab.partition(":")
    make_lab: MakeNodeLab = getattr(importlib.import_module(module), name)
    # Each host takes some sockets, and each program that connects one more.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    given.directory.mkdir(parents=True, exist_ok=True)
    try:
        sock = connect(given.orchestrator, given.secret.read_bytes())
    except (OSError, ValueError) as error:
        print(
            f"testbed: the orchestrator at {given.orchestrator} does not answer:"
            f" {one_line(str(error))}",
            file=sys.stderr,
        )
        return 1
    agent = Agent(given.name, make_lab, given.directory)
    serving = threading.Thread(target=agent.serve, args=(sock,), name="agent", daemon=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: agent.lost.set())
    serving.start()
    agent.lost.wait()
    agent.leave()
    serving.join(_END_S)
    print(f"testbed: {given.name} ends: {agent.why or 'it was told to'}", flush=True)
    os._exit(0)  # whatever a thread still waits for


if __name__ == "__main__":
    sys.exit(main())
