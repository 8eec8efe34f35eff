"""The events host: storing, deduplicating, and what is billed of it at renewal."""

from decimal import Decimal
from typing import Any

import pytest

SITE = "maxio:us:orbit"


def _units(bench: Any, account: str = "orbit-01") -> tuple[Decimal, Decimal, Decimal, int]:
    return bench.figures(SITE, account, "platform-units")


def test_single_and_bulk_are_201_without_body(orbit: Any, bench: Any) -> None:
    """Both endpoints answer 201 and nothing else; the sum is exact."""
    replies = [orbit.send(orbit.event(1.1)), orbit.send(orbit.event(2.2), orbit.event(3.3))]
    assert [(reply.status_code, reply.content) for reply in replies] == [(201, b""), (201, b"")]
    assert _units(bench) == (0, Decimal("6.6"), Decimal("6.6"), 3)


def test_suffix_may_be_left_out(orbit: Any, bench: Any) -> None:
    """Paths work with and without `.json`."""
    assert orbit.post("platform-events", orbit.event(1)).status_code == 201
    assert orbit.post("platform-events/bulk", [orbit.event(1)]).status_code == 201
    assert _units(bench)[1] == 2


def test_events_need_the_same_credentials(orbit: Any) -> None:
    """A wrong key is a 401, like on the main API."""
    orbit.session.auth = ("wrong", "x")
    assert orbit.send(orbit.event()).status_code == 401


def test_token_is_ignored_when_repeated(orbit: Any, bench: Any) -> None:
    """A repeated token changes nothing and says nothing, within one bulk, over two, and with another payload."""
    assert orbit.send(orbit.event(5, uniqueness_token="a"), orbit.event(6, uniqueness_token="a")).status_code == 201
    assert orbit.send(orbit.event(7, uniqueness_token="a")).status_code == 201
    assert _units(bench) == (0, 5, 5, 1)


def test_token_is_per_stream(orbit: Any, bench: Any) -> None:
    """The same token in two streams counts in both."""
    orbit.send(orbit.event(5, uniqueness_token="a"))
    orbit.send({"chargify": {"subscription_id": 50200001, "uniqueness_token": "a"}}, stream="raw-events")
    assert _units(bench)[1] == 5
    assert bench.figures(SITE, "orbit-01", "raw-count")[1] == 1


def test_token_expires_after_31_days(orbit: Any, bench: Any) -> None:
    """Inside 31 days of the sandbox clock a replay is ignored; after them it counts again."""
    event = orbit.event(5, uniqueness_token="a")
    orbit.send(event)
    bench.move_clock(advance_seconds=31 * 86400 - 1)
    orbit.send(event)
    assert _units(bench)[3] == 1
    bench.move_clock(advance_seconds=1)
    orbit.send(event)
    assert _units(bench)[3] == 2


def test_bulk_takes_a_thousand_events(orbit: Any, bench: Any) -> None:
    """1,000 events are taken in one request, 1,001 are refused and none is stored."""
    assert orbit.send(*[orbit.event(1) for _ in range(1001)]).status_code == 422
    assert _units(bench)[3] == 0
    assert orbit.send(*[orbit.event(1) for _ in range(1000)]).status_code == 201
    assert _units(bench)[1] == 1000


@pytest.mark.parametrize(
    "bad", [7, {"chargify": 1}, {"chargify": {"timestamp": "soon"}}, {"chargify": {"uniqueness_token": 5}}]
)
def test_malformed_event_by_switch(orbit: Any, bench: Any, bad: Any) -> None:
    """One malformed event refuses the whole bulk, or is left out of it."""
    assert orbit.send(orbit.event(1), bad).status_code == 422
    assert orbit.send(bad).status_code == 422
    assert _units(bench)[3] == 0
    bench.switch(SITE, bulk_with_bad_event="store_valid")
    assert orbit.send(orbit.event(1), bad).status_code == 201
    assert _units(bench)[3] == 1


