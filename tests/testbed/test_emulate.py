"""Emulated compute: the parameters, buckets and waits of a model, without its arithmetic."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from testbed.worker import emulate
from testbed.worker.emulate import Emulated, Timing, layer_works
from testbed.worker.vision import resnet18, vgg16
from testbed.worker.zoo import make_data, make_emulated, make_model

STEP_S = 0.3


class FakeClock:
    """Sleeping is the only thing that takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.slept_s = 0.0
        monkeypatch.setattr(emulate, "monotonic_s", lambda: self.now_s)
        monkeypatch.setattr(emulate.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.slept_s += seconds


def emulated(name: str = "mlp", jitter: float = 0.0, seed: int = 0, **options: Any) -> Emulated:
    """With memory for its gradients, which DDP would bring."""
    model = make_emulated(name, options, Timing(STEP_S, jitter, seed))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def step(model: nn.Module) -> None:
    x = torch.zeros(1, requires_grad=True)
    model(x).backward()


@pytest.mark.parametrize(("make", "published"), [(resnet18, 11_689_512), (vgg16, 138_357_544)])
def test_parameters_are_as_many_as_published(make: Any, published: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make(1000).parameters()) == published


def test_resnet_multiplies_as_often_as_published() -> None:
    """1.8 billion for an image of 224 x 224 (He et al., table 1); of VGG-16 15.3 billion."""
    with torch.device("meta"):
        image = torch.zeros(1, 3, 224, 224)
        assert sum(layer_works(resnet18(1000), image).values()) == pytest.approx(1.82e9, rel=0.01)
        assert sum(layer_works(vgg16(1000), image).values()) == pytest.approx(15.5e9, rel=0.02)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18", "gpt"])
def test_a_step_takes_its_time_and_gives_every_parameter_a_gradient(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    clock = FakeClock(monkeypatch)
    model = emulated(name)
    real = [parameter.shape for parameter in make_model(name, {}, 0).parameters()]
    assert [parameter.shape for parameter in model.parameters()] == real
    for _ in range(2):
        before_s = clock.slept_s
        model.begin()
        model.zero_grad(set_to_none=False)
        step(model)
        # the shortest waits are left out
        assert clock.slept_s - before_s == pytest.approx(STEP_S, rel=1e-2)
        assert all(
            parameter.grad is not None and parameter.grad.any() for parameter in model.parameters()
        )


def test_a_machine_that_comes_late_catches_up_but_not_what_the_hook_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock(monkeypatch)
    model = emulated()
    model.begin()
    clock.now_s += 0.1  # somebody else had the processor
    step(model)
    assert clock.slept_s == pytest.approx(STEP_S - 0.1, rel=1e-2)
    taken_s = iter([0.0, 0.0, 0.0, 0.0, 0.05, *[0.05] * 99])
    model.taken_s = lambda: next(taken_s)
    began_s = clock.now_s
    model.begin()
    clock.slept_s = 0.0
    step(model)
    assert clock.now_s - began_s == pytest.approx(STEP_S + 0.05, rel=1e-2)


def test_jitter_has_its_deviation_and_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)

    def times_s(seed: int) -> torch.Tensor:
        model, found = emulated(hidden=[4], jitter=0.1, seed=seed), []
        for _ in range(200):
            began_s = clock.now_s
            model.begin()
            step(model)
            found.append(clock.now_s - began_s)
        return torch.tensor(found)

    once, again, other = times_s(1), times_s(1), times_s(2)
    assert once.allclose(again, atol=1e-6) and not once.allclose(other, atol=1e-3)
    assert once.mean().item() == pytest.approx(STEP_S, rel=0.05)
    assert once.std().item() == pytest.approx(0.1 * STEP_S, rel=0.2)


def test_gradients_have_heavy_tails_and_differ_from_step_to_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeClock(monkeypatch)
    model = make_emulated("vgg16", {}, Timing(STEP_S, 0.0, 0))
    drawn = []
    for parameter in model.parameters():
        gradients = [model._gradients.draw(parameter.shape) for _ in range(2)]
        assert all(gradient.shape == parameter.shape for gradient in gradients)
        if parameter.numel() > 10_000:
            assert not gradients[0].equal(gradients[1])
        drawn.append(gradients[0].reshape(-1)[: 1 << 20])
    energy = torch.cat(drawn).double().square().sort(descending=True).values
    top = energy[: len(energy) // 100].sum() / energy.sum()
    assert 0.3 < top.item() < 0.95  # of normal numbers it is 0.08


def test_ddp_exchanges_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = make_emulated("resnet18", {}, Timing(STEP_S, 0.0, 0))
        ddp = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
        for _ in range(3):
            model.begin()
            ddp.zero_grad(set_to_none=False)
            step(ddp)
            model.end()
        assert all(parameter.any() for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


def test_a_model_of_the_users_own_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="emulate knows only the models mlp, cnn"):
        make_emulated("torch.nn:Identity", {}, Timing(1.0, 0.0, 0))


def test_text_is_that_of_the_library_and_every_byte_is_to_be_guessed() -> None:
    train_x, train_y, test_x, test_y = make_data("text", {"kilobytes": 64, "context": 32})
    assert (
        train_x.shape == train_y.shape
        and train_x.shape[1] == 32
        and len(test_x) == len(test_y) > 50
    )
    assert train_x[:, 1:].equal(train_y[:, :-1])
    logits = make_model("gpt", {"layers": 1, "width": 16, "heads": 2, "context": 32}, 0)(test_x[:5])
    assert logits.shape == (5, 256, 32)
    nn.functional.cross_entropy(logits, test_y[:5]).backward()


def test_a_byte_is_guessed_from_those_before_it_alone() -> None:
    model = make_model("gpt", {"layers": 2, "width": 16, "heads": 2, "context": 8}, 0)
    text = torch.arange(8).view(1, 8)
    other = text.clone()
    other[0, 5:] = 99
    assert torch.allclose(model(text)[..., :5], model(other)[..., :5])
    assert not torch.allclose(model(text)[..., 5:], model(other)[..., 5:])


def test_images_can_be_learnt() -> None:
    train_x, train_y, test_x, test_y = make_data(
        "images", {"classes": 4, "side": 8, "samples": 400, "noise": 0.3}
    )
    assert train_x.shape == (360, 3, 8, 8) and test_x.shape == (40, 3, 8, 8)
    assert train_y.unique().tolist() == [0, 1, 2, 3]
    logits = make_model("resnet18", {"classes": 4}, 0)(train_x[:8])
    assert logits.shape == (8, 4)
    # Without regard to where it lies, the nearest pattern is that of the class: the spectrum does
    # not know of shifts.
    spectra = torch.fft.fft2(train_x).abs().flatten(1)
    means = torch.stack([spectra[train_y == label].mean(0) for label in range(4)])
    found = torch.cdist(torch.fft.fft2(test_x).abs().flatten(1), means).argmin(1)
    assert (found == test_y).float().mean() > 0.9


def test_a_data_set_that_is_not_there_says_how_to_get_it(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"data_batch_1 is missing; unpack cifar-10-python.tar.gz"):
        make_data("cifar10", {"folder": str(tmp_path)})
