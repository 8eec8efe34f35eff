"""The command `usage-billing quarantine`: rows that may not be billed, told and written off by name."""

import argparse
import getpass
import json
from datetime import date
from typing import TYPE_CHECKING, Any

from usage_billing.cli.common import check_known, days_of
from usage_billing.errors import Misconfigured
from usage_billing.records import Period

if TYPE_CHECKING:
    import pandas as pd


def add(commands: Any) -> None:
    """Add the command with its actions to the parser."""
    quarantine = commands.add_parser("quarantine", help="rows that may not be billed, by name")
    actions = quarantine.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="tell which rows they are, why, and whom they concern")
    listing.set_defaults(command=_list)
    write_off = actions.add_parser("write-off", help="write down that some of them are not owed")
    write_off.set_defaults(command=_write_off)
    for action in (listing, write_off):
        action.add_argument("source", help="the billing source")
        days: dict[str, Any] = {"type": date.fromisoformat, "metavar": "DATE"}
        action.add_argument("--from", dest="first", help="first day, in the source's billing zone", **days)
        action.add_argument("--to", dest="after", help="day after the last one", **days)
        action.add_argument("--account", help="only rows of this warehouse account")
        action.add_argument("--event", help="only rows with this event id")
        action.add_argument("--reason", help="only rows that have this among their reasons")
    write_off.add_argument("rows", nargs="*", metavar="row", help="a row's name, as `list` tells it; all or none")
    write_off.add_argument("--because", required=True, help="why; kept in the ledger beside your name")


def _list(options: argparse.Namespace) -> str:
    """Tell each row, and whom they concern, by the ledger alone."""
    from usage_billing.quarantine import by_account  # noqa: PLC0415

    rows = _in_quarantine(options)
    records = rows.astype(object).where(rows.notna(), None).to_dict("records")
    lines = [line for row in records for line in _told(row)]
    whom = by_account(rows).itertuples()
    lines.extend(f"account {one.account!r}: {one.rows} rows, together {one.usage:f}: {one.reason}" for one in whom)
    return "\n".join([*lines, f"{rows['copies'].sum()} rows of {options.source} in quarantine"])


def _write_off(options: argparse.Namespace) -> str:
    """Write rows off, by name or all that are like something.

    Raises:
        Misconfigured: nothing says which, or none is so.
    """
    from usage_billing.installation import ledger, ledger_name  # noqa: PLC0415

    if not (options.rows or options.account or options.event or options.reason or options.first):
        raise Misconfigured(
            "which rows? give their names, as `usage-billing quarantine list` tells them, or --account, --event, "
            "--reason, or --from and --to"
        )
    if options.rows and (options.account or options.event or options.reason or options.first):
        raise Misconfigured("give names of rows, or what they are like, and not both")
    names = options.rows or _in_quarantine(options)["row_name"].tolist()
    if not names:
        raise Misconfigured(f"no row of {options.source} in quarantine is like that")
    ledger().write_off_rows(ledger_name(options.source), names, getpass.getuser(), options.because)
    told = [f"{name}: written off" for name in names]
    replay = f"airflow dags trigger bill_{options.source} --conf '{{\"replay\": true}}'"
    return "\n".join([*told, f"a run of their usage periods acts by it: {replay}"])


def _in_quarantine(options: argparse.Namespace) -> "pd.DataFrame":
    """Return the rows in quarantine that are as the options say."""
    from usage_billing.installation import ledger, ledger_name  # noqa: PLC0415

    book, name = ledger(), ledger_name(options.source)
    check_known(book, name)
    rows = book.quarantined(name, days_of(options))
    for column, wanted in (("account", options.account), ("event_id", options.event)):
        if wanted is not None:
            rows = rows[rows[column] == wanted]
    if options.reason is not None:
        rows = rows[[options.reason in json.loads(reasons) for reasons in rows["reasons"]]]
    return rows


def _told(row: dict[Any, Any]) -> list[str]:
    """Return one quarantined row as lines for a person."""
    copies = f"{row['copies']} x " if row["copies"] > 1 else ""
    quantity = f", quantity {row['quantity']}" if row["quantity"] else ""
    time = "without a time" if row["time"] is None else f"at {row['time']:%Y-%m-%dT%H:%M:%SZ}"
    told = f"{copies}event {row['event_id'] or 'without id'} of account {row['account'] or 'nobody'} {time}{quantity}"
    where = "usage period" if row["placed"] else "of no usage period that was read, found beside"
    period = Period(row["period_start"], row["period_end"])
    return [row["row_name"], f"  {told}; {where} {period}: {'; '.join(json.loads(row['reasons']))}"]
