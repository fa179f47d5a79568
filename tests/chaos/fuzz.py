"""Coverage-guided fuzzing of every door through which bytes of others come, by atheris (libFuzzer).

    python tests/chaos/fuzz.py [TARGET …] [--runs 10000] [--out DIRECTORY]
    python tests/chaos/fuzz.py TARGET --again FILE

Each target takes what it is given or refuses it in a few printable lines; another exception, more
than a second of processor time for one input, or memory beyond 2 GiB ends it, and the input is kept
in DIRECTORY/TARGET. What is found is kept there, too, and is where the next call begins.

Prints a table: inputs tried, inputs that reached something new, the share that was taken, the
slowest, and memory after a tenth of the inputs and at the end. Exit code 1 if a target failed.
"""

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
from atheris.import_hook import HookManager

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "testbed")]

SLOW_S = 1.0

Target = Callable[[bytes], None]
"""Takes its input or raises ValueError."""


def spec(directory: Path) -> tuple[Target, list[bytes]]:
    from testbed.plan import describe, make_plan
    from testbed.spec.load import load_spec

    file = directory / "fuzzed.yaml"

    def take(data: bytes) -> None:
        file.write_bytes(data)
        loaded = load_spec(file)
        if len(loaded.schedule) < 20:
            describe(make_plan(loaded, directory))

    texts = [path.read_bytes() for path in sorted((ROOT / "experiments").rglob("*.yaml"))]
    return take, [text for text in texts if len(text) < 3000]


def trace(_: Path) -> tuple[Target, list[bytes]]:
    from testbed.timeline.recording import parse_recording

    def take(data: bytes) -> None:
        parse_recording(data.decode(errors="replace"))

    heads = [
        path.read_bytes()[:300] for path in sorted((ROOT / "experiments/traces").glob("*.[cp]*"))
    ]
    return take, [*heads, b"t_ms,rate_bps,delay_ms,loss\n0,5mbit,3,1%\n"]


def worker(_: Path) -> tuple[Target, list[bytes]]:
    """Messages to the orchestrator over a worker's control socket."""
    from testbed.protocol import MessageBuffer
    from testbed.run.messages import parse_message

    def take(data: bytes) -> None:
        buffer = MessageBuffer()
        middle = len(data) // 2
        for piece in (data[:middle], data[middle:]):
            for content in buffer.feed(piece):
                parse_message(content)

    messages: list[dict[str, Any]] = [
        {"type": "hello", "token": "0" * 32, "pid": 7, "protocol": 1},
        {"type": "heartbeat", "step": 3},
        {"type": "holding"},
        {"type": "eval", "step": 5, "t_s": 1.5, "accuracy": 0.5, "loss": 1.0},
        {"type": "done", "steps": 9, "parameters": "ab", "accuracy": None, "loss": None},
        {"type": "failed", "error": "ValueError: no", "by_peer": True},
        {"type": "where", "at": "train.py:3"},
    ]
    return take, [json.dumps(message).encode() + b"\n" for message in messages]


def agent(_: Path) -> tuple[Target, list[bytes]]:
    """Messages between orchestrator and agents, both ways."""
    from testbed.nodes import messages

    kinds = (messages.FROM_AGENT, messages.FROM_ORCHESTRATOR)

    def take(data: bytes) -> None:
        refused = None
        for kind in kinds:
            try:
                messages.parse(data, kind)
            except ValueError as error:
                refused = error
            else:
                return
        if refused:
            raise refused

    names = {
        name
        for kind in kinds
        for name in kind.json_schema()["discriminator"]["mapping"]  # of each message
    }
    return take, [json.dumps({"type": name, "request": 1}).encode() for name in sorted(names)]


def link(_: Path) -> tuple[Target, list[bytes]]:
    """What ``testbed link`` sends to a running cell."""
    from testbed.protocol import decode_message
    from testbed.spec.load import parse_link

    def take(data: bytes) -> None:
        parse_link(decode_message(data), 1500)

    return take, [
        b'{"rate": "5mbit"}',
        b'{"up": {"rate": "1gbit", "delay": "5ms", "jitter": "1ms"}, "down": {"loss": "1%"}}',
        b'{"queue": "20ms", "loss": {"share": "1%", "burst": 4}, "reorder": "1%"}',
        b'{"cut": true}',
    ]


def buffer(_: Path) -> tuple[Target, list[bytes]]:
    """Encoded gradients from another rank."""
    import torch

    from netsenseml.compress.codec import Codec, MalformedBuffer, add_decoded

    n, guard = 100, 64

    def take(data: bytes) -> None:
        field = torch.full((n + 2 * guard,), 1.5)
        out = field[guard : guard + n]
        try:
            add_decoded(torch.frombuffer(bytearray(data), dtype=torch.uint8), out)
        except MalformedBuffer as error:
            if not bool((field == 1.5).all()):
                raise AssertionError("changed by a malformed buffer") from None
            raise ValueError(str(error)) from None
        if not bool((field[:guard] == 1.5).all() and (field[guard + n :] == 1.5).all()):
            raise AssertionError("written beside its place")

    names = ["fp32", "bf16", "int8", "int4", "sign", "sparse-fp32@5%", "sparse-int8@5%"]
    x = torch.linspace(-1, 1, n)
    return take, [bytes(Codec.parse(name).encode(x, 1).tolist()) for name in names]


