"""Whether this machine can make the traffic that was asked for; found out before anything
starts."""

import shutil
from collections.abc import Collection

from testbed.labs.base import LabError
from testbed.traffic.flows import Flow
from testbed.traffic.iperf3 import PROGRAM
from testbed.traffic.tcp import congestion_error

_BUILTIN = "leave engine out: the built-in one needs nothing"


def check_congestion(names: Collection[str | None], *, privileged: bool) -> None:
    """Raise LabError with the mend if this machine lacks a congestion control; None stands for its
    own.

    privileged: who chooses it has CAP_NET_ADMIN in the network namespace.
    """
    for name in sorted(filter(None, names)):
        if error := congestion_error(name, privileged=privileged):
            raise LabError(error)


def check_traffic(flows: Collection[Flow], lab: str) -> None:
    """Raise LabError with the mend if hosts of a lab lack a congestion control or iperf3."""
    # Programs are root in the namespaces of the netns lab; in containers they have no rights at
    # all.
    check_congestion({flow.congestion for flow in flows}, privileged=lab == "netns")
    if not any(flow.engine == "iperf3" for flow in flows):
        return
    if lab == "netns" and shutil.which(PROGRAM) is None:
        fix = f"install it with: sudo apt-get install {PROGRAM} (or dnf), or {_BUILTIN}"
        raise LabError(f"engine: {PROGRAM} needs a program that this machine lacks; {fix}")
    if lab in ("docker", "swarm"):
        from testbed.labs.docker import image_has

        if not image_has(PROGRAM):
            fix = (
                "add it to containers/Dockerfile (RUN apt-get update && apt-get install -y"
                f" {PROGRAM}), or {_BUILTIN}"
            )
            raise LabError(
                f"engine: {PROGRAM} needs a program that the image of the hosts lacks; {fix}"
            )
