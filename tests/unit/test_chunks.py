"""Cutting events into chunks, keeping them in the archive, and what stands in an event, to the letter."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from usage_billing import chunks
from usage_billing.archive import EVENTS, Archive, Archived
from usage_billing.destinations.base import Destination
from usage_billing.destinations.maxio import MaxioEvents, MaxioEventsSettings, MaxioSettings, MaxioSite
from usage_billing.errors import Misconfigured
from usage_billing.ledger import bases
from usage_billing.records import Delivery
from usage_billing.sources import BillingSource, SourceSettings
from usage_billing.uniqueness import event_tokens

KEYS = {
    "name": "maxio_events",
    "connection": "c",
    "stream": "platform-events",
    "subscription_by": "account_id",
    "component": "handle:platform-units",
    "property": "units",
    "mode": "events",
}
START = datetime(2026, 10, 5, 8, tzinfo=UTC)


def destination(function: str = "sum", **keys: Any) -> Destination:
    """Return a destination of raw events that is never connected."""
    declared = {
        "name": "calls",
        "description": "calls",
        "warehouse": "warehouse",
        "schedule": "0 0 * * *",
        "timezone": "UTC",
        "period": "day",
        "bill_from": "2026-06-01",
        "columns": {"event_id": "id", "time": "at", "account": "who", "quantity": "units"},
        "meter": {"function": function},
    }
    settings = SourceSettings.model_validate(declared)
    own = MaxioEventsSettings.model_validate(KEYS | keys)
    client = MaxioSite(MaxioSettings(subdomain="acme", api_key="a-key"))
    return MaxioEvents(BillingSource(settings=settings, destination=own, sql="", expectations=()), client)


def left(bodies: Sequence[str], most: int = 1000, why: int = 0) -> pa.Table:
    """Return events as they come to be cut."""
    size = len(bodies)
    texts = pa.array([f"{number:064d}" for number in range(size)], pa.string())
    values: dict[str, Any] = dict.fromkeys(("token", "event_id", "account", "subscription", "quantity"), texts)
    values |= {"body": list(bodies), "time": [START] * size, "period": [0] * size, "why": [why] * size}
    values |= {"original": [None] * size, "open_until": [None] * size, "most": [most] * size}
    return pa.table({name: values[name] for name in chunks._ARRIVED.names}, chunks._ARRIVED)


def cut(tables: Sequence[pa.Table]) -> list[tuple[int, list[str]]]:
    """Return the chunks as their bodies."""
    return [(why, chunk.column("body").to_pylist()) for why, chunk in chunks._cut(tables)]


def kept(tmp_path: Path, count: int = 3) -> tuple[Archive, Archived, pa.Table]:
    """Return an archive with one chunk in it."""
    events = left([f'{{"n":{number}}}' for number in range(count)]).select(EVENTS.names)
    archive = Archive(tmp_path / "archive")
    return archive, archive.write("calls/day", events), events


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    most=st.integers(1, 20),
    largest=st.integers(20, 200),
    cuts=st.lists(st.integers(1, 80), max_size=6),
)
def test_chunks_depend_on_nothing_but_the_events(sizes: list[int], most: int, largest: int, cuts: list[int]) -> None:
    """However the events are spread over files, the chunks are the same, whole, in order, and within both limits."""
    bodies = [f"{number}".rjust(size, "x") for number, size in enumerate(sizes)]
    edges = sorted({0, len(bodies), *(edge for edge in cuts if edge < len(bodies))})
    whole = left(bodies, most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "LARGEST_BULK", largest)
        found = cut([whole])
        pieces = [whole.slice(start, end - start) for start, end in pairwise(edges)]
        assert cut(pieces) == found
    assert [body for _, chunk in found for body in chunk] == bodies
    for _, chunk in found:
        assert len(chunk) <= most
        assert sum(len(body) + 1 for body in chunk) <= largest or len(chunk) == 1


def test_events_that_may_not_go_are_in_chunks_of_their_own() -> None:
    """What is open never waits for what is closed, and what was refused together goes in the sizes that it needs."""
    both = pa.concat_tables([left(["a", "b"]), left(["c"], why=1), left(["d", "e", "f"], most=2)])
    assert sorted(cut([both])) == [(0, ["a", "b"]), (0, ["d", "e"]), (0, ["f"]), (1, ["c"])]


def test_an_events_token_is_fixed_for_ever() -> None:
    """It is a function of site, source, stream and event id alone: another text would bill every event again."""
    (token, other) = event_tokens("maxio:us:acme", "calls", "platform-events", ["e-1", "e\x1f1"])
    assert token == "b3ddf0cf8ac8f87f14a636acbb71a9d84eb365f3291b6503b42beee3852a495c"
    assert token != other
    with pytest.raises(ValueError, match="001F"):
        event_tokens("maxio:us:acme", "calls", "a\x1fb", ["e-1"])


def test_an_event_is_written_the_same_for_ever() -> None:
    """By its text a later run tells whether a row is still what was sent, so the text is pinned."""
    rows = pd.DataFrame(
        {
            "token": ["t" * 64] * 2,
            "time": pd.to_datetime([START, START + timedelta(microseconds=120)], utc=True),
            "quantity": ["1.5", "-3"],
            "address": [json.dumps({"stream": "platform-events", "account": 'A"1'})] * 2,
            "dimensions": ['{"region":"eu","tier":null}', "{}"],
        }
    )
    assert list(destination().encode_events(rows)) == [
        '{"chargify":{"timestamp":"2026-10-05T08:00:00Z","uniqueness_token":"' + "t" * 64 + '"},'
        '"account_id":"A\\"1","units":1.5,"region":"eu","tier":null}',
        '{"chargify":{"timestamp":"2026-10-05T08:00:00.000120Z","uniqueness_token":"' + "t" * 64 + '"},'
        '"account_id":"A\\"1","units":-3}',
    ]


def test_a_counted_value_is_sent_as_text() -> None:
    """A metric that counts distinct values needs the values, whatever characters they hold."""
    rows = pd.DataFrame(
        {
            "token": ["t" * 64],
            "time": pd.to_datetime([START], utc=True),
            "quantity": ['user "7"'],
            "address": [json.dumps({"stream": "platform-events", "account": "A"})],
            "dimensions": ["{}"],
        }
    )
    (body,) = destination("unique", metric="unique").encode_events(rows)
    assert json.loads(body)["units"] == 'user "7"'


def test_totals_need_a_sum() -> None:
    """A signed difference corrects nothing but a sum; the mend is named."""
    with pytest.raises(ValidationError, match="mode: events"):
        MaxioEventsSettings.model_validate(KEYS | {"mode": "totals", "metric": "count"})
    assert destination(metric="count").metric == "count"


def test_one_chunk_makes_one_request() -> None:
    """The ledger's row is the request: nothing else may travel with it."""
    found = destination()
    assert (found.chunk_size, found.retry_chunk_size, found.stream) == (1, 1, "platform-events")
    totals = destination(mode="totals")
    assert (totals.chunk_size, totals.stream) == (1000, "")


