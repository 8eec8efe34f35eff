"""Manners toward a site, by the sandbox's own measure: how much came at once, and what a throttled run ends as."""

import logging
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from stories import SITES, WORLDS, Event, House, a_day, shipped
from usage_billing.deliver import Delivered, Manners, deliver
from usage_billing.destinations.base import Destination
from usage_billing.destinations.http import Transport
from usage_billing.destinations.maxio import MaxioSite
from usage_billing.errors import NotApplied
from usage_billing.ledger import Ledger
from usage_billing.records import Comparison, Period, Plan
from usage_billing.sandbox import Sandbox
from usage_billing.sources import BillingSource
from usage_billing.workers import Means

ACME = "maxio:us:acme"
DAYS = 4
EAGER = Manners(threads=4, lease_lasts=timedelta(seconds=10), patience=timedelta(seconds=60))


class Unhurried:
    """A worker's waiting: notes for how long it was to wait, and hardly waits."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def is_set(self) -> bool:
        """Nobody asks this worker to stop."""
        return False

    def wait(self, timeout: float | None = None) -> bool:
        """Note it, and wait a moment."""
        self.waits.append(timeout or 0.0)
        return threading.Event().wait(min(timeout or 0.0, 0.02))


class Billing:
    """One source's plan over some days, ready to be delivered as often as a story needs."""

    def __init__(self, house: House, source: BillingSource, accounts: list[str]) -> None:
        self.house, self.source = house, source
        self.interval = Period(a_day(source, 5).start, a_day(source, 4 + DAYS).end)
        self.expected = {account: Decimal(DAYS) for account in accounts}
        self.comparison, self.folder = house.totals(source, self.interval, list(self._events(accounts)))
        self.first = self.plan()
        house.sandbox.reset_requests()

    def _events(self, accounts: list[str]) -> Iterator[Event]:
        dimensions = ("eu", "premium")[: len(self.source.settings.dimensions)]
        for day in range(5, 5 + DAYS):
            noon = a_day(self.source, day).start + timedelta(hours=12)
            for account in accounts:
                yield Event(f"{account}-{day}", account, "1", noon, dimensions)

    def plan(self) -> Plan:
        """Compare with the ledger."""
        return self.house.plan(self.source, self.comparison, self.folder)

    def deliver(self, manners: Manners = EAGER, destination: Destination | None = None) -> tuple[Delivered, Unhurried]:
        """Deliver as a task of its own would, with a client of its own; return also how it waited."""
        comparison: Comparison = self.comparison
        waiting = Unhurried()
        done = deliver(
            self.first,
            self.plan,
            comparison.reading,
            comparison.window,
            destination or self.house.destination(self.source),
            self.house.ledger,
            self.house.staging,
            manners,
            Means(stop=waiting),
        )
        return done, waiting

    def billed(self) -> dict[str, Decimal]:
        """What the site billed, by account."""
        component = self.source.destination.component.removeprefix("handle:")
        rows = self.house.sandbox.billed(self.house.destination(self.source).site)
        return {row.reference: row.billed for row in rows if row.component == component and row.billed}

    def states(self) -> dict[str, int]:
        """How many deliveries stand in each state."""
        found = self.house.ledger.standing(self.source.name, self.comparison.window)["state"]
        return {str(state): int(count) for state, count in found.value_counts().items()}


@contextmanager
def a_slow_house(
    folder: Path,
    *,
    in_process: int = 4,
    queued: int = 100,
    hold_seconds: float = 0.03,
    retry_after: int = 1,
    kind: type[House] = House,
) -> Iterator[House]:
    """A house whose Maxio sites take their time, so that requests overlap, and bear as much as they are given."""
    limits = f"limits: {{in_process: {in_process}, queued: {queued}, hold_seconds: {hold_seconds}, "
    limits += f"retry_after_seconds: {retry_after}}}"
    worlds = []
    for world in WORLDS:
        worlds.append(folder / world.name)
        worlds[-1].write_text(re.sub(r"(?m)^limits: \{in_process: 4.*\}$", limits, world.read_text()))
    with Sandbox(worlds) as sandbox:
        house = kind(sandbox, folder)
        yield house
        house.ledger.close()


def calls(house: House) -> Billing:
    """Twelve customers' calls: 48 requests."""
    return Billing(house, shipped("api_calls"), [f"acct-{number:04d}" for number in range(1, 13)])


def storage(house: House) -> Billing:
    """The same customers' storage, another component of the same site."""
    source = shipped("api_calls")
    settings = source.settings.model_copy(update={"name": "storage"})
    destination = source.destination.model_copy(update={"component": "handle:storage-gb"})
    both = replace(source, settings=settings, destination=destination)
    return Billing(house, both, [f"acct-{number:04d}" for number in range(1, 13)])


def throttlings(caplog: pytest.LogCaptureFixture) -> list[int]:
    """With how many requests at once the work went on after each setback."""
    found = (re.search(r"going on in [\d.]+ s with (\d+) requests at once", line) for line in caplog.messages)
    return [int(match[1]) for match in found if match]


