"""The names under which usage may be billed once: functions of what is billed, never of time, try, chunk or worker.

An identity names one usage total for ever: site, source, subscription, component, price point, dimensions, period.
A uniqueness token names one revision of it. The quantity is in neither, so late data makes a correction with a token of
its own and never a second bill under the first.
"""

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

_SEPARATOR = "\x1f"


def identity(parts: Iterable[str]) -> str:
    """Return the 64 hexadecimal characters that stand for an identity's parts, given in their fixed order.

    Raises:
        ValueError: a part holds the unit separator, which would let two identities share a name.
    """
    fields = tuple(parts)
    if any(_SEPARATOR in field for field in fields):
        raise ValueError("an identity's parts cannot hold the control character U+001F")
    return sha256(_SEPARATOR.join(fields).encode()).hexdigest()


def uniqueness_token(identity: str, revision: int) -> str:
    """Return the token of one revision: 64 characters of ``[0-9a-f]``, as long as Maxio's events host allows."""
    return sha256(f"{identity}{_SEPARATOR}{revision}".encode()).hexdigest()


def event_tokens(site: str, source: str, stream: str, event_ids: Sequence[str]) -> list[str]:
    """Return the token of each event that is sent as such: 64 characters of ``[0-9a-f]``, for ever the same.

    The id stands last, so what it holds cannot make two events share a name.

    Raises:
        ValueError: another part holds the unit separator.
    """
    parts = (site, source, stream)
    if any(_SEPARATOR in part for part in parts):
        raise ValueError("the parts of an event's name cannot hold the control character U+001F")
    start = sha256(_SEPARATOR.join((*parts, "")).encode())
    return [_ended(start, event_id) for event_id in event_ids]


def _ended(start: Any, event_id: str) -> str:
    name = start.copy()
    name.update(event_id.encode())
    token: str = name.hexdigest()
    return token
