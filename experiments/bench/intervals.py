"""What local steps and delayed means are worth: how many steps a target takes when parameters are
exchanged every so many steps, or when what is exchanged is applied later.

    python experiments/bench/intervals.py [--seeds N] [--tasks cnn-sgd …] [--codecs "none" "int4"
        "top 0.1" …] [--intervals 0 1 2 …] [--delays 0 1 …] [--json FILE]

As ``progress.py``, whose models, data, codecs and targets these are: four workers in one process,
the same batches, and a ratio is the steps to a target over those of an exchange in every step
without compression, from the same seed. With interval 0 gradients are exchanged in every step; with
any other each worker has its own optimizer, and behind so many steps each sends C(x - y +
residual), where x is what all had in common last and y what it has made of it; the mean is taken
from x. What is evaluated is x. Workers draw from the same data.

With a delay D the mean of an exchange is applied D exchanges later: of gradients D steps later,
zeros before there is one; of parameters behind D intervals more, in which each worker goes on from
what it has itself, which is not sent again.
"""

import argparse
import functools
import itertools
import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from progress import (
    ACCURACY,
    BATCH,
    CAP,
    CODECS,
    DIGITS,
    EVERY,
    MODELS,
    OPTIMIZERS,
    TEXT,
    WORKERS,
    data,
    reached,
    sent,
)
from torch.nn.functional import cross_entropy

from testbed.worker.zoo import make_model

TTA = {"channels": [32, 64], "hidden": 1024}  # and its optimizer: experiments/tta/digits.yaml
SLOW = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)
TASKS: dict[str, tuple[str, dict[str, Any], Any, list[float]]] = {
    **{
        f"{m}-{o}": (m, MODELS[m], OPTIMIZERS[o], list(TEXT[o] if m == "gpt" else DIGITS))
        for m in MODELS
        for o in OPTIMIZERS
    },
    "tta-sgd": ("cnn", TTA, SLOW, list(DIGITS)),
}
INTERVALS = (0, 1, 2, 4, 8, 16, 32)
SMOOTHED = 15  # steps over which accuracies, which flicker, are averaged


class Worker:
    """A replica, with an optimizer of its own."""

    def __init__(self, task: str, seed: int) -> None:
        name, options, optimizer, _ = TASKS[task]
        self.model = make_model(name, options, seed)
        self.flat = torch.nn.utils.parameters_to_vector(self.model.parameters()).detach().clone()
        # they are views of it
        torch.nn.utils.vector_to_parameters(self.flat, self.model.parameters())
        self.optimizer = optimizer([self.flat])
        self.residual = torch.zeros_like(self.flat)

    def gradient(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(cross_entropy(self.model(x), y), list(self.model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    def step(self, gradient: torch.Tensor) -> None:
        self.flat.grad = gradient
        self.optimizer.step()

    def send(self, wanted: torch.Tensor, codec: str) -> torch.Tensor:
        levels, density = CODECS[codec]
        if not levels:
            return wanted
        wanted = wanted + self.residual
        coded = sent(wanted, levels, density)
        torch.sub(wanted, coded, out=self.residual)
        return coded


def train(
    task: str, seed: int, codec: str, interval: int, delay: int, least: int
) -> tuple[int, list[float | None]]:
    """(steps made, steps to every target); least: so many steps at least."""
    name, *_, losses = TASKS[task]
    text, (x, y, test_x, test_y) = name == "gpt", data(name)
    workers = [Worker(task, seed) for _ in range(WORKERS)]
    shared, draw = workers[0].flat.clone(), torch.Generator().manual_seed(seed)
    targets = [(loss, 1) for loss in losses] + ([] if text else [(1 - ACCURACY, 2)])
    seen = torch.randperm(len(test_x if text else x), generator=torch.Generator().manual_seed(0))[
        : 128 if text else 512
    ]
    curve: list[tuple[int, float, float]] = []
    errors: list[float] = []
    means: deque[torch.Tensor] = deque()  # not applied yet
    # of parameters: what each worker has put in, shape (WORKERS, n)
    under_way: deque[torch.Tensor] = deque()
    model, flat = workers[0].model, workers[0].flat
    for step in itertools.count():
        if step % max(interval, 1) == 0 and (not curve or step - curve[-1][0] >= EVERY):
            own = flat.clone()
            flat.copy_(shared if interval else flat)
            with torch.no_grad():
                loss = float(
                    cross_entropy(
                        model((test_x if text else x)[seen]), (test_y if text else y)[seen]
                    )
                )
                errors.append(
                    loss if text else float((model(test_x).argmax(1) != test_y).float().mean())
                )
            flat.copy_(own)
            smoothed = 1 if text else max(1, round(SMOOTHED / max(EVERY, interval)))
            curve.append((step, loss, float(np.mean(errors[-smoothed:]))))
            steps = [reached(curve, *target) for target in targets]
            if (
                math.isnan(loss)
                or step >= (CAP * least or 600)
                or (step >= least and None not in steps)
            ):
                return step, steps
        batches = torch.randint(len(x), (WORKERS, BATCH), generator=draw)
        gradients = [
            worker.gradient(x[batch], y[batch])
            for worker, batch in zip(workers, batches, strict=True)
        ]
        if interval == 0:
            means.append(
                sum(
                    worker.send(gradient, codec)
                    for worker, gradient in zip(workers, gradients, strict=True)
                )
                / WORKERS
            )
            gradients = [
                means.popleft() if len(means) > delay else torch.zeros_like(shared)
            ] * WORKERS
        for worker, gradient in zip(workers, gradients, strict=True):
            worker.step(gradient)
        if interval and (step + 1) % interval == 0:
            put_in = sum(under_way, torch.zeros(WORKERS, 1))
            under_way.append(
                torch.stack(
                    [
                        shared - own - worker.flat
                        for worker, own in zip(workers, put_in, strict=True)
                    ]
                )
            )
            means.append(
                sum(
                    worker.send(own, codec)
                    for worker, own in zip(workers, under_way[-1], strict=True)
                )
                / WORKERS
            )
            if len(means) > delay:
                shared -= means.popleft()
                under_way.popleft()
            for worker, own in zip(workers, sum(under_way, torch.zeros(WORKERS, 1)), strict=True):
                worker.flat.copy_(shared - own)
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=[task for task in TASKS if task != "tta-sgd"]
    )
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=["none"])
    parser.add_argument("--intervals", nargs="+", type=int, default=INTERVALS)
    parser.add_argument("--delays", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--json",
        type=Path,
        help="where to write the ratios, by task, seed, codec, interval and delay",
    )
    args, begin = parser.parse_args(), time.perf_counter()
    torch.set_num_threads(1)
    found = []
    print("task seed codec interval delay | ratio (of each target)")
    for seed, task in itertools.product(range(args.seeds), args.tasks):
        last, base = train(task, seed, "none", 0, 0, 0)
        for codec, interval, delay in itertools.product(args.codecs, args.intervals, args.delays):
            made, steps = train(task, seed, codec, interval, delay, last)
            ratios = [
                (step or made) / (there or last) for step, there in zip(steps, base, strict=True)
            ]
            found.append([task, seed, codec, interval, delay, ratios, None in steps])
            mean = math.exp(np.mean(np.log(ratios)))
            each = " ".join(f"{ratio:.2f}" for ratio in ratios)
            print(
                f"{task:10} {seed} {codec:9} {interval:2} {delay}"
                f" |{'>' if None in steps else ' '}{mean:5.2f} ({each})",
                flush=True,
            )
    print(f"{time.perf_counter() - begin:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
