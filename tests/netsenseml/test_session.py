"""What a session promises beside the exchange: ranks that agree, refusals in one line, nothing lost
on the way."""

import copy
import gc
import math
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo.config
import torch.distributed as dist
from groups import run_group, wait_for_others
from small_models import LateClock, backward, batches, flat_gradient, make_ddp, parameters_hash
from torch import nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

import netsenseml.exchange.mesh as mesh_module
import netsenseml.hook
from netsenseml import Session, attach, comm_hook
from netsenseml.methods import METHODS, AllReduce
from netsenseml.records import read_records

FIXED = {
    "policy": "fixed",
    "schemes": ["int4", "sparse-int4@5%", "allreduce", "sparse-bf16@2%", "int8"],
}
KEPT = [  # methods whose parameters receive all of the gradients in the end
    ("quantized", {"values": "int4"}),
    ("topk", {"ratio": 0.05}),
    ("randomk", {"ratio": 0.1}),
    ("signsgd", {}),
    ("powersgd", {"rank": 2}),
    ("dgc", {"ratio": 0.05, "momentum": 0.0, "warmup": 4}),
    ("netsense", FIXED),
]


def open_things() -> tuple[int, int]:
    """Threads, also those of Gloo, and file descriptors of this process."""
    threads, descriptors = (
        len(list(Path("/proc/self", kind).iterdir())) for kind in ("task", "fd")
    )
    return threads, descriptors


# --- ranks that differ


def attach_different_options(rank: int) -> list[str]:
    messages = []
    for method, options, version in (
        ("netsense", {"floor": 0.01 if rank == 2 else 0.001}, "1"),
        ("topk" if rank == 3 else "randomk", {"ratio": 0.1}, "1"),
        ("topk", {"ratio": 0.1, **({"values": "int4"} if rank == 1 else {})}, "1"),
        ("allreduce", {}, "2" if rank == 3 else "1"),
    ):
        netsenseml.hook._version = lambda version=version: version
        with pytest.raises(ValueError) as refused:
            attach(make_ddp(), method, **options)
        messages.append(str(refused.value))
    netsenseml.hook._version = lambda: "1"
    attach(make_ddp(), "topk", ratio=0.2).close()  # afterwards all can go on
    return messages


def test_ranks_that_differ_are_named_on_every_rank() -> None:
    first, *others = run_group(attach_different_options, 4)
    assert all(other == first for other in others)
    for message, said in zip(
        first,
        (
            "rank 2 has floor = 0.01, rank 0 has 0.001",
            "rank 3 has method = 'topk', rank 0 has 'randomk'",
            "rank 1 has values = 'int4', rank 0 has None",
            "rank 3 has netsenseml = '2', rank 0 has '1'",
        ),
        strict=True,
    ):
        assert said in message and "\n" not in message


def come_late(rank: int) -> str:
    ddp = make_ddp()
    message = ""
    if rank != 2:
        with pytest.raises(RuntimeError) as missed:
            attach(ddp, "topk")
        message = str(missed.value)
    wait_for_others("late")
    return message


def test_a_rank_that_does_not_come_is_named_after_the_time_out_of_the_group() -> None:
    messages = run_group(come_late, 4, timeout_s=5)
    assert messages == ["ranks 2 did not come within 5 s"] * 2 + [""] + [
        "ranks 2 did not come within 5 s"
    ]


