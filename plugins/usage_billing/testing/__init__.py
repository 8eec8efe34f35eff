"""The simulator: whole histories of billing, drawn from a seed and played on virtual time, judged by what was billed.

Example::

    with workshop() as folder:
        outcome = simulate(123, SqliteLedgers(folder).fresh(), folder)
        print(outcome)
"""

from usage_billing.testing.history import Outcome, simulate
from usage_billing.testing.ledgers import PostgresLedgers, SqliteLedgers, workshop

__all__ = ["Outcome", "PostgresLedgers", "SqliteLedgers", "simulate", "workshop"]
