"""The ledger's schema, step by step; Alembic runs the steps, `usage-billing ledger init` asks it to."""
