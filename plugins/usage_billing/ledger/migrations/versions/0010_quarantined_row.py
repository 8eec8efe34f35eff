"""Every quarantined row by name, and what a person wrote off; and which usage periods each extraction reads.

Revision ID: 0010
"""

import sqlalchemy as sa
from alembic import op

from usage_billing.ledger.tables import UtcDateTime

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table; the next run of a usage period lists what is in quarantine there."""
    spans = "What it reads, as JSON; empty: all of it."
    op.add_column("extraction", sa.Column("spans", sa.Text(), server_default="", nullable=False, comment=spans))
    copies = "How many rows say just this; 0: none of the last reading."
    own = "Whether that is the usage period of its time; else it gives none of those that were compared."
    op.create_table(
        "quarantined_row",
        sa.Column("source", sa.String(80), sa.ForeignKey("source.name"), nullable=False),
        sa.Column("row_name", sa.String(64), nullable=False, comment="Stands for all that it says."),
        sa.Column("copies", sa.Integer(), nullable=False, comment=copies),
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("time", UtcDateTime(), nullable=True),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("quantity", sa.Text(), nullable=False),
        sa.Column("dimensions", sa.Text(), nullable=False),
        sa.Column("reasons", sa.Text(), nullable=False, comment="Each reason why it may not be billed, as JSON."),
        sa.Column("period_start", UtcDateTime(), nullable=False),
        sa.Column("period_end", UtcDateTime(), nullable=False),
        sa.Column("placed", sa.Boolean(), nullable=False, comment=own),
        sa.Column("extraction", sa.Integer(), sa.ForeignKey("extraction.number"), nullable=False),
        sa.Column("validation", sa.Integer(), nullable=False),
        sa.Column(
            "written_off_by",
            sa.Text(),
            server_default="",
            nullable=False,
            comment="Empty: it is owed, once it is mended.",
        ),
        sa.Column("note", sa.Text(), server_default="", nullable=False),
        sa.Column("written_off_at", UtcDateTime(), nullable=True),
        sa.Column(
            "as_duplicate",
            sa.Boolean(),
            server_default=sa.false(),
            nullable=False,
            comment="For another row of its event.",
        ),
        sa.PrimaryKeyConstraint("source", "row_name"),
    )
    op.create_index("quarantined_row_by_period", "quarantined_row", ["source", "period_start"])
