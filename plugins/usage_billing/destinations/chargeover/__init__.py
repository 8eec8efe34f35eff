"""ChargeOver: its client, and metered usage of a package's line item.

::

    usage.py        the destination: how usage is held, sent, read back and settled
    line_item.py    where an account's usage goes: the line item, and the open billing cycle of its package
    client.py       how to reach an account, and its calls
    signature.py    how a request is signed, where the account is reached so

Each of them imports only what stands under it. Others import from this package what they need of them.

Paths, limits and the meaning of replies follow ChargeOver's public REST documentation: "Storing Usage/Metered Data",
"Query for Usage/Metered Data", "Bulk Usage/Metered Data Upload", "Bulk/Batch Requests", "Querying for Subscriptions",
"Escape Syntax", "External Keys".
"""

from usage_billing.destinations.chargeover.client import ChargeOverSettings, ChargeOverSite
from usage_billing.destinations.chargeover.usage import ChargeOverUsage, ChargeOverUsageSettings

__all__ = [
    "ChargeOverSettings",
    "ChargeOverSite",
    "ChargeOverUsage",
    "ChargeOverUsageSettings",
]
