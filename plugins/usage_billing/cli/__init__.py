"""The command `usage-billing`: preview, look after the ledger, create pools, check sources, run the sandbox."""

import argparse
import getpass
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from usage_billing.cli import quarantine
from usage_billing.cli.common import check_known, days_of
from usage_billing.errors import Misconfigured, NeedsDecision, UsageBillingError
from usage_billing.records import EVER, Comparison, Period, Reading, joined

if TYPE_CHECKING:
    from usage_billing.adopt import Adoption
    from usage_billing.destinations.base import Destination
    from usage_billing.ledger import Lease
    from usage_billing.sources import BillingSource
    from usage_billing.staging import Staging


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 1 with the error on standard error."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], str] = options.command
    try:
        said = command(options)
    except UsageBillingError as error:
        print(f"usage-billing: {error}", file=sys.stderr)
        return 1
    if said:
        print(said)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="usage-billing", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    ledger = commands.add_parser("ledger", help="the ledger that connection usage_ledger names")
    actions = ledger.add_subparsers(required=True, metavar="ACTION")
    init = actions.add_parser("init", help="create it, or upgrade its schema")
    init.set_defaults(command=_ledger_init)
    adopt = actions.add_parser("adopt", help="enter what a billing site holds under our tokens and it does not know")
    adopt.add_argument("source", help="the billing source")
    days: dict[str, Any] = {"type": date.fromisoformat, "required": True, "metavar": "DATE"}
    adopt.add_argument("--from", dest="first", help="first day, in the source's billing zone", **days)
    adopt.add_argument("--to", dest="after", help="day after the last one", **days)
    adopt.add_argument("--dry-run", action="store_true", help="only tell what would be entered")
    adopt.add_argument(
        "--leave-unmatched", action="store_true", help="a person has looked at the records that match nothing: go on"
    )
    adopt.set_defaults(command=_ledger_adopt)
    listing = actions.add_parser("list", help="tell what is open of a billing source, by name")
    listing.add_argument("source", help="the billing source")
    listing.add_argument("--from", dest="first", help="first day, in the source's billing zone", **days | _OPTIONAL)
    listing.add_argument("--to", dest="after", help="day after the last one", **days | _OPTIONAL)
    listing.add_argument("--state", choices=_OPEN, help="only what stands there")
    listing.set_defaults(command=_ledger_list)
    decide = actions.add_parser("decide", help="write down what a person decided about one delivery or several")
    decide.add_argument("tokens", nargs="+", metavar="token", help="the delivery's uniqueness token; all or none")
    decide.add_argument("outcome", choices=sorted(_OUTCOMES), help="; ".join(_OUTCOMES.values()))
    decide.add_argument("--counted", type=Decimal, help="with accepted: how much of it the site counts")
    decide.add_argument("--because", required=True, help="why; kept in the ledger beside your name")
    decide.set_defaults(command=_ledger_decide)
    _add_moves(actions)
    quarantine.add(commands)

    preview = commands.add_parser("preview", help="tell what a run would send; sends nothing, and writes nothing down")
    preview.add_argument("source", help="the billing source")
    preview.add_argument("--from", dest="first", help="first day, in the source's billing zone", **days)
    preview.add_argument("--to", dest="after", help="day after the last one", **days)
    preview.add_argument("--items", type=Path, metavar="FILE", help="write every proposed delivery there, as CSV")
    preview.set_defaults(command=_preview)

    _add_others(commands)
    return parser


def _add_others(commands: Any) -> None:
    pools = commands.add_parser("pools", help="create the Airflow pool of every billing site")
    pools.set_defaults(command=_pools)

    check = commands.add_parser("check", help="read every billing source and list all faults; compare the pools")
    check.set_defaults(command=_check)

    sandbox = commands.add_parser("sandbox", help="run the sandbox billing sites until interrupted")
    sandbox.add_argument("--worlds", type=Path, required=True, help="folder of world files")
    sandbox.add_argument("--books", type=Path, help="file that keeps the sites' books; without it they are forgotten")
    sandbox.add_argument("--port", type=int, default=0, help="loopback port; 0 takes a free one")
    sandbox.add_argument("--port-file", type=Path, help="where to write the port once the sites answer")
    sandbox.set_defaults(command=_sandbox)

    simulate = commands.add_parser("simulate", help="play whole histories on virtual time, and prove what was billed")
    simulate.add_argument("--source", help="a billing source of yours, by name or folder; without it, drawn ones")
    simulate.add_argument("--seeds", type=int, default=100, metavar="N", help="how many histories")
    simulate.add_argument("--first-seed", type=int, default=0, metavar="N", help="the seed of the first one")
    simulate.add_argument(
        "--ledger", choices=["sqlite", "postgresql", "both"], default="sqlite", help="on which ledger"
    )
    simulate.add_argument("--jobs", type=int, default=2, metavar="N", help="how many processes")
    simulate.set_defaults(command=_simulate)


