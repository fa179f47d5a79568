"""The command ``testbed``: parse, call, print. Exit codes: 0 done and valid; 1 a run failed; 2 bad
input, nothing was touched; 3 done, but not valid; 4 this machine cannot do it; 130 interrupted.

What a command needs is imported in it: shells call this at each press of the tab key."""

import errno
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from testbed.files import exists, explained, is_directory

if TYPE_CHECKING:
    from rich.console import RenderableType

    from testbed.plan import Plan
    from testbed.results.load import Run
    from testbed.results.run_comparison import MethodComparison
    from testbed.spec.models import Spec

T = TypeVar("T")

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INVALID, EXIT_CANNOT, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

app = typer.Typer(
    help=(
        "Distributed training over links that the kernel shapes: run it, measure it, see who wins."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class LabKind(StrEnum):
    """Where the workers run."""

    NETNS = "netns"
    DOCKER = "docker"
    SWARM = "swarm"


class Engine(StrEnum):
    """What makes delay, jitter and loss."""

    AUTO = "auto"
    NETEM = "netem"
    USERSPACE = "userspace"


def _paths(incomplete: str, keep: Callable[[Path], bool]) -> list[str]:
    """Paths that begin like this, directories with their slash; hidden ones only if asked for."""
    given, start = os.path.split(incomplete)
    try:
        found = sorted(Path(given or ".").iterdir())
    except OSError:
        return []
    shown = [
        path
        for path in found
        if path.name.startswith(start) and (start or not path.name.startswith("."))
    ]
    folders = {path for path in shown if is_directory(path)}
    names = [
        os.path.join(given, path.name) + "/" * (path in folders)  # noqa: PTH118
        for path in shown
        if path in folders or keep(path)
    ]
    # Shells put a space behind the only choice, which nobody wants behind a directory that goes on.
    return (
        (_paths(names[0], keep) or names) if len(names) == 1 and names[0].endswith("/") else names
    )


def _specs(incomplete: str) -> list[str]:
    return _paths(incomplete, lambda path: path.suffix in (".yaml", ".yml"))


def _directories(incomplete: str) -> list[str]:
    return _paths(incomplete, lambda _: False)


def _run_directories(incomplete: str) -> list[str]:
    """Those of ./runs without that folder having been typed; otherwise any directory."""
    return _directories(incomplete if incomplete else "runs/") or _directories(incomplete)


def _examples(incomplete: str) -> list[str]:
    """Like ``testbed.examples.examples``, from the names of the files alone."""
    package = Path(__file__).parent
    folder = next(
        (one for one in (package / "experiments", package.parent / "experiments") if one.is_dir()),
        package,
    )
    names = [
        str(path.relative_to(folder).with_suffix("")) for path in sorted(folder.rglob("*.yaml"))
    ]
    return [
        name
        for name in [*names, "all"]
        if name.startswith(incomplete) and not name.startswith(("bench/", "data/"))
    ]


_WIDE = 1 << 12
DEFAULT_SPEC = Path("experiment.yaml")
RUNS = Path("runs")
SpecPath = Annotated[
    Path | None,
    typer.Argument(
        help="The experiment, a YAML file; experiment.yaml if left out, which testbed init writes.",
        autocompletion=_specs,
    ),
]
RunPath = Annotated[Path, typer.Argument(help="A run directory.", autocompletion=_run_directories)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a value of the spec, e.g. workers=8. Repeatable.",
    ),
]
LiveRun = Annotated[
    Path | None,
    typer.Option(
        help="The run directory; the newest live run in ./runs if left out.",
        autocompletion=_run_directories,
    ),
]
LabOption = Annotated[
    LabKind | None, typer.Option("--lab", help="Where the workers run; overrides the spec.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


@app.command()
def run(
    spec: SpecPath = None,
    lab: LabOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory in which the run directory is made; runs if left out.",
            autocompletion=_directories,
        ),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with this run directory instead of a new run.",
            autocompletion=_run_directories,
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option("--again", help="With --resume: run the cells that are not valid again, too."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print hosts, timeline and tc commands; do nothing.")
    ] = False,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="ADDRESS",
            help="Run the cells on a Dask cluster: tcp://host:8786 or local:N.",
        ),
    ] = None,
    spread: Annotated[
        bool,
        typer.Option("--spread", help="With --on: methods need not be compared on one machine."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the result only, without progress.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the summary as JSON; all else goes to standard error."),
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Show it as a web page meanwhile, on this machine only.")
    ] = False,
) -> None:
    """Run an experiment and say who won."""
    from rich.console import Console

    from testbed.plan import describe
    from testbed.run.directory import SPEC_FILE
    from testbed.run.start import Cluster, RunOptions, continue_run, start_run

    if on is not None and not re.fullmatch(r"local:[1-9][0-9]?|(tcp|tls|ucx|ws|wss)://\S+", on):
        _fail(
            f"--on: {on!r} is no address of a Dask scheduler; write one like tcp://host:8786, or"
            " local:3",
            EXIT_BAD_INPUT,
        )
    if spread and on is None:
        _fail("--spread goes with --on; one machine runs every cell by itself", EXIT_BAD_INPUT)
    options = RunOptions(quiet=quiet, live=live, on=None if on is None else Cluster(on, spread))

    console = Console(stderr=as_json)
    if resume is not None:
        if spec is not None or overrides or lab is not None or dry_run or out is not None:
            what = "SPEC nor --set, --lab, --out, --dry-run"
            if spec is not None and exists(spec / SPEC_FILE):
                _fail(
                    f"--resume goes on with one run directory, not with two: {resume} and {spec}",
                    EXIT_BAD_INPUT,
                )
            _fail(
                "--resume takes the spec of the run directory and goes on in it; give neither"
                f" {what}",
                EXIT_BAD_INPUT,
            )
        if not exists(resume / SPEC_FILE):
            _fail(
                f"{resume}: is no run directory; run directories lie in runs, unless --out said"
                " otherwise",
                EXIT_BAD_INPUT,
            )
        directory = resume
        loaded, plan = _plan(resume / SPEC_FILE, [], None)
        code = _guarded(lambda: continue_run(plan, resume, console, options, again=again))
    else:
        if again:
            _fail("--again goes with --resume; a new run runs every cell", EXIT_BAD_INPUT)
        path = _spec_or_default(spec, "run")
        loaded, plan = _plan(path, overrides, lab)
        if dry_run:
            typer.echo("\n".join(describe(plan)))
            return
        folder = path.parent.resolve()
        code, directory = _guarded(
            lambda: start_run(loaded, plan, out or RUNS, folder, console, options)
        )
    if as_json:
        _print_summary(directory)
    raise typer.Exit(code)


def _spec_or_default(spec: Path | None, command: str) -> Path:
    if spec is None and not exists(DEFAULT_SPEC):
        example = f"testbed {command} experiments/smoke.yaml"
        _fail(
            f"SPEC is missing; name a YAML file, for example: {example}, or make one with: testbed"
            " init",
            EXIT_BAD_INPUT,
        )
    return spec or DEFAULT_SPEC


def _print_summary(directory: Path) -> None:
    from testbed.files import read_json
    from testbed.results.load import SUMMARY_FILE

    summary = read_json(directory / SUMMARY_FILE)
    if summary is not None:
        _print_json({"directory": str(directory), **summary})


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print(what: "RenderableType", *, wide: bool = False) -> None:
    """wide: what is read by another program, or goes to a file, has lines as long as they are."""
    from rich.console import Console

    console = Console()
    (Console(width=_WIDE) if wide and not console.is_terminal else console).print(what)


@app.command()
def init(
    name: Annotated[
        str, typer.Argument(help="The name of the experiment; the file is called NAME.yaml.")
    ] = DEFAULT_SPEC.stem,
) -> None:
    """Write a commented spec to begin with, and beside it the schema by which editors complete and
    check it."""
    from testbed.examples import SCHEMA_NAME, write_starter

    path = _written(lambda: write_starter(name))
    spec = "" if path == DEFAULT_SPEC else f" {shlex.quote(str(path))}"
    typer.echo(
        f"{path}: a spec that runs as it is; {path.with_name(SCHEMA_NAME)}: what your editor checks"
        " it by"
    )
    typer.echo(f"next: testbed run{spec}")


@app.command()
def examples(
    name: Annotated[
        str | None,
        typer.Argument(
            help="The one to copy, or all; they are listed if left out.", autocompletion=_examples
        ),
    ] = None,
    destination: Annotated[
        Path, typer.Argument(help="The directory to copy to.", autocompletion=_directories)
    ] = Path("experiments"),
    as_json: AsJson = False,
) -> None:
    """List the experiments that are shipped, or copy one with the files it needs."""
    from testbed.examples import command, copy_examples
    from testbed.examples import examples as shipped

    if name is None:
        found = shipped()
        if as_json:
            _print_json([{"name": key, "about": about} for key, about in found.items()])
        else:
            width = max(map(len, found), default=0)
            short = {
                key: textwrap.shorten(about, 118 - width, placeholder=" …")
                for key, about in found.items()
            }
            lines = (f"{key:<{width}}  {about}" for key, about in short.items())
            typer.echo("\n".join(lines))
        return
    specs = _written(lambda: copy_examples(name, destination))
    if as_json:
        _print_json([str(path) for path in specs])
    else:
        typer.echo("\n".join([*map(str, specs), f"next: {command(specs[0])}"]))


def _written(write: Callable[[], T]) -> T:
    """What writes files of the user's: refused where others lie, or one line where they cannot be
    written."""
    from testbed.examples import Refused

    def checked() -> T:
        try:
            return write()
        except Refused as error:
            _fail(str(error), EXIT_BAD_INPUT)

    return _guarded(checked)


@app.command()
def validate(spec: SpecPath = None, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Check a spec without running anything."""
    from testbed.run.start import lacking_gpu

    path = _spec_or_default(spec, "validate")
    loaded, plan = _plan(path, overrides, None, as_json=as_json)
    workers = len(plan.cells[0].workers)
    lacking = lacking_gpu(plan)
    if as_json:
        cells = [cell.name for cell in plan.cells]
        found = {
            "spec": str(path),
            "name": loaded.name,
            "lab": plan.lab,
            "workers": workers,
            "cells": cells,
            "errors": [],
        }
        _print_json({**found, "lacking": lacking})
        return
    cells_ = f"{len(plan.cells)} {'cell' if len(plan.cells) == 1 else 'cells'}"
    typer.echo(f"{path}: good; {cells_}, {workers} workers, lab {plan.lab}")
    if lacking:
        typer.echo(f"but it cannot run here: {lacking}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a spec, from which editors complete and check."""
    from netsenseml.catalog import registered_methods
    from testbed.spec.schema import schema_text

    typer.echo(schema_text(registered_methods()), nl=False)


@app.command()
def runs(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="[DIR]", help="Where run directories lie.", autocompletion=_directories
        ),
    ] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List run directories, the newest first: when, verdict, headline."""
    from dataclasses import asdict

    from testbed.results.load import NotARun
    from testbed.run.listing import is_run, list_runs, runs_table

    if is_run(folder):
        _fail(
            f"{folder}: is one run directory; show it with: testbed show {folder}", EXIT_BAD_INPUT
        )
    try:
        found = list_runs(folder) if folder != RUNS or exists(folder) else []
    except NotARun as error:
        _fail(f"{error}; run directories lie in runs, unless --out said otherwise", EXIT_BAD_INPUT)
    if as_json:
        _print_json([{**asdict(run), "began": run.began.isoformat()} for run in found])
    elif found:
        _print(runs_table(found), wide=True)
    else:
        typer.echo(f"{folder}: there is no run in it; start one with: testbed run SPEC", err=True)


@app.command()
def show(directory: RunPath, as_json: AsJson = False) -> None:
    """Print the summary of a run, also of one that goes on or was killed; writes nothing."""
    from testbed.report.terminal import terminal_table
    from testbed.results.load import NotARun, load_run
    from testbed.results.summary import summarize

    def read() -> dict[str, Any]:
        try:
            return summarize(load_run(directory))
        except (NotARun, ValueError) as error:
            _fail(str(error), EXIT_BAD_INPUT)

    summary = _guarded(read)
    if as_json:
        _print_json({"directory": str(directory), **summary})
    else:
        _print(terminal_table(summary))


@app.command()
def report(
    directory: RunPath,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            help="Also write TensorBoard event files, a directory a cell.",
            autocompletion=_directories,
        ),
    ] = None,
) -> None:
    """Write summary and report of a run again, for example of one that was killed."""
    from rich.console import Console

    from testbed.results.load import NotARun, load_run, require_run
    from testbed.run.start import report_run

    def write() -> int:
        write_events = _event_writer() if tensorboard is not None else None
        try:
            require_run(directory)
            if tensorboard is not None:
                try:
                    tensorboard.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    _fail(
                        f"--tensorboard: {error.filename or tensorboard}:"
                        f" {error.strerror or error}",
                        EXIT_BAD_INPUT,
                    )
            code = report_run(directory, Console())
            if write_events is not None and tensorboard is not None:
                write_events(load_run(directory), tensorboard)
        except (NotARun, ValueError) as error:
            _fail(str(error), EXIT_BAD_INPUT)
        return code

    raise typer.Exit(_guarded(write))


def _event_writer() -> "Callable[[Run, Path], None]":
    if importlib.util.find_spec("tensorboardX") is None:
        _fail(
            "--tensorboard needs tensorboardX; install it with: pip install tensorboardX",
            EXIT_CANNOT,
        )
    from testbed.report.tensorboard import write_events

    return write_events


@app.command()
def compare(
    before: Annotated[
        Path,
        typer.Argument(
            help="A run directory, for example of the main branch.", autocompletion=_run_directories
        ),
    ],
    after: Annotated[
        Path, typer.Argument(help="Another run of the same spec.", autocompletion=_run_directories)
    ],
    tolerance: Annotated[str, typer.Option(help="By so much a step may take longer.")] = "5%",
    as_json: AsJson = False,
) -> None:
    """Say what became slower or faster from one run to another; exit code 1 if something became
    slower or is missing."""
    from dataclasses import asdict

    from testbed.report.terminal import run_comparison_table
    from testbed.results.load import NotARun, load_run
    from testbed.results.run_comparison import compare_runs, differing_keys
    from testbed.spec.units import parse_share

    def read() -> "tuple[list[str], list[MethodComparison]]":
        try:
            runs = load_run(before), load_run(after)
            return differing_keys(*runs), compare_runs(*runs, parse_share(tolerance))
        except (NotARun, ValueError) as error:
            _fail(str(error), EXIT_BAD_INPUT)

    keys, found = _guarded(read)
    if not found:
        _fail(f"{before}: has no cell that could be compared", EXIT_BAD_INPUT)
    if as_json:
        _print_json([asdict(difference) for difference in found])
    else:
        _print(run_comparison_table(found))
    if keys:
        typer.echo(
            f"The specs differ in {', '.join(keys)}: this compares two experiments.", err=True
        )
    if any(difference.verdict in ("slower", "missing") for difference in found):
        raise typer.Exit(EXIT_FAILED)
    raise typer.Exit(0 if all(difference.valid for difference in found) else EXIT_INVALID)


@app.command()
def link(
    links: Annotated[
        list[str] | None, typer.Argument(help="Links to show or change, such as w0; all if none.")
    ] = None,
    run: LiveRun = None,
    changes: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a property, e.g. rate=5mbit, up.rate=1mbit, up=false.",
        ),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show the links of a live run, or change one by hand; the change enters the event log as
    manual."""
    from testbed.links.state import DIRECTIONS
    from testbed.protocol import one_line
    from testbed.recording.link_server import ask, stranger
    from testbed.report.terminal import links_table
    from testbed.spec.errors import SpecError
    from testbed.spec.load import parse_link, with_text

    wanted: dict[str, Any] = {}
    try:
        for text in changes:
            wanted = with_text(wanted, text)
        parse_link(wanted)
    except SpecError as error:
        _fail(str(error), EXIT_BAD_INPUT)
    cell = _live_cell(run)

    def answered() -> "tuple[Mapping[str, Any], RenderableType]":
        try:
            found = ask(cell, {"links": links or [], "set": wanted}, "links")
        except ValueError as error:
            _fail(str(error), EXIT_BAD_INPUT)
        try:
            if not all(
                isinstance(link[way]["drops"], int) for link in found.values() for way in DIRECTIONS
            ):
                raise TypeError
            return found, links_table({one_line(name): link for name, link in found.items()})
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            raise stranger(cell) from None

    found, table = _guarded(answered)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _print(table)


@app.command()
def watch(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    address: Annotated[
        str, typer.Option(help="The IP address of this machine to serve it at.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 0,
) -> None:
    """Show a run under way as a web page that can move its links, or the report of one that has
    ended, until Ctrl-C."""
    from testbed.live.server import CannotServe
    from testbed.live.watch import watch as serve

    def until_interrupted() -> None:
        try:
            serve(directory, address, port, typer.echo)
        except (CannotServe, ValueError) as error:
            _fail(str(error), EXIT_BAD_INPUT)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None

    _guarded(until_interrupted)


@app.command(name="exec")
def execute(
    host: Annotated[str, typer.Argument(help="A host of a live run, such as w0.")],
    argv: Annotated[
        list[str],
        typer.Argument(metavar="-- PROGRAM [ARG]...", help="Names of hosts become addresses."),
    ],
    run: LiveRun = None,
) -> None:
    """Run a program on a host of a live run, such as: testbed exec w0 -- ping -c 3 w1. Returns its
    exit code."""
    from testbed.enter import on_host

    cell = _live_cell(run)
    _become(lambda: on_host(cell, host, argv))


@app.command()
def capture(
    host: Annotated[str, typer.Argument(help="A host of a live run, such as w0.")],
    run: LiveRun = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write, HOST.pcap if left out.")
    ] = None,
) -> None:
    """Write what passes a host's interface in a live run to a file for tcpdump or Wireshark, until
    Ctrl-C or the cell's end."""
    from testbed.enter import capture as command

    cell = _live_cell(run)
    _become(lambda: command(cell, host, out or Path(f"{host}.pcap")))


def _live_cell(run: Path | None) -> Path:
    from testbed.recording.link_server import live_cell
    from testbed.run.directory import is_being_run

    def find() -> Path:
        named = [run] if run else RUNS.iterdir() if is_directory(RUNS) else []
        refused: PermissionError | None = None
        for path in sorted(filter(is_directory, named), key=_modified_s, reverse=True):
            try:
                if cell := live_cell(path):
                    return cell
            except PermissionError as error:  # also of a socket that a dead run has left
                listens = error.errno == errno.EPERM
                refused = refused or (error if listens or is_being_run(path) else None)
        if refused:
            _fail(explained(refused), EXIT_CANNOT)
        _fail(
            f"no cell is running in {run or RUNS}; start one with: testbed run SPEC", EXIT_BAD_INPUT
        )

    return _guarded(find)


def _modified_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it has just been removed
        return 0.0


def _become(command: Callable[[], list[str]]) -> NoReturn:
    """Let a command take the place of this process; what it needs may be missing, and the host may
    not exist."""

    def checked() -> list[str]:
        try:
            return command()
        except ValueError as error:
            _fail(str(error), EXIT_BAD_INPUT)

    argv = _guarded(checked)
    if shutil.which(argv[0]) is None:
        _fail(f"the program {argv[0]} is missing", EXIT_CANNOT)
    os.execvp(argv[0], argv)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what this machine can do, and what mends what it cannot."""
    from rich.console import Console

    from testbed.doctor import examine
    from testbed.report.terminal import doctor_table

    findings = examine()
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        Console().print(doctor_table(findings), soft_wrap=True)
    raise typer.Exit(0 if any(findings["labs"].values()) else EXIT_CANNOT)


@app.command()
def calibrate(
    rates: Annotated[
        list[str], typer.Option("--rate", help="A rate to measure, e.g. 37mbit. Repeatable.")
    ] = ["100mbit"],  # noqa: B006
    delay: Annotated[str, typer.Option(help="One-way delay, e.g. 10ms.")] = "0ms",
    loss: Annotated[str, typer.Option(help="Share of packets lost on their way, e.g. 1%.")] = "0%",
    burst: Annotated[
        float | None, typer.Option(help="Packets are lost in bursts of this mean length.", min=1)
    ] = None,
    jitter: Annotated[
        str, typer.Option(help="Standard deviation of the delay, at most a quarter of it.")
    ] = "0ms",
    lab: Annotated[LabKind, typer.Option("--lab", help="Where the hosts run.")] = LabKind.NETNS,
    engine: Annotated[
        Engine, typer.Option("--engine", help="What makes delay, jitter and loss.")
    ] = Engine.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure on a scratch lab whether links do what they are set to: goodput, RTT, jitter,
    loss."""
    from dataclasses import replace

    from rich.console import Console

    from testbed.calibrate import Conditions
    from testbed.calibrate import calibrate as measure
    from testbed.report.terminal import calibration_table
    from testbed.run.start import choose_engine
    from testbed.spec.units import parse_rate, parse_share, parse_time

    if lab is LabKind.SWARM:
        _fail(
            "--lab swarm: its cells measure their links themselves; here use netns or docker",
            EXIT_BAD_INPUT,
        )
    try:
        conditions = Conditions(
            tuple(map(parse_rate, rates)),
            parse_time(delay),
            parse_time(jitter),
            parse_share(loss),
            burst,
        )
    except ValueError as error:
        _fail(str(error), EXIT_BAD_INPUT)
    if burst is not None and not 0 < conditions.loss <= burst * (1 - conditions.loss):
        _fail(
            "burst needs a loss, and one that bursts of this mean length can make up; make it"
            " longer",
            EXIT_BAD_INPUT,
        )
    if conditions.jitter_s * 4 > conditions.delay_s:
        _fail(
            "jitter must be at most a quarter of the delay: no packet can come before it is sent",
            EXIT_BAD_INPUT,
        )
    chosen = _guarded(
        lambda: choose_engine(lab.value, engine.value, conditions.impaired, ["htb", "tbf"])
    )
    conditions = replace(conditions, engine=chosen)
    console = Console(stderr=as_json)
    with console.status("making the lab", refresh_per_second=2) as status:
        result = _guarded(lambda: measure(conditions, lab.value, status.update))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        console.print(calibration_table(result))
    raise typer.Exit(0 if result["valid"] else EXIT_INVALID)


@app.command()
def clean(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be removed.")
    ] = False,
) -> None:
    """Remove what killed runs left behind: containers and networks of Docker, whatever they left
    all over a swarm, and control groups of workers with limits. Rootless labs leave nothing
    else."""
    from testbed.labs.cgroups import clean as clean_groups
    from testbed.labs.docker import clean as clean_docker
    from testbed.labs.swarm import clean as clean_swarm

    verb = "would remove" if dry_run else "removed"
    groups = _guarded(lambda: clean_groups(dry_run))
    for name in groups:  # whether there is a Docker daemon or not
        typer.echo(f"{verb} {name}")
    removed, left = _guarded(lambda: clean_docker(dry_run))
    removed_of_swarm, left_of_swarm = _guarded(lambda: clean_swarm(dry_run))
    removed, left = [*removed, *removed_of_swarm], {**left, **left_of_swarm}
    for name in removed:
        typer.echo(f"{verb} {name}")
    if left:
        what = "; ".join(f"{name} ({why})" for name, why in left.items())
        _fail(f"Docker could not remove {what}; end what uses it, then: testbed clean", EXIT_FAILED)
    if not removed:
        typer.echo("nothing else to remove" if groups else "nothing to remove")


def _plan(
    path: Path, overrides: list[str], lab: LabKind | None, *, as_json: bool = False
) -> "tuple[Spec, Plan]":
    from testbed.plan import load_plan
    from testbed.spec.errors import SpecError

    try:
        return load_plan(path, [*overrides, *([f"lab={lab.value}"] if lab else [])])
    except SpecError as error:
        if as_json:
            _print_json(
                {
                    "spec": str(path),
                    "errors": [{"place": place, "text": text} for place, text in error.errors],
                }
            )
        _fail(str(error), EXIT_BAD_INPUT)


def _guarded(call: Callable[[], T]) -> T:
    from testbed.labs.base import HostFailed, LabError
    from testbed.run.directory import NoPlace, RunIsBusy

    try:
        return call()
    except LabError as error:
        _fail(str(error), EXIT_CANNOT)
    except HostFailed as error:
        _fail(str(error), EXIT_FAILED)
    except (RunIsBusy, NoPlace) as error:
        _fail(str(error), EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except ValueError as error:  # a run directory that is damaged
        _fail(str(error), EXIT_FAILED)
    except OSError as error:
        _fail(explained(error), EXIT_FAILED)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(message if code == EXIT_BAD_INPUT else f"testbed: {message}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the console script."""
    # The name of a file may be no text in any encoding; standard error writes it so in any case.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app(prog_name="testbed")  # also where it is started as a module: completion goes by the name


if __name__ == "__main__":
    main()
