"""Every destination against the running sandbox: what the billing site counted is the verdict."""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd
import pytest
import requests

from usage_billing.destinations import destination_class
from usage_billing.destinations.base import Destination
from usage_billing.destinations.chargeover import ChargeOverSettings, ChargeOverSite
from usage_billing.destinations.http import Transport
from usage_billing.destinations.maxio import MaxioSettings, MaxioSite
from usage_billing.destinations.settings import Timeouts
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused
from usage_billing.hooks import ChargeOverHook, MaxioHook
from usage_billing.records import ABSENT, DECIDED, PERSON_DECIDES, Delivery, Receipt, Target
from usage_billing.sandbox import Sandbox
from usage_billing.sources import BillingSource, SourceSettings
from usage_billing.uniqueness import identity, uniqueness_token

WORLDS = Path(__file__).parents[2] / "include" / "sandbox" / "worlds"
DAY = datetime(2026, 10, 5, 5, tzinfo=UTC)
HOUR_AGO = timedelta(hours=1)
ONCE = Transport(patience_seconds=0)


@dataclass(frozen=True)
class Case:
    """One destination as one source of one sandbox site uses it."""

    label: str
    site: str
    accounts: tuple[str, ...]
    component: str
    destination: dict[str, Any]
    decimals: int = 0
    zone: str = "America/Chicago"
    settings: dict[str, Any] = field(default_factory=dict)

    def connect(self, sandbox: Sandbox, **changes: Any) -> Any:
        """Return the plain client of the sandbox's site."""
        name = self.site.rpartition(":")[2]
        shared = {
            "settle_after_seconds": 0,
            "timeouts": Timeouts(connect=5, read=20, write=20),
            **self.settings,
            **changes,
        }
        if self.site.startswith("maxio"):
            key = {
                "api_key": f"sandbox-{name}-key",
                "base_url": sandbox.maxio_url(name),
                "events_url": sandbox.events_url,
            }
            return MaxioSite(MaxioSettings(**{"subdomain": name, **key, **shared}), ONCE)
        key = {"public_key": "sandboxtelcopublickey00000000000", "private_key": "sandboxtelcoprivatekey0000000000"}
        return ChargeOverSite(
            ChargeOverSettings(**{"instance": name, "base_url": sandbox.chargeover_url(name), **key, **shared}), ONCE
        )

    def source(self, **changes: Any) -> BillingSource:
        """Return the billing source; `changes` are keys of its destination."""
        found = destination_class(self.destination["name"])
        assert found is not None
        return BillingSource(
            settings=SourceSettings.model_validate(
                {
                    "name": self.label.replace(" ", "_"),
                    "description": self.label,
                    "warehouse": "warehouse",
                    "schedule": "0 0 * * *",
                    "timezone": self.zone,
                    "period": "day",
                    "bill_from": "2026-10-01",
                    "columns": {"event_id": "id", "time": "at", "account": "who", "quantity": "units"},
                    "meter": {"function": "sum", "decimals": self.decimals},
                    "dimensions": ["region"] if "events" in self.destination["name"] else [],
                }
            ),
            destination=found.settings_model.model_validate({**self.destination, "connection": "c", **changes}),
            sql="",
            expectations=(),
        )

    def made(self, sandbox: Sandbox, client: Any = None, **changes: Any) -> Destination:
        """Return the destination, reached through `client` or the sandbox."""
        found: Any = destination_class(self.destination["name"])
        return found(self.source(**changes), client or self.connect(sandbox))


METERED = Case(
    label="metered by reference",
    site="maxio:us:acme",
    accounts=("acct-0001", "acct-0002", "acct-0003"),
    component="api-calls",
    destination={
        "name": "maxio_metered",
        "subscription_by": "reference",
        "component": "handle:api-calls",
        "price_point": "handle:standard",
        "memo": "API calls of {period}",
    },
)
FRACTIONS = replace(
    METERED,
    label="metered by id",
    accounts=("50100004", "50100005"),
    component="storage-gb",
    destination={"name": "maxio_metered", "subscription_by": "id", "component": 61002},
    decimals=3,
)
EVENTS = Case(
    label="events",
    site="maxio:us:orbit",
    accounts=("orbit-01", "orbit-02", "orbit-03"),
    component="platform-units",
    destination={
        "name": "maxio_events",
        "stream": "platform-events",
        "subscription_by": "account_id",
        "component": "handle:platform-units",
        "property": "units",
    },
    decimals=3,
    zone="UTC",
)
BATCH = Case(
    label="chargeover in batches",
    site="chargeover:telco",
    accounts=("pkg-001", "pkg-002", "pkg-007"),
    component="voip",
    destination={"name": "chargeover_usage", "package_by": "external_key", "item": "voip"},
    decimals=2,
)
SINGLE = replace(BATCH, label="chargeover singly", destination={**BATCH.destination, "mode": "single"})
BY_CUSTOMER = replace(
    BATCH,
    label="chargeover by customer",
    accounts=("cust-001", "cust-003"),
    destination={**BATCH.destination, "package_by": "customer_external_key"},
)
BULK = replace(BATCH, label="chargeover in bulk", destination={**BATCH.destination, "mode": "bulk"})
BY_LINE = replace(
    BATCH,
    label="chargeover by line item",
    accounts=("854", "855", "860"),
    destination={**BATCH.destination, "package_by": "line_item_id"},
)
SIGNED = replace(BATCH, label="chargeover signed", settings={"auth": "signature"})
CASES = (METERED, FRACTIONS, EVENTS, BATCH, SINGLE, BULK, BY_CUSTOMER, BY_LINE, SIGNED)
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)

SWITCHES = [
    (METERED, {"uniqueness_token": "ignored"}),
    (METERED, {"quantity_type": "string"}),
    (METERED, {"usage_list_order": "ascending"}),
    (METERED, {"memo_limit": "255", "throttle_reply": "json_retry_after", "not_found_body": "html"}),
    (METERED, {"not_found_body": "empty", "token_scope": "path"}),
    (FRACTIONS, {"quantity_type": "string"}),
    (FRACTIONS, {"omitted_price_point": "locked_in"}),
    (EVENTS, {"events_size_limit": "64_kb"}),
    (BATCH, {"times_out": "iso", "details": "absent"}),
    (SINGLE, {"throttle_retry_after": "present", "throttle_body": "empty"}),
    (BATCH, {"cycle_by": "to", "limit_above_max": "refuse"}),
    (BULK, {"bulk_reply": "result_true"}),
    (BULK, {"times_out": "iso", "external_key_length": "64"}),
    (SINGLE, {"precise_usage": "round", "times_out": "iso_honolulu"}),
    (BATCH, {"precise_usage": "refuse"}),
    (SIGNED, {"signature_nonce": "any", "signature_skew_seconds": "none"}),
]
EVERY_SETTING = pytest.mark.parametrize(
    ("case", "switches"),
    [*((case, {}) for case in CASES), *SWITCHES],
    ids=lambda value: value.label if isinstance(value, Case) else ",".join(value.values()) or "as documented",
)


def proposals(
    targets: Sequence[Target], amounts: Sequence[str], day: datetime = DAY, revision: int = 0
) -> pd.DataFrame:
    """Return what a plan would propose for `targets`, a quantity for each."""
    rows = []
    for target, amount in zip(targets, amounts, strict=True):
        name = identity([target.subscription, target.component, day.isoformat()])
        rows.append(
            {
                "token": uniqueness_token(name, revision),
                "identity": name,
                "subscription": target.subscription,
                "component": target.component,
                "price_point": target.price_point,
                "dimensions": '{"region":"eu"}',
                "address": json.dumps(target.address, sort_keys=True),
                "period_start": pd.Timestamp(day),
                "period_end": pd.Timestamp(day + timedelta(days=1)),
                "quantity": amount,
                "open_from": target.open_from,
            }
        )
    return pd.DataFrame(rows).assign(open_from=lambda frame: pd.to_datetime(frame["open_from"], utc=True))


