"""What was decided about a plan before it was delivered, by whom and when; and what each usage period owed.

Revision ID: 0005
"""

import sqlalchemy as sa
from alembic import op

from usage_billing.ledger.tables import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table and the column; of what was delivered before, nobody was asked, and its sums are not known."""
    owed = "All that its last plan owed; empty: not known."
    op.add_column("compared_period", sa.Column("owed", sa.Text(), server_default="", nullable=False, comment=owed))
    digest = "Names the deliveries that were shown, with their quantities."
    nobody = "Empty where nobody answered in time."
    op.create_table(
        "approval",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("source", sa.String(80), sa.ForeignKey("source.name"), nullable=False),
        sa.Column("extraction", sa.Integer(), sa.ForeignKey("extraction.number"), nullable=False),
        sa.Column("validation", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False, comment=digest),
        sa.Column("decision", sa.String(16), nullable=False),
        sa.Column("decided_by", sa.Text(), server_default="", nullable=False, comment=nobody),
        sa.Column("note", sa.Text(), server_default="", nullable=False),
        sa.Column("decided_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("decision IN ('approved', 'rejected', 'timed_out')", name="approval_decision"),
        sqlite_autoincrement=True,
    )
    op.create_index("approval_by_plan", "approval", ["source", "extraction", "digest", "number"])
