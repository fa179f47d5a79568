"""Selection, as properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netsenseml.compress.sparsify import kept_elements, largest, sampling

pytestmark = pytest.mark.fast

torch.set_num_threads(1)

ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


def rank_by_magnitude(values: torch.Tensor) -> list[int]:
    """Indices by the stated rule: by magnitude, NaN above infinity, lower index first among
    equals."""
    magnitude = (values.view(torch.int32) & 0x7FFFFFFF).tolist()
    return sorted(range(len(magnitude)), key=lambda i: (-magnitude[i], i))


@given(st.lists(ANY_FLOAT, min_size=1, max_size=60), st.data())
def test_largest_takes_exactly_k_by_the_stated_rule(
    values: list[float], data: st.DataObject
) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(1, len(values)))
    assert largest(x, k).tolist() == sorted(rank_by_magnitude(x)[:k])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["normal", "heavy", "few distinct", "zeros", "one spike", "NaN"]),
    st.integers(16_000, 120_000),
    st.floats(1e-5, 1.0),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_guessed_threshold_changes_nothing(
    shape: str, n: int, ratio: float, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator)
    if shape == "heavy":
        x = x**5
    elif shape == "few distinct":
        x = x.round()
    elif shape == "zeros":
        x.zero_()
    elif shape == "one spike":
        x.zero_()[n // 3] = 1
    elif shape == "NaN":
        x[:: max(1, n // 50)] = math.nan
    x = x.to(dtype)
    k = kept_elements(n, ratio)
    magnitude = x.float().view(torch.int32) & 0x7FFFFFFF
    expected = magnitude.sort(descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(largest(x, k), expected)


@given(st.integers(1, 2**31 - 1), st.floats(1e-9, 1.0))
def test_a_sample_has_the_rank_that_is_asked_for(n: int, ratio: float) -> None:
    stride, rank = sampling(n, kept_elements(n, ratio))
    size = -(-n // stride)
    assert stride % 2 == 1 and 1 <= rank <= size <= 1.2 * 2**14


@given(st.integers(0, 10**7), st.floats(1e-6, 1.0))
def test_slots_cover_the_ratio(elements: int, ratio: float) -> None:
    k = kept_elements(elements, ratio)
    assert min(elements, 1) <= k <= elements
    assert abs(k - ratio * elements) <= 1


def test_slots_do_not_round_noise_up() -> None:
    assert kept_elements(30, 0.1) == 3
    assert kept_elements(100, 1.0) == 100


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 3"):
        largest(torch.ones(3), k)
