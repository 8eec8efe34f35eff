"""Where one feature meets another: approval and release, late usage and adopt, write-offs and what is owed later.

The verdict is the sandbox's count: what it billed, and what the ledger lists.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from late import AFTER_THE_RENEWAL, Held, billed, lenient, november, used
from living import LivingHouse
from moving import MovingHouse, usage
from stories import GENTLE, SITES, Event, House, a_day, a_house, shipped
from usage_billing.adopt import Adoption
from usage_billing.approve import Approved, turn_down
from usage_billing.deliver import Delivered, deliver
from usage_billing.errors import Misconfigured, NeedsDecision, NotApplied
from usage_billing.preview import digest_of, going_of, preview
from usage_billing.records import PASSES, UNAPPROVED, Approval, Choice, Comparison, Decision, Period, Plan, State, Tally
from usage_billing.release import policy_of, reissue
from usage_billing.sources import BillingSource
from usage_billing.workers import Means

pytestmark = pytest.mark.filterwarnings("default")
DATED = ("platform_events", "voip_minutes")
OTHER = {"api_calls": "acct-0002", "platform_events": "orbit-02"}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Held]:
    """A house in which people decide about what is held."""
    with a_house(tmp_path, Held) as found:
        assert isinstance(found, Held)
        yield found


@pytest.fixture
def living(tmp_path: Path) -> Iterator[LivingHouse]:
    """A house whose ledger can be lost; two records may bear one key there, so nothing but adopt keeps them apart."""
    with a_house(tmp_path, LivingHouse) as found:
        assert isinstance(found, LivingHouse)
        found.sandbox.switch("chargeover:telco", duplicate_external_key="accept")
        yield found


def asking(name: str, **changes: str) -> BillingSource:
    """Return a source that asks a person before anything is sent."""
    source = lenient(name, **changes)
    return replace(source, settings=source.settings.model_copy(update={"approval": True}))


def answer(house: House, source: BillingSource, comparison: Comparison, folder: str, decision: Decision) -> Plan:
    """Decide about what a plan would send, as the operator writes it down; return the plan."""
    plan = house.plan(source, comparison, folder)
    digest, going = digest_of(plan.proposals, house.staging)
    assert going
    decided = house.ledger.record_decision(source.name, comparison.reading, digest, decision, "vera", "so it is")
    if decision is not Decision.APPROVED:
        say_no(house, source, plan, comparison, folder, decided)
    return plan


def say_no(
    house: House, source: BillingSource, plan: Plan, comparison: Comparison, folder: str, decided: Approval
) -> int:
    """List by name what a plan would have sent, as the operator does."""
    replan = partial(house.plan, source, comparison, folder)
    return turn_down(plan, replan, decided, house.destination(source), house.ledger, house.staging)


def deliver_approved(house: House, source: BillingSource, comparison: Comparison, folder: str, plan: Plan) -> Delivered:
    """Deliver as the task of a source that asks does."""
    approved = Approved(source.name, comparison.reading, plan.proposals, house.ledger, house.staging)
    approved.check()
    return deliver(
        Plan(plan.proposals, Tally(blocked=1)),
        lambda: approved.within(house.plan(source, comparison, folder)),
        comparison.reading,
        comparison.periods,
        house.destination(source),
        house.ledger,
        house.staging,
        GENTLE,
        Means(stop=threading.Event()),
    )


def written_down(house: House, source: BillingSource, comparison: Comparison, plan: Plan) -> None:
    """Reserve a plan, and do no more: the worker dies."""
    site = house.destination(source).site
    for part in house.staging.read(plan.proposals):
        house.ledger.reserve(source.name, site, comparison.reading, part.to_pandas())


def let_go_by_a_renewal(house: House, source: BillingSource, comparison: Comparison) -> None:
    """Let the site renew, and hold what that overtook, as the source's policy lets it pass; the worker dies then."""
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    waiting = house.ledger.reserved(source.name, comparison.reading, 10)
    destination = house.destination(source)
    reasons = destination.recheck(waiting, house.ledger.now())
    assert house.ledger.hold(reasons, policy_of(destination)) == len(waiting)


