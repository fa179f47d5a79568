"""Labs: places with named hosts and links. A new lab is one module, opened in ``open_labs`` and
named in ``spec.models``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from testbed.labs.base import Lab, LabPlan


@contextmanager
def open_labs(
    kind: str, run_directory: Path, preload: Sequence[str]
) -> Iterator[Callable[[LabPlan], Lab]]:
    """A factory of labs that share what is dear to make, such as one process that has imported
    torch.

    kind: "netns" (the caller is inside the sandbox of ``netns.sandbox_command``), "docker" or
    "swarm".
    preload: modules that the hosts of netns labs will run as programs. Raises LabError where there
    is no daemon, or no image.
    """
    if kind == "netns":
        from testbed.labs.cgroups import inherited_groups
        from testbed.labs.forkserver import ForkServer
        from testbed.labs.netns import NetnsLab

        with ForkServer(preload) as server:
            yield lambda plan: NetnsLab(plan, server, inherited_groups())
    elif kind == "swarm":
        from testbed.labs.swarm import Swarm, SwarmLab

        with Swarm() as swarm:
            yield lambda plan: SwarmLab(plan, swarm, run_directory)
    else:
        from testbed.labs.docker import DockerLab, require_docker

        require_docker()
        yield lambda plan: DockerLab(plan, run_directory)