def test_without_an_archive_nothing_is_sent() -> None:
    """A destination that was made by hand says what it lacks."""
    delivery = Delivery("t", "i", 0, Decimal(1), {"stream": "platform-events"}, "")
    with pytest.raises(Misconfigured, match="no archive"):
        destination().send([delivery])


def test_the_archive_gives_back_what_it_was_given_and_writes_it_once(tmp_path: Path) -> None:
    """The same events are the same file, however they lie in memory; nothing is left beside it."""
    archive, place, events = kept(tmp_path)
    assert archive.read(place).equals(events)
    (path,) = (tmp_path / "archive").rglob("*.*")
    written = path.stat().st_mtime_ns
    pieces = pa.concat_tables([events.slice(0, 1), events.slice(1)])
    assert archive.write("calls/day", pieces) == place
    assert [found.stat().st_mtime_ns for found in (tmp_path / "archive").rglob("*.*")] == [written]


def test_the_archive_keeps_both_texts_of_an_event_that_was_dated_anew(tmp_path: Path) -> None:
    """By its own text a later run tells that it is the same row; a chunk in which none moved is as it ever was."""
    plain = left(['{"n":0}', '{"n":1}'])
    texts = pa.array(['{"n":"before"}', None], pa.string())
    moved = plain.set_column(plain.column_names.index("original"), "original", texts)
    archive = Archive(tmp_path / "archive")
    assert archive.read(archive.write("calls/day", plain)).column_names == EVENTS.names
    back = archive.read(archive.write("calls/day", moved))
    assert back.column("body").to_pylist() == ['{"n":0}', '{"n":1}']
    assert chunks._at_their_own_time(back).column("body").to_pylist() == ['{"n":"before"}', '{"n":1}']


@pytest.mark.parametrize("damage", [b"", b"PAR1 something else"])
def test_an_altered_file_is_not_read(tmp_path: Path, damage: bytes) -> None:
    """Its name promises a content; another one stops the run, and so does none."""
    archive, place, _ = kept(tmp_path)
    (path,) = (tmp_path / "archive").rglob("*.parquet")
    path.write_bytes(damage)
    with pytest.raises(Misconfigured, match="altered"):
        archive.read(place)
    path.unlink()
    with pytest.raises(Misconfigured, match="missing"):
        archive.read(place)


def test_a_plan_rests_on_which_rows_stand_and_not_on_how_far_they_are() -> None:
    """Sending, accepted and in doubt are one; reserved is another; what was superseded counts no more."""

    def basis(*rows: tuple[str, str]) -> dict[datetime, str]:
        columns = ["token", "state", "period_start"]
        return bases(pd.DataFrame([(*row, START) for row in rows], columns=columns))

    assert basis(("a", "sending"), ("b", "held")) == basis(("b", "reserved"), ("a", "accepted"))
    assert basis(("a", "sending")) != basis(("a", "reserved"))
    assert basis(("a", "accepted")) == basis(("a", "accepted"), ("c", "superseded"))
    assert basis() == {}


def test_a_definition_names_the_mode_of_events_and_never_the_metric() -> None:
    """History hangs on what an event is; what the site computes of it may be told better later."""
    one, other = destination(metric="sum").source, destination(metric="average").source
    assert one.definition() == other.definition()
    assert one.definition()["destination"]["mode"] == "events"
    with_totals = replace(one, destination=one.destination.model_copy(update={"mode": "totals"}))
    assert not {"mode", "metric"} & with_totals.definition()["destination"].keys()
