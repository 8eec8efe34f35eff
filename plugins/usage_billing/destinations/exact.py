"""JSON with every digit: what a site says, and what it is told. A float has lost some before anybody could look."""

import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from usage_billing.errors import Misconfigured


def exact_json(text: str | bytes) -> Any:
    """Return what a JSON text says, its numbers with every digit.

    Raises:
        ValueError: it is no JSON; ``NaN`` and infinities are none, nor is what is nested without end.
    """
    try:
        return json.loads(text, parse_float=Decimal, parse_constant=_no_number)
    except (InvalidOperation, RecursionError) as error:
        raise ValueError(f"no JSON: {type(error).__name__}") from None


def exact_number(value: object) -> Decimal | None:
    """Return a number that a site gave as number or as text, or None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | Decimal | str):
        return None
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def exact_text(value: object) -> str:
    """Return a value as JSON, a `Decimal` as a number with every digit.

    Raises:
        ValueError: it holds a number that is not exact or not finite, or what JSON has no form for.
    """
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{json.dumps(str(name))}:{exact_text(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(exact_text, value)) + "]"
    if not _is_exact(value):
        raise ValueError(f"no JSON: {value!r} is no exact number")
    return f"{value:f}" if isinstance(value, Decimal) else json.dumps(value)


def check(subject: str, values: Mapping[str, Any], faults: Sequence[str] = ()) -> None:
    """Do nothing if `exact_text` can write `values`, and there are no `faults`.

    Raises:
        Misconfigured: names the subject, the faults, and each value that is not exact with its place; all at once.
    """
    if found := [*faults, *(_inexact(place, value) for place, value in _leaves("", values) if not _is_exact(value))]:
        raise Misconfigured.all_at_once(subject, found)


def _leaves(place: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield every value that holds no others, with where it stands."""
    if isinstance(value, Mapping):
        steps = [(f"{place}.{name}".removeprefix("."), inner) for name, inner in value.items()]
    elif isinstance(value, list | tuple):
        steps = [(f"{place}[{number}]", inner) for number, inner in enumerate(value)]
    else:
        yield place, value
        return
    for step, inner in steps:
        yield from _leaves(step, inner)


def quantity_faults(name: str, value: object) -> list[str]:
    """Return what is wrong with a quantity, which is an exact number and nothing else."""
    sound = _is_exact(value) and not isinstance(value, bool | str | None)
    return [] if sound else [_inexact(name, value)]


def _is_exact(value: object) -> bool:
    return value is None or (value.is_finite() if isinstance(value, Decimal) else isinstance(value, bool | int | str))


def _inexact(place: str, value: object) -> str:
    return f"{place}: {value!r} is no exact number; give a whole number or a Decimal"


def _no_number(name: str) -> None:
    raise ValueError(f"no JSON: {name}")
