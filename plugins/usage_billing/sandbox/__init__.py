"""Sandbox billing sites: Maxio, its events host and ChargeOver on one loopback port, faithful to their documents.

They bill: a movable clock, billing periods, renewals, invoices. What no document settles is a named switch, and trouble
comes on request. `Sandbox` runs them in a `with` block, `create_app` gives the ASGI application, `server.serve` runs
them as a command.
"""

from .app import create_app
from .harness import BilledRow, Sandbox, SandboxRefused
from .world import WorldError, load_worlds

__all__ = ["BilledRow", "Sandbox", "SandboxRefused", "WorldError", "create_app", "load_worlds"]
