"""Two values for each property, written
``{rate: [10mbit, 50mbit], up: {rate: [1mbit, 2mbit]}}``."""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, PlainSerializer
from pydantic_core import PydanticCustomError

from testbed.links.state import DIRECTIONS
from testbed.spec.models import LinkChange, empty, written_as
from testbed.timeline.field_types import check_continuous
from testbed.timeline.updates import PropertyKey, interpolate, values_of


class LinkChangePair(NamedTuple):
    """The same properties twice."""

    first: LinkChange
    second: LinkChange

    def pairs(self, trunk: bool) -> dict[PropertyKey, tuple[Any, Any]]:
        """The two values of each property."""
        first, second = (values_of(part, trunk) for part in self)
        return {key: (first[key], second[key]) for key in first}


def values_at(
    pairs: Mapping[PropertyKey, tuple[Any, Any]], fraction: float
) -> dict[PropertyKey, Any]:
    """The values at a fraction (0 to 1) of the way from the first to the second."""
    return {key: interpolate(first, second, fraction) for key, (first, second) in pairs.items()}


def parse_pair(value: Any) -> LinkChangePair:
    """A pair from the mapping of properties to pairs."""
    if isinstance(value, LinkChangePair):
        return value
    first, second = (LinkChange.model_validate(_half(value, position, ())) for position in (0, 1))
    if not values_of(first, trunk=True):
        raise PydanticCustomError(
            "pair", "changes nothing; name a property, for example rate: [10mbit, 50mbit]"
        )
    return LinkChangePair(first, second)


def _half(value: Any, position: int, path: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _half(part, position, (*path, key)) for key, part in value.items()}
    if not path:
        text = (
            "must be a mapping of properties to two values, for example {rate: [10mbit,"
            f" 50mbit]}}, not {value!r:.40}"
        )
        raise PydanticCustomError("pair", text)
    if not isinstance(value, list) or len(value) != 2:
        wrong = f"must be two values, for example [10mbit, 50mbit], not {value!r:.40}"
        text = empty("[10mbit, 50mbit]") if value is None else wrong
        raise PydanticCustomError("at_key", text, {"path": list(path)})
    return value[position]


def parse_continuous_pair(value: Any) -> LinkChangePair:
    """A pair for properties that have values in between."""
    pair = parse_pair(value)
    check_continuous(pair.first, instead="square")
    return pair


def _format_pair(pair: LinkChangePair) -> dict[str, Any]:
    first, second = (part.model_dump(mode="json", exclude_none=True) for part in pair)
    return _paired(first, second)


def _paired(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    # A direction is a mapping of pairs; all else that is a mapping, such as a loss, is a value.
    nested = {key for key in DIRECTIONS if isinstance(first.get(key), dict)}
    return {
        key: _paired(value, second[key]) if key in nested else [value, second[key]]
        for key, value in first.items()
    }


_AS_PAIRS = PlainSerializer(_format_pair, return_type=dict[str, Any])
AnyPair = Annotated[LinkChangePair, BeforeValidator(parse_pair), _AS_PAIRS, written_as("LinkPairs")]
ContinuousPair = Annotated[
    LinkChangePair,
    BeforeValidator(parse_continuous_pair),
    _AS_PAIRS,
    written_as("GradualLinkPairs"),
]
