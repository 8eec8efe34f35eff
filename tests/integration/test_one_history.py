"""One usage has one history: under another name, or at another address, nothing of it is billed again."""

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from late import ACCOUNTS
from stories import SITES, Event, House, a_day, a_house, shipped
from usage_billing.errors import Misconfigured
from usage_billing.records import Period
from usage_billing.sources import BillingSource

NAMES = sorted(SITES)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A sandbox, a ledger and staging."""
    with a_house(tmp_path) as found:
        yield found


def called(source: BillingSource, name: str, **changes: Any) -> BillingSource:
    """Return the same source in a folder of another name."""
    return replace(source, settings=source.settings.model_copy(update={"name": name, **changes}))


def used(source: BillingSource, quantity: str, day: int = 5, key: str = "") -> list[Event]:
    """Make one event of a day."""
    start, account = a_day(source, day).start, ACCOUNTS[source.name]
    dimensions = ("eu", "premium")[: len(source.settings.dimensions)]
    return [Event(f"{account}-{day}{key}", account, quantity, start, dimensions)]


def billed(house: House, source: BillingSource) -> Decimal:
    """Return what the site billed the account of a shipped source."""
    return house.billed(source).get(ACCOUNTS[source.name], Decimal(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_source_under_a_new_name_is_stopped_before_it_bills_again(house: House, name: str) -> None:
    """The folder was renamed, and nobody said so: the same day, run again, reaches no site."""
    source = shipped(name)
    house.run(source, a_day(source, 5), used(source, "7"))
    house.sandbox.reset_requests()
    renamed = called(source, "renamed")
    with pytest.raises(Misconfigured, match=f"is fed by source '{name}'.*`formerly: {name}`"):
        house.run(renamed, a_day(source, 5), used(source, "7"))
    with pytest.raises(Misconfigured, match="formerly"):
        house.run(renamed, a_day(source, 6), used(source, "7", 6))
    assert house.writing_requests(source) == 0
    assert billed(house, source) == 7


@pytest.mark.parametrize("name", NAMES)
def test_a_source_that_says_what_it_was_called_goes_on_with_its_history(house: House, name: str) -> None:
    """The same day again sends nothing; a late row sends itself alone, and a new day is billed once."""
    source = shipped(name)
    house.run(source, a_day(source, 5), used(source, "7"))
    renamed = called(source, "renamed", formerly=name)
    house.sandbox.reset_requests()
    house.run(renamed, a_day(source, 5), used(source, "7"))
    assert house.writing_requests(source) == 0
    house.run(renamed, a_day(source, 5), used(source, "7") + used(source, "2", key="-late"))
    house.run(renamed, a_day(source, 6), used(source, "4", 6))
    assert billed(house, source) == 13
    assert house.ledger.sources() == [name]
    assert house.reconcile(renamed, Period(a_day(source, 5).start, a_day(source, 6).end)).ties_out


@pytest.mark.parametrize("name", NAMES)
def test_two_sources_feed_one_component_where_the_second_says_so(
    house: House, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each bills its own usage once, in any order, and both tie out; the first need not know of the second."""
    source = shipped(name)
    other = called(source, "other", shares_component_with=(name,))
    monkeypatch.setitem(SITES, "other", SITES[name])
    day = a_day(source, 5)
    house.run(source, day, used(source, "7"))
    house.run(other, day, used(source, "5"))
    house.run(source, day, used(source, "8"))
    house.sandbox.reset_requests()
    for each, quantity in ((other, "5"), (source, "8")):
        house.run(each, day, used(source, quantity))
        assert house.reconcile(each, day).ties_out
    assert house.writing_requests(source) == 0
    assert billed(house, source) == 13


def test_of_a_third_source_all_that_feed_the_component_are_named(house: House) -> None:
    """A dry run is told the same, and a source that was only looked at feeds nothing."""
    source = shipped("api_calls")
    day = a_day(source, 5)
    house.run(source, day, used(source, "7"))
    house.run(called(source, "other", shares_component_with=("api_calls",)), day, used(source, "5"))
    third = called(source, "third")
    with pytest.raises(Misconfigured, match=r"'api_calls'(.|\n)*'other'"):
        house.plan(third, house.looked(third, day, used(source, "1")), "looked")
    fourth = called(source, "fourth", shares_component_with=("api_calls", "other"))
    house.plan(fourth, house.looked(fourth, day, used(source, "1")), "looked")
    with pytest.raises(Misconfigured, match=r"formerly: api_calls(.|\n)*formerly: other"):
        house.run(third, day, used(source, "1"))
    assert billed(house, source) == 12


class Moved(House):
    """A house whose sites have another address."""

    elsewhere = False

    def destination(self, source: BillingSource) -> Any:
        """Return the destination, reached by another name of this machine."""
        found: Any = super().destination(source)
        if self.elsewhere:
            settings = found.client.settings
            changes = {
                key: getattr(settings, key).replace("127.0.0.1", "localhost")
                for key in ("base_url", "events_url")
                if hasattr(settings, key)
            }
            found.client = type(found.client)(replace(settings, **changes), self.transport)
        return found


@pytest.mark.parametrize("name", NAMES)
def test_a_site_at_another_address_is_the_same_site(tmp_path: Path, name: str) -> None:
    """The host changed, the site did not: the same days again send nothing."""
    source = shipped(name)
    with a_house(tmp_path, Moved) as house:
        assert isinstance(house, Moved)
        before = house.destination(source).client.settings.base_url
        house.run(source, a_day(source, 5), used(source, "7"))
        house.elsewhere = True
        assert house.destination(source).client.settings.base_url != before
        house.sandbox.reset_requests()
        house.run(source, a_day(source, 5), used(source, "7"))
        assert house.writing_requests(source) == 0
        house.run(source, a_day(source, 6), used(source, "2", 6))
        assert billed(house, source) == 9
