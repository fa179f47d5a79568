"""``testbed doctor``: what this machine can do, and the exact command that mends what it cannot.

The kernel and the daemons are asked, not their configuration files: what answers, works.
"""

import contextlib
import os
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from testbed import gpus
from testbed.children import module_command
from testbed.labs.base import HostFailed, LabError
from testbed.labs.capabilities import CAPABILITIES, lacking_capabilities
from testbed.labs.cgroups import groups_of_run
from testbed.labs.netns import sandbox_command, why_it_failed

if TYPE_CHECKING:
    from docker import DockerClient

Verdict = Literal["ok", "limited", "missing"]
KERNEL_KINDS = ("htb", "tbf", "netem", "codel", "fq_codel", "cake", "veth", "bridge")
NEEDED = frozenset({"htb", "tbf", "veth", "bridge"})
"""Of these, what no lab can do without."""
MOST_WORKERS = 64
LATE_SLEEP_S = 0.005
_SLEEPS, _SLEEP_S = 200, 0.001
_ROOTLESS_CONTAINER = "docker run " + " ".join(
    f"--security-opt {name}=unconfined" for name in ("apparmor", "seccomp", "systempaths")
)
"""Namespaces of one's own and a /proc in them; no capability is needed."""
_COMPOSE = "docker compose up experiment"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. fix: the command, or the way, to make it better; empty if
    there is nothing to fix."""

    name: str
    verdict: Verdict
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class System:
    """What kind of machine this is, as far as the fix depends on it.

    family: "debian", "ubuntu", "fedora" or "" for any other. container: its kind, or "" if this is
    none.
    modules: whether modules of the running kernel are installed here. root: whether commands need
    no sudo.
    """

    name: str
    family: str
    kernel: str
    wsl: bool = False
    container: str = ""
    modules: bool = True
    root: bool = False

    @classmethod
    def recognised(
        cls, os_release: str, proc_version: str, *, container: str, modules: bool, root: bool
    ) -> "System":
        """From the texts of /etc/os-release and /proc/version."""
        fields = dict(re.findall(r'^(\w+)="?(.*?)"?$', os_release, re.MULTILINE))
        relatives = [fields.get("ID", ""), *fields.get("ID_LIKE", "").split()]
        families = {"ubuntu": "ubuntu", "debian": "debian", "fedora": "fedora", "rhel": "fedora"}
        return cls(
            name=fields.get("PRETTY_NAME", "an unknown Linux"),
            family=next((families[name] for name in relatives if name in families), ""),
            kernel=proc_version.split()[2] if len(proc_version.split()) > 2 else "",
            wsl="microsoft" in proc_version.lower(),
            container=container,
            modules=modules,
            root=root,
        )

    @classmethod
    def of_this_machine(cls) -> "System":
        return cls.recognised(
            _read("/etc/os-release"),
            _read("/proc/version"),
            container=_container(),
            modules=Path("/lib/modules", platform.release(), "kernel").is_dir(),
            root=os.geteuid() == 0,
        )

    def command(self, text: str) -> str:
        """A command for root, as this user has to type it."""
        return text if self.root else f"sudo {text}"

    def install(self, debian: str, fedora: str = "") -> str:
        """The command that installs a package."""
        return self.command(
            f"dnf install {fedora or debian}"
            if self.family == "fedora"
            else f"apt-get install {debian}"
        )

    def load_module(self, module: str) -> str:
        """How to get a module of the kernel."""
        if self.container:
            return f"on the host, whose kernel this is: sudo modprobe {module}"
        load = self.command(f"modprobe {module}")
        if self.wsl:
            option = f"CONFIG_NET_{module.upper()}"
            return (
                f"wsl --update (in Windows), then: {load}; if that kernel has no such module, build"
                f" WSL2-Linux-Kernel with {option}=y and name it in .wslconfig under [wsl2] as"
                " kernel="
            )
        if not self.modules and self.family != "ubuntu":
            return (
                f"use a machine or a VM with the kernel of its distribution ({load} cannot help:"
                " this kernel has no modules)"
            )
        if self.family == "ubuntu":
            return f"{self.install(f'linux-modules-extra-{self.kernel}')} && {load}"
        if self.family == "fedora":
            return f"{self.install('kernel-modules-extra')} && {load}"
        return load


def examine() -> dict[str, Any]:
    """Look at everything: {"system": …, "labs": {name: works}, "findings": [{"name", "verdict",
    "found", "fix"}]}."""
    system = System.of_this_machine()
    netns, missing = netns_lab(system)
    docker = docker_lab(system)
    swarm = swarm_lab()
    findings = [
        *machine(system),
        *qdiscs(system, missing, line := delay_line(system)),
        line,
        netns,
        limits(),
        control_groups(),
        *docker,
        *swarm,
        capabilities(system),
        congestion_controls(),
        timers(),
        pressure(system),
        *packages(),
        user_mode_linux(system),
    ]
    absent = set(missing or ())
    labs = {
        "netns": netns.verdict == "ok" and not absent & NEEDED,
        "docker": docker[0].verdict == "ok" and not absent & {"htb", "tbf"},
        "swarm": swarm[0].verdict == "ok",
    }
    engine = (
        "netem"
        if missing is not None and "netem" not in missing
        else "userspace"
        if line.verdict == "ok"
        else None
    )
    found = [asdict(finding) for finding in findings]
    return {"system": asdict(system), "labs": labs, "engine": engine, "findings": found}


def machine(system: System) -> list[Finding]:
    """The system, its cores, its memory, and its GPUs if it has any."""
    place = (
        f" in a {system.container} container"
        if system.container
        else ", under WSL2"
        if system.wsl
        else ""
    )
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    gib = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    return [
        Finding("system", "ok", f"{system.name}, Linux {system.kernel}{place}"),
        (
            Finding("cores", "ok", str(cores))
            if cores > 1
            else Finding(
                "cores",
                "limited",
                "1",
                "use 2 or more: the testbed itself must be on time while the workers compute",
            )
        ),
        (
            Finding("memory", "ok", gib)
            if memory.available > 2 * 2**30
            else Finding(
                "memory",
                "limited",
                gib,
                "end other programs, or use fewer workers: each takes 100 to 300 MiB",
            )
        ),
        *([Finding("GPUs", "ok", ", ".join(names))] if (names := gpus.found()) else []),
    ]


def netns_lab(system: System) -> tuple[Finding, list[str] | None]:
    """Whether rootless labs work; and which of ``KERNEL_KINDS`` the kernel lacks, None if it could
    not be asked."""
    try:
        prefix = sandbox_command()
    except LabError as error:
        reason = str(error).partition(";")[0]
        settings = {
            name: _read(f"/proc/sys/{name.replace('.', '/')}").strip()
            for name in _USER_NAMESPACE_SETTINGS
        }
        fix = user_namespaces_fix(system, settings, shutil.which("unshare") is not None)
        return Finding("lab netns", "missing", reason, fix), _missing_here()
    command = [*prefix, *module_command("testbed.links.kernel_support", *KERNEL_KINDS)]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode != 0:
        reason = f"no network namespace can be made: {why_it_failed(done)}"
        return Finding("lab netns", "missing", reason, f"use Docker: {_COMPOSE}"), None
    return (
        Finding(
            "lab netns",
            "ok",
            "private namespaces can be made" + ("" if system.root else " without root"),
        ),
        done.stdout.split(),
    )


def _missing_here() -> list[str] | None:
    from testbed.links.kernel_support import missing_kinds

    try:
        return missing_kinds(KERNEL_KINDS)
    except OSError:
        return None


_USER_NAMESPACE_SETTINGS: Mapping[str, str] = {
    "kernel.apparmor_restrict_unprivileged_userns": "1",
    "kernel.unprivileged_userns_clone": "0",
    "user.max_user_namespaces": "0",
}
"""Kernel settings that forbid user namespaces, with the value that does."""


def user_namespaces_fix(system: System, settings: Mapping[str, str], unshare: bool) -> str:
    """How to allow rootless namespaces. settings: values of ``_USER_NAMESPACE_SETTINGS`` here;
    unshare: if it is installed."""
    if not unshare:
        return system.install("util-linux")
    if system.container:
        return f"start the container with: {_ROOTLESS_CONTAINER} …; or on the host: {_COMPOSE}"
    for name, forbidding in _USER_NAMESPACE_SETTINGS.items():
        if settings.get(name) == forbidding:
            allowed = {"0": "1", "1": "0"}[forbidding] if name.startswith("kernel.") else "10000"
            return system.command(f"sysctl -w {name}={allowed}")
    return f"run testbed with sudo, or use Docker: {_COMPOSE}"


def delay_line(system: System) -> Finding:
    """Whether a program can stand in for netem."""
    name = "delay line"
    try:
        prefix = sandbox_command()
    except LabError:
        return Finding(
            name, "limited", "cannot be tried without a network namespace", "fix lab netns first"
        )
    command = [*prefix, *module_command("testbed.links.tap")]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode == 0:
        return Finding(name, "ok", "makes delay, jitter and loss where the kernel has no netem")
    reason, _, fix = why_it_failed(done).partition("; ")
    if system.container:
        fix = "start the container with: docker run --device /dev/net/tun …"
    return Finding(name, "limited", reason, fix)


def limits() -> Finding:
    """What all namespaces of a machine share, and 64 workers need."""
    processes = 8 * MOST_WORKERS  # threads of a worker
    needs = {
        "open files (ulimit -n)": (resource.getrlimit(resource.RLIMIT_NOFILE)[0], 8 * MOST_WORKERS),
        "user.max_net_namespaces": (_number("/proc/sys/user/max_net_namespaces"), MOST_WORKERS + 8),
        "kernel.threads-max": (_number("/proc/sys/kernel/threads-max"), processes),
        "kernel.pid_max": (_number("/proc/sys/kernel/pid_max"), processes),
        # Pages of all sockets' buffers; each of 64 x 63 connections has at least 64 KiB at its two
        # ends.
        "net.ipv4.tcp_mem, the third": (
            _number("/proc/sys/net/ipv4/tcp_mem", 2),
            MOST_WORKERS**2 * 16,
        ),
    }
    short = {
        name: (has, need)
        for name, (has, need) in needs.items()
        if has is not None and 0 <= has < need
    }
    if not short:
        return Finding("limits", "ok", f"{MOST_WORKERS} workers fit")
    found = ", ".join(
        f"{name} is {has} and should be {need}" for name, (has, need) in short.items()
    )
    return Finding(
        "limits",
        "limited",
        f"{found}, for {MOST_WORKERS} workers",
        "raise them, or use fewer workers",
    )


def control_groups() -> Finding:
    """Whether workers of the netns lab can be limited, as a spec's ``limits`` asks for."""
    name = "limits of workers"
    try:
        with groups_of_run(("memory", "pids")):
            return Finding(
                name, "ok", "memory and processes, by control groups (limits: in a spec)"
            )
    except LabError as error:
        reason, _, fix = str(error).removeprefix("limits: ").partition("; ")
        return Finding(name, "limited", f"{reason}; only specs with limits: need it", fix)


