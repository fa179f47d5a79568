"""Worker of replicas.yaml: 300 steps in which one rank computes three times as long as the
others."""

import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import netsenseml

COMPUTE_S = 0.01
SLOW_RANK = 1


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    session = netsenseml.attach(model)
    rank = dist.get_rank()
    torch.manual_seed(rank)
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 300):
        x, y = torch.randn(32, 64), torch.randint(0, 10, (32,))
        loss = nn.functional.cross_entropy(model(x), y)
        time.sleep(COMPUTE_S * (3 if rank == SLOW_RANK else 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step(loss, samples=len(x))
    session.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