def test_one_task_never_makes_more_requests_at_once_than_its_connection_allows(tmp_path: Path) -> None:
    """Sixteen threads on a connection of four: the site saw several at once, and never five."""
    with a_slow_house(tmp_path) as house:
        billing = calls(house)
        billing.deliver(replace(EAGER, threads=16))
        assert house.sandbox.requests(ACME)["most_in_process"] in range(3, 5)
        assert house.sandbox.requests(ACME)["throttled"] == 0
        assert billing.billed() == billing.expected


@pytest.mark.parametrize(("threads", "most"), [(2, range(3, 5)), (4, range(5, 9))])
def test_two_tasks_share_a_site_by_the_slots_of_its_pool(tmp_path: Path, threads: int, most: range) -> None:
    """Two tasks of two threads fit into a pool of four slots; two of four do not, and the pool keeps them apart."""
    with a_slow_house(tmp_path) as house:
        tasks = [calls(house), storage(house)]
        together(tasks, replace(EAGER, threads=threads))
        assert house.sandbox.requests(ACME)["most_in_process"] in most
        for task in tasks:
            assert task.billed() == task.expected


class Doorkeeper:
    """Stands before a server and counts the connections that are open to it at once."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.open = self.most = 0
        self._address = address
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._let_in, daemon=True).start()

    def close(self) -> None:
        """Let nobody in any more."""
        self._listener.close()

    def _let_in(self) -> None:
        while True:
            try:
                visitor, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._attend, args=(visitor,), daemon=True).start()

    def _attend(self, visitor: socket.socket) -> None:
        self._count(1)
        with visitor, socket.create_connection(self._address) as inside:
            other = {visitor: inside, inside: visitor}
            while all(self._pass_on(one, other[one]) for one in select.select([visitor, inside], [], [])[0]):
                pass
        self._count(-1)

    def _count(self, more: int) -> None:
        with self._lock:
            self.open += more
            self.most = max(self.most, self.open)

    @staticmethod
    def _pass_on(one: socket.socket, other: socket.socket) -> bool:
        try:
            some = one.recv(65536)
            other.sendall(some)
        except OSError:
            return False
        return bool(some)


class WatchedHouse(House):
    """A house whose Maxio sites are reached through a doorkeeper."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        super().__init__(sandbox, folder)
        self.door = urlsplit(sandbox.url)
        self.doorkeeper = Doorkeeper((str(self.door.hostname), int(self.door.port or 0)))

    def destination(self, source: BillingSource) -> Destination:
        """Return the source's destination behind the door, which has made a request already, as every task has."""
        found = super().destination(source)
        settings = found.client.settings
        door = f":{self.doorkeeper.port}"
        settings = replace(settings, base_url=settings.base_url.replace(f":{self.door.port}", door))
        watched = type(found)(source, MaxioSite(settings, self.transport))
        watched.check()
        return watched


@pytest.mark.parametrize(("tasks", "threads"), [((calls,), 16), ((calls, storage), 2)], ids=["one", "two"])
def test_no_more_connections_are_open_than_requests_may_be_made(
    tmp_path: Path, tasks: tuple[Callable[[House], Billing], ...], threads: int
) -> None:
    """A connection that is kept for the next request counts for the site too: there are never five."""
    with a_slow_house(tmp_path, kind=WatchedHouse) as house:
        assert isinstance(house, WatchedHouse)
        work = [task(house) for task in tasks]
        house.doorkeeper.most = house.doorkeeper.open
        together(work, replace(EAGER, threads=threads))
        assert house.doorkeeper.most in range(3, 5)
        for task in work:
            assert task.billed() == task.expected
        house.doorkeeper.close()


