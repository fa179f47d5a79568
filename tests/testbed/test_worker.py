"""The built-in worker and its conversation with an orchestrator, over a real control socket."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from netsenseml.listener import ENV_LISTENER
from netsenseml.records import monotonic_s, read_records
from testbed import protocol
from testbed.worker import checkpoint, program, zoo
from testbed.worker.client import ControlClient
from tests.netsenseml.groups import Ranks
from tests.testbed.synthetic_run import steps_file


class Orchestrator:
    """The least that a worker needs: start when all are ready, heartbeats, hold and stop."""

    def __init__(self, directory: Path, ranks: int) -> None:
        self.messages: list[tuple[int, dict[str, Any]]] = []
        self._ranks = ranks
        self._server = protocol.listen_unix(directory / protocol.SOCKET_FILE)
        self._buffers: dict[Any, protocol.MessageBuffer] = {}
        self._speaks: dict[Any, int] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)

    def close(self) -> None:
        for connection in (self._server, *self._buffers):
            connection.close()
        self._selector.close()

    def of(self, kind: str) -> dict[int, dict[str, Any]]:
        """The newest message of a kind, by rank."""
        return {rank: message for rank, message in self.messages if message["type"] == kind}

    def tell(self, message: dict[str, Any]) -> None:
        for connection in self._buffers:
            connection.sendall(protocol.encode_message(message))

    def until(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        """Serve until the condition holds."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"waited in vain; messages so far: {self.messages}"
            for key, _ in self._selector.select(0.05):
                self._serve(key.fileobj)

    def _serve(self, connection: Any) -> None:
        if connection is self._server:
            connection, _ = self._server.accept()
            self._buffers[connection] = protocol.MessageBuffer()
            self._selector.register(connection, selectors.EVENT_READ)
        elif data := connection.recv(65536):
            for message in self._buffers[connection].feed(data):
                if connection not in self._speaks:
                    assert message["type"] == "hello"
                    self._speaks[connection] = int(message["token"].removeprefix("rank "))
                else:
                    self.messages.append((self._speaks[connection], message))
        else:
            self._selector.unregister(connection)
            del self._buffers[connection]
            connection.close()

    def start(self) -> float:
        self.until(lambda: len(self.of("ready")) == self._ranks)
        t0 = monotonic_s()
        self.tell({"type": "start", "t0": t0})
        return t0

    def hold_and_stop(self) -> int:
        self.tell({"type": "hold"})
        self.until(lambda: len(self.of("holding")) == self._ranks)
        last = max(message["step"] for message in self.of("holding").values()) + 1
        self.tell({"type": "stop", "steps": last})
        return last

    def finish(self) -> None:
        self.until(lambda: len(self.of("done")) == self._ranks)


@contextmanager
def orchestrated(directory: Path, ranks: int) -> Iterator[Orchestrator]:
    orchestrator = Orchestrator(directory, ranks)
    try:
        yield orchestrator
    finally:
        orchestrator.close()


def write_cell(
    directory: Path, ranks: int, method: str = "topk", seed: int = 0, **workload: Any
) -> None:
    defaults = {
        "model": "mlp",
        "model_options": {"hidden": [32]},
        "data": "digits",
        "data_options": {},
        "batch": 32,
        "stop": {"steps": 12},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "compute": "real",
        "device": "cpu",
        "evaluate_every_s": 0.2,
        "checkpoint_every": None,
    }
    cell = {
        "cell": "test",
        "method": {"name": method, "options": {}},
        "seed": seed,
        "workers": ranks,
        "workload": {**defaults, **workload},
    }
    (directory / protocol.CELL_FILE).write_text(json.dumps(cell))


def work(rank: int) -> int:
    os.environ[protocol.ENV_TOKEN] = f"rank {rank}"
    output = protocol.host_directory(
        Path(os.environ[protocol.ENV_CELL_DIR]), protocol.worker_name(rank)
    )
    output.mkdir(parents=True)
    os.environ[protocol.ENV_OUTPUT_DIR] = str(output)
    return program.main()


