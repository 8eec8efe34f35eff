"""Finds the processes that deliver right now, and kills them where it hurts.

What a process is doing is read from the ledger's own tables, without a line of the code under test: a deliver holds a
lease in its name, with its process id, and each row that it has on its way bears the lease's fence. A dead process can
write neither, so what stands there after its death is what it left behind.
"""

import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

_LEASES = "SELECT name, holder, fence FROM lease WHERE name LIKE 'deliver:%' AND released_at IS NULL"
_ON_THEIR_WAY = "SELECT count(*) FROM delivery WHERE fence = ? AND state = 'sending'"
_RELEASED = "SELECT count(*) FROM lease WHERE fence = ? AND released_at IS NOT NULL"
_UNSETTLED = "SELECT count(*) FROM delivery WHERE source = ? AND state IN ('reserved', 'sending', 'in_doubt')"
_IN_DOUBT = "SELECT source, token, sends FROM delivery WHERE state = 'in_doubt'"
_SENDING = "SELECT source, token, sends FROM delivery WHERE fence = ? AND state = 'sending'"

_TASK_TITLE, _SUPERVISOR_TITLE = "airflow worker -- ", "airflow worker -- LocalExecutor"

Send = tuple[str, str, int]
"""One sending of one delivery: its source, its token, and which send of it."""


@dataclass(frozen=True)
class Worker:
    """A deliver that holds a lease: its source, its process, and the lease's fence."""

    source: str
    pid: int
    fence: int


@dataclass(frozen=True)
class Ledger:
    """Reads the ledger's SQLite file at `path`, and never writes it."""

    path: Path

    def workers(self) -> list[Worker]:
        """Every deliver that took a lease and did not give it back, those that died too."""
        leases = self._rows(_LEASES)
        return [Worker(name.split(":")[1], int(holder.split(":")[1]), fence) for name, holder, fence in leases]

    def on_their_way(self, worker: Worker) -> int:
        """How many deliveries the worker has begun to send without an outcome."""
        return self.count(_ON_THEIR_WAY, worker.fence)

    def sending(self, worker: Worker) -> set[Send]:
        """The deliveries that the worker has begun to send without an outcome."""
        return set(self._rows(_SENDING, worker.fence))

    def released(self, worker: Worker) -> bool:
        """Whether the worker gave its lease back, as one that ends by itself does."""
        return self.count(_RELEASED, worker.fence) > 0

    def unsettled(self, source: str) -> int:
        """How many deliveries of a source are reserved, sending or in doubt."""
        return self.count(_UNSETTLED, source)

    def in_doubt(self) -> set[Send]:
        """What is in doubt now."""
        return set(self._rows(_IN_DOUBT))

    def is_locked(self) -> bool:
        """Whether somebody is in the middle of a writing transaction, and stays there for a second."""
        with closing(sqlite3.connect(self.path, timeout=1, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return True
            connection.execute("ROLLBACK")
        return False

    def count(self, sql: str, *values: object) -> int:
        """The number that a query gives."""
        return int(self._rows(sql, *values)[0][0])

    def _rows(self, sql: str, *values: object) -> list[Any]:
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=30)) as connection:
            return connection.execute(sql, values).fetchall()


@dataclass(frozen=True)
class Kill:
    """A deliver that died at work: how, what it had on its way, and how many rows of its source were unsettled then."""

    worker: Worker
    how: str
    on_their_way: int
    unsettled: int

    @classmethod
    def of(cls, ledger: Ledger, worker: Worker, how: str) -> "Kill | None":
        """What a dead worker left; None if it had ended its work by then, and gave its lease back."""
        found = cls(worker, how, ledger.on_their_way(worker), ledger.unsettled(worker.source))
        return found if found.unsettled and not ledger.released(worker) else None


@dataclass(frozen=True)
class _Doom:
    """When a worker is to die, how, and whether only with something on its way."""

    at: float
    how: str
    at_work_only: bool


_HOWS: Mapping[str, int] = {"task": 13, "task and supervisor": 4, "supervisor": 3}
"""What is killed, and how often. A task whose supervisor alone was killed is not dead: it goes on sending unwatched."""

_LONGEST_LIFE_SECONDS = 1.0
_SHARE_AT_WORK = 0.85
_LEAST_PART = 12
"""Each source has at least this part of the kills: some are harder to catch, for their deliveries have few requests."""


