"""Every fault on every host, over a socket and behind a function call: what the client sees, and what is billed."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from usage_billing.sandbox import (
    ConnectionBroken,
    DirectSandbox,
    ReplyCutShort,
    ReplyTooLate,
    Sandbox,
    SandboxRefused,
)

WORLDS = Path(__file__).parents[2] / "include" / "sandbox" / "worlds"
MAXIO, EVENTS, TELCO = "maxio:us:acme", "maxio:us:orbit", "chargeover:telco"
BROKEN, CUT, LATE = "connection broken", "reply cut short", "no reply in time"
KEYS = {
    MAXIO: ("sandbox-acme-key", "x"),
    EVENTS: ("sandbox-orbit-key", "x"),
    TELCO: ("sandboxtelcopublickey00000000000", "sandboxtelcoprivatekey0000000000"),
}
USAGE = {
    MAXIO: ("/subscriptions/acct-0001/components/handle:api-calls/usages.json", {"usage": {"quantity": 5}}),
    EVENTS: ("/events/platform-events.json", {"account_id": "orbit-01", "units": 5}),
    TELCO: ("/usage", {"line_item_id": 854, "usage_value": 5}),
}

Outcome = tuple[int, bytes] | str


class Way:
    """One way to a sandbox: how to send, and how to let time pass."""

    def __init__(self, sandbox: Sandbox | DirectSandbox) -> None:
        self.sandbox = sandbox
        self.roots = {
            MAXIO: sandbox.maxio_url("acme"),
            EVENTS: f"{sandbox.events_url}/orbit",
            TELCO: f"{sandbox.chargeover_url('telco')}/api/v3",
        }

    def use(self, site: str, **options: Any) -> Outcome:
        """Send the usage of 5 that every test is about."""
        path, body = USAGE[site]
        return self.send(site, "POST", path, body, **options)

    def send(self, site: str, method: str, path: str, body: object = None, timeout: float = 10) -> Outcome:
        """Send a request; return status and body, or what the client saw instead."""
        prepared = requests.Request(method, self.roots[site] + path, json=body, auth=KEYS[site]).prepare()
        try:
            return self._send(prepared, timeout)
        except (requests.exceptions.ChunkedEncodingError, ReplyCutShort):
            return CUT
        except (requests.ReadTimeout, ReplyTooLate):
            return LATE
        except (requests.ConnectionError, ConnectionBroken):
            return BROKEN

    def billed(self, site: str) -> int:
        """Return what the site billed in all."""
        return int(sum(row.billed for row in self.sandbox.billed(site)))

    def passes(self, seconds: float, done: Callable[[], bool]) -> None:
        """Let time pass until something is done."""
        if isinstance(self.sandbox, DirectSandbox):
            self.sandbox.move_clock(advance_seconds=seconds)
        deadline = time.monotonic() + 5
        while not done() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _send(self, prepared: requests.PreparedRequest, timeout: float) -> Outcome:
        if isinstance(self.sandbox, DirectSandbox):
            content = prepared.body if isinstance(prepared.body, bytes) else b""
            reply = self.sandbox.request(prepared.method, prepared.url, prepared.headers, content, timeout)
            return reply.status, reply.body
        with requests.Session() as session:
            found = session.send(prepared, timeout=timeout)
            return found.status_code, found.content


@pytest.fixture(scope="module")
def ways() -> Iterator[dict[str, Way]]:
    """Start the shipped worlds behind both doors."""
    with ExitStack() as stack:
        yield {
            "served": Way(stack.enter_context(Sandbox([WORLDS]))),
            "direct": Way(stack.enter_context(DirectSandbox([WORLDS]))),
        }


@pytest.fixture(params=["served", "direct"])
def way(ways: dict[str, Way], request: pytest.FixtureRequest) -> Way:
    """Return one way, with the sandbox as its worlds say."""
    found = ways[request.param]
    found.sandbox.reset()
    return found


@pytest.mark.parametrize("site", [MAXIO, EVENTS, TELCO])
@pytest.mark.parametrize(
    ("kind", "seen", "billed"),
    [
        ("lost_reply", BROKEN, 5),
        ("reset", BROKEN, 0),
        ("server_error", 500, 0),
        ("server_error_after_commit", 500, 5),
        ("html_error", 502, 0),
        ("throttle", 429, 0),
        ("unauthorized", 401, 0),
        ("error_inside", 200, 0),
    ],
)
def test_writing_into_trouble(way: Way, site: str, kind: str, seen: int | str, billed: int) -> None:
    """Whatever the client sees, the bill tells whether the request had its effect; the next one is unharmed."""
    way.sandbox.fault(site, kind)
    outcome = way.use(site)
    assert (outcome if isinstance(outcome, str) else outcome[0]) == seen
    assert way.billed(site) == billed
    assert way.use(site)[0] in (200, 201)
    assert way.billed(site) == billed + 5


@pytest.mark.parametrize("site", [MAXIO, TELCO])
def test_a_success_with_a_spoilt_body_is_billed(way: Way, site: str) -> None:
    """A body that is cut, missing, or of another shape comes after the effect."""
    for kind in ("truncated_body", "empty_body", "wrong_type"):
        way.sandbox.fault(site, kind)
    cut, empty, wrong = (way.use(site) for _ in range(3))
    assert cut == CUT
    assert empty[1] == b""
    assert {type(value) for value in json.loads(wrong[1]).values()} == {str}
    assert {empty[0], wrong[0]} == {200 if site == MAXIO else 201}
    assert way.billed(site) == 15


def test_a_reply_without_a_body_cannot_be_cut(way: Way) -> None:
    """Where a success has no body, the connection just ends, and anything in a body is wrong."""
    way.sandbox.fault(EVENTS, "truncated_body")
    way.sandbox.fault(EVENTS, "wrong_type")
    assert [way.use(EVENTS), way.use(EVENTS)] == [BROKEN, (201, b'{"result":"true"}')]
    assert way.billed(EVENTS) == 10


@pytest.mark.parametrize(("site", "path"), [(MAXIO, "/site.json"), (TELCO, "/customer")])
def test_reading_into_trouble(way: Way, site: str, path: str) -> None:
    """Reads are struck too where that is asked for, and only there."""
    way.sandbox.fault(site, "reset")
    whole = way.send(site, "GET", path)
    way.sandbox.clear_faults()
    for kind in ("reset", "lost_reply", "html_error", "truncated_body", "empty_body", "wrong_type", "error_inside"):
        way.sandbox.fault(site, kind, reads=True)
    way.sandbox.fault(site, "late_commit", reads=True, seconds=0, status=503)
    seen = [way.send(site, "GET", path) for _ in range(8)]
    assert [x if isinstance(x, str) else x[0] for x in seen] == [BROKEN, BROKEN, 502, CUT, 200, 200, 200, 503]
    assert len({whole[1], *(x[1] for x in seen if not isinstance(x, str))}) == 6
    assert way.send(site, "GET", path) == whole


def test_an_array_of_the_wrong_type_is_an_object(way: Way) -> None:
    """A list that should be an array comes as an object."""
    way.use(MAXIO)
    way.sandbox.fault(MAXIO, "wrong_type", reads=True)
    status, body = way.send(MAXIO, "GET", USAGE[MAXIO][0])
    assert (status, list(json.loads(body))) == (200, ["0"])


def test_an_error_in_a_success_has_the_shape_of_its_site(way: Way) -> None:
    """Each site wraps the error as it wraps its others."""
    for site in (MAXIO, TELCO):
        way.sandbox.fault(site, "error_inside")
    assert json.loads(way.use(MAXIO)[1]) == {"errors": ["Something went wrong."]}
    envelope = json.loads(way.use(TELCO)[1])
    assert (envelope["code"], envelope["status"], envelope["response"]) == (500, "Error", False)


def test_a_fault_may_act_against_its_habit(way: Way) -> None:
    """A page of HTML with a 200 after the effect, an empty body without it: both are possible in life."""
    way.sandbox.fault(MAXIO, "html_error", status=200, carried_out=True)
    way.sandbox.fault(MAXIO, "empty_body", carried_out=False)
    way.sandbox.fault(MAXIO, "error_inside", carried_out=True)
    assert [way.use(MAXIO)[0] for _ in range(3)] == [200, 200, 200]
    assert way.billed(MAXIO) == 10


@pytest.mark.parametrize("site", [MAXIO, EVENTS, TELCO])
@pytest.mark.parametrize("kind", ["late_commit", "late_arrival"])
@pytest.mark.parametrize(("status", "seen"), [(None, BROKEN), (503, 503)])
def test_a_late_request_lands_after_the_client_was_told_otherwise(
    way: Way, site: str, kind: str, status: int | None, seen: int | str
) -> None:
    """The client hears at once that it failed; a moment later the usage is there, once."""
    way.sandbox.fault(site, kind, seconds=0.3, status=status)
    outcome = way.use(site)
    assert (outcome if isinstance(outcome, str) else outcome[0]) == seen
    assert way.billed(site) == 0
    way.passes(0.3, lambda: way.billed(site) == 5)
    assert way.billed(site) == 5


def test_a_late_request_that_is_refused_changes_nothing(way: Way) -> None:
    """A wrong key does not become right by being late, whether it is looked at first or last."""
    good = KEYS[MAXIO]
    KEYS[MAXIO] = ("wrong", "x")
    try:
        for kind in ("late_commit", "late_arrival", "hang"):
            way.sandbox.fault(MAXIO, kind, seconds=0.05)
        assert [way.use(MAXIO), way.use(MAXIO), way.use(MAXIO)[0]] == [BROKEN, BROKEN, 401]
    finally:
        KEYS[MAXIO] = good
    way.passes(0.1, lambda: True)
    assert way.billed(MAXIO) == 0


@pytest.mark.parametrize("kind", ["late_commit", "late_arrival"])
def test_nothing_lands_that_was_sent_before_a_reset(way: Way, kind: str) -> None:
    """A sandbox that began again is not changed by a request to the one before it."""
    way.sandbox.fault(MAXIO, kind, seconds=0.1)
    way.use(MAXIO)
    way.sandbox.reset()
    way.sandbox.fault(MAXIO, kind, seconds=0.2)
    way.send(MAXIO, "POST", USAGE[MAXIO][0], {"usage": {"quantity": 8}})
    # Once the later one is there, the earlier one has had its moment.
    way.passes(0.2, lambda: way.billed(MAXIO) >= 8)
    assert way.billed(MAXIO) == 8


def test_a_hang_beyond_the_clients_patience(way: Way) -> None:
    """The client gives up, and the usage is there all the same in the end."""
    way.sandbox.fault(MAXIO, "hang", seconds=0.4)
    assert way.use(MAXIO, timeout=0.1) == LATE
    assert way.billed(MAXIO) == 0
    way.passes(0.4, lambda: way.billed(MAXIO) == 5)
    assert way.billed(MAXIO) == 5


def test_a_batch_done_by_half_answers_for_each_part(way: Way) -> None:
    """Every other part is told an error of its own and not stored; the others are."""
    way.sandbox.fault(TELCO, "partial_bulk")
    part = {"request_method": "POST", "uri": "/api/v3/usage", "payload": USAGE[TELCO][1]}
    status, body = way.send(TELCO, "POST", "/_bulk", [part] * 25)
    codes = [reply["code"] for reply in json.loads(body)["response"]["_bulk"]]
    assert (status, codes) == (200, [201, 429, 201, 400, 201, 500] * 4 + [201])
    assert way.billed(TELCO) == 65
    way.sandbox.fault(TELCO, "partial_bulk", status=429)
    _, body = way.send(TELCO, "POST", "/_bulk", [part] * 4)
    assert [reply["code"] for reply in json.loads(body)["response"]["_bulk"]] == [201, 429, 201, 429]


@pytest.mark.parametrize(
    ("site", "path"), [(EVENTS, "/events/platform-events/bulk.json"), (TELCO, "/usage/_action/bulk")]
)
def test_a_bulk_request_breaks_after_half_of_it(way: Way, site: str, path: str) -> None:
    """The first half is stored, then the site breaks; nothing in the reply tells."""
    way.sandbox.fault(site, "partial_bulk", status=503)
    records = [USAGE[site][1]] * 10
    assert way.send(site, "POST", path, records)[0] == 503
    assert way.billed(site) == 25
    assert way.send(site, "POST", path, records)[0] == 201
    assert way.billed(site) == 75


def test_only_a_bulk_request_is_done_by_half(way: Way) -> None:
    """The fault passes over single requests, and waits; a bad bulk request is refused as ever."""
    way.sandbox.fault(EVENTS, "partial_bulk", count=2)
    assert way.use(EVENTS)[0] == 201
    assert way.send(EVENTS, "POST", "/events/platform-events/bulk.json", {"a": 1})[0] == 422
    assert len(way.sandbox.control("GET", "faults")["faults"]) == 1
    assert way.billed(EVENTS) == 5


@pytest.mark.parametrize(
    "order", [{"carried_out": "yes"}, {"reads": 1}, {"seconds": -1}, {"count": None}, {"status": "x"}]
)
def test_orders_that_make_no_sense_are_refused(way: Way, order: dict[str, Any]) -> None:
    """A fault with a wrong detail is not taken."""
    with pytest.raises(SandboxRefused):
        way.sandbox.fault(MAXIO, "hang", **order)