def test_body_must_be_an_array_of_json(orbit: Any) -> None:
    """A bulk body that is no array, or no JSON, is refused; an empty array is taken."""
    assert orbit.post("platform-events/bulk.json", {"events": []}).status_code == 422
    assert orbit.session.post(f"{orbit.base}/platform-events/bulk.json", data=b"[", timeout=10).status_code == 422
    assert orbit.post("platform-events/bulk.json", []).status_code == 201


def test_long_token_by_switch(orbit: Any, bench: Any) -> None:
    """A token of 65 characters is refused, or cut to 64, where two may collide."""
    assert orbit.send(orbit.event(1, uniqueness_token="t" * 65)).status_code == 422
    assert orbit.send(orbit.event(1, uniqueness_token="t" * 64)).status_code == 201
    bench.switch(SITE, long_event_token="truncate")
    assert orbit.send(orbit.event(1, uniqueness_token="t" * 65)).status_code == 201
    assert _units(bench)[3] == 1


def test_unknown_stream_by_switch(orbit: Any, bench: Any) -> None:
    """An unknown stream is a 404, or swallows events that nobody is billed for."""
    assert orbit.send(orbit.event(), stream="lost").status_code == 404
    bench.switch(SITE, unknown_stream="accept")
    assert orbit.send(orbit.event(), stream="lost").status_code == 201
    assert bench.billed(SITE) == []
    assert [row["stream"] for row in bench.records(SITE)] == ["lost"]


def test_unknown_subscription_by_switch(orbit: Any, bench: Any) -> None:
    """Events of nobody are stored and billed to nobody, under the identifier they came with; or refused."""
    assert orbit.send(orbit.event(4, account="ghost")).status_code == 201
    row = bench.billed(SITE)[0]
    assert (row.subscription, row.reference, row.billed, row.stored) == ("", "ghost", 0, 4)
    bench.switch(SITE, unknown_subscription_in_event="refuse")
    assert orbit.send(orbit.event(4, account="ghost")).status_code == 422
    assert orbit.send({"units": 4}).status_code == 422


def test_subscription_id_stream(orbit: Any, bench: Any) -> None:
    """A stream that is keyed by subscription id does not match references."""
    orbit.send(
        {"chargify": {"subscription_id": 50200003}}, {"chargify": {"subscription_id": "orbit-03"}}, stream="raw-events"
    )
    assert bench.figures(SITE, "orbit-03", "raw-count") == (0, 1, 1, 1)
    assert [(row.reference, row.billed) for row in bench.billed(SITE) if not row.subscription] == [("orbit-03", 0)]


def test_timestamp_decides_the_period(orbit: Any, bench: Any) -> None:
    """An event counts in the half-open period of its timestamp; one of the future waits for its period."""
    orbit.send(
        orbit.event(1, timestamp="2026-10-01T00:00:00Z"),
        orbit.event(10, timestamp="2026-10-31T19:59:59-04:00"),
        orbit.event(100, timestamp="2026-11-01T00:00:00Z"),
    )
    assert _units(bench)[:2] == (0, 11)
    bench.move_clock("2026-11-01T00:00:00Z")
    assert _units(bench)[:2] == (11, 100)


def test_late_event_by_switch(orbit: Any, bench: Any) -> None:
    """An event of an invoiced period is accepted and never billed, or billed in the open one."""
    bench.move_clock("2026-11-10T00:00:00Z")
    assert orbit.send(orbit.event(5, timestamp="2026-10-30T00:00:00Z")).status_code == 201
    assert _units(bench) == (0, 0, 5, 1)
    bench.switch(SITE, late_event="next_period")
    orbit.send(orbit.event(7, timestamp="2026-10-30T00:00:00Z"))
    assert _units(bench) == (0, 7, 12, 2)


@pytest.mark.parametrize(("below", "billed"), [("as_computed", -5), ("zero", 0)])
def test_a_metric_below_zero_by_switch(orbit: Any, bench: Any, below: str, billed: int) -> None:
    """It bills what it computes, or nothing; what is stored is the same."""
    bench.switch(SITE, metric_below_zero=below)
    orbit.send(orbit.event(-5))
    assert _units(bench) == (0, billed, -5, 1)
    bench.move_clock("2026-11-01T00:00:00Z")
    assert _units(bench)[0] == billed