def _add_moves(actions: Any) -> None:
    moves = actions.add_parser("moves", help="tell whose usage was billed before it led to another subscription")
    moves.add_argument("--source", help="only this billing source")
    moves.set_defaults(command=_ledger_moves)
    move = actions.add_parser("move", help="write down what a person chose for the usage of before such a move")
    move.add_argument("source", help="the billing source")
    move.add_argument("account", help="the warehouse's account")
    move.add_argument("--choose", required=True, choices=sorted(_CHOICES), help="; ".join(_CHOICES.values()))
    move.add_argument("--because", required=True, help="why; kept in the ledger beside your name")
    move.set_defaults(command=_ledger_move)


def _ledger_init(_options: argparse.Namespace) -> str:
    from usage_billing.installation import ledger_url  # noqa: PLC0415 - Airflow takes a second to import.
    from usage_billing.ledger import Ledger  # noqa: PLC0415

    return (
        "the usage ledger is ready" if Ledger.create(ledger_url()) else "the usage ledger is there already, and current"
    )


_OPTIONAL = {"required": False}
_OPEN = ("held", "in_doubt", "refused", "reserved", "sending")

_OUTCOMES = {
    "release": "release: what is held or refused goes with the next run or sweep, as the site bills it today",
    "write-off": "write-off: what is held or refused is never billed by us",
    "accepted": "accepted: what is in doubt is at the site, see --counted",
    "absent": "absent: what is in doubt is not at the site, and is sent again",
}


def _ledger_decide(options: argparse.Namespace) -> str:
    from usage_billing.installation import ledger  # noqa: PLC0415
    from usage_billing.records import DECIDED, State  # noqa: PLC0415

    states = {"write-off": State.WRITTEN_OFF, "accepted": State.ACCEPTED, "absent": State.RESERVED}
    states["release"] = State.HELD
    book = ledger()
    by = f"{DECIDED}{book.now():%Y-%m-%d} by {getpass.getuser()}: {options.because}"
    book.decide(options.tokens, states[options.outcome], by, options.counted)
    return "\n".join(f"{token}: {options.outcome}; {by}" for token in options.tokens)


_CHOICES = {
    "move": "move: it goes to the new subscription, once the former one is credited",
    "from_now": "from_now: it stays with the former subscription, and later usage goes to the new one",
}


def _ledger_moves(options: argparse.Namespace) -> str:
    """Tell what is left to decide, by the ledger alone; a line for each account and span of time."""
    from usage_billing.installation import ledger, ledger_name  # noqa: PLC0415
    from usage_billing.moves import Moves  # noqa: PLC0415

    book = ledger()
    lines: list[str] = []
    for name in [ledger_name(options.source)] if options.source else book.sources():
        check_known(book, name)
        moves = [Moves(name, book.placements(name, edition)).undecided for edition in book.moving(name)]
        held = book.held_for_moves(name) if any(len(some) for some in moves) else {}
        for row in (row for some in moves for row in some.to_dict("records")):
            sides = [f"{row[f'subscription_{end}']} (held {_held_at(held, row, end)})" for end in ("from", "to")]
            until = f"{row['end']:%Y-%m-%dT%H:%MZ}"
            lines.append(f"{name}: account {row['account']!r}, used before {until}: from {sides[0]} to {sides[1]}")
    return "\n".join([*lines, f"{len(lines)} moves to decide"])


def _held_at(held: Mapping[tuple[Any, ...], Decimal], row: Mapping[Any, Any], end: str) -> str:
    """Return what is held at one side of a move, in its span of time; of all accounts there."""
    place = tuple(row[f"{name}_{end}"] for name in ("subscription", "component", "price_point"))
    sums = [each for (*at, start), each in held.items() if tuple(at) == place and row["start"] <= start < row["end"]]
    return f"{sum(sums, Decimal(0)):f}"


