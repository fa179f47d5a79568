"""Does DeMo end where AdamW ends? Loss over the test text of a small GPT after as many steps, by
two ranks on this machine.

    python experiments/bench/demo_text.py [--steps 1000] [--seeds 0] [--rates 1e-2,1.5e-2] [--topk
    256]

A line for plain all-reduce with AdamW and one for demo with AdamW without beta1, for every learning
rate: loss, and bytes that a rank sent per step. Their best ones are what is to be compared, as each
method has a learning rate of its own. It falls to zero along a cosine.
"""

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import netsenseml.api  # before the ranks are forked
import netsenseml.compress.arrays
from testbed.worker.zoo import Dataset, make_data, make_model

RANKS, BATCH = 2, 16
MODEL = {"layers": 2, "width": 64, "heads": 4, "context": 32}


def train(
    rank: int,
    meet: str,
    data: Dataset,
    method: str,
    lr: float,
    given: argparse.Namespace,
    seed: int,
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=RANKS)
    model = DistributedDataParallel(make_model("gpt", MODEL, seed))
    betas = (0.0 if method == "demo" else 0.9, 0.999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas)
    steps, options = given.steps, {"topk": given.topk} if method == "demo" else {}
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    session = netsenseml.attach(model, method, **options)
    train_x, train_y, test_x, test_y = data
    draw = torch.Generator().manual_seed(seed)
    sent = 0
    for _ in range(steps):
        chosen = torch.randint(len(train_x), (BATCH * RANKS,), generator=draw)[rank::RANKS]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(train_x[chosen]), train_y[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        session.step(loss)
        sent += session.last["payload_bytes"] if session.last else 0
    session.close()
    if rank == 0:
        with torch.no_grad():
            batches = zip(test_x.split(256), test_y.split(256), strict=True)
            loss = torch.stack(
                [nn.functional.cross_entropy(model.module(x), y) for x, y in batches]
            ).mean()
        print(
            f"{method:9} lr {lr:<6g} seed {seed}  loss {loss:.4f}  {sent / steps:.0f} bytes",
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {
        "steps": 1000,
        "seeds": "0",
        "rates": "1e-2,1.5e-2",
        "methods": "allreduce,demo",
        "topk": 256,
    }
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = parser.parse_args()
    data = make_data("text", {"kilobytes": 256, "context": MODEL["context"]})
    for seed in map(int, given.seeds.split(",")):
        for method in given.methods.split(","):
            for lr in map(float, given.rates.split(",")):
                with tempfile.NamedTemporaryFile() as meet:
                    children = []
                    for rank in range(RANKS):
                        if not (child := os.fork()):
                            train(rank, f"file://{meet.name}", data, method, lr, given, seed)
                            os._exit(0)
                        children.append(child)
                    for child in children:
                        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                            raise SystemExit(f"{method}: a rank has failed")


if __name__ == "__main__":
    main()