class WithOption(AllReduce):
    """A method of the user's own; its option is nothing that JSON could hold."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, option: object) -> None:
        super().__init__(module, group)


def attach_with_any_option(rank: int) -> None:
    attach(make_ddp(), f"{__name__}:WithOption", option=torch.ones(3)).close()
    with pytest.raises(ValueError, match="ratio must be a number"):
        attach(make_ddp(), "topk", ratio=np.float32(0.1))


def test_options_may_be_anything() -> None:
    run_group(attach_with_any_option, 2)


def load_checkpoints_apart(rank: int, method: str) -> tuple[str, str]:
    ddp = make_ddp()
    session = attach(ddp, method)
    states = []
    for batch in batches(rank, 4):
        backward(ddp, batch)
        session.step()
        states.append(session.state_dict())
    with pytest.raises(ValueError) as differ:
        session.load_state_dict(states[2 if rank == 1 else 1])
    message = ""
    if rank == 0:
        with pytest.raises(RuntimeError) as missed:
            session.load_state_dict(states[0])
        message = str(missed.value)
    wait_for_others("loaded")
    return str(differ.value), message


@pytest.mark.parametrize("method", ["topk", "powersgd", "netsense"])
def test_checkpoints_of_different_steps_or_of_one_rank_alone_are_refused_by_name(
    method: str,
) -> None:
    (differ, missed), (differs_too, _), _ = run_group(
        load_checkpoints_apart, 3, method, timeout_s=5
    )
    assert differ == differs_too
    assert "rank 1 has step of the checkpoint = 3, rank 0 has 2" in differ
    assert missed == "ranks 1, 2 did not come within 5 s"


def load_of_more_ranks(rank: int) -> str:
    session = attach(make_ddp(), "topk")
    with pytest.raises(ValueError) as refused:
        session.load_state_dict({**session.state_dict(), "ranks": 7})
    return str(refused.value)


def test_a_checkpoint_of_another_number_of_ranks_is_refused() -> None:
    for message in run_group(load_of_more_ranks, 2):
        assert "7 ranks" in message and "\n" not in message


# --- nothing is lost


class Heads(nn.Module):
    """in_blocks: no block of values that share a scale has elements of two parameters. A sign
    cannot say that a value is zero, so that what signsgd sends at the edges of a parameter that
    nobody used is lost."""

    def __init__(self, in_blocks: bool) -> None:
        super().__init__()
        width, classes = (64, 8) if in_blocks else (60, 5)
        self.trunk = nn.Linear(20, width, bias=not in_blocks)
        self.heads = nn.ModuleList(nn.Linear(width, classes, bias=not in_blocks) for _ in range(4))

    def forward(self, x: torch.Tensor, head: int) -> torch.Tensor:
        return self.heads[head](self.trunk(x).relu())


def noting_hook(
    state: tuple[Session, dict[int, list[nn.Parameter]]], bucket: dist.GradBucket
) -> Future[torch.Tensor]:
    session, buckets = state
    buckets[bucket.index()] = bucket.parameters()
    return session.exchange(bucket)


def residuals(
    session: Session, buckets: dict[int, list[nn.Parameter]]
) -> dict[nn.Parameter, torch.Tensor]:
    """By parameter, whatever the method keeps them by. buckets: parameters of every bucket, in
    order."""
    state = session.state_dict()
    if "error_dict" in state:
        found = {}
        for index, flat in state["error_dict"].items():
            found |= dict(
                zip(buckets[index], flat.split([p.numel() for p in buckets[index]]), strict=True)
            )
        return found
    named = dict(session.module.named_parameters())
    return {
        named[name]: residual for name, residual in state["feedback"].items() if ":" not in name
    }


def turn_heads(rank: int, method: str, options: dict[str, Any], apart: bool) -> list[list[float]]:
    """(received, sum of own gradients, residual) over 20 steps, all parameters after one
    another."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(
        Heads(in_blocks=method == "signsgd"), bucket_cap_mb=0.002, find_unused_parameters=True
    )
    torch.manual_seed(0)
    reference = Heads(in_blocks=method == "signsgd")
    session = Session(ddp, method, **options)
    buckets: dict[int, list[nn.Parameter]] = {}

    ddp.register_comm_hook((session, buckets), noting_hook)
    parameters = list(ddp.module.parameters())
    received, own = (
        [torch.zeros(p.numel(), dtype=torch.float64) for p in parameters] for _ in range(2)
    )
    for step, (x, y) in enumerate(batches(rank, 20)):
        head = (step + rank * apart) % 4
        for model in (ddp, reference):
            model.zero_grad()
            nn.functional.cross_entropy(model(x, head), y).backward()
        for totals, model in ((received, ddp), (own, reference)):
            for total, parameter in zip(totals, model.parameters(), strict=True):
                total += parameter.grad.reshape(-1) if parameter.grad is not None else 0
        session.step()
    kept = residuals(session, buckets)
    session.close()
    left = [kept.get(parameter, torch.zeros(parameter.numel())) for parameter in parameters]
    return [torch.cat(parts).tolist() for parts in (received, own, left)]


