"""A testbed for communication-efficient distributed training over links that the kernel shapes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testbed.results.load import Run, load_run

__all__ = ["Run", "load_run"]


def __getattr__(name: str) -> Any:
    # pandas takes a second to import; the command line must not wait for it.
    if name in __all__:
        from testbed.results import load

        return getattr(load, name)
    raise AttributeError(f"module 'testbed' has no attribute {name!r}")
