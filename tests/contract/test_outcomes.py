"""What every outcome of every usage call means: the tables below are the document, and each row is tried.

A call ends in an answer or in one of four errors, and nothing else. The columns of a table are the three effects that a
call can have: a READ, a WRITE of one record (or of records that carry a token each), a BULK that may be carried out in
part. The letters: A an answer, M `Misconfigured`, N `NotApplied`, R `Refused`, D `InDoubt`.

The rule behind the rows: N and R after a write only where it is certain that nothing was done, for N and R let a record
be sent again, or let it be written off; D wherever it is not.
"""

import gzip
import io
import json
import socket
import ssl
import threading
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache, partial
from http import HTTPStatus
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import requests
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from requests.adapters import BaseAdapter, HTTPAdapter

from usage_billing.destinations import http, maxio
from usage_billing.destinations.base import Destination
from usage_billing.destinations.chargeover import ChargeOverSettings, ChargeOverSite, ChargeOverUsage
from usage_billing.destinations.http import Effect, HttpClient, Transport
from usage_billing.destinations.maxio import MaxioEvents, MaxioMetered, MaxioSettings, MaxioSite
from usage_billing.destinations.settings import Timeouts
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused, UsageBillingError
from usage_billing.records import Delivery, Receipt
from usage_billing.sources import BillingSource

A, M, N, R, D = "an answer", Misconfigured, NotApplied, Refused, InDoubt
READ, WRITE, BULK = Effect.READ, Effect.WRITE, Effect.BULK
EFFECTS = (READ, WRITE, BULK)

KEY, PUBLIC, PRIVATE = "maxio-key-31337", "public-key-31337", "private-key-31337"
PAIRS = [b64encode(pair.encode()).decode() for pair in (f"{KEY}:x", f"{PUBLIC}:{PRIVATE}")]
ECHO = f"your key {KEY} or {PUBLIC}:{PRIVATE}, sent as {PAIRS[0]} or {PAIRS[1]}"
HUSH = "hush-31337"
"""The password of a proxy."""

TOKEN, OTHER = "a" * 64, "b" * 64
NOW = datetime(2026, 10, 6, tzinfo=UTC)


# --- the table of statuses ------------------------------------------------------------------------------------------

CLASSES = {
    # class:   READ WRITE BULK
    1: (N, D, D),  # No final word.
    2: (N, A, A),  # To a question only 200 is an answer; of a write the body tells.
    3: (M, D, D),  # A redirect may come after the work was done.
    4: (M, R, D),  # The site refuses; of several it may have taken some.
    5: (N, D, D),  # The site failed, perhaps after the work was done.
    **dict.fromkeys((6, 7, 8, 9), (N, D, D)),  # Nobody knows such a status.
}
STATUSES = {
    200: (A, A, A),
    204: (N, D, D),  # No body where one is documented; the events host documents none, see `BLIND`.
    **dict.fromkeys((301, 307, 308), (M, M, M)),  # The address has moved: nothing is done there.
    401: (M, M, M),  # Unknown credentials come before any work.
    403: (M, M, M),  # So do credentials without the right to.
    407: (M, M, M),  # The proxy's own.
    408: (N, D, D),  # The site waited for the request, and had perhaps all of it.
    409: (M, D, D),  # Maxio: the token was used, and how its first use ended is not told.
    425: (N, D, D),
    429: (N, N, D),  # Throttled before any work; of a bulk nobody documents it.
    460: (N, D, D),  # A load balancer's words for a client that hung up.
    499: (N, D, D),
}
NAMED = sorted({*STATUSES, *map(int, HTTPStatus), 520, 522, 524, 529, 600, 999})
"""Every status that has a name, those of gateways, and some that nobody knows."""


