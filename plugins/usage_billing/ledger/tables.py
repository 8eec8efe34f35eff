"""The ledger's tables, the same on SQLite and PostgreSQL.

Quantities are plain decimal text: both engines keep it to the last digit, and a person can read it. Times are UTC.
The database itself forbids two open revisions of one identity and two holders of one lease.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
)

from usage_billing.records import Choice, Decision, State, check_aware

SCHEMA_VERSION = "0011"
VERSION_TABLE = "usage_ledger_version"

OPEN_STATES = (State.RESERVED, State.SENDING, State.IN_DOUBT, State.HELD)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware moment, kept in UTC: ``TIMESTAMPTZ`` on PostgreSQL, sortable text on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return what the engine stores; a naive moment raises `ValueError`."""
        if value is None:
            return None
        check_aware("a moment in the ledger", value)
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return the moment, aware."""
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


metadata = MetaData()

ledger = Table(
    "ledger",
    metadata,
    Column("ledger_id", String(36), primary_key=True, comment="Names this ledger, so that a second one is noticed."),
    Column("created_at", UtcDateTime, nullable=False),
)

source = Table(
    "source",
    metadata,
    Column("name", String(80), primary_key=True),
    Column("registered_at", UtcDateTime, nullable=False),
)

# One usage under two names would be billed twice: whoever comes second names those that feed the component already.
fed_component = Table(
    "fed_component",
    metadata,
    Column("site", String(255), primary_key=True),
    Column("component", String(255), primary_key=True),
    Column("source", String(80), ForeignKey("source.name"), primary_key=True),
)

_start = "From when on it is in force, until the next one; the first one of all: since ever."
_whole = "The whole section `destination` as it was last; empty where nobody wrote that down."

edition = Table(
    "edition",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("source", String(80), ForeignKey("source.name"), nullable=False),
    Column("effective_from", UtcDateTime, nullable=False, comment=_start),
    Column("site", String(255), nullable=False),
    Column("definition", Text, nullable=False, comment="Identity-bearing settings as JSON."),
    Column("settings", Text, nullable=False, server_default="{}", comment=_whole),
    Column("registered_at", UtcDateTime, nullable=False),
    UniqueConstraint("source", "effective_from", name="edition_start"),
    # A number stands for one definition for ever: a run that was read under it must notice that it was replaced.
    sqlite_autoincrement=True,
)

lease = Table(
    "lease",
    metadata,
    Column("fence", Integer, primary_key=True, autoincrement=True),
    Column("name", String(255), nullable=False),
    Column("holder", String(255), nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("released_at", UtcDateTime),
    sqlite_autoincrement=True,
)
# One holder at a time; an expired lease is released by whoever wants the name next.
Index(
    "lease_one_holder",
    lease.c.name,
    unique=True,
    sqlite_where=text("released_at IS NULL"),
    postgresql_where=text("released_at IS NULL"),
)

extraction = Table(
    "extraction",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("source", String(80), ForeignKey("source.name"), nullable=False),
    Column("interval_start", UtcDateTime, nullable=False),
    Column("interval_end", UtcDateTime, nullable=False),
    Column("window_start", UtcDateTime, nullable=False),
    Column("window_end", UtcDateTime, nullable=False),
    Column("spans", Text, nullable=False, server_default="", comment="What it reads, as JSON; empty: all of it."),
    Column("opened_at", UtcDateTime, nullable=False),
    Column("rows_read", Integer, nullable=False, server_default="0"),
    Column("rows_quarantined", Integer, nullable=False, server_default="0"),
    Column("reasons", Text, nullable=False, server_default="{}", comment="Quarantined rows by reason, as JSON."),
    Column("quarantine", Text, nullable=False, server_default="", comment="The manifest of the quarantined rows."),
    Column("validation", Integer, nullable=False, server_default="0", comment="How many outcomes its validation had."),
    Column("validated", Text, nullable=False, server_default="", comment="The digest of the last of these outcomes."),
    Column("validated_at", UtcDateTime, comment="When its accounts were last looked up at the site."),
    sqlite_autoincrement=True,
)
Index("extraction_by_interval", extraction.c.source, extraction.c.interval_start)

compared_period = Table(
    "compared_period",
    metadata,
    Column("source", String(80), ForeignKey("source.name"), primary_key=True),
    Column("period_start", UtcDateTime, primary_key=True),
    Column("period_end", UtcDateTime, primary_key=True),
    Column("extraction", Integer, ForeignKey("extraction.number"), nullable=False),
    Column("validation", Integer, nullable=False, server_default="0"),
    Column("owed", Text, nullable=False, server_default="", comment="All that its last plan owed; empty: not known."),
)

_own = "Whether that is the usage period of its time; else it gives none of those that were compared."

# Every row that may not be billed, by name, as the newest comparison of its usage period saw it; and what a person
# wrote off, for ever.
quarantined_row = Table(
    "quarantined_row",
    metadata,
    Column("source", String(80), ForeignKey("source.name"), primary_key=True),
    Column("row_name", String(64), primary_key=True, comment="Stands for all that it says."),
    Column("copies", Integer, nullable=False, comment="How many rows say just this; 0: none of the last reading."),
    Column("event_id", Text, nullable=False),
    Column("time", UtcDateTime),
    Column("account", Text, nullable=False),
    Column("quantity", Text, nullable=False),
    Column("dimensions", Text, nullable=False),
    Column("reasons", Text, nullable=False, comment="Each reason why it may not be billed, as JSON."),
    Column("period_start", UtcDateTime, nullable=False),
    Column("period_end", UtcDateTime, nullable=False),
    Column("placed", Boolean, nullable=False, comment=_own),
    Column("extraction", Integer, ForeignKey("extraction.number"), nullable=False),
    Column("validation", Integer, nullable=False),
    Column("written_off_by", Text, nullable=False, server_default="", comment="Empty: it is owed, once it is mended."),
    Column("note", Text, nullable=False, server_default=""),
    Column("written_off_at", UtcDateTime),
    Column("as_duplicate", Boolean, nullable=False, server_default=false(), comment="For another row of its event."),
)
Index("quarantined_row_by_period", quarantined_row.c.source, quarantined_row.c.period_start)
_sum = "Of what was accepted; empty where the meter is no sum."

# What tells later readings what is usual: of each usage period the newest reading that went on, none that was stopped.
measured_period = Table(
    "measured_period",
    metadata,
    Column("source", String(80), ForeignKey("source.name"), primary_key=True),
    Column("period_start", UtcDateTime, primary_key=True),
    Column("period_end", UtcDateTime, primary_key=True),
    Column("extraction", Integer, ForeignKey("extraction.number"), nullable=False),
    Column("validation", Integer, nullable=False, server_default="0"),
    Column("rows_read", Integer, nullable=False),
    Column("rows_quarantined", Integer, nullable=False),
    Column("quantity", Text, nullable=False, server_default="", comment=_sum),
)

# What the query of a source returned in the newest reading that went on, whatever the source names of it.
read_columns = Table(
    "read_columns",
    metadata,
    Column("source", String(80), ForeignKey("source.name"), primary_key=True),
    Column("extraction", Integer, ForeignKey("extraction.number"), nullable=False),
    Column("validation", Integer, nullable=False, server_default="0"),
    Column("columns", Text, nullable=False, comment="The type of each column by its name, as JSON."),
)

_decisions = ", ".join(f"'{decision}'" for decision in Decision)

approval = Table(
    "approval",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("source", String(80), ForeignKey("source.name"), nullable=False),
    Column("extraction", Integer, ForeignKey("extraction.number"), nullable=False),
    Column("validation", Integer, nullable=False),
    Column(
        "digest", String(64), nullable=False, comment="Names the deliveries that were shown, with their quantities."
    ),
    Column("decision", String(16), nullable=False),
    Column("decided_by", Text, nullable=False, server_default="", comment="Empty where nobody answered in time."),
    Column("note", Text, nullable=False, server_default=""),
    Column("decided_at", UtcDateTime, nullable=False),
    CheckConstraint(f"decision IN ({_decisions})", name="approval_decision"),
    sqlite_autoincrement=True,
)
# The same may be asked again after a no: of several answers the last one counts.
Index("approval_by_plan", approval.c.source, approval.c.extraction, approval.c.digest, approval.c.number)

watermark = Table(
    "watermark",
    metadata,
    Column("source", String(80), ForeignKey("source.name"), primary_key=True),
    Column("arrival", Text, nullable=False, comment="Up to where arrivals were taken up: a moment in UTC, or an id."),
    Column("extraction", Integer, ForeignKey("extraction.number"), nullable=False),
)

# What arrived is owed a comparison: a row goes when its usage period was compared and every difference is written down.
touched_period = Table(
    "touched_period",
    metadata,
    Column("source", String(80), ForeignKey("source.name"), primary_key=True),
    Column("period_start", UtcDateTime, primary_key=True),
    Column("period_end", UtcDateTime, primary_key=True),
    Column(
        "extraction", Integer, ForeignKey("extraction.number"), nullable=False, comment="Which last saw it touched."
    ),
)

_choices = ", ".join(f"'{choice}'" for choice in ("", *Choice))

# Where each account was seen to lead, one row for each time that it led elsewhere than before.
placement = Table(
    "placement",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("source", String(80), ForeignKey("source.name"), nullable=False),
    Column("edition", Integer, nullable=False, comment="Under another definition the same account is another matter."),
    Column("account", Text, nullable=False),
    Column("subscription", Text, nullable=False),
    Column("component", Text, nullable=False),
    Column("price_point", Text, nullable=False),
    Column("address", Text, nullable=False, comment="How a request reached it when it was first seen."),
    Column("since", UtcDateTime, comment="From which usage period on; empty where it was never seen before."),
    Column("seen_at", UtcDateTime, nullable=False, comment="When the look-up began that saw it first."),
    Column(
        "decision", String(16), nullable=False, server_default="", comment="About what was used before; empty: none."
    ),
    Column("decided_by", Text, nullable=False, server_default=""),
    Column("note", Text, nullable=False, server_default=""),
    Column("decided_at", UtcDateTime),
    CheckConstraint(f"decision IN ({_choices})", name="placement_decision"),
    sqlite_autoincrement=True,
)
Index("placement_by_account", placement.c.source, placement.c.edition, placement.c.account, placement.c.number)
# Few accounts ever move, and each run asks which.
_moved = text("since IS NOT NULL")
Index(
    "placement_moved",
    placement.c.source,
    placement.c.edition,
    placement.c.since,
    sqlite_where=_moved,
    postgresql_where=_moved,
)

_states = ", ".join(f"'{state}'" for state in State)
_open_states = text("state IN ({})".format(", ".join(f"'{state}'" for state in OPEN_STATES)))

delivery = Table(
    "delivery",
    metadata,
    Column("token", String(64), primary_key=True),
    Column("identity", String(64), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("source", String(80), ForeignKey("source.name"), nullable=False),
    Column("site", String(255), nullable=False),
    Column("account", Text, nullable=False),
    Column("subscription", Text, nullable=False),
    Column("component", Text, nullable=False),
    Column("price_point", Text, nullable=False),
    Column("dimensions", Text, nullable=False),
    Column("period_start", UtcDateTime, nullable=False),
    Column("period_end", UtcDateTime, nullable=False),
    Column("quantity", Text, nullable=False),
    Column("extraction", Integer, ForeignKey("extraction.number"), nullable=False),
    Column("validation", Integer, nullable=False, server_default="0"),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    Column("address", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("reserved_at", UtcDateTime, nullable=False),
    Column("open_until", UtcDateTime, comment="When the billing period ends for which it was judged."),
    Column("fence", Integer, comment="The lease of the worker that last sent it."),
    Column("sends", Integer, nullable=False, server_default="0"),
    Column("sent_at", UtcDateTime, comment="When it was last sent."),
    Column("settled_at", UtcDateTime),
    Column("record_id", Text, nullable=False, server_default="", comment="The billing site's own id."),
    Column("applied", Text, nullable=False, server_default="", comment="How much of it counted; empty: all of it."),
    Column("released", Text, nullable=False, server_default="", comment="Who let it go, when and why, held as it was."),
    UniqueConstraint("identity", "revision", name="delivery_revision"),
    CheckConstraint(f"state IN ({_states})", name="delivery_state"),
)
# While one revision is open no other may be: what is owed beyond it is unknown until it is settled.
Index("delivery_one_open", delivery.c.identity, unique=True, sqlite_where=_open_states, postgresql_where=_open_states)
Index("delivery_by_period", delivery.c.source, delivery.c.period_start, delivery.c.identity)
Index("delivery_by_state", delivery.c.source, delivery.c.state, delivery.c.extraction, delivery.c.token)
