"""Trouble on request, from lost replies to batches done by half. In memory, gone with the process."""

from dataclasses import dataclass, replace
from decimal import Decimal
from threading import Lock
from typing import Any

KINDS = {
    "lost_reply": "carried out, then the connection ends without a reply",
    "reset": "the connection ends before anything is carried out",
    "server_error": "an error of the server, nothing is carried out",
    "server_error_after_commit": "an error of the server, after it was carried out",
    "html_error": "a page of HTML instead of a reply, as from something between client and site",
    "throttle": "429, nothing is carried out",
    "unauthorized": "401, nothing is carried out",
    "error_inside": "a 200 whose body is an error",
    "truncated_body": "the reply ends in the middle of its body",
    "empty_body": "a success without a body",
    "wrong_type": "a success whose JSON has other types than documented",
    "hang": "the request is held for `seconds`, then carried out and answered",
    "late_commit": "the client is told at once that it failed; it arrived, and is carried out `seconds` later",
    "late_arrival": "the client is told at once that it failed; it arrives `seconds` later, and is carried out",
    "partial_bulk": "a part of a bulk request is carried out, the rest is not",
}
"""Every kind of fault, and what it does."""

_NOT_CARRIED_OUT = ("reset", "server_error", "html_error", "throttle", "unauthorized", "error_inside")
_STATUSES = {"server_error": 500, "server_error_after_commit": 500, "html_error": 502}


class BadFault(ValueError):
    """A fault order that cannot be carried out."""


@dataclass(frozen=True)
class Fault:
    """What happens to the next `count` matching requests, once `after` of them have passed unharmed.

    `seconds` is how long a hang or a late one takes. `status` is the code of an error; a late one without it breaks
    the connection. `carried_out` says, against the kind's habit, whether a request has its effect before its reply is
    spoilt. Only writing requests match unless `reads` is set, and only bulk ones are carried out by half.
    """

    site: str
    fault: str
    count: int = 1
    route: str | None = None
    seconds: float = 30.0
    status: int | None = None
    after: int = 0
    reads: bool = False
    carried_out: bool | None = None

    @classmethod
    def from_order(cls, order: dict[str, Any]) -> "Fault":
        """Read a control request; `BadFault` names every mistake."""
        wrong = sorted(set(order) - set(cls.__dataclass_fields__))
        faults = [f"unknown field {name!r}" for name in wrong]
        if order.get("fault") not in KINDS:
            faults.append(f"fault must be one of {', '.join(KINDS)}")
        faults += [f"{name} must be a whole number" for name in ("count", "after", "status") if not _whole(order, name)]
        faults += [f"{name} must be true or false" for name in ("reads", "carried_out") if not _flag(order, name)]
        if not _duration(order.get("seconds", 0)):
            faults.append("seconds must be a number of 0 or more")
        if faults:
            raise BadFault("; ".join(faults))
        return cls(**{**order, "seconds": float(order.get("seconds", 30))})

    def matches(self, site: str, route: str, *, writing: bool, bulk: bool) -> bool:
        """Say whether the request is one that this fault waits for."""
        suited = bulk or self.fault != "partial_bulk"
        return self.site == site and self.route in (None, route) and (writing or self.reads) and suited

    @property
    def takes_effect(self) -> bool:
        """Say whether the request is carried out before its reply is spoilt."""
        return self.fault not in _NOT_CARRIED_OUT if self.carried_out is None else self.carried_out

    @property
    def code(self) -> int:
        """Return the status of the error that the client is told."""
        return self.status or _STATUSES.get(self.fault, 500)


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

    def take(self, site: str, route: str, *, writing: bool, bulk: bool) -> Fault | None:
        """Return the fault that strikes this request, and use it up by one."""
        with self._lock:
            for position, fault in enumerate(self._waiting):
                if fault.matches(site, route, writing=writing, bulk=bulk):
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
    if value is None:
        return name == "status"
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _flag(order: dict[str, Any], name: str) -> bool:
    value = order.get(name)
    return value is None or isinstance(value, bool)


def _duration(given: object) -> bool:
    return isinstance(given, int | Decimal) and not isinstance(given, bool) and given >= 0
