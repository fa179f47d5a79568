"""How methods and conditions are called and ordered in every table and figure. Imports no
pandas."""

from collections.abc import Iterable, Mapping
from typing import Any

BASELINE = "allreduce"


def scenario(overrides: Mapping[str, Any]) -> str:
    """Text that is equal for equal overrides, "network.link.rate=200mbit"; "" for none."""
    return ", ".join(f"{key}={overrides[key]}" for key in sorted(overrides))


def method_order(methods: Iterable[str]) -> list[str]:
    """Each method once, the baseline first, the others by name: the one order of all tables and
    figures."""
    return sorted(set(methods), key=lambda method: (method != BASELINE, method))