def deliveries(
    destination: Destination, proposed: pd.DataFrame, sends: int = 1, ago: timedelta = HOUR_AGO
) -> list[Delivery]:
    """Return proposals as the ledger would hand them over, last sent some time ago."""
    return [
        Delivery(
            token=row.token,
            identity=row.identity,
            revision=0,
            quantity=Decimal(row.quantity),
            address=Delivery.address_from(row.address),
            body=row.body,
            sent_at=datetime.now(UTC) - ago,
            sends=sends,
            subscription=row.subscription,
        )
        for row in proposed.assign(body=destination.encode(proposed)).itertuples()
    ]


def ready(case: Case, destination: Destination, amounts: Sequence[str] | None = None, **more: Any) -> list[Delivery]:
    """Return a delivery for each account of the case."""
    targets = destination.resolve(case.accounts)
    chosen = amounts or [f"{10 * (number + 1)}" for number in range(len(targets))]
    return deliveries(destination, proposals(targets, chosen), **more)


def send_all(destination: Destination, chosen: Sequence[Delivery]) -> list[str]:
    """Send in chunks as large as the destination takes; return the tokens that came back with a receipt."""
    size = destination.chunk_size
    chunks = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return [receipt.token for chunk in chunks for receipt in destination.send(chunk)]


def billed(sandbox: Sandbox, case: Case) -> Decimal:
    """Return what the site billed for the case's component, over all subscriptions."""
    return sum((row.billed for row in sandbox.billed(case.site) if row.component == case.component), Decimal(0))


def now() -> datetime:
    """Return the ledger's time, as far as these tests have one."""
    return datetime.now(UTC)


def attempt(destination: Destination, chunk: Sequence[Delivery]) -> set[str]:
    """Send a chunk and settle what is in doubt at once; return the tokens that the site has."""
    try:
        return {receipt.token for receipt in destination.send(chunk)}
    except NotApplied:
        return set()
    except InDoubt as doubt:
        proven = {receipt.token for receipt in doubt.receipts}
    answers = destination.settle([delivery for delivery in chunk if delivery.token not in proven], now())
    assert answers.keys() | proven == {delivery.token for delivery in chunk}
    return proven | {token for token, answer in answers.items() if isinstance(answer, Receipt)}


def deliver_all(destination: Destination, chosen: Sequence[Delivery]) -> None:
    """Do by hand what `deliver` does: send, settle what is in doubt, send again what was not applied."""
    waiting, size = list(chosen), destination.chunk_size
    for _ in range(5):
        chunks = [waiting[start : start + size] for start in range(0, len(waiting), size)]
        taken = {token for chunk in chunks for token in attempt(destination, chunk)}
        waiting, size = [one for one in waiting if one.token not in taken], destination.retry_chunk_size
        if not waiting:
            return
    raise AssertionError("it never ended")


# --- what every destination does ------------------------------------------------------------------------------------


@EVERY_CASE
def test_a_sound_source_is_told_so(case: Case, sandbox: Sandbox) -> None:
    """A source that can be billed passes the check, which writes nothing."""
    case.made(sandbox).check()

    assert sandbox.requests(case.site)["writing"] == 0


@EVERY_CASE
def test_accounts_are_found_in_order_and_strangers_are_named(case: Case, sandbox: Sandbox) -> None:
    """Known accounts get a canonical target, an unknown one a reason, in the order they were asked for."""
    asked = [*reversed(case.accounts), "99999999"]

    targets = case.made(sandbox).resolve(asked)

    assert [target.account for target in targets] == asked
    assert all(target.subscription and target.component and target.address for target in targets[:-1])
    assert "99999999" in targets[-1].unknown
    assert targets[-1].subscription == ""
    assert sandbox.requests(case.site)["writing"] == 0


@EVERY_SETTING
def test_everything_sent_is_billed_exactly(case: Case, switches: dict[str, str], sandbox: Sandbox) -> None:
    """The site bills the very decimals that were sent."""
    sandbox.switch(case.site, **switches)
    destination = case.made(sandbox)
    amounts = ["1.1", "2.2", "0.7"] if case.decimals else ["7", "11", "13"]
    chosen = ready(case, destination, amounts[: len(case.accounts)])

    tokens = send_all(destination, chosen)

    assert tokens == [delivery.token for delivery in chosen]
    assert billed(sandbox, case) == sum((delivery.quantity for delivery in chosen), Decimal(0))


@EVERY_SETTING
@pytest.mark.parametrize("fault", ["lost_reply", "server_error", "server_error_after_commit", "throttle"])
def test_trouble_bills_once(case: Case, switches: dict[str, str], fault: str, sandbox: Sandbox) -> None:
    """Whatever becomes of the first request, settling and sending again bills each delivery once."""
    sandbox.switch(case.site, **switches)
    destination = case.made(sandbox)
    chosen = ready(case, destination)
    sandbox.fault(case.site, fault)

    deliver_all(destination, chosen)

    assert billed(sandbox, case) == sum((delivery.quantity for delivery in chosen), Decimal(0))
    assert sum(row.records for row in sandbox.billed(case.site)) == len(chosen)


@EVERY_CASE
def test_a_late_request_is_found_once_it_has_landed(case: Case, sandbox: Sandbox) -> None:
    """A request that the site finishes after the client gave up is found by settling, and not sent again."""
    hasty = case.connect(sandbox, timeouts=Timeouts(connect=5, read=20, write=0.3))
    destination = case.made(sandbox, hasty)
    chosen = ready(case, destination)[: destination.chunk_size]
    sandbox.fault(case.site, "hang", seconds=1)
    with pytest.raises(InDoubt, match="read timeout"):
        destination.send(chosen)
    landed = wait_for(lambda: billed(sandbox, case) > 0)

    found = destination.settle(chosen, now())

    assert landed
    assert all(isinstance(found[delivery.token], Receipt) for delivery in chosen)
    assert billed(sandbox, case) == sum((delivery.quantity for delivery in chosen), Decimal(0))


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Return whether the condition came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(("case", "switches"), SWITCHES, ids=lambda value: getattr(value, "label", None) or str(value))
def test_every_setting_that_is_turned_is_looked_at(case: Case, switches: dict[str, str], sandbox: Sandbox) -> None:
    """A switch that the site never consults would prove nothing: what is sent through trouble meets each of them."""
    sandbox.switch(case.site, **switches)
    destination = case.made(sandbox)
    assert destination.resolve(["of-nobody" if not case.accounts[0].isdigit() else "99"])[0].unknown
    expected = Decimal(0)
    for number, fault in enumerate((None, "lost_reply", "server_error_after_commit", "throttle")):
        sandbox.clear_faults()
        targets = destination.resolve(case.accounts)
        day = DAY + timedelta(days=number)
        chosen = deliveries(destination, proposals(targets, ["7"] * len(targets), day))
        if fault:
            sandbox.fault(case.site, fault)
        deliver_all(destination, chosen)
        expected += sum((delivery.quantity for delivery in chosen), Decimal(0))
    assert billed(sandbox, case) == expected
    assert switches.keys() - sandbox.consulted(case.site) == set()


@pytest.mark.parametrize("case", [BATCH, SINGLE, BULK], ids=lambda case: case.label)
@pytest.mark.parametrize("fault", ["lost_reply", "server_error", "server_error_after_commit", "throttle"])
def test_no_key_comes_a_second_time(case: Case, fault: str, sandbox: Sandbox) -> None:
    """What an account makes of a second record with one key is documented nowhere: none is ever sent to it."""
    sandbox.switch(case.site, duplicate_external_key="accept")
    destination = case.made(sandbox)
    chosen = ready(case, destination)
    sandbox.fault(case.site, fault)
    deliver_all(destination, chosen)
    assert billed(sandbox, case) == sum((delivery.quantity for delivery in chosen), Decimal(0))
    assert "duplicate_external_key" not in sandbox.consulted(case.site)


