"""Real process groups for tests: every rank is a process, Gloo runs over loopback."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# A server that has imported torch once and forks the ranks: this is also how the testbed starts
# workers.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["testbed.worker.program", "netsenseml.api", "torch._dynamo"])


class Ranks:
    """Processes that run ``function(*arguments[r])``; the results come back pickled."""

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        env: Mapping[str, str],
        log: Path | None = None,
    ) -> None:
        self.processes, self._results = [], []
        for rank, given in enumerate(arguments):
            ours, theirs = _PROCESSES.Pipe(duplex=False)
            own_env = {
                "GLOO_SOCKET_IFNAME": "lo",
                "RANK": str(rank),
                "WORLD_SIZE": str(len(arguments)),
                **env,
            }
            process = _PROCESSES.Process(
                target=_run, args=(theirs, own_env, log, function, given), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._results.append(ours)

    def results(self, timeout_s: float = 120) -> list[Any]:
        """What the ranks returned; raises if one of them failed or took too long."""
        try:
            found = []
            for rank, result in enumerate(self._results):
                if not result.poll(timeout_s):
                    raise TimeoutError(f"rank {rank} is not done after {timeout_s} s")
                ok, value = result.recv()
                assert ok, f"rank {rank} failed:\n{value}"
                found.append(value)
            return found
        finally:
            self.end()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def run_group(
    function: Callable[..., Any], ranks: int, *arguments: Any, timeout_s: float = 1800
) -> list[Any]:
    """Results of ``function(rank, *arguments)`` in a process group of so many ranks; timeout_s: of
    the group."""
    with tempfile.TemporaryDirectory() as directory:
        given = [(function, directory, rank, ranks, timeout_s, arguments) for rank in range(ranks)]
        return Ranks(_in_group, given, {}).results()


def wait_for_others(name: str) -> None:
    """Wait for all ranks beside all groups, so that no time-out of theirs counts."""
    import torch.distributed as dist

    from netsenseml.exchange.mesh import store_of

    store = store_of(dist.group.WORLD)
    store.set(f"test/{name}/{dist.get_rank()}", "")
    store.wait(
        [f"test/{name}/{rank}" for rank in range(dist.get_world_size())], timedelta(seconds=100)
    )


def _in_group(
    function: Callable[..., Any],
    directory: str,
    rank: int,
    ranks: int,
    timeout_s: float,
    arguments: tuple[Any, ...],
) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        result = function(rank, *arguments)
        dist.barrier()
        return result
    finally:
        dist.destroy_process_group()


def _run(
    results: Connection,
    env: Mapping[str, str],
    log: Path | None,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(env)
    if log is not None:
        descriptor = os.open(f"{log}-{env['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, sys.stderr.fileno())
    try:
        results.send((True, function(*arguments)))
    except BaseException:
        results.send((False, traceback.format_exc()))