def together(tasks: list[Billing], manners: Manners) -> None:
    """Deliver all at once, each as a task of its own."""
    start = threading.Barrier(len(tasks))
    failures: list[BaseException] = []

    def work(task: Billing) -> None:
        start.wait()
        try:
            task.deliver(manners)
        except BaseException as error:  # noqa: BLE001 - Whatever a task meets, the test has to see it.
            failures.append(error)

    threads = [threading.Thread(target=work, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("reply", ["text", "json_retry_after"])
def test_a_storm_of_429_bills_each_unit_once_with_fewer_requests_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reply: str
) -> None:
    """The waits are the site's own, or grow; no token is spent on a 429, so nothing waits for an hour."""
    caplog.set_level(logging.WARNING)
    with a_slow_house(tmp_path, hold_seconds=0) as house:
        billing = calls(house)
        house.sandbox.switch(ACME, throttle_reply=reply)
        house.sandbox.fault(ACME, "throttle", count=12, after=10)
        done, waiting = billing.deliver()
        assert billing.billed() == billing.expected
        assert billing.states() == {"accepted": 12 * DAYS}
        assert (done.not_applied, done.doubted) == (12, 0)
        assert house.sandbox.requests(ACME)["writing"] == 12 * DAYS + 12
    assert throttlings(caplog)[:3] == [2, 1, 1]
    pauses = [wait for wait in waiting.waits if wait >= 0.4]
    if reply == "json_retry_after":
        assert set(pauses) == {1.0}
    else:
        assert max(pauses) > 4 * min(pauses), "the pauses did not grow"
        assert max(pauses) <= 60


def test_a_site_that_bears_less_than_it_says_is_served_at_its_own_pace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two at once and none waiting: the site turns the rest away, until the work has come down to what it bears."""
    caplog.set_level(logging.WARNING)
    with a_slow_house(tmp_path, in_process=2, queued=0) as house:
        billing = calls(house)
        done, _ = billing.deliver()
        assert billing.billed() == billing.expected
        assert done.not_applied == house.sandbox.requests(ACME)["throttled"] > 0
    assert 2 in throttlings(caplog)


def test_a_site_that_throttles_for_longer_than_patience_leaves_the_rest_reserved(tmp_path: Path) -> None:
    """The task ends with the site's own words; nothing is in doubt, and the next try bills all of it once."""
    with a_slow_house(tmp_path, hold_seconds=0) as house:
        billing = calls(house)
        house.sandbox.fault(ACME, "throttle", count=10_000, after=8)
        with pytest.raises(NotApplied, match=r"maxio:us:acme: create usage .* HTTP 429") as told:
            billing.deliver(replace(EAGER, patience=timedelta(milliseconds=300)))
        assert told.value.throttled
        assert billing.states() == {"accepted": 8, "reserved": 12 * DAYS - 8}
        house.sandbox.clear_faults()
        billing.deliver()
        assert billing.billed() == billing.expected


def test_a_question_that_the_site_wants_in_two_hours_is_left_to_a_later_try(tmp_path: Path) -> None:
    """The task ends with the lost reply in doubt, its slots are free, and a later one bills each unit once."""
    with a_slow_house(tmp_path, hold_seconds=0, retry_after=7200) as house:
        billing = calls(house)
        house.sandbox.switch(ACME, throttle_reply="json_retry_after")
        house.sandbox.fault(ACME, "lost_reply")
        house.sandbox.fault(ACME, "throttle", route="list_usages", reads=True, count=1000)
        _, waiting = billing.deliver(replace(EAGER, patience=timedelta(seconds=3)))
        assert max(waiting.waits) <= 4
        assert billing.states() == {"accepted": 12 * DAYS - 1, "in_doubt": 1}
        house.sandbox.clear_faults()
        billing.deliver()
        assert billing.billed() == billing.expected
        assert billing.states() == {"accepted": 12 * DAYS}


def test_the_events_host_is_told_apart_and_kept_to_the_same_number(tmp_path: Path) -> None:
    """Events go to a host of their own, whose requests count apart; the main API sees looks only, one by one."""
    with a_slow_house(tmp_path) as house:
        house.ledger.close()
        # By its clock the billing periods of the site are open: else each reply would be followed by a question.
        house.ledger = Ledger.connect(house.ledger_url, clock=house.sandbox.now)
        billing = Billing(house, shipped("platform_events"), [f"orbit-{number:02d}" for number in range(1, 11)])
        destination = house.destination(billing.source)
        destination.chunk_size = 2  # Else all of it would travel in one request.
        billing.deliver(replace(EAGER, threads=16), destination)
        counts = house.sandbox.requests(SITES["platform_events"])
        assert counts["most_in_process_events"] in range(3, 5)
        assert counts["most_in_process"] <= 1
        assert billing.billed() == billing.expected


class PatientHouse(House):
    """A house where reads have all the patience there is, and hardly wait."""

    transport = Transport(wait=lambda seconds: time.sleep(min(seconds, 0.02)))


ACCOUNTS = {"api_calls": "acct-0001", "platform_events": "orbit-01", "voip_minutes": "pkg-001"}


@pytest.mark.parametrize("fault", ["throttle", "server_error", "reset", "truncated_body"])
@pytest.mark.parametrize("name", ACCOUNTS)
def test_a_run_whose_questions_go_unanswered_for_a_while_ends_well(tmp_path: Path, name: str, fault: str) -> None:
    """The look-ups of validate and the tie-out ask again; no task fails, and each unit is billed once."""
    source, site = shipped(name), SITES[name]
    day = a_day(source, 5)
    noon, dimensions = day.start + timedelta(hours=12), ("eu", "premium")[: len(source.settings.dimensions)]
    with a_slow_house(tmp_path, hold_seconds=0, kind=PatientHouse) as house:
        house.sandbox.fault(site, fault, reads=True, count=4)
        comparison, folder = house.totals(source, day, [Event("one", ACCOUNTS[name], "3", noon, dimensions)])
        looked_up = house.sandbox.requests(site)
        assert looked_up["writing"] == 0
        house.deliver(source, comparison, folder)
        house.sandbox.fault(site, fault, reads=True, count=4)
        assert house.reconcile(source, day).ties_out

        counts = house.sandbox.requests(site)
        assert house.billed(source) == {ACCOUNTS[name]: Decimal(3)}
        assert counts["writing"] == 1
        if fault == "throttle":
            assert (looked_up["throttled"], counts["throttled"]) == (4, 8)
