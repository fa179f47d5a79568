"""A sweep over several machines: the cells of a run as tasks of a Dask cluster.

Dask (distributed) brings the machines, by SSH, Slurm, PBS or Kubernetes. One that offers
``--resources testbed=1`` runs one job at a time: all cells of one combination of the matrix, since
methods are compared on one machine, or one cell.
A cell comes home when it has ended, into the run directory here. When a machine is lost, the cells
that it had not sent are run elsewhere.
"""

import contextlib
import io
import platform
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from testbed.children import module_command
from testbed.labs.base import LabError
from testbed.plan import Cell, Plan
from testbed.protocol import one_line
from testbed.run.cell import read_result
from testbed.run.directory import DATA, SCRIPT, SPEC_FILE, TRACES
from testbed.run.sweep import EXIT_DONE, EXIT_FAILED, in_turn, not_done
from testbed.signals import EXIT_INTERRUPTED, interrupt_main_thread_once

RESOURCE = "testbed"
"""What a machine of the cluster has to offer: ``dask worker ADDRESS --resources testbed=1``."""
_POLL_S = 0.5
_NO_MACHINE_S = 15.0
"""So long the first machine is waited for."""
_LEAVE_S = 12.0
"""An interrupted job has cleaned up after so long."""


def execute_on(
    address: str,
    plan: Plan,
    directory: Path,
    console: Console,
    only: Collection[str] = (),
    *,
    spread: bool = False,
) -> int:
    """Run every cell of a run directory that is not done yet on a cluster; returns the exit code.

    address: of Dask's scheduler, tcp://host:8786, or ``local:N`` for N workers on this machine.
    only: as in ``sweep.execute``. spread: any machine may take any cell, also where methods are
    compared. Raises LabError if there is no such cluster, or nothing in it offers RESOURCE.
    """
    with interrupt_main_thread_once(_LEAVE_S) as (_, interrupted):
        try:
            with connected(address) as client:
                return _Sweep(client, plan, directory, console).run(only, spread)
        except (Exception, KeyboardInterrupt):
            if interrupted.is_set():
                return EXIT_INTERRUPTED
            raise


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """A client of a cluster in which some machine offers RESOURCE. Raises LabError if there is
    none."""
    try:
        import distributed
    except ImportError:
        raise LabError("--on needs Dask; install it with: pip install distributed") from None
    count = address.removeprefix("local:")
    with contextlib.ExitStack() as stack:
        try:
            if count != address:
                cluster = distributed.LocalCluster(
                    n_workers=int(count),
                    threads_per_worker=1,
                    resources={RESOURCE: 1},
                    dashboard_address=None,
                    silence_logs=50,
                )
                address = stack.enter_context(cluster).scheduler_address
            client = stack.enter_context(
                distributed.Client(address, timeout=5, set_as_default=False)
            )
        except (OSError, ValueError, ImportError) as error:  # of what the address needs
            raise LabError(
                f"--on {address}: no Dask scheduler can be reached there: {one_line(str(error))}"
            ) from None
        except TypeError as error:  # what Dask raises where it has no certificates to show
            fix = "configure distributed.comm.tls, or use tcp://"
            raise LabError(
                f"--on {address}: Dask has no TLS configuration here ({one_line(str(error))});"
                f" {fix}"
            ) from None
        given_up_s = time.monotonic() + _NO_MACHINE_S
        while not any(
            RESOURCE in worker["resources"]
            for worker in client.scheduler_info(n_workers=-1)["workers"].values()
        ):
            if time.monotonic() > given_up_s:
                offer = f"dask worker {address} --nthreads 1 --resources {RESOURCE}=1"
                raise LabError(
                    f"--on {address}: no machine there offers to run cells; start some with:"
                    f" {offer}"
                )
            time.sleep(_POLL_S)
        yield client


class _Sweep:
    def __init__(self, client: Any, plan: Plan, directory: Path, console: Console) -> None:
        self._client, self._plan, self._directory, self._console = client, plan, directory, console
        self._name = uuid.uuid4().hex
        self._home: set[str] = set()

    def run(self, only: Collection[str], spread: bool) -> int:
        from distributed import Queue, Variable

        cells = in_turn(self._plan)
        pending = (
            [cell for cell in cells if cell.name in only]
            if only
            else not_done(cells, self._directory)
        )
        arrivals, done = (
            Queue(self._name, client=self._client),
            Variable(self._name, client=self._client),
        )
        done.set([])
        files, links = (
            _packed(self._directory, [SPEC_FILE, SCRIPT, TRACES]),
            _links(self._directory / DATA),
        )
        tasks = [
            self._client.submit(
                run_job,
                self._name,
                files,
                links,
                cells,
                _version(),
                resources={RESOURCE: 1},
                pure=False,
                retries=0,
            )
            for cells in _jobs(pending, spread)
        ]
        failed = False
        with _bar(self._console) as bar:
            row = bar.add_task("cells", total=len(pending), completed=0)
            try:
                while not all(task.done() for task in tasks) or arrivals.qsize():
                    with contextlib.suppress(TimeoutError):
                        failed |= self._arrived(arrivals.get(timeout=_POLL_S), len(pending))
                        done.set(sorted(self._home))
                        bar.update(row, completed=len(self._home))
            except BaseException:
                self._client.cancel(tasks)
                self._wait_until_left(tasks)
                raise
        for task in tasks:
            if task.status != "finished":
                failed = True
                self._say(f"testbed: {one_line(str(task.exception()), 500)}")
            elif text := task.result():
                failed = True
                self._say(f"testbed: {one_line(text, 500)}")
        return EXIT_FAILED if failed or len(self._home) < len(pending) else EXIT_DONE

    def _place(self, cell: str) -> Path:
        return self._directory / "cells" / cell

    def _arrived(self, arrival: tuple[str, str, bytes], of: int) -> bool:
        """Put a cell that came home into the run directory; returns whether it has failed."""
        machine, name, packed = arrival
        if name in self._home or name not in {cell.name for cell in self._plan.cells}:
            return False
        with tempfile.TemporaryDirectory(dir=self._directory, prefix=".arriving-") as half:
            unpack(packed, Path(half))
            shutil.rmtree(self._place(name), ignore_errors=True)
            (Path(half) / name).rename(self._place(name))
        self._home.add(name)
        result = read_result(self._place(name)) or {}
        text = (
            f"{result.get('status')}, {result.get('steps')} steps in {result.get('t_end_s', 0):.1f}"
            f" s on {one_line(machine)}"
        )
        self._say(
            f"[{len(self._home)}/{of}] {name}: {'; '.join([text, *result.get('problems', [])])}"
        )
        return bool(result.get("status") != "done")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _wait_until_left(self, tasks: Sequence[Any]) -> None:
        """A job that is told to stop takes its lab down first."""
        keys = {task.key for task in tasks}
        given_up_s = time.monotonic() + _LEAVE_S - 2
        while time.monotonic() < given_up_s:
            running = self._client.run(_busy_with)
            if keys.isdisjoint(key for found in running.values() for key in found):
                return
            time.sleep(_POLL_S)


