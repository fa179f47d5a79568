"""Selection and error feedback, as properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netsenseml.compress.codec import Codec, Sent
from netsenseml.compress.feedback import ErrorFeedback, energy_lost, sample
from netsenseml.compress.sparsify import largest, sampling, slots

torch.set_num_threads(1)

ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


def rank_by_magnitude(values: torch.Tensor) -> list[int]:
    """Indices by the stated rule: by magnitude, NaN above infinity, lower index first among equals."""
    magnitude = (values.view(torch.int32) & 0x7FFFFFFF).tolist()
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
    magnitude = x.float().view(torch.int32) & 0x7FFFFFFF
    expected = magnitude.sort(descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(largest(x, k), expected)


@given(st.integers(1, 2**31 - 1), st.floats(1e-9, 1.0))
def test_a_sample_has_the_rank_that_is_asked_for(n: int, ratio: float) -> None:
    stride, rank = sampling(n, slots(n, ratio))
    size = -(-n // stride)
    assert stride % 2 == 1 and 1 <= rank <= size <= 1.2 * 2**14


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


def small_model() -> list[tuple[str, torch.nn.Parameter]]:
    return [("a", torch.nn.Parameter(torch.zeros(2, 3))), ("b", torch.nn.Parameter(torch.zeros(4)))]


def test_momentum_is_corrected_and_masked_as_in_the_paper() -> None:
    """Against Algorithm 1 of deep gradient compression, element by element, with buckets rebuilt after the first step."""
    (_, a), (_, b) = named = small_model()
    feedback = ErrorFeedback(named, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    velocity, waiting = torch.zeros(10), torch.zeros(10)
    codec, sent = Codec("fp32", 0.3), Sent()
    for step in range(20):
        gradient = torch.randn(10, generator=generator)
        velocity = 0.9 * velocity + gradient
        waiting = waiting + velocity
        order = torch.arange(10) if step == 0 else torch.arange(10).roll(-6)  # b first, from the second step on
        parameters = [a, b] if step == 0 else [b, a]
        wanted = feedback.accumulate(parameters, gradient[order])
        torch.testing.assert_close(wanted, waiting[order])
        codec.encode(wanted, step, sent=sent)
        feedback.mask(parameters, sent.positions)
        assert sent.positions is not None
        velocity[order[sent.positions]] = waiting[order[sent.positions]] = 0


def test_without_compression_momentum_is_plain_momentum() -> None:
    (_, a), (_, b) = named = small_model()
    feedback, velocity, sent = ErrorFeedback(named, momentum=0.5), torch.zeros(10), Sent()
    for step in range(5):
        gradient = torch.full((10,), float(step)).bfloat16()
        velocity = 0.5 * velocity + gradient
        wanted = feedback.accumulate([a, b], gradient)
        assert torch.equal(wanted, velocity)
        Codec("fp32").encode(wanted, step, sent=sent)
        feedback.mask([a, b], sent.positions)


def test_velocities_survive_a_checkpoint() -> None:
    (_, a), (_, b) = named = small_model()
    old, new, plain = ErrorFeedback(named, momentum=0.5), ErrorFeedback(named, momentum=0.5), ErrorFeedback(named)
    old.accumulate([a, b], torch.arange(10.0))
    old.residual([a, b]).mul_(2)
    state = old.state_dict()
    assert set(state) == {"a", "b", "a:velocity", "b:velocity"} and state["a:velocity"].shape == (2, 3)
    new.load_state_dict(state)
    assert torch.equal(new.accumulate([b, a], torch.zeros(10)), 2.5 * torch.arange(10.0).roll(-6))
    plain.load_state_dict(state)
    assert torch.equal(plain.residual([a, b]), 2 * torch.arange(10.0)) and set(plain.state_dict()) == {"a", "b"}


@pytest.mark.parametrize(("codec", "tolerance"), [(Codec("bf16", 0.1), 0.03), (Codec("int4"), 0.05), (Codec("sign"), 0.02)])
def test_the_energy_lost_is_estimated_from_a_sample(codec: Codec, tolerance: float) -> None:
    wanted = torch.randn(500_000, generator=torch.Generator().manual_seed(0))
    whole, before = wanted.square().sum(), sample(wanted)
    codec.encode(wanted, 0)
    assert energy_lost(before, wanted) == pytest.approx(float(wanted.square().sum() / whole), rel=tolerance)


def test_of_no_energy_none_is_lost() -> None:
    assert energy_lost(sample(torch.zeros(0)), torch.zeros(0)) == 0
    assert energy_lost(sample(torch.zeros(3)), torch.zeros(3)) == 0
    assert math.isnan(energy_lost(torch.tensor([math.inf]), torch.tensor([math.inf])))
