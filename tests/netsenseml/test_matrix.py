"""What DistributedDataParallel is used together with: every line trains as it does without a hook.

docs/reference/compatibility.md is made of these tests, and of those elsewhere that ``LINES`` names,
by compatibility.py.
"""

import contextlib
import math
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from compatibility import table_lines
from groups import run_group, wait_for_others
from small_models import batches
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.nn.functional import all_reduce
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import netsenseml

Attach = Callable[..., Any]
"""Makes a session of a model; of plain DDP, what stands for one."""


class Nothing:
    """In place of a session."""

    def step(self, *_: Any, **__: Any) -> bool:
        return True

    def close(self) -> None:
        pass


class Case(NamedTuple):
    """A method, and how far the parameters may be from those of plain DDP, over how far training
    has moved them."""

    method: str
    options: dict[str, Any]
    off: float


ALLREDUCE = Case("allreduce", {}, 0.0)
# through codec, memory and groups of our own, but exact
ALL_SENT = Case("topk", {"ratio": 1.0, "values": "fp32"}, 1e-5)
CASES = [
    ALLREDUCE,
    ALL_SENT,
    Case("quantized", {"values": "int8"}, 0.03),
    Case("netsense", {"policy": "fixed", "schemes": ["int8", "sparse-bf16@30%", "allreduce"]}, 0.5),
]
STEPS = 5


def layers(*between: nn.Module, width: int = 40) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, width),
        nn.ReLU(),
        *between,
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 5),
    )


def wrap(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **{"bucket_cap_mb": 0.005, **options})


