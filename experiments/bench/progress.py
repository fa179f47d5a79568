"""What a training step is worth with compression: how many steps a target takes with it and
without, by energy lost.

    python experiments/bench/progress.py [--quick] [--seconds S] [--json FILE]

Four workers in one process train one model with error feedback: each sends C(gradient + residual),
keeps the rest as its residual, and all apply the mean of what was sent; the model is one bucket.
Lost is the share of the energy of the raw gradient that C leaves behind in a single application,
rounding included. A ratio is the steps to a target, interpolated between evaluations, over those
without compression from the same seed (same weights, same batches); '>' if any was missed within
six times the steps without, a lower bound. A guard R scales a residual down to R times the
gradient's norm.
"""

import argparse
import functools
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, pad

from testbed.worker.zoo import make_data, make_model

WORKERS, BATCH, EVERY, CAP = 4, 16, 5, 6
GPT = {"layers": 2, "width": 64, "heads": 4, "context": 32}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "cnn": {"channels": [8, 16], "hidden": 128},
    "gpt": GPT,
}
# lr 1e-3
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adamw": torch.optim.AdamW,
}
DIGITS, ACCURACY = (1.0, 0.3, 0.05), 0.96  # loss on what is trained on, accuracy on the rest
TEXT = {"sgd": (3.2, 2.9, 2.75), "adamw": (3.2, 2.9, 2.7)}  # loss on text not trained on
SPARSE = {f"top {density:g}": (7, density) for density in (0.2, 0.1, 0.03, 0.01, 0.003, 0.001)}
CODECS = {"none": (0, 1.0), "int8": (127, 1.0), "int4": (7, 1.0), **SPARSE}
# of the steps ratio, 1 / worth, by k, the share x lost, density and |residual| / |gradient|
FORMS = {
    "1 + k x/(1-x)": lambda k, x, d, r: 1 + k * x / (1 - x),
    "1 + k (1/sqrt(1-x) - 1)": lambda k, x, d, r: 1 + k * ((1 - x) ** -0.5 - 1),
    "1 - k ln(1-x)": lambda k, x, d, r: 1 - k * math.log1p(-x),
    "(1-x)^-k": lambda k, x, d, r: (1 - x) ** -k,
    "1 + k x": lambda k, x, d, r: 1 + k * x,
    "1 + k (1/sqrt(d) - 1)": lambda k, x, d, r: 1 + k * (d**-0.5 - 1),
    "1 + k r": lambda k, x, d, r: 1 + k * r,
}
data = functools.cache(
    lambda name: make_data(
        "text" if name == "gpt" else "digits", {"context": 32} if name == "gpt" else {}
    )
)


def rounded(x: torch.Tensor, levels: int) -> torch.Tensor:
    blocks = pad(x, (0, -len(x) % 32)).view(-1, 32)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / levels
    return (blocks / scale).round().mul(scale).flatten()[: len(x)]


def sent(x: torch.Tensor, levels: int, density: float) -> torch.Tensor:
    if density == 1:
        return rounded(x, levels)
    sizes, kept = x.abs(), max(1, round(density * len(x)))
    where = (sizes >= float(np.partition(sizes.numpy(), -kept)[-kept])).nonzero().squeeze(1)
    return torch.zeros_like(x).index_copy_(0, where, rounded(x[where], levels))


def reached(curve: list[tuple[int, float, float]], target: float, column: int) -> float | None:
    for before, after in itertools.pairwise(curve):
        if after[column] <= target:
            return before[0] + (after[0] - before[0]) * (before[column] - target) / (
                before[column] - after[column]
            )
    return None