def _number(path: str, position: int = 0) -> int | None:
    words = _read(path).split()
    return int(words[position]) if len(words) > position else None


def qdiscs(system: System, missing: Sequence[str] | None, line: Finding) -> list[Finding]:
    """What the kernel offers to make and shape links. line: what is known of the delay line."""
    if missing is None:
        return [
            Finding(
                "kernel",
                "limited",
                "cannot be asked without a network namespace",
                "fix lab netns first",
            )
        ]
    needed = {
        "htb": ("limits rates", "sch_htb"),
        "tbf": ("cuts packets into frames", "sch_tbf"),
        "codel": ("manages queues (aqm: codel)", "sch_codel"),
        "fq_codel": ("manages queues (aqm: fq_codel)", "sch_fq_codel"),
        "cake": ("manages queues (aqm: cake)", "sch_cake"),
        "netem": ("makes delay, jitter and loss", "sch_netem"),
        "veth": ("makes veth pairs", "veth"),
        "bridge": ("makes switches", "bridge"),
    }
    findings = []
    for name, (purpose, module) in needed.items():
        if name not in missing:
            findings.append(Finding(name, "ok", purpose))
            continue
        if name == "netem" and line.verdict == "ok":
            findings.append(
                Finding(
                    name, "ok", f"this kernel has none, and the delay line {purpose} in its place"
                )
            )
            continue
        verdict: Verdict = "missing" if name in NEEDED | {"netem"} else "limited"
        findings.append(
            Finding(
                name, verdict, f"this kernel has none; it {purpose}", system.load_module(module)
            )
        )
    return findings