# --- approval and moves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["api_calls", "voip_minutes"])
def test_a_yes_to_a_credit_is_one_to_the_bill_that_follows_it(tmp_path: Path, name: str) -> None:
    """A move was chosen: the question shows both, and one deliver sends them in their order, without asking again."""
    source, day = asking(name), a_day(shipped(name), 5)
    with a_house(tmp_path, MovingHouse) as house:
        assert isinstance(house, MovingHouse)
        house.run(lenient(name), day, usage(source, day, {1: 100}))
        house.lead(source, 1, to=2)
        house.run(lenient(name), day, usage(source, day, {1: 100}))
        house.choose(source, 1, Choice.MOVE)
        comparison, folder = house.totals(source, day, usage(source, day, {1: 100}))
        plan = answer(house, source, comparison, folder, Decision.APPROVED)
        looked = preview(plan, comparison, house.destination(source), house.ledger, house.staging)
        shown = {case.label: (case.count, case.quantity) for case in looked.cases}
        assert (shown["corrections down"], shown["after a credit"]) == ((1, -100), (1, 100))
        deliver_approved(house, source, comparison, folder, plan)
        assert (house.sums(source), house.waits(source, day)) == ({2: 100}, {})


def test_a_bill_that_nobody_was_asked_about_does_not_follow_its_credit(tmp_path: Path) -> None:
    """The credit was on its way already, so the plan sent nothing and nobody was asked."""
    source, day = asking("api_calls"), a_day(shipped("api_calls"), 5)
    with a_house(tmp_path, MovingHouse) as house:
        assert isinstance(house, MovingHouse)
        house.run(lenient("api_calls"), day, usage(source, day, {1: 100}))
        house.lead(source, 1, to=2)
        house.run(lenient("api_calls"), day, usage(source, day, {1: 100}))
        house.choose(source, 1, Choice.MOVE)
        comparison, folder = house.totals(source, day, usage(source, day, {1: 100}))
        sent = house.plan(source, comparison, folder)
        written_down(house, source, comparison, sent)
        ready = house.ledger.reserved(source.name, comparison.reading, 1000)
        lease = house.ledger.acquire("deliver:other", "other", timedelta(seconds=1))
        house.ledger.begin_sending([delivery.token for delivery in ready], lease)
        time.sleep(1.1)
        house.ledger.doubt_abandoned(source.name)
        plan = house.plan(source, comparison, folder)
        assert digest_of(plan.proposals, house.staging)[1] == 0
        house.ledger.record_decision(source.name, comparison.reading, "another", Decision.APPROVED, "vera", "")
        with pytest.raises(NeedsDecision, match="are not what was approved any more"):
            deliver_approved(house, source, comparison, folder, plan)
        assert house.sums(source) == {}


# --- approval and what was let go -----------------------------------------------------------------------------------


@pytest.mark.parametrize("decision", [Decision.REJECTED, Decision.TIMED_OUT])
@pytest.mark.parametrize("name", DATED)
def test_a_no_overrules_a_release_of_before(house: Held, name: str, decision: Decision) -> None:
    """Released by one person and turned down by the next: the sweep sends nothing of it."""
    source, day = asking(name), a_day(shipped(name), 30)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(lenient(name), day, used(source, day, "7"))
    house.release(source, day)
    comparison, folder = house.totals(source, day, used(source, day, "7"))
    answer(house, source, comparison, folder, decision)
    house.sweep(source)
    assert billed(house, source) == 0
    assert house.listed(source, day) == [("held", "7")]


@pytest.mark.parametrize("name", sorted(OTHER))
def test_a_no_is_written_down_though_a_part_of_the_plan_moved(house: Held, name: str) -> None:
    """One of three was written off while the question stood: the two others are held by name, and count as two."""
    source, day = asking(name), a_day(shipped(name), 19)
    comparison, folder = house.totals(source, day, used(source, day, "7"))
    answer(house, source, comparison, folder, Decision.REJECTED)
    (first,) = house.open_items(source, day)["token"]
    third = "acct-0003" if name == "api_calls" else "orbit-03"
    events = [*used(source, day, "7"), *used(source, day, "4", OTHER[name]), *used(source, day, "2", third)]
    comparison, folder = house.totals(source, day, events)
    plan = house.plan(source, comparison, folder)
    shown, going = digest_of(plan.proposals, house.staging)
    house.ledger.decide(first, State.WRITTEN_OFF, "decided on a day by somebody: goodwill")
    decided = house.ledger.record_decision(source.name, comparison.reading, shown, Decision.REJECTED, "vera", "no")

    assert (going, say_no(house, source, plan, comparison, folder, decided)) == (3, 2)
    left = house.open_items(source, day)
    assert sorted(zip(left["state"], left["quantity"], strict=True)) == [("held", "2"), ("held", "4")]
    assert left["reason"].str.startswith(UNAPPROVED).all()
    assert say_no(house, source, house.plan(source, comparison, folder), comparison, folder, decided) == 2
    house.sweep(source)
    assert house.billed(source) == {}


