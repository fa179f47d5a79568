"""Communication for distributed data-parallel training that adapts to the network.

    session = netsenseml.attach(ddp_model, method="netsense")

Behind it is a compressed collective that can be used by itself:
``all_reduce_mean(tensor, key, plan, mesh)``. Importing this package loads no torch; the first use
of one of its names does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from netsenseml.api import attach
    from netsenseml.compress.codec import Codec
    from netsenseml.exchange.collective import all_reduce_mean
    from netsenseml.exchange.communicators import (
        DirectAllReduce,
        Hierarchical,
        RingAllReduce,
        SparseAllGather,
    )
    from netsenseml.exchange.mesh import Mesh
    from netsenseml.failure import PeerFailed
    from netsenseml.hook import Session, comm_hook

_WHERE = {
    **dict.fromkeys(("Session", "comm_hook"), "hook"),
    **dict.fromkeys(
        ("DirectAllReduce", "Hierarchical", "RingAllReduce", "SparseAllGather"),
        "exchange.communicators",
    ),
    "Codec": "compress.codec",
    "Mesh": "exchange.mesh",
    "attach": "api",
    "PeerFailed": "failure",
    "all_reduce_mean": "exchange.collective",
}

__all__ = [
    "Codec",
    "DirectAllReduce",
    "Hierarchical",
    "Mesh",
    "PeerFailed",
    "RingAllReduce",
    "Session",
    "SparseAllGather",
    "all_reduce_mean",
    "attach",
    "comm_hook",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"netsenseml.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
