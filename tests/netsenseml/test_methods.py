"""Methods at work in DDP over real Gloo groups."""

import contextlib
import io
import itertools
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import run_group
from small_models import ELEMENTS, backward, batches, flat_gradient, make_ddp, parameters_hash
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from netsenseml import Session, attach, comm_hook
from netsenseml.methods import AllReduce
from netsenseml.records import STEP_COLUMNS, read_records

EXACT = [  # nothing is lost: what was not sent is kept to the last bit of rounding
    ("allreduce", {}),
    ("topk", {"ratio": 0.05}),
    ("topk", {"ratio": 0.05, "values": "int4"}),
    ("topk", {"ratio": 1.0, "values": "fp32"}),
    ("randomk", {"ratio": 0.1}),
    ("dgc", {"ratio": 0.05, "momentum": 0.0, "warmup": 4}),
    ("quantized", {"values": "int8"}),
    ("quantized", {"values": "int4"}),
    ("quantized", {"values": "bf16"}),
    ("signsgd", {}),
    ("demo", {"decay": 1.0, "chunk": 16, "topk": 8}),
    ("netsense", {}),
    ("netsense", {"policy": "bdp", "start": 0.05}),
    (
        "netsense",
        {"policy": "fixed", "schemes": ["int4", "allreduce", "allreduce", "sparse-int8@2%"]},
    ),
]
ROUNDED = [("bf16", {}), ("fp16", {})]
METHODS = [
    *EXACT,
    *ROUNDED,
    ("dgc", {"ratio": 0.05}),
    ("qsgd", {"bits": 8}),
    ("qsgd", {"bits": 4}),
    ("powersgd", {"rank": 2}),
    ("demo", {"chunk": 16, "topk": 8, "values": "int4", "update": "sign"}),
]


