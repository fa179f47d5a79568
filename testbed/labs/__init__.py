"""Labs: places with named hosts and links. A new lab is one module and one line in ``open_labs``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from testbed.labs.base import Lab, LabPlan


@contextmanager
def open_labs(kind: str, run_directory: Path) -> Iterator[Callable[[LabPlan], Lab]]:
    """A factory of labs that share what is dear to make, such as one process that has imported torch.

    kind: "netns" (the caller is inside ``netns.enclosure``) or "docker".
    """
    if kind == "netns":
        from testbed.labs.forkserver import ForkServer
        from testbed.labs.netns import NetnsLab

        with ForkServer(preload=["netsenseml.train.worker"]) as server:
            yield lambda plan: NetnsLab(plan, server)
    else:
        from testbed.labs.docker import DockerLab

        yield lambda plan: DockerLab(plan, run_directory)