def test_events_are_for_whoever_has_the_reference_when_they_come(orbit: Any, orbit_main: Any, bench: Any) -> None:
    """A reference is given away by the site's own call, and nobody has it twice."""
    orbit.send(orbit.event(5))
    put = {"json": {"subscription": {"reference": "orbit-01"}}, "timeout": 10}
    other = f"{orbit_main.base}/subscriptions/50200002.json"
    assert orbit_main.session.put(other, **put).status_code == 422
    away = {"json": {"subscription": {"reference": "away"}}, "timeout": 10}
    assert orbit_main.session.put(f"{orbit_main.base}/subscriptions/50200001.json", **away).ok
    reply = orbit_main.session.put(other, **put)
    assert reply.json()["subscription"]["reference"] == "orbit-01"
    orbit.send(orbit.event(7))
    assert _units(bench, "away") == (0, 5, 5, 1)
    assert _units(bench, "orbit-01") == (0, 7, 7, 1)


def test_only_activated_components_are_billed(orbit: Any, orbit_main: Any, bench: Any) -> None:
    """Events are stored whatever the activation; it decides at renewal whether they are billed."""
    path = "event_based_billing/subscriptions/50200001/components/61101"
    reply = orbit_main.post(f"{path}/deactivate.json")
    assert (reply.status_code, reply.content) == (200, b"")
    orbit.send(orbit.event(5))
    assert _units(bench) == (0, 0, 5, 1)
    assert orbit_main.post(f"{path}/activate.json", {"price_point_id": 71101}).status_code == 200
    assert _units(bench) == (0, 5, 5, 1)
    orbit_main.post(f"{path}/deactivate.json")
    bench.move_clock("2026-11-01T00:00:00Z")
    assert _units(bench)[0] == 0


def test_activation_is_for_event_components(orbit_main: Any, acme: Any) -> None:
    """Other kinds cannot be activated, and the path takes numeric ids only."""
    assert acme.post("event_based_billing/subscriptions/50100001/components/61001/activate.json").status_code == 422
    path = "event_based_billing/subscriptions/50200001/components/handle:platform-units/activate.json"
    assert orbit_main.post(path).status_code == 404


def test_usages_cannot_be_added_to_event_components(orbit_main: Any) -> None:
    """An event-based component takes no usage, and lists none."""
    assert orbit_main.use(1, 50200001, "handle:platform-units").status_code == 422
    assert orbit_main.get(orbit_main.path(50200001, "handle:platform-units")).json() == []


def test_metric_shows_as_balance_and_in_the_preview(orbit: Any, orbit_main: Any) -> None:
    """The metric so far is the line's unit balance and the preview's quantity."""
    orbit.send(orbit.event(2.5), orbit.event(0.5))
    assert orbit_main.balance(50200001, "handle:platform-units") == 3
    preview = orbit_main.post("subscriptions/50200001/renewals/preview.json").json()["renewal_preview"]
    assert [row["memo"] for row in preview["line_items"][1:]] == ["Platform units: 3 unit", "Raw events: 0 event"]


def test_visibility_lags_by_switch(orbit: Any, orbit_main: Any, bench: Any) -> None:
    """Reads may lag behind; what is billed does not."""
    bench.switch(SITE, events_delay_seconds=30)
    orbit.send(orbit.event(5))
    assert orbit_main.balance(50200001, "handle:platform-units") == 0
    assert _units(bench)[1] == 5
    bench.move_clock(advance_seconds=30)
    assert orbit_main.balance(50200001, "handle:platform-units") == 5


def test_values_that_are_no_numbers_count_nothing(orbit: Any, bench: Any) -> None:
    """A sum passes over texts, nulls and missing properties; the records stay."""
    orbit.send(*[orbit.event(units) for units in (1, "2", None, True, [3])], {"account_id": "orbit-01"})
    assert _units(bench) == (0, 1, 1, 6)
