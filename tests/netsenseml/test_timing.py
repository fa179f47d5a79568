"""netsense decides when to exchange, too: local steps, delayed means, and the ways into them and
out of them."""

import contextlib
import io
import itertools
import random
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from groups import run_group
from simulation import Job, World
from small_models import LateClock, backward, batches, make_ddp, parameters_hash
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import netsenseml.hook
from netsenseml import attach
from netsenseml.catalog import check_method
from netsenseml.control.policy import split_timing, with_timing
from netsenseml.exchange.mesh import Topology

STEPS = 300
LR, MOMENTUM = 0.05, 0.9


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-2)
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def at_random(seed: int) -> list[str]:
    """Schemes with and without intervals and delays, another one every few steps."""
    draw, names = random.Random(seed), list[str]()
    while len(names) < STEPS:
        scheme = draw.choice(
            ["allreduce", "int8", "int4-ring", "bf16", "sparse-int4@20%", "sparse-int4@5%-ring"]
        )
        interval, delay = draw.choice([0, 0, 1, 2, 3, 5, 8]), draw.choice([0, 1])
        delay = 1 if interval == 1 else delay
        names += [with_timing(scheme, interval, delay)] * draw.randint(1, 12)
    return names[:STEPS]


class Told(NamedTuple):
    """Of a step. equal, optimizers: whether parameters are equal behind it, and the optimizers'
    states. sent: whether something has arrived. back: whether it is the way back to gradients."""

    equal: bool
    optimizers: bool
    sent: bool
    back: bool


def synchronised(schemes: list[str]) -> list[Told]:
    found, apart, since, late, under_way = [], False, 0, False, False
    for _, interval, delay in map(split_timing, schemes):
        apart, since = apart or interval > 0, since + 1
        if not apart:
            found.append(Told(True, True, late or not delay, False))
            late, since = delay > 0, 0
        elif since < interval:
            found.append(Told(False, False, late, False))
            late = False
        else:
            back = not interval
            found.append(
                Told(back or not delay, back, late or under_way or back or not delay, back)
            )
            apart, since, late, under_way = not back, 0, False, delay > 0 and not back
    return found


def add_to(total: torch.Tensor, gradient: torch.Tensor) -> None:
    total.add_(gradient.reshape(-1))


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def switch_at_random(
    rank: int, name: str
) -> tuple[list[str], list[str], list[list[list[float]]], list[Any]]:
    """Hashes of parameters and of the optimizer after every step; every 50 steps what was put in
    and what became of it, of this rank; rows."""
    ddp = make_ddp()
    optimizer = make_optimizer(name, ddp)
    session = attach(ddp, "netsense", policy="fixed", schemes=at_random(0))
    begin, put_in = (
        flat(ddp.parameters()),
        [torch.zeros(p.numel(), dtype=torch.float64) for p in ddp.parameters()],
    )
    for parameter, total in zip(ddp.parameters(), put_in, strict=True):
        parameter.register_hook(partial(add_to, total))
    hashes, states, kept, rows = [], [], [], []
    for step, batch in enumerate(batches(rank, STEPS)):
        backward(ddp, batch)
        optimizer.step()
        session.step()
        hashes.append(parameters_hash(ddp.module))
        moments = [
            v
            for p in ddp.parameters()
            for k, v in sorted(optimizer.state[p].items())
            if k != "step"
        ]
        states.append(str(hash(tuple(flat(moments).tolist()))))
        rows.append(dict(session.last or {}))
        if name != "adamw" and step % 50 == 49:
            state = session.state_dict()
            named = ddp.module.named_parameters()
            of_gradients = flat(
                state["feedback"].get(key, torch.zeros(p.numel())) for key, p in named
            )
            of_parameters = state["apart"]["kept"].get("parameters", torch.zeros(1)).double()
            # the parameters have the one, and not yet the other
            for (own, *_), (mean, *_), _ in state["apart"]["exchanges"]:
                of_parameters = of_parameters - own.double() + mean.double()
            late = {name: torch.zeros(p.numel()) for name, p in ddp.module.named_parameters()}
            for names, _, mean in state["late"]["under_way"]:
                parts = mean.split([late[name].numel() for name in names])
                late |= dict(zip(names, parts, strict=True))
            velocity = flat(optimizer.state[p]["momentum_buffer"] for p in ddp.parameters())
            moved = (begin - flat(ddp.parameters()) + of_parameters) * (1 - MOMENTUM) / LR
            # v <- m v + g, x <- x - lr v: the sum of g is (1 - m) (sum of v) + m v
            kept.append(
                [
                    torch.cat(put_in).tolist(),
                    (moved + MOMENTUM * velocity + of_gradients + flat(late.values())).tolist(),
                ]
            )
    session.close()
    hashes.append(parameters_hash(ddp.module))
    return hashes, states, kept, rows


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_replicas_are_equal_and_nothing_is_lost_over_any_sequence_of_schemes_intervals_and_delays(
    name: str,
) -> None:
    ranks = run_group(switch_at_random, 3, name)
    schemes = at_random(0)
    for step, told in enumerate(synchronised(schemes)):
        assert (len({hashes[step] for hashes, *_ in ranks}) == 1) == told.equal, (
            step,
            schemes[step],
        )
        if told.optimizers:
            assert len({states[step] for _, states, *_ in ranks}) == 1, (step, schemes[step])
    assert len({hashes[-1] for hashes, *_ in ranks}) == 1
    for own in zip(*(kept for *_, kept, _ in ranks), strict=True):
        put_in, became = torch.tensor(own, dtype=torch.float64).mean(0)
        torch.testing.assert_close(became, put_in, rtol=1e-5, atol=1e-5)
    for _, _, _, rows in ranks:
        for step, (row, told) in enumerate(zip(rows, synchronised(schemes), strict=True)):
            # The way back to an exchange in every step is all-reduce, whatever comes then.
            assert row["scheme"] == ("allreduce" if told.back else schemes[step])
            assert (row["payload_bytes"] > 0) == told.sent, (step, schemes[step])
            if not (told.sent or told.equal):
                assert row["lost_energy"] == 1.0


