"""Labs for the tests that need a kernel with netem, and a table of the figures they measured."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from wire import RATE_BPS, ping

from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links.state import LinkParameters, LinkState

ENGINE = os.environ.get("NETSENSE_ENGINE", "netem")
_figures: list[tuple[str, str, str]] = []


def pair_state(**impairments: object) -> LinkState:
    """A link of the tests' usual rate, with impairments on its down direction."""
    return LinkState(
        LinkParameters(rate_bps=RATE_BPS), LinkParameters(rate_bps=RATE_BPS, **impairments)
    )  # type: ignore[arg-type]


class Pair(NetnsLab):
    """Two hosts at one switch. Flows go from w0 to w1."""

    def set(self, **impairments: object) -> None:
        """Put the down directions of both links into a state, and hold the kernel to it."""
        applied = self.links.apply(dict.fromkeys(("w0", "w1"), pair_state(**impairments)))
        assert all(change.verified for change in applied.values())


@contextmanager
def _pair(server: ForkServer) -> Iterator[Pair]:
    links = dict.fromkeys(("w0", "w1"), pair_state())
    impaired = frozenset((name, "down") for name in links)
    with Pair(LabPlan(links, impaired=impaired, engine=ENGINE), server) as lab:
        for attempt in range(3):  # a guest kernel that gets no processor for a while answers late
            try:
                ping(lab.hosts["w0"], lab.hosts["w1"].address, 1)
                break
            except TimeoutError:
                if attempt == 2:
                    raise
        yield lab


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A pair that starts no programs; the tests hold the sockets themselves."""
    with _pair(ForkServer()) as lab:
        yield lab


@pytest.fixture
def pair_with_programs() -> Iterator[Pair]:
    with ForkServer() as server, _pair(server) as lab:
        yield lab


@pytest.fixture
def engine() -> str:
    """What impairs the links: "netem" under User-Mode Linux, "userspace" on the kernel that we
    have."""
    return ENGINE


@pytest.fixture
def figure() -> Callable[[str, str, str], None]:
    """Notes what was wanted and what was measured, for the table at the end."""
    return lambda what, wanted, measured: _figures.append((what, wanted, measured))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _figures:
        terminalreporter.section("figures")
        widths = [max(len(row[column]) for row in _figures) for column in range(3)]
        for row in _figures:
            terminalreporter.write_line(
                "  ".join(
                    cell.ljust(width) for cell, width in zip(row, widths, strict=True)
                ).rstrip()
            )