def turn_heads_by_all(rank: int, apart: bool) -> list[list[list[float]]]:
    return [turn_heads(rank, *method, apart) for method in KEPT]


@pytest.mark.parametrize("apart", [False, True], ids=["together", "every rank another"])
def test_of_heads_that_take_turns_nothing_is_lost(apart: bool) -> None:
    ranks = run_group(turn_heads_by_all, 2, apart)
    for number, method in enumerate(KEPT):
        received, own, left = (
            torch.tensor([rank[number][i] for rank in ranks], dtype=torch.float64) for i in range(3)
        )
        assert torch.equal(received[0], received[1]), method
        torch.testing.assert_close(
            received[0],
            (own - left).mean(dim=0),
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m, n=method: f"{n} {m}",
        )


def scale_losses(rank: int, method: str, options: dict[str, Any]) -> list[list[float]]:
    """As above in units of the loss, over 24 steps in which the scale grows and two steps are left
    out."""
    ddp, reference = make_ddp(), make_ddp().module
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    # so that all gradients are of the same model
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-9)
    session = Session(ddp, method, scaler=scaler, **options)
    buckets: dict[int, list[nn.Parameter]] = {}

    ddp.register_comm_hook((session, buckets), noting_hook)
    parameters = list(ddp.module.parameters())
    received, own, scales = torch.zeros(()), torch.zeros(()), []
    for step, (x, y) in enumerate(batches(rank, 24)):
        overflows = step in (7, 16)
        before = {p: r.clone() for p, r in residuals(session, buckets).items()}
        ddp.zero_grad()
        loss = nn.functional.cross_entropy(ddp(x), y)
        scaler.scale(loss * math.inf if overflows and rank == 1 else loss).backward()
        scale = scaler.get_scale()
        if not overflows:
            received = received + flat_gradient(ddp.module).double() / scale
            reference.zero_grad()
            nn.functional.cross_entropy(reference(x), y).backward()
            own = own + flat_gradient(reference).double()
        scaler.step(optimizer)
        scaler.update()
        session.step()
        scales.append(scaler.get_scale())
        if overflows:
            assert scales[-1] == scale / 2, "the step was left out"
            after = residuals(session, buckets)
            assert all(torch.equal(after[p], residual / 2) for p, residual in before.items())
    kept = residuals(session, buckets)
    session.close()
    assert max(scales) > 64
    left = (
        torch.cat([kept.get(p, torch.zeros(p.numel())) for p in parameters]).double() / scales[-1]
    )
    return [received.tolist(), own.tolist(), left.tolist()]


def scale_losses_by_all(rank: int) -> list[list[list[float]]]:
    return [scale_losses(rank, *method) for method in SCALED]


SCALED = [
    *(method for method in KEPT if method[0] != "netsense"),
    ("netsense", {**FIXED, "schemes": [*FIXED["schemes"], *["allreduce"] * 6, "sparse-int4@5%"]}),
]


def test_of_steps_that_the_scaler_leaves_out_nothing_is_lost() -> None:
    ranks = run_group(scale_losses_by_all, 2)
    for number, method in enumerate(SCALED):
        received, own, left = (
            torch.tensor([rank[number][i] for rank in ranks], dtype=torch.float64) for i in range(3)
        )
        torch.testing.assert_close(
            received[0],
            (own - left).mean(dim=0),
            rtol=1e-3,
            atol=1e-5,
            msg=lambda m, n=method: f"{n} {m}",
        )