@pytest.mark.parametrize("name", DATED)
def test_what_nobody_approved_is_released_by_nobody_either(house: Held, name: str) -> None:
    """The answer belongs to those whom the source names: the command sends them back to the question."""
    source, day = asking(name, late_usage="now"), a_day(shipped(name), 30)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    comparison, folder = house.totals(source, day, used(source, day, "7"))
    answer(house, source, comparison, folder, Decision.REJECTED)
    with pytest.raises(Misconfigured, match="clear the plan"):
        house.release(source, day)


@pytest.mark.parametrize("name", DATED)
def test_a_renewal_after_the_answer_sends_nothing_that_was_not_approved(house: Held, name: str) -> None:
    """Approved for October and overtaken: dated in November it is another, so it is held until the next question."""
    source, day = asking(name, late_usage="now"), a_day(shipped(name), 30)
    comparison, folder = house.totals(source, day, used(source, day, "7"))
    plan = answer(house, source, comparison, folder, Decision.APPROVED)
    written_down(house, source, comparison, plan)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    deliver_approved(house, source, comparison, folder, plan)
    house.sweep(source)
    assert billed(house, source) == 0
    assert house.listed(source, day) == [("held", "7")]
    (reason,) = house.open_items(source, day)["reason"]
    assert reason.startswith(PASSES)
    assert reason.endswith("clear the run from validate on, or release it by name")

    comparison, folder = house.totals(source, day, used(source, day, "7"))
    plan = answer(house, source, comparison, folder, Decision.APPROVED)
    approved = {line.split()[0] for part in house.staging.read(plan.proposals) for line in going_of(part)}
    deliver_approved(house, source, comparison, folder, plan)
    assert billed(house, source) == 7
    assert set(house.ledger.accepted(source.name, Period.around(source.periods(day)))["token"]) == approved


def test_a_deduction_that_was_turned_down_is_listed_whole(house: Held) -> None:
    """Nine are owed back and four could go now: what was rejected is the nine."""
    source = asking("api_calls")
    day, later = a_day(source, 30), november(source)
    house.run(lenient("api_calls"), day, used(source, day, "10"))
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(lenient("api_calls"), later, used(source, later, "4"))
    comparison, folder = house.totals(source, day, used(source, day, "1"))
    answer(house, source, comparison, folder, Decision.REJECTED)
    assert house.listed(source, day) == [("held", "-9")]


def test_a_try_after_a_release_is_not_told_that_nobody_was_asked(house: Held) -> None:
    """What a person let go was written down and not sent: the next try goes on, without an approval of the reading."""
    source, day = asking("platform_events"), a_day(shipped("platform_events"), 30)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    comparison, folder = house.totals(source, day, used(source, day, "7"))
    plan = house.plan(source, comparison, folder)
    deliver_approved(house, source, comparison, folder, plan)
    assert house.listed(source, day) == [("held", "7")]
    house.release(source, day)
    assert reissue(house.destination(source), house.ledger) == 1
    deliver_approved(house, source, comparison, folder, plan)
    assert billed(house, source) == 7


def test_what_was_written_down_unasked_is_still_stopped(house: Held) -> None:
    """The source began to ask after the deliver that failed: nothing of that goes unasked."""
    source, day = asking("platform_events"), a_day(shipped("platform_events"), 19)
    comparison, folder = house.totals(source, day, used(source, day, "7"))
    plan = house.plan(source, comparison, folder)
    written_down(house, source, comparison, plan)
    with pytest.raises(NeedsDecision, match="before the source asked"):
        deliver_approved(house, source, comparison, folder, house.plan(source, comparison, folder))
    assert billed(house, source) == 0


