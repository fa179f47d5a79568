"""Kernels are compiled once on a machine, by one process, and kept; what was kept badly is not
believed."""

import fcntl
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import netsenseml.compress
from netsenseml.compress import kernels
from netsenseml.compress.codec import Codec

pytestmark = pytest.mark.fast

MADE = ({"half": "void(f4[::1])"}, b"\n\0 object code \n\xff")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When something was compiled, by what stands for the compiler and takes a while."""
    when = []

    def build(_: Any) -> tuple[dict[str, str], bytes]:
        when.append(time.monotonic())
        time.sleep(0.1)
        return MADE

    monkeypatch.setattr(netsenseml.compress, "loops", SimpleNamespace(build=build), raising=False)
    return when


def test_they_are_compiled_once_and_kept(compiled: list[float], tmp_path: Path) -> None:
    for _ in range(3):
        assert kernels.kept([tmp_path / "new"], "name", None) == MADE
    assert len(compiled) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["name"]


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-3], lambda content: b"", lambda content: content + b"0"]
)
def test_half_a_file_is_made_anew(compiled: list[float], damage: Any, tmp_path: Path) -> None:
    kernels.kept([tmp_path], "name", None)
    (tmp_path / "name").write_bytes(damage((tmp_path / "name").read_bytes()))
    assert kernels.kept([tmp_path], "name", None) == kernels.kept([tmp_path], "name", None) == MADE
    assert len(compiled) == 2


def test_where_nothing_can_be_written_they_are_kept_elsewhere_or_not_at_all(
    compiled: list[float], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    closed = tmp_path / "file" / "cache"
    assert kernels.kept([closed], "name", None) == kernels.kept([closed], "name", None) == MADE
    assert len(compiled) == 2
    for _ in range(2):
        assert kernels.kept([closed, tmp_path / "open"], "name", None) == MADE
    assert len(compiled) == 3


def test_of_several_that_come_at_once_one_compiles(compiled: list[float], tmp_path: Path) -> None:
    """Locks of a file exclude each other in one process, too."""
    begin = threading.Barrier(4)

    def come(_: int) -> Any:
        begin.wait()
        return kernels.kept([tmp_path], "name", None)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(come, range(4))) == [MADE] * 4
    assert len(compiled) == 1


def test_for_one_that_has_been_stopped_nobody_waits_for_ever(
    compiled: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "_PATIENCE_S", 0.2)
    stopped = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(stopped, fcntl.LOCK_EX)
    try:
        began_s = time.monotonic()
        assert kernels.kept([tmp_path], "name", None) == MADE
        assert compiled[0] - began_s >= 0.2
        assert (tmp_path / "name").exists()
    finally:
        os.close(stopped)


def test_one_that_was_forked_off_meanwhile_keeps_no_lock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It has open what its parent had."""
    really, inherited = os.open, list[int]()

    def open_twice(*arguments: Any) -> int:
        descriptor = really(*arguments)
        inherited.append(os.dup(descriptor))
        return descriptor

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", open_twice)
        with kernels._alone(tmp_path):
            pass
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for descriptor in (other, *inherited):
        os.close(descriptor)


def test_arrays_of_another_kind_are_refused() -> None:
    """Their address would be all that a kernel looks at."""
    x, positions = np.zeros(8, np.float32), np.arange(4, dtype=np.uint32)
    for values in (
        np.zeros(4, np.float64),
        np.zeros(8, np.float32)[::2],
        np.zeros((2, 2), np.float32),
    ):
        with pytest.raises(TypeError, match="not contiguous float32 of 1 dimensions"):
            kernels.scatter(x, positions, values)


def encoded(seed: int) -> list[int]:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(seed))
    return Codec("int8", 0.01).encode(x, 0).tolist()


def send_encoded(results: Any, seed: int) -> None:
    results.send(encoded(seed))


def test_processes_that_are_forked_off_and_threads_use_them_too() -> None:
    context = multiprocessing.get_context("fork")
    results, sending = context.Pipe(duplex=False)
    expected = [encoded(seed) for seed in range(8)]
    child = context.Process(target=send_encoded, args=(sending, 3))
    child.start()
    sending.close()  # so that the end of the child is the end of the pipe
    assert results.poll(60), "the child hangs"
    assert results.recv() == expected[3]
    child.join(60)
    assert child.exitcode == 0
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(encoded, range(8))) == expected