@EVERY_CASE
def test_sending_twice_bills_once(case: Case, sandbox: Sandbox) -> None:
    """A delivery that a dead worker had sent already is recognised when another one sends it."""
    destination = case.made(sandbox)
    chosen = ready(case, destination)
    send_all(destination, chosen)

    deliver_all(destination, chosen)

    assert billed(sandbox, case) == sum((delivery.quantity for delivery in chosen), Decimal(0))


@EVERY_CASE
def test_a_wrong_key_stops_before_anything_is_billed(case: Case, sandbox: Sandbox) -> None:
    """Check, resolve and send say that the credentials are wrong; nothing was applied, and no key is told."""
    chosen = ready(case, case.made(sandbox))
    wrong = "wrong-key-31337"
    key = {"api_key": wrong} if case.site.startswith("maxio") else {"private_key": wrong}
    client = case.connect(sandbox, **key)
    destination = case.made(sandbox, client)

    for act in (destination.check, lambda: destination.resolve(case.accounts), lambda: send_all(destination, chosen)):
        with pytest.raises(Misconfigured, match="401") as told:
            act()
        assert wrong not in str(told.value) + repr(told.value) + repr(client.settings)
    assert billed(sandbox, case) == 0


@EVERY_CASE
def test_an_unknown_component_is_told_before_anything_is_sent(case: Case, sandbox: Sandbox) -> None:
    """A component that the site does not have is a fault of the definition, told with its key."""
    key = "item" if case.site.startswith("chargeover") else "component"
    name = "nowhere" if key == "item" else "handle:nowhere"

    with pytest.raises(Misconfigured, match=f"destination.{key}: .*nowhere"):
        case.made(sandbox, **{key: name}).check()

    assert sandbox.requests(case.site)["writing"] == 0


@EVERY_CASE
def test_an_unreachable_site_leaves_everything_to_be_sent_again(case: Case, sandbox: Sandbox) -> None:
    """Nothing listens at the address: nothing may be concluded, and nothing was applied."""
    chosen = ready(case, case.made(sandbox))
    urls = {"base_url": "http://127.0.0.1:9"} | (
        {"events_url": "http://127.0.0.1:9"} if case.site.startswith("maxio") else {}
    )
    destination = case.made(sandbox, case.connect(sandbox, **urls))

    for act in (destination.check, lambda: destination.resolve(case.accounts), lambda: send_all(destination, chosen)):
        with pytest.raises(NotApplied, match="connection refused"):
            act()


@EVERY_CASE
def test_a_wrong_address_makes_no_account_unknown(case: Case, sandbox: Sandbox) -> None:
    """Where nothing is but 404s, the definition is wrong, and not every customer gone."""
    is_maxio = case.site.startswith("maxio")
    url = sandbox.maxio_url("nowhere") if is_maxio else sandbox.chargeover_url("nowhere")
    destination = case.made(sandbox, case.connect(sandbox, base_url=url))

    with pytest.raises(Misconfigured):
        destination.resolve(case.accounts)
    with pytest.raises(Misconfigured):
        destination.check()


@EVERY_CASE
def test_records_of_the_site_tie_out(case: Case, sandbox: Sandbox) -> None:
    """What the site lists, or counts, is what was delivered, by token or by total."""
    destination = case.made(sandbox)
    targets = destination.resolve(case.accounts)
    proposed = proposals(targets, ["3", "5", "8"][: len(targets)])
    chosen = deliveries(destination, proposed)
    receipts = [r for d in chosen for r in destination.send([d])]
    accepted = proposed.assign(record_id=[receipt.record_id for receipt in receipts])

    records = destination.records(accepted)

    if records is not None:
        assert {(r.token, r.quantity) for r in records} == {(d.token, d.quantity) for d in chosen}
        return
    totals = destination.totals([target.subscription for target in targets]) or []
    counted = {total.subscription: total.quantity for total in totals if total.period.end > DAY}
    assert counted == dict(zip(accepted["subscription"], map(Decimal, accepted["quantity"]), strict=True))


@EVERY_CASE
def test_settling_asks_by_the_stored_address(case: Case, sandbox: Sandbox) -> None:
    """A doubt about what never arrived ends as absent, or is replayed where the site ignores repetitions."""
    destination = case.made(sandbox)
    chosen = ready(case, destination)

    found = destination.settle(chosen, now())

    replayed = case.destination["name"] == "maxio_events"
    assert [found[delivery.token] is not None for delivery in chosen] == [replayed] * len(chosen)
    assert billed(sandbox, case) == (60 if replayed else 0)


# --- Maxio metered --------------------------------------------------------------------------------------------------


def test_timeout_then_conflict_bills_once(sandbox: Sandbox) -> None:
    """The first reply is lost, the second try meets its own token: 409 is a doubt, and the list tells the rest."""
    destination = METERED.made(sandbox)
    delivery = ready(METERED, destination)[0]
    sandbox.fault(METERED.site, "lost_reply")
    for _ in range(2):
        with pytest.raises(InDoubt):
            destination.send([delivery])

    found = destination.settle([delivery], now())

    assert isinstance(found[delivery.token], Receipt)
    assert billed(sandbox, METERED) == delivery.quantity


def test_absent_after_a_conflict_waits_for_the_token_to_expire(sandbox: Sandbox) -> None:
    """What met its token and is absent stays in doubt for 61 minutes; what lost another reply may go again at once."""
    destination = METERED.made(sandbox)
    (lost, *_) = ready(METERED, destination, sends=2, ago=timedelta(0))
    destination.client.create_usage(50_100_003, 61001, lost.body)
    with pytest.raises(InDoubt) as conflict:
        destination.send([lost])
    delivery, sent_at = replace(lost, reason=str(conflict.value)), lost.sent_at
    assert sent_at is not None

    assert destination.settle([delivery], sent_at + timedelta(minutes=59)) == {}
    assert destination.settle([delivery], sent_at + timedelta(minutes=62)) == {delivery.token: None}
    assert destination.settle([lost], sent_at + timedelta(minutes=3)) == {delivery.token: None}


def test_a_spent_token_without_usage_ends_after_its_hour(sandbox: Sandbox) -> None:
    """A refused request used the token up: 409 until the hour has passed, then the same delivery is billed, once."""
    destination = METERED.made(sandbox)
    delivery = ready(METERED, destination, sends=2)[0]
    body = json.loads(delivery.body)
    body["usage"]["price_point_id"] = "1"
    with pytest.raises(Refused):
        destination.send([replace(delivery, body=json.dumps(body))])
    with pytest.raises(InDoubt, match="409"):
        destination.send([delivery])
    sandbox.move_clock(advance_seconds=61 * 60)

    found = destination.settle([delivery], now() + timedelta(minutes=62))
    destination.send([delivery])

    assert found == {delivery.token: None}
    assert billed(sandbox, METERED) == delivery.quantity


def test_a_token_with_another_quantity_is_reported(sandbox: Sandbox) -> None:
    """The site holds the token with another quantity: neither accepted nor sent again, but told."""
    destination = METERED.made(sandbox)
    delivery = ready(METERED, destination)[0]
    destination.send([delivery])

    answers = destination.settle([replace(delivery, quantity=Decimal(11))], now())

    assert_told_apart(answers[delivery.token], "holds 10, not 11")


def assert_told_apart(answer: object, words: str) -> None:
    """A token that is held with another quantity is neither there nor absent: it is reported."""
    assert isinstance(answer, Refused)
    assert words in str(answer)


def test_a_truncated_fraction_is_never_taken_for_the_whole(sandbox: Sandbox) -> None:
    """The site stores 5 of 5.5 without a word: that is a doubt at once, and settling tells the difference."""
    destination = METERED.made(sandbox)
    (target,) = destination.resolve(["acct-0001"])
    (delivery,) = deliveries(destination, proposals([target], ["5.5"]))

    with pytest.raises(InDoubt, match=r"holds 5, not 5\.5"):
        destination.send([delivery])
    assert_told_apart(destination.settle([delivery], now())[delivery.token], "holds 5, not 5.5")