def docker_lab(system: System) -> list[Finding]:
    """Daemon, image, Compose; the first finding says whether Docker labs work, from here or by
    Compose."""
    from testbed.labs import docker

    try:
        with docker.docker_errors(), contextlib.closing(docker.connect()) as client:
            findings = [Finding("Docker", "ok", f"server {client.version()['Version']}")]
            findings += docker_gpus(gpus.found(), client.info())
            findings.append(_image(client))
    except LabError as error:
        reason, _, fix = str(error).partition("; ")
        if reason.startswith("no Docker daemon answers ("):
            if system.container:
                fix = (
                    "give the container the daemon's socket: docker run -v"
                    " /var/run/docker.sock:/var/run/docker.sock …"
                )
            else:
                start = (
                    "systemctl start docker"
                    if shutil.which("systemctl")
                    else "service docker start"
                )
                fix = (
                    system.command(start)
                    if shutil.which("dockerd")
                    else system.install("docker.io", "moby-engine")
                )
        return [Finding("lab docker", "missing", reason, fix)]
    compose = _output(["docker", "compose", "version", "--short"]) if shutil.which("docker") else ""
    if compose:
        findings.append(Finding("Compose", "ok", compose))
    else:
        # Docker's own repository has it under the first name, Fedora and Debian from 13 on under
        # the second.
        fix = (
            f"{system.install('docker-compose-plugin', 'docker-compose')} (or docker-compose;"
            " version 2 is needed)"
        )
        findings.append(
            Finding("Compose", "missing", "the command docker compose does not answer", fix)
        )
    faults = [
        finding.found for finding in findings if finding.name == "image" and finding.verdict != "ok"
    ]
    if not compose and lacking_capabilities():
        faults.append("neither Compose nor the rights to shape containers from here")
    if system.container and _read("/proc/2/comm").strip() != "kthreadd":
        faults.append("this container does not see the processes of its host")
    if faults:
        return [
            Finding("lab docker", "missing", "; ".join(faults), f"on the host: {_COMPOSE}"),
            *findings,
        ]
    return [
        Finding(
            "lab docker", "ok", "with --lab docker" if not lacking_capabilities() else _COMPOSE
        ),
        *findings,
    ]


