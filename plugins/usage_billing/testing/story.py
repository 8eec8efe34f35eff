"""The story of one history: every effect with its virtual time, who made it, and what came of it."""

from collections import Counter
from datetime import datetime

_LATELY = 8
_OFTEN_ENOUGH = 2


class Story:
    """Numbered effects, in the order in which they happened, and how many there were of each kind."""

    def __init__(self, start: datetime) -> None:
        self.counts: Counter[str] = Counter()
        self._start = start
        self._lines: list[tuple[float, str, str, str]] = []

    def tell(self, moment: datetime, who: str, what: str, outcome: str = "") -> None:
        """Write one effect down."""
        self._lines.append(((moment - self._start).total_seconds(), who, what, outcome))

    def __len__(self) -> int:
        return len(self._lines)

    def __str__(self) -> str:
        """Return the effects as lines; what a process does over and over while it waits stands there once."""
        shown: list[str] = []
        before: dict[str, list[tuple[str, str]]] = {}
        left_out = 0
        for number, (seconds, who, what, outcome) in enumerate(self._lines, 1):
            lately = before.setdefault(who, [])
            if lately.count((what, outcome)) >= _OFTEN_ENOUGH:
                left_out += 1
            else:
                shown += [f"      ... {left_out} like those before"] if left_out else []
                shown.append(f"{number:5} {_clock(seconds)}  {who:24} {what}{f' -> {outcome}' if outcome else ''}")
                left_out = 0
            before[who] = [*lately[1 - _LATELY :], (what, outcome)]
        return "\n".join(shown)


def _clock(seconds: float) -> str:
    whole, milli = divmod(round(seconds * 1000), 1000)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    day, hour = divmod(hours, 24)
    return f"d{day:02} {hour:02}:{minute:02}:{second:02}.{milli:03}"
