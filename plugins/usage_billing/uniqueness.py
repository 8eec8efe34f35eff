"""The names under which usage may be billed once: functions of what is billed, never of time, try, chunk or worker.

An identity names one usage total for ever: site, source, subscription, component, price point, dimensions, period.
A uniqueness token names one revision of it. The quantity is in neither, so late data makes a correction with a token of
its own and never a second bill under the first.
"""

from collections.abc import Iterable
from hashlib import sha256

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