def train(
    name: str, optimizer: str, seed: int, codec: str, guard: float, base: dict[str, Any] | None
) -> dict[str, Any]:
    """One training; base is the one without compression, None while that is being made."""
    (levels, density), model, (x, y, test_x, test_y) = (
        CODECS[codec],
        make_model(name, MODELS[name], seed),
        data(name),
    )
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    torch.nn.utils.vector_to_parameters(flat, model.parameters())  # they are views of it
    optimize, residual = OPTIMIZERS[optimizer]([flat]), torch.zeros(WORKERS, len(flat))
    draw, text = torch.Generator().manual_seed(seed), name == "gpt"
    targets = [(loss, 1) for loss in (TEXT[optimizer] if text else DIGITS)] + (
        [] if text else [(1 - ACCURACY, 2)]
    )
    seen = torch.randperm(len(test_x if text else x), generator=torch.Generator().manual_seed(0))[
        : 128 if text else 512
    ]
    curve: list[tuple[int, float, float]] = []
    errors, (lost, ratios), guarded = [], ([], []) if levels else ([0.0], [0.0]), 0
    for step in itertools.count():
        if step % EVERY == 0:
            with torch.no_grad():
                loss = float(
                    cross_entropy(
                        model((test_x if text else x)[seen]), (test_y if text else y)[seen]
                    )
                )
                errors.append(
                    loss if text else float((model(test_x).argmax(1) != test_y).float().mean())
                )
            # accuracies flicker
            curve.append((step, loss, float(np.mean(errors[-1 if text else -3 :]))))
            steps = [reached(curve, *target) for target in targets]
            least = base["last"] if base else 0
            if (
                math.isnan(loss)
                or step >= (CAP * least or 600)
                or (step >= least and None not in steps)
            ):
                break
        flat.grad = torch.zeros_like(flat)
        for worker, batch in enumerate(torch.randint(len(x), (WORKERS, BATCH), generator=draw)):
            parts = torch.autograd.grad(
                cross_entropy(model(x[batch]), y[batch]), list(model.parameters())
            )
            gradient = torch.cat([part.flatten() for part in parts])
            if levels:
                norm = float(gradient.norm())
                if step % EVERY == 0:
                    lost.append(
                        (float((gradient - sent(gradient, levels, density)).norm()) / norm) ** 2
                    )
                wanted = residual[worker] + gradient
                gradient = sent(wanted, levels, density)
                torch.sub(wanted, gradient, out=residual[worker])
                ratios.append(float(residual[worker].norm()) / norm)
                if guard and ratios[-1] > guard:
                    residual[worker] *= guard / ratios[-1]
                    guarded += 1
            flat.grad += gradient / WORKERS
        optimize.step()
    last = base["last"] if base else step
    equal = next((error if text else 1 - error for at, _, error in curve if at == last), math.nan)
    steps, missed = [step if reach is None else reach for reach in steps], steps.count(None)
    means = {
        "lost": float(np.mean(lost)),
        "guarded": guarded / max(1, WORKERS * step),
        "missed": missed,
        "equal": equal,
    }
    settled = float(np.median(ratios[len(ratios) // 2 :]))
    return {
        **means,
        "residual": settled,
        "last": last,
        "steps": steps,
        "peak": max(ratios),
        "curve": curve,
    }


def summary(runs: list[dict[str, Any]], bases: list[dict[str, Any]]) -> dict[str, Any]:
    logs = np.log(
        [np.array(run["steps"]) / base["steps"] for run, base in zip(runs, bases, strict=True)]
    )
    means = {
        key: float(np.mean([run[key] for run in runs]))
        for key in ("lost", "residual", "guarded", "equal", "missed")
    }
    return {**means, "ratio": math.exp(logs.mean()), "ratios": np.exp(logs.mean(axis=0))}


def fit(optimizer: str, rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{optimizer + ': steps ratio':26}{'k':>8}{'rms ln':>8}   measured over predicted, least"
        " and most"
    )
    for form, ratio in FORMS.items():
        best = (math.inf, 0.0, np.zeros(1))
        for k in np.geomspace(1e-3, 1e2, 1001):
            gaps = [
                math.log(row["ratio"] / ratio(k, row["lost"], row["density"], row["residual"]))
                for row in rows
            ]
            gaps = np.array(
                [max(0, gap) if row["missed"] else gap for gap, row in zip(gaps, rows, strict=True)]
            )
            best = min(best, (float(np.sqrt((gaps**2).mean())), k, gaps), key=lambda one: one[0])
        print(
            f"{form:26}{best[1]:8.3f}{best[0]:8.3f}   {math.exp(best[2].min()):.2f}"
            f" {math.exp(best[2].max()):.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed of the perceptron with few compressors and no guards",
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no training after this time"
    )
    parser.add_argument("--json", type=Path, help="where to write what every training measured")
    args, begin = parser.parse_args(), time.perf_counter()
    torch.set_num_threads(1)
    pairs = list(itertools.product(["mlp"] if args.quick else MODELS, OPTIMIZERS))
    plain = [
        (codec, 0) for codec in (("none", "int4", "top 0.1", "top 0.01") if args.quick else CODECS)
    ]
    guards = [] if args.quick else list(itertools.product(("top 0.01", "top 0.001"), (3, 10, 30)))
    plan = [
        (seed, *one)
        for part in (plain, guards)
        for seed in range(1 if args.quick else 3)
        for one in part
    ]
    runs: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    for (seed, codec, guard), (name, optimizer) in itertools.product(plan, pairs):
        if time.perf_counter() - begin < args.seconds:
            base, free = (runs.get((name, optimizer, of, 0), [])[seed:] for of in ("none", codec))
            if not (guard and free[0]["peak"] <= guard):  # else the guard would never act
                free = [train(name, optimizer, seed, codec, guard, base[0] if base else None)]
            runs.setdefault((name, optimizer, codec, guard), []).append(free[0])
            print(
                f"{time.perf_counter() - begin:6.0f} s",
                seed,
                name,
                optimizer,
                codec,
                guard,
                file=sys.stderr,
            )
    if args.json:
        args.json.write_text(json.dumps([[*key, many] for key, many in runs.items()]))
    rows: dict[str, list[dict[str, Any]]] = {optimizer: [] for optimizer in OPTIMIZERS}
    print(
        "task optimizer codec guard seeds | lost |r|/|g| guarded | ratio (of each target) | quality"
        " at equal steps"
    )
    for (name, optimizer, codec, guard), many in runs.items():
        row = summary(many, runs[name, optimizer, "none", 0][: len(many)]) | {
            "density": CODECS[codec][1]
        }
        each = " ".join(f"{ratio:.2f}" for ratio in row["ratios"])
        print(
            f"{name:4}{optimizer:6}{codec:10}{guard or '':3} {len(many)} | {row['lost']:6.4f}"
            f" {row['residual']:7.2f} {row['guarded']:4.2f}"
            f" |{'>' if row['missed'] else ' '}{row['ratio']:5.2f} ({each}) | {row['equal']:.3f}"
        )
        if codec != "none" and not guard:
            rows[optimizer].append(row)
    for optimizer, measured in rows.items():
        fit(optimizer, measured)


if __name__ == "__main__":
    main()
