"""From a validated spec to a finished run: check the machine, make the directory, run the cells,
write the results."""

import contextlib
import os
import subprocess
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from testbed import gpus
from testbed.children import module_command
from testbed.doctor import System
from testbed.files import no_room
from testbed.labs.base import LabError
from testbed.labs.cgroups import groups_of_run
from testbed.labs.netns import sandbox_command, why_it_failed
from testbed.links.kernel_support import missing_kinds, require_taps
from testbed.plan import Plan, make_plan
from testbed.run import directory as run_directory
from testbed.run.live_page import live_page
from testbed.run.machine import check_congestion, check_traffic
from testbed.run.sweep import (
    EXIT_DONE,
    EXIT_FAILED,
    execute,
    execute_in_sandbox,
    no_room_left,
    not_done,
)
from testbed.signals import (
    DOCKER_GRACE_S,
    EXIT_INTERRUPTED,
    interrupt_main_thread_once,
    interruptible,
)
from testbed.spec.load import load_spec
from testbed.spec.models import Spec

EXIT_INVALID = 3


@dataclass(frozen=True, slots=True)
class Cluster:
    """Machines to run the cells on (``run.cluster.execute_on``)."""

    address: str
    spread: bool = False

    def check(self) -> None:
        """Raise LabError, before anything is made, if no machine there would run a cell."""
        from testbed.run.cluster import connected

        with connected(self.address):
            pass

    def run(self, plan: Plan, directory: Path, console: Console, only: Collection[str]) -> int:
        """Returns the exit code, whatever the verdict of the cells. only: as in
        ``sweep.execute``."""
        from testbed.run.cluster import execute_on

        return execute_on(self.address, plan, directory, console, only, spread=self.spread)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run: ``quiet``, without progress; ``live``, with a page that shows it; ``on`` a
    cluster, or else this machine."""

    quiet: bool = False
    live: bool = False
    on: Cluster | None = None


_PLAIN = RunOptions()


def lacking_gpu(plan: Plan) -> str | None:
    """Why a plan that must have a GPU cannot have it on this machine, in its lab; None if nothing
    is missing."""
    if all(cell.lab.device != "cuda" for cell in plan.cells):
        return None
    names, daemon = gpus.found(), None
    if plan.lab == "docker" and names:
        from testbed.labs.docker import connect, docker_errors

        try:
            with docker_errors(), contextlib.closing(connect()) as client:
                daemon = client.info()
        except LabError as error:
            return str(error)
    return gpus.why_not("cuda", names, daemon)


def check_machine(plan: Plan) -> str:
    """Raise LabError, before anything is made, if this machine cannot run the plan; returns the
    engine that impairs links."""
    if error := lacking_gpu(plan):
        raise LabError(error)
    engine = "auto"
    for wanted in sorted(plan.engines or {"auto"}):
        chosen = choose_engine(plan.lab, wanted, plan.impaired, plan.qdiscs)
        engine = chosen if wanted == "auto" or len(plan.engines) == 1 else engine
    if plan.lab == "netns":
        with groups_of_run(plan.limits):
            pass
    # we make the routes
    check_congestion({cell.lab.tcp.congestion for cell in plan.cells}, privileged=True)
    check_traffic([flow for cell in plan.cells for flow in cell.flows], plan.lab)
    return engine


def choose_engine(lab: str, wanted: str, impaired: bool, qdiscs: Iterable[str]) -> str:
    """What makes delay, jitter and loss: "netem" where the kernel has it, else "userspace", unless
    one of them is wanted.

    Raises LabError if this machine's kernel lacks a kind of qdisc, or does not let us shape links
    with it.
    """
    if lab == "swarm":
        return wanted  # each node says what its kernel lacks when it is to make its links
    missing = _missing_kinds(
        lab, [*qdiscs, *(["netem"] if impaired and wanted != "userspace" else [])]
    )
    engine = wanted
    if wanted == "auto":
        engine = "userspace" if "netem" in missing else "netem"
    if engine == "netem" and "netem" in missing:
        raise LabError(
            "delay, jitter, loss and the like need the kernel's netem, which is missing; use"
            " network.engine: auto, do without them, or"
            f" {System.of_this_machine().load_module('sch_netem')}"
        )
    if engine == "userspace" and impaired:
        _check_taps(lab)
    if others := [kind for kind in missing if kind != "netem"]:
        raise LabError(
            f"this kernel has no {others[0]};"
            f" {System.of_this_machine().load_module(f'sch_{others[0]}')}"
        )
    return engine


def _missing_kinds(lab: str, needed: Sequence[str]) -> list[str]:
    if lab == "netns":
        return _run_in_sandbox("testbed.links.kernel_support", *needed).split()
    try:
        return missing_kinds(needed)
    except OSError as error:
        raise LabError(
            f"shaping containers needs rights that this process lacks ({error.strerror}); "
            "use: docker compose up experiment, or run testbed with sudo"
        ) from None


def _check_taps(lab: str) -> None:
    if lab == "netns":
        _run_in_sandbox("testbed.links.tap")
        return
    try:
        require_taps()
    except OSError as error:
        raise LabError(f"cannot make a delay line: {error}") from None


def _run_in_sandbox(module: str, *arguments: str) -> str:
    """What a module of checks prints inside private namespaces; raises LabError with its last
    words."""
    command = [*sandbox_command(), *module_command(module, *arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode != 0:
        raise LabError(f"cannot make a lab: {why_it_failed(done)}")
    return done.stdout


def start_run(
    spec: Spec,
    plan: Plan,
    out: Path,
    script_directory: Path,
    console: Console,
    options: RunOptions = _PLAIN,
) -> tuple[int, Path]:
    """Run a new experiment; returns the exit code and the run directory."""
    engine = "auto"
    if options.on:
        options.on.check()
    else:
        engine = check_machine(plan)
    # it is written down, and --resume goes on with the same
    if engine != "auto" and plan.impaired and len(plan.engines) == 1:
        spec = spec.model_copy(
            update={"network": spec.network.model_copy(update={"engine": engine})}
        )
    directory = run_directory.create(spec, out, script_directory)
    if (copied := run_directory.copied_script(directory)) and not options.quiet:
        console.print(f"copied into the run: {', '.join(copied)}", markup=False, soft_wrap=True)
    # Cells are called what they are called there, as when the run is gone on with.
    plan = make_plan(load_spec(directory / run_directory.SPEC_FILE), directory).with_engine(engine)
    with run_directory.run_lock(directory) as lock:
        return _run(plan, directory, lock, console, options), directory


def continue_run(
    plan: Plan,
    directory: Path,
    console: Console,
    options: RunOptions = _PLAIN,
    *,
    again: bool = False,
) -> int:
    """Run the cells that are not done, then write summary and report; returns the exit code.

    again: and those that are done, but not valid. Raises RunIsBusy if they are being run.
    """
    if options.on is None:
        plan = plan.with_engine(check_machine(plan))
    with run_directory.run_lock(directory) as lock:
        for line in run_directory.note_environment(directory) if options.on is None else ():
            console.print(
                f"the cells will not all be of one machine: {line}", markup=False, soft_wrap=True
            )
        return _run(
            plan, directory, lock, console, options, _not_valid(plan, directory) if again else ()
        )


def _not_valid(plan: Plan, directory: Path) -> list[str]:
    """The cells that are not done, or done and not valid."""
    from testbed.results.load import load_run
    from testbed.results.summary import summarize

    invalid = {
        cell["cell"] for cell in summarize(load_run(directory))["cells"] if not cell["valid"]
    }
    invalid.update(cell.name for cell in not_done(plan.cells, directory))
    return sorted(invalid)


def _run(
    plan: Plan,
    directory: Path,
    lock: int,
    console: Console,
    options: RunOptions,
    only: Collection[str] = (),
) -> int:
    # The results need pandas and plotly; they load while the cells run.
    threading.Thread(target=_load_results, daemon=True).start()
    try:
        with (
            # before the page: a group with processes in it cannot be divided
            groups_for(plan, options) as groups,
            (
                live_page(directory, console) if options.live else contextlib.nullcontext()
            ) as say_ended,
        ):
            if options.on:
                code = options.on.run(
                    plan, directory, Console(quiet=True) if options.quiet else console, only
                )
            else:
                code = run_cells(plan, directory, lock, console, groups, only, quiet=options.quiet)
            with interruptible():
                verdict = finish(directory, console, interrupted=code == EXIT_INTERRUPTED)
            if say_ended is not None and code != EXIT_INTERRUPTED:
                say_ended()
        return code or verdict
    finally:
        if error := run_directory.give_to_owner_of(directory.parent, directory):
            console.print(error, markup=False, soft_wrap=True)


def groups_for(
    plan: Plan, options: RunOptions = _PLAIN
) -> contextlib.AbstractContextManager[Mapping[str, Path]]:
    """The groups in which the netns lab limits its hosts, if it runs here
    (``labs.cgroups.groups_of_run``)."""
    return groups_of_run(plan.limits if plan.lab == "netns" and options.on is None else ())


def run_cells(
    plan: Plan,
    directory: Path,
    lock: int,
    console: Console,
    groups: Mapping[str, Path],
    only: Collection[str] = (),
    quiet: bool = False,
) -> int:
    """Run cells on this machine; returns the exit code, whatever their verdict.

    groups: from ``groups_for``. only: as in ``sweep.execute``.
    """
    if plan.lab == "netns":
        with _writing_to(Console(quiet=True) if quiet else console) as output:
            code = execute_in_sandbox(plan, directory, lock, only, output, groups)
        if code < 0:
            console.print(f"testbed: the lab was ended by signal {-code}", style="red")
            return EXIT_FAILED
        return code
    with interrupt_main_thread_once(DOCKER_GRACE_S) as (_, interrupted):
        try:
            execute(plan, directory, Console(quiet=True) if quiet else console, only)
        except (Exception, KeyboardInterrupt) as error:
            if interrupted.is_set():
                return EXIT_INTERRUPTED
            if not isinstance(error, run_directory.NoRoom):
                raise
            console.print(f"testbed: {error}", markup=False, soft_wrap=True)
            return EXIT_FAILED
    return EXIT_DONE


@contextlib.contextmanager
def _writing_to(console: Console) -> Iterator[int]:
    """A descriptor for a child: what it writes there comes out of a console."""
    if console.quiet:
        yield subprocess.DEVNULL
        return
    console.file.flush()  # what was said before comes first
    descriptor = None
    with contextlib.suppress(AttributeError, OSError):  # a notebook, or text in memory, has none
        descriptor = console.file.fileno()
    if descriptor is not None:
        yield descriptor
        return
    read, write = os.pipe()

    def pass_on() -> None:
        with open(read, errors="replace") as lines:
            for line in lines:
                console.file.write(line)

    reader = threading.Thread(target=pass_on)
    reader.start()
    try:
        yield write
    finally:
        os.close(write)
        reader.join()


def _load_results() -> None:
    import testbed.report.html
    import testbed.results.summary  # noqa: F401


def report_run(directory: Path, console: Console) -> int:
    """``finish`` a run that may be going on, whose records are then left to whoever runs it."""
    with interruptible(), contextlib.ExitStack() as stack:
        try:
            stack.enter_context(run_directory.run_lock(directory))
        except run_directory.RunIsBusy:
            return finish(directory, console, going_on=True)
        except OSError:
            pass  # nobody runs what cannot be written to
        return finish(directory, console)


def finish(
    directory: Path, console: Console, *, interrupted: bool = False, going_on: bool = False
) -> int:
    """Records → Parquet, summary, table, report; returns the exit code that the results deserve.

    going_on: the records stay as they are.
    """
    from testbed.protocol import cell_directories
    from testbed.report.html import write_report
    from testbed.report.terminal import terminal_table
    from testbed.results.load import load_run
    from testbed.results.records import finish_cell
    from testbed.results.summary import summarize, write_summary

    shown = Path(os.path.relpath(directory))
    summary: dict[str, Any] = {}
    try:
        # nothing if this is no run, which load_run then says
        for cell in cell_directories(directory):
            if not going_on:
                finish_cell(cell)
        run = load_run(directory)
        summary = summarize(run)
        write_summary(summary, directory)
        console.print(terminal_table(summary))
        if interrupted:
            console.print(
                f"interrupted; the records so far are in {shown}", markup=False, soft_wrap=True
            )
            return EXIT_INTERRUPTED
        write_report(run, directory / "report.html", summary)
    except OSError as error:
        if not no_room(error):
            raise
        if not summary:
            console.print(terminal_table(summarize(load_run(directory))))
        console.print(f"testbed: {no_room_left(directory)}", markup=False, soft_wrap=True)
        return EXIT_FAILED
    console.print(f"report: {shown / 'report.html'}", markup=False, soft_wrap=True)
    if any(status != "done" for status in run.cells["status"]):
        return EXIT_FAILED
    return EXIT_DONE if summary["valid"] else EXIT_INVALID
