"""Error feedback: what was not sent is kept, moves along with its parameters, and is worth as much
as before."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netsenseml.compress.codec import Codec, Sent
from netsenseml.compress.feedback import ErrorFeedback, energy_lost, norm, sample

pytestmark = pytest.mark.fast

torch.set_num_threads(1)


def small_model() -> list[tuple[str, torch.nn.Parameter]]:
    return [("a", torch.nn.Parameter(torch.zeros(2, 3))), ("b", torch.nn.Parameter(torch.zeros(4)))]


def keep(feedback: ErrorFeedback, key: object, values: torch.Tensor) -> None:
    """Let nothing of ``values`` be sent."""
    feedback.settle(key, feedback.compensate(key, values, dense=False))


def send(
    feedback: ErrorFeedback, key: object, values: torch.Tensor, *, dense: bool = True
) -> torch.Tensor:
    """Let all be sent; returns it."""
    compensated = feedback.compensate(key, values, dense=dense)
    sent = compensated.tensor.clone()
    compensated.tensor.zero_()
    feedback.settle(key, compensated)
    return sent


@settings(max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_residuals_follow_their_parameters_into_other_buckets(
    sizes: list[int], data: st.DataObject
) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    feedback = ErrorFeedback((f"p{i}", parameter) for i, parameter in enumerate(parameters))
    for i, parameter in enumerate(parameters):
        keep(feedback, (parameter,), torch.full((sizes[i],), i + 1.0))
    for _ in range(3):
        order = data.draw(st.permutations(range(len(parameters))))
        cut = data.draw(st.integers(0, len(order)))
        for bucket in filter(None, (order[:cut], order[cut:])):
            key = tuple(parameters[i] for i in bucket)
            compensated = feedback.compensate(
                key, torch.zeros(sum(sizes[i] for i in bucket)), dense=False
            )
            assert compensated.tensor.tolist() == [i + 1 for i in bucket for _ in range(sizes[i])]
            feedback.settle(key, compensated)
    feedback.rescale(2.0)
    assert {name: set(r.tolist()) for name, r in feedback.state_dict().items()} == {
        f"p{i}": {2 * (i + 1.0)} for i in range(len(parameters))
    }


@settings(max_examples=50)
@given(
    st.sampled_from(
        [Codec("bf16"), Codec("int4"), Codec("sign"), Codec("int8", 0.1), Codec("fp32", 0.02)]
    ),
    st.integers(1, 2000),
    st.lists(st.tuples(st.booleans(), st.floats(1e-6, 1e6)), min_size=1, max_size=8),
    st.booleans(),
)
def test_what_is_sent_and_what_is_kept_are_what_was_given(
    codec: Codec, elements: int, steps: list[tuple[bool, float]], holds_unused: bool
) -> None:
    """Also where a residual is held back, and where half of the parameters are left out of a
    step."""
    parameters = [torch.nn.Parameter(torch.zeros(elements)) for _ in range(2)]
    feedback, key = ErrorFeedback(zip("ab", parameters, strict=True)), tuple(parameters)
    feedback.holds_unused = holds_unused
    draw = torch.Generator().manual_seed(elements)
    given_in_all, sent_in_all = torch.zeros(2, elements * 2, dtype=torch.float64)
    largest = 0.0
    for number, (uses_both, scale) in enumerate(steps):
        gradient = scale * torch.randn(2 * elements, generator=draw)
        if not uses_both:
            gradient[elements:] = 0
        largest = max(largest, float(gradient.abs().max()))
        compensated = feedback.compensate(key, gradient, dense=codec.density == 1)
        before, sent = compensated.tensor.clone(), Sent()
        codec.encode(compensated.tensor, number, sent=sent)
        sent_in_all += before - compensated.tensor
        feedback.settle(key, compensated, sent.positions)
        given_in_all += gradient
    residual = torch.cat([feedback.state_dict()[name] for name in "ab"]).double()
    torch.testing.assert_close(
        sent_in_all + residual, given_in_all, rtol=1e-5, atol=1e-5 * max(largest, 1e-30)
    )


def test_where_all_is_sent_a_large_residual_goes_little_by_little() -> None:
    feedback, sent = ErrorFeedback(), torch.zeros(100)
    keep(feedback, "key", torch.full((100,), 5.0))
    gradient = torch.randn(100, generator=torch.Generator().manual_seed(0))
    for _ in range(14):
        now = send(feedback, "key", gradient)
        assert norm(now) <= 1.5001 * norm(gradient)
        sent += now
    torch.testing.assert_close(sent, 14 * gradient + 5)
    assert not feedback.state_dict()["key"].any()


def test_where_part_is_sent_all_of_the_residual_takes_part() -> None:
    feedback = ErrorFeedback()
    keep(feedback, "key", torch.full((100,), 5.0))
    compensated = feedback.compensate("key", torch.ones(100), dense=False)
    assert compensated.tensor.tolist() == [6.0] * 100 and compensated.held == []


def test_what_is_kept_for_a_parameter_that_a_step_leaves_out_stays_there() -> None:
    (_, a), (_, b) = small_model()
    feedback = ErrorFeedback()
    feedback.holds_unused = True
    keep(feedback, (a, b), torch.arange(10.0))
    gradient = torch.tensor([1.0] * 6 + [0.0] * 4)
    assert send(feedback, (a, b), gradient, dense=False).tolist() == [
        *(torch.arange(6.0) + 1),
        0,
        0,
        0,
        0,
    ]
    assert send(feedback, (a, b), torch.ones(10), dense=False).tolist() == [1.0] * 6 + [
        7.0,
        8.0,
        9.0,
        10.0,
    ]


def test_a_residual_is_bounded_and_the_ratio_is_told() -> None:
    feedback = ErrorFeedback(limit=30.0)
    ratios = []
    for _ in range(50):
        compensated = feedback.compensate("key", torch.ones(1000), dense=False)
        ratios.append(feedback.settle("key", compensated))
    assert (
        ratios[:3] == pytest.approx([1, 2, 3])
        and ratios[-1] == pytest.approx(30)
        and max(ratios) <= 30
    )
    torch.testing.assert_close(feedback.state_dict()["key"], torch.full((1000,), 30.0))


def test_the_bound_of_a_residual_that_counts_for_several_ranks_is_scaled_too() -> None:
    feedback = ErrorFeedback(limit=30.0)
    for _ in range(100):
        compensated = feedback.compensate("key", torch.ones(1000), dense=False)
        ratio = feedback.settle("key", compensated, scale=2.0)
    assert ratio == pytest.approx(60)
    torch.testing.assert_close(feedback.state_dict()["key"], torch.full((1000,), 60.0))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_forgotten(momentum: float, bad: float) -> None:
    feedback, gradient = ErrorFeedback(momentum=momentum), torch.ones(100)
    keep(feedback, "key", gradient)
    gradient[3] = bad
    for compress in (True, False):
        compensated = feedback.compensate("key", gradient, dense=True)
        assert not compensated.tensor.isfinite().all()
        if compress:
            Codec("fp32").encode(compensated.tensor, 0)
        assert feedback.settle("key", compensated) == 0
        assert feedback.compensate("key", torch.ones(100), dense=True).tensor.isfinite().all()


def test_what_an_undone_step_sent_of_the_residual_is_kept_again() -> None:
    """Also where its memory was freed meanwhile, as nothing was left."""
    for frees in (False, True):
        feedback = ErrorFeedback(momentum=0.5)
        feedback.keeps_copy = True
        feedback.drop_copies()
        keep(feedback, "key", torch.arange(4.0))
        before = feedback.state_dict()
        feedback.drop_copies()
        send(feedback, "key", torch.ones(4), dense=False)
        if frees:
            feedback.forget("key")
        feedback.restore()
        after = feedback.state_dict()
        assert before.keys() == after.keys() and all(
            torch.equal(before[name], after[name]) for name in before
        )
        feedback.restore()  # there is nothing more to be undone
        assert torch.equal(feedback.state_dict()["key"], after["key"])


def test_memory_is_freed() -> None:
    (_, a), (_, b) = named = small_model()
    feedback = ErrorFeedback(named)
    assert not feedback.holds((a, b))
    keep(feedback, (a, b), torch.ones(10))
    assert feedback.holds((a, b)) and feedback.holds((b,))
    feedback.forget((a, b))
    assert not feedback.holds((a,)) and feedback.state_dict() == {}


def test_feedback_survives_a_checkpoint() -> None:
    (_, a), (_, b) = parameters = small_model()
    old, new = ErrorFeedback(parameters), ErrorFeedback(parameters)
    keep(old, (a, b), torch.arange(10.0))
    state = old.state_dict()
    send(old, (a, b), torch.zeros(10), dense=False)  # a checkpoint is a copy
    new.load_state_dict(state)
    new.rescale(3.0)  # before anything of it was asked for
    assert send(new, (b, a), torch.zeros(10), dense=False).tolist() == [
        18,
        21,
        24,
        27,
        0,
        3,
        6,
        9,
        12,
        15,
    ]


def test_a_checkpoint_of_another_model_is_refused_in_one_line() -> None:
    feedback = ErrorFeedback(small_model())
    for state, said in (
        ({"c": torch.zeros(1)}, "'c'"),
        ({"a": torch.zeros(5)}, "5 elements, not 6"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            feedback.load_state_dict(state)
        assert "\n" not in str(error.value)


def test_momentum_is_corrected_and_masked_as_in_the_paper() -> None:
    """Against Algorithm 1 of deep gradient compression, element by element, with buckets rebuilt
    after the first step."""
    (_, a), (_, b) = named = small_model()
    feedback = ErrorFeedback(named, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    velocity, waiting = torch.zeros(10), torch.zeros(10)
    codec, sent = Codec("fp32", 0.3), Sent()
    for step in range(20):
        gradient = torch.randn(10, generator=generator)
        velocity = 0.9 * velocity + gradient
        waiting = waiting + velocity
        # b first, from the second step on
        order = torch.arange(10) if step == 0 else torch.arange(10).roll(-6)
        key = (a, b) if step == 0 else (b, a)
        compensated = feedback.compensate(key, gradient[order], dense=False)
        torch.testing.assert_close(compensated.tensor, waiting[order])
        codec.encode(compensated.tensor, step, sent=sent)
        feedback.settle(key, compensated, sent.positions)
        assert sent.positions is not None
        velocity[order[sent.positions]] = waiting[order[sent.positions]] = 0


def test_without_compression_momentum_is_plain_momentum() -> None:
    feedback, velocity = ErrorFeedback(momentum=0.5), torch.zeros(10)
    for step in range(5):
        gradient = torch.full((10,), float(step)).bfloat16()
        velocity = 0.5 * velocity + gradient
        assert torch.equal(send(feedback, "key", gradient), velocity)


def test_velocities_survive_a_checkpoint() -> None:
    (_, a), (_, b) = named = small_model()
    old, new, plain = (
        ErrorFeedback(named, momentum=0.5),
        ErrorFeedback(named, momentum=0.5),
        ErrorFeedback(named),
    )
    keep(old, (a, b), torch.arange(10.0))
    old.rescale(2.0)
    state = old.state_dict()
    assert set(state) == {"a", "b", "a:velocity", "b:velocity"}
    new.load_state_dict(state)
    waiting = 2 * torch.arange(10.0) + 0.5 * 2 * torch.arange(10.0)
    assert torch.equal(send(new, (b, a), torch.zeros(10), dense=False), waiting.roll(-6))
    plain.load_state_dict(state)  # the momentum may be gone, or new
    assert torch.equal(send(plain, (a, b), torch.zeros(10), dense=False), 2 * torch.arange(10.0))
    assert set(plain.state_dict()) == {"a", "b"}
    new.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("codec", "tolerance"),
    [(Codec("bf16", 0.1), 0.03), (Codec("int4"), 0.05), (Codec("sign"), 0.02)],
)
def test_the_energy_lost_is_estimated_from_a_sample(codec: Codec, tolerance: float) -> None:
    given_in = torch.randn(500_000, generator=torch.Generator().manual_seed(0))
    whole, before = given_in.square().sum(), sample(given_in)
    assert norm(given_in) == pytest.approx(math.sqrt(whole), rel=tolerance)
    codec.encode(given_in, 0)
    assert energy_lost(before, given_in) == pytest.approx(
        float(given_in.square().sum() / whole), rel=tolerance
    )


def test_of_no_energy_none_is_lost() -> None:
    assert energy_lost(sample(torch.zeros(0)), torch.zeros(0)) == 0
    assert energy_lost(sample(torch.zeros(3)), torch.zeros(3)) == 0
    assert math.isnan(energy_lost(torch.tensor([math.inf]), torch.tensor([math.inf])))


def test_a_tuple_of_names_is_a_name() -> None:
    feedback = ErrorFeedback()
    keep(feedback, ("layer", 1), torch.ones(10))
    keep(feedback, ("layer", 2), torch.ones(20))
    assert feedback.holds(("layer", 1)) and not feedback.holds("layer")


def test_the_learning_rate_does_not_touch_velocities() -> None:
    feedback = ErrorFeedback(momentum=0.5)
    keep(feedback, "key", torch.ones(4))
    before = feedback.state_dict()
    feedback.rescale(10.0, velocity=False)
    after = feedback.state_dict()
    assert torch.equal(after["key"], 10 * before["key"]) and torch.equal(
        after["key:velocity"], before["key:velocity"]
    )
