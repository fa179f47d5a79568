"""The codec on a CUDA device: the same bytes as on the CPU, and the same bits back.

With TRITON_INTERPRET=1 Triton's kernels are run without a device, slowly, wherever Triton is installed.
"""

import importlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netsenseml.compress import codec as codec_module
from netsenseml.compress.codec import VALUES, Codec, MalformedBuffer, Sent, add_decoded
from netsenseml.compress.layout import HEADER_BYTES

codecs = st.builds(Codec, st.sampled_from(list(VALUES)), st.sampled_from([1.0, 0.5, 0.2, 0.05, 0.01, 0.001]), st.booleans())
any_float = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = 300 if DEVICE == "cuda" else 40


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num().view(torch.int32).cpu()


def coded(backend: str, device: str, codec: Codec, x: torch.Tensor, seed: int, scale: float) -> list[torch.Tensor]:
    module = importlib.import_module(f"netsenseml.compress.{backend}")
    with mock.patch.object(codec_module, "_backend", lambda _: module):
        residual, sent = x.to(device, copy=True), Sent()
        buffer = codec.encode(residual, seed, sent=sent)
        out = add_decoded(buffer, torch.ones(len(x), device=device), scale)
        positions = torch.empty(0) if sent.positions is None else sent.positions.cpu()
        return [buffer.cpu(), bits(residual), bits(out), positions]


def check(codec: Codec, x: torch.Tensor, seed: int, scale: float) -> None:
    expected = coded("arrays", "cpu", codec, x, seed, scale)
    for backend in ("device_kernels", "tensors"):
        for what, ours, theirs in zip(
            ("bytes", "residual", "sum", "positions"), coded(backend, DEVICE, codec, x, seed, scale), expected, strict=True
        ):
            assert torch.equal(ours, theirs), f"{backend}, {codec}: {what}"


@settings(max_examples=EXAMPLES, deadline=None)
@given(codecs, st.lists(any_float, max_size=40), st.integers(0, 99), st.sampled_from([1.0, 0.25, 1 / 3]))
def test_any_numbers_are_coded_as_on_the_cpu(codec: Codec, x: list[float], seed: int, scale: float) -> None:
    check(codec, torch.tensor(x, dtype=torch.float32), seed, scale)


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(
    codecs,
    st.integers(0, 100_000 if DEVICE == "cuda" else 3000),
    st.integers(0, 99),
    st.sampled_from(["normal", "heavy", "few distinct", "mostly zeros"]),
)
def test_gradients_of_any_size_are_coded_as_on_the_cpu(codec: Codec, n: int, seed: int, kind: str) -> None:
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
    check(Codec(values, density), torch.randn(elements, generator=torch.Generator().manual_seed(1)) ** 3, 1, 0.25)


@pytest.mark.parametrize("zeros", [0.9, 0.995, 1.0])
def test_zeros_are_sent_only_where_nothing_else_is_left(zeros: float) -> None:
    x = torch.randn(200_000 if DEVICE == "cuda" else 20_000, generator=torch.Generator().manual_seed(2))
    x[: round(zeros * len(x))] = 0
    check(Codec("int8", 0.01), x, 1, 0.25)


def test_a_buffer_of_the_host_is_added_on_the_device_and_a_damaged_one_is_not() -> None:
    codec, x, kernels = Codec("int8", 0.01), torch.randn(100_000), importlib.import_module("netsenseml.compress.device_kernels")
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