def test_a_sweep_sends_nothing_that_was_written_down_before_the_source_asked(house: Held) -> None:
    """Throttled, and asked about since: the next run of its day asks, and a yes bills it."""
    plain, day = lenient("platform_events"), a_day(shipped("platform_events"), 19)
    comparison, folder = house.totals(plain, day, used(plain, day, "7"))
    house.sandbox.fault(SITES[plain.name], "throttle", count=100)
    with pytest.raises(NotApplied):
        house.deliver(plain, comparison, folder, manners=replace(GENTLE, patience=timedelta(0)))
    house.sandbox.clear_faults()
    source = asking("platform_events")
    house.sweep(source)
    assert billed(house, source) == 0
    assert house.listed(source, day) == [("reserved", "7")]
    with pytest.raises(NeedsDecision, match="before the source asked"):
        deliver_approved(house, source, comparison, folder, house.plan(source, comparison, folder))

    comparison, folder = house.totals(source, day, used(source, day, "7"))
    deliver_approved(house, source, comparison, folder, answer(house, source, comparison, folder, Decision.APPROVED))
    assert billed(house, source) == 7
    assert house.listed(source, day) == []


def test_a_sweep_sends_again_what_was_approved(house: Held) -> None:
    """A yes of before holds for what a throttled site did not take: no run has to come for it."""
    source, day = asking("platform_events"), a_day(shipped("platform_events"), 19)
    comparison, folder = house.totals(source, day, used(source, day, "7"))
    plan = answer(house, source, comparison, folder, Decision.APPROVED)
    house.sandbox.fault(SITES[source.name], "throttle", count=100)
    with pytest.raises(NotApplied):
        house.deliver(source, comparison, folder, first=plan, manners=replace(GENTLE, patience=timedelta(0)))
    house.sandbox.clear_faults()
    house.sweep(source)
    assert billed(house, source) == 7


@pytest.mark.parametrize("policy", ["refuse", "hold"])
@pytest.mark.parametrize("name", DATED)
def test_a_policy_of_then_lets_nothing_go_in_a_sweep_either(house: Held, name: str, policy: str) -> None:
    """Overtaken under `now` and held when the worker died; the source holds or refuses late usage since."""
    source, day = lenient(name, late_usage="now"), a_day(shipped(name), 30)
    comparison, folder = house.totals(source, day, used(source, day, "7"))
    written_down(house, source, comparison, house.plan(source, comparison, folder))
    let_go_by_a_renewal(house, source, comparison)
    strict = lenient(name, late_usage=policy)
    house.sweep(strict)
    assert (billed(house, strict), house.listed(strict, day)) == (0, [("held", "7")])
    house.sweep(source)
    assert billed(house, source) == 7


@pytest.mark.parametrize("name", DATED)
def test_what_a_policy_let_go_before_the_source_asked_is_asked_about(house: Held, name: str) -> None:
    """The cleared deliver sends nothing of it; a new reading asks, and a yes bills it."""
    plain, day = lenient(name, late_usage="now"), a_day(shipped(name), 30)
    comparison, folder = house.totals(plain, day, used(plain, day, "7"))
    written_down(house, plain, comparison, house.plan(plain, comparison, folder))
    let_go_by_a_renewal(house, plain, comparison)
    source = asking(name, late_usage="now")
    deliver_approved(house, source, comparison, folder, house.plan(source, comparison, folder))
    house.sweep(source)
    assert (billed(house, source), house.listed(source, day)) == (0, [("held", "7")])
    comparison, folder = house.totals(source, day, used(source, day, "7"))
    deliver_approved(house, source, comparison, folder, answer(house, source, comparison, folder, Decision.APPROVED))
    assert (billed(house, source), house.listed(source, day)) == (7, [])


@pytest.mark.parametrize("by", ["deliver", "sweep"])
def test_a_yes_to_one_delivery_sends_no_other_of_its_reading(house: Held, by: str) -> None:
    """Seven were throttled before the source began to ask; the question shows six that are taken back, and no more."""
    plain, source = lenient("api_calls"), asking("api_calls")
    day, later, second = a_day(plain, 30), november(plain), "acct-0002"
    house.run(plain, day, used(plain, day, "10", second))
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    comparison, folder = house.totals(plain, day, [*used(plain, day, "7"), *used(plain, day, "4", second)])
    house.sandbox.fault(SITES[plain.name], "throttle", count=100)
    with pytest.raises(NotApplied):
        house.deliver(plain, comparison, folder, manners=replace(GENTLE, patience=timedelta(0)))
    house.sandbox.clear_faults()
    house.run(plain, later, used(plain, later, "20", second))
    plan = answer(house, source, comparison, folder, Decision.APPROVED)
    if by == "sweep":
        house.sweep(source)
    else:
        with pytest.raises(NeedsDecision, match="before the source asked"):
            deliver_approved(house, source, comparison, folder, plan)
    assert billed(house, source) == 0
    assert ("reserved", "7") in house.listed(source, day)


