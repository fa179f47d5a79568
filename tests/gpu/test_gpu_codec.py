"""The codec on a CUDA device: the same bytes as on the CPU, and the same bits back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netsenseml.compress.codec import VALUES, Codec, MalformedBuffer, Sent, add_decoded
from netsenseml.compress.layout import HEADER_BYTES

codecs = st.builds(Codec, st.sampled_from(list(VALUES)), st.sampled_from([1.0, 0.5, 0.2, 0.05, 0.01, 0.001]), st.booleans())
any_float = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num().view(torch.int32).cpu()


def check(codec: Codec, x: torch.Tensor, seed: int, scale: float) -> None:
    found = []
    for device in ("cpu", "cuda"):
        residual, sent = x.to(device, copy=True), Sent()
        buffer = codec.encode(residual, seed, sent=sent)
        out = add_decoded(buffer, torch.ones(len(x), device=device), scale)
        positions = torch.empty(0) if sent.positions is None else sent.positions.cpu()
        found.append((buffer.cpu(), bits(residual), bits(out), positions))
    for of_cpu, of_device in zip(*found, strict=True):
        assert torch.equal(of_cpu, of_device), codec


@settings(max_examples=400, deadline=None)
@given(codecs, st.lists(any_float, max_size=40), st.integers(0, 99), st.sampled_from([1.0, 0.25, 1 / 3]))
def test_any_numbers_are_coded_as_on_the_cpu(codec: Codec, x: list[float], seed: int, scale: float) -> None:
    check(codec, torch.tensor(x, dtype=torch.float32), seed, scale)


@settings(max_examples=150, deadline=None)
@given(
    codecs, st.integers(0, 100_000), st.integers(0, 99), st.sampled_from(["normal", "heavy", "few distinct", "mostly zeros"])
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
    check(Codec(values, density), torch.randn(5_000_003, generator=torch.Generator().manual_seed(1)) ** 3, 1, 0.25)


def test_a_buffer_of_the_host_is_added_on_the_device_and_a_damaged_one_is_not() -> None:
    codec, x = Codec("int8", 0.01), torch.randn(100_000)
    buffer = codec.encode(x, 0)
    expected = add_decoded(buffer, torch.zeros(100_000))
    assert torch.equal(add_decoded(buffer, torch.zeros(100_000, device="cuda")).cpu(), expected)
    damaged, out = buffer.clone(), torch.zeros(100_000, device="cuda")
    damaged[HEADER_BYTES : HEADER_BYTES + 64] = 255
    with pytest.raises(MalformedBuffer, match="positions"):
        add_decoded(damaged, out)
    assert not out.any()
