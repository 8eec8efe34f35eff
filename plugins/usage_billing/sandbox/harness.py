"""`Sandbox`: a real server on a free loopback port for the length of a `with` block."""

import http.client
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from .app import create_app
from .server import SandboxServer, listen

_START_SECONDS = 10


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


class Sandbox:
    """Runs worlds (files or folders) in a thread of this process, with books in memory or in a file.

    Leaving the block stops the server; entering again with the same books goes on where it stopped.
    """

    def __init__(self, worlds: Sequence[Path | str], books: Path | str | None = None) -> None:
        self._worlds = [Path(world) for world in worlds]
        self._books = Path(books) if books is not None else None
        self._port = 0

    def __enter__(self) -> Self:
        ready = threading.Event()
        listener = listen("127.0.0.1", self._port)
        try:
            self._server = SandboxServer(create_app(self._worlds, self._books), ready.set)
        except BaseException:
            listener.close()
            raise
        # The port stays the same when the block is entered again: clients keep their URLs over a restart.
        self._port = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="sandbox", daemon=True)
        self._thread.start()
        if not ready.wait(_START_SECONDS):
            raise RuntimeError("the sandbox did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()

    @property
    def url(self) -> str:
        """Return the root of every URL."""
        return f"http://127.0.0.1:{self._port}"

    def maxio_url(self, subdomain: str) -> str:
        """Return the base URL of a site's main API."""
        return f"{self.url}/maxio/{subdomain}"

    @property
    def events_url(self) -> str:
        """Return the base URL of the events host, to which a client adds the subdomain."""
        return f"{self.url}/events"

    def chargeover_url(self, instance: str) -> str:
        """Return the base URL of an account, to which a client adds `/api/v3`."""
        return f"{self.url}/chargeover/{instance}"

    def billed(self, site: str) -> list[BilledRow]:
        """Return what the site billed, exactly."""
        rows = self.control("GET", f"billed?site={quote(site)}")["rows"]
        figures = ("invoiced", "open", "billed", "stored")
        return [BilledRow(**{**row, **{figure: Decimal(row[figure]) for figure in figures}}) for row in rows]

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

    def fault(self, site: str, fault: str, **details: object) -> None:
        """Order a fault: `count`, `route`, `seconds`, `status`, `after`, `reads`; see `faults.Fault`."""
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
        """Begin again from the world files."""
        self.control("POST", "reset")

    def control(self, method: str, path: str, body: object = None) -> Any:
        """Send one control request and return its JSON; `SandboxRefused` when it is refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, f"/_sandbox/{path}", content)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status >= 400:
            raise SandboxRefused(text)
        return json.loads(text, parse_float=Decimal)
