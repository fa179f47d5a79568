"""What workers and programs of traffic may say on the control socket; ``testbed.protocol`` says
what it means.

They run code of others, so nothing that they send is believed before it has one of these shapes.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from testbed.protocol import one_line

Steps = Annotated[int, Field(ge=0, le=2**53)]
"""A number of steps that a float holds exactly."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Hello(_Message):
    """The first message of a connection: whose it is."""

    type: Literal["hello"]
    token: str = Field(max_length=64)


class Ready(_Message):
    """Ready to start. parameters: hash of the model's, equal on all ranks; a program of traffic has
    none."""

    type: Literal["ready"]
    pid: Annotated[int, Field(ge=1, le=2**22)] | None = None
    parameters: str = Field("", max_length=128)


class Heartbeat(_Message):
    """step: the step now in work."""

    type: Literal["heartbeat"]
    step: Steps


class Holding(_Message):
    """The answer to ``hold``. step: the step now in work."""

    type: Literal["holding"]
    step: Steps


class Evaluated(_Message):
    """An evaluation (``protocol.EVAL_COLUMNS``)."""

    type: Literal["eval"]
    step: Steps
    t_s: float
    accuracy: float
    loss: float


class Done(_Message):
    """All steps are done; the process still has to end."""

    type: Literal["done"]
    steps: Steps
    parameters: str = Field(max_length=128)
    accuracy: float | None
    loss: float | None


class Failed(_Message):
    """This rank cannot go on. by_peer: because another one failed."""

    type: Literal["failed"]
    error: str = Field(max_length=1 << 16)
    by_peer: bool = False


class Where(_Message):
    """The answer to ``where``. at: what the main thread is doing."""

    type: Literal["where"]
    at: str = Field(max_length=1000)


Message = Annotated[
    Hello | Ready | Heartbeat | Holding | Evaluated | Done | Failed | Where,
    Field(discriminator="type"),
]
_MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)


def parse_message(content: dict[str, Any]) -> Message:
    """Raises ValueError, one line that says what is wrong, if it is none of them."""
    try:
        return _MESSAGE.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        raise ValueError(
            one_line(
                f"type {content.get('type')!r:.40}: {place + ': ' if place else ''}{first['msg']}"
            )
        ) from None
