"""Writes run directories as the orchestrator and the workers would, with numbers that can be
checked by hand."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from netsenseml.records import RecordFile
from testbed.protocol import EVALS_FILE, STEPS_FILE, host_directory, rank_name

FAST_BPS, SLOW_BPS = 50_000_000, 10_000_000
SHARES = {"allreduce": (1.0, 1.0), "netsense": (0.4, 0.1), "topk": (0.3, 0.3)}
"""Payload of each method as a share of the dense gradients, while the links are fast and while they
are slow."""
DENSE_BYTES = 480_000
COMPUTE_S = 0.02
FRAME_BYTES, SEGMENT_BYTES = 1514, 1448
BATCH = 64


def rate_at(t_s: float, t_end_s: float) -> int:
    """The schedule: the middle third of a run is slow."""
    return SLOW_BPS if t_end_s / 3 <= t_s < 2 * t_end_s / 3 else FAST_BPS


def allowed_bits(t_s: float, t_end_s: float) -> float:
    """What a link may carry up to a time."""
    slow_s = min(max(t_s - t_end_s / 3, 0.0), t_end_s / 3)
    return FAST_BPS * (t_s - slow_s) + SLOW_BPS * slow_s


def time_of(bits: float, t_end_s: float) -> float:
    """The inverse of ``allowed_bits``."""
    moments_s = [0.0, t_end_s / 3, 2 * t_end_s / 3, 2 * t_end_s]
    return float(np.interp(bits, [allowed_bits(t_s, t_end_s) for t_s in moments_s], moments_s))


def write_run(
    path: Path, *, seeds: int = 1, methods: tuple[str, ...] = tuple(SHARES), **cell_options: Any
) -> Path:
    """A finished run whose cells are valid unless ``cell_options`` of ``write_cell`` spoil them."""
    path.mkdir(parents=True)
    workload = {
        "model": "mlp",
        "data": "digits",
        "batch": BATCH,
        "stop": {"accuracy": 0.9, "seconds": 30},
    }
    (path / "spec.yaml").write_text(
        yaml.safe_dump({"name": "drop", "workers": 2, "lab": "netns", "workload": workload})
    )
    (path / "environment.json").write_text(
        json.dumps({"kernel": "6.18", "cpus": 2, "python": "3.11", "torch": "2.13"})
    )
    for method in methods:
        for seed in range(seeds):
            write_cell(path / "cells" / f"{method}-s{seed}", method, seed, **cell_options)
    return path


def write_cell(
    path: Path,
    method: str = "allreduce",
    seed: int = 0,
    *,
    t_end_s: float = 30.0,
    workers: int = 2,
    ranks_per_worker: int = 1,
    options: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
    killed: bool = False,
    evaluated: bool = True,
    late_s: float = 0.002,
) -> Path:
    """One cell of ``t_end_s`` seconds. ``result`` replaces entries of result.json; ``killed``
    leaves it out."""
    path.mkdir(parents=True)
    config = {
        "cell": path.name,
        "method": {"name": method, "options": dict(options or {})},
        "seed": seed,
        "workers": workers,
        "ranks_per_worker": ranks_per_worker,
        "workload": None,
        "overrides": dict(overrides or {}),
    }
    (path / "cell.json").write_text(json.dumps(config))
    steps = list(step_rows(SHARES.get(method, (0.5, 0.5)), seed, t_end_s))
    ranks = range(workers * ranks_per_worker)
    for rank in ranks:
        append(
            steps_file(path, rank, ranks_per_worker),
            [{"rank": rank, **row, "scheme": method} for row in steps],
        )
    if evaluated:
        append(host_directory(path, rank_name(0, ranks_per_worker)) / EVALS_FILE, eval_rows(steps))
    append(path / "host.jsonl", host_rows(t_end_s))
    append(path / "links.jsonl", link_rows(steps, workers, t_end_s))
    append(path / "events.jsonl", event_rows(workers, t_end_s, late_s))
    if not killed:
        end = {
            "status": "done",
            "problems": [],
            "parameters": {str(rank): "cafe" for rank in ranks},
            "steps": len(steps),
            "final_accuracy": 0.95,
            "final_loss": 0.2,
            "t_end_s": t_end_s,
        }
        (path / "result.json").write_text(json.dumps({**end, **(result or {})}))
    return path


def steps_file(cell: Path, rank: int, ranks_per_worker: int = 1) -> Path:
    """Where a rank records its steps."""
    return host_directory(cell, rank_name(rank, ranks_per_worker)) / STEPS_FILE


def append(path: Path, rows: Any) -> None:
    """Append rows as the programs do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = RecordFile(path)
    file.append(list(rows))
    file.close()


