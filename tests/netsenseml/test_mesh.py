"""The ranks that exchange: who they are, their groups and time-outs, and that these leave nothing
behind."""

import os
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import run_group, wait_for_others
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from netsenseml import attach
from netsenseml.compress.codec import Codec
from netsenseml.exchange import mesh as mesh_of_exchange
from netsenseml.exchange.collective import all_reduce_mean
from netsenseml.exchange.communicators import DirectAllReduce, Hierarchical, parse
from netsenseml.exchange.mesh import Mesh, Peer, Topology, _card, abort, timeout
from netsenseml.sensing.tcp import is_connected


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


class Described(Mesh):
    """A mesh without a group."""

    def __init__(self, hosts: Sequence[int], rank: int = 0) -> None:
        self.rank, self.ranks, self.hosts = rank, len(hosts), tuple(hosts)
        self.peers = [Peer(f"boot/{host}", None) for host in hosts]


@pytest.mark.parametrize(
    ("hosts", "topology"),
    [
        ([0], Topology(1)),
        ([0, 0, 0, 0], Topology(4)),  # all on one host: nothing is saved by it
        ([0, 1, 2, 3], Topology(4)),
        ([0, 0, 1, 1], Topology(4, 2)),
        ([5, 5, 5, 2, 2, 2], Topology(6, 3)),
        ([0, 1, 0, 1], Topology(4)),  # not one after another
        ([0, 0, 1], Topology(3)),
        ([0, 0, 1, 1, 1, 1], Topology(6)),
        ([0, 1, 1, 2], Topology(4)),
        ([0, 0, 1, 1, 0, 0], Topology(6)),
    ],
)
def test_hosts_of_equal_size_whose_ranks_follow_each_other_have_several_ranks(
    hosts: list[int], topology: Topology
) -> None:
    assert Described(hosts).topology == topology


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.data())
def test_the_ranks_of_a_host_agree_on_who_they_are(hosts: list[int], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(hosts) - 1))
    mesh = Described(hosts, rank)
    assert rank in mesh.host_ranks
    assert all(Described(hosts, other).host_ranks == mesh.host_ranks for other in mesh.host_ranks)
    assert mesh.machine_ranks == list(range(len(hosts))), "one kernel"