def _ledger_move(options: argparse.Namespace) -> str:
    """Write down what a person chose about one account.

    Raises:
        Misconfigured: it has not moved, something else stands, or its source sends raw events, which nothing moves.
    """
    from usage_billing.installation import billing_source, destination_of, ledger, ledger_name  # noqa: PLC0415
    from usage_billing.records import Choice  # noqa: PLC0415

    book, choice, name = ledger(), Choice(options.choose), ledger_name(options.source)
    check_known(book, name)
    if choice is Choice.MOVE and destination_of(billing_source(options.source)).stream:
        raise Misconfigured(
            f"{options.source!r} sends raw events, and no call takes one back: choose from_now, and settle with the "
            "customer what is on the wrong bill"
        )
    new = book.decide_move(name, options.account, choice, getpass.getuser(), options.because)
    when = "the next run of the usage periods acts by it" if new else "that stood already"
    return f"{options.source}, account {options.account!r}: {choice}; {when}"


def _ledger_list(options: argparse.Namespace) -> str:
    """Tell what is open, by the ledger alone; a line for what it is, one for where it stands.

    Raises:
        Misconfigured: the ledger knows no such source, or only one of the two days is given.
    """
    from usage_billing.installation import ledger, ledger_name  # noqa: PLC0415

    book, name = ledger(), ledger_name(options.source)
    check_known(book, name)
    items = book.open_items(name, days_of(options))
    if options.state:
        items = items[items["state"] == options.state]
    lines = [line for row in items.sort_values(["period_start", "identity"]).to_dict("records") for line in _item(row)]
    return "\n".join([*lines, f"{len(items)} open of {options.source}"])


def _item(row: dict[Any, Any]) -> list[str]:
    """Return one open delivery as lines for a person."""
    period = Period(row["period_start"], row["period_end"])
    whose = f"{row['account']} (subscription {row['subscription']})" if row["subscription"] else "raw events"
    since = f"since {row['reserved_at']:%Y-%m-%d %H:%M} UTC"
    lines = [f"{row['token']}", f"  {row['state']} {row['quantity']} of {whose}, {period}, {since}: {row['reason']}"]
    if row["released"]:
        lines.append(f"  released: {row['released']}")
    if row["state"] == "refused" and row["sends"]:
        lines.append(f"  sent {row['sends']} times, last on {row['sent_at']:%Y-%m-%d %H:%M} UTC: {row['body']}")
    return lines


def _ledger_adopt(options: argparse.Namespace) -> str:
    """Adopt one source's span, and end the refusal of this ledger once nothing is left open.

    Raises:
        NeedsDecision: records at the site match nothing, or another quantity; what did match was entered.
    """
    from airflow.sdk import BaseHook  # noqa: PLC0415

    from usage_billing.adopt import adopt, reason_of  # noqa: PLC0415
    from usage_billing.aggregate import at_former_places  # noqa: PLC0415
    from usage_billing.arrivals import touched  # noqa: PLC0415
    from usage_billing.days import periods_of  # noqa: PLC0415
    from usage_billing.installation import billing_source, ledger, staging  # noqa: PLC0415
    from usage_billing.ledger import marker  # noqa: PLC0415
    from usage_billing.ledger.leases import kept  # noqa: PLC0415
    from usage_billing.moves import place  # noqa: PLC0415

    book, area = ledger(), staging()
    destination, span = _of_days(billing_source(options.source), options, writes=not options.dry_run)
    source = destination.source
    periods = periods_of(source, span)
    with kept(book, f"extract:{source.name}", timedelta(seconds=30), wait=timedelta(minutes=15)) as held:
        if not options.dry_run:
            mark = marker.read(area, source.name)
            book.number_above(mark.extraction if mark else 0)
        if source.settings.incremental == "arrival":
            # The next run would compare them, and knows as little of what was sent for them since.
            warehouse = BaseHook.get_hook(source.settings.warehouse)
            periods = tuple(sorted({*periods, *touched(source, warehouse, book)}))
        comparison = _read_warehouse(destination, periods, area, "locate", None if options.dry_run else held.lease)
        former = at_former_places(comparison, source, destination.site, area, _adopted(source, comparison.reading))
        reason = reason_of(book.now())
        found = adopt(comparison, former, destination, book, area, reason, dry_run=options.dry_run)
        told = _told(source.name, comparison.window, found, comparison.rows_quarantined)
        if found.different or (found.unmatched and not options.leave_unmatched):
            raise NeedsDecision(f"{told}\n{_ADVICE}")
        if not options.dry_run:
            looked_up_at = book.validated_at(comparison.reading) or book.now()
            place(comparison.targets, source, looked_up_at, book, area, comparison.window.end)
            marker.hand_over(book, area, source.name, comparison.reading.extraction)
    return told


