"""`make backfills`: real Airflow bills the same days in any order and by any kind of run, while the warehouse changes.

Blocks of days are backfilled in random order, forwards and backwards, several runs at once, while the schedule runs
beside them; the same days are also run by hand, as the same data interval and as the same params. Then a third of the
rows arrives late, a twentieth is corrected and some are deleted, and all days are run again in another order. The
verdict is the sandbox's own count, account by account: billed = owed with nothing left open, and once more sends
nothing.

The sites bill by the quarter here and take negatives, so that every day of the story lies in the open billing period.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import requests
from airflow_api import NotSignedIn
from crash_stage import days_from
from programs import Interrupted, ProgramFailed, interruptible
from stage import WORLDS, Clock, Stage, TookTooLong, choose_ports, set_stage
from state import CHECKOUT, Ports, State, StateInUse, environment, folder_for
from verdict import BILL_FROM, SOURCES, DemoSource, owed_by_account

from usage_billing.ledger import Ledger
from usage_billing.records import Period

FIRST_DAY = date(2026, 8, 2)
_OPENS = date(2026, 8, 1)
"""When the billing period of the story begins, and its sources begin to owe."""
_TABLES = (
    ("api_calls", "request_id", "calls", "1"),
    ("platform_events", "event_id", "units", "0.001"),
    ("voip_calls", "call_id", "minutes", "0.01"),
)
"""Table, column of the event id, column of the quantity, and the least step of a correction."""
_EARLY = ("DELETE FROM {table} WHERE {regular} AND {number} % 3 = 0",)
_CHANGES = (
    "UPDATE {table} SET {quantity} = {quantity} + {step} WHERE {regular} AND {number} % 40 = 1",
    "UPDATE {table} SET {quantity} = greatest({quantity} - {step}, 0) WHERE {regular} AND {number} % 40 = 21",
    "DELETE FROM {table} WHERE {regular} AND {number} % 50 = 7",
    "DELETE FROM {table} WHERE NOT {regular} AND {number} % 10 > 1",
)
"""What comes late, and what changes. From 900000000 on are planted rows, most to be quarantined: those are gone in the
end, since nobody can tell whose they are, and so nothing is withdrawn beside them."""
_ENDED = frozenset({"success", "failed"})


@dataclass(frozen=True)
class SourceVerdict:
    """One source's line: what is owed, billed, and listed by name as not billed (signed), each summed over accounts.

    `open` counts what is listed. `wrong` sums the absolute differences billed + listed - owed, account by account;
    `sent_again` counts the writing requests of the last round, in which nothing had changed.
    """

    source: str
    owed: Decimal
    billed: Decimal
    listed: Decimal
    open: int
    wrong: Decimal
    sent_again: int

    @property
    def good(self) -> bool:
        """Whether everything is billed, to the last decimal, and the same again sent nothing."""
        return self.wrong == 0 and self.open == 0 and self.sent_again == 0


@dataclass(frozen=True)
class OrderVerdict:
    """How it ended: by source, how many runs there were of which type, and in how many seconds."""

    sources: Sequence[SourceVerdict]
    runs: dict[str, int]
    without_interval: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether every source's line is good, and a run without an interval failed."""
        return all(source.good for source in self.sources) and self.without_interval == "failed"


