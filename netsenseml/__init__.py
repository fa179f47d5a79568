"""Communication for distributed data-parallel training that adapts to the network.

    session = netsenseml.attach(ddp_model, method="netsense")

Importing this package loads no torch; the first use of ``attach`` or ``Session`` does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from netsenseml.hook import Session, attach, comm_hook

__all__ = ["Session", "attach", "comm_hook"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from netsenseml import hook  # loads torch

        return getattr(hook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