def go_back_to_all_reduce(rank: int) -> tuple[list[float], list[str], bool]:
    """What is sent over the gradient, by norm; the same data on all ranks, so that the mean
    gradient is that of each."""
    ddp, reference = make_ddp(), make_ddp().module
    session = attach(
        ddp, "netsense", policy="fixed", schemes=["sparse-int4@1%"] * 15 + ["allreduce"]
    )
    ratios, schemes = [], []
    sent, own = torch.zeros(()), torch.zeros(())
    for x, y in batches(0, 90):
        backward(ddp, (x, y))
        reference.zero_grad()
        nn.functional.cross_entropy(reference(x), y).backward()
        ratios.append(float(flat_gradient(ddp.module).norm() / flat_gradient(reference).norm()))
        sent, own = sent + flat_gradient(ddp.module), own + flat_gradient(reference)
        session.step()
        assert session.last is not None
        schemes.append(session.last["scheme"])
    torch.testing.assert_close(sent, own, rtol=1e-3, atol=1e-4)
    holds = any(session.method.memory.holds(parameter) for parameter in ddp.module.parameters())
    session.close()
    return ratios, schemes, holds


def test_back_at_all_reduce_the_residual_goes_little_by_little_and_its_memory_is_freed() -> None:
    for ratios, schemes, holds in run_group(go_back_to_all_reduce, 2):
        assert schemes[0] == "sparse-int4@1%" and schemes[-60:] == ["allreduce"] * 60
        back = [
            ratio for ratio, scheme in zip(ratios, schemes, strict=True) if scheme == "allreduce"
        ]
        assert 1.05 < max(back) < 1.6 and back[-1] == pytest.approx(1, rel=1e-4)
        assert not holds


def change_learning_rate(rank: int, method: str, options: dict[str, Any]) -> None:
    """A scheduler changes it between two steps; the next exchange counts what was kept tenfold."""
    ddp, other = make_ddp(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    session = attach(ddp, method, **options)

    def mean_kept() -> dict[str, torch.Tensor]:
        kept = {
            name: residual.clone() for name, residual in session.state_dict()["feedback"].items()
        }
        for residual in kept.values():
            dist.all_reduce(residual)
        return {name: residual / 2 for name, residual in kept.items()}

    for factor in (1, 10):
        for batch in batches(rank, 4):
            backward(ddp, batch)
            other(torch.ones(2)).sum().backward()
            others.step()  # of another model, whose rate is of no interest
            others.param_groups[0]["lr"] *= 0.5
            optimizer.step()
            session.step()
        before = mean_kept()
        assert any(residual.any() for residual in before.values())
        optimizer.param_groups[0]["lr"] = 0.1 / factor
        optimizer.zero_grad(set_to_none=False)
        (ddp(batch[0]).sum() * 0).backward()
        after = mean_kept()
        for name, parameter in ddp.module.named_parameters():
            sent = parameter.grad.view(-1)
            torch.testing.assert_close(
                sent + after[name], factor * before[name], rtol=1e-4, atol=1e-6
            )
        optimizer.step()
        session.step()
    session.close()


def change_learning_rates(rank: int) -> None:
    for method in KEPT:
        if method[0] not in ("powersgd", "netsense"):  # which keep by bucket, and not always
            change_learning_rate(rank, *method)


def test_residuals_follow_the_learning_rate() -> None:
    run_group(change_learning_rates, 2)


def let_a_residual_grow(rank: int) -> list[float]:
    ddp = make_ddp()
    session = attach(ddp, "netsense", policy="fixed", schemes=["sparse-sign@0.1%"])
    ratios = []
    (batch,) = batches(rank, 1)
    for _ in range(60):
        backward(ddp, batch)
        session.step()
        assert session.last is not None
        ratios.append(session.last["residual_ratio"])
    session.close()
    return ratios


def test_the_residual_of_netsense_is_bounded() -> None:
    for ratios in run_group(let_a_residual_grow, 2):
        assert ratios[20] > 10 and max(ratios) == pytest.approx(30)


# --- models and settings that are refused, or not


class Adapted(nn.Module):
    """A base that is not trained, in bfloat16, with an adapter; a part of it is nowhere."""

    def __init__(self, adapter: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(20, 20, dtype=torch.bfloat16)
        self.nowhere = nn.Linear(20, 20, device="meta")
        self.adapter = nn.Linear(20, 5, dtype=adapter)
        self.base.requires_grad_(False)
        self.nowhere.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.adapter(self.base(x.bfloat16()).to(self.adapter.weight.dtype)).float()


def adapt(rank: int, dtype: torch.dtype) -> list[list[str]]:
    found = []
    for method in METHODS:
        torch.manual_seed(0)
        model = Adapted(dtype)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, ["nowhere.weight", "nowhere.bias"]
        )
        ddp = DistributedDataParallel(model)
        session = attach(ddp, method)
        for batch in batches(rank, 3):
            backward(ddp, batch)
            session.step()
        if method == "netsense":
            found.append(session.state_dict()["fits"])
        session.close()
        assert model.adapter.weight.grad is not None and model.adapter.weight.grad.isfinite().all()
    return found


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float32, True), (torch.bfloat16, False)], ids=str
)
def test_only_what_is_trained_counts(dtype: torch.dtype, wide: bool) -> None:
    for (plans,) in run_group(adapt, 2, dtype):
        assert ("fp32" in plans) is wide, "nobody sends more bytes than the gradients have"


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(20, 5, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.complex64) @ self.weight).abs()