def train(
    rank: int,
    model: nn.Module,
    session: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    before_step: Callable[[int], object] = lambda step: None,
    x_as: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> Iterator[torch.Tensor]:
    """Parameters before and after ``STEPS`` steps."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    yield flat(model)
    for step, (x, y) in enumerate(batches(rank, STEPS)):
        before_step(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x_as(x)).float(), y)
        loss.backward()
        optimizer.step()
        session.step(loss, samples=len(x))
    session.close()
    yield flat(model)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1).double() for parameter in model.parameters()])


Trained = Iterator[torch.Tensor]


# --- the lines


COMPILER = os.environ.get("NETSENSE_COMPILER", "eager")
"""Backend of torch.compile; "inductor", its default, takes half a minute."""
SPLIT = {"width": 600}
"""A model that is compiled in several graphs, as it has several buckets of at least a megabyte."""


def compiled_ddp(rank: int, attach: Attach) -> Trained:
    torch._dynamo.reset()
    ddp = torch.compile(wrap(layers(**SPLIT), bucket_cap_mb=1), backend=COMPILER)
    return train(rank, ddp, attach(ddp))


def compiled_modules(rank: int, attach: Attach) -> Trained:
    torch._dynamo.reset()
    model = layers(**SPLIT)
    for i in (0, 2):
        model[i] = torch.compile(model[i], backend=COMPILER)
    return train(rank, ddp := wrap(model, bucket_cap_mb=1), attach(ddp))


class Heads(nn.Module):
    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(20, 40)
        self.heads = nn.ModuleList(nn.Linear(40, 5) for _ in range(heads))
        self.head = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads[self.head](self.trunk(x).relu())


def static_graph(rank: int, attach: Attach) -> Trained:
    # of which two heads are never used
    return train(rank, ddp := wrap(Heads(), static_graph=True), attach(ddp))


def unused_parameters(rank: int, attach: Attach) -> Trained:
    model = Heads()
    ddp = wrap(model, find_unused_parameters=True)
    return train(
        rank, ddp, attach(ddp), before_step=lambda step: setattr(model, "head", (step + rank) % 3)
    )


def frozen_and_again(rank: int, attach: Attach) -> Trained:
    model = layers()
    ddp = wrap(model, find_unused_parameters=True)
    return train(
        rank, ddp, attach(ddp), before_step=lambda step: model[0].requires_grad_(step not in (1, 2))
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 20)
        self.last = nn.Linear(20, 5)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def shared_parameters(rank: int, attach: Attach) -> Trained:
    return train(rank, ddp := wrap(Tied()), attach(ddp))


def accumulate(rank: int, attach: Attach, *, synchronise: bool) -> Trained:
    ddp = wrap(layers())
    session = attach(ddp)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    yield flat(ddp)
    for _ in range(3):
        optimizer.zero_grad()
        for i, (x, y) in enumerate(batches(rank, 3)):
            with contextlib.nullcontext() if synchronise or i == 2 else ddp.no_sync():
                nn.functional.cross_entropy(ddp(x), y).backward()
        optimizer.step()
        session.step()
    session.close()
    yield flat(ddp)


def accumulated_without_exchange(rank: int, attach: Attach) -> Trained:
    return accumulate(rank, attach, synchronise=False)


def accumulated_with_exchange(rank: int, attach: Attach) -> Trained:
    return accumulate(rank, attach, synchronise=True)


def scaled_autocast(rank: int, attach: Attach) -> Trained:
    """In the third step rank 1 alone overflows; all leave it out."""
    ddp = wrap(layers())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    session = attach(ddp, scaler=scaler)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    yield flat(ddp)
    for step, (x, y) in enumerate(batches(rank, STEPS)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(ddp(x), y)
        before = flat(ddp)
        scaler.scale(loss * math.inf if (step, rank) == (2, 1) else loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(ddp.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        session.step(loss)
        assert torch.equal(flat(ddp), before) == (step == 2)
    session.close()
    yield flat(ddp)


def bfloat16_model(rank: int, attach: Attach) -> Trained:
    return train(rank, ddp := wrap(layers().bfloat16()), attach(ddp), x_as=torch.Tensor.bfloat16)


def channels_last(rank: int, attach: Attach) -> Trained:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(5, 6, 2), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.Flatten(), nn.LazyLinear(5)
    )
    model(torch.zeros(1, 5, 2, 2))
    model = model.to(memory_format=torch.channels_last)
    ddp = wrap(model, gradient_as_bucket_view=True)
    return train(
        rank,
        ddp,
        attach(ddp),
        x_as=lambda x: x.view(8, 5, 2, 2).contiguous(memory_format=torch.channels_last),
    )


class Centred(nn.Module):
    """Exchanges in forward and backward itself, in DDP's group, as SyncBatchNorm does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - all_reduce(x.mean(dim=0)) / dist.get_world_size()


def collectives_in_backward(rank: int, attach: Attach) -> Trained:
    return train(rank, ddp := wrap(layers(Centred())), attach(ddp))


def synchronised_batch_norm(rank: int, attach: Attach) -> Trained:
    ddp = wrap(nn.SyncBatchNorm.convert_sync_batchnorm(layers(nn.BatchNorm1d(40))).cuda())
    return train(rank, ddp, attach(ddp), x_as=torch.Tensor.cuda)


def join(rank: int, attach: Attach) -> Trained:
    """Rank 1 runs out of batches first."""
    ddp = wrap(layers())
    session = attach(ddp)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    yield flat(ddp)
    with Join([ddp]):
        for x, y in batches(rank, 3 + 2 * (1 - rank)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(x), y).backward()
            optimizer.step()
            session.step()
    session.close()
    yield flat(ddp)


def zero_redundancy(rank: int, attach: Attach) -> Trained:
    ddp = wrap(layers())
    session = attach(ddp)
    optimizer = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    yield from train(rank, ddp, session, optimizer=optimizer)
    assert isinstance(session, Nothing) or session.state_dict()["lr"] == 0.1, (
        "no learning rate is followed"
    )


def clipped(rank: int, attach: Attach) -> Trained:
    ddp = wrap(layers())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(ddp.parameters(), 0.3) and None
    )
    return train(rank, ddp, attach(ddp), optimizer=optimizer)


def two_models(rank: int, attach: Attach) -> Trained:
    """Of which one is trained on what the other returns, and the other by what the one says of
    that."""
    one, other = wrap(layers()), wrap(layers())
    sessions = attach(one), attach(other)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (one, other)]
    yield torch.cat([flat(one), flat(other)])
    for x, y in batches(rank, STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        made = nn.functional.pad(one(x), (0, 15))
        (
            nn.functional.cross_entropy(other(made), y) + nn.functional.cross_entropy(other(x), y)
        ).backward()
        for optimizer, session in zip(optimizers, sessions, strict=True):
            optimizer.step()
            session.step()
    for session in sessions:
        session.close()
    yield torch.cat([flat(one), flat(other)])


def sub_group(rank: int, attach: Attach) -> Trained:
    """Ranks 0 and 2 of three."""
    group = dist.new_group([0, 2])
    if rank != 1:
        yield from train(rank, ddp := wrap(layers(), process_group=group), attach(ddp))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant = layers(), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[:2](x)
        return self.layers[4:](checkpoint(self.layers[2:4], hidden, use_reentrant=self.reentrant))


def activation_checkpoints(rank: int, attach: Attach) -> Trained:
    return train(rank, ddp := wrap(Checkpointed(False)), attach(ddp))


def reentrant_checkpoints(rank: int, attach: Attach) -> Trained:
    return train(rank, ddp := wrap(Checkpointed(True)), attach(ddp))


class WithParameter(nn.Module):
    def __init__(self, elements: int, model: nn.Module | None = None) -> None:
        super().__init__()
        self.own, self.model = nn.Parameter(torch.ones(elements)), model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, :5] if self.model is None else self.model(x)) * (1 + self.own[:5].sum())


