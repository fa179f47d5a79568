"""Methods that exchange behind the optimizer, and the two that code in chunks."""

import contextlib
import io
import math
from typing import Any

import pytest
import scipy.fft
import torch
import torch.distributed as dist
from groups import run_group
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ELEMENTS, backward, batches, make_ddp, parameters_hash
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from netsenseml import attach
from netsenseml.catalog import check_method
from netsenseml.compress.codec import Codec, MalformedBuffer, add_decoded, positions
from netsenseml.exchange.collectives import all_reduce_bytes
from netsenseml.methods.demo import Coefficients
from netsenseml.methods.sparseloco import TwoBits
from netsenseml.records import STEP_COLUMNS

STREAMING = {"inner_steps": 6, "fragments": 3, "overlap": 2}
LOCAL: list[tuple[str, dict[str, Any]]] = [
    ("localsgd", {"inner_steps": 3}),
    ("localsgd", {"inner_steps": 2, "values": "int4"}),
    ("diloco", {"inner_steps": 4}),
    ("diloco", {"inner_steps": 3, "values": "bf16"}),
    ("diloco", {**STREAMING, "values": "int8"}),
    ("sparseloco", {"inner_steps": 3, "chunk": 64, "ratio": 0.1}),
]


def make_optimizer(name: str, ddp: nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    return torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9 if name == "momentum" else 0.0)


# --- against each other


def train_by_averages(rank: int) -> list[list[float]]:
    found = []
    for method, options in (
        ("allreduce", {}),
        ("localsgd", {"inner_steps": 1}),
        ("diloco", {"inner_steps": 1, "outer_lr": 1.0, "outer_momentum": 0.0}),
        ("diloco", {"inner_steps": 1, "outer_lr": 1.0, "outer_momentum": 0.0, "fragments": 4}),
    ):
        ddp = make_ddp()
        optimizer, session = make_optimizer("sgd", ddp), attach(ddp, method, **options)
        for batch in batches(rank, 8):
            backward(ddp, batch)
            optimizer.step()
            session.step()
        session.close()
        found.append(
            torch.cat([parameter.detach().reshape(-1) for parameter in ddp.parameters()]).tolist()
        )
    return found


def test_with_one_inner_step_local_updates_are_the_averaging_of_gradients() -> None:
    for plain, local, diloco, fragments in run_group(train_by_averages, 3):
        # mean of parameters, or of gradients: rounded elsewhere
        assert local == pytest.approx(plain, rel=1e-5, abs=1e-6)
        assert diloco == local
        # a ring adds up its chunks in an order of their own
        assert fragments == pytest.approx(local, rel=1e-5, abs=1e-7)


def follow_the_outer_optimizer(rank: int) -> tuple[list[float], list[float]]:
    """Of one rank alone, whose pseudo-gradient is known: DiLoCo, and torch's own optimizer on the
    same."""
    ddp = make_ddp()
    session = attach(ddp, "diloco", inner_steps=3)
    optimizer = make_optimizer("adamw", ddp)
    outer = [parameter.detach().clone() for parameter in ddp.parameters()]
    reference = torch.optim.SGD(outer, lr=0.7, momentum=0.9, nesterov=True)
    for step, batch in enumerate(batches(rank, 9)):
        backward(ddp, batch)
        optimizer.step()
        if step % 3 == 2:
            for there, here in zip(outer, ddp.parameters(), strict=True):
                there.grad = there - here.detach()
            reference.step()
        session.step()
    session.close()
    return [
        torch.cat([p.detach().reshape(-1) for p in some]).tolist()
        for some in (ddp.parameters(), outer)
    ]


def test_the_outer_optimizer_is_that_of_torch_with_the_papers_defaults() -> None:
    ((ours, theirs),) = run_group(follow_the_outer_optimizer, 1)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert check_method("diloco")["inner_steps"] == 500


# --- replicas


def train_locally(rank: int) -> list[tuple[list[str], str, str, list[dict[str, Any]]]]:
    """Of every method: hashes of the parameters after every step, of what is in common in the
    middle, of the end, and rows."""
    found = []
    for method, options in LOCAL:
        for name in ("momentum", "adamw"):
            ddp = make_ddp()
            optimizer, session = make_optimizer(name, ddp), attach(ddp, method, **options)
            hashes, rows = [], []
            for step, batch in enumerate(batches(rank, 13)):
                backward(ddp, batch)
                optimizer.step()
                session.step(0.0, samples=8)
                hashes.append(parameters_hash(ddp.module))
                rows.append(dict(session.last or {}))
                if step == 9:
                    with session.synchronized():
                        common = parameters_hash(ddp.module)
                    assert parameters_hash(ddp.module) == hashes[-1], "own parameters come back"
            session.close()
            rows.append(dict(session.last or {}))
            assert session.steps == 13
            found.append((hashes, common, parameters_hash(ddp.module), rows))
    return found


