"""The codec on a CUDA device: the same bytes as on the CPU, and the same bits back; also by what
may take its kernels' place.

With TRITON_INTERPRET=1 Triton's kernels are run without a device, slowly, wherever Triton is
installed.
"""

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netsenseml.compress import codec as codec_module
from netsenseml.compress.codec import VALUES, Codec, MalformedBuffer, Sent, add_decoded
from netsenseml.compress.layout import HEADER_BYTES

codecs = st.builds(
    Codec,
    st.sampled_from(list(VALUES)),
    st.sampled_from([1.0, 0.5, 0.2, 0.05, 0.01, 0.001]),
    st.booleans(),
)
any_float = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = 300 if DEVICE == "cuda" else 40
LARGE = 200_003 if DEVICE == "cuda" else 20_003

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: type, *given: object) -> None:
        """With Triton 3.6 the bounds of a loop are arrays of one element, which NumPy 2.4 takes for
        no number."""
        patch_tensor(tensor, *given)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor_and_index


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num().view(torch.int32).cpu()


sys.path.append(str(Path(__file__).parents[2] / "experiments" / "bench"))
BACKENDS = (
    "netsenseml.compress.device_kernels",
    "netsenseml.compress.tensors",
    "cooperative_kernels",
)


def coded(
    backend: str,
    device: str,
    codec: Codec,
    x: torch.Tensor,
    seed: int,
    scale: float,
    chosen: torch.Tensor | None,
) -> list[torch.Tensor]:
    module = importlib.import_module(backend)
    with mock.patch.object(codec_module, "_backend", lambda _: module):
        residual, sent = x.to(device, copy=True), Sent()
        buffer = codec.encode(
            residual, seed, sent=sent, chosen=None if chosen is None else chosen.to(device)
        )
        out = add_decoded(buffer, torch.ones(len(x), device=device), scale)
        positions = torch.empty(0) if sent.positions is None else sent.positions.cpu()
        return [buffer.cpu(), bits(residual), bits(out), positions]


def check(
    codec: Codec, x: torch.Tensor, seed: int, scale: float, chosen: torch.Tensor | None = None
) -> None:
    expected = coded("netsenseml.compress.arrays", "cpu", codec, x, seed, scale, chosen)
    for backend in BACKENDS:
        found = coded(backend, DEVICE, codec, x, seed, scale, chosen)
        for what, ours, theirs in zip(
            ("bytes", "residual", "sum", "positions"), found, expected, strict=True
        ):
            assert torch.equal(ours, theirs), f"{backend}, {codec}: {what}"


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    codecs,
    st.lists(any_float, max_size=40),
    st.integers(0, 99),
    st.sampled_from([1.0, 0.25, 1 / 3]),
)
def test_any_numbers_are_coded_as_on_the_cpu(
    codec: Codec, x: list[float], seed: int, scale: float
) -> None:
    check(codec, torch.tensor(x, dtype=torch.float32), seed, scale)


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(
    codecs,
    st.integers(0, 100_000 if DEVICE == "cuda" else 3000),
    st.integers(0, 99),
    st.sampled_from(["normal", "heavy", "few distinct", "mostly zeros"]),
)
def test_gradients_of_any_size_are_coded_as_on_the_cpu(
    codec: Codec, n: int, seed: int, kind: str
) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    if kind == "heavy":
        x = x**5
    elif kind == "few distinct":
        x = x.round()
    elif kind == "mostly zeros":
        x[torch.arange(n) % 400 > 0] = 0
    check(codec, x, seed, 1 / 3)


