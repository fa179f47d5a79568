"""Your own DDP script with NetSenseML: four lines more than without it.

torchrun --nproc-per-node 2 experiments/own_script.py netsense    # anywhere
testbed run experiments/own_script.yaml                           # the same file over shaped links
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import netsenseml


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = netsenseml.attach(model, *sys.argv[1:])  # in the testbed the spec names the method
    torch.manual_seed(dist.get_rank())
    for _ in range(100):
        x, y = torch.randn(32, 64), torch.randint(0, 10, (32,))
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not session.step(loss, samples=len(x)):  # False: the spec's time is over
            break
    session.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