def test_replicas_are_equal_after_every_exchange_and_at_the_end_and_bytes_are_accounted_for() -> (
    None
):
    ranks = run_group(train_locally, 3)
    for number, (method, options) in enumerate(case for case in LOCAL for _ in range(2)):
        hashes, commons, ends, rows = zip(*(rank[number] for rank in ranks), strict=True)
        every = options["inner_steps"]
        exchanges = [] if "overlap" in options else list(range(every - 1, 13, every))
        assert [
            step for step in range(13) if len({own[step] for own in hashes}) == 1
        ] == exchanges, method
        assert len(set(commons)) == len(set(ends)) == 1, method
        if exchanges:
            assert commons[0] == hashes[0][exchanges[(10 // every) - 1]], (
                "the newest that was exchanged"
            )
        for *steps, last in rows:
            schemes = [row["scheme"] for row in steps]
            name = f"{method}/{options.get('values', '2bit' if method == 'sparseloco' else 'fp32')}"
            if exchanges:
                assert schemes == [name if step in exchanges else "local" for step in range(13)]
            else:  # at 2, 4, 6 begin the exchanges of the fragments, and again 6 later
                assert [step for step in range(13) if schemes[step] == f"{name}, 2 late"] == [
                    3,
                    5,
                    7,
                    9,
                    11,
                ]
            assert all((row["payload_bytes"] > 0) == (row["scheme"] != "local") for row in steps)
            assert all(
                row["dense_bytes"] == round(all_reduce_bytes(4 * ELEMENTS, 3)) for row in steps
            )
            assert all(
                row["ratio"] == 0 and row["lost_energy"] == 1
                for row in steps
                if row["scheme"] == "local"
            )
            assert all(
                0 < row["comm_s"] <= row["step_s"] for row in steps if row["scheme"] != "local"
            )
            assert (
                last["samples"] is None
                and last["step"] == 13
                and last.keys() == STEP_COLUMNS.keys()
            )
            assert last["payload_bytes"] > 0
            if method == "localsgd" and "values" not in options:
                assert {row["payload_bytes"] for row in steps} == {
                    0,
                    round(all_reduce_bytes(4 * ELEMENTS, 3)),
                }


# --- what a script may do


def resume(rank: int, method: str, options: dict[str, Any]) -> list[bool]:
    """Whether 12 steps are, bit by bit, 5 or 7 steps, a checkpoint whose model is that of rank 0
    for all, and the others."""

    def steps(data: list[Any]) -> None:
        for batch in data:
            backward(ddp, batch)
            optimizer.step()
            session.step()

    data, same = list(batches(rank, 12)), []
    for cut in (12, 5, 7):
        ddp = make_ddp(bucket_cap_mb=25)
        optimizer, session = make_optimizer("momentum", ddp), attach(ddp, method, **options)
        if cut < 12:
            steps(data[:cut])
            kept, shared = io.BytesIO(), [None]
            with session.synchronized():
                torch.save(
                    {"session": session.state_dict(), "optimizer": optimizer.state_dict()}, kept
                )
                shared[0] = {name: value.clone() for name, value in ddp.module.state_dict().items()}
            session.close()
            dist.broadcast_object_list(shared)
            ddp = make_ddp(bucket_cap_mb=25)
            optimizer, session = make_optimizer("momentum", ddp), attach(ddp, method, **options)
            backward(ddp, data[0])
            kept.seek(0)
            checkpoint = torch.load(kept)
            ddp.module.load_state_dict(shared[0])
            optimizer.load_state_dict(checkpoint["optimizer"])
            session.load_state_dict(checkpoint["session"])
        steps(data[cut if cut < 12 else 0 :])
        session.close()
        same.append(parameters_hash(ddp.module))
    return [digest == same[0] for digest in same[1:]]


class Normed(nn.Module):
    """With running statistics, and a constant that holds what is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(20), nn.Linear(20, 5)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


def train_normed(rank: int) -> list[list[float]]:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Normed())
    optimizer, session = make_optimizer("sgd", ddp), attach(ddp, "localsgd", inner_steps=4)
    found = []
    for step, batch in enumerate(batches(rank, 4)):
        backward(ddp, batch)
        optimizer.step()
        if step == 3:
            found.append(ddp.module.norm.running_mean.tolist())
        session.step()
    session.close()
    return [*found, ddp.module.norm.running_mean.tolist(), ddp.module.mask.tolist()]


def leave_out_and_accumulate(rank: int) -> tuple[str, list[str]]:
    """Rank 1 alone overflows in one of the steps, of two backwards each, the first of which are not
    synchronised at all."""
    ddp = make_ddp()
    optimizer, scaler = make_optimizer("momentum", ddp), torch.amp.GradScaler("cpu", init_scale=4.0)
    session = attach(ddp, "diloco", inner_steps=2, scaler=scaler)
    schemes = []
    for step, batch in enumerate(batches(rank, 6)):
        optimizer.zero_grad()
        for last in (False, step > 0):
            with contextlib.nullcontext() if last else ddp.no_sync():
                loss = nn.functional.cross_entropy(ddp(batch[0]), batch[1]) * (
                    math.inf if (rank, step) == (1, 3) else 1.0
                )
                scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        session.step()
        schemes.append((session.last or {})["scheme"])
    session.close()
    return parameters_hash(ddp.module), schemes


def train_on_nan(rank: int) -> tuple[list[bool], list[bool], bool]:
    """Whether parameters are finite after each step, where rank 1 has a NaN in the second; and
    after they were set anew."""
    finite: list[list[bool]] = []
    for method, options in (("diloco", {"inner_steps": 3}), ("sparseloco", {"inner_steps": 3})):
        ddp = make_ddp()
        optimizer, session = make_optimizer("sgd", ddp), attach(ddp, method, **options)
        before, seen = session.state_dict(), []
        for step, batch in enumerate(batches(rank, 6)):
            if step == 3:
                ddp.module.load_state_dict(make_ddp().module.state_dict())
                session.load_state_dict(
                    {
                        **session.state_dict(),
                        "shared": [common.own() for common in session.method._all],
                    }
                )
            loss = nn.functional.cross_entropy(ddp(batch[0]), batch[1])
            optimizer.zero_grad()
            (loss * (math.nan if (rank, step) == (1, 1) else 1.0)).backward()
            optimizer.step()
            session.step()
            seen.append(all(bool(parameter.isfinite().all()) for parameter in ddp.parameters()))
        session.close()
        assert before["shared"] == []
        finite.append(seen)
    return finite[0], finite[1], True


def step_without_session(rank: int) -> list[str]:
    found = []
    for method, options in (
        ("localsgd", {}),
        ("netsense", {"interval": 4}),
        ("diloco", {"inner_steps": 8, "fragments": 7}),
    ):
        ddp = make_ddp()
        try:
            session = attach(ddp, method, **options)
        except ValueError as error:
            found.append(str(error))
            continue
        (batch,) = batches(rank, 1)
        for _ in range(2):
            backward(ddp, batch)
        with pytest.raises(RuntimeError) as refused:
            backward(ddp, batch)
        found.append(str(refused.value))
        with contextlib.suppress(Exception):
            session.close()
    return found


def do_all(rank: int) -> dict[str, Any]:
    return {
        "resume": [resume(rank, *case) for case in LOCAL],
        "normed": train_normed(rank),
        "accumulate": leave_out_and_accumulate(rank),
        "nan": train_on_nan(rank),
        "refused": step_without_session(rank),
    }


@pytest.fixture(scope="module")
def done() -> list[dict[str, Any]]:
    """By two ranks."""
    return run_group(do_all, 2)


def test_resume_from_a_checkpoint_is_bit_identical(done: list[dict[str, Any]]) -> None:
    for rank in done:
        for case, same in zip(LOCAL, rank["resume"], strict=True):
            assert same == [True, True], case


def test_running_statistics_are_each_ranks_own_and_become_their_mean(
    done: list[dict[str, Any]],
) -> None:
    (first, mean, mask), (second, mean_too, mask_too) = (rank["normed"] for rank in done)
    assert first != second
    assert (
        mean == mean_too == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    )
    assert mask == mask_too == pytest.approx([0.0, -math.inf, 0.3])


def test_steps_may_be_left_out_and_gradients_accumulated(done: list[dict[str, Any]]) -> None:
    (digest, schemes), (digest_too, schemes_too) = (rank["accumulate"] for rank in done)
    assert digest == digest_too
    assert [scheme for scheme in schemes if "/" in scheme] == ["diloco/fp32"] * 3 and schemes[
        1:
    ] == schemes_too[1:]


def test_a_nan_reaches_all_ranks_and_is_forgotten(done: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(done):
        for seen in found["nan"][:2]:
            assert seen == [True, rank == 0, False, True, True, True]


def test_what_cannot_work_is_refused_in_one_line(done: list[dict[str, Any]]) -> None:
    for *several, fragments in (rank["refused"] for rank in done):
        assert len(several) == 2
        for unfinished in several:
            assert (
                "call it after every optimizer.step()" in unfinished
                and "\n" not in unfinished.strip()
            )
        assert "fragments must be at most 6" in fragments and "\n" not in fragments


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("localsgd", {"inner_steps": 0}, "inner_steps must be an integer >= 1"),
        ("localsgd", {"outer_lr": 0.7}, "has no option 'outer_lr'"),
        ("diloco", {"inner_steps": 4, "overlap": 4}, "overlap must be below inner_steps, 4, not 4"),
        ("diloco", {"fragments": 0}, "fragments must be an integer >= 1"),
        ("diloco", {"values": "fp4"}, "values must be one of fp32, bf16, int8, int4"),
        ("diloco", {"mixing": 1.5}, "mixing must be a number >= 0 and <= 1"),
        ("sparseloco", {"ratio": 0}, "ratio must be a number > 0 and <= 1"),
        ("sparseloco", {"decay": 2}, "decay must be"),
        ("demo", {"update": "signs"}, "update must be one of auto, sign, mean"),
    ],
)
def test_bad_options_give_one_line(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        check_method(method, options)
    assert "\n" not in str(refused.value)
    assert said in str(refused.value)


# --- what is sent


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_elements_may_be_chosen_and_are_found_again(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 700))
    chosen = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
    values = data.draw(st.sampled_from(["fp32", "bf16", "int8", "int4", "sign"]))
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    kept = x.clone()
    buffer = Codec(values, len(chosen) / n).encode(kept, 0, chosen=chosen)
    assert torch.equal(positions(buffer), chosen)
    decoded = add_decoded(buffer, torch.zeros(n))
    torch.testing.assert_close(decoded + kept, x, rtol=0, atol=1e-6)
    others = torch.ones(n, dtype=torch.bool)
    others[chosen] = False
    assert torch.equal(kept[others], x[others]) and not decoded[others].any()
    with pytest.raises(ValueError, match="are to be sent"):
        Codec(values, len(chosen) / n).encode(x, 0, chosen=torch.cat([chosen, chosen]))
    if 0 < buffer[17] < 255 and len(chosen) < n:
        buffer[16:24] = 0
        with pytest.raises(MalformedBuffer):
            positions(buffer)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=4),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.integers(1, 300),
)
def test_two_bits_send_the_largest_of_every_chunk_and_keep_the_rest(
    sizes: list[int], ratio: float, chunk: int
) -> None:
    plan = TwoBits(tuple(sizes), ratio, chunk)
    x = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(chunk)) * (
        torch.arange(sum(sizes)) % 3 > 0
    )
    kept = x.clone()
    slot = plan.encode(kept)
    assert len(slot) == plan.nbytes
    sent = torch.zeros_like(x)
    plan.add_decoded(slot, sent, 1.0)
    torch.testing.assert_close(sent + kept, x, rtol=0, atol=2e-6)  # sent + kept = wanted
    assert len(set(sent[sent != 0].abs().tolist())) <= 2 * math.ceil(plan.elements / 128)
    begin = 0
    for size in sizes:
        for part in range(begin, begin + size, chunk):
            own = slice(part, min(part + chunk, begin + size))
            k = max(1, math.ceil(ratio * (own.stop - own.start) - 1e-9))
            smallest = x[own].abs().sort(descending=True).values[k - 1]
            assert ((sent[own] != 0) & (x[own].abs() < smallest)).sum() == 0, (
                "only the largest of a chunk"
            )
            assert (sent[own] != 0).sum() <= k
        begin += size


def test_sparseloco_sends_less_than_a_quarter_of_a_bit_a_parameter() -> None:
    options = check_method("sparseloco")
    sizes = (64 * 512, 512, 512 * 512, 512, 512 * 10, 10)  # of the mlp
    plan = TwoBits(sizes, options["ratio"], options["chunk"])
    slot = plan.encode(torch.randn(sum(sizes)))
    assert 8 * len(slot) / sum(sizes) <= 0.17
    x = torch.randn(1 << 20)
    kept = x.clone()
    TwoBits((1 << 20,), options["ratio"], options["chunk"]).encode(kept)
    sent = kept != x
    assert kept[sent].square().sum() < 0.02 * x[sent].square().sum(), "four levels are worth having"


def test_demo_transforms_squares_by_the_orthonormal_dct() -> None:
    shapes = tuple(map(torch.Size, [(128, 96), (130,), (7, 3), (6, 4, 3, 3), ()]))
    x = torch.randn(sum(shape.numel() for shape in shapes))
    plan = Coefficients(shapes, 64, 32, "bf16", sign=False)
    coefficients = plan.transform(x)
    torch.testing.assert_close(plan.invert(coefficients), x, rtol=0, atol=1e-5)
    first = x[: 128 * 96].view(128, 96)[:64, :48]  # 48 is the largest divisor of 96 up to 64
    expected = torch.from_numpy(scipy.fft.dctn(first.numpy(), norm="ortho"))
    torch.testing.assert_close(coefficients[: 64 * 48].view(64, 48), expected, rtol=0, atol=1e-4)
    # 26 is the largest divisor of 130; the convolution is 6 x 36
    assert plan.elements == 4 * 32 + 5 * 26 + 21 + 32 + 1