def attach_odd_gradients(rank: int) -> dict[str, list[str]]:
    refused: dict[str, list[str]] = {"sparse": [], "complex": []}
    for method in METHODS:
        for kind, model in (
            ("sparse", nn.Sequential(nn.Embedding(9, 5, sparse=True), nn.Linear(5, 5))),
            ("complex", Complex()),
        ):
            try:
                session = attach(ddp := DistributedDataParallel(model), method)
            except ValueError as error:
                assert "\n" not in str(error) and (
                    "sparse=False" in str(error) or "choose allreduce" in str(error)
                )
                refused[kind].append(method)
            else:
                backward(ddp, next(batches(rank, 1)))
                assert model.weight.grad.isfinite().all()
                session.close()
    return refused


def test_sparse_and_complex_gradients_are_refused_where_they_cannot_be_exchanged() -> None:
    for refused in run_group(attach_odd_gradients, 2):
        assert refused == {
            "sparse": list(METHODS),
            "complex": [method for method in METHODS if method != "allreduce"],
        }


def attach_beside_compiled_autograd(rank: int) -> str:
    before = torch._dynamo.config.optimize_ddp
    torch._dynamo.config.optimize_ddp = "python_reducer"
    try:
        with pytest.raises(ValueError) as refused:
            attach(make_ddp(), "topk")
    finally:
        torch._dynamo.config.optimize_ddp = before
    return str(refused.value)


def test_a_reducer_that_calls_no_hook_is_refused() -> None:
    (message,) = run_group(attach_beside_compiled_autograd, 1)
    assert "python_reducer" in message and "\n" not in message


# --- what stays open


def attach_twice(rank: int) -> list[tuple[int, int]]:
    counts = []
    for method in ("netsense", "powersgd", "quantized"):
        ddp = make_ddp()
        session = attach(ddp, method)
        for batch in batches(rank, 3):
            backward(ddp, batch)
            session.step()
        for _ in range(3):
            with pytest.raises(RuntimeError, match="register"):
                attach(ddp, method)
            counts.append(open_things())
        backward(ddp, next(batches(rank, 1)))  # the first one goes on
        session.close()
    return counts


def test_a_refused_hook_leaves_no_group() -> None:
    for counts in run_group(attach_twice, 2):
        for i in range(0, len(counts), 3):
            assert counts[i] == counts[i + 1] == counts[i + 2]


def come_and_go_in_part(rank: int) -> list[tuple[int, int]]:
    group = dist.new_group([0, 1])
    counts = []
    if rank in (0, 1):
        for _ in range(20):
            torch.manual_seed(0)
            ddp = DistributedDataParallel(nn.Linear(20, 5), process_group=group)
            session = attach(ddp, "netsense", policy="fixed", schemes=["int8"])
            for batch in batches(rank, 2):
                backward(ddp, batch)
                session.step()
            session.close()
            counts.append(open_things())
    return counts


