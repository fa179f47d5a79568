"""First process of the guest that ``uml.py`` boots: mounts, loads modules, runs the command, writes
its exit code, halts."""

import ctypes
import json
import os
import subprocess
import sys
import termios
from pathlib import Path

# What labs are made of. A module that this kernel does not have is named and gone without: the
# tests then say what is missing.
NEEDED = ["bridge", "veth", "ifb", "sch_tbf", "sch_netem", "sch_htb", "sch_prio", "sch_ingress"]
NEEDED += ["sch_codel", "sch_fq_codel", "sch_cake", "tun"]
NEEDED += [
    "cls_u32",
    "cls_flower",
    "cls_matchall",
    "act_mirred",
    "tcp_bbr",
    "inet_diag",
    "tcp_diag",
]
_MS_NOSUID = 2
_HALT = 0xCDEF0123  # LINUX_REBOOT_CMD_HALT
_libc = ctypes.CDLL(None, use_errno=True)


def mount(kind: str, target: str, data: str = "") -> None:
    if _libc.mount(b"none", target.encode(), kind.encode(), _MS_NOSUID, data.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"cannot mount {kind} on {target}")


def load_modules(modules: str, path: str) -> None:
    # modprobe looks in lib/modules or usr/lib/modules below the directory it is given, depending on
    # its version.
    root = Path("/run/modules")
    (root / "usr/lib").mkdir(parents=True)
    (root / "usr/lib/modules").symlink_to(modules)
    (root / "lib").symlink_to("usr/lib")
    done = subprocess.run(
        ["modprobe", "--all", "--dirname", str(root), *NEEDED],
        capture_output=True,
        text=True,
        env={"PATH": path},
        check=False,
    )
    sys.stdout.write(done.stderr)


def main(job_file: str) -> None:
    mount("proc", "/proc")
    mount("sysfs", "/sys")
    mount("cgroup2", "/sys/fs/cgroup")
    mount("tmpfs", "/run")
    for directory in ("/dev/shm", "/run/out", "/run/tmp"):
        Path(directory).mkdir(exist_ok=True)
    mount("tmpfs", "/dev/shm")
    job = json.loads(Path(job_file).read_text())
    mount("hostfs", "/run/out", job["out"])
    load_modules(job["modules"], job["environment"]["PATH"])
    console = termios.tcgetattr(1)
    console[1] &= ~termios.OPOST  # lines end in \n alone
    termios.tcsetattr(1, termios.TCSANOW, console)
    # When the machine has stalled, qdiscs release more at once than the 1000 packets that a
    # processor takes in by default.
    Path("/proc/sys/net/core/netdev_max_backlog").write_text("1000000")
    sys.stdout.write(job["begin"])
    sys.stdout.flush()
    try:
        code = subprocess.run(
            job["argv"], env=job["environment"], cwd=job["cwd"], check=False
        ).returncode
    except OSError as error:
        print(f"cannot run {job['argv'][0]}: {error.strerror}")
        code = 127
    sys.stdout.write(job["end"])
    sys.stdout.flush()
    Path("/run/out/status").write_text(str(code if code >= 0 else 128 - code))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    finally:
        os.sync()
        _libc.reboot(_HALT)
