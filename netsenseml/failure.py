"""Who failed, when a collective did."""

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from netsenseml.exchange.mesh import Peer, store_of, timeout
from netsenseml.records import monotonic_s

_GRACE_S, _PATIENCE_S, _MOST_PATIENCE_S = 1.0, 2.5, 10.0
"""So long after a first rank others may notice a failure: they wait for the same peer, since about
the same moment. The others are for when several ranks are in question: some may still compute, or,
where one has died, wait for one that has noticed."""
_STORE_S = 1.0
"""In which a store that is there has answered."""


_OWN = "this rank failed"

T = TypeVar("T")


class PeerFailed(RuntimeError):
    """A rank has died, has raised, or has not answered within the time-out of the process group.
    The session is over."""


def blames_peer(error: BaseException) -> bool:
    """Whether an error says that another rank has failed, and not this one."""
    said = str(error)
    if not isinstance(error, RuntimeError) or _OWN in said:
        return False
    return isinstance(error, PeerFailed) or PeerFailed.__name__ in said or _of_network(said)


def explain(
    error: BaseException, group: dist.ProcessGroup, peers: Sequence[Peer], rank: int
) -> str:
    """One line that names the peers that are gone, as far as that can be found out; waits for
    ``_MOST_PATIENCE_S`` at most.

    Every rank that sees a failure says so in the store, with the text if it is its own; those that
    do not are dead or silent.
    """
    what = _plain(error)
    store: Any = store_of(group)
    if not isinstance(error, RuntimeError) or not _of_network(what):
        _within(_STORE_S, lambda: _post(store, rank, f"failed: {what}"))
        return f"{_OWN}: {what}"
    addresses = set(re.findall(r"\[([0-9A-Fa-f.:]+)\]:\d+", what))
    seen = [
        other for other, peer in enumerate(peers) if peer.address in addresses and other != rank
    ]
    mine = "late" if re.search(r"timed out|timeout", what, re.IGNORECASE) else "gone"
    answers = _within(_STORE_S, lambda: _post(store, rank, mine))
    most_s = (
        _PATIENCE_S
        if mine == "late"
        else min(max(_PATIENCE_S, timeout(group).total_seconds()), _MOST_PATIENCE_S)
    )
    told = (
        _within(most_s + _STORE_S, lambda: _board(store, len(peers), rank, seen, most_s))
        if answers
        else None
    )
    if told is None:
        told = [None if other in seen else mine for other in range(len(peers))]
        holder = _holds_store(group)
        if holder is not None and holder != rank and (not seen or holder in seen):
            told = [None if other == holder else mine for other in range(len(peers))]
            what = f"its store does not answer; {what}"
    failed = {other: text for other, text in enumerate(told) if text and text.startswith("failed")}
    if failed:
        return f"{_named(list(failed), peers)} {next(iter(failed.values()))}"
    silent = [other for other, text in enumerate(told) if text is None]
    if len(silent) != 1 and seen:  # others have just not noticed yet, or all have
        silent = [other for other in silent if other in seen] or seen
    if not silent:
        return f"the exchange of gradients failed: {what}"
    gone = "is gone" if len(silent) == 1 else "are gone, or some of them"
    did = f"did not answer within {timeout(group).total_seconds():g} s" if "late" in told else gone
    return f"{_named(silent, peers)} {did}: {what}"


def _named(ranks: Sequence[int], peers: Sequence[Peer]) -> str:
    names = (
        f"{other} ({peers[other].address})" if peers[other].address else f"{other}"
        for other in ranks
    )
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(names)}"


def _plain(error: BaseException) -> str:
    """The first sentence of an error, without the prefixes of each callback that it went through
    and without Gloo's file names."""
    what = next(iter(str(error).splitlines()), "")
    what = re.sub(r"^(Got the following error when running the callback: (\w+: )?)+", "", what)
    what = re.sub(r"\[\S*/(gloo/\S+):\d+\] ", r"\1: ", what).partition(". This ")[0]
    return what if _of_network(what) else f"{type(error).__name__}: {what}".removesuffix(": ")


def _of_network(what: str) -> bool:
    return re.search(r"gloo|connection|socket|timed out|timeout", what, re.IGNORECASE) is not None


def _holds_store(group: dist.ProcessGroup) -> int | None:
    """The rank of ``group`` whose process the store ends with."""
    ranks = dist.get_process_group_ranks(group)
    if 0 not in ranks or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    return ranks.index(0)


def _post(store: Any, rank: int, mine: str) -> bool:
    """Say in the store what became of this rank; returns True when it has arrived there."""
    store.set(f"netsenseml/failed/{rank}", mine)
    return store.check([f"netsenseml/failed/{rank}"])


def _board(
    store: Any, ranks: int, rank: int, seen: Sequence[int], most_s: float
) -> list[str | None]:
    """What every rank says in the store, None for nothing. seen: ranks that the error of this one
    is about."""
    began_s = monotonic_s()
    told: list[str | None] = [None] * ranks
    try:
        while True:
            for other in range(ranks):
                if told[other] is None and store.check([f"netsenseml/failed/{other}"]):
                    told[other] = store.get(f"netsenseml/failed/{other}").decode()
            silent = {other for other, text in enumerate(told) if text is None}
            spent_s = monotonic_s() - began_s
            settled = spent_s > _GRACE_S and (len(silent) <= 1 or silent <= set(seen))
            patience_s = _PATIENCE_S if "late" in told else most_s
            if (
                settled
                or spent_s > patience_s
                or any(text and text.startswith("failed") for text in told)
            ):
                break
            time.sleep(_GRACE_S / 20)
        store.set(f"netsenseml/read/{rank}", "")
        others = [
            f"netsenseml/read/{other}"
            for other, text in enumerate(told)
            if text in ("late", "gone")
        ]
        left_s = monotonic_s() + _GRACE_S
        while rank == 0 and monotonic_s() < left_s and not store.check(others):
            time.sleep(_GRACE_S / 20)  # the store may end with this rank
    except RuntimeError:
        if told[0] is None:
            raise
        # Rank 0 has told all it knew, and has left.
    return told


def _within(limit_s: float, ask: Callable[[], T]) -> T | None:
    """What ``ask`` returns; None if it fails, or takes longer: with a silent rank 0, no call of its
    store ever returns."""
    results: list[T] = []

    def answer() -> None:
        try:
            results.append(ask())
        except RuntimeError:  # the store is gone
            pass

    asking = threading.Thread(target=answer, name="netsenseml-store", daemon=True)
    asking.start()
    asking.join(limit_s)
    return results[0] if results else None