class Twice(AllReduce):
    """A method of the user's own, with an option."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, factor: float) -> None:
        super().__init__(module, group)
        self.factor = factor

    def exchange(self, bucket: Any, statistics: Any) -> Any:
        bucket.buffer().mul_(self.factor)
        return super().exchange(bucket, statistics)


def train_30_steps(rank: int, method: str, options: dict[str, Any]) -> tuple[str, list[float]]:
    ddp = make_ddp()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    session = attach(ddp, method, **options)
    ratios = []
    for step, (x, y) in enumerate(batches(rank, 30)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(x), y).backward()
        optimizer.step()
        time.sleep(0.002 * (rank == step % 3))  # ranks are not equally fast
        assert session.step(loss=0.0, samples=len(x))
        ratios.append(session.last["ratio"])
    session.close()
    return parameters_hash(ddp.module), ratios


def train_all(rank: int) -> list[tuple[str, list[float]]]:
    return [train_30_steps(rank, method, options) for method, options in METHODS]


def test_replicas_stay_bit_identical_and_agree_on_the_ratio() -> None:
    # one group for all methods, as starting ranks takes longer than training
    first, *others = run_group(train_all, 3)
    for number, method in enumerate(METHODS):
        assert all(other[number] == first[number] for other in others), method


def train_at_ease(rank: int) -> list[tuple[str, float]]:
    ddp = make_ddp()
    session = attach(ddp, "netsense")
    seen = []
    for step, batch in enumerate(batches(rank, 150)):
        backward(ddp, batch)
        time.sleep(0.01 + 0.002 * (rank == step % 3))
        session.step()
        assert session.last is not None
        seen.append((session.last["scheme"], session.last["bandwidth_bps"]))
    session.close()
    return seen


def test_ranks_agree_on_what_they_know_also_while_they_do_not_share_every_step() -> None:
    first, *others = run_group(train_at_ease, 3)
    assert all(other == first for other in others)
    assert first[-1][1] > 0


def exchange_with_reference(
    rank: int, method: str, options: dict[str, Any], accumulate: bool, ddp_options: dict[str, Any]
) -> list[list[float]]:
    """Sums over some steps of the exchanged mean and of the own gradient, and the final
    residual."""
    ddp = make_ddp(**ddp_options)
    reference = nn.Sequential(
        *[
            type(m)(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m
            for m in ddp.module
        ]
    )
    session = Session(ddp, method, **options)
    ddp.register_comm_hook(session, comm_hook)
    exchanged, own = torch.zeros(()), torch.zeros(())
    for step in range(6):
        reference.load_state_dict(ddp.module.state_dict())
        reference.zero_grad()
        ddp.zero_grad()
        parts = list(batches(10 * step + rank, 2))
        for i, (x, y) in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last or not accumulate else ddp.no_sync():
                if last or accumulate:
                    nn.functional.cross_entropy(ddp(x), y).backward()
                    nn.functional.cross_entropy(reference(x), y).backward()
        exchanged = exchanged + flat_gradient(ddp.module)
        own = own + flat_gradient(reference)
        with torch.no_grad():
            for parameter in ddp.parameters():
                parameter -= 0.1 * parameter.grad
        session.step()
        assert session.steps == step + 1
    residuals = session.state_dict().get("feedback", {})
    residual = torch.cat(
        [
            residuals.get(n, torch.zeros_like(p)).reshape(-1)
            for n, p in ddp.module.named_parameters()
        ]
    )
    return [exchanged.tolist(), own.tolist(), residual.tolist()]


def exchange_all(
    rank: int, accumulate: bool, ddp_options: dict[str, Any]
) -> list[list[list[float]]]:
    return [
        exchange_with_reference(rank, *method, accumulate, ddp_options)
        for method in (*EXACT, *ROUNDED)
    ]


@pytest.mark.parametrize(
    ("accumulate", "ddp_options"),
    [
        (False, {}),
        (True, {}),
        (True, {"gradient_as_bucket_view": True, "find_unused_parameters": True}),
    ],
    ids=["every backward", "no_sync", "no_sync, bucket views, unused parameters"],
)
def test_nothing_is_lost(accumulate: bool, ddp_options: dict[str, Any]) -> None:
    """Sum of exchanged means = sum of true means - mean residual: buckets are rebuilt on the way,
    ranks share indices."""
    ranks = run_group(exchange_all, 3, accumulate, ddp_options)
    for number, method in enumerate((*EXACT, *ROUNDED)):
        exchanged, own, residual = (
            torch.tensor([rank[number][i] for rank in ranks]) for i in range(3)
        )
        assert torch.equal(exchanged, exchanged[:1].expand_as(exchanged)), method
        tolerance = (
            {"rtol": 2e-2, "atol": 2e-3} if method in ROUNDED else {"rtol": 1e-4, "atol": 1e-6}
        )
        torch.testing.assert_close(
            exchanged[0], (own - residual).mean(dim=0), **tolerance, msg=str(method)
        )
        if method[1].get("ratio") == 1.0:
            assert not residual.any()


class Watched(AllReduce):
    """Tells what it could learn from."""

    def finish(self, statistics: Any) -> None:
        spent = statistics.of_backward()
        seen.append((tuple(spent.bucket_elements), len(spent.ready_s), spent.payload_bytes))


seen: list[tuple[tuple[int, ...], int, int]] = []


def several_backwards(rank: int) -> list[tuple[tuple[int, ...], int, int]]:
    ddp = make_ddp()
    session = Session(ddp, f"{__name__}:Watched")
    ddp.register_comm_hook(session, comm_hook)
    for step, batch in enumerate(batches(rank, 8)):
        for _ in range(2):
            backward(ddp, batch)
        if not (step == 4 and rank == 0):  # a rank may leave a step out
            session.step()
    session.close()
    return seen


def test_a_step_may_have_several_backwards_and_each_is_learnt_from_by_itself() -> None:
    first, second = run_group(several_backwards, 2)
    assert first == second and len(first) == 16
    assert all(
        sum(buckets) == ELEMENTS and payload == 4 * ELEMENTS for buckets, _, payload in first
    )
    assert all(len(buckets) == ready for buckets, ready, _ in first)
    rebuilt = first[1:]  # after its first backward DDP arranges the buckets anew
    assert len(set(rebuilt)) == 1 and len(rebuilt[0][0]) > 1


def one_checkpoint_for_all(rank: int) -> list[str]:
    """Only rank 0 asks for its state, and all go on from an older checkpoint."""
    ddp = make_ddp()
    session = attach(ddp, "netsense")
    for step, (x, y) in enumerate(batches(rank, 90)):
        nn.functional.cross_entropy(ddp(x), y).backward()
        time.sleep(0.004)
        session.step()
        if step == 40:
            older = session.state_dict()
        if step == 60:
            if rank == 0:
                session.state_dict()
            session.load_state_dict(older)
    session.close()
    messages = []
    policies = {"floor": 0.01}, {"policy": "bdp"}, {"policy": "fixed", "schemes": ["int8"]}
    for options, state in (
        *((options, older) for options in policies),
        ({}, {**older, "fits": []}),
    ):
        with pytest.raises(ValueError) as refused:
            attach(make_ddp(), "netsense", **options).load_state_dict(state)
        messages.append(str(refused.value))
    return messages


def test_ranks_stay_together_when_they_go_back_and_checkpoints_of_others_are_refused_in_one_line() -> (
    None
):
    for messages in run_group(one_checkpoint_for_all, 2):
        for message in messages:
            assert (
                "the checkpoint is of" in message
                and "go on without" in message
                and "\n" not in message
            )


PAUSE_S = 0.4


def records_of(rank: int, directory: str, explicit: bool) -> list[dict[str, Any]]:
    ddp = make_ddp()
    path = Path(directory, f"{explicit}-{rank}.jsonl")
    session = attach(ddp, "topk", ratio=0.1, record=path)
    for batch in batches(rank, 4):
        loss = backward(ddp, batch)
        time.sleep(0.05)
        if explicit:
            assert session.step(loss, samples=8) is True
            with session.pause():
                time.sleep(PAUSE_S)
    session.close()
    return list(read_records(path))


@pytest.mark.parametrize("explicit", [True, False], ids=["session.step", "no session.step"])
def test_records(tmp_path: Path, explicit: bool) -> None:
    for rank, rows in enumerate(run_group(records_of, 2, str(tmp_path), explicit)):
        assert [row["step"] for row in rows] == [0, 1, 2, 3]
        for row in rows:
            assert row.keys() == STEP_COLUMNS.keys()
            assert row["rank"] == rank and row["scheme"] == "sparse-bf16@10%"
            assert row["dense_bytes"] == 4 * ELEMENTS  # 2 (n - 1) / n = 1 for two ranks
            # and headers
            assert row["payload_bytes"] == pytest.approx(2.8 * 0.1 * ELEMENTS, rel=0.15)
            assert row["ratio"] == pytest.approx(0.1, rel=0.02)
            assert row["compute_s"] + row["comm_s"] == pytest.approx(row["step_s"])
            assert 0 < row["lost_energy"] < 1 < row["residual_ratio"] + 1
            assert row["bandwidth_bps"] is row["rtt_s"] is row["min_rtt_s"] is None
            assert (row["loss"] is not None, row["samples"]) == (
                (True, 8) if explicit else (False, None)
            )
        for before, row in itertools.pairwise(rows):
            assert row["step_s"] >= 0.05 and 0 < row["encode_s"] < row["step_s"]
            pause_s = PAUSE_S if explicit else 0  # a pause belongs to no step
            assert row["step_s"] <= row["t_s"] - before["t_s"] - pause_s + 1e-3


def resume(rank: int, method: str, options: dict[str, Any]) -> bool:
    """Whether 3 steps, a checkpoint and 3 steps are, bit by bit, 6 steps without a break."""

    def steps(ddp: DistributedDataParallel, data: list[Any]) -> None:
        for x, y in data:
            ddp.zero_grad()
            nn.functional.cross_entropy(ddp(x), y).backward()
            nn.utils.clip_grad_norm_(ddp.parameters(), 0.5)
            with torch.no_grad():
                for parameter in ddp.parameters():
                    parameter -= 0.1 * parameter.grad

    data = list(batches(rank, 6))
    straight = make_ddp(bucket_cap_mb=25)
    attach(straight, method, **options)
    steps(straight, data)
    before = make_ddp(bucket_cap_mb=25)
    session = attach(before, method, **options)
    steps(before, data[:3])
    kept = io.BytesIO()
    torch.save({"model": before.module.state_dict(), "session": session.state_dict()}, kept)
    kept.seek(0)
    checkpoint = torch.load(kept)
    after = make_ddp(bucket_cap_mb=25)
    session = attach(after, method, **options)
    steps(after, data[:1])  # after its first backward DDP arranges the gradients for good
    after.module.load_state_dict(checkpoint["model"])
    session.load_state_dict(checkpoint["session"])
    steps(after, data[3:])
    return parameters_hash(after.module) == parameters_hash(straight.module)


RESUMED = [
    ("powersgd", {"rank": 2}),
    ("topk", {"ratio": 0.05}),
    ("quantized", {"values": "int4"}),
    ("dgc", {"ratio": 0.05, "warmup": 5}),
    ("randomk", {"ratio": 0.1}),
    ("demo", {"chunk": 16, "topk": 8}),
    (
        "netsense",
        {
            "policy": "fixed",
            "schemes": ["int8", "sparse-int4@5%", "allreduce", "allreduce", "sparse-int8@2%"],
        },
    ),
]


def resume_all(rank: int) -> list[bool]:
    return [resume(rank, method, options) for method, options in RESUMED]


def test_resume_from_a_checkpoint() -> None:
    assert run_group(resume_all, 2) == [[True] * len(RESUMED)] * 2


def low_precision(rank: int, method: str, options: dict[str, Any]) -> tuple[str, float]:
    """A model in bfloat16, whose gradients and buckets are of that type, too; (hash of the
    parameters, last loss)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 5)).to(torch.bfloat16)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.01)
    session = attach(ddp, method, **options)
    x, y = next(batches(rank, 1))
    for _ in range(20):
        ddp.zero_grad()
        loss = nn.functional.cross_entropy(ddp(x.bfloat16()).float(), y)
        loss.backward()
        with torch.no_grad():
            for parameter in ddp.parameters():
                parameter -= 0.1 * parameter.grad
        session.step(loss)
    session.close()
    return parameters_hash(model), loss.item()


