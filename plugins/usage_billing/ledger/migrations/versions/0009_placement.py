"""To which subscription each account was seen to lead, and what was decided where that changed.

Revision ID: 0009
"""

import sqlalchemy as sa
from alembic import op

from usage_billing.ledger.tables import UtcDateTime

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table; where accounts led before is not known, so the next run sees each for the first time."""
    address = "How a request reached it when it was first seen."
    edition = "Under another definition the same account is another matter."
    since = "From which usage period on; empty where it was never seen before."
    seen = "When the look-up began that saw it first."
    decision = "About what was used before; empty: none."
    op.create_table(
        "placement",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("source", sa.String(80), sa.ForeignKey("source.name"), nullable=False),
        sa.Column("edition", sa.Integer(), nullable=False, comment=edition),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("subscription", sa.Text(), nullable=False),
        sa.Column("component", sa.Text(), nullable=False),
        sa.Column("price_point", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False, comment=address),
        sa.Column("since", UtcDateTime(), nullable=True, comment=since),
        sa.Column("seen_at", UtcDateTime(), nullable=False, comment=seen),
        sa.Column("decision", sa.String(16), server_default="", nullable=False, comment=decision),
        sa.Column("decided_by", sa.Text(), server_default="", nullable=False),
        sa.Column("note", sa.Text(), server_default="", nullable=False),
        sa.Column("decided_at", UtcDateTime(), nullable=True),
        sa.CheckConstraint("decision IN ('', 'move', 'from_now')", name="placement_decision"),
        sqlite_autoincrement=True,
    )
    op.create_index("placement_by_account", "placement", ["source", "edition", "account", "number"])
    moved = sa.text("since IS NOT NULL")
    op.create_index(
        "placement_moved", "placement", ["source", "edition", "since"], sqlite_where=moved, postgresql_where=moved
    )
