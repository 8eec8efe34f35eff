"""The nouns that stages hand to each other."""

import json
from datetime import UTC, datetime, timedelta

from usage_billing.records import Period, Run, Staged, joined

START = datetime(2026, 10, 1, tzinfo=UTC)


def days(*numbers: int) -> list[Period]:
    """Return days of October 2026."""
    return [Period(START + timedelta(days=number - 1), START + timedelta(days=number)) for number in numbers]


def test_periods_that_touch_are_joined_and_gaps_stay() -> None:
    """Two days and one more after a gap are two spans, in whatever order they come."""
    first, second, fourth = days(1, 2, 4)
    assert joined([fourth, first, second]) == (Period(first.start, second.end), fourth)
    assert joined(first) == (first,)
    assert joined([]) == ()


def test_a_run_goes_through_json_with_what_it_compares() -> None:
    """What travels by XCom comes back the same, gaps and all; one of before an upgrade has no spans and no edition."""
    tables = {"events": Staged("m", 3, "d")}
    run = Run("calls", 7, days(4)[0], "calls/7", tables, spans=joined(days(1, 2, 4)), edition=2)
    value = json.loads(json.dumps(run.to_json()))
    assert Run.from_json(value) == run
    del value["spans"], value["edition"]
    assert (Run.from_json(value).spans, Run.from_json(value).edition) == ((), 0)
