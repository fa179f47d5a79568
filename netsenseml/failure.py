"""Who failed, when a collective did."""

import os
import re
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from netsenseml.exchange.mesh import Peer, store_of, timeout

_GRACE_S, _PATIENCE_S = 1.0, 2.5
"""So long after a first rank others may notice a failure: they wait for the same peer, since about the same moment. The second
is for a failure that leaves several ranks in question, as some are still computing."""
_STORE_S = 1.0
"""In which a store that is there has answered. The one of a rank that is silent never does."""


class PeerFailed(RuntimeError):
    """A rank has died, has raised, or has not answered within the time-out of the process group. The session is of no use now.

    What a hook's future raises goes through torch's reducer, in C++, which keeps the text and makes a RuntimeError of the type:
    "Got the following error when running the callback: PeerFailed: rank 2 (10.0.0.3) is gone: ...". So catch RuntimeError round
    ``backward``; only a backward after that raises PeerFailed itself.
    """


def explain(error: BaseException, group: dist.ProcessGroup, peers: Sequence[Peer], rank: int) -> str:
    """One line that names the peers that are gone, as far as that can be found out; waits for ``_PATIENCE_S`` at most.

    Every rank that sees a failure says so in the store, with the text if it is its own; those that do not are dead or silent.
    """
    what = _plain(error)
    if not isinstance(error, RuntimeError) or not _of_network(what):
        _tell(group, rank, what)
        return f"this rank failed: {what}"
    addresses = set(re.findall(r"\[([0-9A-Fa-f.:]+)\]:\d+", what))
    seen = [other for other, peer in enumerate(peers) if peer.address in addresses and other != rank]
    told = _ask(group, len(peers), rank, seen)
    late = f"did not answer within {timeout(group).total_seconds():g} s" if _timed_out(what) else None
    if told is None:
        holder = _holds_store(group)
        if holder is not None and holder != rank and (not seen or holder in seen):
            return f"{_named([holder], peers)} {late or 'is gone'}, nor does its store answer: {what}"
        told = [None if other in seen else "" for other in range(len(peers))]
    failed = [other for other, text in enumerate(told) if text]
    if failed:
        return f"{_named(failed, peers)} failed: {told[failed[0]]}"
    silent = [other for other, text in enumerate(told) if text is None]
    if len(silent) != 1 and seen:  # others have just not noticed yet, or all have
        silent = [other for other in silent if other in seen] or seen
    if not silent:
        return f"the exchange of gradients failed: {what}"
    return f"{_named(silent, peers)} {late or ('is gone' if len(silent) == 1 else 'are gone')}: {what}"


def _named(ranks: Sequence[int], peers: Sequence[Peer]) -> str:
    names = (f"{other} ({peers[other].address})" if peers[other].address else f"{other}" for other in ranks)
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(names)}"


def _plain(error: BaseException) -> str:
    """The first sentence of an error, without the prefixes of each callback that it went through and without Gloo's file
    names."""
    what = next(iter(str(error).splitlines()), "")
    what = re.sub(r"^(Got the following error when running the callback: (\w+: )?)+", "", what)
    what = re.sub(r"\[\S*/(gloo/\S+):\d+\] ", r"\1: ", what).partition(". This ")[0]
    return what if _of_network(what) else f"{type(error).__name__}: {what}".removesuffix(": ")


def _of_network(what: str) -> bool:
    return re.search(r"gloo|connection|socket|timed out|timeout", what, re.IGNORECASE) is not None


def _timed_out(what: str) -> bool:
    return re.search(r"timed out|timeout", what, re.IGNORECASE) is not None


def _holds_store(group: dist.ProcessGroup) -> int | None:
    """The rank of ``group`` whose process the store ends with."""
    ranks = dist.get_process_group_ranks(group)
    if 0 not in ranks or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    return ranks.index(0)


def _tell(group: dist.ProcessGroup, rank: int, what: str) -> Any:
    """Say on the board that this rank has noticed, or is, a failure; returns the store, None if it does not answer."""
    store, key = store_of(group), f"netsenseml/failed/{rank}"
    try:
        store.set(key, what)
        store.wait([key], timedelta(seconds=_STORE_S))  # unlike all else that could be asked, this ends if it never answers
    except RuntimeError:
        return None
    return store


def _ask(group: dist.ProcessGroup, ranks: int, rank: int, seen: Sequence[int]) -> list[str | None] | None:
    """What every rank says, None for nothing; None if there is no store to ask.

    seen: ranks that the error is about.
    """
    store = _tell(group, rank, "")
    if store is None:
        return None
    began_s = time.monotonic()
    told: list[str | None] = [None] * ranks
    try:
        while True:
            for other in range(ranks):
                if told[other] is None and store.check([f"netsenseml/failed/{other}"]):
                    told[other] = store.get(f"netsenseml/failed/{other}").decode()
            silent = [other for other, text in enumerate(told) if text is None]
            spent_s = time.monotonic() - began_s
            settled = len(silent) <= 1 or set(silent) <= set(seen)
            if any(told) or spent_s > _PATIENCE_S or (settled and spent_s > _GRACE_S):
                break
            time.sleep(_GRACE_S / 20)
        store.set(f"netsenseml/read/{rank}", "")
        while rank == 0 and time.monotonic() - began_s < _PATIENCE_S:  # the store may be with this rank, and end with it
            if all(text is None or store.check([f"netsenseml/read/{other}"]) for other, text in enumerate(told)):
                break
            time.sleep(_GRACE_S / 20)
    except RuntimeError:
        return told if told[0] is not None else None  # rank 0 has told all it knew, and has left
    return told
