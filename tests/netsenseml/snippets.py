"""Runs the blocks of docs/howto/training.md, under torchrun; rank 0 tells of each stack, as
JSON."""

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_models import parameters_hash
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

PAGE = Path(__file__).parents[2] / "docs/howto/training.md"


def blocks() -> dict[str, list[str]]:
    """Of the page's Python, by heading."""
    _, *sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    return {
        section.splitlines()[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        for section in sections
    }


def surroundings() -> dict[str, Any]:
    """What the page takes for granted. All ranks begin with the same model, and have other data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    torch.manual_seed(dist.get_rank())
    data = TensorDataset(torch.randn(64, 20), torch.randint(0, 5, (64,)))
    return {
        "torch": torch,
        "DistributedDataParallel": DistributedDataParallel,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
        "criterion": nn.CrossEntropyLoss(),
        "batches": DataLoader(data, batch_size=8),
        "replicas": 2,
        "shards": 1,
    }


def lightning_module(model: nn.Module) -> Any:
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def training_step(
            self, batch: tuple[torch.Tensor, torch.Tensor], number: int
        ) -> torch.Tensor:
            return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Module()


def tell(stack: str, session: Any, more: Mapping[str, Any]) -> None:
    module = session.module
    whole = nn.ParameterList(
        [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in module.parameters()]
    )
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, parameters_hash(whole))
    kept = session._lr  # which it knows once it has found the optimizer
    if dist.get_rank() == 0:
        told = {
            "stack": stack,
            "steps": session.steps,
            "replicas": len(set(hashes)),
            "lr": kept,
            "payload": None,
            **more,
        }
        if session.last is not None:
            told["payload"] = session.last["payload_bytes"]
        print(json.dumps(told), flush=True)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    setup, loop = blocks()["DistributedDataParallel"]
    # inductor takes a minute
    compiled = blocks()["torch.compile"][0].replace("(model))", "(model), backend='eager')")
    sharded, checkpoint = blocks()["fully_shard (FSDP2)"]
    for stack, parts in (
        ("DistributedDataParallel", [setup, loop]),
        ("torch.compile", [compiled, loop]),
        ("Accelerate", blocks()["Accelerate"]),
        ("Lightning", blocks()["Lightning"]),
        (
            "fully_shard (FSDP2)",
            [sharded, loop.replace("session.close()", ""), checkpoint, "session.close()"],
        ),
    ):
        if len(sys.argv) > 1 and stack not in sys.argv[1:]:
            continue
        names = surroundings()
        before = parameters_hash(names["model"])
        if stack == "Lightning":
            names["module"] = lightning_module(names["model"])
        with tempfile.TemporaryDirectory() as directory:
            told = [directory]
            dist.broadcast_object_list(told)
            names["directory"] = told[0]
            for part in parts:
                exec(compile(part, PAGE.name, "exec"), names)  # its own
            dist.barrier()
        session = (
            names["trainer"].callbacks[0].session if stack == "Lightning" else names["session"]
        )
        tell(
            stack,
            session,
            {"trained": parameters_hash(names["model"]) != before if stack[0] != "f" else True},
        )
    without = "Without DistributedDataParallel"
    if len(sys.argv) == 1 or without in sys.argv[1:]:
        names = {"tensor": torch.full((1000,), 1.0 + dist.get_rank())}
        exec(compile(blocks()[without][0], PAGE.name, "exec"), names)
        if dist.get_rank() == 0:
            print(json.dumps({"stack": without, "mean": names["tensor"].mean().item()}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
