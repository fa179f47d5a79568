"""What a worker that means harm gets done, in each lab: nothing beyond its own directory. The swarm
lab's turn is in tests/swarm."""

import json
import shutil
import socket
import tempfile
from pathlib import Path

import psutil
import pytest
from test_faults_netns import finished, launch, only_run, run, script
from test_run_netns import no_control_groups

import testbed
from testbed.labs.cgroups import clean

pytestmark = pytest.mark.shared

RUNS = Path(__file__).parents[2] / "runs"

ATTACKS = """
import contextlib, ctypes, glob, ipaddress, itertools, re, signal, socket, stat, subprocess
from pyroute2 import IPRoute

run, output = cell.parents[1], Path(os.environ["NETSENSE_OUTPUT_DIR"])
said = {}

def attempt(name, act):
    try:
        said[name] = act()
    except Exception as error:
        said[name] = type(error).__name__

def write(path):
    Path(path).write_text("x")
    return "done"

def set_rate():
    with IPRoute() as route:
        index = next(link["index"] for link in route.get_links() if link.get_attr("IFLA_IFNAME") != "lo")
        route.tc("del", "htb", index, 0x10000)
    return "done"

def above():  # a user namespace has all capabilities in it, and so might undo what is read-only
    libc = ctypes.CDLL(None, use_errno=True)
    if os.fork() == 0:
        made = libc.unshare(0x10000000 | 0x00020000)
        undone = 0
        for place in (b"/", str(run).encode(), str(cell).encode()):
            undone += libc.mount(None, place, None, ctypes.c_ulong(32 | 4096), None) == 0
            undone += libc.umount2(place, 2) == 0
        for path in (cell / "planted", run / "planted", Path("/planted")):
            try:
                path.write_text("x")
                undone += 1
            except OSError:
                pass
        os._exit(10 * (made != 0) + undone)
    return os.waitstatus_to_exitcode(os.wait()[1])

def everywhere(act):  # what is not refused of sockets, pipes and devices of the machine
    found = []
    for top, folders, names in itertools.chain(os.walk("/dev"), os.walk("/run"), os.walk("SPEC_DIRECTORY")):
        folders[:] = [folder for folder in folders if folder != "shm"]
        for path in (Path(top, name) for name in names):
            if not path.is_symlink() and path != cell / "control.sock" and act(path):
                found.append(str(path))
    return found

def reached(path):
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
        if stat.S_ISSOCK(mode):
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect(str(path))
            return True
        return (stat.S_ISBLK(mode) or stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)) and path.name not in (
            "null", "zero", "full", "random", "urandom")
    return False

def tokens_in_memory():  # of others: 32 hexadecimal digits after the name of the variable
    found = set()
    with open("/proc/self/mem", "rb") as memory:
        for line in Path("/proc/self/maps").read_text().splitlines():
            words = line.split()
            if words[1].startswith("rw") and (len(words) < 6 or words[5] in ("[heap]", "[stack]")):
                begin, end = (int(word, 16) for word in words[0].split("-"))
                memory.seek(begin)
                with contextlib.suppress(OSError):
                    found |= set(re.findall(rb"NETSENSE_TOKEN(?:=|.{1,6})([0-9a-f]{32})", memory.read(end - begin)))
    return len(found - {os.environ["NETSENSE_TOKEN"].encode()})

def others():
    own = os.environ["NETSENSE_TOKEN"].encode()
    seen = []
    for environ in glob.glob("/proc/[0-9]*/environ"):
        try:
            words = dict(word.split(b"=", 1) for word in Path(environ).read_bytes().split(b"\\0") if b"=" in word)
        except OSError:
            continue
        seen += [1] if words.get(b"NETSENSE_TOKEN", own) != own else []
    return len(seen)

def outlive():
    subprocess.Popen(["sleep", "61.25"], start_new_session=True)
    return "done"

def machine_reached():  # something listens on all of its addresses
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((os.environ["MASTER_ADDR"], 9))
        own = way.getsockname()[0]
    firsts = {str(ipaddress.ip_network(f"{own}/{bits}", strict=False)[1]) for bits in (16, 20, 24)}
    found = []
    for address in {*firsts, *MACHINE_ADDRESSES}:
        with socket.socket() as to:
            to.settimeout(2)
            if to.connect_ex((address, MACHINE_PORT)) == 0:
                found.append(address)
    return found

if rank == 1:
    attempt("machine by network", machine_reached)
    attempt("own link", set_rate)
    attempt("sockets", lambda: [path.name for path in run.rglob("*.sock")])
    attempt("files", lambda: sorted(str(path.relative_to(run)) for path in run.rglob("*") if "tmp" not in path.parts
                                     and (not SWARM or os.access(path, os.R_OK))))
    for path in (cell / "x", run / "x", cell / "hosts/w0/steps.jsonl", cell / "links.jsonl", "x", "/x", "SPEC_DIRECTORY/x",
                 netsenseml.__file__):
        attempt(f"write {path}", lambda path=path: write(path))
    attempt("above", above)
    attempt("machine", lambda: everywhere(reached))
    attempt("tokens", tokens_in_memory)
    attempt("inherited", lambda: [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)])
    attempt("init", lambda: [os.open(f"/proc/1/fd/{fd}", os.O_WRONLY) for fd in os.listdir("/proc/1/fd")])
    attempt("memory", lambda: Path("/proc/self/oom_score_adj").read_text().strip())
    attempt("others", others)
    attempt("processes", lambda: len([name for name in os.listdir("/proc") if name.isdigit()]))
    attempt("outlive", outlive)
    attempt("temporary", lambda: write(__import__("tempfile").mkstemp()[1]))
    attempt("shared memory", lambda: write("/dev/shm/x"))
    own = ("CapPrm", "CapEff", "CapAmb", "NoNewPrivs")
    for name, status in {"own": Path("/proc/self/status").read_text,
                         "others": lambda: subprocess.check_output(["cat", "/proc/self/status"], text=True)}.items():
        attempt(f"capabilities {name}", lambda: [line.split()[1] for line in status().splitlines() if line.startswith(own)])
    # What it may write: its own directory. Rows that are not its own to say count for nothing.
    evaluation = {"step": 1, "t_s": 1.0, "accuracy": 1.0, "loss": 0.0}
    event = {"planned_s": 0, "applied_s": 0, "link": "w0", "state": {}, "kind": "schedule", "verified": True}
    (output / "evals.jsonl").write_text(json.dumps(evaluation) + "\\n")
    (output / "events-x.jsonl").write_text(json.dumps(event) + "\\n")
    (output / "steps.parquet").write_text("x")
    (output / "said.json").write_text(json.dumps(said))

def plant(step):
    if rank == 1 and step == 5:
        with open(output / "steps.jsonl", "a") as file:
            file.write(json.dumps({"rank": 0, "step": 5000, "t_s": 9.0, "step_s": 1e-9}) + "\\n")

train(before=plant)
torch.save(model.state_dict(), output / "model.pt")
done()
"""