def add_at_rate(
    total: torch.Tensor, optimizer: torch.optim.Optimizer, gradient: torch.Tensor
) -> None:
    total.add_(gradient.reshape(-1), alpha=optimizer.param_groups[0]["lr"])


def change_the_rate(rank: int, scheme: str) -> tuple[list[str], list[list[list[float]]]]:
    """The rate is now a tenth and now ten times what it was: hashes of parameters after every step;
    every 10 steps what was put in, at its rate, and what became of it, of this rank."""
    ddp = make_ddp()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=LR)
    session = attach(ddp, "netsense", policy="fixed", schemes=[scheme])
    begin, put_in = (
        flat(ddp.parameters()),
        [torch.zeros(p.numel(), dtype=torch.float64) for p in ddp.parameters()],
    )
    for parameter, total in zip(ddp.parameters(), put_in, strict=True):
        parameter.register_hook(partial(add_at_rate, total, optimizer))
    hashes, kept = [], []
    for step, batch in enumerate(batches(rank, 40)):
        rate = optimizer.param_groups[0]["lr"] = LR / 10 if step // 4 % 2 else LR
        backward(ddp, batch)
        optimizer.step()
        session.step()
        hashes.append(parameters_hash(ddp.module))
        if step % 10 == 9:
            state = session.state_dict()
            named = dict(ddp.module.named_parameters())
            late = {name: torch.zeros(p.numel()) for name, p in named.items()}
            for names, _, mean in state["late"]["under_way"]:
                late |= dict(
                    zip(names, mean.split([late[name].numel() for name in names]), strict=True)
                )
            waits = flat(
                state["feedback"].get(name, torch.zeros(p.numel())) for name, p in named.items()
            ) + flat(late.values())
            kept.append(
                [
                    torch.cat(put_in).tolist(),
                    (begin - flat(ddp.parameters()) + rate * waits).tolist(),
                ]
            )
    session.close()
    return hashes, kept


@pytest.mark.parametrize("scheme", ["int8+1", "allreduce+1"])
def test_what_is_under_way_when_the_learning_rate_changes_is_worth_as_much_as_before(
    scheme: str,
) -> None:
    ranks = run_group(change_the_rate, 3, scheme)
    assert all(
        len(set(hashes)) == 1 for hashes in zip(*(hashes for hashes, _ in ranks), strict=True)
    )
    for own in zip(*(kept for _, kept in ranks), strict=True):
        put_in, became = torch.tensor(own, dtype=torch.float64).mean(0)
        torch.testing.assert_close(became, put_in, rtol=1e-5, atol=1e-5)


