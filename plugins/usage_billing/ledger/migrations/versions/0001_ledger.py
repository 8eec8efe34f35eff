"""The first ledger: sources, leases, extractions, compared periods, deliveries.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

from usage_billing.ledger.tables import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables as they were then; `tables.py` moves on, a step never does."""
    op.create_table(
        "lease",
        sa.Column("fence", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("holder", sa.String(length=255), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.Column("released_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("fence"),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "lease_one_holder",
        "lease",
        ["name"],
        unique=True,
        sqlite_where=sa.text("released_at IS NULL"),
        postgresql_where=sa.text("released_at IS NULL"),
    )
    op.create_table(
        "ledger",
        sa.Column(
            "ledger_id",
            sa.String(length=36),
            nullable=False,
            comment="Names this ledger, so that a second one is noticed.",
        ),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("ledger_id"),
    )
    op.create_table(
        "source",
        sa.Column("name", sa.String(length=80), nullable=False),
        sa.Column("site", sa.String(length=255), nullable=False),
        sa.Column(
            "definition",
            sa.Text(),
            nullable=False,
            comment="Identity-bearing settings as JSON; may not change under history.",
        ),
        sa.Column("registered_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "extraction",
        sa.Column("number", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("source", sa.String(length=80), nullable=False),
        sa.Column("interval_start", UtcDateTime(), nullable=False),
        sa.Column("interval_end", UtcDateTime(), nullable=False),
        sa.Column("window_start", UtcDateTime(), nullable=False),
        sa.Column("window_end", UtcDateTime(), nullable=False),
        sa.Column("opened_at", UtcDateTime(), nullable=False),
        sa.Column("rows_read", sa.Integer(), server_default="0", nullable=False),
        sa.Column("rows_quarantined", sa.Integer(), server_default="0", nullable=False),
        sa.Column(
            "reasons", sa.Text(), server_default="{}", nullable=False, comment="Quarantined rows by reason, as JSON."
        ),
        sa.Column(
            "quarantine", sa.Text(), server_default="", nullable=False, comment="The manifest of the quarantined rows."
        ),
        sa.ForeignKeyConstraint(
            ["source"],
            ["source.name"],
        ),
        sa.PrimaryKeyConstraint("number"),
        sqlite_autoincrement=True,
    )
    op.create_index("extraction_by_interval", "extraction", ["source", "interval_start"], unique=False)
    op.create_table(
        "compared_period",
        sa.Column("source", sa.String(length=80), nullable=False),
        sa.Column("period_start", UtcDateTime(), nullable=False),
        sa.Column("period_end", UtcDateTime(), nullable=False),
        sa.Column("extraction", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["extraction"],
            ["extraction.number"],
        ),
        sa.ForeignKeyConstraint(
            ["source"],
            ["source.name"],
        ),
        sa.PrimaryKeyConstraint("source", "period_start", "period_end"),
    )
    op.create_table(
        "delivery",
        sa.Column("token", sa.String(length=64), nullable=False),
        sa.Column("identity", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(length=80), nullable=False),
        sa.Column("site", sa.String(length=255), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("subscription", sa.Text(), nullable=False),
        sa.Column("component", sa.Text(), nullable=False),
        sa.Column("price_point", sa.Text(), nullable=False),
        sa.Column("dimensions", sa.Text(), nullable=False),
        sa.Column("period_start", UtcDateTime(), nullable=False),
        sa.Column("period_end", UtcDateTime(), nullable=False),
        sa.Column("quantity", sa.Text(), nullable=False),
        sa.Column("extraction", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("reserved_at", UtcDateTime(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=True, comment="The lease of the worker that last sent it."),
        sa.Column("sends", sa.Integer(), server_default="0", nullable=False),
        sa.Column("sent_at", UtcDateTime(), nullable=True, comment="When it was last sent."),
        sa.Column("settled_at", UtcDateTime(), nullable=True),
        sa.Column("record_id", sa.Text(), server_default="", nullable=False, comment="The billing site's own id."),
        sa.CheckConstraint(
            "state IN ('reserved', 'sending', 'in_doubt', 'accepted', 'refused', 'held', 'written_off', 'superseded')",
            name="delivery_state",
        ),
        sa.ForeignKeyConstraint(
            ["extraction"],
            ["extraction.number"],
        ),
        sa.ForeignKeyConstraint(
            ["source"],
            ["source.name"],
        ),
        sa.PrimaryKeyConstraint("token"),
        sa.UniqueConstraint("identity", "revision", name="delivery_revision"),
    )
    op.create_index("delivery_by_period", "delivery", ["source", "period_start", "identity"], unique=False)
    op.create_index("delivery_by_state", "delivery", ["source", "state", "extraction", "token"], unique=False)
    op.create_index(
        "delivery_one_open",
        "delivery",
        ["identity"],
        unique=True,
        sqlite_where=sa.text("state IN ('reserved', 'sending', 'in_doubt', 'held')"),
        postgresql_where=sa.text("state IN ('reserved', 'sending', 'in_doubt', 'held')"),
    )
