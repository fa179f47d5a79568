"""Your own FSDP2 script with NetSenseML: two replicas, each sharded over half of the ranks.

torchrun --nproc-per-node 4 experiments/own_fsdp.py netsense    # anywhere
testbed run experiments/own_fsdp.yaml                           # the same file, over a thin link
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import netsenseml

STEPS = 300
REPLICAS = 2


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mesh = init_device_mesh(
        "cpu", (REPLICAS, dist.get_world_size() // REPLICAS), mesh_dim_names=("replicate", "shard")
    )
    model = nn.Sequential(
        nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    teacher = torch.randn(64, 10)
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    session = netsenseml.attach(model, *sys.argv[1:])  # in the testbed the spec names the method
    torch.manual_seed(dist.get_rank())
    for _ in range(STEPS):
        x = torch.randn(32, 64)
        y = (x @ teacher).argmax(dim=1)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if not session.step(loss, samples=len(x)):  # False: the spec's time is over
            break
    torch.manual_seed(-1)
    x = torch.randn(4096, 64)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(dim=1))
    session.close()
    if dist.get_rank() == 0:
        print(f"loss {loss:.4f} of data that no rank has seen, after {session.steps} steps")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
