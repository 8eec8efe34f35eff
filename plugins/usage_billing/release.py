"""What a person released: held and refused deliveries become new revisions, as the site bills them today.

A run judges what it owes anew, and so does this, without one: the ledger alone says how much is owed, since the newest
reading has listed just that. What cannot go all the same (the subscription has ended, no balance takes a deduction)
stays held, released as it is, and says so.
"""

import logging
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

import pandas as pd

from usage_billing.destinations.base import Destination, shuffled
from usage_billing.errors import NotApplied
from usage_billing.ledger import Ledger
from usage_billing.moves import PLACE, Moves
from usage_billing.records import POLICY, Delivery, Period, Target, Window
from usage_billing.uniqueness import uniqueness_token

log = logging.getLogger(__name__)

_MISSES = 3
"""How many subscriptions in a row may be asked about in vain before no more are."""
_IN_PART = "no part of what was released goes alone, and the balance takes only a part of it"


def reissue(destination: Destination, ledger: Ledger, window: Window | None = None) -> int:
    """Write down a new revision of whatever is released today and can go, in `window` or its edition; return how many.

    Whoever sends what is reserved sends these; two that do this at once write each of them once.

    Raises:
        Misconfigured: the site could not be asked; nothing was changed.
        NotApplied: it could not be asked about some subscriptions, which stay as they are; all others were seen to.
    """
    name = destination.source.name
    destination.book = ledger
    held = ledger.released(name, window or destination.source.span)
    # What a policy of another day let go, or one of before the source asked for approvals, is for a plan to judge.
    held = held[~held["released"].str.startswith(POLICY) | (held["released"] == policy_of(destination))]
    if held.empty:
        return 0
    moves = Moves(name, ledger.placements(name, destination.source.edition))
    try:
        return _reissued(held, destination, moves, ledger)
    except NotApplied as fault:
        if fault.throttled or len(set(held["subscription"])) == 1:
            raise
        log.warning("what was released is looked at subscription by subscription: %s", fault)
        return _one_by_one(held, destination, moves, ledger)


def _one_by_one(held: pd.DataFrame, destination: Destination, moves: Moves, ledger: Ledger) -> int:
    """Do the same for each subscription alone, so that one which cannot be read keeps no other waiting.

    Raises:
        NotApplied: the last fault, at the end; or where several in a row say that it is the site which is not well.
    """
    now, written, in_vain, last = ledger.now(), 0, 0, None
    # Another order each time, lest the same few keep the others from their turn for ever.
    for subscription in sorted(set(held["subscription"]), key=lambda name: shuffled(name, now)):
        try:
            written += _reissued(held[held["subscription"] == subscription], destination, moves, ledger)
            in_vain = 0
        except NotApplied as fault:
            log.warning("what was released of subscription %s waits: %s", subscription, fault)
            last, in_vain = fault, in_vain + 1
            if in_vain == _MISSES:
                break
    if last is not None:
        raise last
    return written


def _reissued(held: pd.DataFrame, destination: Destination, moves: Moves, ledger: Ledger) -> int:
    rows, why = _as_of_today(held, destination, moves, ledger.now())
    can_go = why == ""
    ledger.explain_released(dict(zip(rows["supersedes"][~can_go], why[~can_go], strict=True)))
    written = ledger.reissue(destination.source.name, destination.site, rows[can_go].reset_index(drop=True))
    log.info("released: %d go now, %d wait", written, int((~can_go).sum()))
    return written


def policy_of(destination: Destination) -> str:
    """Return what lets go a delivery that a renewal overtakes: the source's policy of today; nothing where it asks.

    In another billing period it would be another delivery than the approved one.
    """
    grace = destination.source.destination.grace
    settings = destination.source.settings
    told = f"one data interval of {settings.schedule}" if grace is None else grace
    return "" if settings.approval else f"{POLICY}{destination.late_usage}, grace: {told}"


def _as_of_today(
    held: pd.DataFrame, destination: Destination, moves: Moves, now: datetime
) -> tuple[pd.DataFrame, pd.Series]:
    """Return the next revisions as the site would bill them today, and of each why it cannot go, or an empty text."""
    targets = {target.account: target for target in destination.resolve_accounts(sorted(held["account"].unique()))}
    today = [_today(row, targets[row["account"]], moves) for row in held.to_dict("records")]
    revisions = held["revision"] + 1
    rows = held.assign(
        supersedes=held["token"],
        revision=revisions,
        token=[uniqueness_token(key, revision) for key, revision in zip(held["identity"], revisions, strict=True)],
        address=[target.address_text for target in today],
        **{
            edge: pd.to_datetime(pd.Series([getattr(target, edge) for target in today], index=held.index), utc=True)
            for edge in ("open_from", "open_until")
        },
    )
    places = zip(held["subscription"], held["component"], today, strict=True)
    why = pd.Series([_why_elsewhere(*place) for place in places], index=held.index, dtype=object)
    here = why == ""
    if here.any():
        known = destination.look_up(rows[here])
        for name in ("address", "open_from", "open_until"):
            rows.loc[here, name] = known[name]
        goes, reasons = destination.judge(rows[here])
        why[here] = reasons.mask((reasons == "") & (goes != rows.loc[here, "quantity"]), _IN_PART)
    rows["body"] = destination.encode(rows.assign(address=rows["address"].where(here, held["address"])))
    sound = [_delivery(row) for row in rows[why == ""].to_dict("records")]
    found = destination.recheck(sound, now) if sound else {}
    now_too = pd.Series([found.get(token, "") for token in rows["token"]], index=rows.index, dtype=object)
    return rows, why.where(why != "", now_too)


def _today(row: Mapping[Any, Any], target: Target, moves: Moves) -> Target:
    """Return where a delivery's account leads: today, or as it did when it used this, where that still counts."""
    place = [row[name] for name in PLACE]
    if target.unknown or (target.subscription, target.component) == tuple(place[:2]):
        return target
    if not moves.stands(row["account"], place, row["period_start"], credit=Decimal(row["quantity"]) < 0):
        return target
    subscription, component, price_point = place
    return Target(row["account"], subscription, component, price_point, Delivery.address_from(row["address"]))


def _why_elsewhere(subscription: str, component: str, today: Target) -> str:
    """Return why an account does not lead any more to where a delivery belongs, or an empty text."""
    if today.unknown:
        return today.unknown
    if (today.subscription, today.component) != (subscription, component):
        return f"account {today.account!r} leads to subscription {today.subscription} by now, which did not use it"
    return ""


def _delivery(row: Mapping[Any, Any]) -> Delivery:
    """Return a revision as it would be sent."""
    until = row["open_until"]
    return Delivery(
        token=row["token"],
        identity=row["identity"],
        revision=row["revision"],
        quantity=Decimal(row["quantity"]),
        address=Delivery.address_from(row["address"]),
        body=row["body"],
        open_until=None if pd.isna(until) else until.to_pydatetime(),
        period=Period(row["period_start"], row["period_end"]),
        subscription=row["subscription"],
    )
