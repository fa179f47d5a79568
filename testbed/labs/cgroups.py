"""Limits of memory and processes for hosts of the netns lab: a control group for each of them
(cgroups(7)).

    <the group we are in>/netsense-<owner>/self
                                          /host-w0/programs

``self``, of version 2 only, has us, and all programs that are on no host; ``programs`` those of a
host, and the limits stand one above.

The outer group is made, and removed, by the process that owns the run; those of hosts by each lab,
within the sandbox. Where that process was killed, the next run or ``clean`` removes what is left.
We never go above the group that we are in, so what limits that holds for all of it. In version 2 a
group that is divided has no processes itself: we move into a part of it, and it must be ours alone,
such as one that systemd delegated, or the whole machine's. In version 1 only root may make groups.
Programs that make a cgroup namespace of their own see no more than the group they are in, and so do
not reach their limits.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from testbed.labs.base import LabError, Limits
from testbed.labs.owner import owner_lives, owner_mark

ENV_GROUPS = "NETSENSE_CGROUPS"
"""In which groups a lab makes those of its hosts, as ``encode_groups`` writes it."""

_PREFIX = "netsense-"
_PROGRAMS, _DIVIDED = "programs", "cgroup.subtree_control"


@contextmanager
def groups_of_run(controllers: Collection[str]) -> Iterator[Mapping[str, Path]]:
    """Groups in which labs can limit their hosts, by controller ("memory" or "pids"); raises
    LabError with the mend.

    What runs that were killed have left is removed first. Without controllers nothing is touched.
    """
    if not controllers:
        yield {}
        return
    together: dict[Path, list[str]] = defaultdict(list)
    with ExitStack() as stack:
        try:
            clean(dry_run=False)
            for controller in sorted(controllers):
                together[_group_of_this_process(controller)].append(controller)
            made = {
                above: stack.enter_context(_group_in(above, these))
                for above, these in together.items()
            }
        except OSError as error:
            raise LabError(
                f"limits: no control group can be made ({error.strerror}); {_how_to_fix()}"
            ) from None
        yield {controller: made[above] for above, these in together.items() for controller in these}


def host_groups(within: Mapping[str, Path], host: str, limits: Limits) -> list[Path]:
    """Make the groups of a host, which its programs have to enter. within: from ``groups_of_run``.
    Raises OSError."""
    groups = []
    for controller, limit in limits.by_controller.items():
        group = within[controller] / f"host-{host}"
        (group / _PROGRAMS).mkdir(parents=True, exist_ok=True)
        groups.append(group)
        if controller == "pids":
            (group / "pids.max").write_text(str(limit))
            continue
        # Swap would let a host take more, and crawl instead of failing. Not every kernel accounts
        # for it.
        second = [("memory.max", limit), ("memory.swap.max", 0), ("memory.oom.group", 1)]
        first = [("memory.limit_in_bytes", limit), ("memory.memsw.limit_in_bytes", limit)]
        for file, value in second if (group / "memory.max").exists() else first:
            if (group / file).exists():
                (group / file).write_text(str(value))
    return list(dict.fromkeys(groups))


def enter_host_group(group: str) -> None:
    """Move this process into the group of a host; what it starts from then on is in it, too."""
    _enter(Path(group, _PROGRAMS))


def remove_group(group: Path) -> bool:
    """Remove a group and those in it; False where processes are left in it, or it is somebody
    else's."""
    try:
        removed = [remove_group(path) for path in group.iterdir() if path.is_dir()]
        if not all(removed):
            return False
        group.rmdir()
    except FileNotFoundError:
        pass
    except OSError:
        return False
    return True


def clean(dry_run: bool) -> list[str]:
    """Remove the groups of runs whose process is gone; returns what that is. What still has
    processes in it stays."""
    left = []
    for mount, *_ in _mounts():
        for folder, below, _ in os.walk(mount):
            ours = [name for name in below if name.startswith(_PREFIX)]
            below[:] = [name for name in below if name not in ours]
            left += [
                Path(folder, name) for name in ours if not owner_lives(name.removeprefix(_PREFIX))
            ]
    found = [group for group in dict.fromkeys(left) if os.access(group.parent, os.W_OK)]
    return [f"control group {group}" for group in found if dry_run or remove_group(group)]


def encode_groups(groups: Mapping[str, Path]) -> str:
    """Text for ``ENV_GROUPS``."""
    return "\n".join(f"{controller}={path}" for controller, path in groups.items())


def inherited_groups() -> Mapping[str, Path]:
    """What ``ENV_GROUPS`` has; nothing where it is not set."""
    lines = (line.partition("=") for line in os.environ.get(ENV_GROUPS, "").splitlines())
    return {controller: Path(path) for controller, _, path in lines}


def _group_of_this_process(controller: str) -> Path:
    """Where it can be limited; raises LabError if the kernel does not offer that."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, names, path = line.split(":", 2)
        for mount, root, options in _mounts():
            if ".." in Path(root).parts:
                continue  # of another cgroup namespace, outside ours
            if (
                number == "0"
                if options is None
                else controller in names.split(",") and controller in options
            ):
                group = mount / os.path.relpath(path, root)
                if (
                    options is not None
                    or controller in (group / "cgroup.controllers").read_text().split()
                ):
                    return group
    raise LabError(
        f"limits: this machine offers no control group to limit {controller} by; {_how_to_fix()}"
    )


def _mounts() -> list[tuple[Path, str, Sequence[str] | None]]:
    """(where, which group that is, controllers and other options, or None for version 2) of all
    hierarchies; see proc(5)."""
    found: list[tuple[Path, str, Sequence[str] | None]] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, file_system = line.partition(" - ")
        _, _, _, root, mount, *_ = place.split()
        kind, _, options = file_system.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            found.append((Path(mount), root, None if kind == "cgroup2" else options.split(",")))
    return found


@contextmanager
def _group_in(above: Path, controllers: Sequence[str]) -> Iterator[Path]:
    group = above / f"{_PREFIX}{owner_mark()}"
    group.mkdir()
    second = (above / _DIVIDED).exists()
    found = (above / _DIVIDED).read_text().split() if second else []
    try:
        if second:
            (group / "self").mkdir()
            _enter(group / "self")
            for divided in (above, group):
                (divided / _DIVIDED).write_text(" ".join(f"+{one}" for one in controllers))
        yield group
    finally:
        if second:
            _leave(group, above, controllers, [one for one in controllers if one not in found])
        remove_group(group)


def _leave(group: Path, above: Path, controllers: Sequence[str], added: Sequence[str]) -> None:
    """Go back into the group above, which must not be divided then, unless it is the whole
    machine's.

    added: the controllers by which we have divided it.
    """
    for host in group.glob("host-*"):
        remove_group(host)
    with contextlib.suppress(OSError):
        (group / _DIVIDED).write_text(" ".join(f"-{one}" for one in controllers))
        if added and (above / "cgroup.type").exists():
            (above / _DIVIDED).write_text(" ".join(f"-{one}" for one in added))
    with contextlib.suppress(OSError):
        _enter(above)


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text("0")


def _how_to_fix() -> str:
    if Path("/run/systemd/system").is_dir():
        user = "" if os.geteuid() == 0 else "--user "
        return (
            f"start it with: systemd-run {user}--scope --property=Delegate=yes testbed …, or use"
            " --lab docker"
        )
    return "run it as root of the machine, or use --lab docker"