_ADVICE = (
    "A record that matches nothing is of another day (take a longer span), of another source that is not adopted yet, "
    "or of usage that is gone from the warehouse: look at each; --leave-unmatched then goes on without them."
)


def _preview(options: argparse.Namespace) -> str:
    """Plan what the days owe as if they were read last, in a folder that is removed; tell what would be sent."""
    from usage_billing.arrivals import widened  # noqa: PLC0415
    from usage_billing.chunks import plan_events  # noqa: PLC0415
    from usage_billing.days import periods_of  # noqa: PLC0415
    from usage_billing.guard import owed_by_period, unusual  # noqa: PLC0415
    from usage_billing.installation import billing_source, ledger  # noqa: PLC0415
    from usage_billing.plan import plan  # noqa: PLC0415
    from usage_billing.preview import preview, write_items  # noqa: PLC0415
    from usage_billing.staging import Staging  # noqa: PLC0415

    book = ledger()
    destination, span = _of_days(billing_source(options.source), options, writes=False)
    source = destination.source
    periods = widened(periods_of(source, span), source, book)
    with TemporaryDirectory(prefix="usage-billing-") as folder:
        area = Staging(Path(folder))
        if destination.stream:
            destination.archive = destination.kept().aside(Path(folder) / "archive")
        comparison = _read_warehouse(destination, periods, area, "resolve", None)
        how = plan_events if destination.stream else plan
        found = how(comparison, destination, book, area, source.name)
        lines = preview(found, comparison, destination, book, area).lines()
        owed = owed_by_period(comparison, destination, area)
        strange = unusual(found, comparison, owed, destination, book, area)
        told = "\n".join([*lines, *(f"unusual, as one run: {line}" for line in strange)])
        if options.items is not None:
            with options.items.open("w", encoding="utf-8", newline="") as file:
                told += f"\n{write_items(found, destination, area, file)} items written to {options.items}"
    return told


def _of_days(source: "BillingSource", options: argparse.Namespace, *, writes: bool) -> "tuple[Destination, Period]":
    """Return the destination of the edition to which the days `--from` and `--to` belong, and the time they make.

    Raises:
        Misconfigured: they belong to several editions.
    """
    from usage_billing.days import span_of  # noqa: PLC0415
    from usage_billing.installation import destination_in, edition_of, editions, ledger  # noqa: PLC0415

    span = span_of(source, options.first, options.after, ledger().now())
    known = editions(source, writes=writes)
    return destination_in(source, edition_of(source, known, span), known[-1]), span


def _read_warehouse(
    destination: "Destination", periods: Sequence[Period], area: "Staging", look: str, lease: "Lease | None"
) -> Comparison:
    """Read whole usage periods by the ordinary stages; the extraction has a number only under a lease.

    `look` names how accounts are looked up, ``resolve`` or ``locate``: see `Destination.resolve_accounts`.
    """
    from airflow.sdk import BaseHook  # noqa: PLC0415

    from usage_billing.aggregate import aggregate  # noqa: PLC0415
    from usage_billing.arrivals import rows, rows_before  # noqa: PLC0415
    from usage_billing.extract import extract  # noqa: PLC0415
    from usage_billing.installation import ledger  # noqa: PLC0415
    from usage_billing.moves import placed  # noqa: PLC0415
    from usage_billing.quarantine import WrittenOff  # noqa: PLC0415
    from usage_billing.validate import validate  # noqa: PLC0415

    source, book, window = destination.source, ledger(), Period.around(periods)
    warehouse = BaseHook.get_hook(source.settings.warehouse)
    read = rows(source, warehouse, joined(periods))
    number = book.begin_extraction(lease, source.name, window, periods) if lease else 0
    folder = _adopted(source, Reading(number))
    events = extract(read, source, area, folder)
    began = book.now()
    destination.check()
    decided = WrittenOff.of(source, book)
    before = rows_before(periods, source, warehouse, area, folder)
    found = validate(
        events, source, periods, getattr(destination, f"{look}_accounts"), area, folder, book, decided, before
    )
    # Of the span that is adopted this ledger may know nothing yet; what it is, is known when all of it was found.
    billed_until = window.end if look == "locate" else EVER.start
    moves = placed(found.targets, source, began, book, area, folder, look_only=True, billed_until=billed_until)
    found = replace(found, moves=moves)
    reading, aside = Reading(number), found.quarantined
    if lease:
        book.record_read(number, events.rows)
        reading = book.record_validation(number, found.digest, aside.rows, found.reasons, aside.manifest, began)
    totals = aggregate(found.accepted, found.targets, source, destination.site, periods, area, folder, moves)
    accepted = found.accepted
    return Comparison(reading, tuple(periods), totals, found.targets, accepted.rows, aside.rows, accepted, moves, aside)


