"""The control interface: clock, switches, faults, limits, counts."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from usage_billing.sandbox import Sandbox, SandboxRefused

ACME = "maxio:us:acme"
TELCO = "chargeover:telco"
WORLDS = Path(__file__).parents[3] / "include" / "sandbox" / "worlds"


def test_summary_names_sites_and_clock(bench: Any) -> None:
    """The root tells which sites are here and what time it is for them."""
    summary = bench.control("GET", "")
    assert [site["site"] for site in summary["sites"]] == [ACME, "maxio:us:orbit", TELCO]
    assert summary["now"] == "2026-10-20T12:00:00+00:00"
    assert summary["version"]


def test_clock_stands_still_and_moves_forward_only(bench: Any) -> None:
    """The clock is frozen, moves by seconds or to a time, and never back."""
    before = bench.now()
    time.sleep(0.01)
    assert bench.now() == before
    assert bench.move_clock(advance_seconds=90).isoformat() == "2026-10-20T12:01:30+00:00"
    with pytest.raises(SandboxRefused, match="only moves forward"):
        bench.move_clock("2026-10-20T12:00:00Z")
    for order in ({}, {"now": "soon"}, {"later": 1}):
        with pytest.raises(SandboxRefused):
            bench.control("POST", "clock", order)


def test_clock_may_tick(tmp_path: Path) -> None:
    """With a rate of 1 the sandbox's time passes, and renewals come by themselves."""
    text = (WORLDS / "acme.yaml").read_text(encoding="utf-8")
    world = tmp_path / "acme.yaml"
    world.write_text(text.replace("rate: 0", "rate: 100000"), encoding="utf-8")
    with Sandbox([world]) as sandbox:
        first = sandbox.now()
        time.sleep(0.02)
        assert (sandbox.now() - first).total_seconds() > 1000
        sandbox.move_clock("2026-11-01T03:59:00Z")
        time.sleep(0.02)
        auth = ("sandbox-acme-key", "x")
        reply = requests.get(f"{sandbox.maxio_url('acme')}/invoices.json", auth=auth, timeout=10)
        assert len(reply.json()["invoices"]) == 12


def test_unknown_switches_list_the_known_ones(bench: Any) -> None:
    """A wrong name or value turns nothing, and the answer lists what there is."""
    with pytest.raises(SandboxRefused) as caught:
        bench.switch(ACME, uniqueness_token="sometimes", mood="good", memo_limit="255")
    told = str(caught.value)
    assert "unknown switch 'mood'" in told
    assert "does not know 'sometimes'" in told
    assert '"ignored"' in told
    assert bench.control("GET", f"switches?site={ACME}")[ACME]["memo_limit"] == "none"
    with pytest.raises(SandboxRefused, match="unknown site"):
        bench.switch("maxio:eu:acme", memo_limit="255")


def test_switches_belong_to_a_site(bench: Any) -> None:
    """A switch turned on one site leaves the other alone."""
    bench.switch(ACME, not_found_body="html")
    assert bench.control("GET", "switches")["maxio:us:orbit"]["not_found_body"] == "json"


def test_lost_reply_commits_and_drops_the_connection(bench: Any, acme: Any) -> None:
    """The effect is there, the client sees a connection that ends without a byte."""
    bench.fault(ACME, "lost_reply")
    with pytest.raises(requests.ConnectionError):
        acme.use(5)
    assert acme.balance() == 5
    assert acme.use(1).status_code == 200


def test_lost_reply_on_every_host(bench: Any, orbit: Any, telco: Any) -> None:
    """Events and ChargeOver lose replies in the same way."""
    bench.fault("maxio:us:orbit", "lost_reply", route="bulk_events")
    bench.fault(TELCO, "lost_reply", route="bulk_usage")
    with pytest.raises(requests.ConnectionError):
        orbit.send(orbit.event(1), orbit.event(2))
    with pytest.raises(requests.ConnectionError):
        telco.post("usage/_action/bulk", [{"line_item_id": 854, "usage_value": 4}])
    assert bench.figures("maxio:us:orbit", "orbit-01", "platform-units")[1] == 3
    assert bench.figures(TELCO, "pkg-001", "voip")[1] == 4


def test_server_errors_with_and_without_effect(bench: Any, acme: Any) -> None:
    """A server error leaves nothing behind, or everything; its status may be chosen."""
    bench.fault(ACME, "server_error")
    bench.fault(ACME, "server_error_after_commit", status=502)
    assert [acme.use(5).status_code, acme.balance()] == [500, 0]
    assert [acme.use(5).status_code, acme.balance()] == [502, 5]


