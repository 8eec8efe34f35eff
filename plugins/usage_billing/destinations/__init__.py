"""The billing APIs that take usage. A new one is a module beside this one and a line in `DESTINATIONS`."""

from importlib import import_module

from usage_billing.destinations.base import Destination
from usage_billing.sources import DestinationSettings

DESTINATIONS: dict[str, str] = {
    "maxio_metered": "usage_billing.destinations.maxio.metered:MaxioMetered",
    "maxio_events": "usage_billing.destinations.maxio.events:MaxioEvents",
    "chargeover_usage": "usage_billing.destinations.chargeover.usage:ChargeOverUsage",
}


def destination_class(name: str) -> type[Destination] | None:
    """Return the destination called `name` in ``source.yaml``, or None."""
    if name not in DESTINATIONS:
        return None
    module, _, attribute = DESTINATIONS[name].partition(":")
    found: type[Destination] = getattr(import_module(module), attribute)
    return found


def destination_settings(name: str) -> type[DestinationSettings] | None:
    """Return the ``source.yaml`` keys of the destination called `name`, or None; for `sources.load_source`."""
    found = destination_class(name)
    return found.settings_model if found else None