@pytest.mark.parametrize("order", ["descending", "ascending"])
@pytest.mark.parametrize("between", [0, 450])
def test_a_token_that_is_stored_twice_is_reported(order: str, between: int, sandbox: Sandbox) -> None:
    """Two usages are no receipt but a finding, which names both; also where pages lie between them."""
    sandbox.switch(METERED.site, uniqueness_token="ignored", usage_list_order=order)
    destination = METERED.made(sandbox)
    delivery = ready(METERED, destination)[0]
    numbers = []
    for _ in range(2):
        numbers += [receipt.record_id for receipt in destination.send([delivery])]
        for _ in range(between):
            destination.client.create_usage(delivery.address["subscription_id"], 61001, '{"usage":{"quantity":1}}')

    answer = destination.settle([replace(delivery, reserved_at=delivery.sent_at)], now())[delivery.token]

    assert isinstance(answer, Refused)
    assert all(f"usage {number} (10)" in str(answer) for number in numbers)
    assert billed(sandbox, METERED) == 20 + 2 * between


def test_the_search_for_a_second_usage_ends_with_the_time_in_which_it_can_be(sandbox: Sandbox) -> None:
    """A thousand usages of the days before are not walked: what was found on the first page is asked about once."""
    destination = METERED.made(sandbox)
    (first, *_) = ready(METERED, destination)
    for _ in range(450):
        destination.client.create_usage(first.address["subscription_id"], 61001, '{"usage":{"quantity":1}}')
    sandbox.move_clock(advance_seconds=2 * 86_400)
    destination.send([first])
    sandbox.reset_requests()

    found = destination.settle([replace(first, reserved_at=first.sent_at)], now())

    assert isinstance(found[first.token], Receipt)
    assert sandbox.requests(METERED.site)["by_route"]["list_usages"] == 1


def test_a_deduction_that_the_site_never_shows_is_for_a_person_after_a_day(sandbox: Sandbox) -> None:
    """The usage is in the list and its site event is not: a day later no more waiting helps."""
    sandbox.switch(METERED.site, events_delay_seconds=10_000_000)
    destination = METERED.made(sandbox)
    (target,) = destination.resolve(METERED.accounts[:1])
    send_all(destination, deliveries(destination, proposals([target], ["9"])))
    (deduction,) = deliveries(destination, proposals([target], ["-4"], DAY + timedelta(days=1)))
    with pytest.raises(InDoubt, match="does not show yet"):
        destination.send([deduction])

    soon = destination.settle([deduction], now())
    late = destination.settle([deduction], now() + timedelta(days=1))

    assert soon == {}
    assert isinstance(late[deduction.token], InDoubt)
    assert "no site event tells" in str(late[deduction.token])
    assert billed(sandbox, METERED) == 5


@pytest.mark.parametrize("order", ["descending", "ascending"])
def test_a_long_list_is_walked_to_its_end_in_either_order(order: str, sandbox: Sandbox) -> None:
    """Every usage is seen once, over several pages, whichever way the site sorts; so absent means absent."""
    sandbox.switch(METERED.site, usage_list_order=order)
    client = METERED.connect(sandbox)
    made = [client.create_usage(50100001, 61001, '{"usage":{"quantity":1}}')["id"] for _ in range(405)]

    walked = [usage["id"] for usage in client.usages(50100001, "handle:api-calls") or ()]
    later = [usage["id"] for usage in client.usages(50100001, 61001, since_id=made[200]) or ()]

    assert sorted(walked) == made
    assert sorted(later) == made[200:]


def test_an_ended_subscription_is_quarantined(sandbox: Sandbox) -> None:
    """Usage of a cancelled subscription would never be billed, so its account is named with that reason."""
    (target,) = METERED.made(sandbox).resolve(["acct-0090"])

    assert "is canceled" in target.unknown


def test_a_subscription_that_was_canceled_tells_when(sandbox: Sandbox) -> None:
    """So that usage of before, which is owed, can be told from usage after its end."""
    sandbox.move_clock("2026-10-20T12:00:00Z")
    url = f"{sandbox.maxio_url('acme')}/subscriptions/50100001.json"
    assert requests.delete(url, auth=("sandbox-acme-key", "x"), timeout=5).status_code == 200

    ended, active = METERED.made(sandbox).resolve(["acct-0001", "acct-0002"])

    assert "is canceled" in ended.unknown
    assert ended.ended_at is not None
    assert timedelta(0) <= ended.ended_at - datetime(2026, 10, 20, 12, tzinfo=UTC) < timedelta(minutes=1)
    assert (active.unknown, active.ended_at) == ("", None)


def test_a_reference_of_digits_never_bills_the_subscription_with_that_id(tmp_path: Path) -> None:
    """The reference 50100002 belongs to subscription 50100001: usage goes to the reference's owner."""
    world = (WORLDS / "acme.yaml").read_text()
    world = world.replace('"acct-{n:04d}"', '"5010000{n}"').replace("count: 12, id: 50100001", "count: 2, id: 50100002")
    (tmp_path / "acme.yaml").write_text(world)
    case = replace(METERED, accounts=("50100002",))
    with Sandbox([tmp_path / "acme.yaml"]) as sandbox:
        # Subscription 50100002 has reference 50100001, and 50100003 has 50100002.
        destination = case.made(sandbox)
        send_all(destination, ready(case, destination, ["4"]))

        assert {row.subscription: row.billed for row in sandbox.billed(case.site) if row.billed} == {
            "50100003": Decimal(4)
        }


def test_many_accounts_are_looked_up_in_few_requests(sandbox: Sandbox) -> None:
    """Known accounts come from the list; only the strangers are asked for one by one, and a 404 makes them unknown."""
    known = [f"acct-{number:04d}" for number in range(1, 13)]
    strangers = [f"stranger-{number}" for number in range(15)]

    targets = METERED.made(sandbox).resolve([*known, *strangers])

    assert [bool(target.unknown) for target in targets] == [False] * 12 + [True] * 15
    routes = sandbox.requests(METERED.site)["by_route"]
    assert routes["lookup_subscription"] == len(strangers)


def test_a_failing_look_up_concludes_nothing(sandbox: Sandbox) -> None:
    """A look-up that fails stops the run: no account is called unknown because of it."""
    destination = METERED.made(sandbox)
    sandbox.fault(METERED.site, "server_error", route="lookup_subscription", reads=True, after=1)

    with pytest.raises(NotApplied, match="500"):
        destination.resolve(METERED.accounts)


def test_every_fault_of_a_definition_is_told_at_once(sandbox: Sandbox) -> None:
    """Wrong kind, fractions that the component does not take and an unknown price point make three lines."""
    case = replace(METERED, decimals=2)
    with pytest.raises(Misconfigured) as told:
        case.made(sandbox, component="handle:seats", price_point="handle:nowhere").check()
    assert "3 faults" in str(told.value)

    with pytest.raises(Misconfigured, match="archived"):
        METERED.made(sandbox, component="handle:legacy-calls").check()


@pytest.mark.parametrize("access", ["account_canceled", "trial_ended", "data_clearing", "site_deleted"])
def test_a_blocked_site_stops_the_run_and_refuses_no_record(access: str, sandbox: Sandbox) -> None:
    """The site-wide 422 hits every request: it is no fault of the delivery."""
    destination = METERED.made(sandbox)
    delivery = ready(METERED, destination)[0]
    sandbox.switch(METERED.site, access=access)

    with pytest.raises(Misconfigured, match="whole site"):
        destination.send([delivery])
    with pytest.raises(Misconfigured, match="whole site"):
        destination.check()