def step_rows(shares: tuple[float, float], seed: int, t_end_s: float) -> Iterator[dict[str, Any]]:
    """Steps of one rank: compute, then send a share of the dense bytes, which take 95 % of what the
    rates in force allow."""
    t_s, step = 0.0, 0
    while True:
        rate_bps = rate_at(t_s, t_end_s)
        share = shares[0] if rate_bps == FAST_BPS else shares[1]
        payload = int(DENSE_BYTES * share)
        ready_s = t_s + COMPUTE_S
        wire_bits = payload * 8 / 0.95 * (1 + 0.01 * ((step * 7 + seed * 3) % 5))
        t_s = time_of(allowed_bits(ready_s, t_end_s) + wire_bits, t_end_s)
        comm_s = t_s - ready_s
        if t_s > t_end_s:
            return
        yield {
            "step": step,
            "t_s": t_s,
            "loss": 2.3 / (1 + 0.02 * step) + 0.05 * ((step * 13 + seed) % 7) / (1 + 0.02 * step),
            "samples": BATCH,
            "step_s": COMPUTE_S + comm_s,
            "compute_s": COMPUTE_S,
            "comm_s": comm_s,
            "encode_s": 0.0 if share == 1 else 0.003,
            "payload_bytes": payload,
            "dense_bytes": DENSE_BYTES,
            "ratio": share,
            "lost_energy": None,
            "bandwidth_bps": None if share == 1 else 0.95 * rate_bps,
            "rtt_s": None,
            "min_rtt_s": None,
            "retransmits": 0,
        }
        step += 1


def eval_rows(steps: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """An evaluation after every 20 steps."""
    for row in steps[19::20]:
        done = row["step"] + 1
        scores = {"accuracy": 0.97 - 0.9 / (1 + 0.05 * done), "loss": 2.3 / (1 + 0.02 * done)}
        yield {"step": done, "t_s": row["t_s"], **scores}


def host_rows(
    t_end_s: float, busy: float = 0.5, foreign: float = 0.01, waited: float | None = 0.3
) -> Iterator[dict[str, Any]]:
    """Ten samples a second of a machine under some load."""
    for number in range(1, round(t_end_s * 10) + 1):
        yield {
            "t_s": number / 10,
            "cpu_some_share": 0.3,
            "cpu_busy_share": busy,
            "cpu_foreign_share": foreign,
            "cpu_waited_share": waited,
            "processors": 2,
            "stopped": False,
            "softnet_drops": 0,
        }


def link_rows(
    steps: list[dict[str, Any]], workers: int, t_end_s: float
) -> Iterator[dict[str, Any]]:
    """Ten samples a second of both directions of every worker's link; the frames flow while a step
    communicates."""
    knots = [(0.0, 0.0)]
    for row in steps:
        begin_s, end_s, before = row["t_s"] - row["comm_s"], row["t_s"], knots[-1][1]
        inside = [t_s for t_s in (t_end_s / 3, 2 * t_end_s / 3) if begin_s < t_s < end_s]
        first, last = allowed_bits(begin_s, t_end_s), allowed_bits(end_s, t_end_s)
        for t_s in (begin_s, *inside, end_s):
            share = (allowed_bits(t_s, t_end_s) - first) / (last - first)
            knots.append((t_s, before + share * row["payload_bytes"] * FRAME_BYTES / SEGMENT_BYTES))
    times_s = np.arange(round(t_end_s * 10) + 1) / 10
    sent_bytes = np.interp(times_s, *zip(*knots, strict=True))
    for t_s, sent in zip(times_s.tolist(), sent_bytes.astype(int).tolist(), strict=True):
        rate_bps = rate_at(t_s, t_end_s)
        shaper = {
            "rate_bps": rate_bps,
            "burst_bytes": max(rate_bps // 8000, 2 * FRAME_BYTES),
            "queue_bytes": rate_bps // 160,
        }
        counters = {
            "bytes": sent,
            "packets": sent // FRAME_BYTES,
            "drops": 0,
            "lost": None,
            "overlimits": 0,
        }
        queue = {"backlog_bytes": 0, "qlen": 0}
        for rank in range(workers):
            for direction in ("up", "down"):
                yield {
                    "t_s": t_s,
                    "reading_s": 0.001,
                    "link": f"w{rank}",
                    "direction": direction,
                    **shaper,
                    **counters,
                    **queue,
                }


def event_rows(workers: int, t_end_s: float, late_s: float) -> Iterator[dict[str, Any]]:
    """The first state of every link, then the two changes of the schedule."""
    for kind, at_s in (("initial", 0.0), ("schedule", t_end_s / 3), ("schedule", 2 * t_end_s / 3)):
        parameters = {
            "rate_bps": rate_at(at_s, t_end_s),
            "queue_s": 0.05,
            "delay_s": 0.0,
            "jitter_s": 0.0,
            "loss": 0.0,
        }
        applied_s = -0.1 if kind == "initial" else at_s + late_s
        for rank in range(workers):
            change = {
                "link": f"w{rank}",
                "state": {"up": parameters, "down": parameters},
                "kind": kind,
                "verified": True,
            }
            yield {"planned_s": at_s, "applied_s": applied_s, **change}
