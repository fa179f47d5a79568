"""Wording of what is wrong with a spec: the place, the fault, the valid choices, the mend; one line
a fault."""

import difflib
from collections.abc import Iterable, Sequence

from testbed.protocol import one_line

_SHOWN = 5


class SpecError(ValueError):
    """Bad input (exit code 2). ``str()`` has one line for each error:
    ``file: place: error; fix``."""

    def __init__(self, errors: Sequence[tuple[str, str]], source: str = "") -> None:
        self.errors = list(errors)
        self.source = source
        lines = [
            ": ".join(part for part in (source, *error) if part) for error in self.errors[:_SHOWN]
        ]
        if len(self.errors) > _SHOWN:
            lines.append(f"{source}: and {len(self.errors) - _SHOWN} more errors")
        super().__init__("\n".join(one_line(line, 1000) for line in lines))

    def found_in(self, source: str) -> "SpecError":
        """The same errors, with the name of the file in front."""
        return SpecError(self.errors, source)


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """``did you mean 'x'? valid: …``, the nearest valid word first."""
    choices = list(valid)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = choices if len(choices) <= 20 else [*choices[:19], "…"]
    return f"{hint}valid: {', '.join(shown)}"


def place_of(path: Sequence[str | int]) -> str:
    """("schedule", 0, "set", "rate") → "schedule[0].set.rate"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