def run(directory: Path) -> tuple[Target, list[bytes]]:
    """A run directory in which one file is a stranger's: the first byte says which."""
    from synthetic_run import write_run

    from testbed.report.html import render
    from testbed.results.load import load_run
    from testbed.results.records import finish_cell
    from testbed.results.summary import summarize

    for name in ("going", "ended"):
        write_run(directory / name, methods=("netsense",), t_end_s=1.0)
    for cell in (directory / "ended" / "cells").iterdir():
        finish_cell(cell)
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    whole = [file.read_bytes() for file in files]

    def take(data: bytes) -> None:
        place = data[0] % len(files) if data else 0
        files[place].write_bytes(data[1:])
        try:
            opened = load_run(directory / files[place].relative_to(directory).parts[0])
            summary = summarize(opened)
            json.dumps(summary, allow_nan=False)
            if zlib.crc32(data) % 4 == 0:  # it takes longest
                render(opened, summary)
        finally:
            files[place].write_bytes(whole[place])

    return take, [bytes([place]) + content for place, content in enumerate(whole)]


TARGETS = {one.__name__: one for one in (spec, trace, worker, agent, link, buffer, run)}


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def fuzz(name: str, runs: int, out: Path, again: Path | None) -> None:
    """Give a target its inputs, in this process; does not return."""
    # As atheris.instrument_imports, which traces comparisons, too; but of each it keeps the result,
    # so that two compared tables stay in memory for ever.
    dataflow = name != "run"
    with HookManager({"testbed", "netsenseml", "yaml"}, set(), False, trace_dataflow=dataflow):
        work = out / f"{name}.files"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        take, seeds = TARGETS[name](work)
    corpus = out / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = {
        word for seed in seeds for word in re.findall(rb"[a-z][a-z_]{2,30}|[0-9]+[a-z%]+", seed)
    }
    dictionary = out / f"{name}.words"
    dictionary.write_text("".join(f'"{word.decode()}"\n' for word in sorted(words | {b"NSML"})))
    tried = taken = 0
    slowest_s = first_mib = 0.0

    def timed(data: bytes) -> tuple[float, bool]:
        begun_s, accepted = time.thread_time(), True
        try:
            take(data)
        except ValueError as error:
            lines = str(error).split("\n")
            if not (1 <= len(lines) <= 6 and all(line.isprintable() for line in lines)):
                raise AssertionError(f"refused in {lines!r:.300}") from None
            accepted = False
        return time.thread_time() - begun_s, accepted

    def once(data: bytes) -> None:
        nonlocal tried, taken, slowest_s, first_mib
        tried += 1
        took_s, accepted = timed(data)
        taken += accepted
        for _ in range(3):  # who shares the machine makes all of it slower for a while
            if took_s > SLOW_S:
                took_s = min(took_s, timed(data)[0])
        if tried > 10:  # the first compile and import
            slowest_s = max(slowest_s, took_s)
        if slowest_s > SLOW_S:
            raise AssertionError(f"took {slowest_s:.1f} s")
        if tried == runs // 10:
            first_mib = _resident_mib()
        if tried % 100 == 0 or tried == runs:
            table = [tried, len(list(corpus.iterdir())) - len(seeds), taken / tried]
            (out / f"{name}.json").write_text(
                json.dumps([*table, slowest_s, first_mib, _resident_mib()])
            )

    arguments = [str(again)] if again else [f"-runs={runs}", "-max_len=4096", str(corpus)]
    arguments += [f"-dict={dictionary}", f"-artifact_prefix={corpus}/failed-", "-timeout=20"]
    atheris.Setup([sys.argv[0], *arguments], once)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="*", help=f"of {', '.join(TARGETS)} (all)")
    parser.add_argument("--runs", type=int, default=10_000, help="inputs for each")
    parser.add_argument("--out", type=Path, default=None, help="for what is found (a new one)")
    parser.add_argument("--again", type=Path, default=None, help="give it this input alone")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if wrong := [name for name in options.target if name not in TARGETS]:
        parser.error(f"there is no target {wrong[0]!r}; choose from {', '.join(TARGETS)}")
    if options.again and len(options.target) != 1:
        parser.error("--again goes with one target")
    out = options.out or Path(tempfile.mkdtemp(prefix="netsense-fuzz-"))
    if options.here:
        fuzz(options.target[0], options.runs, out, options.again)
    failed = []
    for name in options.target or TARGETS:
        # libFuzzer ends its process
        command = [sys.executable, __file__, name, "--here", "--out", str(out)]
        if options.again:
            return subprocess.run([*command, "--again", str(options.again)], check=False).returncode
        with tempfile.TemporaryFile("w+") as log:
            code = subprocess.run(
                [*command, "--runs", str(options.runs)], stdout=log, stderr=log, check=False
            ).returncode
            log.seek(0)
            text = log.read()
        if code:
            failed.append(name)
            print(text[-4000:])
        with contextlib.suppress(OSError):
            tried, new, taken, slowest_s, first, last = json.loads(
                (out / f"{name}.json").read_text()
            )
            print(
                f"{name:8}{tried:8} inputs, {new:5} reached something new, {taken:6.1%} taken,"
                f" slowest {slowest_s:.3f} s, {first:.0f} → {last:.0f} MiB",
                flush=True,
            )
    print(
        f"failed: {', '.join(failed)}; see {out}"
        if failed
        else "all refused what they did not take"
    )
    if not options.out and not failed:
        shutil.rmtree(out)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
