"""`Desk`: what tests, the demo and a simulator ask of a sandbox and tell it to do, however it runs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from urllib.parse import quote

_FIGURES = ("invoiced", "open", "billed", "stored")


class SandboxRefused(RuntimeError):
    """The sandbox refused a control request; the text has its reasons."""


@dataclass(frozen=True)
class BilledRow:
    """What one site billed to one subscription for one component; see `billing.billed`."""

    site: str
    subscription: str
    reference: str
    component: str
    invoiced: Decimal
    open: Decimal
    billed: Decimal
    stored: Decimal
    records: int


class Desk(ABC):
    """The addresses of a sandbox's APIs, and its control requests as methods."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Return the root of every URL."""

    @abstractmethod
    def control(self, method: str, path: str, body: object = None) -> Any:
        """Send one control request and return its JSON; `SandboxRefused` when it is refused."""

    def maxio_url(self, subdomain: str) -> str:
        """Return the base URL of a site's main API."""
        return f"{self.url}/maxio/{subdomain}"

    @property
    def events_url(self) -> str:
        """Return the base URL of the events host, to which a client adds the subdomain."""
        return f"{self.url}/events"

    @property
    def eu_events_url(self) -> str:
        """Return the base URL of the events host that sites of the region eu have where the switch says so."""
        return f"{self.url}/events-eu"

    def chargeover_url(self, instance: str) -> str:
        """Return the base URL of an account, to which a client adds `/api/v3`."""
        return f"{self.url}/chargeover/{instance}"

    def billed(self, site: str) -> list[BilledRow]:
        """Return what the site billed, exactly."""
        return billed_rows(self.control("GET", f"billed?site={quote(site)}")["rows"])

    def requests(self, site: str) -> dict[str, Any]:
        """Return the counts of requests since the last reset."""
        counts: dict[str, Any] = self.control("GET", f"requests?site={quote(site)}")[site]
        return counts

    def reset_requests(self) -> None:
        """Count requests from zero again."""
        self.control("POST", "requests/reset")

    def records(self, site: str, component: str | None = None) -> list[dict[str, Any]]:
        """Return the raw stored records, oldest first."""
        narrowed = f"&component={quote(component)}" if component else ""
        rows: list[dict[str, Any]] = self.control("GET", f"records?site={quote(site)}{narrowed}")["records"]
        return rows

    def switch(self, site: str, **switches: object) -> None:
        """Turn switches of a site."""
        self.control("POST", "switches", {"site": site, "switches": switches})

    def consulted(self, site: str) -> set[str]:
        """Return the switches that the site looked at since they were last turned: only these can have mattered."""
        return set(self.control("GET", f"switches/consulted?site={quote(site)}")[site])

    def fault(self, site: str, fault: str, **details: object) -> None:
        """Order a fault with its details; see `faults.Fault`."""
        self.control("POST", "faults", {"site": site, "fault": fault, **details})

    def clear_faults(self) -> None:
        """Forget the faults that are still to come."""
        self.control("DELETE", "faults")

    def move_clock(self, now: datetime | str | None = None, *, advance_seconds: float | None = None) -> datetime:
        """Move the clock forward, to a time or by seconds, with the renewals on the way; return the new present."""
        order: dict[str, object] = {}
        if now is not None:
            order["now"] = now if isinstance(now, str) else now.isoformat()
        if advance_seconds is not None:
            order["advance_seconds"] = advance_seconds
        return datetime.fromisoformat(self.control("POST", "clock", order)["now"])

    def now(self) -> datetime:
        """Return the sandbox's present."""
        return datetime.fromisoformat(self.control("GET", "clock")["now"])

    def reset(self) -> None:
        """Begin again from the worlds."""
        self.control("POST", "reset")


def billed_rows(rows: Sequence[dict[str, Any]]) -> list[BilledRow]:
    """Return the rows of `billing.billed` with their figures as exact numbers."""
    return [BilledRow(**{**row, **{figure: Decimal(row[figure]) for figure in _FIGURES}}) for row in rows]
