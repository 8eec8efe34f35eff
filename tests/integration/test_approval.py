"""A person between plan and deliver: only what was shown and approved is sent, and a no loses nothing."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest
from airflow.sdk.exceptions import AirflowSkipException, TaskAwaitingInput

from stories import CHECKOUT, SITES, WORLDS
from usage_billing import installation as ours
from usage_billing import operators
from usage_billing.errors import InDoubt, Misconfigured, NeedsDecision
from usage_billing.ledger import Ledger
from usage_billing.records import UNAPPROVED, Period, State
from usage_billing.sandbox import Sandbox

pytestmark = pytest.mark.filterwarnings("default")  # Airflow warns about itself in a dozen places.

DAY = (datetime(2026, 10, 5, 4, tzinfo=UTC), datetime(2026, 10, 6, 4, tzinfo=UTC))
SITE = SITES["api_calls"]
STAGES = ("extract", "validate", "aggregate", "plan", "approve", "deliver", "reconcile")


class Desk:
    """An installation whose source wants an approval, and the person who is asked."""

    def __init__(self, sandbox: Sandbox, folder: Path, questions: list[dict[str, Any]]) -> None:
        self.sandbox = sandbox
        self.warehouse = folder / "usage.duckdb"
        self.source = folder / "sources" / "api_calls" / "source.yaml"
        self.questions = questions
        self.parked: dict[str, Any] = {}

    def sql(self, *statements: str) -> None:
        """Change the warehouse."""
        with duckdb.connect(str(self.warehouse)) as connection:
            for statement in statements:
                connection.execute(statement)

    def run(self, *stages: str, reference: Any = None) -> Any:
        """Run stages one after the other, each from what the one before left; return the last reference."""
        for name in stages:
            reference = self.task(name, reference).execute(_context())
        return reference

    def plan(self) -> Any:
        """Run the stages up to the plan."""
        return self.run("extract", "validate", "aggregate", "plan")

    def task(self, name: str, reference: Any) -> Any:
        """Return one of the operators, with what it was handed after a trip through JSON."""
        if name == "approve":
            from usage_billing.asking import ApproveOperator as Operator  # noqa: PLC0415
        else:
            Operator = getattr(operators, f"{name.title()}Operator")  # noqa: N806
        made = Operator(task_id=name, source="api_calls")
        made.reference = json.loads(json.dumps(reference))
        return made

    def ask(self, planned: Any) -> dict[str, Any]:
        """Run the approve task until it waits; return what the person sees."""
        with pytest.raises(TaskAwaitingInput) as waiting:
            self.task("approve", planned).execute(_context())
        self.parked = json.loads(json.dumps(waiting.value.kwargs))
        assert waiting.value.method_name == "execute_complete"
        return self.questions[-1]

    def answer(self, planned: Any, option: str, note: str = "") -> Any:
        """Answer, and run what Airflow then runs, in a process that knows nothing of the one before."""
        event = {
            "chosen_options": [option],
            "params_input": {"note": note},
            "responded_at": datetime.now(UTC),
            "responded_by_user": {"id": "7", "name": "vera"},
            "timedout": False,
        }
        return self.task("approve", planned).execute_complete(_context(), event=event, **self.parked)

    def time_out(self, planned: Any) -> Any:
        """Run what Airflow runs when nobody answered in time."""
        event = {"error": "too late", "error_type": "timeout"}
        return self.task("approve", planned).execute_complete(_context(), event=event, **self.parked)

    @property
    def billed(self) -> dict[str, Decimal]:
        """What acme billed for calls, by the site's own count."""
        rows = self.sandbox.billed(SITE)
        return {row.reference: row.billed for row in rows if row.component == "api-calls" and row.billed}

    @property
    def writing(self) -> int:
        """How many requests could have changed the site."""
        return int(self.sandbox.requests(SITE)["writing"])

    def listed(self) -> list[tuple[str, str, str]]:
        """What is open in the ledger: account, state and reason."""
        left = ours.ledger().open_items("api_calls", Period(*DAY))
        return sorted(zip(left["account"], left["state"], left["reason"], strict=True))


