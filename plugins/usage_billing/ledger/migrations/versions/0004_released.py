"""Who released a delivery that was held, when and why.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; nothing was released before."""
    comment = "Who let it go, when and why, held as it was."
    op.add_column("delivery", sa.Column("released", sa.Text(), server_default="", nullable=False, comment=comment))