def test_throttle_by_switch(bench: Any, acme: Any, telco: Any) -> None:
    """A 429 has no effect; its body and headers are unsettled on both APIs."""
    bench.fault(ACME, "throttle", count=2)
    bench.fault(TELCO, "throttle", count=2)
    text = acme.use(1)
    assert (text.status_code, text.text[:24], text.headers.get("retry-after")) == (
        429,
        "Your request was denied ",
        None,
    )
    bench.switch(ACME, throttle_reply="json_retry_after")
    listed = acme.use(1)
    assert (listed.status_code, listed.headers["retry-after"]) == (429, "1")
    assert listed.json()["errors"]
    bare = telco.use(1)
    assert (bare.status_code, bare.json()["code"], bare.headers.get("retry-after")) == (429, 429, None)
    bench.switch(TELCO, throttle_retry_after="present")
    assert telco.use(1).headers["retry-after"] == "1"
    assert (bench.billed(ACME), bench.billed(TELCO)) == ([], [])


def test_hang_carries_the_request_out_after_all(bench: Any, acme: Any) -> None:
    """A client that gives up early finds its usage committed a moment later."""
    bench.fault(ACME, "hang", seconds=0.2)
    with pytest.raises(requests.ReadTimeout):
        acme.post(acme.path(), {"usage": {"quantity": 5}}, timeout=0.05)
    assert acme.balance() == 0
    deadline = time.monotonic() + 5
    while acme.balance() == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert acme.balance() == 5


def test_unauthorized_in_mid_run(bench: Any, acme: Any) -> None:
    """A key may stop working between two requests."""
    bench.fault(ACME, "unauthorized", after=1)
    assert [acme.use(1).status_code for _ in range(3)] == [200, 401, 200]


def test_faults_wait_for_their_requests(bench: Any, acme: Any) -> None:
    """A fault passes over reads, other routes and the first few, strikes as often as ordered, and can be called off."""
    bench.fault(ACME, "server_error", route="create_usage", after=1, count=2)
    assert acme.get("site.json").status_code == 200
    assert [acme.use(1).status_code for _ in range(4)] == [200, 500, 500, 200]
    bench.fault(ACME, "server_error", reads=True)
    assert acme.get("site.json").status_code == 500
    bench.fault(ACME, "throttle", count=5)
    assert [fault["count"] for fault in bench.control("GET", "faults")["faults"]] == [5]
    bench.clear_faults()
    assert acme.use(1).status_code == 200


@pytest.mark.parametrize(
    "order", [{"fault": "fire"}, {"fault": "hang", "seconds": "x"}, {"fault": "hang", "when": 1}, {"count": -1}]
)
def test_wrong_faults_are_refused(bench: Any, order: dict[str, Any]) -> None:
    """An order that cannot be carried out says why."""
    with pytest.raises(SandboxRefused):
        bench.control("POST", "faults", {"site": ACME, **order})


def test_requests_are_counted(bench: Any, acme: Any) -> None:
    """Requests are counted by what they could change, by route, and by refusal; the count can be restarted."""
    acme.use(1)
    acme.use("bad")
    acme.get("site.json")
    counts = bench.requests(ACME)
    assert (counts["reading"], counts["writing"], counts["refused"]) == (1, 2, 1)
    assert counts["by_route"] == {"create_usage": 2, "read_site": 1}
    bench.reset_requests()
    assert bench.requests(ACME)["writing"] == 0


def _slow_world(folder: Path) -> Path:
    text = (WORLDS / "acme.yaml").read_text(encoding="utf-8")
    world = folder / "acme.yaml"
    world.write_text(text.replace("queued: 8, hold_seconds: 0", "queued: 2, hold_seconds: 0.3"), encoding="utf-8")
    return world


@pytest.mark.parametrize(("clients", "throttled"), [(4, 0), (6, 0), (8, 2)])
def test_four_in_process_then_a_queue_then_429(tmp_path: Path, clients: int, throttled: int) -> None:
    """Four requests are worked on at once, a few more wait, those beyond are turned away; the peak is reported."""
    barrier = threading.Barrier(clients)

    def ask(url: str) -> int:
        barrier.wait(5)
        return requests.get(url, auth=("sandbox-acme-key", "x"), timeout=10).status_code

    with Sandbox([_slow_world(tmp_path)]) as sandbox, ThreadPoolExecutor(clients) as pool:
        statuses = list(pool.map(ask, [f"{sandbox.maxio_url('acme')}/site.json"] * clients))
        counts = sandbox.requests(ACME)
    assert statuses.count(429) == counts["throttled"] == throttled
    assert statuses.count(200) == clients - throttled
    # Requests that are turned away leave at once, so they need not all have been open together.
    assert counts["most_in_process"] >= min(clients, 7)


