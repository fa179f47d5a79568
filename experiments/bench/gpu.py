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

from netsenseml import attach
from netsenseml.compress.codec import VALUES, Codec, add_decoded

RESNET18 = 11_689_512
DENSITIES = (1.0, 0.1, 0.01, 0.001)
METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "plain": None,
    "allreduce": ("allreduce", {}),
    "netsense": ("netsense", {}),
    "topk": ("topk", {"ratio": 0.01}),
    "quantized": ("quantized", {"values": "int8"}),
    "plain again": None,
    "netsense again": ("netsense", {}),
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
    """An embedding and so many layers above it."""

    def __init__(self, width: int, layers: int, heads: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(8192, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embed(tokens)) @ self.embed.weight.T


def train(rank: int, ranks: int, backend: str, directory: str, steps: int, results: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.backends.cuda.matmul.allow_tf32 = True
    dist.init_process_group(backend, init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks)
    width, layers, batch = (1024, 8, 24) if backend == "nccl" else (256, 4, 64)
    found: dict[str, dict[str, float | str]] = {}
    for name, method in METHODS.items():
        torch.manual_seed(0)
        ddp = DistributedDataParallel(Transformer(width, layers).cuda(), gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
        began_s = time.perf_counter()
        session = attach(ddp, method[0], **method[1]) if method is not None else None
        attached_s = time.perf_counter() - began_s
        tokens = torch.randint(0, 8192, (batch, 256), device="cuda")
        took, blocked_s = [], 0.0
        for step in range(steps):
            if step == steps // 4:
                blocked_s = session.blocked_s if session is not None else 0.0
            began_s = time.perf_counter()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(ddp(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            if session is not None:
                session.step(loss, samples=batch)
            if step >= steps // 4:
                took.append(time.perf_counter() - began_s)
        torch.cuda.current_stream().synchronize()
        found[name] = {"step_ms": 1e3 * statistics.median(took), "attach_ms": 1e3 * attached_s}
        if session is not None:
            found[name]["in_hook_ms"] = 1e3 * (session.blocked_s - blocked_s) / len(took)
            session.close()
            last = session.last or {}
            found[name] |= {f"{column}_ms": 1e3 * last[f"{column}_s"] for column in ("comm", "encode", "compute")}
            found[name]["scheme"] = last["scheme"]
        del ddp, session, optimizer
    dist.destroy_process_group()
    if rank == 0:
        results.put(found)


def steps(backend: str, ranks: int, count: int) -> dict[str, dict[str, float | str]]:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        given = (ranks, backend, directory, count, results)
        processes = [context.Process(target=train, args=(rank, *given)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            return {}
        found: dict[str, dict[str, float | str]] = results.get()
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
        of_steps[f"{backend}, {ranks}"] = found = steps(backend, ranks, 40)
        for method, figures in found.items():
            texts = (f"{what} {value:.2f}" if isinstance(value, float) else value for what, value in figures.items())
            print(f"{backend}, ranks: {ranks}, {method:15}", *texts, flush=True)
    if given.out is not None:
        whole = {
            "device": name,
            "torch": torch.__version__,
            "elements": given.elements,
            "codecs": of_codecs,
            "steps": of_steps,
        }
        (given.out / "gpu.json").write_text(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()
