"""The order of collectives, the compressed collective by itself, and the costs of plans against
what is really sent."""

import hashlib
import itertools
import random
import threading
import time
from collections.abc import Generator

import pytest
import torch
import torch.distributed as dist
from groups import run_group
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.futures import Future

import netsenseml.statistics
from netsenseml.compress.codec import Codec, add_decoded
from netsenseml.exchange.collective import all_reduce_mean
from netsenseml.exchange.communicators import (
    BySize,
    DirectAllReduce,
    Hierarchical,
    Plan,
    RandomK,
    RingAllReduce,
    SparseAllGather,
    WideAllGather,
    chunk_sizes,
    parse,
)
from netsenseml.exchange.mesh import Mesh, Topology
from netsenseml.exchange.scheduler import Exchange, Scheduler
from netsenseml.statistics import StepStatistics

FLAT: list[DirectAllReduce | SparseAllGather] = [
    *(DirectAllReduce(Codec(values), ring) for values in ("fp32", "bf16", "int8", "int4", "sign") for ring in (False, True)),
    *(SparseAllGather(Codec(values, density), ring) for values, density, ring in (
        ("fp32", 0.5, False), ("bf16", 0.1, True), ("int8", 0.02, False), ("int4", 0.01, True), ("sign", 0.001, False)
    )),
]  # fmt: skip
OTHERS: list[Plan] = [
    RingAllReduce(),
    RandomK(0.05),
    WideAllGather(0.1),
    WideAllGather(0.1, piece=256),
    BySize(DirectAllReduce(Codec("int4"))),
    BySize(SparseAllGather(Codec("int8", 0.1))),
]
HOSTS = [Hierarchical(plan) for plan in FLAT]
PLANS: list[Plan] = [*OTHERS, *FLAT, *HOSTS]


