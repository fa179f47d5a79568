"""Selection, packing and error feedback, as properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netsenseml.compress.feedback import ErrorFeedback
from netsenseml.compress.pack import BYTES_PER_ELEMENT, pack, unpack
from netsenseml.compress.sparsify import largest, slots

torch.set_num_threads(1)

ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


def rank_by_magnitude(values: torch.Tensor) -> list[int]:
    """Indices by the stated rule: by magnitude, NaN as infinity, lower index first among equals."""
    magnitude = [math.inf if math.isnan(v) else abs(v) for v in values.tolist()]
    return sorted(range(len(magnitude)), key=lambda i: (-magnitude[i], i))


@given(st.lists(ANY_FLOAT, min_size=1, max_size=60), st.data())
def test_largest_takes_exactly_k_by_the_stated_rule(values: list[float], data: st.DataObject) -> None:
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
def test_the_guessed_threshold_changes_nothing(shape: str, n: int, ratio: float, seed: int, dtype: torch.dtype) -> None:
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
    k = slots(n, ratio)
    found = largest(x, k)
    magnitude = x.float().abs().nan_to_num(nan=math.inf, posinf=math.inf)
    assert found.numel() == k and bool((found.diff() > 0).all())
    expected = magnitude.sort(descending=True).values[:k]
    assert torch.equal(magnitude[found].sort(descending=True).values, expected)


@given(st.integers(0, 10**7), st.floats(1e-6, 1.0))
def test_slots_cover_the_ratio(elements: int, ratio: float) -> None:
    k = slots(elements, ratio)
    assert min(elements, 1) <= k <= elements
    assert abs(k - ratio * elements) <= 1


def test_slots_do_not_round_noise_up() -> None:
    assert slots(30, 0.1) == 3
    assert slots(100, 1.0) == 100


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 3"):
        largest(torch.ones(3), k)


@given(st.lists(st.tuples(ANY_FLOAT, st.integers(0, 2**31 - 1)), max_size=50))
def test_packing_is_exact_to_the_bit(pairs: list[tuple[float, int]]) -> None:
    values = torch.tensor([value for value, _ in pairs], dtype=torch.float32)
    indices = torch.tensor([index for _, index in pairs], dtype=torch.int64)
    buffer = pack(values, indices)
    assert buffer.dtype == torch.uint8 and buffer.numel() == BYTES_PER_ELEMENT * len(pairs)
    got_values, got_indices = unpack(buffer)
    assert torch.equal(got_values.view(torch.int32), values.view(torch.int32))
    assert torch.equal(got_indices, indices.int())


def test_malformed_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="not a packed buffer"):
        unpack(torch.zeros(7, dtype=torch.uint8))
    with pytest.raises(ValueError, match="not a packed buffer"):
        unpack(torch.zeros(8))
    with pytest.raises(ValueError, match="one shape"):
        pack(torch.zeros(3), torch.zeros(2, dtype=torch.int64))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_residuals_follow_their_parameters_into_other_buckets(sizes: list[int], data: st.DataObject) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    feedback = ErrorFeedback((f"p{i}", parameter) for i, parameter in enumerate(parameters))
    for i, parameter in enumerate(parameters):
        feedback.residual([parameter]).fill_(i + 1)
    for _ in range(3):
        order = data.draw(st.permutations(range(len(parameters))))
        cut = data.draw(st.integers(0, len(order)))
        for bucket in filter(None, (order[:cut], order[cut:])):
            flat = feedback.residual([parameters[i] for i in bucket])
            assert flat.tolist() == [i + 1 for i in bucket for _ in range(sizes[i])]
    assert {name: set(r.tolist()) for name, r in feedback.state_dict().items()} == {
        f"p{i}": {i + 1.0} for i in range(len(parameters))
    }


def test_feedback_survives_a_checkpoint() -> None:
    parameters = [("a", torch.nn.Parameter(torch.zeros(2, 3))), ("b", torch.nn.Parameter(torch.zeros(4)))]
    old, new = ErrorFeedback(parameters), ErrorFeedback(parameters)
    old.residual([parameter for _, parameter in parameters]).copy_(torch.arange(10))
    state = old.state_dict()
    old.residual([parameter for _, parameter in parameters]).zero_()  # a checkpoint is a copy
    new.load_state_dict(state)
    assert new.residual([parameters[1][1], parameters[0][1]]).tolist() == [6, 7, 8, 9, 0, 1, 2, 3, 4, 5]
    with pytest.raises(KeyError):
        new.load_state_dict({"c": torch.zeros(1)})