def _image(client: "DockerClient") -> Finding:
    """Whether the daemon has the image of the hosts."""
    from testbed.labs import docker

    image = os.environ.get(docker.ENV_IMAGE, docker.DEFAULT_IMAGE)
    try:
        docker.require_image(client, image)
        return Finding("image", "ok", image)
    except LabError as error:
        return Finding("image", "missing", *str(error).split("; ", 1))


def docker_gpus(names: list[str], daemon: Mapping[str, Any]) -> list[Finding]:
    """Whether containers get the machine's GPUs, if it has any. daemon: what the Docker daemon
    tells of itself."""
    if not names:
        return []
    if gpus.reach_containers(names, daemon):
        return [Finding("GPUs in Docker", "ok", "NVIDIA's runtime")]
    fix = f"install nvidia-container-toolkit, then: {gpus.TOOLKIT}"
    return [Finding("GPUs in Docker", "limited", "the daemon has no runtime of NVIDIA's", fix)]


def swarm_lab() -> list[Finding]:
    """Whether labs over the nodes of a swarm work, which is tried, for some seconds; and which
    nodes are away."""
    from testbed.labs import docker, swarm

    try:
        with docker.docker_errors(), contextlib.closing(docker.connect()) as client:
            swarm.require_manager(client)
            away = swarm.nodes_away(client)
            found = Finding("lab swarm", "ok", f"with --lab swarm, on {', '.join(swarm.try_out())}")
    except (LabError, HostFailed) as error:
        reason, _, fix = str(error).partition("; ")
        return [Finding("lab swarm", "missing", reason, fix)]
    fix = (
        "start Docker there, open tcp 2377 and 7946, udp 7946 and 4789; docker node update"
        " --availability active NODE"
    )
    return [
        found,
        *(Finding(f"node {name}", "missing", state, fix) for name, state in away.items()),
    ]


def capabilities(system: System) -> Finding:
    """Rights of this process; only ``--lab docker`` without Compose needs them."""
    missing = lacking_capabilities()
    if not missing:
        return Finding("capabilities", "ok", ", ".join(f"CAP_{name}" for name in CAPABILITIES))
    names = ", ".join(f"CAP_{name}" for name in missing)
    if system.container:
        flags = " ".join(f"--cap-add {name}" for name in missing)
        return Finding(
            "capabilities",
            "missing",
            f"this container has no {names}",
            f"start it with: docker run {flags} …",
        )
    return Finding(
        "capabilities",
        "limited",
        f"no {names}; only --lab docker needs them",
        f"use: {_COMPOSE}, or sudo",
    )