@pytest.mark.parametrize("name", DATED)
def test_a_yes_to_a_credit_of_october_is_none_to_one_of_november(house: Held, name: str) -> None:
    """The question waits over the renewal: the same token and quantity are on another bill by then."""
    house.allow_negative = True
    plain, source, day = lenient(name, late_usage="now"), asking(name, late_usage="now"), a_day(shipped(name), 30)
    keep = used(plain, day, "1", {"voip_minutes": "pkg-002", "platform_events": "orbit-02"}[name])
    house.run(plain, day, [*used(plain, day, "7"), *keep])
    comparison, folder = house.totals(source, day, keep)
    shown, going = digest_of(house.plan(source, comparison, folder).proposals, house.staging)
    assert going == 1
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    first = november(plain)
    house.run(plain, first, used(plain, first, "9"))
    again = house.plan(source, comparison, folder)
    digest, going = digest_of(again.proposals, house.staging)
    assert (digest != shown, going) == (True, 1)
    house.ledger.record_decision(source.name, comparison.reading, shown, Decision.APPROVED, "vera", "as shown")
    with pytest.raises(NeedsDecision, match="wait for an approval"):
        deliver_approved(house, source, comparison, folder, again)
    assert billed(house, source) == 16


def test_a_policy_of_then_lets_nothing_go_today(house: Held) -> None:
    """Overtaken under `now` and held when the worker died; the source refuses late usage since: nothing is sent."""
    day = a_day(shipped("platform_events"), 30)
    source = lenient("platform_events", late_usage="now")
    comparison, folder = house.totals(source, day, used(source, day, "7"))
    written_down(house, source, comparison, house.plan(source, comparison, folder))
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    waiting = house.ledger.reserved(source.name, comparison.reading, 10)
    reasons = house.destination(source).recheck(waiting, house.ledger.now())
    assert house.ledger.hold(reasons, "late_usage: now, grace: 0:00:00") == 1
    strict = lenient("platform_events", late_usage="refuse")
    house.run(strict, day, used(strict, day, "7"))
    assert billed(house, strict) == 0
    assert house.listed(strict, day) == [("refused", "7")]


# --- write-offs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OTHER))
@pytest.mark.parametrize("left", ["31", "1", "0"])
def test_what_was_written_off_is_never_taken_back(house: Held, name: str, left: str) -> None:
    """31 were written off and never billed; the warehouse says less since: the other day's 40 stay as they are."""
    source, day, other = lenient(name), a_day(shipped(name), 5), a_day(shipped(name), 6)
    house.run(source, other, used(source, other, "40"))
    comparison, folder = house.totals(source, day, used(source, day, "31"))
    answer(house, source, comparison, folder, Decision.REJECTED)
    (token,) = house.open_items(source, day)["token"]
    house.ledger.decide(token, State.WRITTEN_OFF, "decided on a day by somebody: goodwill")
    whose = "" if left != "0" else OTHER[name]
    house.run(source, day, used(source, day, left if left != "0" else "2", whose))
    assert billed(house, source) == 40
    assert house.listed(source, day) == []

    house.run(source, day, used(source, day, "36") + (used(source, day, "2", whose) if whose else []))
    assert billed(house, source) == 45, "what is owed beyond the write-off is billed"


# --- late usage and a lost ledger -----------------------------------------------------------------------------------


@pytest.mark.parametrize("today", ["2026-11-01T18:00:00Z", "2026-11-05T18:00:00Z"])
def test_usage_that_its_grace_let_pass_is_adopted_where_it_lies(living: LivingHouse, today: str) -> None:
    """The last day of October is dated in November: adopted on the day of the renewal, or later, and not sent again."""
    source = lenient("voip_minutes", grace="24h")
    day = a_day(source, 31)
    living.sandbox.move_clock(today)
    living.at(living.sandbox.now())
    living.run(source, day, used(source, day, "7"))
    assert living.reconcile(source, day).ties_out
    living.begin_anew()
    living.at(living.sandbox.now())
    assert living.adopt(source, [1, 31], used(source, day, "7")).entered == 1
    living.run(source, day, used(source, day, "7"))
    assert billed(living, source) == 7
    assert living.reconcile(source, day).ties_out


