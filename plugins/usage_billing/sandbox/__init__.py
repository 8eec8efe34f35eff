"""Sandbox billing sites: Maxio, its events host and ChargeOver, faithful to their documents.

They bill: a movable clock, billing periods, renewals, invoices. What no document settles is a named switch, and trouble
comes on request. `Sandbox` serves them on a loopback port in a `with` block, `DirectSandbox` answers function calls
without a server, `create_app` gives the ASGI application, `server.serve` runs them as a command.
"""

from .app import create_app
from .desk import BilledRow, Desk, SandboxRefused
from .direct import ConnectionBroken, DirectReply, DirectSandbox, NoWholeReply, ReplyCutShort, ReplyTooLate
from .harness import Sandbox
from .world import WorldError, load_worlds

__all__ = [
    "BilledRow",
    "ConnectionBroken",
    "Desk",
    "DirectReply",
    "DirectSandbox",
    "NoWholeReply",
    "ReplyCutShort",
    "ReplyTooLate",
    "Sandbox",
    "SandboxRefused",
    "WorldError",
    "create_app",
    "load_worlds",
]