def test_a_bad_usage_is_refused_with_the_sites_words(sandbox: Sandbox) -> None:
    """A refusal that lies in the record carries what the site said."""
    destination = METERED.made(sandbox, component="handle:seats", price_point=None)
    delivery = ready(METERED, destination)[0]

    with pytest.raises(Refused, match="Usages can only be added to metered or prepaid usage components"):
        destination.send([delivery])


def test_deductions_wait_for_a_balance(sandbox: Sandbox) -> None:
    """The balance floors at zero, so of a deduction goes what the balance takes, and a reason stands at the rest."""
    destination = METERED.made(sandbox)
    targets = destination.resolve(METERED.accounts)
    send_all(destination, deliveries(destination, proposals(targets[1:2], ["3"])))

    goes, why = destination.judge(proposals(targets, ["-5", "-5", "5"], DAY + timedelta(days=1)))

    assert list(goes)[1:] == ["-3", "5"]
    assert "never falls below" in why[0]
    assert list(why)[1:] == ["", ""]


# --- Maxio events ---------------------------------------------------------------------------------------------------


def test_a_thousand_events_travel_in_one_request(sandbox: Sandbox) -> None:
    """A full chunk is one request, and each event counts."""
    destination = EVENTS.made(sandbox)
    (target,) = destination.resolve(["orbit-01"])
    one = proposals([target], ["0.001"])
    many = pd.concat([one] * 1000, ignore_index=True).assign(token=[f"{number:064x}" for number in range(1000)])
    chosen = deliveries(destination, many)
    sandbox.reset_requests()

    send_all(destination, chosen)

    assert sandbox.requests(EVENTS.site)["writing"] == 1
    assert billed(sandbox, EVENTS) == Decimal("1.000")


def test_events_of_a_closed_billing_period_are_held(sandbox: Sandbox) -> None:
    """The stream would take them and never bill them."""
    destination = EVENTS.made(sandbox)
    targets = destination.resolve(EVENTS.accounts)
    closed = proposals(targets, ["1", "2", "3"], datetime(2026, 9, 28, 23, tzinfo=UTC))
    last = proposals(targets, ["1", "2", "3"], datetime(2026, 9, 29, 23, tzinfo=UTC))

    assert all("closed" in reason for reason in destination.hold_reason(closed))
    assert not any(destination.hold_reason(last)), "its run comes after the renewal"
    assert not any(destination.hold_reason(proposals(targets, ["1", "2", "3"])))


def test_a_usage_period_that_the_renewal_cut_in_two_bills_in_the_open_billing_period(sandbox: Sandbox) -> None:
    """A day that began before the renewal and ended after it is neither held nor lost."""
    destination = EVENTS.made(sandbox)
    targets = destination.resolve(EVENTS.accounts)
    cut = proposals(targets, ["1", "2", "3"], datetime(2026, 9, 30, 23, tzinfo=UTC))

    assert not any(destination.hold_reason(cut))
    send_all(destination, deliveries(destination, cut))

    assert billed(sandbox, EVENTS) == Decimal(6)


def test_a_replay_outside_its_window_is_forbidden(sandbox: Sandbox) -> None:
    """After 30 days the stream may have forgotten the token: the doubt stays, nothing is sent."""
    destination = EVENTS.made(sandbox)
    chosen = ready(EVENTS, destination, ago=timedelta(days=30, minutes=1))
    sandbox.reset_requests()

    answers = destination.settle(chosen, now())
    assert answers.keys() == {delivery.token for delivery in chosen}
    assert all(isinstance(answer, InDoubt) and "30 days ago" in str(answer) for answer in answers.values())
    assert sandbox.requests(EVENTS.site)["writing"] == 0


def test_a_doubt_that_outlives_its_billing_period_is_not_replayed(sandbox: Sandbox) -> None:
    """After renewal a replay might be taken and never billed, so the doubt stays listed by name."""
    destination = EVENTS.made(sandbox)
    chosen = ready(EVENTS, destination)
    sandbox.move_clock("2026-11-02T00:00:00Z")
    sandbox.reset_requests()

    answers = destination.settle(chosen, now())
    assert answers.keys() == {delivery.token for delivery in chosen}
    assert all(isinstance(answer, InDoubt) and "has closed" in str(answer) for answer in answers.values())
    assert sandbox.requests(EVENTS.site)["writing"] == 0


def test_an_unknown_stream_is_a_fault_of_the_definition(sandbox: Sandbox) -> None:
    """No record is refused for a stream that the events host does not know."""
    destination = EVENTS.made(sandbox, stream="no-such-stream")
    with pytest.raises(Misconfigured, match="no such stream"):
        destination.send(ready(EVENTS, destination))


def test_a_metered_component_takes_no_events(sandbox: Sandbox) -> None:
    """The wrong kind of component is told by its kind."""
    case = replace(EVENTS, site=METERED.site)
    with pytest.raises(Misconfigured, match="metered_component; maxio_events needs event_based_component"):
        case.made(sandbox, component="handle:api-calls").check()


def test_a_property_may_not_stand_twice_in_an_event(sandbox: Sandbox) -> None:
    """A dimension called like the quantity's property would hide one of the two: told by the check."""
    with pytest.raises(Misconfigured, match="'region' would stand twice"):
        EVENTS.made(sandbox, property="region").check()


def test_events_by_subscription_id_count_for_it(sandbox: Sandbox) -> None:
    """A stream identified by subscription_id takes the number, inside the chargify object."""
    by_id = {"stream": "raw-events", "subscription_by": "subscription_id", "component": "handle:raw-count"}
    case = replace(EVENTS, accounts=("50200001",), component="raw-count", destination={**EVENTS.destination, **by_id})
    destination = case.made(sandbox)
    destination.check()

    send_all(destination, ready(case, destination, ["5"]))

    assert {row.subscription: row.billed for row in sandbox.billed(case.site) if row.billed} == {"50200001": Decimal(1)}


def test_totals_cover_closed_periods_too(sandbox: Sandbox) -> None:
    """After renewal the closed period's total is still told, beside the open one's."""
    destination = EVENTS.made(sandbox)
    send_all(destination, ready(EVENTS, destination))
    sandbox.move_clock("2026-11-02T00:00:00Z")

    totals = destination.totals(["50200001"]) or []

    assert [(total.period.start.month, total.quantity) for total in totals] == [(10, Decimal(10)), (11, Decimal(0))]


# --- ChargeOver -----------------------------------------------------------------------------------------------------


def test_times_are_the_accounts_own_and_the_end_is_included(sandbox: Sandbox) -> None:
    """A day in Chicago is sent as its first and last second there, without an offset."""
    destination = BATCH.made(sandbox)
    body = json.loads(ready(BATCH, destination)[0].body)

    assert (body["from"], body["to"]) == ("2026-10-05 00:00:00", "2026-10-05 23:59:59")


def test_an_upgrade_changes_the_address_and_not_the_identity(sandbox: Sandbox) -> None:
    """A new price gives the line a new id: the next run finds it, and what was billed stays the same customer's."""
    destination = BATCH.made(sandbox)
    (before,) = destination.resolve(["pkg-001"])
    send_all(destination, deliveries(destination, proposals([before], ["3"])))
    upgrade(sandbox, 713, before.address["line_item_id"])

    (after,) = destination.resolve(["pkg-001"])
    send_all(destination, deliveries(destination, proposals([after], ["4"], DAY + timedelta(days=1))))

    assert (after.subscription, after.component) == (before.subscription, before.component)
    assert after.address != before.address
    assert billed(sandbox, BATCH) == 7


