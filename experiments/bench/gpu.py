"""What the library costs on a CUDA device: codecs beside torch.topk and a copy, and the hook beside
DDP without it.

    python experiments/bench/gpu.py [--out DIRECTORY] [--elements N] [--repetitions N]
                                    [--only codecs|steps]

Needs torch and numba only. Codecs: milliseconds between two events of a device that was idle, and
of the host until the call has returned, medians, for N elements (ResNet-18's), without the copy of
x before an encoding; sparse ones also with cooperative_kernels.py, which may take the place of the
library's. Their baseline is torch.topk of the magnitudes, unsorted, with the values gathered. Hook:
milliseconds of a step of a GPT-like model, medians of blocks of steps, of DDP without a hook and
with each method, taking turns, and the median ratio of the two: one rank over NCCL, two ranks that
share the device over Gloo, through the loopback, and one rank a device over NCCL where there are
several devices. Then also milliseconds of an exchange of N elements by two hosts, as far as the
plan knows, that have two ranks each on the same two devices: int8 and 1 %, flat, and by host,
within it over NCCL and over Gloo. OUT/gpu.json has the same figures.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from netsenseml import Mesh, all_reduce_mean, attach
from netsenseml.compress import codec as codec_module
from netsenseml.compress.codec import VALUES, Codec, add_decoded
from netsenseml.exchange.communicators import parse

RESNET18 = 11_689_512
DENSITIES = (1.0, 0.1, 0.01, 0.001)
METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "plain": None,
    "allreduce": ("allreduce", {}),
    "netsense": ("netsense", {}),
    "topk": ("topk", {"ratio": 0.01}),
    "quantized": ("quantized", {"values": "int8"}),
}
SHAPES = {"wide": (2048, 3, 16), "deep": (1024, 8, 24), "small": (256, 4, 64)}
"""Width, layers and batch of the model. To launch a step of the deep one, a CPU may need as long as
the device to do it."""
ROUNDS, BLOCK = 5, 15
"""Steps are timed in blocks, with and without a hook in turn."""


def milliseconds(work: Callable[[], object], repetitions: int) -> tuple[float, float]:
    """Median times between events of the device, and of the host until the call returns, after two
    calls that warm up."""
    took, of_host = [], []
    for repetition in range(repetitions + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        began_s = time.perf_counter()
        work()
        host_s = time.perf_counter() - began_s
        end.record()
        end.synchronize()
        if repetition >= 2:
            took.append(begin.elapsed_time(end))
            of_host.append(1e3 * host_s)
    return statistics.median(took), statistics.median(of_host)


def codecs(elements: int, repetitions: int) -> dict[str, dict[str, float]]:
    import cooperative_kernels  # these need Triton

    from netsenseml.compress import device_kernels

    backends = {"": device_kernels, ", 1 launch": cooperative_kernels}
    draw = torch.Generator("cuda").manual_seed(0)
    normal = torch.randn(4, elements, device="cuda", generator=draw)
    x = normal[0] / normal[1:].square().mean(dim=0).sqrt()  # Student's t with 3 degrees of freedom
    compensated, out = torch.empty_like(x), torch.zeros_like(x)
    copy_ms, copy_host_ms = milliseconds(lambda: compensated.copy_(x), repetitions)
    rows = {"copy": {"encode_ms": copy_ms, "encode_host_ms": copy_host_ms}}
    for density in DENSITIES[1:]:
        k = Codec("fp32", density).elements(elements)

        def usual(k: int = k) -> torch.Tensor:
            return x[x.abs().topk(k, sorted=False).indices]

        topk_ms, topk_host_ms = milliseconds(usual, repetitions)
        rows[f"topk@{100 * density:g}%"] = {"encode_ms": topk_ms, "encode_host_ms": topk_host_ms}
    for density in DENSITIES:
        for values in VALUES:
            codec = Codec(values, density)

            def encode(codec: Codec = codec) -> torch.Tensor:
                return codec.encode(compensated.copy_(x), 0)

            def decode(codec: Codec = codec) -> Callable[[], torch.Tensor]:
                buffer = codec.encode(compensated.copy_(x), 0)
                return lambda: add_decoded(buffer, out, 0.25)

            for what, backend in backends.items() if density < 1 else [("", device_kernels)]:
                with mock.patch.object(
                    codec_module, "_backend", lambda _, backend=backend: backend
                ):
                    encode_ms, encode_host_ms = milliseconds(encode, repetitions)
                    decode_ms, decode_host_ms = milliseconds(decode(), repetitions)
                rows[codec.name + what] = {
                    "encode_ms": encode_ms - copy_ms,
                    "encode_host_ms": encode_host_ms - copy_host_ms,
                    "decode_ms": decode_ms,
                    "decode_host_ms": decode_host_ms,
                }
    return rows


class Transformer(nn.Module):
    """An embedding and so many layers above it."""

    def __init__(self, width: int, layers: int, heads: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(8192, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embed(tokens)) @ self.embed.weight.T


class Training:
    """A model of random tokens, exchanged by a method or by DDP without a hook."""

    def __init__(
        self, method: tuple[str, dict[str, Any]] | None, width: int, layers: int, batch: int
    ) -> None:
        torch.manual_seed(0)
        self.ddp = DistributedDataParallel(
            Transformer(width, layers).cuda(), gradient_as_bucket_view=True
        )
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=1e-3)
        self.tokens = torch.randint(0, 8192, (batch, 256), device="cuda")
        began_s = time.perf_counter()
        self.session = attach(self.ddp, method[0], **method[1]) if method is not None else None
        self.attach_ms = 1e3 * (time.perf_counter() - began_s)

    def step_ms(self) -> float:
        """Of ``BLOCK`` steps, from an idle device to an idle device."""
        began_s = time.perf_counter()
        for _ in range(BLOCK):
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                self.ddp(self.tokens).flatten(0, 1), self.tokens.flatten()
            )
            loss.backward()
            self.optimizer.step()
            if self.session is not None:
                self.session.step(loss, samples=len(self.tokens))
        torch.cuda.current_stream().synchronize()
        return 1e3 * (time.perf_counter() - began_s) / BLOCK


def train(
    rank: int, ranks: int, backend: str, shape: tuple[int, int, int], directory: str, results: Any
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        backend, init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    found: dict[str, dict[str, float | str]] = {}
    for name, method in METHODS.items():
        plain, hooked = Training(None, *shape), Training(method, *shape)
        plain.step_ms(), hooked.step_ms()
        blocked_s = hooked.session.blocked_s if hooked.session is not None else 0.0
        took = []
        for _ in range(ROUNDS):
            with hooked.session.pause() if hooked.session is not None else contextlib.nullcontext():
                plain_ms = plain.step_ms()
            took.append((plain_ms, hooked.step_ms()))
        found[name] = {
            "plain_ms": statistics.median(without for without, _ in took),
            "step_ms": statistics.median(with_hook for _, with_hook in took),
            "ratio": statistics.median(with_hook / without for without, with_hook in took),
            "attach_ms": hooked.attach_ms,
        }
        if hooked.session is not None:
            found[name]["in_hook_ms"] = (
                1e3 * (hooked.session.blocked_s - blocked_s) / (ROUNDS * BLOCK)
            )
            hooked.session.close()
            last = hooked.session.last or {}
            found[name] |= {
                f"{column}_ms": 1e3 * last[f"{column}_s"]
                for column in ("comm", "encode", "compute")
            }
            found[name]["scheme"] = last["scheme"]
        del plain, hooked
    dist.destroy_process_group()
    if rank == 0:
        results.put(found)


HOSTS = ("int8", "host-int8", "sparse-int8@1%", "host-sparse-int8@1%")


def exchange_by_hosts(
    rank: int, within: str, directory: str, elements: int, repetitions: int, results: Any
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.cuda.set_device(rank % 2)
    backend = "cpu:gloo,cuda:nccl" if within == "nccl" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{directory}/rendezvous", rank=rank, world_size=4
    )
    mesh = Mesh(dist.group.WORLD, hosts=[0, 0, 1, 1], device=torch.device("cuda", rank % 2))
    if mesh.within_by_nccl != (within == "nccl"):
        raise SystemExit("the ranks of a host are not joined as they should be")
    tensor, found = torch.randn(elements, device="cuda"), {}
    for name in HOSTS:
        took = []
        for _ in range(repetitions + 2):
            torch.cuda.current_stream().synchronize()
            mesh.group.allreduce([torch.zeros(1)]).wait()
            began_s = time.perf_counter()
            all_reduce_mean(tensor, name, parse(name), mesh).wait()
            torch.cuda.current_stream().synchronize()
            took.append(time.perf_counter() - began_s)
        found[name] = {"exchange_ms": 1e3 * statistics.median(took[2:])}
    mesh.close()
    dist.destroy_process_group()
    if rank == 0:
        results.put(found)


def run_ranks(work: Any, ranks: int, *given: Any) -> dict[str, dict[str, Any]]:
    """What rank 0 of ``work(rank, *given, results)`` has found, {} if a rank failed; "DIRECTORY"
    becomes one of their own."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        given = tuple(directory if one == "DIRECTORY" else one for one in given)
        processes = [
            context.Process(target=work, args=(rank, *given, results)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            return {}
        found: dict[str, dict[str, Any]] = results.get()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--elements", type=int, default=RESNET18)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--only", choices=("codecs", "steps"))
    given = parser.parse_args()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}")
    of_codecs = codecs(given.elements, given.repetitions) if given.only != "steps" else {}
    if of_codecs:
        print(
            f"{'codec':34}{'encode ms':>12}{'host ms':>9}"
            f"{'decode ms':>12}{'host ms':>9}{'x copy':>9}"
        )
    for codec, row in of_codecs.items():
        total = row["encode_ms"] + row.get("decode_ms", 0.0)
        decode = (
            f"{row['decode_ms']:12.3f}{row['decode_host_ms']:9.3f}"
            if "decode_ms" in row
            else " " * 21
        )
        encode = f"{row['encode_ms']:12.3f}{row['encode_host_ms']:9.3f}"
        print(
            f"{codec:34}{encode}{decode}{total / of_codecs['copy']['encode_ms']:9.1f}", flush=True
        )
    of_steps, devices = {}, torch.cuda.device_count()
    several = [("nccl", min(devices, 8), "wide")] if devices > 1 else []
    groups = (("nccl", 1, "wide"), ("nccl", 1, "deep"), ("gloo", 2, "small"), *several)
    for backend, ranks, shape in groups if given.only != "codecs" else ():
        found = run_ranks(train, ranks, ranks, backend, SHAPES[shape], "DIRECTORY")
        of_steps[f"{backend}, {ranks}, {shape}"] = found
        for method, figures in found.items():
            texts = (
                f"{what} {value:.3f}" if isinstance(value, float) else value
                for what, value in figures.items()
            )
            print(f"{backend}, ranks: {ranks}, {shape}, {method:12}", *texts, flush=True)
    of_hosts = {}
    for within in ("nccl", "gloo") if devices > 1 and given.only != "codecs" else ():
        found = run_ranks(
            exchange_by_hosts, 4, within, "DIRECTORY", given.elements, given.repetitions
        )
        of_hosts[within] = found
        for plan, figures in found.items():
            print(
                f"two hosts, {within} within, {plan:20} exchange {figures['exchange_ms']:.2f}",
                flush=True,
            )
    if given.out is not None:
        whole = {
            "device": name,
            "torch": torch.__version__,
            "elements": given.elements,
            "codecs": of_codecs,
            "steps": of_steps,
            "hosts": of_hosts,
        }
        (given.out / "gpu.json").write_text(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()