def step_by_constant_gradients(rank: int) -> list[list[float]]:
    """With plain all-reduce, and apart now and then: parameters in the end."""
    found = []
    for delay in ("", "+1", None):
        schemes = (
            [f"allreduce/3{delay}"] * 7
            + ["allreduce"] * 5
            + [f"allreduce/4{delay}"] * 5
            + ["allreduce"]
        )
        schemes = ["allreduce"] if delay is None else schemes
        torch.manual_seed(0)
        ddp = DistributedDataParallel(nn.Linear(20, 5))
        optimizer, session = (
            make_optimizer("momentum", ddp),
            attach(ddp, "netsense", policy="fixed", schemes=schemes),
        )
        for x, _ in batches(rank, 24):
            optimizer.zero_grad()
            ddp(x).sum().backward()
            optimizer.step()
            session.step()
        session.close()
        found.append(flat(ddp.parameters()).tolist())
    return found


def go_on(rank: int, delay: str) -> list[bool]:
    """Whether 24 steps are, bit by bit, some steps, a checkpoint whose model is that of rank 0 for
    all, and the others."""
    schemes = (
        [f"sparse-int4@20%{delay}"] * 4
        + [f"int4/5{delay}"] * 10
        + [f"int8{delay}"] * 3
        + ["int8/4"]
    )
    data, ends = list(batches(rank, 24)), []
    for cut in (24, 6, 9, 15):
        ddp = make_ddp(bucket_cap_mb=25)
        optimizer, session = (
            make_optimizer("momentum", ddp),
            attach(ddp, "netsense", policy="fixed", schemes=schemes),
        )
        for step, batch in enumerate(data):
            if step == cut:
                kept, shared = io.BytesIO(), [None]
                with session.synchronized():
                    torch.save(
                        {"session": session.state_dict(), "optimizer": optimizer.state_dict()}, kept
                    )
                    shared[0] = {
                        name: value.clone() for name, value in ddp.module.state_dict().items()
                    }
                session.close()
                dist.broadcast_object_list(shared)
                ddp = make_ddp(bucket_cap_mb=25)
                optimizer, session = (
                    make_optimizer("momentum", ddp),
                    attach(ddp, "netsense", policy="fixed", schemes=schemes),
                )
                backward(ddp, data[0])
                kept.seek(0)
                checkpoint = torch.load(kept)
                ddp.module.load_state_dict(shared[0])
                optimizer.load_state_dict(checkpoint["optimizer"])
                session.load_state_dict(checkpoint["session"])
            backward(ddp, batch)
            optimizer.step()
            session.step()
        session.close()
        ends.append(parameters_hash(ddp.module))
    return [end == ends[0] for end in ends[1:]]


