"""What the library costs on a CUDA device: codecs beside torch.topk and a copy, and the hook beside DDP without it.

    python experiments/bench/gpu.py [--out DIRECTORY] [--elements N] [--repetitions N]

Needs torch and numba only. Codecs: milliseconds between two events of the device, medians, for N elements (ResNet-18's); the
baseline of the sparse ones is torch.topk of the magnitudes, unsorted, with the values gathered. Hook: milliseconds of a step of
a GPT-like model, medians, of DDP without a hook and with each method in turn: one rank over NCCL, and two ranks that share the
device over Gloo, through the loopback. OUT/gpu.json has the same figures.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from netsenseml.compress.codec import VALUES, Codec, add_decoded

RESNET18 = 11_689_512
DENSITIES = (1.0, 0.1, 0.01, 0.001)
METHODS: dict[str, dict[str, Any]] = {
    "allreduce": {},
    "bf16": {},
    "topk": {"ratio": 0.01},
    "quantized": {"values": "int8"},
    "netsense": {},
}


def milliseconds(work: Callable[[], object], repetitions: int) -> float:
    """Median time of the device, after two calls that warm up."""
    took = []
    for repetition in range(repetitions + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if repetition >= 2:
            took.append(begin.elapsed_time(end))
    return statistics.median(took)


def codecs(elements: int, repetitions: int) -> dict[str, dict[str, float]]:
    draw = torch.Generator("cuda").manual_seed(0)
    normal = torch.randn(4, elements, device="cuda", generator=draw)
    x = normal[0] / normal[1:].square().mean(dim=0).sqrt()  # Student's t with 3 degrees of freedom
    compensated, out = torch.empty_like(x), torch.zeros_like(x)
    copy_ms = milliseconds(lambda: compensated.copy_(x), repetitions)
    rows = {"copy": {"encode_ms": copy_ms}}
    for density in DENSITIES[1:]:
        k = Codec("fp32", density).elements(elements)

        def usual(k: int = k) -> torch.Tensor:
            return x[x.abs().topk(k, sorted=False).indices]

        rows[f"topk@{100 * density:g}%"] = {"encode_ms": milliseconds(usual, repetitions)}
    for density in DENSITIES:
        for values in VALUES:
            codec = Codec(values, density)
            buffer = codec.encode(compensated.copy_(x), 0)

            def encode(codec: Codec = codec) -> torch.Tensor:
                return codec.encode(compensated.copy_(x), 0)

            def decode(buffer: torch.Tensor = buffer) -> torch.Tensor:
                return add_decoded(buffer, out, 0.25)

            rows[codec.name] = {
                "encode_ms": milliseconds(encode, repetitions) - copy_ms,
                "decode_ms": milliseconds(decode, repetitions),
            }
    return rows


class Transformer(nn.Module):
    """A decoder of so many layers: some 80 million parameters."""

    def __init__(self, width: int = 768, layers: int = 8, heads: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(32_000, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embed(tokens)) @ self.embed.weight.T


def train(rank: int, ranks: int, backend: str, directory: str, batch: int, steps: int, results: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.backends.cuda.matmul.allow_tf32 = True
    dist.init_process_group(backend, init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks)
    from netsenseml import attach

    found: dict[str, float] = {}
    for method in ("plain", *METHODS, "plain again"):
        torch.manual_seed(0)
        ddp = DistributedDataParallel(Transformer().cuda(), gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
        began_s = time.perf_counter()
        session = attach(ddp, method, **METHODS[method]) if method in METHODS else None
        attached_s = time.perf_counter() - began_s
        tokens = torch.randint(0, 32_000, (batch, 256), device="cuda")
        took = []
        for step in range(steps):
            began_s = time.perf_counter()
            optimizer.zero_grad()
            logits = ddp(tokens)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            if session is not None:
                session.step(loss, samples=batch)
            if step >= 5:
                took.append(time.perf_counter() - began_s)
        torch.cuda.current_stream().synchronize()
        found[method] = 1e3 * statistics.median(took)
        if session is not None:
            session.close()
            last = session.last or {}
            found[f"{method}: attach"] = 1e3 * attached_s
            for column in ("comm_s", "encode_s", "compute_s"):
                found[f"{method}: {column}"] = 1e3 * last[column]
            print(f"rank {rank} of {ranks}, {method}: {last['scheme']}", flush=True)
        del ddp, session, optimizer
    dist.destroy_process_group()
    if rank == 0:
        results.put(found)


def steps(backend: str, ranks: int, batch: int, count: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=train, args=(rank, ranks, backend, directory, batch, count, results))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            return {}
        found: dict[str, float] = results.get()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--elements", type=int, default=RESNET18)
    parser.add_argument("--repetitions", type=int, default=15)
    given = parser.parse_args()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}")
    of_codecs = codecs(given.elements, given.repetitions)
    print(f"{'codec':24}{'encode ms':>12}{'decode ms':>12}{'x copy':>9}")
    for codec, row in of_codecs.items():
        total = row["encode_ms"] + row.get("decode_ms", 0.0)
        decode = f"{row['decode_ms']:12.3f}" if "decode_ms" in row else " " * 12
        print(f"{codec:24}{row['encode_ms']:12.3f}{decode}{total / of_codecs['copy']['encode_ms']:9.1f}", flush=True)
    of_steps = {}
    for backend, ranks in (("nccl", 1), ("gloo", 2)):
        of_steps[f"{backend}, {ranks}"] = found = steps(backend, ranks, 8, 25)
        for what, ms in found.items():
            print(f"{backend}, {ranks} ranks: {what:28}{ms:10.2f} ms", flush=True)
    if given.out is not None:
        figures = {
            "device": name,
            "torch": torch.__version__,
            "elements": given.elements,
            "codecs": of_codecs,
            "steps": of_steps,
        }
        (given.out / "gpu.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