def mesh_of_all(hosts: list[int] | None = None) -> Mesh:
    group = dist.group.WORLD
    assert group is not None
    return Mesh(group, hosts=hosts)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Of float64, by torch itself."""
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def residual_of(mesh: Mesh, key: str, elements: int) -> torch.Tensor:
    return mesh.memory.state_dict().get(key, torch.zeros(elements)).double()


def test_every_stage_is_passed_in_the_order_of_the_tensors_whichever_completes_first() -> None:
    """Collectives complete in a random order; what is launched in each stage must not depend on
    it."""
    launched: list[list[int]] = [[], [], []]

    def exchange(tensor: int) -> Exchange:
        total = torch.zeros(())
        for stage in range(3):
            launched[stage].append(tensor)
            completing: Future[torch.Tensor] = Future()
            threading.Timer(random.random() / 50, completing.set_result, [torch.ones(())]).start()
            total = total + (yield completing)
        return total

    scheduler = Scheduler()
    results = [scheduler.submit(exchange(tensor)) for tensor in range(20)]
    assert [result.wait().item() for result in results] == [3.0] * 20
    scheduler.close()
    assert launched == [list(range(20))] * 3


@pytest.mark.parametrize("where", ["before", "after", "in the collective"])
def test_after_a_failure_nothing_goes_on_and_nobody_waits(where: str) -> None:
    def exchange(fails: bool) -> Exchange:
        if fails and where == "before":
            raise ValueError("broken")
        completing: Future[torch.Tensor] = Future()
        if fails and where == "in the collective":
            completing.set_exception(ValueError("broken"))
        else:
            completing.set_result(torch.ones(()))
        value = yield completing
        if fails:
            raise ValueError("broken")
        return value

    scheduler = Scheduler()
    broken, whole = scheduler.submit(exchange(True)), scheduler.submit(exchange(False))
    later = scheduler.submit(exchange(False))
    for work in (broken, whole, later, scheduler.submit(exchange(False))):
        # what follows would not match the collectives of other ranks
        with pytest.raises(Exception, match="broken"):
            work.wait()
    scheduler.close()


def test_closing_waits_for_what_was_submitted_and_may_be_repeated() -> None:
    closing = threading.Event()

    def exchange() -> Generator[Future[torch.Tensor], torch.Tensor, torch.Tensor]:
        assert closing.wait(60)
        return torch.ones(())
        yield

    scheduler = Scheduler()
    scheduler.close()
    result = scheduler.submit(exchange())
    assert not result.done()
    closing.set()
    scheduler.close()
    scheduler.close()
    assert result.done()


@given(st.integers(0, 10**8), st.integers(1, 64))
def test_chunks_cover_the_tensor_and_all_but_the_last_end_with_a_block(
    elements: int, ranks: int
) -> None:
    sizes = chunk_sizes(elements, ranks)
    assert len(sizes) == ranks and sum(sizes) == elements
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % 256 == 0 for size, following in itertools.pairwise(sizes) if following)


SIZES = [0, 1, 255, 3000, 100_000]


def every_plan_in_turn(rank: int, ranks: int) -> list[str]:
    """Five rounds of every plan and size by themselves; returns digests of all results."""
    mesh = mesh_of_all([0, 0, 1, 1] if ranks == 4 else None)
    plans = PLANS if ranks == 4 else [*OTHERS, *FLAT]
    found = []
    for number, (plan, elements) in enumerate(itertools.product(plans, SIZES)):
        draw = torch.Generator().manual_seed(100 * number + rank)
        given_in_all, sent_in_all = torch.zeros(2, elements, dtype=torch.float64)
        key = f"{plan.name} {number}"
        for _ in range(5):
            tensor = torch.randn(elements, generator=draw)
            given_in_all += tensor
            mean = all_reduce_mean(tensor, key, plan, mesh).wait()
            assert mean.data_ptr() == tensor.data_ptr(), "the mean replaces the tensor"
            sent_in_all += mean
            found.append(digest(mean))
        expected = mean_over_ranks(given_in_all - residual_of(mesh, key, elements))
        torch.testing.assert_close(
            sent_in_all, expected, rtol=1e-4, atol=1e-4, msg=f"{key}, {elements} elements"
        )
        mesh.memory.forget(key)
    mesh.close()
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_is_sent_and_what_is_kept_are_what_was_given_by_every_plan(ranks: int) -> None:
    first, *others = run_group(every_plan_in_turn, ranks, ranks)
    assert all(other == first for other in others), "all ranks have the same bits"


def plans_drawn_per_key(rank: int, ranks: int, seed: int) -> list[str]:
    """Many keys under way at once, each round by another plan; all is drawn from a seed that the
    ranks share."""
    mesh = mesh_of_all([0, 0, 1, 1] if ranks == 4 else None)
    plans = [*OTHERS, *FLAT, *(HOSTS if ranks == 4 else [])]
    # the next one must wait for it
    plans = [plan for plan in plans if not isinstance(plan, WideAllGather)]
    draw = random.Random(seed)
    found = []
    for case in range(8):
        keys = {
            f"{case}-{i}": draw.choice([*SIZES[:-1], draw.randrange(30_000)])
            for i in range(draw.randint(1, 8))
        }
        given_in_all = {
            key: torch.zeros(elements, dtype=torch.float64) for key, elements in keys.items()
        }
        sent_in_all = {
            key: torch.zeros(elements, dtype=torch.float64) for key, elements in keys.items()
        }
        for step in range(draw.randint(1, 5)):
            order = draw.sample(sorted(keys), len(keys))
            chosen = [draw.choice(plans) for _ in order]
            tensors = []
            for i, key in enumerate(order):
                own = torch.Generator().manual_seed(hash((seed, case, step, i, rank)))
                scale = 10.0 ** draw.randint(-3, 3)
                tensors.append(scale * torch.randn(keys[key], generator=own))
                given_in_all[key] += tensors[-1]
            works = [
                all_reduce_mean(t, key, plan, mesh)
                for t, key, plan in zip(tensors, order, chosen, strict=True)
            ]
            for key, work in zip(order, works, strict=True):
                sent_in_all[key] += work.wait()
                found.append(digest(work.wait()))
        for key, elements in keys.items():
            expected = mean_over_ranks(given_in_all[key] - residual_of(mesh, key, elements))
            scale = float(expected.abs().max()) if elements else 0.0
            torch.testing.assert_close(
                sent_in_all[key], expected, rtol=1e-4, atol=1e-4 * max(scale, 1e3)
            )
    mesh.close()
    return found


@settings(max_examples=3)
@given(st.integers(2, 4), st.integers(0, 2**31))
def test_keys_may_be_under_way_at_once_each_by_a_plan_of_its_own(ranks: int, seed: int) -> None:
    first, *others = run_group(plans_drawn_per_key, ranks, ranks, seed)
    assert all(other == first for other in others)


SENT = [1, 700, 200_000]


def bytes_by_plan(rank: int) -> list[tuple[int, float]]:
    mesh = mesh_of_all([0, 0, 1, 1])
    found = []
    for elements, plan in itertools.product(SENT, PLANS):
        statistics = StepStatistics(mesh.ranks)
        all_reduce_mean(torch.randn(elements), plan.name, plan, mesh, statistics).wait()
        statistics.settle()
        found.append((statistics.payload_bytes, statistics.communication_s))
        mesh.memory.forget(plan.name)
    mesh.close()
    return found


def test_costs_say_what_is_sent() -> None:
    """On average over the ranks that exchange: of an all-reduce in chunks, the last rank may have
    nothing to reduce."""
    ranks = run_group(bytes_by_plan, 4)
    for number, (elements, plan) in enumerate(itertools.product(SENT, PLANS)):
        sent = [rank[number][0] for rank in ranks]
        assert sum(sent) / len(sent) == pytest.approx(
            plan.cost(elements, Topology(4, 2)).sent_bytes, abs=2
        ), plan.name
        assert all(rank[number][1] > 0 for rank in ranks), plan.name


ROUNDED = ("bf16", "int8", "int4", "sign")


def direct_means(rank: int, elements: int) -> list[tuple[list[float], list[float]]]:
    mesh = mesh_of_all()
    found = []
    for values in ROUNDED:
        tensor = torch.randn(elements, generator=torch.Generator().manual_seed(rank))
        mean = all_reduce_mean(tensor, values, DirectAllReduce(Codec(values)), mesh).wait()
        found.append((mean.tolist(), residual_of(mesh, values, elements).tolist()))
    mesh.close()
    return found


def test_the_chunk_that_a_rank_reduces_has_its_own_part_exactly() -> None:
    """Its own part of the mean crosses no network, so that only the coding of the mean may change
    it."""
    elements, ranks = 2000, 3
    found = run_group(direct_means, ranks, elements)
    sizes = chunk_sizes(elements, ranks)
    tensors = [
        torch.randn(elements, generator=torch.Generator().manual_seed(rank)).split(sizes)
        for rank in range(ranks)
    ]
    for number, codec in enumerate(map(Codec, ROUNDED)):
        for chunk, size in enumerate(sizes):
            mean = torch.zeros(size)
            for rank in range(ranks):
                if rank == chunk:
                    mean.add_(tensors[rank][chunk], alpha=1 / ranks)
                else:
                    add_decoded(codec.encode(tensors[rank][chunk].clone(), 0), mean, 1 / ranks)
            expected = add_decoded(codec.encode(mean, 0), torch.zeros(size))
            result, kept = (
                torch.tensor(found[chunk][number][i]).split(sizes)[chunk] for i in (0, 1)
            )
            assert torch.equal(result, expected), codec.name
            # of the coding of the mean, and of nothing else
            torch.testing.assert_close(kept, ranks * mean)


def kept_without_feedback(rank: int) -> bool:
    mesh = mesh_of_all()
    all_reduce_mean(torch.randn(1000), "key", parse("sparse-int4@1%"), mesh, feedback=False).wait()
    mesh.close()
    return mesh.memory.holds("key")


def test_without_feedback_nothing_is_kept() -> None:
    assert run_group(kept_without_feedback, 2) == [False, False]


@pytest.mark.parametrize("plan", [*FLAT, *HOSTS, RingAllReduce()], ids=lambda plan: plan.name)
def test_names_are_read_back(plan: Plan) -> None:
    assert parse(plan.name) == plan


@given(st.floats(1e-4, 1.0), st.integers(1, 5000), st.integers(0, 2**40))
def test_random_elements_are_distinct_and_the_same_on_all_ranks(
    density: float, elements: int, seed: int
) -> None:
    chosen = [RandomK(density).chosen(elements, seed) for _ in range(2)]
    assert torch.equal(*chosen)
    assert (
        bool((chosen[0].diff() > 0).all())
        and int(chosen[0][0]) >= 0
        and int(chosen[0][-1]) < elements
    )


def test_a_backward_that_broke_off_is_not_part_of_the_next() -> None:
    statistics = StepStatistics(2)
    for backward in ([10, 20], [10, 20, 5]):
        statistics.begin_backward()
        for elements in backward:
            statistics.arrive(elements, 1.0)
            with statistics.coding():
                time.sleep(0.01)
    statistics.settle()
    spent = statistics.of_backward()
    assert (spent.bucket_elements, len(spent.ready_s)) == ([10, 20, 5], 3)
    assert 0.03 <= spent.encode_s < 0.05


def test_time_under_way_counts_once_in_whatever_order_collectives_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the step begins, one is launched, another, which completes first
    clock = iter([0.0, 1.0, 2.0, 4.0, 6.0])
    for module in (netsenseml.clock, netsenseml.statistics):
        monkeypatch.setattr(module, "monotonic_s", lambda: next(clock))
    statistics, completing = StepStatistics(2), [Future(), Future()]
    for future in completing:
        statistics.launch(lambda future=future: future, payload_bytes=10, elements=5)
    for future in reversed(completing):
        future.set_result(torch.ones(()))
    statistics.settle()
    assert statistics.communication_s == 5.0
    assert (statistics.payload_bytes, statistics.elements_sent) == (20, 10)
