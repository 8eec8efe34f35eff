"""Which source feeds which component of which site.

Revision ID: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table; whoever has fed a component so far may go on."""
    op.create_table(
        "fed_component",
        sa.Column("site", sa.String(255), primary_key=True),
        sa.Column("component", sa.String(255), primary_key=True),
        sa.Column("source", sa.String(80), sa.ForeignKey("source.name"), primary_key=True),
    )
    op.execute(
        "INSERT INTO fed_component (site, component, source) SELECT DISTINCT site, component, source FROM delivery"
    )