def start_workers(directory: Path, ranks: int) -> Ranks:
    env = {
        protocol.ENV_CELL_DIR: str(directory),
        ENV_LISTENER: protocol.LISTENER,
        protocol.ENV_RENDEZVOUS: f"file://{directory}/rendezvous",
    }
    return Ranks(work, [(rank,) for rank in range(ranks)], env, directory / "log")


@pytest.mark.parametrize("method", ["allreduce", "netsense"])
@pytest.mark.parametrize(
    "workload",
    [{}, {"model": "cnn", "model_options": {}, "stop": {"epochs": 0.8}, "bucket_cap_mb": 0.1}],
    ids=["mlp", "cnn"],
)
def test_trains_to_the_end(tmp_path: Path, method: str, workload: dict[str, Any]) -> None:
    write_cell(tmp_path, 2, method, **workload)
    with orchestrated(tmp_path, 2) as orchestrator:
        workers = start_workers(tmp_path, 2)
        orchestrator.start()
        orchestrator.finish()
        assert workers.results() == [0, 0]
    # 1347 samples make 21 batches of 2 x 32; 0.8 of them begin 17 steps
    steps = 17 if workload else 12
    ready, done = orchestrator.of("ready"), orchestrator.of("done")
    assert (
        ready[0]["parameters"]
        == ready[1]["parameters"]
        != done[0]["parameters"]
        == done[1]["parameters"]
    )
    assert {message["steps"] for message in done.values()} == {steps}
    assert done[1]["accuracy"] is None
    for rank in range(2):
        rows = list(read_records(steps_file(tmp_path, rank)))
        assert [row["step"] for row in rows] == list(range(steps))
        assert all(row["samples"] == 32 and row["rank"] == rank for row in rows)
    evaluations = list(read_records(protocol.host_directory(tmp_path, "w0") / protocol.EVALS_FILE))
    assert evaluations[-1]["step"] == steps
    assert evaluations[-1]["accuracy"] == done[0]["accuracy"] > 0.3
    assert evaluations[-1].keys() == protocol.EVAL_COLUMNS.keys()
    assert orchestrator.of("eval")[0].keys() == {"type", *protocol.EVAL_COLUMNS}


@pytest.mark.parametrize(
    "compute", ["real", {"emulate_s": 0.005, "jitter": 0.0}], ids=["real", "emulated"]
)
def test_local_updates_end_with_equal_replicas_and_all_their_bytes_in_the_records(
    tmp_path: Path, compute: Any
) -> None:
    write_cell(tmp_path, 2, "localsgd", compute=compute, evaluate_every_s=0.01)
    with orchestrated(tmp_path, 2) as orchestrator:
        workers = start_workers(tmp_path, 2)
        orchestrator.start()
        orchestrator.finish()
        assert workers.results() == [0, 0]
    done = orchestrator.of("done")
    assert done[0]["parameters"] == done[1]["parameters"] and {
        message["steps"] for message in done.values()
    } == {12}
    for rank in range(2):
        rows = list(read_records(steps_file(tmp_path, rank)))
        assert [(row["step"], row["samples"]) for row in rows] == [
            (step, 32) for step in range(12)
        ] + [(12, None)]
        sent = {row["step"]: row["payload_bytes"] for row in rows if row["payload_bytes"]}
        assert sent == dict.fromkeys([7, 12], rows[0]["dense_bytes"])
        assert rows[-1]["t_s"] > rows[-2]["t_s"] and rows[-1]["comm_s"] > 0
    if compute == "real":
        assert done[0]["accuracy"] > 0.3


