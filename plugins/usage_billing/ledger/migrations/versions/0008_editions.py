"""How a source was defined from when on; what names no bill any more leaves the definitions.

Revision ID: 0008
"""

import json
from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

from usage_billing.ledger.tables import UtcDateTime

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)


def upgrade() -> None:
    """Let each source have one edition, in force ever since, and keep its definition nowhere else."""
    start = "From when on it is in force, until the next one; the first one of all: since ever."
    settings = "The whole section `destination` as it was last; empty where nobody wrote that down."
    edition = op.create_table(
        "edition",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("source", sa.String(length=80), sa.ForeignKey("source.name"), nullable=False),
        sa.Column("effective_from", UtcDateTime(), nullable=False, comment=start),
        sa.Column("site", sa.String(length=255), nullable=False),
        sa.Column("definition", sa.Text(), nullable=False, comment="Identity-bearing settings as JSON."),
        sa.Column("settings", sa.Text(), nullable=False, server_default="{}", comment=settings),
        sa.Column("registered_at", UtcDateTime(), nullable=False),
        sa.UniqueConstraint("source", "effective_from", name="edition_start"),
        sqlite_autoincrement=True,
    )
    texts = [sa.column(name, sa.Text()) for name in ("name", "site", "definition")]
    before = sa.table("source", *texts, sa.column("registered_at", UtcDateTime()))
    for row in op.get_bind().execute(sa.select(before)).all():
        definition = json.loads(row.definition)
        values = {"source": row.name, "effective_from": _ALWAYS, "site": row.site, "registered_at": row.registered_at}
        values["settings"] = json.dumps(definition.get("destination", {}), sort_keys=True)
        values["definition"] = json.dumps(_without_what_is_free(definition), sort_keys=True)
        op.execute(edition.insert().values(values))
    for name in ("site", "definition"):
        op.drop_column("source", name)


def _without_what_is_free(definition: dict[str, object]) -> dict[str, object]:
    """Return a definition in which `subscription_by` names nothing, but where it stands in each event's own text."""
    named = definition.get("destination")
    if not isinstance(named, dict) or named.get("mode") == "events":
        return definition
    return definition | {"destination": {key: value for key, value in named.items() if key != "subscription_by"}}
