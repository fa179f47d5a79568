"""``torchrun --nnodes 3 --nproc-per-node 2`` with the hook: three machines in namespaces, 50 Mbit/s
between them."""

import json

import pytest
from sandbox import run_in_sandbox

pytestmark = pytest.mark.netns
NODES, PER_NODE, RATE_BPS = 3, 2, 50e6

TRAIN = """
import json, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import netsenseml
from testbed.worker.listener import parameters_hash

def carried():
    lines = [line.split() for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]]
    return {line[0].rstrip(":"): int(line[9]) for line in lines}

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 512))
model = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
session = netsenseml.attach(model, "netsense")
torch.manual_seed(dist.get_rank())
before, rows = carried(), []
for _ in range(int(sys.argv[1])):
    optimizer.zero_grad()
    model(torch.randn(4, 512)).square().mean().backward()
    optimizer.step()
    session.step(samples=4)
    rows.append(session.last)
dist.barrier()
after = carried()
said = {name: int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")}
said |= {"rows": rows, "carried": {name: after[name] - before[name] for name in after}, "parameters": parameters_hash(model)}
session.close()
dist.destroy_process_group()
Path(f"rank-{said['RANK']}.json").write_text(json.dumps(said))
os._exit(0)  # taking torch apart takes a second
"""
MACHINES = """
import sys, time
from pathlib import Path
from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links.state import LinkState, LinkParameters

nodes, per_node, rate_bps, steps = map(int, sys.argv[1:])
side = LinkParameters(rate_bps=rate_bps, queue_s=0.05)
with ForkServer(["torch.distributed.run"]) as server:
    with NetnsLab(LabPlan({f"n{number}": LinkState(up=side, down=side) for number in range(nodes)}), server) as lab:
        head = lab.hosts["n0"].address
        agents = []
        for number, host in enumerate(lab.hosts.values()):
            # All have the same hostname here, so each is told its address, and the first one that it is the head.
            argv = ["--nnodes", str(nodes), "--nproc-per-node", str(per_node), "--rdzv-backend", "c10d"]
            argv += ["--rdzv-endpoint", f"{head}:29400", "--rdzv-conf", f"is_host={number == 0}", "--local-addr", host.address]
            argv = ["python", "-m", "torch.distributed.run", *argv, "train.py", str(steps)]
            agents.append(host.start(argv, {"GLOO_SOCKET_IFNAME": host.interface}, Path(f"agent-{number}.log")))
        while None in (codes := [agent.poll() for agent in agents]) and not any(codes):
            time.sleep(0.05)
        sys.exit(any(codes))
"""


def train(tmp_path, per_node, steps):
    """What every rank has to say, in order of rank."""
    (tmp_path / "train.py").write_text(TRAIN)
    numbers = map(str, (NODES, per_node, int(RATE_BPS), steps))
    run_in_sandbox(MACHINES, tmp_path, *numbers)
    return [
        json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(NODES * per_node)
    ]


def test_ranks_of_a_machine_use_its_link_once_and_all_go_by_one_decision(tmp_path):
    found = train(tmp_path, PER_NODE, steps=40)
    assert [(one["GROUP_RANK"], one["LOCAL_RANK"]) for one in found] == [
        (n, local) for n in range(NODES) for local in (0, 1)
    ]
    assert len({one["parameters"] for one in found}) == 1
    decided = [[(row["scheme"], row["bandwidth_bps"]) for row in one["rows"]] for one in found]
    assert all(mine == decided[0] for mine in decided)
    schemes = {scheme for scheme, _ in decided[0]}
    assert any(scheme.startswith("host-") for scheme in schemes)
    for first, second in zip(found[::PER_NODE], found[1::PER_NODE], strict=True):
        leaves = 0  # in a ring only one of them sends to the other machine
        for one, other in zip(first["rows"], second["rows"], strict=True):
            leaves += one["payload_bytes"] + other["payload_bytes"] * one["scheme"].startswith(
                "host-"
            )
        assert (
            0.98 * leaves <= first["carried"]["eth0"] <= 1.1 * leaves + 10_000 * len(first["rows"])
        )
        # float32 of each step, at least once
        assert first["carried"]["lo"] > 4 * 1_000_000 * len(first["rows"])
    assert RATE_BPS / 2 < decided[0][-1][1] < RATE_BPS * 2, "it is not the loopback that was sensed"
