"""Trouble on request: lost replies, server errors, throttling, hangs. In memory, gone with the process."""

from dataclasses import dataclass, replace
from decimal import Decimal
from threading import Lock
from typing import Any

KINDS = ("lost_reply", "server_error", "server_error_after_commit", "throttle", "hang", "unauthorized")


class BadFault(ValueError):
    """A fault order that cannot be carried out."""


@dataclass(frozen=True)
class Fault:
    """What happens to the next `count` matching requests, once `after` of them have passed unharmed.

    `seconds` is how long a hang holds the request before it is carried out all the same; `status` is the code of a
    server error. Only writing requests match unless `reads` is set.
    """

    site: str
    fault: str
    count: int = 1
    route: str | None = None
    seconds: float = 30.0
    status: int = 500
    after: int = 0
    reads: bool = False

    @classmethod
    def from_order(cls, order: dict[str, Any]) -> "Fault":
        """Read a control request; `BadFault` names every mistake."""
        wrong = sorted(set(order) - set(cls.__dataclass_fields__))
        faults = [f"unknown field {name!r}" for name in wrong]
        if order.get("fault") not in KINDS:
            faults.append(f"fault must be one of {', '.join(KINDS)}")
        faults += [f"{name} must be a whole number" for name in ("count", "after", "status") if not _whole(order, name)]
        if not isinstance(order.get("seconds", 0), int | Decimal):
            faults.append("seconds must be a number")
        if faults:
            raise BadFault("; ".join(faults))
        return cls(**{**order, "seconds": float(order.get("seconds", 30))})

    def matches(self, site: str, route: str, writing: bool) -> bool:
        """Say whether the request is one that this fault waits for."""
        return self.site == site and self.route in (None, route) and (writing or self.reads)


class FaultBox:
    """The faults that are still to come, oldest order first."""

    def __init__(self) -> None:
        self._waiting: list[Fault] = []
        self._lock = Lock()

    def add(self, fault: Fault) -> None:
        """Order a fault."""
        with self._lock:
            self._waiting.append(fault)

    def clear(self) -> None:
        """Forget every fault."""
        with self._lock:
            self._waiting.clear()

    def remaining(self) -> list[Fault]:
        """Return what is still to come."""
        with self._lock:
            return list(self._waiting)

    def take(self, site: str, route: str, writing: bool) -> Fault | None:
        """Return the fault that strikes this request, and use it up by one."""
        with self._lock:
            for position, fault in enumerate(self._waiting):
                if fault.matches(site, route, writing):
                    return self._strike(position, fault)
        return None

    def _strike(self, position: int, fault: Fault) -> Fault | None:
        if fault.after > 0:
            self._waiting[position] = replace(fault, after=fault.after - 1)
            return None
        if fault.count > 1:
            self._waiting[position] = replace(fault, count=fault.count - 1)
        else:
            del self._waiting[position]
        return fault


def _whole(order: dict[str, Any], name: str) -> bool:
    value = order.get(name, 0)
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