def test_an_account_that_is_a_line_leads_to_its_package(sandbox: Sandbox) -> None:
    """After an upgrade its id is on no package, and today's leads to the same identity: nothing is billed again."""
    destination = BY_LINE.made(sandbox)
    (before,) = destination.resolve(["854"])
    upgrade(sandbox, 713, 854)
    by_package = BATCH.made(sandbox).resolve(["pkg-001"])[0]
    new = str(by_package.address["line_item_id"])

    gone, after = destination.resolve(["854", new])
    stands = destination.standing(before.subscription)

    assert "line item 854 is on no package of chargeover:telco; an upgrade gives a line another id" in gone.unknown
    assert gone.ended_at is None
    assert (
        (after.subscription, after.component)
        == (before.subscription, before.component)
        == ("package_id:713", "item:voip")
    )
    assert after.address == stands.address == by_package.address != before.address
    assert (after.open_from, after.open_until) == (by_package.open_from, by_package.open_until)


def test_a_line_is_found_on_whatever_page_its_package_is(sandbox: Sandbox) -> None:
    """Pages follow the ids, so a package is neither passed over nor told twice, and a stranger is one in earnest."""
    destination = BY_LINE.made(sandbox)
    client = destination.client
    every = [package["package_id"] for package in client.packages()]
    pages = []

    def page(call: str, path: str, params: Any) -> Any:
        found = listed(call, path, {**params, "limit": 2})
        pages.append([row["package_id"] for row in found])
        return found

    listed, client._list = client._list, page
    lines = [str(package["line_items"][0]["line_item_id"]) for package in client.packages()]
    pages.clear()
    *known, stranger = destination.resolve([*lines, "77"])

    assert [number for numbers in pages for number in numbers] == every
    assert max(map(len, pages)) == 2
    assert not any(target.unknown for target in known if target.subscription)
    assert "line item 77 is on no package" in stranger.unknown


def upgrade(sandbox: Sandbox, package: int, line: int) -> None:
    """Change a line's price on the site, as its owner would."""
    keys = ("sandboxtelcopublickey00000000000", "sandboxtelcoprivatekey0000000000")
    body = {"line_items": [{"line_item_id": line, "tierset": {"tiers": [{"amount": 0.07}]}}]}
    url = f"{sandbox.chargeover_url('telco')}/api/v3/package/{package}/_action/upgrade"
    assert requests.post(url, json=body, auth=keys, timeout=5).status_code == 200


def test_usage_of_a_replaced_line_is_refused_and_named(sandbox: Sandbox) -> None:
    """A delivery stored before an upgrade names a line that is gone: a refusal, not a doubt, in a batch and alone."""
    for case in (BATCH, SINGLE):
        destination = case.made(sandbox)
        chosen = ready(replace(case, accounts=("pkg-002",)), destination)
        upgrade(sandbox, 714, chosen[0].address["line_item_id"])

        with pytest.raises(Refused):
            destination.send(chosen)
    assert billed(sandbox, BATCH) == 0


def test_one_bad_record_does_not_hold_up_its_batch(sandbox: Sandbox) -> None:
    """The good ones get their receipts; the bad one stays without, and is refused once it travels alone."""
    destination = BATCH.made(sandbox)
    chosen = ready(BATCH, destination)
    upgrade(sandbox, 714, chosen[1].address["line_item_id"])

    tokens = send_all(destination, chosen)

    assert tokens == [chosen[0].token, chosen[2].token]
    with pytest.raises(Refused):
        destination.send([chosen[1]])
    assert billed(sandbox, BATCH) == chosen[0].quantity + chosen[2].quantity


@pytest.mark.parametrize("case", [SINGLE, BATCH, BULK], ids=lambda case: case.label)
@pytest.mark.parametrize("precise", ["exact", "round"])
def test_more_decimals_than_an_account_may_keep_are_accepted_once_they_were_read_back(
    case: Case, precise: str, sandbox: Sandbox
) -> None:
    """A receipt says nothing of rounding: what was stored otherwise than sent is a person's, and is told by name."""
    sandbox.switch(case.site, precise_usage=precise)
    destination = case.made(sandbox)
    chosen = ready(case, destination, ["1.00005", "0.5000000", "2.0625"])
    took, doubted = [], []
    for chunk in [[one] for one in chosen] if case is SINGLE else [chosen]:
        try:
            took += destination.send(chunk)
        except InDoubt as doubt:
            took += doubt.receipts
            doubted.append(str(doubt))

    sound = chosen[1:] if precise == "round" else chosen
    assert [receipt.token for receipt in took] == [one.token for one in sound]
    assert len(doubted) == (precise == "round")
    assert all("1.0001, and 1.00005 was sent" in words for words in doubted)
    answer = destination.settle(chosen, now())[chosen[0].token]
    assert isinstance(answer, Refused if precise == "round" else Receipt)
    assert billed(sandbox, case) == (Decimal("3.5626") if precise == "round" else Decimal("3.56255"))


@pytest.mark.parametrize("shown", ["naive", "iso", "iso_honolulu"])
def test_the_open_cycle_is_the_same_however_the_account_shows_times(shown: str, sandbox: Sandbox) -> None:
    """The last of the month in Honolulu is the first one in Chicago: a day read there would open an invoiced cycle."""
    sandbox.switch(BATCH.site, times_out=shown)
    (target,) = BATCH.made(sandbox).resolve(["pkg-001"])

    chicago = ZoneInfo("America/Chicago")
    assert target.open_from == datetime(2026, 10, 1, tzinfo=chicago)
    assert target.open_until == datetime(2026, 11, 1, tzinfo=chicago)


@pytest.mark.parametrize("case", [SINGLE, BATCH], ids=lambda case: case.label)
def test_a_refusal_of_what_came_back_from_a_doubt_is_none_while_reads_lag(case: Case, sandbox: Sandbox) -> None:
    """The refusal may be for its own first request, which is billed: it is a doubt, and ends by itself once seen."""
    sandbox.switch(case.site, usage_read_delay_seconds=600, error_texts="generic")
    destination = case.made(sandbox)
    (first,) = ready(replace(case, accounts=("pkg-001",)), destination)
    sandbox.fault(case.site, "lost_reply")
    with pytest.raises(InDoubt):
        destination.send([first])
    assert destination.settle([first], now()) == {first.token: None}

    with pytest.raises(InDoubt, match="perhaps because its first request arrived after all") as doubt:
        destination.send([replace(first, reason=ABSENT)])
    again = replace(first, sends=2, reason=str(doubt.value))
    asked = destination.settle([again], now())[first.token]
    assert isinstance(asked, Refused), "asked in vain: to send it again could go round for ever"
    sandbox.move_clock(advance_seconds=601)
    seen = destination.settle([replace(again, reason=f"{PERSON_DECIDES}{asked}")], now())[first.token]

    assert isinstance(seen, Receipt)
    assert billed(sandbox, case) == first.quantity


@pytest.mark.parametrize("case", [SINGLE, BATCH], ids=lambda case: case.label)
def test_a_refusal_in_earnest_after_a_doubt_ends_with_a_person(case: Case, sandbox: Sandbox) -> None:
    """Lost, absent, and then refused for its own sake: asked once more, then told; a person's no makes it refused."""
    destination = case.made(sandbox)
    (lost,) = ready(replace(case, accounts=("pkg-002",)), destination)
    upgrade(sandbox, 714, lost.address["line_item_id"])
    with pytest.raises(InDoubt) as doubt:
        destination.send([replace(lost, reason=ABSENT)])

    reason = str(doubt.value)
    for _ in range(3):
        asked = destination.settle([replace(lost, sends=2, reason=reason)], now())[lost.token]
        assert isinstance(asked, Refused)
        reason = f"{PERSON_DECIDES}{asked}"
    assert str(asked).count("has not shown it since") == 1, "the words do not grow with each question"
    with pytest.raises(Refused):
        destination.send([replace(lost, sends=3, reason=f"{DECIDED}2026-10-20 by somebody: not there")])
    assert billed(sandbox, case) == 0


def with_value(delivery: Delivery, value: int) -> Delivery:
    """Return the same delivery with another quantity, as no ledger would ever make it."""
    was = f'"usage_value":{delivery.quantity}'
    return replace(delivery, quantity=Decimal(value), body=delivery.body.replace(was, f'"usage_value":{value}'))


