"""Chance that can be told again: every draw hangs on the seed and on its own name, on nothing that was drawn before.

So one disturbance can be taken out of a history, and all others still strike where they struck: that is what shrinking
needs, and a row of random numbers could not give it.
"""

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import TypeVar

_T = TypeVar("_T")
_SPAN = 2**64


class Chance:
    """The draws of one seed; `muted` names the disturbances that are left out of this telling."""

    def __init__(self, seed: int, muted: Iterable[str] = ()) -> None:
        self.seed = seed
        self.struck: dict[str, None] = {}
        """The disturbances that struck, in order: what a shrunk history may do without."""
        self._muted = frozenset(muted)

    def share(self, name: str) -> float:
        """Return a number in ``[0, 1)``."""
        digest = blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) / _SPAN

    def number(self, name: str, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`, both included."""
        return low + int(self.share(name) * (high - low + 1))

    def seconds(self, name: str, low: float, high: float) -> float:
        """Return a duration in ``[low, high)``, to the millisecond."""
        return round(low + self.share(name) * (high - low), 3)

    def pick(self, name: str, choices: Sequence[_T]) -> _T:
        """Return one of `choices`; what stands there twice is twice as likely."""
        return choices[int(self.share(name) * len(choices))]

    def odds(self, name: str, share: float) -> bool:
        """Say yes in a `share` of cases."""
        return self.share(name) < share

    def strikes(self, name: str, share: float = 1.0) -> bool:
        """Say whether a disturbance strikes: in a `share` of cases, unless it is muted."""
        if share <= 0 or name in self._muted or not self.odds(name, share):
            return False
        self.struck[name] = None
        return True

    def shuffled(self, name: str, values: Sequence[_T]) -> list[_T]:
        """Return `values` in an order of chance."""
        return [
            value for _, _, value in sorted((self.share(f"{name}/{n}"), n, value) for n, value in enumerate(values))
        ]

    def stream(self, name: str) -> Callable[[], float]:
        """Return a function that gives one share after the other."""
        count = 0

        def following() -> float:
            nonlocal count
            count += 1
            return self.share(f"{name}/{count}")

        return following