_WAITS = "what it used before waits on both sides until you decide, see `usage-billing ledger moves`"


def _adopted(source: "BillingSource", reading: Reading) -> str:
    return f"{source.name}/adopted/{reading.extraction:08d}"


def _told(name: str, window: Period, found: "Adoption", rows_quarantined: int) -> str:
    """Return what an adoption did as lines for a person."""
    lines = [
        f"{name}, {window}: {found.entered} entered, {found.settled} settled, {found.known} known before",
        *(f"matches nothing: {record}" for record in found.unmatched),
        *(f"differs: {record}" for record in found.different),
        *(f"look at it: {record}" for record in found.twins),
    ]
    if found.doubted:
        lines.append(
            f"{found.doubted} deductions are in doubt: the site took them and does not show how much of them counted; "
            f"`usage-billing ledger list {name} --state in_doubt` names them, and you decide"
        )
    if found.held:
        lines.append(f"{found.held} totals held by name: nobody can tell whether the site has them")
    if found.replay_until:
        lines.append(
            f"{found.replayable} totals left to the ordinary run: run these days again before "
            f"{found.replay_until:%Y-%m-%d %H:%M} UTC, while the site still ignores what it has"
        )
    elif found.entered or found.settled or found.doubted:
        lines.append("run these days again: whatever else is owed for them is sent then, and nothing twice")
    lines.extend(f"account {account!r} leads elsewhere by now: {_WAITS}" for account in found.moved)
    if rows_quarantined:
        lines.append(f"{rows_quarantined} rows are in quarantine: what was billed for them was not looked for")
    return "\n".join(lines)


def _pools(_options: argparse.Namespace) -> str:
    from airflow.models.pool import Pool  # noqa: PLC0415
    from airflow.utils.session import create_session  # noqa: PLC0415

    from usage_billing.installation import billing_sources, pools  # noqa: PLC0415

    wanted = pools(billing_sources())
    with create_session() as session:
        for pool in wanted:
            Pool.create_or_update_pool(pool.name, pool.slots, pool.description, include_deferred=False, session=session)
    return "\n".join(f"pool {pool.name}: {pool.slots} slots, {pool.description}" for pool in wanted)


def _check(_options: argparse.Namespace) -> str:
    """Tell of each source, and of each pool that its tasks take; only what a person wrote makes it fail."""
    from airflow.utils.session import create_session  # noqa: PLC0415
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    from usage_billing.installation import billing_sources  # noqa: PLC0415
    from usage_billing.pools import existing_pools, pool_name, why_waiting  # noqa: PLC0415

    sources = billing_sources()
    lines = [f"{source.title}: sound" for source in sources]
    needed: dict[str, int] = {}
    for source in sources:
        name = pool_name(source.destination.connection)
        needed[name] = max(needed.get(name, 0), source.destination.threads)
    try:
        with create_session() as session:
            there = existing_pools(session)
    except DBAPIError:
        return "\n".join([*lines, "pools: not compared, since there is no Airflow database here"])
    for name, slots in sorted(needed.items()):
        fault = why_waiting(name, slots, there)
        lines.append(f"{fault}: run `usage-billing pools`" if fault else f"pool {name}: {there[name]} slots")
    return "\n".join(lines)


def _sandbox(options: argparse.Namespace) -> str:
    from usage_billing.sandbox.server import serve  # noqa: PLC0415

    serve(options.worlds, options.books, options.port, port_file=options.port_file)
    return ""


def _simulate(options: argparse.Namespace) -> str:
    from usage_billing.testing.command import Order, run  # noqa: PLC0415

    source = Path(options.source) if options.source else None
    if source is not None and not source.is_dir():
        from usage_billing.installation import sources_folder  # noqa: PLC0415 - Airflow takes a second to import.

        source = sources_folder() / options.source
    return run(Order(options.first_seed, options.seeds, options.ledger, source), options.jobs)
