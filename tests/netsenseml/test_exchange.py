"""The order of collectives, chunks, and the cost formulas against what is really sent."""

import itertools
import random
import threading
import time
from collections.abc import Generator

import pytest
import torch
import torch.distributed as dist
from groups import run_group
from hypothesis import given
from hypothesis import strategies as st
from torch.futures import Future

from netsenseml.compress.codec import Codec, Sent
from netsenseml.exchange.conveyor import Conveyor, Exchange
from netsenseml.exchange.schemes import Gather, Lot, Plain, RandomK, Scheme, TwoPhase, WideGather, by_name, chunk_sizes
from netsenseml.ledger import Ledger

SCHEMES: list[Scheme] = [
    Plain(),
    TwoPhase(Codec("bf16")),
    TwoPhase(Codec("int8")),
    TwoPhase(Codec("int4")),
    TwoPhase(Codec("sign")),
    Gather(Codec("bf16", 0.1)),
    Gather(Codec("int4", 0.01)),
    RandomK(0.05),
    WideGather(0.1),
    WideGather(0.1, piece=256),
]


def test_every_stage_is_passed_in_the_order_of_the_buckets_whichever_lands_first() -> None:
    """Collectives land in a random order; what is launched in each stage must not depend on it."""
    launched: list[list[int]] = [[], [], []]

    def exchange(bucket: int) -> Exchange:
        total = torch.zeros(())
        for stage in range(3):
            launched[stage].append(bucket)
            landing: Future[torch.Tensor] = Future()
            threading.Timer(random.random() / 50, landing.set_result, [torch.ones(())]).start()
            total = total + (yield landing)
        return total

    conveyor = Conveyor()
    results = [conveyor.submit(exchange(bucket)) for bucket in range(20)]
    assert [result.wait().item() for result in results] == [3.0] * 20
    conveyor.close()
    assert launched == [list(range(20))] * 3


@pytest.mark.parametrize("where", ["before", "after", "in the collective"])
def test_a_failure_reaches_who_waits_and_the_others_go_on(where: str) -> None:
    def exchange(fails: bool) -> Exchange:
        if fails and where == "before":
            raise ValueError("broken")
        landing: Future[torch.Tensor] = Future()
        if fails and where == "in the collective":
            landing.set_exception(ValueError("broken"))
        else:
            landing.set_result(torch.ones(()))
        value = yield landing
        if fails:
            raise ValueError("broken")
        return value

    conveyor = Conveyor()
    broken, whole = conveyor.submit(exchange(True)), conveyor.submit(exchange(False))
    with pytest.raises(Exception, match="broken"):
        broken.wait()
    assert whole.wait().item() == 1
    conveyor.close()


def test_closing_waits_for_what_was_submitted_and_may_be_repeated() -> None:
    def exchange() -> Generator[Future[torch.Tensor], torch.Tensor, torch.Tensor]:
        time.sleep(0.05)
        return torch.ones(())
        yield

    conveyor = Conveyor()
    conveyor.close()
    result = conveyor.submit(exchange())
    conveyor.close()
    conveyor.close()
    assert result.done()


@given(st.integers(0, 10**8), st.integers(1, 64))
def test_chunks_cover_the_bucket_and_all_but_the_last_end_with_a_block(elements: int, ranks: int) -> None:
    sizes = chunk_sizes(elements, ranks)
    assert len(sizes) == ranks and sum(sizes) == elements
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % 256 == 0 for size, following in itertools.pairwise(sizes) if following)


def exchange_all(rank: int, elements: int) -> list[tuple[str, list[float], list[float], list[float]]]:
    """For every scheme: what this rank wanted, the result, and what is left."""
    group = dist.group.WORLD
    assert group is not None
    groups = group, dist.new_group()
    found = []
    for number, scheme in enumerate(SCHEMES):
        wanted = torch.randn(elements, generator=torch.Generator().manual_seed(100 * number + rank))
        left = wanted.clone()
        ledger = Ledger(dist.get_world_size())
        conveyor = Conveyor()
        lot = Lot(groups, ledger, shared_seed=number, sent=Sent(), out=torch.full_like(left, torch.nan))
        result = conveyor.submit(scheme.exchange(left, lot)).wait()
        conveyor.close()
        stages = scheme.payloads(elements, dist.get_world_size())
        assert (ledger.payload_bytes, ledger.hops) == (sum(round(b) for b, _ in stages), sum(hops for _, hops in stages))
        assert ledger.flight_s > 0
        found.append((scheme.name, wanted.tolist(), result.tolist(), left.tolist()))
    return found


@pytest.mark.parametrize("elements", [1, 5, 700, 3000])
def test_the_mean_of_the_results_is_the_mean_of_the_wants_less_what_is_left(elements: int) -> None:
    ranks = run_group(exchange_all, 3, elements)
    for number, scheme in enumerate(SCHEMES):
        wanted, result, left = (torch.tensor([rank[number][i] for rank in ranks]) for i in (1, 2, 3))
        assert torch.equal(result, result[:1].expand_as(result)), scheme.name
        torch.testing.assert_close(result[0], (wanted - left).mean(dim=0), rtol=1e-4, atol=1e-5, msg=scheme.name)


@pytest.mark.parametrize(
    "scheme", [scheme for scheme in SCHEMES if not isinstance(scheme, RandomK | WideGather)], ids=lambda s: s.name
)
def test_names_are_read_back(scheme: Scheme) -> None:
    assert by_name(scheme.name) == scheme


@given(st.floats(1e-4, 1.0), st.integers(1, 5000), st.integers(0, 2**40))
def test_random_elements_are_distinct_and_the_same_on_all_ranks(density: float, elements: int, seed: int) -> None:
    chosen = [RandomK(density).chosen(elements, seed) for _ in range(2)]
    assert torch.equal(*chosen)
    assert bool((chosen[0].diff() > 0).all()) and int(chosen[0][0]) >= 0 and int(chosen[0][-1]) < elements


def test_time_in_flight_counts_once_in_whatever_order_collectives_land() -> None:
    ledger, landings = Ledger(2), [Future(), Future()]
    for landing in landings:
        ledger.launch(lambda landing=landing: landing, payload_bytes=10, hops=1, elements=5)
    for landing, after_s in ((landings[1], 0.05), (landings[0], 0.03)):
        time.sleep(after_s)
        landing.set_result(torch.ones(()))
    assert ledger.flight_s == pytest.approx(0.08, abs=0.02)
    assert (ledger.payload_bytes, ledger.hops, ledger.elements_sent) == (20, 2, 10)