def _context() -> dict[str, Any]:
    interval = {"data_interval_start": DAY[0], "data_interval_end": DAY[1], "params": {}}
    ti = SimpleNamespace(id="ti", dag_id="approval", run_id="manual", task_id="any", map_index=-1, try_number=1)
    return {**interval, "task_instance": ti, "ti": ti}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A sandbox, a ledger, a warehouse with a day of calls, and a source that says `approval: true`."""
    questions: list[dict[str, Any]] = []
    hitl = "airflow.providers.standard.operators.hitl.upsert_hitl_detail"
    monkeypatch.setattr(hitl, lambda **question: questions.append(question))  # Only a running task may write it.
    folder = tmp_path / "sources" / "api_calls"
    folder.mkdir(parents=True)
    for file in (CHECKOUT / "include" / "sources" / "api_calls").iterdir():
        (folder / file.name).write_text(file.read_text())
    with (folder / "source.yaml").open("a") as file:
        file.write("approval: true\n")
    with Sandbox(WORLDS) as sandbox:
        found = Desk(sandbox, tmp_path, questions)
        found.sql(
            "CREATE TABLE api_calls AS SELECT * FROM (VALUES"
            " ('r1', TIMESTAMPTZ '2026-10-05 12:00:00+00', 'acct-0001', 3::DECIMAL(18, 3)),"
            " ('r2', TIMESTAMPTZ '2026-10-05 13:00:00+00', 'acct-0002', 4)"
            ") AS t(request_id, requested_at, account_ref, calls)"
        )
        acme = {"subdomain": "acme", "region": "us", "events_url": sandbox.events_url, "settle_after_seconds": 1}
        connections = {
            "WAREHOUSE": {"conn_type": "duckdb", "host": str(found.warehouse), "extra": {"read_only": True}},
            "USAGE_LEDGER": {"conn_type": "sqlite", "host": str(tmp_path / "ledger.sqlite")},
            "MAXIO_ACME": {
                "conn_type": "maxio",
                "host": sandbox.maxio_url("acme"),
                "password": "sandbox-acme-key",
                "extra": acme,
            },
        }
        for name, connection in connections.items():
            monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(connection))
        monkeypatch.setenv("AIRFLOW__USAGE_BILLING__STAGING_PATH", f"file://{tmp_path}/staging")
        monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(folder.parent))
        Ledger.create(ours.ledger_url())
        yield found
        ours.ledger().close()
        ours._ledger.cache_clear()


def test_what_was_approved_is_sent_and_the_ledger_says_by_whom(desk: Desk) -> None:
    """The question shows what goes; nothing goes before the yes, and that and nothing else after it."""
    planned = desk.plan()
    question = desk.ask(planned)
    assert question["subject"] == "Bill api_calls?"
    assert "would send **2 deliveries, 7 in all**" in question["body"]
    assert desk.writing == 0
    approved = desk.answer(planned, "Approve", "as every month")
    assert desk.writing == 0
    desk.run("deliver", "reconcile", reference=approved)
    assert desk.billed == {"acct-0001": Decimal(3), "acct-0002": Decimal(4)}
    decided = ours.ledger().decision("api_calls", _reading(planned), desk.parked["shown"])
    assert decided is not None
    assert (decided.decision, decided.by, decided.note) == ("approved", "vera", "as every month")


def _reading(reference: Any) -> Any:
    from usage_billing.records import Run  # noqa: PLC0415

    return Run.from_json(reference).reading


def test_a_deliver_without_an_approval_sends_nothing(desk: Desk) -> None:
    """Whoever leaves the approve task out, or skips it by hand, is stopped at the ledger."""
    planned = desk.plan()
    with pytest.raises(NeedsDecision, match="wait for an approval, and the ledger has none"):
        desk.run("deliver", reference=planned)
    assert (desk.writing, desk.listed()) == (0, [])


def test_a_no_sends_nothing_and_lists_what_is_owed(desk: Desk) -> None:
    """The run ends without an error, each delivery is held by name with who said no, and deliver stays shut."""
    planned = desk.plan()
    desk.ask(planned)
    with pytest.raises(
        AirflowSkipException, match=r"rejected by vera .*: too much: nothing is sent; 2 deliveries are held"
    ):
        desk.answer(planned, "Reject", "too much")
    assert desk.writing == 0
    assert [(account, state) for account, state, _ in desk.listed()] == [("acct-0001", "held"), ("acct-0002", "held")]
    assert all(reason.startswith(f"{UNAPPROVED}rejected by vera on ") for _, _, reason in desk.listed())
    with pytest.raises(NeedsDecision, match="the ledger has rejected by vera"):
        desk.run("deliver", reference=planned)
    assert desk.writing == 0


@pytest.mark.parametrize("again", ["a later run", "the same plan, cleared"])
def test_after_a_no_a_later_plan_asks_again(desk: Desk, again: str) -> None:
    """What was rejected is new once more, and a yes then sends it once."""
    planned = desk.plan()
    desk.ask(planned)
    with pytest.raises(AirflowSkipException):
        desk.answer(planned, "Reject")
    planned = desk.plan() if again == "a later run" else desk.run("plan", reference=planned)
    assert "would send **2 deliveries, 7 in all**" in desk.ask(planned)["body"]
    assert "| new | 2 | 7 |" in desk.questions[-1]["body"]
    desk.run("deliver", "reconcile", reference=desk.answer(planned, "Approve"))
    assert desk.billed == {"acct-0001": Decimal(3), "acct-0002": Decimal(4)}
    assert desk.listed() == []


def test_no_answer_in_time_is_a_no_of_nobody(desk: Desk) -> None:
    """Nothing is sent, and the ledger says that nobody answered."""
    planned = desk.plan()
    desk.ask(planned)
    with pytest.raises(AirflowSkipException, match="no answer until"):
        desk.time_out(planned)
    assert desk.writing == 0
    assert {state for _, state, _ in desk.listed()} == {"held"}
    decided = ours.ledger().decision("api_calls", _reading(planned), desk.parked["shown"])
    assert decided is not None
    assert (decided.decision, decided.by) == ("timed_out", "")


def test_rows_that_come_between_approval_and_delivery_wait_for_the_next_question(desk: Desk) -> None:
    """They belong to another reading: the approved one sends what was approved, the next one asks about the rest."""
    planned = desk.plan()
    desk.ask(planned)
    approved = desk.answer(planned, "Approve")
    desk.sql("INSERT INTO api_calls VALUES ('late', TIMESTAMPTZ '2026-10-05 20:00:00+00', 'acct-0003', 50)")
    desk.run("deliver", "reconcile", reference=approved)
    assert desk.billed == {"acct-0001": Decimal(3), "acct-0002": Decimal(4)}
    planned = desk.plan()
    assert "would send **1 deliveries, 50 in all**" in desk.ask(planned)["body"]


def test_a_newer_reading_takes_the_word_from_an_approved_plan(desk: Desk) -> None:
    """Once a later run has compared the period, the approved plan sends nothing, and the later one asks."""
    planned = desk.plan()
    desk.ask(planned)
    approved = desk.answer(planned, "Approve")
    desk.sql("UPDATE api_calls SET calls = 5 WHERE request_id = 'r1'")
    later = desk.plan()
    with pytest.raises(AirflowSkipException, match="stale"):
        desk.run("deliver", reference=approved)
    assert desk.writing == 0
    desk.ask(later)
    desk.run("deliver", reference=desk.answer(later, "Approve"))
    assert desk.billed == {"acct-0001": Decimal(5), "acct-0002": Decimal(4)}


def test_what_moved_while_the_person_thought_is_shown_again(desk: Desk) -> None:
    """A yes to one list is no yes to another."""
    planned = desk.plan()
    first = desk.ask(planned)
    token = ours.staging().read(_proposals(planned)).__next__().to_pandas().iloc[:1]
    reading = _reading(planned)
    ours.ledger().reserve("api_calls", SITE, reading, token.assign(state=State.HELD, reason="somebody else held it"))
    ours.ledger().decide(token["token"].iloc[0], State.WRITTEN_OFF, "decided on 2026-10-07 by vera: credited")
    with pytest.raises(TaskAwaitingInput) as waiting:
        desk.answer(planned, "Approve")
    assert waiting.value.kwargs != desk.parked
    assert first["body"] != desk.questions[-1]["body"]
    assert "would send **1 deliveries" in desk.questions[-1]["body"]
    assert ours.ledger().decision("api_calls", reading, desk.parked["shown"]) is None
    desk.parked = waiting.value.kwargs
    desk.run("deliver", reference=desk.answer(planned, "Approve"))
    assert desk.writing == 1


def _proposals(reference: Any) -> Any:
    from usage_billing.records import Run  # noqa: PLC0415

    return Run.from_json(reference).tables["proposals"]


def test_a_deliver_that_died_goes_on_without_asking(desk: Desk) -> None:
    """The approval stands in the ledger: a retry, and a cleared approve task, find it there."""
    planned = desk.plan()
    desk.ask(planned)
    approved = desk.answer(planned, "Approve")
    desk.sandbox.fault(SITE, "unauthorized", count=1)
    with pytest.raises(Misconfigured):
        desk.run("deliver", reference=approved)
    asked = len(desk.questions)
    desk.run("deliver", "reconcile", reference=desk.run("approve", reference=planned))
    assert len(desk.questions) == asked
    assert desk.billed == {"acct-0001": Decimal(3), "acct-0002": Decimal(4)}
    before = desk.writing
    desk.run("deliver", "reconcile", reference=approved)
    assert desk.writing == before


def test_a_lost_reply_is_settled_under_the_same_approval(desk: Desk) -> None:
    """A doubt of what was approved ends without another question, and bills once."""
    planned = desk.plan()
    desk.ask(planned)
    approved = desk.answer(planned, "Approve")
    desk.sandbox.fault(SITE, "lost_reply", count=1)
    try:
        desk.run("deliver", reference=approved)
    except InDoubt:
        desk.run("deliver", reference=approved)
    desk.run("reconcile", reference=approved)
    assert desk.billed == {"acct-0001": Decimal(3), "acct-0002": Decimal(4)}


def test_a_replan_that_would_send_more_than_was_approved_stops(desk: Desk) -> None:
    """Something moves under a key in mid-delivery: the rest goes, that one waits for a person, and is lost nowhere."""
    planned = desk.plan()
    desk.ask(planned)
    approved = desk.answer(planned, "Approve")
    one = next(ours.staging().read(_proposals(planned))).to_pandas().iloc[:1]
    # Between the answer and the delivery somebody holds the key, so its next revision has another token.
    ours.ledger().reserve("api_calls", SITE, _reading(planned), one.assign(state=State.HELD, reason=f"{UNAPPROVED}x"))
    with pytest.raises(NeedsDecision, match="1 deliveries of 'api_calls' are not what was approved any more"):
        desk.run("deliver", reference=approved)
    assert desk.writing == 1
    planned = desk.run("plan", reference=planned)
    desk.ask(planned)
    desk.run("deliver", "reconcile", reference=desk.answer(planned, "Approve"))
    assert desk.billed == {"acct-0001": Decimal(3), "acct-0002": Decimal(4)}


def test_nobody_is_asked_about_nothing(desk: Desk) -> None:
    """A day that is billed already goes through without a question."""
    planned = desk.plan()
    desk.ask(planned)
    desk.run("deliver", "reconcile", reference=desk.answer(planned, "Approve"))
    asked, sent = len(desk.questions), desk.writing
    desk.run(*STAGES)
    assert (len(desk.questions), desk.writing) == (asked, sent)


def test_the_dag_asks_between_plan_and_deliver(desk: Desk) -> None:
    """Its timeout and its approvers come from source.yaml; other sources have no such task."""
    from usage_billing.flow import billing_dag  # noqa: PLC0415

    with desk.source.open("a") as file:
        file.write("approval_timeout_hours: 48\napprovers: [vera]\n")
    dag = billing_dag("api_calls")
    assert dag.get_task("approve").upstream_task_ids == {"plan"}
    assert dag.get_task("deliver").upstream_task_ids == {"approve"}
    assert dag.get_task("approve").response_timeout.total_seconds() == 48 * 3600
    # What the page asks for beside the yes and the no: none of the DAG's own params.
    assert list(dag.get_task("approve").serialized_params) == ["note"]
    assert dag.get_task("approve").assigned_users == [{"id": "vera", "name": "vera"}]
    text = desk.source.read_text()
    desk.source.write_text(text.replace("approval: true", "approval: false"))
    with pytest.raises(Misconfigured, match="need approval: true"):
        billing_dag("api_calls")
    desk.source.write_text(text[: text.index("approval:")])
    assert "approve" not in billing_dag("api_calls").task_ids


def test_an_unusual_plan_stops_where_nobody_is_asked_anyway(desk: Desk) -> None:
    """With every key at once, and nothing at the site; raised, it goes."""
    text = desk.source.read_text().replace("approval: true\n", "")
    desk.source.write_text(f"{text}first_run: {{max_quantity: 6}}\n")
    with pytest.raises(NeedsDecision, match=r"(?s)clear the plan: 1 fault.*first_run.max_quantity = 6: .*would bill 7"):
        desk.plan()
    assert (desk.writing, desk.listed()) == (0, [])
    desk.source.write_text(f"{text}first_run: {{max_quantity: 7}}\n")
    desk.run("deliver", "reconcile", reference=desk.plan())
    assert desk.billed == {"acct-0001": Decimal(3), "acct-0002": Decimal(4)}


def test_where_a_person_is_asked_the_yes_counts_for_what_is_unusual(desk: Desk) -> None:
    """The question begins with it, and no key has to be raised."""
    with desk.source.open("a") as file:
        file.write("first_run: {max_quantity: 6}\n")
    planned = desk.plan()
    assert desk.ask(planned)["body"].startswith("**Unusual:** first_run.max_quantity = 6: ")
    desk.run("deliver", "reconcile", reference=desk.answer(planned, "Approve"))
    assert desk.billed == {"acct-0001": Decimal(3), "acct-0002": Decimal(4)}


def test_a_jump_that_was_turned_down_is_not_the_usual(desk: Desk) -> None:
    """Rejected, it tells later plans nothing; approved and delivered, it does."""
    planned = desk.plan()
    desk.ask(planned)
    with pytest.raises(AirflowSkipException):
        desk.answer(planned, "Reject")
    with pytest.raises(NeedsDecision):
        desk.run("deliver", reference=planned)
    assert ours.ledger().usually_owed("api_calls", DAY[1], 31) == []
    planned = desk.plan()
    desk.ask(planned)
    desk.run("deliver", "reconcile", reference=desk.answer(planned, "Approve"))
    assert ours.ledger().usually_owed("api_calls", DAY[1], 31) == [7]
    assert desk.billed == {"acct-0001": Decimal(3), "acct-0002": Decimal(4)}


def test_what_was_written_down_before_the_source_asked_is_not_sent_unasked(desk: Desk) -> None:
    """A deliver that failed left deliveries behind, and the source asks since then: a new reading asks about them."""
    text = desk.source.read_text()
    desk.source.write_text(text.replace("approval: true\n", ""))
    planned = desk.plan()
    desk.sandbox.fault(SITE, "unauthorized", count=2)
    with pytest.raises(Misconfigured):
        desk.run("deliver", reference=planned)
    assert {state for _, state, _ in desk.listed()} == {"reserved"}
    desk.source.write_text(text)
    # The cleared plan proposes nothing: what it would propose is written down already, for this very reading.
    passed = desk.run("plan", "approve", reference=planned)
    with pytest.raises(NeedsDecision, match="clear the run from extract on"):
        desk.run("deliver", reference=passed)
    assert desk.billed == {}
    planned = desk.plan()
    assert "would send **2 deliveries, 7 in all**" in desk.ask(planned)["body"]
    desk.run("deliver", "reconcile", reference=desk.answer(planned, "Approve"))
    assert desk.billed == {"acct-0001": Decimal(3), "acct-0002": Decimal(4)}