@given(st.integers(1, 4), st.integers(1, 4))
def test_every_share_is_exchanged_by_one_rank_of_each_host(hosts: int, ranks_per_host: int) -> None:
    placed = [rank // ranks_per_host for rank in range(hosts * ranks_per_host)]
    for rank in range(len(placed)):
        same = Described(placed, rank).cross_host_ranks
        assert rank in same and [placed[other] for other in same] == list(range(hosts))
        assert all(Described(placed, other).cross_host_ranks == same for other in same)


@given(st.integers(1, 8), st.integers(1, 8))
def test_an_interface_carries_what_leaves_its_host(hosts: int, ranks_per_host: int) -> None:
    topology = Topology(hosts * ranks_per_host, ranks_per_host)
    pairs = [
        (a, b)
        for a in range(topology.ranks)
        for b in range(topology.ranks)
        if a != b and a < ranks_per_host
    ]
    leaving = sum(b // ranks_per_host != 0 for _, b in pairs)
    assert topology.ranks_crossing * max(topology.ranks - 1, 1) == pytest.approx(leaving)
    assert topology.of_hosts == Topology(hosts)


@pytest.mark.parametrize(("properties", "card"), [({"uuid": "GPU-1"}, "GPU-1"), ({}, None)])
def test_a_card_is_known_where_torch_tells_which_it_is(
    properties: dict[str, str], card: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.4 does not."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties)
    )
    assert _card(torch.device("cuda")) == card
    assert _card(torch.device("cpu")) is None and _card(None) is None


def meet(rank: int) -> tuple[list[Peer], tuple[int, ...], list[int], int]:
    mesh = Mesh(world())
    mesh.close()
    return mesh.peers, mesh.hosts, mesh.machine_ranks, mesh.rank


def test_ranks_of_one_network_namespace_are_on_one_host() -> None:
    found = run_group(meet, 3)
    assert [rank for *_, rank in found] == [0, 1, 2]
    for peers, hosts, machine_ranks, _ in found:
        assert hosts == (0, 0, 0) and machine_ranks == [0, 1, 2]
        assert len({peer.host for peer in peers}) == 1


def timeouts_of_groups(rank: int) -> list[float]:
    mesh = Mesh(world(), hosts=[0, 0, 1, 1])
    groups = [world(), mesh.stage(0), mesh.stage(1), mesh.host_stage(0), mesh.cross_host_stage(0)]
    found = [timeout(groups[0]), *(group.options._timeout for group in groups[1:])]
    assert mesh.stage(0) is groups[1], "made once"
    del groups
    mesh.close()
    return [given_in.total_seconds() for given_in in found]


def test_all_groups_have_the_time_out_of_the_first() -> None:
    found = run_group(timeouts_of_groups, 4, timeout_s=5)
    assert found == [[5.0] * 5] * 4


def exchange_alone(rank: int) -> float:
    mesh = Mesh(world())
    all_reduce_mean(torch.ones(1000), "key", DirectAllReduce(Codec("int8")), mesh).wait()
    began_s = time.monotonic()
    if rank == 0:
        with pytest.raises(RuntimeError):
            all_reduce_mean(torch.ones(1000), "key", DirectAllReduce(Codec("int8")), mesh).wait()
    took_s = time.monotonic() - began_s
    wait_for_others("alone")
    mesh.close()
    return took_s


def test_who_exchanges_alone_is_told_after_the_time_out() -> None:
    took_s, _ = run_group(exchange_alone, 2, timeout_s=5)
    assert 4 < took_s < 60


def configure(rank: int) -> str:
    with pytest.raises(ValueError) as refused:
        Mesh(world(), config={"plan": "int8", "chunk": 256 if rank != 1 else 128})
    Mesh(world(), config={"plan": "int8"}).close()
    return str(refused.value)


def test_a_configuration_that_differs_is_refused_on_every_rank() -> None:
    said = "rank 1 has chunk = 128, rank 0 has 256; all ranks must have the same"
    assert run_group(configure, 3) == [said] * 3


def mean_of_part(rank: int) -> list[float]:
    """Two meshes at once of ranks 3 and 1, in this order, and one of all; each is closed while the
    others go on."""
    part, found = dist.new_group([1, 3]), []
    whole = Mesh(world(), hosts=[0, 0, 1, 1])
    meshes = [Mesh(part), Mesh(part)] if rank in (1, 3) else []
    for number in range(3):
        for mesh in meshes:
            mean = all_reduce_mean(
                torch.full((3,), float(rank)), "key", DirectAllReduce(Codec("fp32")), mesh
            ).wait()
            found += mean.tolist()
        plan = Hierarchical(DirectAllReduce(Codec("fp32")))
        found += all_reduce_mean(torch.full((3,), float(rank)), "key", plan, whole).wait().tolist()
        if meshes and number < 2:
            meshes.pop().close()
    whole.close()
    return found


def test_meshes_of_part_of_the_ranks_and_of_all_go_on_beside_each_other() -> None:
    for rank, found in enumerate(run_group(mean_of_part, 4)):
        times = 2 + 1 if rank in (1, 3) else 0
        assert sorted(found) == pytest.approx([1.5] * 9 + [2.0] * 3 * times)


def open_and_close(rank: int) -> list[tuple[int, int]]:
    counts = []
    plans = [DirectAllReduce(Codec("int8")), Hierarchical(DirectAllReduce(Codec("int4")))]
    for _ in range(6):
        mesh = Mesh(world(), hosts=[0, 0, 1, 1])
        for plan in plans:
            all_reduce_mean(torch.ones(1000), plan.name, plan, mesh).wait()
        mesh.close()
        threads, descriptors = (
            len(list(Path("/proc/self", kind).iterdir())) for kind in ("task", "fd")
        )
        counts.append((threads, descriptors))
    return counts


def test_a_closed_mesh_leaves_no_thread_and_no_connection() -> None:
    for counts in run_group(open_and_close, 4):
        assert len(set(counts[1:])) == 1, counts


def meet_the_wrong_way_round(rank: int) -> list[float]:
    """Two meshes of the same ranks, whose groups the ranks make in different orders."""
    meshes = [Mesh(world()) for _ in range(2)]
    order = (0, 1) if rank == 0 else (1, 0)
    threads = [threading.Thread(target=meshes[number].stage, args=(0,)) for number in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tensors = [torch.full((4,), float(number + 1)) for number in range(2)]
    works = [
        all_reduce_mean(tensors[number], "key", parse("fp32"), meshes[number]) for number in order
    ]
    for work in works:
        work.wait()
    for mesh in meshes:
        mesh.close()
    return [float(tensor.mean()) for tensor in tensors]


def test_meshes_of_the_same_ranks_never_meet_each_others_groups() -> None:
    assert run_group(meet_the_wrong_way_round, 2) == [[1.0, 2.0]] * 2


def average_over(rank: int, hosts: list[int]) -> float:
    """How far sent plus kept is from what was given, after some rounds."""
    mesh = Mesh(world(), hosts=hosts)
    torch.manual_seed(rank)
    given = got = torch.zeros(3000)
    for _ in range(4):
        gradient = torch.randn(3000)
        given = given + gradient
        all_reduce_mean(gradient, "key", parse("host-sparse-int4@10%"), mesh).wait()
        got = got + gradient
    kept = mesh.memory.state_dict().get("key", torch.zeros(3000))
    totals = torch.stack([given, kept])
    dist.all_reduce(totals)
    mesh.close()
    return float((totals[0] / mesh.ranks - totals[1] / mesh.ranks - got).norm() / got.norm())


@pytest.mark.parametrize("hosts", [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]])
def test_a_hierarchy_loses_nothing_whatever_the_hosts_are_like(hosts: list[int]) -> None:
    assert max(run_group(average_over, 4, hosts)) < 1e-5


def abort_over_two_connections(rank: int) -> tuple[int, float]:
    """(connections to the other rank, time in s until an exchange that the other never joins has
    ended)."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo,lo"
    mesh = Mesh(dist.new_group(timeout=timedelta(seconds=30)))

    def connected() -> int:
        return sum(is_connected(int(entry.name)) for entry in Path("/proc/self/fd").iterdir())

    before = connected()
    mesh.stage(0)
    made = connected() - before
    all_reduce_mean(torch.ones(1000), "key", DirectAllReduce(Codec("int8")), mesh).wait()
    began_s = time.monotonic()
    if rank == 0:
        threading.Timer(0.2, abort, [mesh.group]).start()
        with pytest.raises(RuntimeError):
            all_reduce_mean(torch.ones(1000), "key", DirectAllReduce(Codec("int8")), mesh).wait()
    took_s = time.monotonic() - began_s
    wait_for_others("aborted")
    mesh.leave()
    return made, took_s


def test_a_group_with_several_connections_between_two_ranks_can_be_aborted() -> None:
    for made, took_s in run_group(abort_over_two_connections, 2):
        assert made == 2 and took_s < 20


class SlowStore(dist.Store):
    """So that the rank that meets the others in it is the last to connect."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store = store

    def set(self, *arguments: Any) -> None:
        self._store.set(*arguments)

    def add(self, key: str, amount: int) -> int:
        return self._store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def wait(self, *arguments: Any) -> None:
        self._store.wait(*arguments)

    def get(self, key: str) -> bytes:
        time.sleep(0.1)
        return self._store.get(key)


def attach_and_close(rank: int) -> list[str]:
    if rank == 1:
        met = mesh_of_exchange.store_of
        mesh_of_exchange.store_of = lambda group: SlowStore(met(group))
    failed = []
    for method in ("powersgd", "netsense"):
        try:
            attach(DistributedDataParallel(nn.Linear(3, 3)), method).close()
        except RuntimeError as error:
            failed.append(f"{method}: {error}")
        wait_for_others(method)
    return failed


def test_a_session_may_be_closed_while_other_ranks_still_connect() -> None:
    assert run_group(attach_and_close, 3, timeout_s=20) == [[]] * 3


class LeavingStore(SlowStore):
    """The rank that meets the others in it leaves when it has connected, before it says so."""

    def set(self, key: str, value: str) -> None:
        if "connected" in key:
            raise RuntimeError("left")
        super().set(key, value)


def leave_while_others_connect(rank: int) -> tuple[str, float]:
    mesh, began_s, said = Mesh(world()), time.monotonic(), ""
    if rank == 1:
        met = mesh_of_exchange.store_of
        mesh_of_exchange.store_of = lambda group: LeavingStore(met(group))
    try:
        mesh.stage(0)
    except RuntimeError as error:
        said = str(error)
    if rank == 1:
        mesh.leave()
    took_s = time.monotonic() - began_s
    wait_for_others("left")
    return said, took_s


def test_who_leaves_while_others_connect_does_not_keep_them_until_the_time_out() -> None:
    for rank, (said, took_s) in enumerate(run_group(leave_while_others_connect, 3, timeout_s=60)):
        assert (
            "left" in said
            if rank == 1
            else said == "a connection ended while ranks 1 were still connecting"
        )
        assert took_s < 30


def look_at_connections(rank: int) -> bool:
    socket.setdefaulttimeout(5)
    ours, theirs = socket.socketpair()
    ours.settimeout(None)
    mesh = Mesh(world())
    mesh.stage(0)
    dist.barrier()
    abort(world())
    mesh.close()
    blocking = os.get_blocking(ours.fileno())
    ours.close()
    theirs.close()
    return blocking


def test_sockets_of_others_stay_blocking() -> None:
    assert all(run_group(look_at_connections, 2))