def congestion_controls() -> Finding:
    """What TCP can use here."""
    available = _read("/proc/sys/net/ipv4/tcp_available_congestion_control").split()
    default = _read("/proc/sys/net/ipv4/tcp_congestion_control").strip()
    return Finding(
        "TCP",
        "ok" if available else "limited",
        f"{', '.join(available) or 'unknown'}; the default is {default or '?'}",
    )


def timers() -> Finding:
    """How late sleeps of 1 ms end; a change of a link comes as late."""
    late_s = []
    for _ in range(_SLEEPS):
        begin_s = time.monotonic()
        time.sleep(_SLEEP_S)
        late_s.append(time.monotonic() - begin_s - _SLEEP_S)
    late_s.sort()
    median, p99 = late_s[_SLEEPS // 2], late_s[_SLEEPS * 99 // 100]
    found = f"a sleep ends {median * 1e3:.2f} ms late, 1 of 100 {p99 * 1e3:.1f} ms or more"
    if p99 <= LATE_SLEEP_S:
        return Finding("timers", "ok", found)
    return Finding(
        "timers",
        "limited",
        found,
        "end other programs, or use a machine with more cores: changes of links come as late",
    )


def pressure(system: System) -> Finding:
    """Whether the kernel tells how long programs had to wait for a processor."""
    try:
        text = Path("/proc/pressure/cpu").read_text()
    except OSError:
        fix = (
            "start the kernel with psi=1"
            if not system.wsl
            else "add kernelCommandLine=psi=1 to .wslconfig under [wsl2]"
        )
        return Finding(
            "CPU pressure",
            "limited",
            "the kernel does not tell; busy hosts are known by their idle time alone",
            fix,
        )
    now = re.search(r"some avg10=([\d.]+)", text)
    return Finding("CPU pressure", "ok", f"{now[1]} % of the last 10 s" if now else "readable")


def packages() -> list[Finding]:
    """Python and the packages that the installed distribution asks for."""
    findings = [Finding("Python", "ok", platform.python_version())]
    try:
        requirements = [
            text
            for text in metadata.requires("netsenseml") or []
            if "extra ==" not in text or 'extra == "testbed"' in text.replace("'", '"')
        ]
    except metadata.PackageNotFoundError:
        return [
            *findings,
            Finding(
                "packages",
                "limited",
                "netsenseml is not installed here",
                "pip install --editable '.[testbed]'",
            ),
        ]
    good: list[str] = []
    bad: list[str] = []
    for text in requirements:
        name, least = re.fullmatch(r"([\w.-]+)(?:>=([\d.]+))?.*", text).groups()  # type: ignore[union-attr]
        try:
            version = metadata.version(name)
            (good if _numbers(version) >= _numbers(least or "0") else bad).append(
                f"{name} {version}"
            )
        except metadata.PackageNotFoundError:
            bad.append(f"{name} (not installed)")
    if good:
        findings.append(Finding("packages", "ok", ", ".join(good)))
    if bad:
        findings.append(
            Finding(
                "packages",
                "missing",
                f"missing or too old: {', '.join(bad)}",
                "pip install --editable '.[testbed]'",
            )
        )
    return findings


def user_mode_linux(system: System) -> Finding:
    """The kernel in which ``make test-netem`` runs."""
    if path := shutil.which("linux.uml"):
        return Finding("User-Mode Linux", "ok", f"{path}; make test-netem")
    fix = (
        system.install("user-mode-linux kmod")
        if system.family in ("debian", "ubuntu")
        else "Debian and Ubuntu package it"
    )
    return Finding(
        "User-Mode Linux", "limited", "not installed; only make test-netem needs it", fix
    )


def _container() -> str:
    # The files that mark a container may also lie in a virtual machine that was made from an image;
    # these mounts do not.
    if not re.search(r" /etc/(hosts|hostname) ", _read("/proc/self/mountinfo")):
        return ""
    marks = {"podman": "/run/.containerenv", "docker": "/.dockerenv"}
    return next((kind for kind, mark in marks.items() if Path(mark).exists()), "OCI")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
