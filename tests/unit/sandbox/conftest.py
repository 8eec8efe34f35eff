"""One running sandbox for all tests here; each test finds it as its worlds say, and drives it over HTTP."""

from collections.abc import Iterator
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import pytest
import requests

from usage_billing.sandbox import Sandbox

WORLDS = Path(__file__).parents[3] / "include" / "sandbox" / "worlds"


class Client:
    """A plain HTTP client of one site."""

    def __init__(self, base: str, auth: tuple[str, str] | None, site: str) -> None:
        self.base = base
        self.site = site
        self.session = requests.Session()
        self.session.auth = auth

    def get(self, path: str, **params: Any) -> requests.Response:
        """Send a GET with query parameters."""
        return self.session.get(f"{self.base}/{path}", params=params, timeout=10)

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        """Send a POST with a JSON body."""
        return self.session.post(f"{self.base}/{path}", json=body, **{"timeout": 10, **options})

    def close(self) -> None:
        """Close the connections."""
        self.session.close()


class Acme(Client):
    """The metered Maxio site."""

    def path(self, subscription: object = "acct-0001", component: object = "handle:api-calls") -> str:
        """Return the usages path."""
        return f"subscriptions/{subscription}/components/{component}/usages.json"

    def use(
        self, quantity: Any, subscription: object = "acct-0001", component: object = "handle:api-calls", **more: Any
    ):
        """Post one usage."""
        return self.post(self.path(subscription, component), {"usage": {"quantity": quantity, **more}})

    def balance(self, subscription: object = 50100001, component: object = "handle:api-calls") -> Any:
        """Return the unit balance."""
        return self.get(f"subscriptions/{subscription}/components/{component}.json").json()["component"]["unit_balance"]


class Orbit(Client):
    """The event-based Maxio site, whose `base` is the events host."""

    def event(self, units: Any = 1, account: str = "orbit-01", **meta: Any) -> dict[str, Any]:
        """Return one event of the stream `platform-events`."""
        return {"chargify": meta, "account_id": account, "units": units}

    def send(self, *events: Any, stream: str = "platform-events") -> requests.Response:
        """Send one event singly, or several in bulk."""
        if len(events) == 1:
            return self.post(f"{stream}.json", events[0])
        return self.post(f"{stream}/bulk.json", list(events))


class Telco(Client):
    """The ChargeOver account."""

    def use(self, value: Any, line: int = 854, day: str = "2026-10-15", **more: Any) -> requests.Response:
        """Post one usage record for a day."""
        body = {"line_item_id": line, "usage_value": value, "from": f"{day} 00:00:00", "to": f"{day} 23:59:59"}
        return self.post("usage", {**body, **more})


class Bench:
    """The running sandbox with what tests ask of it most."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sandbox, name)

    def figures(self, site: str, subscription: str, component: str) -> tuple[Decimal, Decimal, Decimal, int]:
        """Return invoiced, open, stored and the number of records of one subscription and component."""
        for row in self.sandbox.billed(site):
            if row.subscription and row.reference == subscription and row.component == component:
                with localcontext(prec=100):
                    assert row.billed == row.invoiced + row.open
                return row.invoiced, row.open, row.stored, row.records
        return Decimal(0), Decimal(0), Decimal(0), 0


@pytest.fixture(scope="session")
def running() -> Iterator[Sandbox]:
    """Start the shipped worlds once."""
    with Sandbox([WORLDS]) as sandbox:
        yield sandbox


@pytest.fixture
def bench(running: Sandbox) -> Bench:
    """Return the sandbox as its worlds say."""
    running.reset()
    return Bench(running)


@pytest.fixture
def acme(bench: Bench) -> Iterator[Acme]:
    """Return a client of the metered site."""
    client = Acme(bench.maxio_url("acme"), ("sandbox-acme-key", "x"), "maxio:us:acme")
    yield client
    client.close()


@pytest.fixture
def orbit(bench: Bench) -> Iterator[Orbit]:
    """Return a client of the events host."""
    client = Orbit(f"{bench.events_url}/orbit/events", ("sandbox-orbit-key", "x"), "maxio:us:orbit")
    yield client
    client.close()


@pytest.fixture
def orbit_main(bench: Bench) -> Iterator[Acme]:
    """Return a client of the event-based site's main API."""
    client = Acme(bench.maxio_url("orbit"), ("sandbox-orbit-key", "x"), "maxio:us:orbit")
    yield client
    client.close()


@pytest.fixture
def telco(bench: Bench) -> Iterator[Telco]:
    """Return a client of the ChargeOver account."""
    keys = ("sandboxtelcopublickey00000000000", "sandboxtelcoprivatekey0000000000")
    client = Telco(f"{bench.chargeover_url('telco')}/api/v3", keys, "chargeover:telco")
    yield client
    client.close()
