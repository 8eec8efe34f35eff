"""The command `usage-billing`: create the ledger, create the pools, check the sources, run the sandbox."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from usage_billing.errors import UsageBillingError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 1 with the error on standard error."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], str] = options.command
    try:
        said = command(options)
    except UsageBillingError as error:
        print(f"usage-billing: {error}", file=sys.stderr)
        return 1
    if said:
        print(said)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="usage-billing", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    ledger = commands.add_parser("ledger", help="the ledger that connection usage_ledger names")
    init = ledger.add_subparsers(required=True, metavar="ACTION").add_parser(
        "init", help="create it, or upgrade its schema"
    )
    init.set_defaults(command=_ledger_init)

    pools = commands.add_parser("pools", help="create the Airflow pool of every billing site")
    pools.set_defaults(command=_pools)

    check = commands.add_parser("check", help="read every billing source and list all faults")
    check.set_defaults(command=_check)

    sandbox = commands.add_parser("sandbox", help="run the sandbox billing sites until interrupted")
    sandbox.add_argument("--worlds", type=Path, required=True, help="folder of world files")
    sandbox.add_argument("--books", type=Path, help="file that keeps the sites' books; without it they are forgotten")
    sandbox.add_argument("--port", type=int, default=0, help="loopback port; 0 takes a free one")
    sandbox.add_argument("--port-file", type=Path, help="where to write the port once the sites answer")
    sandbox.set_defaults(command=_sandbox)
    return parser


def _ledger_init(_options: argparse.Namespace) -> str:
    from usage_billing.installation import ledger_url  # noqa: PLC0415 - Airflow takes a second to import.
    from usage_billing.ledger import Ledger  # noqa: PLC0415

    return (
        "the usage ledger is ready" if Ledger.create(ledger_url()) else "the usage ledger is there already, and current"
    )


def _pools(_options: argparse.Namespace) -> str:
    from airflow.models.pool import Pool  # noqa: PLC0415
    from airflow.utils.session import create_session  # noqa: PLC0415

    from usage_billing.installation import billing_sources, pools  # noqa: PLC0415

    wanted = pools(billing_sources())
    with create_session() as session:
        for pool in wanted:
            Pool.create_or_update_pool(pool.name, pool.slots, pool.description, include_deferred=False, session=session)
    return "\n".join(f"pool {pool.name}: {pool.slots} slots, {pool.description}" for pool in wanted)


def _check(_options: argparse.Namespace) -> str:
    from usage_billing.installation import billing_sources  # noqa: PLC0415

    return "\n".join(f"{source.name}: sound" for source in billing_sources())


def _sandbox(options: argparse.Namespace) -> str:
    from usage_billing.sandbox.server import serve  # noqa: PLC0415

    serve(options.worlds, options.books, options.port, port_file=options.port_file)
    return ""
