"""Up to where arrivals were taken up, and which usage periods they touch that were not compared since.

Revision ID: 0006
"""

import sqlalchemy as sa
from alembic import op

from usage_billing.ledger.tables import UtcDateTime

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables; a source without a watermark takes up all that ever arrived."""
    where = "Up to where arrivals were taken up: a moment in UTC, or an id."
    op.create_table(
        "watermark",
        sa.Column("source", sa.String(length=80), sa.ForeignKey("source.name"), primary_key=True),
        sa.Column("arrival", sa.Text(), nullable=False, comment=where),
        sa.Column("extraction", sa.Integer(), sa.ForeignKey("extraction.number"), nullable=False),
    )
    last = "Which last saw it touched."
    op.create_table(
        "touched_period",
        sa.Column("source", sa.String(length=80), sa.ForeignKey("source.name"), primary_key=True),
        sa.Column("period_start", UtcDateTime(), primary_key=True),
        sa.Column("period_end", UtcDateTime(), primary_key=True),
        sa.Column("extraction", sa.Integer(), sa.ForeignKey("extraction.number"), nullable=False, comment=last),
    )