def look_in(rank: int) -> tuple[list[list[list[float]]], str]:
    """Running means of this rank and in ``synchronized``, before the first exchange and behind it;
    what an optimizer is told whose state has no mean."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(20, 5), nn.BatchNorm1d(5)))
    optimizer = make_optimizer("momentum", ddp)
    session = attach(
        ddp,
        "netsense",
        policy="fixed",
        schemes=["allreduce"] * 3 + ["int8/4"] * 5 + ["int8"] * 2 + ["int8/4"],
    )
    found, refused = [], ""
    for step, (x, _) in enumerate(batches(rank, 11)):
        optimizer.zero_grad()
        try:
            ddp(x + 3).square().sum().backward()
        except ValueError as error:
            refused = str(error)
            break
        optimizer.step()
        session.step()
        if step in (3, 7):
            means = [ddp.module[1].running_mean.tolist()]
            with session.synchronized():
                means.append(ddp.module[1].running_mean.tolist())
            found.append(means)
        if step == 9:
            optimizer.state[ddp.module[0].weight]["codes"] = torch.zeros(3, dtype=torch.uint8)
    session.close()
    return found, refused


def decide(rank: int) -> list[tuple[str, list[str], list[int]]]:
    """Of an interval and a delay that are given, and such as are chosen: the parameters' hash,
    schemes, bytes."""
    found = []
    for interval, delay in ((4, 0), ("auto", 0), (1, 1), (4, 1), ("auto", "auto")):
        ddp = make_ddp()
        optimizer, session = (
            make_optimizer("adamw", ddp),
            attach(ddp, "netsense", interval=interval, delay=delay),
        )
        schemes, sent = [], []
        for batch in batches(rank, 40):
            backward(ddp, batch)
            optimizer.step()
            session.step()
            schemes.append((session.last or {})["scheme"])
            sent.append((session.last or {})["payload_bytes"])
        session.close()
        found.append((parameters_hash(ddp.module), schemes, sent))
    return found


def refuse(rank: int) -> list[str]:
    ddp, found, (batch,) = make_ddp(find_unused_parameters=True), [], batches(rank, 1)
    for options in ({"interval": 4}, {"delay": 1}):
        with pytest.raises(ValueError) as refused:
            attach(ddp, "netsense", **options, scaler=torch.amp.GradScaler("cpu"))
        found.append(str(refused.value))
    session = attach(ddp, "netsense", delay=1)
    with pytest.raises(ValueError) as refused:
        backward(ddp, batch)
    session.close()
    found.append(str(refused.value))
    for method, options in (
        ("netsense", {"interval": 4}),
        ("netsense", {"interval": "auto"}),
        ("localsgd", {}),
    ):
        ddp = make_ddp()
        session = attach(ddp, method, **options)
        optimizer = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.SGD, lr=LR)
        backward(ddp, batch)
        optimizer.step()
        with pytest.raises(ValueError) as refused:
            session.step()
        session.close()
        found.append(str(refused.value))
    return found


def resume_with_and_without_a_device(rank: int, interval: int, delay: int) -> tuple[str, int]:
    """Rank 1 knows of a backward when the next one ends, rank 0 at once; both resume a step before
    an exchange."""
    with (
        mock.patch.object(netsenseml.hook, "Clock", LateClock)
        if rank == 1
        else contextlib.nullcontext()
    ):
        ddp = make_ddp()
        session = attach(ddp, "netsense", interval=interval, delay=delay)
    optimizer, waiting = make_optimizer("sgd", ddp), 0
    for number, batch in enumerate(batches(rank, 17)):
        backward(ddp, batch)
        optimizer.step()
        session.step()
        if number in (4, 10):
            session.load_state_dict(session.state_dict())
        waiting = max(waiting, len(session.method._answers))  # type: ignore[attr-defined]
    session.close()
    return parameters_hash(ddp.module), waiting


def do_all(rank: int) -> dict[str, Any]:
    return {
        "constant": step_by_constant_gradients(rank),
        "go on": go_on(rank, "") + go_on(rank, "+1"),
        "decide": decide(rank),
        "look in": look_in(rank),
    }


@pytest.fixture(scope="module")
def done() -> list[dict[str, Any]]:
    return run_group(do_all, 2)


def test_momentum_survives_the_ways_in_and_out(done: list[dict[str, Any]]) -> None:
    """Where gradients do not depend on parameters, it makes no difference when these are
    exchanged."""
    for rank in done:
        apart, delayed, plain = rank["constant"]
        assert apart == pytest.approx(plain, rel=1e-5, abs=1e-5)
        assert delayed == pytest.approx(plain, rel=1e-5, abs=1e-5)


def test_a_checkpoint_in_the_middle_of_an_interval_or_of_an_exchange_goes_on_bit_by_bit(
    done: list[dict[str, Any]],
) -> None:
    assert [rank["go on"] for rank in done] == [[True] * 6] * 2


def test_running_statistics_are_not_those_of_long_ago_and_an_optimizer_without_a_mean_is_refused(
    done: list[dict[str, Any]],
) -> None:
    for rank in done:
        ((own, before), _), refused = rank["look in"]
        assert own == before, "before the first exchange each rank has its own"
        assert (
            refused
            == "the optimizer keeps codes as torch.uint8, of which there is no mean; say interval=1"
            " and delay=0"
        )
    (own, behind), (own_too, behind_too) = (rank["look in"][0][1] for rank in done)
    assert behind == behind_too and own != own_too


def test_intervals_and_delays_are_kept_to_and_chosen_by_all_alike(
    done: list[dict[str, Any]],
) -> None:
    for number in range(5):
        (end, schemes, sent), (end_too, schemes_too, sent_too) = (
            rank["decide"][number] for rank in done
        )
        assert end == end_too
        assert schemes == schemes_too
        assert [size > 0 for size in sent] == [size > 0 for size in sent_too]
        if number == 0:
            assert {split_timing(scheme)[1] for scheme in schemes} == {4}
            assert [step for step, size in enumerate(sent) if size] == list(range(3, 40, 4))
        if number == 2:
            kinds = [split_timing(scheme)[1:] for scheme in schemes]
            assert set(kinds) <= {
                (0, 1),
                (1, 1),
                (0, 0),
            }, "the last only on the way back, which is all-reduce"
            for size, kind, before in zip(sent[3:], kinds[3:], kinds[2:-1], strict=True):
                assert size or kind != before, "nothing has landed only behind a change"
        if number == 3:
            assert {split_timing(scheme)[1:] for scheme in schemes} == {(4, 1)}
            assert [step for step, size in enumerate(sent) if size] == list(range(7, 40, 4))


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_controller_parts_the_ranks_where_the_network_is_thin_and_not_where_it_is_fast(
    adaptive: bool,
) -> None:
    """1.1 million parameters, 60 ms of compute, four ranks."""
    for rate_bps, apart in ((2e6, True), (1e10, False)):
        world = World(Topology(4), rate_bps, 1e-4, compute_s=0.06, elements=(250_000, 850_000))
        job = Job(world, adaptive, intervals=(1, 2, 4, 8, 16, 32))
        job.run(20)
        found = {split_timing(name)[1] for name, _ in job.run(20)}
        assert (min(found) > 1) == apart, found
        assert apart or found == {0}


def test_ranks_come_back_when_the_network_has_become_fast_but_not_for_a_moment() -> None:
    world = World(Topology(4), 2e6, 1e-4, compute_s=0.06, elements=(250_000, 850_000))
    job = Job(world, intervals=(1, 2, 4, 8, 16, 32))
    job.run(10)
    world.rate_bps = 1e10
    first = [split_timing(name)[1] for name, _ in job.run(4)]
    later = [split_timing(name)[1] for name, _ in job.run(400)]
    assert min(first) > 1
    assert later[-1] == 0
    assert sum(before != 0 and after == 0 for before, after in itertools.pairwise(later)) == 1


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_controller_delays_means_where_latency_is_the_price_and_not_where_nothing_is(
    adaptive: bool,
) -> None:
    for delay_s, delayed in ((0.05, True), (1e-4, False)):
        world = World(Topology(4), 1e10, delay_s, compute_s=0.1, elements=(250_000, 850_000))
        job = Job(world, adaptive, delays=(0, 1))
        job.run(20)
        assert {split_timing(name)[2] for name, _ in job.run(20)} == {int(delayed)}


def test_means_are_applied_at_once_again_when_the_path_has_become_short_and_it_changes_but_once() -> (
    None
):
    world = World(Topology(4), 1e10, 0.05, compute_s=0.1, elements=(250_000, 850_000))
    job = Job(world, delays=(0, 1))
    job.run(20)
    world.delay_s = 1e-4
    later = [split_timing(name)[2] for name, _ in job.run(200)]
    assert later[0] == 1 and later[-1] == 0
    assert sum(before != after for before, after in itertools.pairwise(later)) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"interval": 0}, "interval must be auto or an integer >= 1, not 0"),
        ({"interval": "never"}, "interval must be auto or an integer >= 1, not 'never'"),
        ({"interval": True}, "interval must be auto or an integer >= 1"),
        ({"interval": 4, "policy": "bdp"}, "interval is for policy: progress"),
        ({"policy": "fixed", "schemes": ["int8/1"]}, "unknown scheme 'int8/1'"),
        ({"policy": "fixed", "schemes": ["int8/x"]}, "/8"),
        ({"delay": 2}, "delay must be auto or an integer >= 0 and <= 1, not 2"),
        ({"delay": 1, "policy": "kimad"}, "delay is for policy: progress"),
        ({"policy": "fixed", "schemes": ["int8+2"]}, "+1"),
    ],
)
def test_bad_options_give_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        check_method("netsense", options)
    assert "\n" not in str(refused.value)
    assert said in str(refused.value)


def test_what_cannot_work_is_refused_in_one_line() -> None:
    for scaled, delayed, unused, *sharded in run_group(refuse, 2):
        for text, what in (
            (scaled, "GradScaler"),
            (delayed, "GradScaler"),
            (unused, "find_unused_parameters"),
        ):
            assert what in text and "\n" not in text
        assert len(sharded) == 3
        assert all(
            text.startswith("a ZeroRedundancyOptimizer makes no local steps") and "\n" not in text
            for text in sharded
        )


@pytest.mark.parametrize(("interval", "delay"), [(2, 0), (2, 1), (1, 1)])
def test_ranks_with_and_without_a_device_resume_before_an_exchange_and_report_alike(
    interval: int, delay: int
) -> None:
    """One reported what the other did not know yet, and each waited for the other."""
    (first, waiting), (second, waiting_too) = run_group(
        resume_with_and_without_a_device, 2, interval, delay, timeout_s=20
    )
    assert first == second
    assert waiting and waiting_too
    # With both of one step the kind may change by what was timed, and of late means these ranks do
    # not report at the same time.
    assert waiting == waiting_too or (interval, delay) == (1, 1)
    assert delay or waiting == 1
