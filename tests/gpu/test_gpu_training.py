"""Methods at work on a CUDA device that all ranks share, over Gloo groups, and over NCCL as far as
that goes on one device."""

import itertools
import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import Ranks, run_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from netsenseml import Mesh, Session, all_reduce_mean, attach, comm_hook
from netsenseml.exchange.communicators import Plan, RandomK, RingAllReduce, WideAllGather, parse
from netsenseml.records import read_records

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("allreduce", {}),
    ("bf16", {}),
    ("fp16", {}),
    ("topk", {"ratio": 0.05}),
    ("topk12", {"ratio": 0.05}),
    ("randomk", {"ratio": 0.1}),
    ("dgc", {"ratio": 0.05, "warmup": 4}),
    ("quantized", {"values": "int8"}),
    ("quantized", {"values": "int4"}),
    ("qsgd", {"bits": 4}),
    ("signsgd", {}),
    ("powersgd", {"rank": 2}),
    ("netsense", {}),
    ("netsense", {"policy": "bdp"}),
    (
        "netsense",
        {
            "policy": "fixed",
            "schemes": ["int4", "sparse-int8@2%", "allreduce", "allreduce", "int8-ring"],
        },
    ),
]
IDS = ["-".join([name, *map(str, options.values())]) for name, options in METHODS]
PLANS: list[Plan] = [
    *map(
        parse,
        [
            "bf16",
            "int8",
            "int4",
            "sign",
            "fp32",
            "int8-ring",
            "sparse-bf16@5%",
            "sparse-int4@1%-ring",
            "host-int8",
        ],
    ),
    RingAllReduce(),
    RandomK(0.1),
    WideAllGather(0.05, piece=3000),
]


def make_ddp(device: str = "cuda", **options: Any) -> DistributedDataParallel:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 5)
    )
    return DistributedDataParallel(model.to(device), bucket_cap_mb=0.05, **options)


def batch(rank: int, step: int, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(8, 20, generator=draw).to(device), torch.randint(
        0, 5, (8,), generator=draw
    ).to(device)


def parameters(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()]).cpu()


# --- one collective


def exchange_all(rank: int, devices: list[str]) -> list[list[float]]:
    mesh, found = Mesh(dist.group.WORLD, hosts=[0, 0, 1, 1], device=torch.device(devices[rank])), []
    for plan, elements in itertools.product(PLANS, [1, 700, 100_000]):
        for step in range(2):  # the second one has a residual
            tensor = torch.randn(
                elements, generator=torch.Generator().manual_seed(10 * step + rank)
            ).to(devices[rank])
            all_reduce_mean(tensor, (plan.name, elements), plan, mesh).wait()
        found.append(tensor.cpu().tolist())
    mesh.close()
    return found


@pytest.mark.parametrize(
    "devices", [["cuda"] * 4, ["cpu", "cuda", "cuda", "cpu"]], ids=["cuda", "mixed"]
)
def test_plans_give_on_every_device_what_they_give_on_the_cpu(devices: list[str]) -> None:
    expected = run_group(exchange_all, 4, ["cpu"] * 4)[0]
    names = [f"{plan.name} of {n}" for plan, n in itertools.product(PLANS, [1, 700, 100_000])]
    for rank in run_group(exchange_all, 4, devices):
        for name, theirs, ours in zip(names, expected, rank, strict=True):
            assert theirs == ours, name


# --- training


def train(rank: int, method: str, options: dict[str, Any], steps: int) -> tuple[list[float], float]:
    ddp = make_ddp()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.0 if method == "dgc" else 0.9)
    session = attach(ddp, method, **options)
    for step in range(steps):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ddp(x), y)
        loss.backward()
        optimizer.step()
        session.step(loss, samples=len(x))
    session.close()
    assert (
        session.last is not None and session.last["step"] == steps - 1 and session.last["loss"] > 0
    )
    return parameters(ddp.module).tolist(), session.last["loss"]


@pytest.mark.parametrize(("method", "options"), METHODS, ids=IDS)
def test_replicas_stay_bit_identical(method: str, options: dict[str, Any]) -> None:
    first, *others = run_group(train, 3, method, options, 40)
    assert all(other[0] == first[0] for other in others)
    assert all(value == value for value in first[0])


