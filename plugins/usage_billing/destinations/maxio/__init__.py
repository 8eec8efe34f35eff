"""Maxio Advanced Billing (formerly Chargify): its client, and usage as metered components or as streamed events.

::

    metered.py | events.py    a destination each: usage totals one by one, or events of a stream by the thousand
    component.py              what both share: the component that is billed, and the subscription of each account
    bodies.py                 the bodies of calls that somebody makes by hand
    client.py                 how to reach a site, and its calls
    markup.py                 the older format of some of them, XML

Each of them imports only what stands under it. Others import from this package what they need of them.

Paths, limits and the meaning of replies follow Maxio's public API reference: "Subscription Components" (usages),
"Events-Based Billing", "Duplicate Prevention" and "API Access: Error Handling".
"""

from usage_billing.destinations.maxio.bodies import activation_body, event_body, event_bulks, usage_body
from usage_billing.destinations.maxio.client import MaxioSettings, MaxioSite
from usage_billing.destinations.maxio.events import MaxioEvents, MaxioEventsSettings
from usage_billing.destinations.maxio.metered import MaxioMetered, MaxioMeteredSettings

__all__ = [
    "MaxioEvents",
    "MaxioEventsSettings",
    "MaxioMetered",
    "MaxioMeteredSettings",
    "MaxioSettings",
    "MaxioSite",
    "activation_body",
    "event_body",
    "event_bulks",
    "usage_body",
]