class Killer:
    """Kills delivers of the Airflow whose processes are in `session`, until `wanted` of them died at work.

    Each of `sources` loses some.
    """

    def __init__(self, ledger: Ledger, session: int, wanted: int, sources: Sequence[str], seed: int) -> None:
        self.kills: list[Kill] = []
        self.orphaned: list[Worker] = []
        self.doubts: set[Send] = set()
        self._ledger = ledger
        self._session = session
        self._wanted = wanted
        self._sources = sources
        self._least = wanted // _LEAST_PART
        self._chance = Random(seed)  # noqa: S311 - Chance that can be repeated.
        self._dooms: dict[int, _Doom] = {}
        self._done: set[int] = set()

    @property
    def satisfied(self) -> bool:
        """Whether enough of them died."""
        return len(self.kills) >= self._wanted

    def _wants(self, source: str) -> bool:
        """Whether one more of this source may die: the last ones are kept for sources that have had too few."""
        died = Counter(kill.worker.source for kill in self.kills)
        kept = sum(max(0, self._least - died[other]) for other in self._sources if other != source)
        return self._wanted - len(self.kills) > kept

    def look(self) -> None:
        """Note what is in doubt, and kill whoever's time has come."""
        self.doubts |= self._ledger.in_doubt()
        for worker in self._ledger.workers():
            wanted = worker.fence not in self._done and self._wants(worker.source)
            if wanted and is_task(worker.pid, self._session):
                self._consider(worker)

    def _consider(self, worker: Worker) -> None:
        doom = self._dooms.setdefault(worker.fence, self._draw())
        if time.monotonic() < doom.at or (doom.at_work_only and not self._ledger.on_their_way(worker)):
            return
        self._done.add(worker.fence)
        if doom.how == "supervisor":
            self._kill_supervisor(worker)
            self.orphaned.append(worker)
            return
        if doom.how == "task and supervisor":
            self._kill_supervisor(worker)
        kill(worker.pid, self._session)
        wait_until_dead(worker.pid)
        self._count(worker, doom.how)

    def _kill_supervisor(self, worker: Worker) -> None:
        supervisor = parent_of(worker.pid)
        if title_of(supervisor).startswith(_SUPERVISOR_TITLE):
            kill(supervisor, self._session)

    def _draw(self) -> _Doom:
        [how] = self._chance.choices(list(_HOWS), list(_HOWS.values()))
        at = time.monotonic() + self._chance.uniform(0, _LONGEST_LIFE_SECONDS)
        return _Doom(at, how, at_work_only=self._chance.random() < _SHARE_AT_WORK)

    def _count(self, worker: Worker, how: str) -> None:
        if died := Kill.of(self._ledger, worker, how):
            self.kills.append(died)
            self.doubts |= self._ledger.sending(worker)


# --- processes -------------------------------------------------------------------------------------------------------


def is_task(pid: int, session: int) -> bool:
    """Whether `pid` is a living task process of the Airflow whose processes are in `session`."""
    title = title_of(pid)
    of_a_task = title.startswith(_TASK_TITLE) and not title.startswith(_SUPERVISOR_TITLE)
    return of_a_task and _in_session(pid, session) and _state(pid) not in "ZX"


def kill(pid: int, session: int) -> None:
    """Send SIGKILL to a process of `session`; one that is gone, or somebody else's, is left alone."""
    send_signal(pid, session, signal.SIGKILL)


def send_signal(pid: int, session: int, number: signal.Signals) -> None:
    """Send a signal to a process of `session`; one that is gone, or somebody else's, is left alone."""
    with suppress(ProcessLookupError):
        if _in_session(pid, session):
            os.kill(pid, number)


def wait_until_dead(pid: int, patience_seconds: float = 5) -> None:
    """Wait until the kernel has ended the process; raise `TimeoutError` if it does not."""
    deadline = time.monotonic() + patience_seconds
    while _state(pid) not in "ZX":
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} lives {patience_seconds} s after SIGKILL")
        time.sleep(0.01)


def suspend(pid: int, session: int, patience_seconds: float = 5) -> None:
    """Send SIGSTOP, and wait until every thread sleeps; raise `TimeoutError` if one does not.

    A thread that was inside the kernel ends its call first: until then it may still take a lock.
    """
    send_signal(pid, session, signal.SIGSTOP)
    deadline = time.monotonic() + patience_seconds
    while any(state not in "TtZX" for state in _states_of_threads(pid)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} runs {patience_seconds} s after SIGSTOP")
        time.sleep(0.01)


def parent_of(pid: int) -> int:
    """The parent of a process; 0 if the process is gone, which no signal of ours reaches."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def pids_in(session: int, words: str = "") -> list[int]:
    """The living processes of `session` whose command line holds `words`."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if _in_session(pid, session) and words in title_of(pid)]


def _in_session(pid: int, session: int) -> bool:
    # Parents change when one in between is killed, process groups are the tasks' own; the session stays.
    fields = _stat(pid)
    return bool(fields) and int(fields[3]) == session


def _state(pid: int) -> str:
    """R, S, T, Z and so on as in proc(5); X for one that is gone."""
    fields = _stat(pid)
    return fields[0] if fields else "X"


def _stat(pid: int) -> Sequence[str]:
    """The fields of ``/proc/<pid>/stat`` behind the name: state, parent, group, session; none for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ()


def _states_of_threads(pid: int) -> list[str]:
    """The state of each thread of a process; none for one that is gone."""
    try:
        stats = [(thread / "stat").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    return [stat.rpartition(")")[2].split()[0] for stat in stats]


def title_of(pid: int) -> str:
    """The command line of a process, which programs may set; empty for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