@pytest.mark.parametrize("case", [SINGLE, BATCH, BULK], ids=lambda case: case.label)
def test_an_external_key_with_another_value_is_reported(case: Case, sandbox: Sandbox) -> None:
    """The account holds one of our keys with another value: that one is in doubt and told, the other one is billed."""
    destination = case.made(sandbox)
    known, free = ready(case, destination)[:2]
    destination.send([known])
    other = with_value(known, 12)
    chunk = [other] if case is SINGLE else [free, other]

    with pytest.raises(InDoubt, match="held with 10, and 12 was sent") as doubt:
        destination.send(chunk)
    answers = destination.settle(chunk, now())

    # One bad record spoils a whole bulk, and no record of a batch.
    assert {receipt.token for receipt in doubt.value.receipts} == ({free.token} if case is BATCH else set())
    assert_told_apart(answers[other.token], "held with 10, and 12 was sent")
    assert billed(sandbox, case) == (30 if case is BATCH else 10)


@pytest.mark.parametrize("duplicates", ["refuse", "accept", "overwrite"])
@pytest.mark.parametrize("case", [SINGLE, BATCH, BULK], ids=lambda case: case.label)
def test_settling_tells_apart_what_the_account_holds(case: Case, duplicates: str, sandbox: Sandbox) -> None:
    """The same value is a receipt, another one a finding, nothing an absence: each delivery by itself."""
    sandbox.switch(case.site, duplicate_external_key=duplicates)
    destination = case.made(sandbox)
    same, other, absent = ready(case, destination)
    for delivery in (same, other):
        destination.send([delivery])

    answers = destination.settle([same, with_value(other, 21), absent], now())

    assert isinstance(answers[same.token], Receipt)
    assert_told_apart(answers[other.token], "held with 20, and 21 was sent")
    assert answers[absent.token] is None
    assert sum(row.records for row in sandbox.billed(case.site)) == 2


def test_a_key_that_is_there_twice_is_reported(sandbox: Sandbox) -> None:
    """Where the account takes a key twice, two records are no receipt but a finding."""
    sandbox.switch(SINGLE.site, duplicate_external_key="accept")
    destination = SINGLE.made(sandbox)
    delivery = ready(SINGLE, destination)[0]
    for _ in range(2):
        destination.send([delivery])

    assert_told_apart(destination.settle([delivery], now())[delivery.token], "held with 10, 10")


# --- ChargeOver in bulk -----------------------------------------------------------------------------------------------


def spoil(kind: str, sandbox: Sandbox, chosen: Sequence[Delivery]) -> Sequence[Delivery]:
    """Make the second of three deliveries one that the account refuses."""
    if kind == "negative":
        sandbox.switch(BULK.site, negative_usage="refuse")
        return [chosen[0], with_value(chosen[1], -20), chosen[2]]
    upgrade(sandbox, 714, chosen[1].address["line_item_id"])
    return chosen


@pytest.mark.parametrize("duplicates", ["refuse", "accept", "overwrite"])
@pytest.mark.parametrize("atomicity", ["atomic", "stop_at_first_error", "skip_bad_silently"])
@pytest.mark.parametrize("kind", ["negative", "replaced line"])
@pytest.mark.parametrize("fault", ["none", "lost_reply", "server_error_after_commit"])
def test_a_bad_record_of_a_bulk_is_named_and_the_others_are_billed_once(
    kind: str, atomicity: str, duplicates: str, fault: str, sandbox: Sandbox
) -> None:
    """Whatever one bad record does to a bulk, the good ones are billed once and the bad one is refused by name."""
    sandbox.switch(BULK.site, bulk_atomicity=atomicity, duplicate_external_key=duplicates)
    destination = BULK.made(sandbox)
    good, bad, too = spoil(kind, sandbox, ready(BULK, destination))
    if fault != "none":
        sandbox.fault(BULK.site, fault)

    # The culprit is unknown after the bulk, and shows once everything that is not there goes singly.
    first = attempt(destination, [good, bad, too])
    for delivery in (one for one in (good, too) if one.token not in first):
        destination.send([delivery])
    with pytest.raises(Refused, match="Missing or invalid parameter"):
        destination.send([bad])

    assert bad.token not in first
    assert billed(sandbox, BULK) == good.quantity + too.quantity
    assert sum(row.records for row in sandbox.billed(BULK.site)) == 2


@pytest.mark.parametrize("atomicity", ["atomic", "stop_at_first_error", "skip_bad_silently"])
def test_a_bulk_proves_what_can_be_read_back_and_doubts_the_rest(atomicity: str, sandbox: Sandbox) -> None:
    """The receipts are of those that were stored before, or beside, the bad record; never of the bad one."""
    sandbox.switch(BULK.site, bulk_atomicity=atomicity)
    destination = BULK.made(sandbox)
    good, bad, too = spoil("negative", sandbox, ready(BULK, destination))

    with pytest.raises(InDoubt, match="of a bulk of 3 can be read back") as doubt:
        destination.send([good, bad, too])

    stored = {"atomic": [], "stop_at_first_error": [good], "skip_bad_silently": [good, too]}[atomicity]
    assert [receipt.token for receipt in doubt.value.receipts] == [one.token for one in stored]
    assert billed(sandbox, BULK) == sum((one.quantity for one in stored), Decimal(0))


def test_a_bulk_that_cannot_be_seen_yet_is_in_doubt_and_found_later(sandbox: Sandbox) -> None:
    """Reads lag ten minutes behind writes: what is not visible is no reason to send again."""
    sandbox.switch(BULK.site, usage_read_delay_seconds=600, duplicate_external_key="accept")
    destination = BULK.made(sandbox)
    chosen = ready(BULK, destination)
    with pytest.raises(InDoubt, match="0 of a bulk of 3 can be read back; the account says that it took it") as doubt:
        destination.send(chosen)
    sandbox.move_clock(advance_seconds=900)

    answers = destination.settle(chosen, now())

    assert doubt.value.receipts == ()
    assert all(isinstance(answers[delivery.token], Receipt) for delivery in chosen)
    assert billed(sandbox, BULK) == 60
    assert sandbox.requests(BULK.site)["writing"] == 1


@pytest.mark.parametrize("atomicity", ["atomic", "skip_bad_silently"])
def test_a_bulk_that_was_sent_before_is_recognised(atomicity: str, sandbox: Sandbox) -> None:
    """Its keys are all there with the same values: success, whether the second upload was refused or skipped."""
    sandbox.switch(BULK.site, bulk_atomicity=atomicity)
    destination = BULK.made(sandbox)
    chosen = ready(BULK, destination)
    first = destination.send(chosen)

    again = destination.send(chosen)

    assert [(receipt.token, receipt.record_id) for receipt in again] == [(r.token, r.record_id) for r in first]
    assert billed(sandbox, BULK) == 60


def test_an_account_that_cannot_be_read_leaves_the_bulk_in_doubt(sandbox: Sandbox) -> None:
    """The upload went through and the question after it did not: nothing is accepted, nothing sent again."""
    destination = BULK.made(sandbox)
    chosen = ready(BULK, destination)
    sandbox.fault(BULK.site, "server_error", route="query_usage", reads=True)

    with pytest.raises(InDoubt, match="0 of a bulk of 3") as doubt:
        destination.send(chosen)

    assert doubt.value.receipts == ()
    assert billed(sandbox, BULK) == 60