def by_status(status: int, effect: Effect) -> object:
    """Return what the two tables say."""
    return STATUSES.get(status, CLASSES[status // 100])[EFFECTS.index(effect)]


# --- calls ----------------------------------------------------------------------------------------------------------


@dataclass
class Site(BaseAdapter):
    """A network with one reply for all that writes and one for all that reads."""

    write: tuple[int, bytes] = (200, b"")
    read: tuple[int, bytes] = (200, b"")
    headers: Mapping[str, str] = field(default_factory=dict)

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        """Give the reply that belongs to the method."""
        status, body = self.write if request.method == "POST" else self.read
        # HTTP knows no body under these, so nobody reads one.
        shown = b"" if status in (204, 304) else body
        raw = urllib3.HTTPResponse(io.BytesIO(shown), self.headers, status, preload_content=False)
        return HTTPAdapter().build_response(request, raw)

    def close(self) -> None:
        """Close nothing."""


def impatient(adapter: Callable[[], BaseAdapter] | None) -> Transport:
    """Return a network on which nothing is asked twice."""
    return Transport(adapter, patience_seconds=0)


def maxio_site(url: str, adapter: Callable[[], BaseAdapter] | None, waits: Timeouts) -> MaxioSite:
    """Return a client of a Maxio site."""
    keys: Any = {"base_url": url, "events_url": url} if url else {}
    return MaxioSite(MaxioSettings(subdomain="acme", api_key=KEY, timeouts=waits, **keys), impatient(adapter))


def chargeover_site(url: str, adapter: Callable[[], BaseAdapter] | None, waits: Timeouts) -> ChargeOverSite:
    """Return a client of a ChargeOver account."""
    keys = {"public_key": PUBLIC, "private_key": PRIVATE, "base_url": url}
    return ChargeOverSite(ChargeOverSettings(instance="telco", timeouts=waits, **keys), impatient(adapter))  # type: ignore[arg-type]


def destination(kind: type[Destination], client: Any, **keys: str) -> Any:
    """Return a destination over a client; of the rest of the source, no call asks for more than what is measured."""
    model = kind.settings_model.model_validate({"name": kind.name, "connection": "c", **keys})
    source = SimpleNamespace(name="s", meter=SimpleNamespace(function="sum", decimals=0), dimensions=())
    return kind(BillingSource(source, model, "", ()), client)  # type: ignore[arg-type]


def metered(client: Any) -> Any:
    """Return a metered component."""
    return destination(MaxioMetered, client, subscription_by="id", component="61001")


def events(client: Any) -> Any:
    """Return a stream."""
    keys = {"stream": "s", "subscription_by": "account_id", "component": "61001", "property": "units"}
    return destination(MaxioEvents, client, **keys)


def usage(client: Any, mode: str = "batch") -> Any:
    """Return a line item's usage."""
    return destination(ChargeOverUsage, client, package_by="external_key", item="voip", mode=mode)


ADDRESS = {"subscription_id": 7, "component_id": 61001, "stream": "s", "account": "acct", "line_item_id": 854}
BODY = {"line_item_id": 854, "usage_value": 1, "from": "2026-10-05 00:00:00", "to": "2026-10-05 23:59:59"}
DELIVERY = Delivery(TOKEN, "i", 0, Decimal(1), ADDRESS, json.dumps(BODY), NOW - timedelta(hours=1), 1)
TWO = [DELIVERY, Delivery(OTHER, "j", 0, Decimal(1), ADDRESS, json.dumps(BODY), NOW - timedelta(hours=1), 1)]
DEDUCTION = Delivery(TOKEN, "i", 0, Decimal(-1), ADDRESS, "{}", NOW - timedelta(hours=1), 1)
ACCEPTED = pd.DataFrame(
    {
        "token": [TOKEN],
        "subscription": ["7"],
        "component": ["61001"],
        "address": [json.dumps(ADDRESS)],
        "record_id": ["5"],
        "period_start": [pd.Timestamp(NOW - timedelta(days=1))],
        "period_end": [pd.Timestamp(NOW)],
    }
)


@dataclass(frozen=True)
class Call:
    """A usage call: what it can do to the site, how to make a client, what to do with it, and where rows differ."""

    name: str
    effect: Effect
    client: Callable[..., Any]
    act: Callable[[Any], Any]
    but: Mapping[int, object] = field(default_factory=dict)

    def by_status(self, status: int) -> object:
        """Return what the tables say of this call."""
        return self.but.get(status, by_status(status, self.effect))


NO_STREAM = {404: M}  # The events host knows no such stream, which is no fault of any record.
NO_ROOM = {**NO_STREAM, 413: R}  # What is too large is turned away by its size, before any of it is stored.
NO_LIST = {404: M}  # A query is answered by a list: a 404 is not the account's.
NO_SITE = {404: M}  # Where the site's own settings are not found either, no subscription is gone.
NONE = {404: A}  # The definite word that there is no such subscription or component.
CALLS = [
    Call("Maxio create usage", WRITE, maxio_site, lambda site: site.create_usage(7, 61001, "{}")),
    Call("Maxio list usages", READ, maxio_site, lambda site: list(site.usages(7, 61001) or ()), NONE),
    Call("Maxio page of usages", READ, maxio_site, lambda site: site.usage_page(7, 61001), NONE),
    Call("Maxio list invoices", READ, maxio_site, lambda site: list(site.invoices(7)), NO_SITE),
    Call("Maxio activate", WRITE, maxio_site, lambda site: site.activate(7, 61101)),
    Call("Maxio record an event", WRITE, maxio_site, lambda site: site.record_event("s", "{}"), NO_STREAM),
    Call("Maxio record events", BULK, maxio_site, lambda site: site.record_events("s", ["{}", "{}"]), NO_ROOM),
    Call("Maxio record one of events", WRITE, maxio_site, lambda site: site.record_events("s", ["{}"]), NO_STREAM),
    Call("Maxio metered, send", WRITE, maxio_site, lambda site: metered(site).send([DELIVERY])),
    Call("Maxio metered, send a deduction", WRITE, maxio_site, lambda site: metered(site).send([DEDUCTION])),
    Call("Maxio metered, settle", READ, maxio_site, lambda site: metered(site).settle([DELIVERY], NOW), NO_SITE),
    Call("Maxio metered, list records", READ, maxio_site, lambda site: list(metered(site).records(ACCEPTED)), NONE),
    Call("Maxio events, send", BULK, maxio_site, lambda site: events(site).send(TWO), NO_ROOM),
    Call("Maxio events, send one", WRITE, maxio_site, lambda site: events(site).send([DELIVERY]), NO_STREAM),
    Call("ChargeOver store usage", WRITE, chargeover_site, lambda site: site.create_usage("{}")),
    Call("ChargeOver batch", BULK, chargeover_site, lambda site: site.create_usage_batch(["{}"])),
    Call("ChargeOver bulk", BULK, chargeover_site, lambda site: site.upload_usage(["{}"])),
    Call("ChargeOver query", READ, chargeover_site, lambda site: list(site.usages({"line_item_id": 1})), NO_LIST),
    Call("ChargeOver query a key", READ, chargeover_site, lambda site: site.usages_by_external_key(TOKEN), NO_LIST),
    Call("ChargeOver singly, send", WRITE, chargeover_site, lambda site: usage(site, "single").send([DELIVERY])),
    Call("ChargeOver in batches, send", BULK, chargeover_site, lambda site: usage(site).send(TWO)),
    Call("ChargeOver in bulk, send", BULK, chargeover_site, lambda site: usage(site, "bulk").send(TWO)),
    Call("ChargeOver, settle", READ, chargeover_site, lambda site: usage(site).settle([DELIVERY], NOW), NO_LIST),
    Call("ChargeOver, list records", READ, chargeover_site, lambda site: list(usage(site).records(ACCEPTED)), NO_LIST),
]
CALL = {call.name: call for call in CALLS}
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


SECRETS = {maxio_site: (KEY, PAIRS[0], HUSH), chargeover_site: (PUBLIC, PRIVATE, PAIRS[1], HUSH)}


def outcome(act: Callable[[], Any], secrets: Sequence[str] = ()) -> object:
    """Return how a call ended; anything but an answer and our four errors comes out as it is, and fails the test."""
    try:
        act()
    except UsageBillingError as error:
        told = "".join(traceback.format_exception(error)) + repr(error)
        shown = [secret for secret in secrets if secret in told]
        return type(error) if not shown and "\n" not in str(error) else f"tells {shown}: {error}"
    return A


def envelope(response: object, code: object = 200, status: str = "OK", **more: object) -> bytes:
    """Return a ChargeOver envelope."""
    return json.dumps({"code": code, "status": status, "message": "", "response": response, **more}).encode()


EMPTY = {maxio_site: b"[]", chargeover_site: envelope([])}


def ends(call: Call, status: int, body: bytes, read: tuple[int, bytes] | None = None) -> object:
    """Return how a call ends when the site gives this reply; what a write reads afterwards is a sound, empty list."""
    site, client = wired(call.client)
    afterwards = read or (200, EMPTY[call.client])
    site.write, site.read = (status, body), (status, body) if call.effect is READ else afterwards
    return outcome(lambda: call.act(client), SECRETS[call.client])


@cache
def wired(make: Callable[..., Any]) -> tuple[Site, Any]:
    """Return a network whose replies can be set, and a client that is connected to it."""
    site = Site()
    return site, make("", lambda: site, Timeouts())


# --- bodies of failures ---------------------------------------------------------------------------------------------

FAILED_BODIES: dict[str, bytes] = {
    "a list of messages": json.dumps({"errors": ["Price point: could not be found.", ECHO]}).encode(),
    "lists by field": json.dumps({"errors": {"memo": ["too long", ECHO]}}).encode(),
    "texts by field": json.dumps({"errors": {"memo": ECHO}}).encode(),
    "by index": json.dumps({"errors": {"segments": {"0": {"price": [ECHO]}}}}).encode(),
    "one text of errors": json.dumps({"errors": ECHO}).encode(),
    "one text of error": json.dumps({"error": ECHO}).encode(),
    "objects": json.dumps({"errors": [{"component_id": 1, "message": ECHO}]}).encode(),
    "an envelope": envelope(False, 400, "Error", message=ECHO),
    "an envelope of success": envelope({"id": 5}),
    "a usage": b'{"usage":{"id":5,"quantity":1}}',
    "an empty list": b"[]",
    "plain text": f"HTTP Basic: Access denied. {ECHO}\n".encode(),
    "text with the key at the cut": b" " * 1190 + KEY.encode(),
    "XML": f"<errors><error>{ECHO}</error></errors>".encode(),
    "HTML": f"<!DOCTYPE html><html>{ECHO}</html>".encode(),
    "nothing": b"",
    "cut short": b'{"errors":["Price po',
    "null": b"null",
    "a number": b"7",
    "no number": b'{"errors":[NaN]}',
    "a number without end": b'{"errors":[' + b"9" * 5000 + b"]}",
    "nested without end": b"[" * 100_000,
    "no UTF-8": b'{"errors":["\xff\xfe"]}',
    "odd types": b'{"errors":[[[null,true,{"a":[]}]],7.5],"message":{"x":1}}',
}


@EVERY_CALL
def test_a_failure_means_what_its_status_says_whatever_the_body(call: Call) -> None:
    """Every status that is no success, with every shape of body, ends every call as the table says."""
    failures = [status for status in NAMED if by_status(status, call.effect) is not A and status // 100 != 2]
    tried = list(product(failures, FAILED_BODIES.items()))

    wrong = {
        (status, name): found
        for status, (name, body) in tried
        if (found := ends(call, status, body)) is not call.by_status(status)
    }

    assert len(tried) > 1000
    assert wrong == {}


@pytest.mark.parametrize("effect", EFFECTS)
def test_every_status_there_is(effect: Effect) -> None:
    """From 100 to 999, named or not; nothing is left to chance."""
    site = Site()
    client = HttpClient("maxio:us:acme", "https://billing.example.com", (KEY, "x"), transport=impatient(lambda: site))
    expected, found = {}, {}
    for status in range(100, 1000):
        site.read = site.write = (status, b"{}")
        expected[status] = A if (effect, status) == (READ, 404) else by_status(status, effect)
        act = partial(client.read, "ask", "/") if effect is READ else partial(client.write, "do", "/", "{}", effect)
        found[status] = outcome(act)

    assert found == expected


def test_every_row_of_the_clients_table_decides_something() -> None:
    """No row is dead: each is the first that fits some status and effect, or some words of a site."""
    words = ["", *SITE_WIDE]
    own = (*maxio.client._SITE_WIDE, maxio.client._NO_STREAM, *http.OUTCOMES)
    deciders = [
        next(row for row in rows if row.fits(status, effect, said))
        for rows in (http.OUTCOMES, own)
        for status, effect, said in product(range(300, 1000), EFFECTS, words)
    ]

    assert [row for row in own if not any(row is decider for decider in deciders)] == []


SITE_WIDE = [
    "Your Chargify account has been canceled. Please contact support@chargify.com to reactivate.",
    "Your trial has ended, please contact sales.",
    "Site data clearing is in progress. Please try later.",
    "This site has been deleted.",
]


@pytest.mark.parametrize("words", SITE_WIDE)
@pytest.mark.parametrize("call", [call for call in CALLS if call.client is maxio_site], ids=lambda call: call.name)
def test_a_blocked_maxio_site_is_a_persons_business(call: Call, words: str) -> None:
    """The 422 that hits every request of a site refuses no record; the same words under another status do not count."""
    body = json.dumps({"errors": [words]}).encode()

    assert ends(call, 422, body) is M
    assert ends(call, 400, body) is by_status(400, call.effect)


OF_ONE_RECORD = [
    "Usages cannot be added: the subscription's trial has ended.",
    "Subscription: its account has been canceled.",
    "Customer: this site has been deleted.",
    "Your trial has ended for this product.",
]


@pytest.mark.parametrize("words", OF_ONE_RECORD)
@pytest.mark.parametrize("name", ["Maxio create usage", "Maxio metered, send", "Maxio events, send"])
def test_words_about_one_record_block_no_site(name: str, words: str) -> None:
    """Only the documented sentences, from their start, speak of the whole site."""
    call = CALL[name]
    assert ends(call, 422, json.dumps({"errors": [words]}).encode()) is call.by_status(422)


# --- bodies of successes --------------------------------------------------------------------------------------------

NEVER_A_SUCCESS: dict[str, bytes] = {
    "HTML": f"\n <html>log in {ECHO}</html>".encode(),
    "HTML after a mark": b"\xef\xbb\xbf<!DOCTYPE html>",
    "XML": f"<errors><error>{ECHO}</error></errors>".encode(),
    "cut short": b'{"usage":{"id":5,"quan',
    "a list cut short": b'[{"usage":{"id":5}},',
    "errors inside": json.dumps({"errors": [ECHO]}).encode(),
    "an error inside": json.dumps({"error": ECHO}).encode(),
    "no number": b'{"usage":{"id":5,"quantity":NaN},"errors":[1]}',
    "nested without end": b"[" * 100_000,
}
NEVER_AN_ANSWER: dict[str, bytes] = {
    **NEVER_A_SUCCESS,
    "nothing": b"",
    "null": b"null",
    "true": b"true",
    "a number": b"7",
    "a text": b'"ok"',
    "an empty object": b"{}",
    "a list of numbers": b"[7]",
    "a list of nulls": b"[null]",
    "a list of lists": b"[[]]",
    "no UTF-8": b"\xff\xfe\x00",
    "an envelope of error": envelope(False, 400, "Error", message=ECHO),
    "an envelope that contradicts itself": envelope([], 500),
    "an envelope without a code": envelope([], None),
    "an envelope without an answer": envelope(None),
    "an envelope of nothing": envelope(False),
    "an envelope of a number": envelope(7),
    "an envelope of numbers": envelope([7]),
}
BLIND = [name for name in CALL if "event" in name or "activate" in name]
"""Neither the events host nor an activation documents a body: whatever does not speak of trouble is taken."""
UNSEEN = ("ChargeOver bulk", "ChargeOver in bulk, send")
"""What a bulk upload answers is not documented, so its reply decides nothing; see `READ_BACK`."""


@pytest.mark.parametrize("call", [call for call in CALLS if call.name not in UNSEEN], ids=lambda call: call.name)
def test_a_success_that_does_not_say_so_is_none(call: Call) -> None:
    """Pages, errors inside a 200 and wrong types: a write is in doubt, a question goes unanswered."""
    bodies = NEVER_A_SUCCESS if call.name in BLIND else NEVER_AN_ANSWER
    statuses = [200] if call.effect is READ else [200, 201, 202, 203, 205, 206, 207, 226]
    expected = N if call.effect is READ else D

    wrong = {
        (status, name): found
        for status, (name, body) in product(statuses, bodies.items())
        if (found := ends(call, status, body)) is not expected
    }

    assert wrong == {}


@pytest.mark.parametrize("name", BLIND)
def test_a_body_that_speaks_of_trouble_is_no_success(name: str) -> None:
    """201 has no documented body; whatever tells of a failure, however deep, makes a doubt: a replay is harmless."""
    bodies = [
        b'{"success":false,"message":"stream is paused"}', b'{"status":"error"}', b'"error"', b"Service Unavailable",
        b'{"errors":null,"failed":2}', b'[{"error":"bad event"}]', b'{"response":{"errors":["x"]}}',
        b'{"result":{"success":false}}', b'{"errors":{"0":{"token":["too long"]}}}', b'{"ok":false}',
    ]  # fmt: skip
    wrong = [
        (status, body) for status, body in product((200, 201, 202), bodies) if ends(CALL[name], status, body) is not D
    ]
    assert wrong == []


@pytest.mark.parametrize("name", BLIND)
@pytest.mark.parametrize(
    "body", [b"", b"ok", b"{}", b"[]", b"null", b'{"accepted":2}', b'{"errors":[],"failed":0,"success":true}']
)
@pytest.mark.parametrize(
    ("status", "expected"), [(200, A), (201, A), (202, A), (204, A), (203, D), (205, D), (206, D), (207, D), (226, D)]
)
def test_an_event_is_taken_by_its_status(name: str, body: bytes, status: int, expected: object) -> None:
    """201 and no body is what is documented; where parts may have another fate (207), it is a doubt."""
    assert ends(CALL[name], status, body) is expected


@pytest.mark.parametrize("call", [call for call in CALLS if call.effect is READ], ids=lambda call: call.name)
@pytest.mark.parametrize("status", [201, 202, 203, 204, 205, 206, 207, 226])
def test_only_a_200_answers_a_question(call: Call, status: int) -> None:
    """A list that is yet to come (202) or a part of one (206) looks like an empty list, and would bill twice."""
    assert ends(call, 200, EMPTY[call.client]) is A
    assert ends(call, status, EMPTY[call.client]) is N


MAXIO_USAGES = [
    # the usage in the reply                   the client  the destination
    ({"id": 5, "quantity": 1}, A, A),
    ({"id": "5", "quantity": "1.0"}, A, A),
    ({"id": 5, "quantity": 1.0, "memo": None}, A, A),
    ({"id": 5, "quantity": 2}, A, D),
    ({"id": 5, "quantity": -1}, A, D),
    ({"id": 5, "quantity": None}, A, D),
    ({"id": 5, "quantity": "one"}, A, D),
    ({"id": 5, "quantity": "NaN"}, A, D),
    ({"id": 5, "quantity": "Infinity"}, A, D),
    ({"id": 5, "quantity": True}, A, D),
    ({"id": 5, "quantity": [1]}, A, D),
    ({"id": 5, "quantity": {}}, A, D),
    ({"id": 5}, A, D),
    ({"quantity": 1}, D, D),
    ({"id": None, "quantity": 1}, D, D),
    ({"id": "", "quantity": 1}, D, D),
    ({"id": True, "quantity": 1}, D, D),
    ({"id": {}, "quantity": 1}, D, D),
    ([{"id": 5, "quantity": 1}], D, D),
    (None, D, D),
    (5, D, D),
]


@pytest.mark.parametrize(("reply", "client", "sent"), MAXIO_USAGES)
def test_a_created_maxio_usage(reply: object, client: object, sent: object) -> None:
    """The client asks for a usage with an id, the destination for the very quantity that it sent."""
    body = json.dumps({"usage": reply}).encode()

    assert ends(CALL["Maxio create usage"], 200, body) is client
    assert ends(CALL["Maxio metered, send"], 200, body) is sent


MEMO = f"{TOKEN} October"
THERE, ABSENT, ANOTHER, OPEN = "there", "absent", "there with another quantity", "still in doubt"
MAXIO_LISTS = [
    # a row of the list                                         the client  settling  the records
    ({"id": 5, "quantity": 1, "memo": MEMO}, A, THERE, A),
    ({"id": "5", "quantity": "1.0", "memo": MEMO}, A, THERE, A),
    ({"id": 5, "quantity": 2, "memo": MEMO}, A, ANOTHER, A),
    ({"id": 5, "quantity": None, "memo": MEMO}, A, ANOTHER, N),
    ({"id": 5, "quantity": "one", "memo": MEMO}, A, ANOTHER, N),
    ({"id": 5, "quantity": "NaN", "memo": MEMO}, A, ANOTHER, N),
    ({"id": 5, "memo": MEMO}, A, ANOTHER, N),
    ({"id": 5, "quantity": 1, "memo": None}, A, ABSENT, A),
    ({"id": 5, "quantity": 1, "memo": ["odd"]}, A, ABSENT, A),
    ({"id": 5, "quantity": 1}, A, ABSENT, A),
    ({"quantity": 1, "memo": MEMO}, N, N, N),
    ({"id": None, "quantity": 1, "memo": MEMO}, N, N, N),
    ({"id": "new-style-id", "quantity": 1, "memo": MEMO}, N, N, N),
    ({"id": True, "quantity": 1, "memo": MEMO}, N, N, N),
    ([], N, N, N),
]


@pytest.mark.parametrize(("row", "client", "settled", "records"), MAXIO_LISTS)
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_listed_maxio_usage(row: object, client: object, settled: object, records: object, wrapped: bool) -> None:
    """A row that cannot be placed makes the whole list unreadable; one that can is weighed by its quantity."""
    body = json.dumps([{"usage": row} if wrapped and row else row]).encode()

    assert ends(CALL["Maxio list usages"], 200, body) is client
    assert settles(CALL["Maxio metered, settle"], body) == settled
    assert ends(CALL["Maxio metered, list records"], 200, body) is records


def settles(call: Call, body: bytes) -> object:
    """Return what settling says of the token when a list comes back."""
    answers: dict[str, object] = {}
    ended = outcome(lambda: answers.update(call.act(call.client("", lambda: Site(read=(200, body)), Timeouts()))))
    if ended is not A:
        return ended
    if TOKEN not in answers:
        return OPEN
    return {Receipt: THERE, Refused: ANOTHER}.get(type(answers[TOKEN]), ABSENT)


# --- questions about single things --------------------------------------------------------------------------------

STANDING = {
    "id": 7,
    "state": "active",
    "reference": "acct",
    "current_period_started_at": "2026-10-01T00:00:00-05:00",
    "current_period_ends_at": "2026-11-01T00:00:00-05:00",
    "product": {"id": 1, "product_family": {"id": 3}},
}
PART = {"id": 61001, "handle": "calls", "kind": "metered_component", "product_family_id": 3}
STREAMED = {**PART, "kind": "event_based_component"}
PAST = {
    "total_usage_quantity": "1.0",
    "billing_period_starts_at": "2026-09-01T00:00:00-05:00",
    "billing_period_ends_at": "2026-10-01T00:00:00-05:00",
}
LINE = {"id": 70, "component_id": 61001, "unit_balance": "5.0", "historic_usages": [PAST]}
TAKEN = {"id": 5, "quantity": -1, "memo": TOKEN, "created_at": "2026-10-05T00:00:00-05:00"}
NOTED = {"memo": TOKEN, "previous_unit_balance": "5.0", "new_unit_balance": 4}
SOUND: dict[str, Any] = {
    "/site.json": {"site": {"id": 1}},
    "/components.json": [{"component": PART}],
    "/components/lookup.json": {"component": PART},
    "/components/61001/price_points.json": [{"price_points": {"id": 4, "handle": "standard"}}],
    "/subscriptions.json": [{"subscription": STANDING}],
    "/subscriptions/lookup.json": {"subscription": STANDING},
    "/subscriptions/7.json": {"subscription": STANDING},
    "/subscriptions/7/components.json": [{"component": LINE}],
    "/subscriptions/7/components/61001.json": {"component": LINE},
    "/subscriptions/7/components/61001/usages.json": [{"usage": TAKEN}],
    "/subscriptions/7/events.json": [
        {"event": {"id": 9, "created_at": "2026-10-05T00:00:00-05:00", "event_specific_data": NOTED}}
    ],
    "/subscriptions/7/renewals/preview.json": {
        "renewal_preview": {"line_items": [{"component_id": 61001, "amount_in_cents": 5}]}
    },
}
"""What a site answers to each question when all is well."""


class Shelf(Site):
    """A site with an answer for each path; those in `instead` are spoilt. It takes everything that is written."""

    def __init__(self, instead: Mapping[str, tuple[int, bytes]], shelf: Mapping[str, Any] = SOUND) -> None:
        super().__init__(write=(201, b""), headers={"Date": "Mon, 05 Oct 2026 12:00:00 GMT"})
        self.asked: set[str] = set()
        self._instead, self._shelf = instead, shelf

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        """Give the answer that belongs to the path; a 404 where there is none."""
        path = str(request.path_url).partition("?")[0]
        if request.method == "GET" or path == PREVIEW:
            self.asked.add(path)
            sound = (200, json.dumps(self._shelf[path]).encode()) if path in self._shelf else (404, b"")
            self.read = self._instead.get(path, sound)
            request.method = "GET"  # The preview is a question, although it is posted.
        return super().send(request)


_DAY = {"period_start": pd.Timestamp("2026-10-05", tz="UTC"), "period_end": pd.Timestamp("2026-10-06", tz="UTC")}
ONE_PROPOSAL = pd.DataFrame(
    [
        {
            "quantity": "-1",
            "subscription": "7",
            "component": "61001",
            "open_from": pd.Timestamp("2026-10-01", tz="UTC"),
            **_DAY,
        }
    ]
)
STREAM_KEYS = {"stream": "s", "component": "handle:calls", "property": "units"}
EVENT = Delivery(
    TOKEN, "i", 0, Decimal(1), {"stream": "s", "account": "acct"},
    '{"chargify":{"timestamp":"2026-10-05T00:00:00Z"}}', NOW - timedelta(hours=1), 1,
)  # fmt: skip


def by_handle(client: Any) -> Any:
    """Return a metered component that is named by its handle, with a price point, and accounts by reference."""
    keys = {"component": "handle:calls", "price_point": "handle:standard"}
    return destination(MaxioMetered, client, subscription_by="reference", **keys)


def streamed(client: Any, by: str = "account_id") -> Any:
    """Return a stream whose component is named by its handle."""
    return destination(MaxioEvents, client, subscription_by=by, **STREAM_KEYS)


ONE, LISTED, BY_REFERENCE = "/subscriptions/7.json", "/subscriptions.json", "/subscriptions/lookup.json"
CATALOGUE, BY_HANDLE, POINTS = "/components.json", "/components/lookup.json", "/components/61001/price_points.json"
LINES, LINE_OF_ONE = "/subscriptions/7/components.json", "/subscriptions/7/components/61001.json"
USAGES, NOTES = "/subscriptions/7/components/61001/usages.json", "/subscriptions/7/events.json"
PREVIEW = "/subscriptions/7/renewals/preview.json"
QUESTIONS: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    # what is asked, and the paths that it reads
    "metered, resolve by id": (lambda site: metered(site).resolve(["7"]), {CATALOGUE, ONE}),
    "metered, resolve by reference": (
        lambda site: by_handle(site).resolve(["acct"]),
        {BY_HANDLE, BY_REFERENCE, POINTS},
    ),
    "metered, resolve many": (
        lambda site: metered(site).resolve([*map(str, range(7, 28))]),
        {CATALOGUE, LISTED, *(f"/subscriptions/{n}.json" for n in range(8, 28))},
    ),
    "metered, judge": (
        lambda site: metered(site).judge(ONE_PROPOSAL),
        {ONE, LINE_OF_ONE},
    ),
    "metered, recheck": (lambda site: metered(site).recheck([DELIVERY], NOW), {ONE}),
    "metered, recheck a deduction": (
        lambda site: metered(site).recheck([DEDUCTION], NOW),
        {ONE, LINE_OF_ONE},
    ),
    "metered, price": (lambda site: metered(site).priced({"7": Decimal(2)}), {CATALOGUE, LINE_OF_ONE, PREVIEW}),
    "metered, settle a deduction": (lambda site: metered(site).settle([DEDUCTION], NOW), {USAGES, NOTES}),
    "events, resolve": (lambda site: streamed(site).resolve(["acct"]), {BY_HANDLE, BY_REFERENCE, PREVIEW}),
    "events, resolve by id": (lambda site: streamed(site, "subscription_id").resolve(["7"]), {BY_HANDLE, ONE, PREVIEW}),
    "events, recheck": (lambda site: streamed(site).recheck([EVENT], NOW), {BY_HANDLE, BY_REFERENCE}),
    "events, settle": (lambda site: streamed(site).settle([EVENT], NOW), {BY_HANDLE, BY_REFERENCE}),
    "events, totals": (lambda site: streamed(site).totals(["7"]), {BY_HANDLE, ONE, LINES}),
}
CHECKS: dict[str, tuple[Callable[[Any], Any], set[str], Any]] = {
    "metered, check": (lambda site: metered(site).check(), {CATALOGUE}, PART),
    "metered, check by handle": (lambda site: by_handle(site).check(), {BY_HANDLE, POINTS}, PART),
    "events, check": (lambda site: streamed(site).check(), {BY_HANDLE}, STREAMED),
    "the site, read": (lambda site: site.read_site(), {"/site.json"}, PART),
}
EVERY_QUESTION = {
    **{name: (act, paths, SOUND) for name, (act, paths) in QUESTIONS.items()},
    **{
        name: (act, paths, {**SOUND, CATALOGUE: [{"component": part}], BY_HANDLE: {"component": part}})
        for name, (act, paths, part) in CHECKS.items()
    },
}


def asked(name: str, instead: Mapping[str, tuple[int, bytes]]) -> tuple[object, set[str]]:
    """Return how a question ends on a site with these spoilt answers, and which paths it read."""
    act, _, shelf = EVERY_QUESTION[name]
    site = Shelf(instead, shelf)
    client = maxio_site("", lambda: site, Timeouts())
    return outcome(lambda: act(client), SECRETS[maxio_site]), site.asked


NUMBERS = (None, True, 1.5, "odd", "", [], {}, [7])
WORDS = (None, True, 7, [], {})
MOMENTS = (None, True, 7, "odd", "2026-10-05T00:00:00", "20261005", [], {})
ODD_FIELDS: dict[str, tuple[object, ...]] = {
    "id": NUMBERS,
    "component_id": NUMBERS,
    "amount_in_cents": NUMBERS,
    "state": WORDS,
    "kind": WORDS,
    "current_period_started_at": (*MOMENTS, "2026-12-01T00:00:00-05:00"),
    "current_period_ends_at": MOMENTS,
    "product": (True, 7, "odd", [1], {"product_family": 7}, {"product_family": "odd"}),
    "unit_balance": (True, "odd", "NaN", [], {}),
    "historic_usages": (7, "odd", {"a": 1}, [7], [{}], *([{**PAST, name: None}] for name in PAST)),
}
ANOTHER_ONE: dict[str, dict[str, object]] = {
    # a sound answer about something else than was asked for
    ONE: {"id": 8},
    BY_REFERENCE: {"reference": "Acct"},
    BY_HANDLE: {"handle": "call"},
    LINE_OF_ONE: {"component_id": 61002},
}
NEED_NO_ID = {LINES, LINE_OF_ONE}
"""Where a row is named by its component, and its own id means nothing."""


def spoilt(path: str, sound: Any) -> Iterator[bytes]:
    """Yield bodies that are no answer at this path: of another shape, or with one field that is not as it has to be."""
    yield from NEVER_AN_ANSWER.values()
    listed = isinstance(sound, list)
    ((key, one),) = (sound[0] if listed else sound).items()
    if not listed:
        shapes = ([], [sound], one, {**sound, "errors": ["odd"]}, {key: None}, {key: []}, {key: "odd"}, {key: {}})
        yield from (json.dumps(shape).encode() for shape in shapes)
    fields = [(name, odd) for name, values in ODD_FIELDS.items() if name in one for odd in values]
    for name, odd in [*fields, *ANOTHER_ONE.get(path, {}).items()]:
        if name != "id" or path not in NEED_NO_ID:
            row = {key: {**one, name: odd}}
            yield json.dumps([row] if listed else row).encode()


@pytest.mark.parametrize("name", EVERY_QUESTION)
def test_an_odd_answer_to_any_question_concludes_nothing(name: str) -> None:
    """Each answer that a question needs is spoilt in every way: it is never taken for a no, nor for a yes."""
    _, paths, shelf = EVERY_QUESTION[name]
    ended, read = asked(name, {})
    assert (ended, read) == (A, paths)

    wrong = {
        (path, body): found
        for path in sorted(paths & shelf.keys())
        for body in spoilt(path, shelf[path])
        if (found := asked(name, {path: (200, body)})[0]) is not N
    }

    assert wrong == {}


CREATED = [
    # the envelope                                          an answer or D
    (envelope({"id": 7}, 201), A),
    (envelope({"id": "7"}, "201"), A),
    (envelope({"id": 7}, 200, details=[]), A),
    (envelope({"id": None}, 201), D),
    (envelope({"id": ""}, 201), D),
    (envelope({"id": True}, 201), D),
    (envelope({"id": [7]}, 201), D),
    (envelope({}, 201), D),
    (envelope(True, 201), D),
    (envelope([{"id": 7}], 201), D),
    (envelope({"id": 7}, 201, "Error"), D),
    (envelope({"id": 7}, 400), D),
    (envelope({"id": 7}, 201.5), D),
    (envelope({"id": 7}, None), D),
]


@pytest.mark.parametrize(("body", "expected"), CREATED)
def test_a_stored_chargeover_usage(body: bytes, expected: object) -> None:
    """Only an envelope that says OK, with a code of success and an id, is a receipt: singly and within a batch."""
    batch = envelope({"_bulk": [json.loads(body)] * 2})

    assert ends(CALL["ChargeOver store usage"], 201, body) is expected
    assert ends(CALL["ChargeOver singly, send"], 201, body) is expected
    part = R if json.loads(body)["code"] == 400 else expected
    assert ends(CALL["ChargeOver in batches, send"], 200, batch) is part


PARTS = {
    # the code of one record of a batch: what it means if both are answered so, and if the other was stored
    **dict.fromkeys((400, 404, 422), (R, A)),
    429: (N, A),
    **dict.fromkeys((0, 100, 204, 301, 401, 402, 403, 405, 408, 409, 413, 500, 502, 503, 999), (D, D)),
}


@pytest.mark.parametrize(("code", "alone", "beside"), [(code, *means) for code, means in PARTS.items()])
def test_a_record_of_a_batch_has_an_outcome_of_its_own(code: int, alone: object, beside: object) -> None:
    """Throttled and refused records were not stored; what is unclear keeps the receipts of those that are not."""
    bad = json.loads(envelope(False, code, "Error", message=ECHO))
    good = json.loads(envelope({"id": 7}, 201))
    call = CALL["ChargeOver in batches, send"]
    site = Site((200, envelope({"_bulk": [good, bad]})), (200, EMPTY[chargeover_site]))

    assert ends(call, 200, envelope({"_bulk": [bad, bad]})) is alone
    assert ends(call, 200, envelope({"_bulk": [good, bad]})) is beside
    try:
        receipts: Sequence[Receipt] = call.act(chargeover_site("", lambda: site, Timeouts()))
    except InDoubt as doubt:
        receipts = doubt.receipts
    assert [receipt.token for receipt in receipts] == [TOKEN]


@pytest.mark.parametrize("answers", [None, True, {}, [], [1, 2], [None, None], ["ok"], [{}, {}], {"0": {}}])
def test_a_batch_without_an_envelope_for_each_record_is_in_doubt(answers: object) -> None:
    """Two records were sent: fewer answers, or others, are none."""
    for response in (answers, {"_bulk": answers}):
        assert ends(CALL["ChargeOver batch"], 200, envelope(response)) is D
        assert ends(CALL["ChargeOver in batches, send"], 200, envelope(response)) is D


def held(**changes: object) -> dict[str, object]:
    """Return a usage record of the account."""
    return {"usage_history_id": 9, "external_key": TOKEN, "usage_value": 1, "line_item_id": 854, **changes}


CHARGEOVER_LISTS = [
    # the rows                                                  the list  the key  settling  the records
    ([], A, A, ABSENT, A),
    ([held()], A, A, THERE, A),
    ([held(usage_history_id="9", usage_value="1.00", line_item_id="854")], A, A, THERE, A),
    ([held(usage_value=2)], A, A, ANOTHER, A),
    ([held(usage_value="one")], A, A, ANOTHER, N),
    ([held(usage_value=None)], A, A, ANOTHER, N),
    ([held(usage_value="NaN")], A, A, ANOTHER, N),
    ([held(usage_value=True)], A, A, ANOTHER, N),
    ([held(), held(usage_history_id=10)], A, A, ANOTHER, A),
    ([held(), held()], A, A, THERE, A),
    ([held(usage_history_id=None)], N, A, ANOTHER, N),
    ([held(usage_history_id=[9])], N, A, ANOTHER, N),
    ([held(external_key=OTHER)], A, N, N, A),
    ([held(external_key=None)], A, N, N, A),
    ([held(external_key=[TOKEN])], A, N, N, N),
    ([held(external_key=KEY)], A, N, N, A),
    ({"0": held()}, N, N, N, N),
    ([held(), 7], N, N, N, N),
]


@pytest.mark.parametrize(("rows", "listed", "by_key", "settled", "records"), CHARGEOVER_LISTS)
def test_a_listed_chargeover_usage(
    rows: object, listed: object, by_key: object, settled: object, records: object
) -> None:
    """A filter that is not obeyed proves nothing; what bears our key is weighed by its value, and counted."""
    body = envelope(rows)

    assert ends(CALL["ChargeOver query"], 200, body) is listed
    assert ends(CALL["ChargeOver query a key"], 200, body) is by_key
    assert settles(CALL["ChargeOver, settle"], body) == settled
    assert ends(CALL["ChargeOver, list records"], 200, body) is records


BULK_REPLIES = [
    # status, body: what the client says of it
    (201, envelope({"id": 1234}, 201), A),
    (201, b'{"response":{"id":1234}}', A),
    (200, envelope({"result": True}), A),
    (200, envelope(False, 400, "Error", message=ECHO), D),
    (200, b"", D),
    (200, b"<html>", D),
    (400, envelope(False, 400, "Error"), D),
    (429, envelope(False, 429, "Error"), D),
    (500, b"<html>", D),
    (504, b"", D),
]
READ_BACK = [
    # what the account lists afterwards                    the records that get a receipt
    ([held(), held(usage_history_id=10, external_key=OTHER)], [TOKEN, OTHER]),
    ([held(usage_history_id=10, external_key=OTHER)], [OTHER]),
    ([held(), held(usage_history_id=10, external_key=OTHER, usage_value=2)], [TOKEN]),
    ([held(), held(usage_history_id=10)], []),
    ([held(external_key=None)], []),
    ([], []),
]


@pytest.mark.parametrize(("status", "body", "client"), BULK_REPLIES)
@pytest.mark.parametrize(("rows", "proven"), READ_BACK)
def test_a_bulk_is_worth_what_can_be_read_back(
    status: int, body: bytes, client: object, rows: list[Any], proven: list[str]
) -> None:
    """Whatever the reply: a receipt for each record that is there once with its value, doubt about all others."""
    site = Site((status, body), (200, envelope(rows)))
    call = CALL["ChargeOver in bulk, send"]

    assert ends(CALL["ChargeOver bulk"], status, body) is client
    assert ends(call, status, body, site.read) is (A if len(proven) == 2 else D)
    try:
        receipts: Sequence[Receipt] = call.act(chargeover_site("", lambda: site, Timeouts()))
    except InDoubt as doubt:
        receipts = doubt.receipts
    assert [receipt.token for receipt in receipts] == proven


AFTER_A_WRITE = [
    # what was sent, and the reply after which the site is asked about it
    ("Maxio metered, send a deduction", 200, b'{"usage":{"id":5,"quantity":-1}}'),
    ("ChargeOver singly, send", 400, envelope(False, 400, "Error")),
    ("ChargeOver in batches, send", 200, envelope({"_bulk": [json.loads(envelope(False, 400, "Error"))] * 2})),
    ("ChargeOver in bulk, send", 201, envelope({"id": 1}, 201)),
]


@pytest.mark.parametrize(("name", "status", "body"), AFTER_A_WRITE, ids=[row[0] for row in AFTER_A_WRITE])
def test_a_question_after_a_write_never_undoes_it(name: str, status: int, body: bytes) -> None:
    """The write may be in the books: a failure of the question that follows it is a doubt, never "send it again"."""
    empty = EMPTY[CALL[name].client]
    failures = [(other, empty) for other in NAMED if by_status(other, READ) is not A]
    unreadable = [(200, text) for text in NEVER_AN_ANSWER.values() if text != b"{}"]

    found = [(read, ends(CALL[name], status, body, read)) for read in [*failures, *unreadable]]

    assert [(read, ended) for read, ended in found if ended is not D] == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [("7", 7.0), ("9" * 400, 86400.0), ("-5", None), ("soon", None), ("Wed, 21 Oct 2015 07:28:00 +" + "9" * 18, None)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_odd_headers_hide_no_reply(given: str, expected: float | None, status: int) -> None:
    """A wait without end is cut to a day, and a time that is none is none; so is the site's own clock."""
    site = Site(read=(status, b""), headers={"Retry-After": given, "Date": given})
    client = HttpClient("maxio:us:acme", "https://billing.example.com", (KEY, "x"), transport=impatient(lambda: site))

    with pytest.raises(NotApplied) as told:
        client.read("ask", "/")

    assert told.value.retry_after_seconds == expected
    assert client.server_time is None


# --- no reply at all ------------------------------------------------------------------------------------------------

Script = Callable[[socket.socket], None]
QUICK = Timeouts(connect=2, read=0.3, write=0.3)


def raw(text: bytes) -> Script:
    """Answer with these bytes and hang up."""
    return lambda connection: connection.sendall(text)


def hold(connection: socket.socket) -> None:
    """Say nothing until the client has gone."""
    connection.settimeout(2)
    connection.recv(1)


def reset(connection: socket.socket) -> None:
    """Break the connection off."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


def hang_up(connection: socket.socket) -> None:
    """End the connection without a word."""


@contextmanager
def listening(play: Script) -> Iterator[int]:
    """Play a script to each connection that comes in, from its first byte on; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                connection, _ = listener.accept()
                with connection:
                    try:
                        connection.settimeout(2)
                        play(connection)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        over.set()
        with suppress(OSError):
            socket.create_connection(listener.getsockname(), 1).close()
        thread.join(5)


def after_the_request(script: Script) -> Script:
    """Read a whole request, then play a script."""

    def play(connection: socket.socket) -> None:
        text = connection.recv(65536)
        head, _, body = text.partition(b"\r\n\r\n")
        length = next(
            (int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        while len(body) < length:
            body += connection.recv(65536)
        script(connection)

    return play


OK = b"HTTP/1.1 200 OK\r\n"
BROKEN_REPLIES: dict[str, tuple[Script, tuple[object, ...]]] = {
    # what the site does once it has the request              READ WRITE BULK
    "silence": (hold, (N, D, D)),
    "reset": (reset, (N, D, D)),
    "closed without a word": (hang_up, (N, D, D)),
    "a status cut short": (raw(b"HTTP/1."), (N, D, D)),
    # The status is whole, and all that the events host has to say; see `BLIND`.
    "headers cut short": (raw(OK + b"Content-Le"), (N, (D, A), (D, A))),
    "no HTTP": (raw(b"220 mail.example.com ESMTP\r\n"), (N, D, D)),
    "a status that is no number": (raw(b"HTTP/1.1 abc OK\r\n\r\n"), (N, D, D)),
    "a status below 100": (raw(b"HTTP/1.1 007 OK\r\n\r\n"), (N, D, D)),
    "headers without end": (raw(OK + b"X: y\r\n" * 200 + b"\r\n"), (N, D, D)),
    "a header without end": (raw(OK + b"X: " + b"y" * 70_000 + b"\r\n\r\n"), (N, D, D)),
    "a body cut short": (raw(OK + b"Content-Length: 50\r\n\r\n{"), (N, D, D)),
    "a chunk cut short": (raw(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"), (N, D, D)),
    "chunks without an end": (raw(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"), (N, D, D)),
    "a chunk of no length": (raw(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}"), (N, D, D)),
    "no gzip": (raw(OK + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"), (N, D, D)),
    "gzip cut short": (raw(OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"{}" * 99)[:20]), (N, D, D)),
    "a redirect to nowhere": (raw(b"HTTP/1.1 303 See\r\nLocation: http://[::1\r\n\r\n"), (M, D, D)),
    "a move to nowhere": (raw(b"HTTP/1.1 308 Moved\r\nLocation: http://[::1\r\n\r\n"), (M, M, M)),
    "continue, and no more": (raw(b"HTTP/1.1 100 Continue\r\n\r\n"), (N, D, D)),
}


def meets(call: Call, url: str, expected: Sequence[object], waits: Timeouts = QUICK) -> None:
    """Assert how a call ends at an address, by its effect; some rows allow two ends."""
    found = outcome(lambda: call.act(call.client(url, None, waits)), SECRETS[call.client])
    means = expected[EFFECTS.index(call.effect)]
    assert found in (means if isinstance(means, tuple) else (means,))


@EVERY_CALL
@pytest.mark.parametrize("name", BROKEN_REPLIES)
def test_a_request_whose_reply_is_broken(call: Call, name: str) -> None:
    """The request was there whole: only a question may be asked again."""
    script, expected = BROKEN_REPLIES[name]
    with listening(after_the_request(script)) as port:
        meets(call, f"http://127.0.0.1:{port}", expected)


@EVERY_CALL
def test_a_connection_that_breaks_before_the_request_is_read(call: Call) -> None:
    """Whether anything arrived depends on the moment: "not applied" only if the body had not been asked for."""
    with listening(reset) as port:
        meets(call, f"http://127.0.0.1:{port}", (N, (N, D), (N, D)))


def closed_port() -> int:
    """Return a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@EVERY_CALL
def test_nobody_listens(call: Call) -> None:
    """A refused connection: not a byte has left."""
    meets(call, f"http://127.0.0.1:{closed_port()}", (N, N, N))


@EVERY_CALL
def test_nobody_answers_the_telephone(call: Call) -> None:
    """A connection that does not come about in time: not a byte has left."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        meets(call, f"http://127.0.0.1:{listener.getsockname()[1]}", (N, N, N), Timeouts(0.2, 1, 1))
        for one in waiting:
            one.close()


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Have an environment without proxies, to set what a company sets."""
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


HOST = "billing.example.com"


@EVERY_CALL
def test_a_name_that_leads_nowhere(call: Call, outside: pytest.MonkeyPatch) -> None:
    """The name cannot be resolved: not a byte has left."""

    def nowhere(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    outside.setattr(socket, "getaddrinfo", nowhere)

    meets(call, f"https://{HOST}", (N, N, N))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """Give a server's side of TLS, and the certificate that vouches for it."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    today = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = made.public_bytes(serialization.Encoding.PEM)
    shape = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "site.pem").write_bytes(key.private_bytes(*shape) + public)
    (folder / "authority.pem").write_bytes(public)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "site.pem")
    return context, folder / "authority.pem"


@EVERY_CALL
def test_a_certificate_that_nobody_vouches_for(call: Call, tls: tuple[ssl.SSLContext, Path]) -> None:
    """Verification is never off: nothing was sent, and a person has to look."""
    context, _ = tls

    def greet(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True):
            pass

    with listening(greet) as port:
        meets(call, f"https://127.0.0.1:{port}", (M, M, M))


HANDSHAKES: dict[str, tuple[Script, tuple[object, ...]]] = {
    # what the site does instead of a handshake       READ WRITE BULK
    "plain http": (raw(b"HTTP/1.1 400 Bad Request\r\n\r\n"), (M, M, M)),
    "hangs up": (lambda connection: hang_up(connection) if connection.recv(9) else None, (N, N, N)),
    "resets": (lambda connection: reset(connection) if connection.recv(9) else None, (N, N, N)),
    "an alert": (lambda connection: connection.sendall(b"\x15\x03\x03\x00\x02\x02\x28"), (N, N, N)),
}


@EVERY_CALL
@pytest.mark.parametrize("name", HANDSHAKES)
def test_tls_that_does_not_come_about(call: Call, name: str) -> None:
    """Before the handshake is over no request has left: a person acts where there is no TLS, else it goes again."""
    script, expected = HANDSHAKES[name]
    with listening(script) as port:
        meets(call, f"https://127.0.0.1:{port}", expected)


def through(context: ssl.SSLContext, script: Callable[[ssl.SSLSocket], None]) -> Script:
    """Be a proxy: let a tunnel through to a site that reads a request, and then plays a script."""

    def play(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with context.wrap_socket(connection, server_side=True) as site:
            after_the_request(lambda _: script(site))(site)

    return play


def plain_bytes(site: ssl.SSLSocket) -> None:
    """Send what is no TLS in the middle of a TLS connection."""
    with socket.socket(fileno=socket.dup(site.fileno())) as beneath:
        beneath.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")


SITES_BEHIND_A_PROXY: dict[str, tuple[Callable[[ssl.SSLSocket], None], tuple[object, ...]]] = {
    # what happens in the tunnel after the request      READ WRITE BULK
    "reset": (reset, (N, D, D)),
    "closed": (hang_up, (N, D, D)),
    "silence": (hold, (N, D, D)),
    "plain bytes": (plain_bytes, (M, D, D)),
    "a body cut short": (raw(OK + b"Content-Length: 50\r\n\r\n{"), (N, D, D)),
}


@EVERY_CALL
@pytest.mark.parametrize("name", SITES_BEHIND_A_PROXY)
def test_a_request_that_left_through_a_proxy(
    call: Call, name: str, outside: pytest.MonkeyPatch, tls: tuple[ssl.SSLContext, Path]
) -> None:
    """The tunnel stood and the request was there: what breaks then is no fault of the proxy, and not "never sent"."""
    (context, authority), (script, expected) = tls, SITES_BEHIND_A_PROXY[name]
    outside.setenv("REQUESTS_CA_BUNDLE", str(authority))
    with listening(through(context, script)) as port:
        outside.setenv("HTTPS_PROXY", f"http://me:hush-31337@127.0.0.1:{port}")
        meets(call, f"https://{HOST}", expected)


PROXIES: dict[str, tuple[Script, tuple[object, ...]]] = {
    # what the proxy says to the tunnel               READ WRITE BULK
    "407": (after_the_request(raw(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")), (N, N, N)),
    "403": (after_the_request(raw(b"HTTP/1.1 403 Forbidden\r\n\r\n")), (N, N, N)),
    "502": (after_the_request(raw(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")), (N, N, N)),
    "nothing": (after_the_request(hang_up), (N, N, N)),
    "a reset": (after_the_request(reset), (N, N, N)),
}


@EVERY_CALL
@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_that_lets_nothing_through(call: Call, name: str, outside: pytest.MonkeyPatch) -> None:
    """Without a tunnel nothing reached the site."""
    script, expected = PROXIES[name]
    with listening(script) as port:
        outside.setenv("HTTPS_PROXY", f"http://me:hush-31337@127.0.0.1:{port}")
        meets(call, f"https://{HOST}", expected)


ENVIRONMENTS = {
    # what somebody set                                              READ WRITE BULK
    "a proxy that is gone": ({"HTTPS_PROXY": f"http://me:hush-31337@127.0.0.1:{closed_port()}"}, (N, N, N)),
    "a proxy of another kind": ({"HTTPS_PROXY": "ftp://me:hush-31337@127.0.0.1:9"}, (M, M, M)),
    "no proxy's address": ({"HTTPS_PROXY": "http://[::1"}, (M, M, M)),
    "certificates that are gone": ({"REQUESTS_CA_BUNDLE": "/nowhere/authority.pem"}, (M, M, M)),
}


@EVERY_CALL
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_environment_that_is_set_wrongly(call: Call, name: str, outside: pytest.MonkeyPatch) -> None:
    """Found before anything is opened; what was set is not repeated, for it may hold a password."""
    variables, expected = ENVIRONMENTS[name]
    for variable, value in variables.items():
        outside.setenv(variable, value)

    meets(call, f"https://{HOST}", expected)


def test_a_key_that_no_header_can_hold_is_told_without_it() -> None:
    """A letter that HTTP has no room for is found when the client is made, and the key stays out of the words."""
    with pytest.raises(Misconfigured, match="a character that no key has") as told:
        HttpClient("maxio:us:acme", f"https://{HOST}", ("schlüssel-31337", "x"))
    assert "31337" not in "".join(traceback.format_exception(told.value)).replace('"schlüssel-31337"', "")
