"""What the orchestrator and the agent of a node may say to each other: a JSON object a line, some
with bytes behind it.

Nothing is believed before it has one of these shapes. A path is relative to the run directory,
which each end has its own of.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from testbed.clock import MOST_DRIFT
from testbed.protocol import one_line

Number = Annotated[int, Field(ge=0, le=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _inside(path: str) -> str:
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError("leads out of the directory")
    return path


def _possible(clock: list[float]) -> list[float]:
    _, drift, _, unsure_s, unsure_drift = clock
    if abs(drift) > MOST_DRIFT or unsure_s < 0 or unsure_drift < 0:
        raise ValueError("no clock goes like that")
    return clock


RelativePath = Annotated[str, Field(max_length=4000), AfterValidator(_inside)]
_NAME = r"[^/\x00.][^/\x00]*"
_LOG_FILE = rf"^(?:(?:events|links|host|delayline)\.jsonl|logs/{_NAME}\.log|hosts/{_NAME}/{_NAME})$"
LogPath = Annotated[str, Field(pattern=_LOG_FILE, max_length=4000)]
"""In the directory of the cell: what an agent itself records, and where its programs write."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=128)]


class Message(BaseModel):
    """bytes: how many follow behind the line."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bytes: Annotated[int, Field(ge=0, le=1 << 20)] = 0


class Request(Message):
    """What is answered, by ``Answer`` or ``Refused`` with the same number."""

    request: Number


# Of an agent.


class Hello(Message):
    """The first message: which node this is."""

    type: Literal["hello"] = "hello"
    node: Name


class AskTime(Message):
    """What is your time? Some times a second, so that each end also knows that the other one
    lives."""

    type: Literal["ask_time"] = "ask_time"
    number: Number


class Status(Message):
    """Once a second. clock: the fields of ``testbed.clock.Clock``; none before the first answer.
    arrived: by link, the bytes that have come down. failure: why no records are written any
    more."""

    type: Literal["status"] = "status"
    clock: (
        Annotated[list[Finite], Field(min_length=5, max_length=5), AfterValidator(_possible)] | None
    ) = None
    arrived: dict[Name, Number] = Field(default_factory=dict)
    failure: str = Field("", max_length=2000)


class Answer(Message):
    """A request was fulfilled."""

    type: Literal["answer"] = "answer"
    request: Number
    result: dict[str, Any] = Field(default_factory=dict)


class Refused(Message):
    """A request was not."""

    type: Literal["refused"] = "refused"
    request: Number
    error: str = Field(max_length=2000)


class Exited(Message):
    """A program has ended; all that it wrote has been sent before. code: as in subprocess."""

    type: Literal["exited"] = "exited"
    number: Number
    code: int


class FileGrew(Message):
    """The bytes that come are new at the end of a file."""

    type: Literal["file_grew"] = "file_grew"
    path: LogPath


class Connected(Message):
    """A program has connected to the control socket."""

    type: Literal["connected"] = "connected"
    connection: Number


# Of both.


class Data(Message):
    """What came over a connection to the control socket."""

    type: Literal["data"] = "data"
    connection: Number


class Disconnected(Message):
    """A connection to the control socket has ended."""

    type: Literal["disconnected"] = "disconnected"
    connection: Number


# Of the orchestrator.


class Time(Message):
    """The orchestrator's CLOCK_MONOTONIC, in s."""

    type: Literal["time"] = "time"
    number: Number
    at_s: Finite


class MakeDirectories(Request):
    """Make a cell's directories, afresh, and its control socket. user: to whom what programs write
    in is given.

    cell: its directory. writable: those in which programs write.
    """

    type: Literal["make_directories"] = "make_directories"
    cell: RelativePath
    writable: list[RelativePath]
    user: tuple[Number, Number] | None = None


class AppendFile(Message):
    """Append the bytes that come to a file that programs read."""

    type: Literal["append_file"] = "append_file"
    path: RelativePath
    executable: bool = False


class OpenLab(Request):
    """Make this node's part of the lab. The bytes are its ``LabPlan``; details: by host, what the
    lab has to know of it."""

    type: Literal["open_lab"] = "open_lab"
    details: dict[Name, dict[str, Any]]


class Start(Message):
    """Start a program on a host."""

    type: Literal["start"] = "start"
    number: Number
    host: Name
    argv: list[str]
    env: dict[str, str]
    log: RelativePath


class Kill(Message):
    """End a program."""

    type: Literal["kill"] = "kill"
    number: Number


class ReadCounters(Request):
    """Read the counters of all links now."""

    type: Literal["read_counters"] = "read_counters"


class Timeline(Request):
    """The bytes are changes of links, as JSON; each such message continues the one before. last:
    records may begin. dilation: of the cell, by which ``AskLinks`` is understood."""

    type: Literal["timeline"] = "timeline"
    last: bool
    dilation: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class AskLinks(Request):
    """Change these links now as ``wanted`` says, a link of a spec, and tell of them; the body of a
    request to ``recording.link_server``."""

    type: Literal["ask_links"] = "ask_links"
    links: list[Name]
    wanted: dict[str, Any]


class Begin(Message):
    """t = 0 is at this time of the orchestrator: make the changes, and record."""

    type: Literal["begin"] = "begin"
    t0_s: Finite


class End(Request):
    """Make no more changes, end the records, and send what is left of them."""

    type: Literal["end"] = "end"


class Close(Request):
    """End all programs, send what they have left, and remove the node's part of the lab."""

    type: Literal["close"] = "close"


FromAgent = Annotated[
    Hello
    | AskTime
    | Status
    | Answer
    | Refused
    | Exited
    | FileGrew
    | Connected
    | Data
    | Disconnected,
    Field(discriminator="type"),
]
FromOrchestrator = Annotated[
    Time
    | MakeDirectories
    | AppendFile
    | OpenLab
    | Start
    | Kill
    | ReadCounters
    | Timeline
    | AskLinks
    | Begin
    | End
    | Close
    | Data
    | Disconnected,
    Field(discriminator="type"),
]
FROM_AGENT: TypeAdapter[FromAgent] = TypeAdapter(FromAgent)
FROM_ORCHESTRATOR: TypeAdapter[FromOrchestrator] = TypeAdapter(FromOrchestrator)


def parse(line: bytes, kind: TypeAdapter[Any]) -> Any:
    """A message of ``FROM_AGENT`` or ``FROM_ORCHESTRATOR``; raises ValueError, one line, if it is
    none."""
    try:
        return kind.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(one_line(f"{place + ': ' if place else ''}{first['msg']}")) from None
