"""What the site counted of a delivery, and until when the judgement that it may be sent holds.

Revision ID: 0002
"""

import sqlalchemy as sa
from alembic import op

from usage_billing.ledger.tables import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; what was accepted before counted whole."""
    until = "When the billing period ends for which it was judged."
    op.add_column("delivery", sa.Column("open_until", UtcDateTime(), nullable=True, comment=until))
    comment = "How much of it counted; empty: all of it."
    op.add_column("delivery", sa.Column("applied", sa.Text(), server_default="", nullable=False, comment=comment))