def test_sessions_that_come_and_go_among_part_of_the_ranks_leave_nothing() -> None:
    for counts in run_group(come_and_go_in_part, 4)[:2]:
        assert len(set(counts[1:])) == 1


def drop_models(rank: int) -> list[bool]:
    """Whether models are gone once nobody has them, whose session was closed or not."""
    gone = []
    for closing in (True, False):
        ddp = make_ddp()
        session = attach(ddp, "quantized")
        backward(ddp, next(batches(rank, 1)))
        model = weakref.ref(ddp)
        if closing:
            session.close()
        del ddp, session
        gc.collect()
        gone.append(model() is None)
    return gone


def test_a_session_keeps_no_model_alive() -> None:
    assert run_group(drop_models, 1) == [[True, True]]


# --- what scripts hand over


def step_with_anything(rank: int, directory: str) -> list[dict[str, Any]]:
    path = Path(directory, f"{rank}.jsonl")
    ddp = make_ddp()
    session = attach(ddp, "topk", record=path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for samples in (np.int64(8), torch.tensor(8), torch.tensor([8]), 8, None):
            loss = nn.functional.cross_entropy(
                ddp(torch.ones(8, 20)), torch.zeros(8, dtype=torch.long)
            )
            loss.backward()
            session.step(loss if samples is not None else np.float32(1.5), samples)
        session.evaluated(torch.tensor(0.5), np.float64(0.25))
    session.close()
    return list(read_records(path))


def test_samples_and_losses_may_be_of_any_kind(tmp_path: Path) -> None:
    for rows in run_group(step_with_anything, 2, str(tmp_path)):
        assert [row["samples"] for row in rows] == [8, 8, 8, 8, None]
        assert all(row["loss"] > 0 for row in rows[:4]) and rows[4]["loss"] == 1.5


# --- failures on the way


class Breaks(torch.autograd.Function):
    """Raises in backward, after the gradients of what follows it are ready."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise KeyError("broken on purpose")


class Breaker(nn.Module):
    breaks = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Breaks.apply(x) if self.breaks else x


class Counted(AllReduce):
    """Counts the backwards that came to an end."""

    finished = 0

    def finish(self, statistics: Any) -> None:
        self.finished += 1


def break_a_backward(rank: int, method: str) -> int:
    """All ranks break at the same place, and go on with the same session; the DDP that broke
    refuses to."""
    torch.manual_seed(0)
    breaker = Breaker()
    ddp = DistributedDataParallel(
        nn.Sequential(nn.Linear(20, 60), breaker, nn.Linear(60, 60), nn.Linear(60, 5)),
        bucket_cap_mb=0.01,
    )
    session = attach(ddp, method)
    for batch in batches(rank, 3):
        backward(ddp, batch)
        session.step()
    breaker.breaks = True
    with pytest.raises(KeyError):
        backward(ddp, next(batches(rank, 1)))
    breaker.breaks = False
    again = DistributedDataParallel(copy.deepcopy(ddp.module), bucket_cap_mb=0.01)
    again.register_comm_hook(session, comm_hook)
    for batch in batches(rank, 3):
        backward(again, batch)
        session.step()
        assert flat_gradient(again.module).isfinite().all()
    session.close()
    assert not any(thread.name == "netsenseml-exchange" for thread in threading.enumerate())
    return getattr(session.method, "finished", 0)


@pytest.mark.parametrize(
    "method", [f"{__name__}:Counted", "allreduce", "topk", "quantized", "netsense"]
)
def test_after_a_backward_that_broke_the_next_one_comes_to_its_end(method: str) -> None:
    finished = run_group(break_a_backward, 2, method, timeout_s=20)
    assert finished == ([6, 6] if "Counted" in method else [0, 0])


def break_alone(rank: int, method: str, options: dict[str, Any]) -> tuple[bool, float]:
    """Rank 1 alone breaks, and goes on as if nothing had happened; whether a rank saw a failure,
    and how long it took."""
    torch.manual_seed(0)
    breaker = Breaker()
    ddp = DistributedDataParallel(
        nn.Sequential(nn.Linear(20, 60), breaker, nn.Linear(60, 60), nn.Linear(60, 5)),
        bucket_cap_mb=0.01,
    )
    session = attach(ddp, method, **options)
    for batch in batches(rank, 3):
        backward(ddp, batch)
        session.step()
    breaker.breaks = rank == 1
    failed, began_s = False, time.monotonic()
    for batch in batches(rank, 3):
        try:
            backward(ddp, batch)
            session.step()
        except (KeyError, RuntimeError):
            failed = True
        breaker.breaks = False
    session.close()
    took_s = time.monotonic() - began_s
    wait_for_others("broken")
    return failed, took_s


@pytest.mark.parametrize(
    ("method", "options"),
    [("quantized", {}), ("topk", {}), ("netsense", {**FIXED, "schemes": ["int8"]})],
)
def test_of_a_rank_that_broke_alone_nobody_waits_for_ever(
    method: str, options: dict[str, Any]
) -> None:
    for failed, took_s in run_group(break_alone, 2, method, options, timeout_s=5):
        assert failed and took_s < 60


# --- what a reader found


def train_on_two_hosts(rank: int, options: dict[str, Any]) -> tuple[str, list[str], int]:
    """Ranks 0 and 1 share a host, 2 and 3 another, as far as netsense knows."""
    mesh_module._host = lambda: f"machine/{rank // 2}"  # type: ignore[assignment]
    ddp = make_ddp()
    session = attach(ddp, "netsense", **options)
    schemes = []
    for batch in batches(rank, 8):
        backward(ddp, batch)
        session.step()
        assert session.last is not None
        schemes.append(session.last["scheme"])
    told = len(session.method._pending_reports)  # type: ignore[attr-defined]
    session.close()
    return parameters_hash(ddp.module), schemes, told


@pytest.mark.parametrize(
    "options",
    [{}, {"policy": "fixed", "schemes": ["host-int8", "host-sparse-int4@10%", "allreduce"]}],
)
def test_hosts_with_several_ranks_train_and_decide_together(options: dict[str, Any]) -> None:
    """Ranks that send nothing to other hosts did not report, and the rest waited for them."""
    found = run_group(train_on_two_hosts, 4, options)
    assert len({(digest, *schemes) for digest, schemes, _ in found}) == 1
    assert max(told for *_, told in found) <= 2
    schemes = found[0][1]
    if options:
        # one a step
        assert schemes[:4] == ["host-int8", "host-sparse-int4@10%", "allreduce", "allreduce"]
    else:
        assert all(name == "allreduce" or name.startswith("host-") for name in schemes)


def leave_steps_out(rank: int, fused: bool) -> list[bool]:
    ddp = make_ddp()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    session = attach(ddp, "topk", ratio=0.05, scaler=scaler)
    same = []
    for step, batch in enumerate(batches(rank, 6)):
        before = session.state_dict()["feedback"]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ddp(batch[0]), batch[1]) * (
            math.inf if step == 4 else 1.0
        )
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        session.step()
        if step == 4:  # the scale was halved
            after = session.state_dict()["feedback"]
            same += [torch.equal(0.5 * before[name], after[name]) for name in before]
    session.close()
    return same


@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_may_leave_steps_out_by_themselves(fused: bool) -> None:
    for same in run_group(leave_steps_out, 2, fused):
        assert same and all(same)


def decay_slowly(rank: int) -> tuple[float, float]:
    ddp = make_ddp()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    session = attach(ddp, "topk", ratio=0.05)
    factors = []
    session.method.rescale = lambda factor, *, gradients: factors.append(factor)  # type: ignore[method-assign]
    (batch,) = batches(rank, 1)
    for _ in range(40):
        backward(ddp, batch)
        optimizer.step()
        session.step()
        optimizer.param_groups[0]["lr"] *= 0.9996  # less than would be worth a rescale by itself
    session.close()
    return math.prod(factors), 0.1 / optimizer.param_groups[0]["lr"]


def test_slow_schedules_are_followed_too() -> None:
    for followed, decayed in run_group(decay_slowly, 1):
        assert followed == pytest.approx(decayed, rel=2e-3)


def train_after_closing(rank: int) -> str:
    ddp = make_ddp()
    session = attach(ddp, "quantized")
    (batch,) = batches(rank, 1)
    backward(ddp, batch)
    session.close()
    with pytest.raises(RuntimeError) as error:
        backward(ddp, batch)
    return str(error.value)


def test_a_closed_session_says_so() -> None:
    assert all("this session is closed" in text for text in run_group(train_after_closing, 2))


# --- gradients on a device that is behind


def train_on_a_late_device(
    rank: int, method: str, directory: str, stepping: bool
) -> tuple[str, list[int]]:
    with mock.patch.object(netsenseml.hook, "Clock", LateClock):
        ddp = make_ddp()
        session = attach(ddp, method, record=f"{directory}/{method}-{rank}")
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    seen = []
    for number, batch in enumerate(batches(rank, 40)):
        loss = backward(ddp, batch)
        optimizer.step()
        if stepping:
            with session.pause():
                time.sleep(0.002)
            session.step(loss, samples=8)
        seen.append(-1 if session.last is None else session.last["step"])
        if number == 20:
            session.load_state_dict(session.state_dict())
    session.close()
    assert session.last is not None
    return parameters_hash(ddp.module), [*seen, session.last["step"]]


def train_all_on_a_late_device(
    rank: int, directory: str, stepping: bool
) -> list[tuple[str, list[int]]]:
    return [
        train_on_a_late_device(rank, method, directory, stepping)
        for method in ("allreduce", "topk12", "netsense")
    ]


@pytest.mark.parametrize("stepping", [True, False])
def test_of_a_late_device_records_are_complete_and_replicas_equal(
    stepping: bool, tmp_path: Path
) -> None:
    first, *others = run_group(train_all_on_a_late_device, 3, str(tmp_path), stepping)
    for number, method in enumerate(("allreduce", "topk12", "netsense")):
        assert all(other[number] == first[number] for other in others), method
        assert first[number][1] == [
            *range(-1, 39),
            39,
        ], "a row comes when the next backward ends, the last one at the end"
        for rank in range(3):
            rows = list(read_records(tmp_path / f"{method}-{rank}"))
            assert [row["step"] for row in rows] == list(range(40))
            assert all(
                row["comm_s"] > 0 and row["compute_s"] > 0 and row["payload_bytes"] > 0
                for row in rows
            )
            assert all((row["loss"] is not None) == stepping for row in rows)
            if stepping:  # pauses belong to no step
                assert sum(row["step_s"] for row in rows) < rows[-1]["t_s"] - 39 * 0.002


def ask_a_late_device(rank: int) -> list[bool]:
    """Whenever a moment of the device was asked for: had the newest backward handed over its last
    bucket?"""
    handed_over, asked = [False], []

    class Asked(LateClock):
        def seconds(self, mark: Any) -> float:
            asked.append(handed_over[-1])
            return super().seconds(mark)

    def hook(session, bucket):  # DDP refuses other annotations than its own
        handed_over.append(bucket.is_last())
        return comm_hook(session, bucket)

    for method in ("allreduce", "netsense"):
        with mock.patch.object(netsenseml.hook, "Clock", Asked):
            ddp = make_ddp()
            session = Session(ddp, method)
        ddp.register_comm_hook(session, hook)
        for batch in batches(rank, 6):
            session.step(backward(ddp, batch), samples=8)
        session.close()
    assert handed_over.count(False) > 6, "one bucket tells nothing"
    return asked


def test_the_cpu_waits_for_a_late_device_only_when_all_of_a_backward_is_submitted() -> None:
    for asked in run_group(ask_a_late_device, 2):
        assert len(asked) > 6 and all(asked)
