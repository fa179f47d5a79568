"""Who failed, when a collective did."""

import re
import time
from collections.abc import Sequence

import torch.distributed as dist

from netsenseml.exchange.mesh import Peer, store_of, timeout

_GRACE_S = 1.0
"""So long after a first rank others may notice a failure: they wait for the same peer, since about the same moment."""


class PeerFailed(RuntimeError):
    """A peer has died, or has not answered within the time-out of the process group. The session is of no use any more."""


def explain(error: BaseException, group: dist.ProcessGroup, peers: Sequence[Peer], rank: int) -> str:
    """One line that names the peers that are gone, as far as that can be found out; waits for ``_GRACE_S``.

    Every rank that sees a failure says so in the store; those that do not are dead or silent.
    """
    what = str(error).splitlines()[0] if str(error) else type(error).__name__
    silent = _silent(group, len(peers), rank)
    if not silent:
        found = {address for address in re.findall(r"\[([0-9A-Fa-f.:]+)\]:\d+", what)}
        silent = [other for other, peer in enumerate(peers) if peer.address in found and other != rank]
    if not silent:
        return f"the exchange of gradients failed: {what}"
    names = ", ".join(f"{other}" + (f" ({peers[other].address})" if peers[other].address else "") for other in silent)
    late = "timed out" in what.lower() or "timeout" in what.lower()
    did = f"did not answer within {timeout(group).total_seconds():g} s" if late else "is gone"
    return f"rank{'s' * (len(silent) > 1)} {names} {did}: {what}"


def _silent(group: dist.ProcessGroup, ranks: int, rank: int) -> list[int]:
    try:
        store = store_of(group)
        keys = [f"netsenseml/failed/{other}" for other in range(ranks)]
        store.set(keys[rank], "")
        given_up_s = time.monotonic() + _GRACE_S
        while (
            missing := [other for other in range(ranks) if not store.check([keys[other]])]
        ) and time.monotonic() < given_up_s:
            time.sleep(_GRACE_S / 20)
    except RuntimeError:  # the store was with the rank that is gone
        return []
    return missing