@pytest.mark.parametrize("lines", [1, 40])
def test_a_thousand_records_travel_in_one_request_and_are_read_back_in_few(lines: int, tmp_path: Path) -> None:
    """Few lines are asked for one by one, many in the list of their time; every receipt has its own number."""
    packages = f'  - {{count: {lines}, package_id: 2001, external_key: "many-{{n}}", customer: cust-001, '
    world = (WORLDS / "telco.yaml").read_text() + packages + "lines: [{id: 5001, item: voip}]}\n"
    (tmp_path / "telco.yaml").write_text(world)
    with Sandbox([tmp_path / "telco.yaml"]) as sandbox:
        destination = BULK.made(sandbox)
        targets = destination.resolve([f"many-{number}" for number in range(1, lines + 1)])
        tokens = [f"{number:064x}" for number in range(1000)]
        proposed = proposals(targets * (1000 // lines), ["1"] * 1000).assign(token=tokens)
        sandbox.reset_requests()

        receipts = destination.send(deliveries(destination, proposed))

        routes = sandbox.requests(BULK.site)["by_route"]
        assert [receipt.token for receipt in receipts] == tokens
        assert len({receipt.record_id for receipt in receipts}) == 1000
        assert (routes["bulk_usage"], routes["query_usage"]) == (1, 3)
        assert billed(sandbox, BULK) == 1000


def test_negative_usage_waits_unless_the_connection_allows_it(sandbox: Sandbox) -> None:
    """No document says that an account takes negatives, so a person has to."""
    cautious = BATCH.made(sandbox)
    allowed = BATCH.made(sandbox, BATCH.connect(sandbox, negative_usage="allowed"))
    proposed = proposals(cautious.resolve(BATCH.accounts), ["5", "-5", "1"])

    assert [bool(reason) for reason in cautious.hold_reason(proposed)] == [False, True, False]
    assert not any(allowed.hold_reason(proposed))


def test_what_cannot_be_billed_is_named_with_its_reason(tmp_path: Path) -> None:
    """Two lines of one item, no line, a line that is not metered: each has its own words; an odd key is found."""
    world = (WORLDS / "telco.yaml").read_text()
    world += """
  - {package_id: 801, external_key: twice, customer: cust-001, lines: [{id: 901, item: voip}, {id: 902, item: voip}]}
  - {package_id: 802, external_key: none, customer: cust-002, lines: [{id: 903, item: sms}]}
  - {package_id: 803, external_key: "odd:key,with\\\\slash", customer: cust-003, lines: [{id: 904, item: voip}]}
  - {package_id: 804, external_key: flat, customer: cust-004, lines: [{id: 905, item: support}]}
"""
    (tmp_path / "telco.yaml").write_text(world)
    with Sandbox([tmp_path / "telco.yaml"]) as sandbox:
        odd = "odd:key,with\\slash"
        twice, none, found = BATCH.made(sandbox).resolve(["twice", "none", odd])
        (flat,) = BATCH.made(sandbox, item="support").resolve(["flat"])
        by_customer = BY_CUSTOMER.made(sandbox).resolve(["cust-001", "cust-002"])
        by_line = BY_LINE.made(sandbox).resolve(["901", "903", "pkg-001", "855.0", "855", "0"])
        with pytest.raises(Misconfigured, match="'support' is not metered"):
            BATCH.made(sandbox, item="support").check()

    assert "ambiguous" in twice.unknown
    assert "no line" in none.unknown
    assert (found.subscription, found.address) == (f"package:{odd}", {"line_item_id": 904})
    assert "not metered" in flat.unknown
    assert "3 lines" in by_customer[0].unknown
    assert not by_customer[1].unknown
    assert [target.unknown for target in by_line] == [
        "line item 901: package 801 has 2 lines of item 'voip', so it is ambiguous which one to bill",
        "line item 903 is of item 'sms', not of 'voip'",
        "'pkg-001' is no id of a line item, which is a whole number",
        "'855.0' is no id of a line item, which is a whole number",
        "",
        "'0' is no id of a line item, which is a whole number",
    ]


def test_a_cancelled_package_is_quarantined(sandbox: Sandbox) -> None:
    """Usage of a cancelled package would not be billed."""
    keys = ("sandboxtelcopublickey00000000000", "sandboxtelcoprivatekey0000000000")
    sandbox.move_clock("2026-10-20T12:00:00Z")
    url = f"{sandbox.chargeover_url('telco')}/api/v3/package/713/_action/cancel"
    assert requests.post(url, auth=keys, timeout=5).status_code == 200

    (target,) = BATCH.made(sandbox).resolve(["pkg-001"])
    (customer,) = BY_CUSTOMER.made(sandbox).resolve(["cust-001"])
    (line,) = BY_LINE.made(sandbox).resolve(["854"])
    (looked_at,) = BY_LINE.made(sandbox).locate(["854"])

    assert "is cancelled" in target.unknown
    assert "no active package" in customer.unknown
    assert line.unknown == "line item 854: package 713 is cancelled: its usage would not be billed"
    assert (looked_at.subscription, looked_at.unknown) == ("package_id:713", "")
    for found in (target, customer, line):
        assert found.ended_at is not None
        # The site tells it in the account's zone, without an offset.
        assert timedelta(0) <= found.ended_at - datetime(2026, 10, 20, 12, tzinfo=UTC) < timedelta(minutes=1)


def test_many_packages_come_from_one_list(sandbox: Sandbox) -> None:
    """Known packages come from the list with their lines; only strangers are asked for one by one."""
    known = [f"pkg-{number:03d}" for number in range(1, 9)]

    targets = BATCH.made(sandbox).resolve([*known, *(f"stranger-{number}" for number in range(20))])

    assert [bool(target.unknown) for target in targets] == [False] * 8 + [True] * 20
    assert sandbox.requests(BATCH.site)["by_route"]["query_packages"] <= 2 + 20


# --- the Test button --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "works"), [("sandbox-acme-key", True), ("wrong-key-31337", False)])
def test_the_maxio_button_asks_the_site(
    key: str, works: bool, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The button's word is the site's own answer, and a refused key is not repeated."""
    extra = {"subdomain": "acme", "settle_after_seconds": 0}
    fields = {"conn_type": "maxio", "host": sandbox.maxio_url("acme"), "password": key, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_MAXIO_ACME", json.dumps(fields))

    worked, words = MaxioHook("maxio_acme").test_connection()

    assert worked is works
    assert ("maxio:us:acme answers" in words) is works
    assert key not in words
    assert sandbox.requests("maxio:us:acme")["by_route"] != {}


@pytest.mark.parametrize(("key", "works"), [("sandboxtelcoprivatekey0000000000", True), ("wrong-key-31337", False)])
def test_the_chargeover_button_asks_the_account(
    key: str, works: bool, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The button's word is the account's own answer, and a refused key is not repeated."""
    fields = {
        "conn_type": "chargeover",
        "host": sandbox.chargeover_url("telco"),
        "login": "sandboxtelcopublickey00000000000",
        "password": key,
        "extra": {"instance": "telco"},
    }
    monkeypatch.setenv("AIRFLOW_CONN_TELCO", json.dumps(fields))

    worked, words = ChargeOverHook("telco").test_connection()

    assert worked is works
    assert ("chargeover:telco answers" in words) is works
    assert key not in words


def test_one_process_never_exceeds_the_sites_limit(sandbox: Sandbox) -> None:
    """However many threads send, no more requests are in process at once than the connection allows."""
    client = METERED.connect(sandbox, concurrency=2)
    sandbox.fault(METERED.site, "hang", count=6, seconds=0.05)

    with ThreadPoolExecutor(6) as pool:
        made = list(
            pool.map(lambda _: client.create_usage(50100001, 61001, '{"usage":{"quantity":1}}')["id"], range(12))
        )

    assert len(set(made)) == 12
    assert sandbox.requests(METERED.site)["most_in_process"] == 2


def test_a_wrong_address_is_told_by_the_button(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that is not there answers 404 to everything: that is no site, and not an empty one."""
    extra = {"subdomain": "acme"}
    fields = {"conn_type": "maxio", "host": sandbox.maxio_url("nowhere"), "password": "some-key", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_LOST", json.dumps(fields))

    worked, words = MaxioHook("lost").test_connection()

    assert not worked
    assert "no Maxio site" in words
