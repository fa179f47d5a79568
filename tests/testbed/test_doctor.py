"""The mend that fits the system; recognising systems. What a real machine says is in
tests/integration."""

import io

import pytest
from rich.console import Console

from testbed.doctor import Finding, System, qdiscs, user_namespaces_fix
from testbed.report.terminal import doctor_table

pytestmark = pytest.mark.fast

NO_LINE = Finding(
    "delay line", "limited", "/dev/net/tun may not be opened", "sudo chmod 666 /dev/net/tun"
)
DEBIAN = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\nID=debian\n'
UBUNTU = 'PRETTY_NAME="Ubuntu 24.04.1 LTS"\nID=ubuntu\nID_LIKE=debian\n'
FEDORA = 'NAME="Fedora Linux"\nID=fedora\nPRETTY_NAME="Fedora Linux 41 (Workstation Edition)"\n'
ROCKY = 'PRETTY_NAME="Rocky Linux 9.4 (Blue Onyx)"\nID="rocky"\nID_LIKE="rhel centos fedora"\n'
LINUX = "Linux version 6.8.0-45-generic (buildd@host) (gcc 13.2.0) #45-Ubuntu SMP\n"
WSL = "Linux version 5.15.153.1-microsoft-standard-WSL2 (root@host) (gcc 11.2.0) #1 SMP\n"


def system(os_release=DEBIAN, version=LINUX, *, container="", modules=True, root=False):
    return System.recognised(os_release, version, container=container, modules=modules, root=root)


@pytest.mark.parametrize(
    ("text", "family"),
    [(DEBIAN, "debian"), (UBUNTU, "ubuntu"), (FEDORA, "fedora"), (ROCKY, "fedora"), ("", "")],
)
def test_systems_are_recognised_by_their_relatives(text, family):
    assert system(text).family == family


def test_wsl_and_the_kernel_are_recognised():
    assert system(version=WSL).wsl
    assert not system().wsl
    assert system().kernel == "6.8.0-45-generic"


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (system(), "sudo modprobe sch_netem"),
        (system(root=True), "modprobe sch_netem"),
        (
            system(UBUNTU),
            "sudo apt-get install linux-modules-extra-6.8.0-45-generic && sudo modprobe sch_netem",
        ),
        (system(FEDORA), "sudo dnf install kernel-modules-extra && sudo modprobe sch_netem"),
        (system(version=WSL), "CONFIG_NET_SCH_NETEM=y"),
        (system(container="docker"), "on the host, whose kernel this is: sudo modprobe sch_netem"),
        (system(modules=False), "modprobe sch_netem cannot help"),
    ],
)
def test_missing_netem_has_the_mend_of_the_system_and_a_way_to_go_on(here, words):
    (netem,) = (finding for finding in qdiscs(here, ["netem"], NO_LINE) if finding.verdict != "ok")
    assert (netem.name, netem.verdict) == ("netem", "missing")
    assert words in netem.fix


def test_where_the_delay_line_stands_in_for_netem_nothing_is_missing():
    (netem,) = (
        finding
        for finding in qdiscs(system(), ["netem"], Finding("delay line", "ok", ""))
        if finding.name == "netem"
    )
    assert netem.verdict == "ok" and not netem.fix
    assert "this kernel has none" in netem.found and "delay line" in netem.found


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("netem", "The kernel's netem makes"),
        ("userspace", "The delay line, a program, makes"),
        (None, "cannot be had"),
    ],
)
def test_the_last_line_says_what_makes_delays(engine, words):
    console = Console(file=io.StringIO(), width=200)
    console.print(
        doctor_table({"labs": {"netns": True, "docker": False}, "engine": engine, "findings": []})
    )
    last = console.file.getvalue().splitlines()[-1]
    assert last.startswith("Experiments can run here, with --lab netns.") and words in last


@pytest.mark.parametrize(
    ("here", "settings", "unshare", "words"),
    [
        (system(), {}, False, "sudo apt-get install util-linux"),
        (system(FEDORA), {}, False, "sudo dnf install util-linux"),
        (system(container="docker"), {}, True, "--security-opt systempaths=unconfined"),
        (
            system(UBUNTU),
            {"kernel.apparmor_restrict_unprivileged_userns": "1"},
            True,
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        (
            system(),
            {"kernel.unprivileged_userns_clone": "0"},
            True,
            "sudo sysctl -w kernel.unprivileged_userns_clone=1",
        ),
        (
            system(),
            {"user.max_user_namespaces": "0"},
            True,
            "sudo sysctl -w user.max_user_namespaces=10000",
        ),
        (system(), {"user.max_user_namespaces": "63000"}, True, "docker compose up experiment"),
    ],
)
def test_forbidden_user_namespaces_have_the_mend_of_what_forbids_them(
    here, settings, unshare, words
):
    assert words in user_namespaces_fix(here, settings, unshare)


def test_a_kernel_that_could_not_be_asked_is_no_pass():
    (finding,) = qdiscs(system(), None, NO_LINE)
    assert finding.verdict == "limited"