def empty_parameters(rank: int, attach: Attach) -> Trained:
    return train(rank, ddp := wrap(WithParameter(0, layers())), attach(ddp))


def scalar_parameters(rank: int, attach: Attach) -> Trained:
    return train(rank, ddp := wrap(WithParameter(1)), attach(ddp))


def huge_parameters(rank: int, attach: Attach) -> Trained:
    ddp = wrap(WithParameter(100_000_000))
    return (part[:5] for part in train(rank, ddp, attach(ddp)))


def another_time(rank: int, attach: Attach) -> Trained:
    """All groups are destroyed and made again, beside a session that is still open."""
    for _ in range(2):
        left_open = wrap(layers())
        attach(left_open)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            told = [free.getsockname()[1]]
        dist.broadcast_object_list(told)
        dist.destroy_process_group()
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{told[0]}", rank=rank, world_size=2
        )
        states = list(train(rank, ddp := wrap(layers()), attach(ddp)))
    return iter(states)


# --- and the tests


class Line(NamedTuple):
    """name: in the table. run: (rank, attach) -> parameters before and after. elsewhere: tests that
    are about it as well. passed: what it means that all have passed."""

    name: str
    run: Callable[[int, Attach], Trained] | None = None
    cases: Sequence[Case] = CASES
    ranks: int = 2
    elsewhere: Sequence[str] = ()
    passed: str = "works"


LINES = [
    Line("`torch.compile(ddp)`", compiled_ddp, [ALL_SENT]),
    Line("compiled modules in a model", compiled_modules, [ALL_SENT]),
    Line("`static_graph=True`", static_graph),
    Line(
        "`find_unused_parameters=True`",
        unused_parameters,
        elsewhere=[
            "test_session.py::test_of_heads_that_take_turns_nothing_is_lost",
            "test_methods.py::test_nothing_is_lost",
        ],
    ),
    Line(
        "layers that are frozen, and trained again",
        frozen_and_again,
        elsewhere=["test_session.py::test_only_what_is_trained_counts"],
    ),
    Line("shared parameters", shared_parameters),
    Line(
        "embeddings with sparse gradients",
        elsewhere=[
            "test_session.py::test_sparse_and_complex_gradients_are_refused_where_they_cannot_be_exchanged"
        ],
        passed="refused in one line; `sparse=False` works",
    ),
    Line(
        "gradient accumulation with `no_sync`",
        accumulated_without_exchange,
        elsewhere=["test_methods.py::test_nothing_is_lost"],
    ),
    Line("gradient accumulation without it", accumulated_with_exchange),
    Line(
        "autocast with GradScaler, also in steps that overflow",
        scaled_autocast,
        elsewhere=[
            "test_session.py::test_of_steps_that_the_scaler_leaves_out_nothing_is_lost",
            "test_session.py::test_optimizers_may_leave_steps_out_by_themselves",
        ],
    ),
    Line(
        "models in bfloat16",
        bfloat16_model,
        [Case(case.method, case.options, max(case.off, 0.05)) for case in CASES],
        elsewhere=["test_methods.py::test_gradients_in_bfloat16"],
    ),
    Line("`channels_last`, `gradient_as_bucket_view=True`", channels_last),
    Line("layers with collectives of their own in backward", collectives_in_backward),
    Line("SyncBatchNorm", synchronised_batch_norm),
    Line("`Join` with uneven inputs", join),
    Line("ZeroRedundancyOptimizer", zero_redundancy),
    Line(
        "clipping after the exchange",
        clipped,
        elsewhere=["test_methods.py::test_resume_from_a_checkpoint"],
    ),
    Line("two models in one process", two_models),
    Line(
        "a model on part of the ranks",
        sub_group,
        ranks=3,
        elsewhere=[
            "test_session.py::test_sessions_that_come_and_go_among_part_of_the_ranks_leave_nothing"
        ],
    ),
    Line("activation checkpoints", activation_checkpoints),
    Line("activation checkpoints, `use_reentrant=True`", reentrant_checkpoints),
    Line(
        "parameters of 0 elements", empty_parameters, [*CASES, Case("powersgd", {"rank": 2}, 0.5)]
    ),
    Line("parameters of 1 element", scalar_parameters),
    Line("parameters of 10^8 elements", huge_parameters, [ALL_SENT]),
    Line(
        "complex parameters",
        elsewhere=[
            "test_session.py::test_sparse_and_complex_gradients_are_refused_where_they_cannot_be_exchanged"
        ],
        passed="with `allreduce`; others refuse in one line",
    ),
    Line(
        "a rank that raises",
        elsewhere=[
            "test_failures.py::test_a_rank_that_raises_tells_the_others_why",
            "test_session.py::test_of_a_rank_that_broke_alone_nobody_waits_for_ever",
        ],
        passed="all others end with one line that names it",
    ),
    Line(
        "a rank that is killed",
        elsewhere=[
            "test_failures.py::test_backward_raises_one_error_that_names_the_rank",
            "test_failures.py::test_the_error_comes_soon_after_the_time_out",
        ],
        passed="all others end with one line that names it",
    ),
    Line(
        "sessions that come and go, groups destroyed and made again",
        another_time,
        elsewhere=["test_methods.py::test_closing_leaves_no_process_group"],
    ),
    Line(
        "`fully_shard` on replicas of shards (FSDP2)",
        elsewhere=[
            "test_fsdp.py::test_replicas_are_equal_and_end_where_those_of_fsdp_do",
            "test_fsdp.py::test_resume_from_a_distributed_checkpoint_is_as_without_a_break",
        ],
    ),
    Line(
        "Accelerate", elsewhere=["test_snippets.py::test_the_blocks_of_the_page_train[Accelerate]"]
    ),
    Line("Lightning", elsewhere=["test_snippets.py::test_the_blocks_of_the_page_train[Lightning]"]),
]


