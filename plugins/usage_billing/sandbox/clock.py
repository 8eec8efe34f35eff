"""The sandbox's own clock, and instants as whole microseconds of UTC.

One clock serves every site of a sandbox. It stands still unless the world gives it a rate, and is moved only forward:
invoices that were made cannot be unmade.
"""

import time
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from zoneinfo import ZoneInfo

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def to_micros(instant: datetime) -> int:
    """Return an aware time as microseconds since 1970, exactly."""
    return (instant - _EPOCH) // _MICROSECOND


def from_micros(micros: int, zone: ZoneInfo | None = None) -> datetime:
    """Return the aware time of an instant, in UTC or in the given zone."""
    moment = _EPOCH + timedelta(microseconds=micros)
    return moment.astimezone(zone) if zone else moment


def midnight(day: date, zone: ZoneInfo) -> int:
    """Return the instant at which the day begins in the zone."""
    return to_micros(datetime.combine(day, time_of_day(), tzinfo=zone))


def parse_instant(text: str, zone: ZoneInfo) -> int:
    """Read an ISO 8601 time or date; without an offset it is local to the zone. `ValueError` when it is neither."""
    moment = datetime.fromisoformat(text)
    return to_micros(moment if moment.tzinfo else moment.replace(tzinfo=zone))


class ClockMovedBack(ValueError):
    """The sandbox clock only moves forward: what was invoiced stays invoiced."""


@dataclass
class Clock:
    """The present of the sandbox: `anchor` (microseconds) was true at `wall` (Unix seconds), and ticks at `rate`."""

    anchor: int
    wall: float
    rate: float

    def now(self) -> int:
        """Return the present instant in microseconds."""
        if self.rate == 0:
            return self.anchor
        return self.anchor + int((time.time() - self.wall) * self.rate * 1_000_000)

    def move_to(self, instant: int) -> None:
        """Move the clock; `ClockMovedBack` when the instant is in its past."""
        if instant < self.now():
            raise ClockMovedBack(f"the clock stands at {from_micros(self.now()).isoformat()} and only moves forward")
        self.anchor, self.wall = instant, time.time()