def test_some_methods_have_a_momentum_in_place_of_the_optimizers() -> None:
    sgd, adam = (
        {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
        {
            "name": "adamw",
            "lr": 1e-3,
        },
    )
    for name, options, given, left, told in (
        ("topk", {}, sgd, sgd, {}),
        ("dgc", {}, sgd, {"name": "sgd", "lr": 0.1}, {"momentum": 0.9}),
        ("demo", {}, sgd, sgd, {}),
        ("demo", {"update": "sign"}, sgd, {"name": "sgd", "lr": 0.1}, {}),
        ("demo", {}, adam, {**adam, "beta1": 0.0}, {}),
        ("demo", {"update": "mean"}, adam, adam, {}),
    ):
        assert program._momentum_where_it_belongs({"name": name, "options": options}, given) == (
            left,
            told,
        )


@pytest.mark.alone
def test_all_ranks_stop_after_the_same_step_and_pace_is_kept(tmp_path: Path) -> None:
    write_cell(tmp_path, 2, "allreduce", stop={"seconds": 1.5}, compute={"pace_s": 0.05})
    with orchestrated(tmp_path, 2) as orchestrator:
        workers = start_workers(tmp_path, 2)
        begin = orchestrator.start()
        orchestrator.until(lambda: monotonic_s() - begin > 1.5)
        last = orchestrator.hold_and_stop()
        orchestrator.finish()
        assert workers.results() == [0, 0]
    assert {message["steps"] for message in orchestrator.of("done").values()} == {last}
    assert orchestrator.of("heartbeat").keys() == {0, 1}
    rows = list(read_records(steps_file(tmp_path, 0)))
    assert len(rows) == last
    paced = sorted(row["compute_s"] for row in rows[3:])
    assert 0.045 <= paced[len(paced) // 2] <= 0.1
    # t = 0 is the start, not the epoch of the clock
    assert abs(rows[0]["t_s"] - rows[0]["step_s"]) < 0.1


@pytest.mark.parametrize(
    ("workload", "said"),
    [
        ({"model": "mpl"}, "unknown model 'mpl'; choose from mlp"),
        (
            {"model_options": {"hiden": [1]}},
            "model 'mlp' has no option 'hiden'; its options: hidden",
        ),
        ({"data": "no.such:data"}, "cannot load 'no.such:data': No module named 'no'"),
        ({"optimizer": {"name": "sdg"}}, "unknown optimizer 'sdg'; choose from sgd"),
        ({"batch": 5000}, "1 workers with batches of 5000 need more than 1347 training samples"),
        ({"compute": "imaginary"}, 'compute must be "real"'),
        pytest.param(
            {"device": "cuda"},
            "workload.device: cuda needs a torch that sees a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_names_are_said_in_one_line(
    tmp_path: Path, workload: dict[str, Any], said: str
) -> None:
    write_cell(tmp_path, 1, **workload)
    with orchestrated(tmp_path, 1) as orchestrator:
        workers = start_workers(tmp_path, 1)
        orchestrator.until(lambda: bool(orchestrator.of("failed")))
        assert workers.results() == [1]
    assert said in orchestrator.of("failed")[0]["error"]
    log = (tmp_path / "log-0").read_text()
    assert said in log and log.count("\n") == 1


def broken_model() -> torch.nn.Module:
    return torch.nn.Linear(3, 10)  # the digits have 64 pixels


def test_a_failure_is_told_and_explained(tmp_path: Path) -> None:
    write_cell(tmp_path, 1, model="test_worker:broken_model", model_options={})
    with orchestrated(tmp_path, 1) as orchestrator:
        workers = start_workers(tmp_path, 1)
        orchestrator.start()
        orchestrator.until(lambda: bool(orchestrator.of("failed")))
        assert workers.results() == [1]
    assert "shapes cannot be multiplied" in orchestrator.of("failed")[0]["error"]
    assert "Traceback" in (tmp_path / "log-0").read_text()


def test_sigterm_ends_a_worker_at_once(tmp_path: Path) -> None:
    write_cell(tmp_path, 1, stop={"seconds": 60})
    with orchestrated(tmp_path, 1) as orchestrator:
        workers = start_workers(tmp_path, 1)
        orchestrator.start()
        rows = steps_file(tmp_path, 0)
        orchestrator.until(lambda: rows.exists() and rows.stat().st_size > 0)
        (process,) = workers.processes
        process.terminate()
        process.join(2)
        assert process.exitcode == -signal.SIGTERM
        workers.end()
    assert list(read_records(rows))


def test_importing_the_worker_leaves_a_process_that_can_fork() -> None:
    code = """
import sys, testbed.worker.program
from pathlib import Path
for module in ("torch._dynamo", "torch.nn.parallel.distributed", "sklearn.datasets", "sklearn.model_selection"):
    assert module in sys.modules, module
threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
# The allocator of pyarrow, which scikit-learn brings along, restarts its thread after a fork.
print(len([name for name in threads if name != "jemalloc_bg_thd"]))
"""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1\n", done.stderr


RANK_3 = {**os.environ, protocol.ENV_TOKEN: "rank 3"}
CLIENT = """
import sys, time
from pathlib import Path
from testbed.worker.client import ControlClient
client = ControlClient(Path(sys.argv[1]), rank=3, silence_s=0.6)
client.ready("hash")
if sys.argv[2] == "close":
    client.close()
time.sleep(float(sys.argv[3]))
assert "torch" not in sys.modules
"""


@pytest.mark.alone
@pytest.mark.parametrize(
    ("ending", "said"),
    [("silence", "no word from the orchestrator for 0.6 s"), ("lost", "closed the control socket")],
)
def test_a_worker_that_is_left_alone_ends_itself(tmp_path: Path, ending: str, said: str) -> None:
    with orchestrated(tmp_path, 1) as orchestrator:
        argv = [sys.executable, "-c", CLIENT, str(tmp_path / protocol.SOCKET_FILE), "stay", "30"]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=RANK_3) as process:
            orchestrator.until(lambda: bool(orchestrator.of("ready")))
            orchestrator.tell({"type": "start", "t0": 0.0})
            if ending == "lost":
                orchestrator.close()
            _, errors = process.communicate(timeout=10)
    assert process.returncode == ControlClient.EXIT_ORPHANED
    assert errors == f"testbed: rank 3 ends: {errors.partition('ends: ')[2]}" and said in errors


@pytest.mark.alone
def test_after_closing_silence_is_no_reason_to_end(tmp_path: Path) -> None:
    with orchestrated(tmp_path, 1) as orchestrator:
        argv = [sys.executable, "-c", CLIENT, str(tmp_path / protocol.SOCKET_FILE), "close", "1"]
        with subprocess.Popen(argv, env=RANK_3) as process:
            orchestrator.start()
            assert process.wait(10) == 0


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_models_fit_the_digits(name: str) -> None:
    train_x, train_y, test_x, test_y = zoo.make_data("digits", {})
    assert (train_x.shape, test_x.shape) == ((1347, 64), (450, 64))
    assert train_y.bincount().min() >= 130 and test_y.bincount().min() >= 43  # stratified
    model = zoo.make_model(name, {}, seed=1)
    assert model(test_x[:5]).shape == (5, 10)
    assert 2e5 <= sum(parameter.numel() for parameter in model.parameters()) <= 4e5
    again = zoo.make_model(name, {}, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers(name: str) -> None:
    optimizer = zoo.make_optimizer([torch.nn.Parameter(torch.zeros(1))], {"name": name, "lr": 0.25})
    assert type(optimizer).__name__.lower() == name
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_checkpoints_reach_back_to_where_a_rank_may_have_stopped_and_newer_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 has died behind step 35 of an interval that ends with step 64."""
    mine = checkpoint.Checkpoints(tmp_path, 20)
    mine.steps_until_exchange = 32
    for steps in (20, 40, 60):
        mine.save(steps, {"after": steps})

    def of_all(found: list[list[int]], own: list[int]) -> None:
        found[:] = [own, others]

    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(checkpoint.dist, "all_gather_object", of_all)
    others = [20]
    assert mine.newest_of_all() == (20, {"after": 20})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20.pt"], (
        "what came later is no part of the training now"
    )
    others = []
    assert mine.newest_of_all() is None and not list(tmp_path.iterdir())
