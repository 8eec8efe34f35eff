"""The page on the calls: each example makes its call, and table, clients and sandbox speak of the same ones."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Mount

from usage_billing.destinations.chargeover import ChargeOverSettings, ChargeOverSite
from usage_billing.destinations.http import Transport
from usage_billing.destinations.maxio import MaxioSettings, MaxioSite, activation_body, event_body, usage_body
from usage_billing.sandbox import Sandbox
from usage_billing.sandbox.app import SandboxApp
from usage_billing.sandbox.wire import Route

ROOT = Path(__file__).parents[1]
WORLDS = ROOT / "include" / "sandbox" / "worlds"
DOCUMENT = (ROOT / "docs" / "calls.md").read_text(encoding="utf-8")
ONCE = Transport(patience_seconds=0)

NO_USAGE = {
    ("PUT", "/subscriptions/{}"), ("DELETE", "/subscriptions/{}"), ("POST", "/subscriptions/{}/purge"),
    ("POST", "/package/{}"), ("POST", "/package/{}/_action/{}"),
    ("PUT", "/usage/{}"), ("DELETE", "/usage/{}"),
}  # fmt: skip
"""Calls of the sandbox that no client makes: its owner changes subscriptions, and the last two nobody documents."""
NO_CALL = {"key_of", "local", "moment", "said", "time", "usage_body"}
"""Methods of the clients that ask no site."""


@dataclass(frozen=True)
class Row:
    """A row of the tables: a call as method and path, and an expression that makes it."""

    call: tuple[str, str]
    example: str

    @property
    def client(self) -> str:
        """The name of the client in the example."""
        return self.example.partition(".")[0]

    @property
    def method(self) -> str:
        """The name of its method."""
        return re.findall(r"\w+", self.example)[1]


def rows() -> list[Row]:
    """Return the rows of both tables."""
    found = re.findall(r"^\| `(\w+) (\S[^`]*)` \| `(.+)` \|$", DOCUMENT, re.MULTILINE)
    return [Row((method, path_of(path)), example) for method, path, example in found]


def path_of(path: str) -> str:
    """Return a path without the names of its segments, and without the suffix of its format."""
    return re.sub(r"\{[^}]*\}", "{}", path.replace("{events}", "/events")).removesuffix(".json")


@cache
def names() -> dict[tuple[str, str], str]:
    """Return the calls that the sandbox answers, with the name of each route."""
    app = SandboxApp([WORLDS], None)
    mounts = [mount for mount in app.router.routes if isinstance(mount, Mount) and "_sandbox" not in mount.path]
    found = [route for mount in mounts for route in mount.app.router.routes if isinstance(route, Route)]
    app.close()
    return {(next(iter(route.methods)), path_of(route.path)): route.name for route in found}


@pytest.fixture(scope="module")
def running() -> Iterator[Sandbox]:
    """Run the worlds once."""
    with Sandbox([WORLDS]) as found:
        yield found


@pytest.fixture
def sandbox(running: Sandbox) -> Sandbox:
    """Give each example worlds that have an invoice, and usage of both periods: none leans on another example."""
    running.reset()
    acme = clients(running)["acme"]
    acme.create_usage("acct-0001", "handle:api-calls", usage_body(1))
    running.move_clock("2026-11-02T00:00:00Z")
    acme.create_usage("acct-0001", "handle:api-calls", usage_body(1))
    return running


def clients(sandbox: Sandbox) -> dict[str, Any]:
    """Return the clients that the page has."""
    shared: dict[str, Any] = {"settle_after_seconds": 0}
    maxio = {
        name: MaxioSite(
            MaxioSettings(
                subdomain=name,
                api_key=f"sandbox-{name}-key",
                base_url=sandbox.maxio_url(name),
                events_url=sandbox.events_url,
                **shared,
            ),
            ONCE,
        )
        for name in ("acme", "orbit")
    }
    keys = {"public_key": "sandboxtelcopublickey00000000000", "private_key": "sandboxtelcoprivatekey0000000000"}
    settings = ChargeOverSettings(instance="telco", base_url=sandbox.chargeover_url("telco"), **keys, **shared)
    return {**maxio, "telco": ChargeOverSite(settings, ONCE)}


WORDS = {
    "Decimal": Decimal,
    "activation_body": activation_body,
    "date": date,
    "event_body": event_body,
    "noon": datetime(2026, 11, 1, 12, tzinfo=UTC),
    "one_o_clock": datetime(2026, 11, 1, 13, tzinfo=UTC),
    "usage_body": usage_body,
}
SITES = {"acme": "maxio:us:acme", "orbit": "maxio:us:orbit", "telco": "chargeover:telco"}
STORED = 'telco.create_usage(telco.usage_body(22, noon, one_o_clock, 854, external_key="k-1"))'
"""What has to be there before an example that asks for usage of a line."""


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.example[:60])
def test_each_example_makes_its_call(row: Row, sandbox: Sandbox) -> None:
    """Its route alone is asked, and answers; what it reads is there."""
    known = {**WORDS, **clients(sandbox)}
    known |= {
        "uid": next(known["acme"].invoices())["uid"],
        "number": next(known["telco"].query("invoice"))["invoice_id"],
    }
    if row.client == "telco" and row.example != STORED:
        eval(STORED, known)  # noqa: S307 - an expression of our own page.
    sandbox.reset_requests()
    found = eval(row.example, known)  # noqa: S307
    found = list(found) if isinstance(found, Iterator) else found
    asked = Counter(sandbox.requests(SITES[row.client])["by_route"])

    assert [route for route, times in asked.items() if times] == [names()[row.call]]
    if row.method not in ("activate", "deactivate", "read_account", "record_event", "record_events", "upload_usage"):
        assert found, "an example that finds nothing shows nothing"


def test_table_and_sandbox_speak_of_the_same_calls() -> None:
    """A call that the sandbox answers has an example, and none has one that it does not answer."""
    told = {row.call for row in rows()}

    assert told == names().keys() - NO_USAGE
    assert names().keys() >= NO_USAGE


@pytest.mark.parametrize("client", [MaxioSite, ChargeOverSite])
def test_every_method_of_a_client_has_an_example(client: type) -> None:
    """Nothing that a client can do is told nowhere."""
    sites = {"telco"} if client is ChargeOverSite else {"acme", "orbit"}
    told = {row.method for row in rows() if row.client in sites}
    methods = {name for name, value in vars(client).items() if callable(value) and not name.startswith("_")}

    assert told == methods - NO_CALL


def test_every_row_of_the_tables_is_one() -> None:
    """A row that is written otherwise would be passed over."""
    lines = [line for line in DOCUMENT.splitlines() if line.startswith("| `")]
    assert len(rows()) == len(lines) > 40