States = list[tuple[np.ndarray, ...]]
"""Parameters before and after, of plain DDP and of every case; nothing of a rank that takes no
part."""


def run_lines(rank: int, names: Sequence[str]) -> dict[str, States | str]:
    """By line its states, or the traceback of the first one that fails: after that, ranks need not
    be together."""

    def attach(case: Case) -> Attach:
        return lambda model, **options: netsenseml.attach(
            model, case.method, **case.options, **options
        )

    found: dict[str, States | str] = {}
    for line in LINES:
        if line.name not in names:
            continue
        assert line.run is not None
        try:
            made = [lambda *_, **__: Nothing(), *map(attach, line.cases)]
            found[line.name] = [
                tuple(state.numpy() for state in line.run(rank, one)) for one in made
            ]
        except Exception:
            found[line.name] = traceback.format_exc()
            break
    wait_for_others("lines")
    return found


@pytest.fixture(scope="module")
def lines(request: pytest.FixtureRequest) -> dict[str, list[States | str]]:
    """Of every rank, of all lines that are to be tested: in as few groups as possible, as ranks
    take longer to start."""
    asked = {
        item.callspec.params.get("name")
        for item in request.session.items
        if hasattr(item, "callspec")
    }
    chosen = [
        line
        for line in LINES
        if line.run is not None and line.name in asked and skipped(line) is None
    ]
    found = {}
    for size in sorted({line.ranks for line in chosen}):
        names = [line.name for line in chosen if line.ranks == size]
        ranks = run_group(run_lines, size, names, timeout_s=60)
        found |= {
            name: [rank[name] for rank in ranks]
            for name in names
            if all(name in rank for rank in ranks)
        }
    return found


def skipped(line: Line) -> str | None:
    if line.run is synchronised_batch_norm and not torch.cuda.is_available():
        return "PyTorch's own takes no tensors of a CPU"
    if line.run is huge_parameters and "NETSENSE_HUGE" not in os.environ:
        return "takes 8 GB; NETSENSE_HUGE=1 runs it"
    return None


@pytest.mark.parametrize("name", [line.name for line in LINES if line.run is not None])
def test_as_without_a_hook(name: str, lines: dict[str, list[States | str]]) -> None:
    (line,) = (line for line in LINES if line.name == name)
    if (why := skipped(line)) is not None:
        pytest.skip(why)
    assert name in lines, "not run, as one before it failed"
    assert not (failed := [states for states in lines[name] if isinstance(states, str)]), "\n".join(
        failed
    )
    ranks = [states for states in lines[name] if states[0]]
    plain, *_ = ranks
    moved = np.linalg.norm(plain[0][1] - plain[0][0])
    assert moved > 0
    for i, case in enumerate([Case("plain", {}, 0.0), *line.cases]):
        assert all(np.array_equal(states[i][1], plain[i][1]) for states in ranks), (
            f"{case.method}: replicas differ"
        )
        off = np.linalg.norm(plain[i][1] - plain[0][1]) / moved
        assert off <= case.off, f"{case.method} is off by {off:.3g} of what training moved"


def test_the_page_has_every_line_and_no_other() -> None:
    page = Path(__file__).parents[2] / "docs/reference/compatibility.md"
    assert table_lines(page.read_text()) == [line.name for line in LINES]