def exchanged_and_own(rank: int, method: str, options: dict[str, Any]) -> list[list[float]]:
    """Sums over some steps of the exchanged mean and of the own gradient, and the final
    residual."""
    ddp = make_ddp()
    reference = nn.Sequential(
        *[
            type(m)(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m
            for m in ddp.module
        ]
    )
    reference.cuda()
    session = Session(ddp, method, **options)
    ddp.register_comm_hook(session, comm_hook)
    exchanged = own = torch.zeros((), device="cuda")
    for step in range(6):
        reference.load_state_dict(ddp.module.state_dict())
        x, y = batch(rank, step)
        for module in (ddp, reference):
            module.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
        exchanged = exchanged + torch.cat([p.grad.reshape(-1) for p in ddp.parameters()])
        own = own + torch.cat([p.grad.reshape(-1) for p in reference.parameters()])
        with torch.no_grad():
            for parameter in ddp.parameters():
                parameter -= 0.1 * parameter.grad
        session.step()
    kept = session.state_dict().get("feedback", {})
    residual = torch.cat(
        [kept.get(n, torch.zeros_like(p)).reshape(-1) for n, p in ddp.module.named_parameters()]
    )
    session.close()
    return [exchanged.tolist(), own.tolist(), residual.tolist()]


@pytest.mark.parametrize("method", ["topk", "quantized", "netsense"])
def test_what_was_sent_and_what_is_kept_make_up_the_gradients(method: str) -> None:
    ranks = [
        [torch.tensor(part) for part in rank]
        for rank in run_group(exchanged_and_own, 3, method, {})
    ]
    given = torch.stack([own for _, own, _ in ranks]).mean(0)
    kept = torch.stack([residual for _, _, residual in ranks]).mean(0)
    assert torch.allclose(ranks[0][0] + kept, given, atol=1e-5)


def late_gradients(rank: int, method: str) -> float:
    """The device is made to be a while behind the CPU, so that whoever does not wait for it sends
    what is not there yet."""
    ddp = make_ddp()
    session = attach(ddp, method)
    x, y = batch(0, 0)  # the same on all ranks: the mean is the own gradient
    worst = 0.0
    for step in range(5):
        ddp.zero_grad()
        loss = nn.functional.cross_entropy(ddp(x + step), y)
        torch.cuda._sleep(50_000_000)
        loss.backward()
        got = torch.cat([p.grad.reshape(-1) for p in ddp.parameters()])
        expected = torch.autograd.grad(
            nn.functional.cross_entropy(ddp.module(x + step), y), list(ddp.parameters())
        )
        whole = torch.cat([g.reshape(-1) for g in expected])
        worst = max(worst, float((got - whole).abs().max()))
        session.step()
    session.close()
    return worst


@pytest.mark.parametrize("method", ["allreduce", "bf16"])
def test_gradients_are_awaited_on_the_device(method: str) -> None:
    assert max(run_group(late_gradients, 2, method)) < (1e-6 if method == "allreduce" else 1e-2)


def with_times(rank: int, path: str, method: str) -> list[dict[str, Any]]:
    ddp = make_ddp()
    session = attach(ddp, method, record=f"{path}/{rank}")
    for step in range(12):
        ddp.zero_grad()
        loss = nn.functional.cross_entropy(ddp(batch(rank, step)[0]), batch(rank, step)[1])
        torch.cuda._sleep(20_000_000)
        loss.backward()
        session.step(loss, samples=8)
    session.close()
    return list(read_records(Path(path) / str(rank)))


@pytest.mark.parametrize("method", ["allreduce", "topk", "netsense"])
def test_time_of_the_device_is_computation_and_not_communication(
    method: str, tmp_path: Path
) -> None:
    for rows in run_group(with_times, 1, str(tmp_path), method):
        assert [row["step"] for row in rows] == list(range(12))
        for row in rows[4:]:
            assert row["compute_s"] > 0.008, row  # 20 million cycles take 10 ms at 2 GHz
            assert 0 <= row["comm_s"] < 0.5 * row["step_s"], row
            assert row["loss"] > 0


def synchronisations(rank: int, method: str) -> dict[str, int]:
    ddp = make_ddp()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    session = attach(ddp, method)
    calls: dict[str, int] = {}
    for step in range(12):
        if step == 6:
            profile = torch.profiler.profile(
                activities=[
                    torch.profiler.ProfilerActivity.CPU,
                    torch.profiler.ProfilerActivity.CUDA,
                ]
            )
            profile.__enter__()
        optimizer.zero_grad()
        x, y = batch(rank, step)
        loss = nn.functional.cross_entropy(ddp(x), y)
        loss.backward()
        optimizer.step()
        session.step(loss, samples=8)
    torch.cuda.current_stream().synchronize()
    profile.__exit__(None, None, None)
    for event in profile.events():
        if "Synchronize" in event.name:
            calls[event.name] = calls.get(event.name, 0) + 1
    session.close()
    return calls


@pytest.mark.parametrize("method", ["topk", "quantized", "netsense"])
def test_no_step_waits_for_the_whole_device(method: str) -> None:
    for calls in run_group(synchronisations, 2, method):
        assert calls.get("cudaDeviceSynchronize", 0) <= 1, calls  # the profiler's own, at its end


# --- NCCL, which refuses a second rank of a group on the same device


def alone_with_nccl(directory: str) -> list[str]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group(
        "nccl",
        init_method=f"file://{directory}/rendezvous",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=60),
    )
    found = []
    for method, options in METHODS:
        values, _ = train(0, method, options, 12)
        found.append(f"{method} {all(value == value for value in values)}")
    scaled = make_ddp()
    scaler, optimizer = (
        torch.amp.GradScaler("cuda", init_scale=2.0**30),
        torch.optim.SGD(scaled.parameters(), lr=0.05),
    )
    session = attach(scaled, "topk", scaler=scaler, ratio=0.05)
    for step in range(20):
        optimizer.zero_grad()
        x, y = batch(0, step)
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(scaled(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        session.step(loss, samples=len(x))
    session.close()
    found.append(f"scaled {bool(parameters(scaled.module).isfinite().all())}")
    dist.destroy_process_group()
    return found


two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def join(rank: int, ranks: int, directory: str, device: int) -> None:
    torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )


def exchange_by_hosts(rank: int, directory: str, device: str) -> tuple[bool, list[list[float]]]:
    """Ranks 0 and 1 on two devices are one host, 2 and 3 on the same two another."""
    join(rank, 4, directory, rank % 2)
    on = torch.device("cuda", rank % 2) if device == "cuda" else torch.device("cpu")
    mesh, found = Mesh(dist.group.WORLD, hosts=[0, 0, 1, 1], device=on), []
    names = ["host-fp32", "host-int8", "host-sparse-int4@5%", "host-int8-ring"]
    for name, elements in itertools.product(names, [1, 700, 100_000]):
        for step in range(3):
            draw = torch.Generator().manual_seed(10 * step + rank)
            tensor = torch.randn(elements, generator=draw).to(on)
            all_reduce_mean(tensor, (name, elements), parse(name), mesh).wait()
        found.append(tensor.tolist())
    by_nccl = mesh.within_by_nccl
    mesh.close()
    return by_nccl, found


@two_devices
def test_ranks_of_a_host_exchange_by_nccl_what_they_would_by_gloo() -> None:
    found = {}
    for device in ("cpu", "cuda"):
        with tempfile.TemporaryDirectory() as directory:
            found[device] = Ranks(
                exchange_by_hosts, [(rank, directory, device) for rank in range(4)], {}
            ).results()
    assert [by_nccl for by_nccl, _ in found["cuda"]] == [True] * 4
    assert [by_nccl for by_nccl, _ in found["cpu"]] == [False] * 4
    for (_, theirs), (_, ours) in zip(found["cpu"], found["cuda"], strict=True):
        assert theirs == ours == found["cuda"][0][1]


def train_by_nccl(rank: int, directory: str, steps: int) -> list[tuple[str, list[float]]]:
    join(rank, 2, directory, rank)
    return [
        (name, train(rank, method, options, steps)[0])
        for name, (method, options) in zip(IDS, METHODS, strict=True)
    ]


@two_devices
def test_replicas_stay_bit_identical_over_nccl() -> None:
    with tempfile.TemporaryDirectory() as directory:
        first, second = Ranks(
            train_by_nccl, [(rank, directory, 40) for rank in range(2)], {}
        ).results()
    for (name, ours), (_, theirs) in zip(first, second, strict=True):
        assert ours == theirs and all(value == value for value in ours), name


def test_every_method_trains_beside_nccl() -> None:
    with tempfile.TemporaryDirectory() as directory:
        (found,) = Ranks(alone_with_nccl, [(directory,)], {}).results()
    assert found == [f"{method} True" for method, _ in METHODS] + ["scaled True"]
