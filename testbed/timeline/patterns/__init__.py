"""What an entry of a schedule can be. A new pattern of links is one file here and one line in
``PATTERNS``."""

from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

from testbed.spec.errors import did_you_mean
from testbed.spec.models import Entry, ScheduleEntry
from testbed.timeline.patterns.ramp import Ramp
from testbed.timeline.patterns.sawtooth import Sawtooth
from testbed.timeline.patterns.square import Square
from testbed.timeline.patterns.step import Step
from testbed.timeline.patterns.trace import Trace
from testbed.timeline.patterns.walk import Walk
from testbed.timeline.workers import WORKER_ENTRIES

PATTERNS: Mapping[str, type[ScheduleEntry]] = {
    "set": Step,
    "ramp": Ramp,
    "sawtooth": Sawtooth,
    "square": Square,
    "walk": Walk,
    "trace": Trace,
}
"""By the key that tells an entry's pattern."""
ENTRIES: Mapping[str, type[Entry]] = {**PATTERNS, **WORKER_ENTRIES}
"""All entries of a schedule."""


def parse_entry(raw: object) -> Entry:
    """The entry whose key it has; raises pydantic's errors."""
    if isinstance(raw, Entry):
        return raw
    if not isinstance(raw, dict):
        text = f"must be a mapping, for example {{at: 5s, set: {{rate: 10mbit}}}}, not {raw!r:.40}"
        raise PydanticCustomError("entry", text)
    owners: dict[str, list[str]] = {}
    for name, entry in ENTRIES.items():
        for key in _keys(entry):
            owners.setdefault(key, []).append(name)
    for key in raw:
        if key not in owners:
            _refuse(key, f"unknown key; {did_you_mean(str(key), owners)}")
    given = [name for name in ENTRIES if name in raw]
    if len(given) != 1:
        *others, last = ENTRIES
        text = (
            f"needs exactly one of {', '.join(others)} and {last}, for example set: {{rate:"
            " 10mbit}"
        )
        raise PydanticCustomError("entry", text)
    chosen = given[0]
    for key in raw:
        if chosen not in owners[key]:
            owner = owners[key][0]
            _refuse(
                key,
                f"belongs to a {' or a '.join(owners[key])}; remove it, or write {owner} instead of"
                f" {chosen}",
            )
    for key, field in _keys(ENTRIES[chosen]).items():
        if field.is_required() and key not in raw:
            example = f"; for example {key}: {field.examples[0]}" if field.examples else ""
            _refuse(key, f"is missing{example}")
    return ENTRIES[chosen].model_validate(raw)


def _keys(entry: type[Entry]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in entry.model_fields.items()}


def _refuse(key: str, text: str) -> None:
    raise PydanticCustomError("at_key", text, {"path": [key]})