@pytest.mark.parametrize("density", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("values", list(VALUES))
def test_five_million_are_coded_as_on_the_cpu(values: str, density: float) -> None:
    elements = 5_000_003 if DEVICE == "cuda" else 20_003
    check(
        Codec(values, density),
        torch.randn(elements, generator=torch.Generator().manual_seed(1)) ** 3,
        1,
        0.25,
    )


@pytest.mark.parametrize("zeros", [0.9, 0.995, 1.0])
def test_zeros_are_sent_only_where_nothing_else_is_left(zeros: float) -> None:
    x = torch.randn(
        200_000 if DEVICE == "cuda" else 20_000, generator=torch.Generator().manual_seed(2)
    )
    x[: round(zeros * len(x))] = 0
    check(Codec("int8", 0.01), x, 1, 0.25)


def one_huge(x: torch.Tensor) -> None:
    x[len(x) // 2] = 3e38


def not_finite(x: torch.Tensor) -> None:
    x[::700], x[::900], x[::1100] = float("nan"), float("inf"), -float("inf")


def in_the_sample(backend: str, factor: float, x: torch.Tensor) -> None:
    """Elements of the sample from which kernels guess are larger, or smaller, than others."""
    stride, _ = importlib.import_module(backend).sampling(len(x), len(x) // 100)
    x[::stride] *= factor


def large_at_the_end(x: torch.Tensor) -> None:
    x[-len(x) // 50 :] *= 1000


CHANGES = [
    lambda x: x.fill_(-0.5),
    lambda x: x.sign_(),
    one_huge,
    not_finite,
    large_at_the_end,
    *(
        partial(in_the_sample, backend, factor)
        for backend in (BACKENDS[0], BACKENDS[2])
        for factor in (1000, 0.001)
    ),
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_largest_are_found_whatever_a_sample_says(
    change: Callable[[torch.Tensor], object],
) -> None:
    x = torch.randn(LARGE, generator=torch.Generator().manual_seed(3))
    change(x)
    check(Codec("int8", 0.01), x, 1, 0.25)


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 4095, 4096, 4097, 8193])
def test_tensors_that_fill_no_tile_and_one_that_does_are_coded_as_on_the_cpu(n: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(4))
    for codec in (
        Codec("bf16", 0.3),
        Codec("sign", 1 / n),
        Codec("int4", 1 - 1 / n if n > 1 else 1.0),
    ):
        check(codec, x, 1, 0.25)


@pytest.mark.parametrize("codec", [Codec("fp32", 0.02), Codec("int8", 0.02)])
def test_chosen_elements_are_coded_as_on_the_cpu(codec: Codec) -> None:
    x = torch.randn(LARGE, generator=torch.Generator().manual_seed(5))
    check(codec, x, 1, 0.25, chosen=torch.arange(codec.elements(LARGE)) * 49 + 3)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("codec", [Codec("int8"), Codec("int8", 0.01)])
def test_encoding_does_not_wait_for_the_device(codec: Codec) -> None:
    """Dense as it is; sparse by what may come."""
    module, x = (
        importlib.import_module(BACKENDS[0] if codec.density == 1 else BACKENDS[2]),
        torch.randn(LARGE, device=DEVICE),
    )
    with mock.patch.object(codec_module, "_backend", lambda _: module):
        codec.encode(x, 0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            codec.encode(x, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[2]])
def test_a_buffer_of_the_host_is_added_on_the_device_and_a_damaged_one_is_not(backend: str) -> None:
    codec, x, kernels = Codec("int8", 0.01), torch.randn(100_000), importlib.import_module(backend)
    buffer = codec.encode(x, 0)
    expected = add_decoded(buffer, torch.zeros(100_000))
    with mock.patch.object(codec_module, "_backend", lambda _: kernels):
        assert torch.equal(add_decoded(buffer, torch.zeros(100_000, device=DEVICE)).cpu(), expected)
        for first, damage in ((HEADER_BYTES, 255), (HEADER_BYTES, 0), (HEADER_BYTES + 800, 255)):
            damaged, out = buffer.clone(), torch.zeros(100_000, device=DEVICE)
            damaged[first : first + 64] = damage
            with pytest.raises(MalformedBuffer, match="positions"):
                add_decoded(damaged, out)
            assert not out.any()