class _Play:
    """The days of one story, and what was ordered so far."""

    def __init__(self, stage: Stage, days: Sequence[date], chance: Random) -> None:
        self._stage = stage
        self._days = days
        self._chance = chance
        self._by_hand: list[tuple[str, str]] = []

    def round(self, reprocess: str) -> None:
        """Order every day of every source in blocks, in random order and direction, and wait until all are green."""
        blocks = self._blocks()
        self._chance.shuffle(blocks)
        for number, block in enumerate(blocks):
            backwards = self._chance.random() < 0.5  # noqa: PLR2004
            self._pause(paused=True)
            for source in SOURCES:
                self._stage.airflow.backfill(
                    source.dag_id,
                    source.midnight(block[0]),
                    source.midnight(block[-1]),
                    reprocess=reprocess,
                    backwards=backwards,
                    max_active_runs=3,
                )
                if number == 0:
                    self._by_hand_too(source, block)
            self._pause(paused=False)
            way = "backwards" if backwards else "forwards"
            self._stage.clock.say(f"Ordered {block[0]} to {block[-1]}, {way}, reprocess {reprocess}")
            # Hundreds of runs are listed each time, by an API server that shares the machine with them.
            self._stage.wait_until("the runs to be green", partial(self._green, block), pause_seconds=2)

    def without_interval(self) -> str:
        """Order a run that has neither a data interval nor params; return how it ended."""
        airflow, dag_id = self._stage.airflow, SOURCES[0].dag_id
        run_id = airflow.trigger(dag_id)
        self._stage.wait_until("the run without an interval", lambda: airflow.state_of(dag_id, run_id) in _ENDED)
        return airflow.state_of(dag_id, run_id)

    def runs(self) -> dict[str, int]:
        """How many runs there were, by type."""
        types = [run.run_type for source in SOURCES for run in self._stage.airflow.runs(source.dag_id)]
        return {name: types.count(name) for name in sorted(set(types))} | {"params": len(self._by_hand) // 2}

    def _blocks(self) -> list[Sequence[date]]:
        blocks: list[Sequence[date]] = []
        rest = self._days
        while rest:
            size = self._chance.randint(1, max(2, len(self._days) // 3))
            blocks.append(rest[:size])
            rest = rest[size:]
        return blocks

    def _by_hand_too(self, source: DemoSource, block: Sequence[date]) -> None:
        """Order a day of the block twice more: as the same data interval, and as params without one."""
        day = self._chance.choice(block)
        start, end = source.midnight(day), source.midnight(day + timedelta(days=1))
        span = {"data_interval_start": start.isoformat(), "data_interval_end": end.isoformat()}
        now = datetime.now(UTC).isoformat()
        orders: list[dict[str, Any]] = [
            {"logical_date": now, **span},
            {"conf": {"period_start": start.isoformat(), "period_end": end.isoformat()}},
        ]
        for order in orders:
            self._by_hand.append((source.dag_id, self._stage.airflow.trigger(source.dag_id, **order)))

    def _green(self, block: Sequence[date]) -> bool:
        airflow = self._stage.airflow
        states = [(run_id, airflow.state_of(dag_id, run_id)) for dag_id, run_id in self._by_hand]
        done = all(state in _ENDED for _, state in states)
        for source in SOURCES:
            runs = airflow.runs(source.dag_id)
            states += [(run.run_id, run.state) for run in runs]
            days = {run.logical_date for run in runs}
            done &= all(run.ended for run in runs) and {source.midnight(day) for day in block} <= days
        if failed := sorted({run_id for run_id, state in states if state == "failed"}):
            raise ProgramFailed(f"{', '.join(failed)} failed")
        return done

    def _pause(self, *, paused: bool) -> None:
        self._stage.airflow.pause([source.dag_id for source in SOURCES], paused=paused)


def any_order(state: State, clock: Clock, count: int, seed: int) -> OrderVerdict:
    """Tell the story with `count` days; see the module.

    Raises:
        ProgramFailed, StateInUse, TookTooLong: as `stage.set_stage`; a run that failed is a `ProgramFailed`, too.
    """
    days = days_from(FIRST_DAY, count)
    if state.ledger.exists():
        raise StateInUse(f"{state.demo} holds a ledger already: the story begins with an empty state folder")
    ports, places = choose_ports(), _written(state)
    with set_stage(state, clock, ports, _changes(state, ports, places), places["worlds"], _OPENS) as stage:
        play = _Play(stage, days, Random(seed))  # noqa: S311 - Repeatable on purpose.
        whole = state.demo / "whole.duckdb"
        shutil.copy(state.warehouse, whole)
        _replace(state.warehouse, whole, _EARLY)
        play.round("none")
        clock.say("A third of the rows arrives, a twentieth is corrected, some are deleted")
        _replace(state.warehouse, whole, _CHANGES)
        play.round("completed")
        before = {source.name: stage.sandbox.writing_requests(source) for source in SOURCES}
        play.round("completed")
        lines = [_line(stage, source, days, before[source.name]) for source in SOURCES]
        return OrderVerdict(lines, play.runs(), play.without_interval(), clock.elapsed)


def _written(state: State) -> dict[str, Path]:
    """Write sources and worlds that begin with the story; return their folders."""
    places = {"sources": CHECKOUT / "include" / "sources", "worlds": WORLDS}
    for name, shipped in places.items():
        places[name] = state.demo / name
        shutil.copytree(shipped, places[name])
        for path in places[name].rglob("*.yaml"):
            path.write_text(_longer(path.read_text()))
    return places


def _longer(text: str) -> str:
    """Return a world's text with a billing period that begins with the story, a source's with its `bill_from`."""
    for before in ("start: {}", "bill_from: {}"):
        text = text.replace(before.format(BILL_FROM), before.format(_OPENS))
    return text


def _changes(state: State, ports: Ports, places: Mapping[str, Path]) -> dict[str, str]:
    """What differs from the demo's environment."""
    name = "AIRFLOW_CONN_CHARGEOVER_TELCO"
    connection = json.loads(environment(state, ports)[name])
    connection["extra"]["negative_usage"] = "allowed"
    return {"AIRFLOW__USAGE_BILLING__SOURCES_FOLDER": str(places["sources"]), name: json.dumps(connection)}


def _replace(warehouse: Path, whole: Path, changes: Sequence[str]) -> None:
    """Put a changed copy of the whole warehouse in its place, at once: whoever reads goes on with what was there."""
    copy = warehouse.with_name("changed.duckdb")
    shutil.copy(whole, copy)
    with closing(duckdb.connect(str(copy))) as connection:
        for table, key, quantity, step in _TABLES:
            number = f"CAST(split_part({key}, '-', 2) AS BIGINT)"
            words = {"table": table, "number": number, "regular": f"{number} < 900000000", "quantity": quantity}
            for change in changes:
                connection.execute(change.format(step=step, **words))
    copy.replace(warehouse)


def _line(stage: Stage, source: DemoSource, days: Sequence[date], writing_before: int) -> SourceVerdict:
    owed = owed_by_account(stage.state.warehouse, source.name, days, _OPENS)
    billed = stage.sandbox.billed(source)
    span = Period(source.midnight(days[0]), source.midnight(days[-1] + timedelta(days=1)))
    listed: dict[str, Decimal] = {}
    with closing(Ledger.connect(f"sqlite:///{stage.state.ledger}")) as book:
        items = book.open_items(source.name, span)
    for account, quantity in zip(items["account"], items["quantity"], strict=True):
        listed[account] = listed.get(account, Decimal()) + Decimal(quantity)
    accounts = owed.keys() | billed.keys() | listed.keys()
    nothing = Decimal()
    off = [billed.get(one, nothing) + listed.get(one, nothing) - owed.get(one, nothing) for one in accounts]
    return SourceVerdict(
        source.name,
        sum(owed.values(), nothing),
        sum(billed.values(), nothing),
        sum(listed.values(), nothing),
        len(items),
        sum(map(abs, off), nothing),
        stage.sandbox.writing_requests(source) - writing_before,
    )


def table(verdict: OrderVerdict) -> str:
    """The closing table, for people."""
    head = ("source", "owed", "billed", "listed", "open", "wrong", "sent again")
    rows = [
        (
            line.source,
            *(f"{figure:f}" for figure in (line.owed, line.billed, line.listed)),
            str(line.open),
            f"{line.wrong:f}",
            str(line.sent_again),
        )
        for line in verdict.sources
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    runs = ", ".join(f"{count} {kind}" for kind, count in verdict.runs.items())
    return "\n".join(
        [*lines, f"runs: {runs}; one without an interval {verdict.without_interval}; {verdict.seconds:.0f} s"]
    )


def main() -> int:
    """Tell the story; the exit status is 0 only if everything was billed, and nothing was sent again."""
    parser = argparse.ArgumentParser(description="Bill days in any order in real Airflow, while the warehouse changes.")
    parser.add_argument("--days", type=int, default=90, help="how many days, up to 90 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the chance that chooses blocks and directions")
    parser.add_argument("--state", type=Path, help="keep all state in this folder, which must hold none yet")
    arguments = parser.parse_args()
    limit = 420 + 60 * arguments.days
    try:
        with interruptible(), folder_for(arguments.state, "any-order") as folder:
            verdict = any_order(State.inside(folder), Clock(time.monotonic(), limit), arguments.days, arguments.seed)
            print(f"\n{table(verdict)}\n")
            (folder / "demo" / "any_order.json").write_text(json.dumps(asdict(verdict), indent=2, default=str))
    except Interrupted as interrupted:
        print(f"Ended by {interrupted}.")
        return 130
    except (NotSignedIn, ProgramFailed, StateInUse, TookTooLong, requests.RequestException) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print("Everything owed is billed, and nothing else." if verdict.good else "FAILED: see the table.")
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
