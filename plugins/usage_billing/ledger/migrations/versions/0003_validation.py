"""Which outcome of its validation an extraction was compared with, and when its accounts were looked up.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

from usage_billing.ledger.tables import UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; what was compared before counts as never validated, so whatever comes next is later."""
    for table in ("compared_period", "delivery"):
        op.add_column(table, sa.Column("validation", sa.Integer(), server_default="0", nullable=False))
    outcomes = "How many outcomes its validation had."
    op.add_column(
        "extraction", sa.Column("validation", sa.Integer(), server_default="0", nullable=False, comment=outcomes)
    )
    last = "The digest of the last of these outcomes."
    op.add_column("extraction", sa.Column("validated", sa.Text(), server_default="", nullable=False, comment=last))
    when = "When its accounts were last looked up at the site."
    op.add_column("extraction", sa.Column("validated_at", UtcDateTime(), nullable=True, comment=when))