LOW_PRECISION = [("topk", {"ratio": 0.3}), ("netsense", {}), ("quantized", {}), ("fp16", {})]


def low_precision_all(rank: int) -> list[tuple[str, float]]:
    return [low_precision(rank, method, options) for method, options in LOW_PRECISION]


def test_gradients_in_bfloat16() -> None:
    for method, (first, loss), (second, _) in zip(
        LOW_PRECISION, *run_group(low_precision_all, 2), strict=True
    ):
        assert first == second, method
        assert loss < 1.5, method  # 1.6 is a guess


def overflow(rank: int) -> dict[str, list[int]]:
    """Steps of 12 with a gradient that is not finite, after rank 0 had an overflow at step 3, and
    rank 1 a NaN at step 7."""
    found = {}
    for method, options in [
        *METHODS,
        ("topk12", {"ratio": 0.1}),
        ("dgc", {"ratio": 1.0, "values": "int8"}),
    ]:
        ddp = make_ddp()
        session = attach(ddp, method, **options)
        bad = []
        for step, (x, y) in enumerate(batches(rank, 12)):
            ddp.zero_grad()
            loss = nn.functional.cross_entropy(ddp(x), y)
            (loss * {(3, 0): math.inf, (7, 1): math.nan}.get((step, rank), 1.0)).backward()
            gradient = flat_gradient(ddp.module)
            if not gradient.isfinite().all():
                bad.append(step)
            if gradient.isfinite().all():
                with torch.no_grad():
                    for parameter in ddp.parameters():
                        parameter -= 0.01 * parameter.grad
            session.step()
        session.close()
        found[f"{method} {options}"] = bad
    return found


