"""A testbed for communication-efficient distributed training over links that the kernel shapes."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testbed.experiment import run_experiment
    from testbed.results.load import Run, load_run

_WHERE = {"Run": "results.load", "load_run": "results.load", "run_experiment": "experiment"}

__all__ = ["Run", "load_run", "run_experiment"]


def __getattr__(name: str) -> Any:
    # pandas takes a second to import; the command line must not wait for it.
    if name in _WHERE:
        return getattr(importlib.import_module(f"testbed.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'testbed' has no attribute {name!r}")