def _busy_with(dask_worker: Any) -> list[str]:
    """Keys of the tasks that a machine still works on, wanted or not."""
    return list(dask_worker.active_keys)


def _jobs(cells: Sequence[Cell], spread: bool) -> list[list[str]]:
    """What a machine runs at a time: the cells of one combination of the matrix."""
    jobs: dict[str, list[str]] = {}
    for cell in cells:
        jobs.setdefault(cell.name if spread else repr(sorted(cell.overrides.items())), []).append(
            cell.name
        )
    return list(jobs.values())


def _version() -> str:
    try:
        return metadata.version("netsenseml")
    except metadata.PackageNotFoundError:
        return "unknown"


def _packed(parent: Path, names: Sequence[str]) -> bytes:
    """Files and folders of a directory as a compressed archive; those that are not there are left
    out."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        for name in names:
            if (parent / name).exists():
                tar.add(parent / name, arcname=name)
    return packed.getvalue()


def unpack(packed: bytes, directory: Path) -> None:
    """Files and folders of an archive that lie below the directory; nothing else, whatever is in
    it."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        for member in tar:
            path = PurePath(member.name)
            if path.is_absolute() or ".." in path.parts:
                continue
            if member.isdir():
                (directory / path).mkdir(parents=True, exist_ok=True)
            elif (content := tar.extractfile(member) if member.isreg() else None) is not None:
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
                with open(directory / path, "wb") as file:
                    shutil.copyfileobj(content, file)


def _links(folder: Path) -> dict[str, str]:
    """Links in a folder, and to where; the data sets must be at the same place on every machine."""
    return {link.name: str(link.readlink()) for link in folder.glob("*") if link.is_symlink()}


def run_job(name: str, files: bytes, links: dict[str, str], cells: list[str], version: str) -> str:
    """On a machine of the cluster: run some cells, and send each home when it has ended; returns
    what went wrong, or "".

    name: of Dask's queue that takes (machine, cell, archive), and of the variable with the cells
    that are home already.
    """
    from distributed import Queue, Variable, get_client, get_worker

    from testbed.results.records import finish_cell

    machine = platform.node()
    if version != _version():
        raise RuntimeError(
            f"{machine} has netsenseml {_version()}, where the sweep was started it is {version}"
        )
    client, worker = get_client(), get_worker()
    key = worker.get_current_task()
    arrivals = Queue(name, client=client)
    home = set(Variable(name, client=client).get(timeout=30))
    left = [cell for cell in cells if cell not in home]
    # whoever had this job before has ended right after its last cell; no names would stand for all
    if not left:
        return ""
    with tempfile.TemporaryDirectory(prefix="netsense-") as temporary:
        directory = Path(temporary) / "run"
        directory.mkdir()
        unpack(files, directory)
        (directory / "cells").mkdir()
        for link, target in links.items():
            (directory / DATA).mkdir(exist_ok=True)
            (directory / DATA / link).symlink_to(target)
        with (
            open(Path(temporary) / "log", "w+") as log,
            subprocess.Popen(
                module_command("testbed.run.cluster_job", str(directory), *left),
                stdin=subprocess.PIPE,  # which ends with this process, and then the job does
                stdout=log,
                stderr=log,
            ) as process,
        ):
            try:
                while True:
                    ended = process.poll() is not None
                    for cell in [
                        cell for cell in left if _has_ended(directory / "cells" / cell, ended)
                    ]:
                        left.remove(cell)
                        finish_cell(directory / "cells" / cell)
                        arrivals.put((machine, cell, _packed(directory / "cells", [cell])))
                    if ended:
                        break
                    if (
                        key not in worker.state.tasks
                        or worker.state.tasks[key].state != "executing"
                    ):
                        raise RuntimeError("the sweep was ended")
                    time.sleep(_POLL_S)
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
                    process.wait()
            log.seek(0)
            said = [
                line.removeprefix("testbed: ").strip()
                for line in log
                if line.startswith("testbed: ")
            ]
    if not left:
        return ""
    return f"{machine}: {said[-1] if said else f'ended with exit code {process.returncode}'}"


def _has_ended(cell: Path, all_have: bool) -> bool:
    """One that failed is tried again after the others."""
    result = read_result(cell)
    return result is not None and (all_have or result.get("status") == "done")


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