GREEDY = """
about = json.loads((cell / "cell.json").read_text())
if about["earlier"]:
    sys.exit("once is enough")
train(steps=3)
if rank == 1 and about["label"] == "greedy":
    held = [b"x" * (1 << 20) for _ in range(2000)]
done()
"""


@pytest.fixture(
    params=[
        pytest.param("netns", marks=pytest.mark.netns),
        pytest.param("docker", marks=pytest.mark.docker),
    ]
)
def place(request, tmp_path):
    """A lab, and a directory that its hosts can be shown."""
    if request.param == "netns":
        yield request.param, tmp_path
        return
    directory = Path(tempfile.mkdtemp(prefix="test-", dir=RUNS))
    yield request.param, directory
    shutil.rmtree(directory)


def test_a_worker_has_its_own_directory_and_nothing_else(place):
    attack(*place)


def attack(lab, directory, prefix=()):
    """Run the attacks in a lab; none may succeed. prefix: of the command that runs it."""
    # In a swarm what else a node's agent keeps is closed by its mode, and so its names are seen.
    attacks = ATTACKS.replace("SPEC_DIRECTORY", str(directory))
    attacks = attacks.replace("SWARM", str(lab == "swarm"))
    with socket.create_server(("0.0.0.0", 0)) as server:
        own = psutil.net_if_addrs().values()
        addresses = [one.address for each in own for one in each if one.family == socket.AF_INET]
        attacks = attacks.replace("MACHINE_PORT", str(server.getsockname()[1]))
        attacks = attacks.replace("MACHINE_ADDRESSES", repr(addresses))
        attacks = script(directory, attacks)
        _, out = finished(launch(directory, prefix=prefix, lab=lab, script=attacks))
    assert "done, 20 steps" in out
    cell = next((only_run(directory) / "cells").iterdir())
    said = json.loads((cell / "hosts" / "w1" / "said.json").read_text())
    refused = {"OSError", "PermissionError", "FileNotFoundError", "NetlinkError"}
    assert said["machine by network"] == []
    assert said.pop("own link") in refused
    assert {
        name: what
        for name, what in said.items()
        if name.startswith("write ") and what not in refused
    } == {}
    assert said["above"] in (0, 10)  # 10: there is no such thing to be had
    assert [
        path for path in said["machine"] if lab == "netns" or not path.startswith("/dev/")
    ] == []  # Docker makes its own /dev
    assert said["tokens"] == 0
    assert lab != "netns" or (
        said["inherited"][0] == "/dev/null" and said["init"] == "PermissionError"
    )
    assert said["memory"] == "500"  # it is the first to go
    assert said["others"] == 0 and said["processes"] <= 5
    # where nobody listens
    assert [name for name in said["sockets"] if not name.startswith(".hosts-")] == ["control.sock"]
    name = f"cells/{cell.name}"
    seen = {"cells", name, "script", "script/train.py"}
    seen |= {
        f"{name}/{what}"
        for what in (
            "cell.json",
            "control.sock",
            "shared",
            "hosts",
            "hosts/w1",
            "hosts/w1/steps.jsonl",
        )
    }
    if lab == "swarm":
        seen |= {f"{name}/logs", f"{name}/hosts/w0"}
    assert {
        name for name in said["files"] if not name.startswith((".hosts-", "script/__pycache__"))
    } <= seen
    assert said["outlive"] == said["temporary"] == said["shared memory"] == "done"
    assert (
        said["capabilities own"] == said["capabilities others"] == [*["0000000000000000"] * 3, "1"]
    )
    for rank in (0, 1):
        assert (cell / "hosts" / f"w{rank}" / "model.pt").stat().st_size > 1000
    assert not [
        one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "61.25"]
    ]
    # What it says of others counts for nothing.
    loaded = testbed.load_run(only_run(directory))
    assert loaded.steps["step"].max() == 19 and set(loaded.steps["rank"]) == {0, 1}
    assert loaded.evals.empty
    assert set(loaded.events["kind"]) == {"initial"}


def test_a_worker_that_takes_more_memory_than_it_may_is_named_and_other_cells_go_on(place):
    lab, directory = place
    if lab == "netns" and (reason := no_control_groups()):
        pytest.skip(reason)
    methods = [{"name": "allreduce", "label": label} for label in ("greedy", "modest")]
    code, out = run(
        directory,
        lab=lab,
        script=script(directory, GREEDY),
        methods=methods,
        limits={"memory": "900MiB"},
    )
    assert code == 1
    assert (
        "w1 was ended by signal 9, out of memory (limits.memory is 900MiB), before it was done"
        in " ".join(out.split())
    )
    status = testbed.load_run(only_run(directory)).cells.set_index("method")["status"]
    assert status.to_dict() == {"greedy": "failed", "modest": "done"}
    assert clean(dry_run=True) == []