def test_records_are_listed_in_order(bench: Any, acme: Any, telco: Any) -> None:
    """Raw records come in the order in which they were stored, narrowed by component when asked."""
    for quantity in (3, 1, 2):
        acme.use(quantity, memo=f"m{quantity}")
    acme.use(9, component="handle:storage-gb")
    telco.use(4, external_key="k")
    assert [(row["quantity"], row["memo"]) for row in bench.records(ACME, "api-calls")] == [
        ("3", "m3"),
        ("1", "m1"),
        ("2", "m2"),
    ]
    assert len(bench.records(ACME)) == 4
    assert [(row["quantity"], row["external_key"], row["subscription"]) for row in bench.records(TELCO)] == [
        ("4", "k", "713")
    ]


def test_reset_begins_again(bench: Any, acme: Any) -> None:
    """A reset forgets books, clock, switches, faults and counts."""
    acme.use(5)
    bench.move_clock("2026-12-24T00:00:00Z")
    bench.switch(ACME, not_found_body="html")
    bench.fault(ACME, "throttle")
    bench.reset()
    assert (bench.billed(ACME), bench.now().isoformat()) == ([], "2026-10-20T12:00:00+00:00")
    assert bench.control("GET", f"switches?site={ACME}")[ACME]["not_found_body"] == "json"
    assert bench.control("GET", "faults") == {"faults": []}
    assert bench.requests(ACME)["writing"] == 0


def test_unknown_control_lists_the_known(bench: Any) -> None:
    """A mistyped control path says which there are."""
    with pytest.raises(SandboxRefused, match="billed"):
        bench.control("GET", "biled")


def test_every_host_has_its_server_error(bench: Any, orbit: Any, telco: Any) -> None:
    """The events host and ChargeOver answer with a server error too, whose body is no JSON."""
    for client in (orbit, telco):
        bench.fault(client.site, "server_error", status=503)
        bench.fault(client.site, "unauthorized")
    statuses = [orbit.send(orbit.event()).status_code for _ in range(3)] + [telco.use(1).status_code for _ in range(3)]
    assert statuses == [503, 401, 201, 503, 401, 201]
    bench.fault("maxio:us:orbit", "throttle")
    assert orbit.send(orbit.event()).status_code == 429


def test_known_switches_explain_themselves(bench: Any) -> None:
    """People can read every switch with its choices and meaning; each default is one of its choices."""
    known = bench.control("GET", "switches/known")
    assert known["maxio"]["memo_limit"]["choices"] == ["none", "255"]
    assert known["chargeover"]["usage_read_delay_seconds"]["choices"] == ["<seconds>"]
    for switches in known.values():
        for switch in switches.values():
            assert switch["meaning"]
            assert switch["choices"] == ["<seconds>"] or switch["default"] in switch["choices"]


def test_a_switch_that_was_looked_at_says_so(bench: Any, acme: Any) -> None:
    """Only what the site consulted since it was turned can have mattered; a site knows nothing of another's."""
    bench.switch("maxio:us:acme", memo_limit="255", quantity_type="string")
    assert not {"memo_limit", "quantity_type"} & bench.consulted("maxio:us:acme")
    assert acme.use(1).status_code == 200
    assert "quantity_type" in bench.consulted("maxio:us:acme")
    assert "memo_limit" not in bench.consulted("maxio:us:acme"), "the usage had no memo"
    assert "quantity_type" not in bench.consulted("maxio:us:orbit")
    bench.switch("maxio:us:acme", quantity_type="int")
    assert "quantity_type" not in bench.consulted("maxio:us:acme")


def test_simultaneous_requests_with_one_token_bill_once(bench: Any, acme: Any) -> None:
    """Of several requests with one token that are in the air together, one is carried out and the others are 409."""
    clients = 4
    barrier = threading.Barrier(clients)
    body = {"usage": {"quantity": 5}, "uniqueness_token": "t"}
    url = f"{acme.base}/{acme.path()}"

    def send(_: int) -> int:
        barrier.wait(5)
        return requests.post(url, json=body, auth=("sandbox-acme-key", "x"), timeout=10).status_code

    with ThreadPoolExecutor(clients) as pool:
        assert sorted(pool.map(send, range(clients))) == [200, 409, 409, 409]
    assert acme.balance() == 5
    assert 1 <= bench.requests(ACME)["most_in_process"] <= clients
