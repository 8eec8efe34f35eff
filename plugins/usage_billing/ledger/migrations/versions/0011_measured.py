"""What the newest reading of each usage period had that went on, and which columns the query of its source returned.

Revision ID: 0011
"""

import sqlalchemy as sa
from alembic import op

from usage_billing.ledger.tables import UtcDateTime

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables; of readings before them nothing is known, so what is usual is learned from the next ones."""
    whole_sum = "Of what was accepted; empty where the meter is no sum."
    op.create_table(
        "measured_period",
        sa.Column("source", sa.String(length=80), sa.ForeignKey("source.name"), primary_key=True),
        sa.Column("period_start", UtcDateTime(), primary_key=True),
        sa.Column("period_end", UtcDateTime(), primary_key=True),
        sa.Column("extraction", sa.Integer(), sa.ForeignKey("extraction.number"), nullable=False),
        sa.Column("validation", sa.Integer(), server_default="0", nullable=False),
        sa.Column("rows_read", sa.Integer(), nullable=False),
        sa.Column("rows_quarantined", sa.Integer(), nullable=False),
        sa.Column("quantity", sa.Text(), server_default="", nullable=False, comment=whole_sum),
    )
    columns = "The type of each column by its name, as JSON."
    op.create_table(
        "read_columns",
        sa.Column("source", sa.String(length=80), sa.ForeignKey("source.name"), primary_key=True),
        sa.Column("extraction", sa.Integer(), sa.ForeignKey("extraction.number"), nullable=False),
        sa.Column("validation", sa.Integer(), server_default="0", nullable=False),
        sa.Column("columns", sa.Text(), nullable=False, comment=columns),
    )