@pytest.mark.parametrize("name", DATED)
def test_usage_that_a_renewal_overtook_is_not_billed_again_after_a_loss(living: LivingHouse, name: str) -> None:
    """It went as a later revision, so a replay of the first one would be another record: adopt leaves it to nobody."""
    source = lenient(name, late_usage="now")
    day = a_day(source, 30)
    living.sandbox.move_clock("2026-10-31T12:00:00Z")
    living.at(living.sandbox.now())
    comparison, folder = living.totals(source, day, used(source, day, "7"))
    plan = living.plan(source, comparison, folder)
    written_down(living, source, comparison, plan)
    living.sandbox.move_clock(AFTER_THE_RENEWAL)
    living.at(living.sandbox.now())
    living.deliver(source, comparison, folder, first=plan)
    assert billed(living, source) == 7
    living.begin_anew()
    living.at(living.sandbox.now() + timedelta(minutes=1))
    found = living.adopt(source, [1, 31], used(source, day, "7"))
    assert (found.entered, found.held) == ((1, 0) if name == "voip_minutes" else (0, 1))
    living.run(source, day, used(source, day, "7"))
    assert billed(living, source) == 7


# --- a lost ledger and what made a later revision -------------------------------------------------------------------


def lost_and_adopted(living: LivingHouse, day: Period, events: list[Event], copy: Path | None = None) -> Adoption:
    """Lose the ledger or put back a copy, adopt the nineteenth, and run it again; return what adopt found."""
    source = lenient("platform_events")
    if copy is None:
        living.begin_anew()
    else:
        living.restore(copy)
    found = living.adopt(source, [19, 19], events)
    living.run(source, day, events)
    assert living.reconcile(source, day).ties_out
    return found


def test_what_was_superseded_before_it_was_sent_is_not_billed_again_after_a_loss(living: LivingHouse) -> None:
    """The next reading replaced what the first one had reserved, so it was billed as revision 1: none replays that."""
    source, day = lenient("platform_events"), a_day(shipped("platform_events"), 19)
    comparison, folder = living.totals(source, day, used(source, day, "10"))
    written_down(living, source, comparison, living.plan(source, comparison, folder))
    events = used(source, day, "12")
    living.run(source, day, events)
    found = lost_and_adopted(living, day, events)
    assert (found.entered, found.held, found.replayable) == (1, 0, 0)
    assert billed(living, source) == 12


def test_what_was_rejected_once_and_approved_then_is_not_billed_again_after_a_loss(living: LivingHouse) -> None:
    """Each question makes a revision, and the second one was billed."""
    source, day = asking("platform_events"), a_day(shipped("platform_events"), 19)
    events = used(source, day, "12")
    comparison, folder = living.totals(source, day, events)
    answer(living, source, comparison, folder, Decision.REJECTED)
    comparison, folder = living.totals(source, day, events)
    plan = answer(living, source, comparison, folder, Decision.APPROVED)
    deliver_approved(living, source, comparison, folder, plan)
    assert billed(living, source) == 12
    lost_and_adopted(living, day, events)
    assert billed(living, source) == 12


def test_a_credit_that_quarantine_withheld_is_not_given_twice_after_a_restore(living: LivingHouse) -> None:
    """The copy knows the bill alone; the credit was held as one revision and went as the next."""
    source, day = lenient("platform_events"), a_day(shipped("platform_events"), 19)
    limits = source.settings.quarantine.model_copy(update={"max_share": 1.0, "max_rows": 100})
    source = replace(source, settings=source.settings.model_copy(update={"quarantine": limits}))
    living.run(source, day, used(source, day, "12"))
    copy = living.backup()
    less = used(source, day, "5")
    living.run(source, day, less + used(source, day, "1", "nobody-knows-me"))
    living.run(source, day, less)
    assert billed(living, source) == 5
    found = lost_and_adopted(living, day, less, copy)
    assert (found.entered, found.held, found.replayable) == (1, 0, 0)
    assert billed(living, source) == 5
