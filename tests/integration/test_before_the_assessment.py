"""A renewal is due and the site has not made it yet: its last usage waits for the next billing period by itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from late import Held, billed, lenient, november, used
from stories import SITES, a_day, a_house
from usage_billing.ledger import Ledger

SITE = SITES["platform_events"]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Held]:
    """A house whose ledger lives on the sandbox's time; its site assesses a period 20 minutes after its end."""
    with a_house(tmp_path, Held) as opened:
        opened.ledger.close()
        opened.ledger = Ledger.connect(opened.ledger_url, clock=opened.sandbox.now)
        opened.sandbox.switch(SITE, assessment_delay_seconds=1200)
        assert isinstance(opened, Held)
        yield opened


@pytest.mark.parametrize(
    ("policy", "quantity"),
    [
        ({"late_usage": "now"}, 7),
        ({"late_usage": "hold", "grace": "24h"}, 7),
        ({"late_usage": "refuse", "grace": "24h"}, 7),
        ({"late_usage": "hold"}, 7),
        ({"late_usage": "hold", "grace": "0h"}, 0),
        ({"late_usage": "refuse", "grace": "0h"}, 0),
    ],
)
def test_the_last_day_waits_for_the_period_into_which_the_source_lets_it_pass(
    house: Held, policy: dict[str, Any], quantity: int
) -> None:
    """Its run comes half a minute after midnight; a sweep sends it after the renewal, and no run comes again."""
    source = lenient("platform_events", **policy)
    day, later = a_day(source, 31), november(source)
    house.sandbox.move_clock("2026-11-01T00:00:30Z")
    house.run(source, day, used(source, day, "7"))
    house.sweep(source)
    assert (house.states(source, day), billed(house, source)) == ({"held": 1}, 0)
    house.sandbox.move_clock("2026-11-01T02:00:00Z")

    house.sweep(source)

    assert billed(house, source) == quantity
    assert house.states(source, day) == ({"superseded": 1, "accepted": 1} if quantity else {"held": 1})
    before = house.writing_requests(source)
    house.run(source, day, used(source, day, "7"))
    house.sweep(source)
    assert house.writing_requests(source) == before
    house.sandbox.move_clock("2026-11-02T00:00:30Z")
    house.run(source, later, used(source, later, "1"))
    assert billed(house, source) == quantity + 1