def test_an_overflow_is_seen_once_and_forgotten() -> None:
    for found in run_group(overflow, 2):
        assert all(steps == [3, 7] for steps in found.values()), found


class LateGradient(nn.Module):
    """Its second matrix has no gradient before the first has grown, as with low-rank adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(20, 40, bias=False), nn.Linear(40, 20, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


def train_late(rank: int) -> list[tuple[bool, float]]:
    found = []
    for method, options in METHODS:
        torch.manual_seed(0)
        ddp = DistributedDataParallel(LateGradient(), bucket_cap_mb=0.001)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.0)
        session = attach(ddp, method, **options)
        finite = True
        for step, (x, _) in enumerate(batches(rank, 12)):
            optimizer.param_groups[0]["lr"] = 0.0 if step < 5 else 0.1
            optimizer.zero_grad()
            (ddp(x) - x).square().mean().backward()
            finite &= bool(flat_gradient(ddp.module).isfinite().all())
            optimizer.step()
            session.step()
        session.close()
        found.append((finite, float(ddp.module.down.weight.grad.norm())))
    return found


def test_a_gradient_may_be_zero_for_a_while() -> None:
    for found in run_group(train_late, 2):
        for method, (finite, late) in zip(METHODS, found, strict=True):
            assert finite and late > 0, method


def open_things(rank: int) -> tuple[int, int]:
    counts = []
    for _ in range(4):
        ddp = make_ddp()
        session = attach(ddp, "netsense")
        x, y = next(batches(rank, 1))
        nn.functional.cross_entropy(ddp(x), y).backward()
        session.step()
        session.close()
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    return counts[0], counts[-1]


def test_closing_leaves_no_process_group() -> None:
    for first, last in run_group(open_things, 2):
        assert last <= first + 2


def train_by_powersgd(rank: int) -> int:
    session = attach(ddp := make_ddp(), "powersgd", rank=2)
    for x, y in batches(rank, 4):
        nn.functional.cross_entropy(ddp(x), y).backward()
        session.step()
    session.close()
    return session.steps


def powersgd_in_turn(rank: int) -> int:
    return sum(train_by_powersgd(rank) for _ in range(40))


def test_a_group_is_not_given_up_by_a_thread_of_its_own() -> None:
    # The group would wait there for its own thread and abort the process.
    assert run_group(powersgd_in_turn, 2) == [160, 160]


def statistics_of(rank: int) -> str:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(
        nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    )
    attach(ddp, "allreduce")
    for x, y in batches(rank, 2):
        nn.functional.cross_entropy(ddp(x), y).backward()
    return parameters_hash(ddp.module)


def test_running_statistics_do_not_make_replicas_differ() -> None:
    first, second = run_group(statistics_of, 2)
    assert first == second


def use_of_own_method(rank: int) -> tuple[list[float], list[float]]:
    gradients = []
    for method, options in (("allreduce", {}), ("test_methods:Twice", {"factor": 2.0})):
        ddp = make_ddp()
        attach(ddp, method, **options)
        x, y = next(batches(rank, 1))
        nn.functional.cross_entropy(ddp(x), y).backward()
        gradients.append(flat_gradient(ddp.module).tolist())
    return gradients[0], gradients[1]


def test_a_method_of_ones_own() -> None:
    for plain, twice in run_group(use_of_own_method, 2):
        assert twice == pytest.approx([2 * value for value in plain])


def errors_of(rank: int) -> list[str]:
    found = []
    for method, options in (
        (None, {}),
        ("topkk", {}),
        ("topk", {"rate": 1}),
        ("no.such.module:Method", {}),
        ("netsenseml.methods:Nothing", {}),
        ("netsense", {"policy": "fixed", "schemes": ["int9"]}),
        ("netsense", {"policy": "best"}),
    ):
        with pytest.raises(ValueError) as error:
            attach(make_ddp(), method, **options)
        found.append(str(error.value))
    return found


def test_errors_name_the_choices() -> None:
    (errors,) = run_group(errors_of, 1)
    assert all("\n" not in error for error in errors)
    for error, said in zip(
        errors,
        (
            "no method: call attach",
            "choose from topk",
            "its options: ratio",
            "no.such.module",
            "Nothing",
            "int8",
            "progress, bdp, kimad",
        ),
        strict=True,
    ):
        assert said in error


def single_rank(rank: int) -> str:
    ddp = make_ddp()
    session = attach(ddp, "netsense")
    for x, y in batches(rank, 3):
        nn.functional.cross_entropy(ddp(x), y).backward()
        session.step()
    session.close()
    return session.last["scheme"]


def test_a_single_rank_has_nobody_to_talk_to() -> None:
    assert run_group(single_rank, 1) == ["allreduce"]
