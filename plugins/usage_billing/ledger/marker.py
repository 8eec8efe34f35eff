"""The mark that a ledger leaves in the staging area, so that a second ledger, or an older one, is noticed there.

The ledger alone remembers what was billed. One that was put back from a backup, or made anew beside the old one, has
forgotten deliveries and would bill them again. So whoever reads the warehouse or sends takes a lease first, which the
ledger keeps for ever, and writes that lease's name beside the staged rows: a ledger that does not know the name it
finds there is not the one that was used last.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

from usage_billing.errors import Misconfigured
from usage_billing.ledger import Lease, Ledger
from usage_billing.ledger.leases import Hold, kept
from usage_billing.staging import Staging

_LASTS, _WAIT = timedelta(seconds=30), timedelta(minutes=2)


@dataclass(frozen=True, slots=True)
class Mark:
    """Who used a source's staging last: the ledger, its largest extraction number, and a lease that it gave out."""

    ledger: str
    extraction: int
    fence: int
    holder: str


def read(staging: Staging, source: str) -> Mark | None:
    """Return the mark of a source, None before its first extraction.

    Raises:
        Misconfigured: the file is there, and is no mark.
    """
    values = staging.recall(_path(source))
    try:
        return None if values is None else Mark(**values)
    except TypeError as unknown:
        raise Misconfigured(f"staging: {_path(source)} is no mark of a ledger: {unknown}") from unknown


def confirm(ledger: Ledger, staging: Staging, source: str, number: int = 0, hold: Hold = kept) -> None:
    """Check that this is the ledger which the source's staging was used with last, and leave its mark anew.

    To be called under each new extraction `number`, and by `marked` around sending: a copy of the ledger that is older
    than the last of these calls is found out.

    Raises:
        Misconfigured: it is another ledger, or an older copy of that one; nothing was sent.
    """
    with hold(ledger, f"mark:{source}", _LASTS, _WAIT) as held:
        before = read(staging, source)
        if before is not None:
            _raise_if_forgotten(ledger, before, source)
        _leave(ledger, staging, source, number, held.lease)


@contextmanager
def marked(ledger: Ledger, staging: Staging, source: str, number: int = 0) -> Iterator[None]:
    """Send during the block: `confirm` before it and after it, however it ends.

    Raises:
        Misconfigured: as `confirm`.
    """
    confirm(ledger, staging, source, number)
    try:
        yield
    finally:
        confirm(ledger, staging, source, number)


def hand_over(ledger: Ledger, staging: Staging, source: str, number: int) -> None:
    """Leave this ledger's mark whatever was there: it has adopted what it did not know."""
    with kept(ledger, f"mark:{source}", _LASTS, _WAIT) as held:
        _leave(ledger, staging, source, number, held.lease)


def _leave(ledger: Ledger, staging: Staging, source: str, number: int, lease: Lease) -> None:
    before = read(staging, source)
    newest = max(number, before.extraction if before else 0)
    mark = Mark(ledger.ledger_id, newest, lease.fence, ledger.holder_of(lease.fence) or "")
    staging.remember(_path(source), asdict(mark))


def _raise_if_forgotten(ledger: Ledger, before: Mark, source: str) -> None:
    if before.ledger != ledger.ledger_id:
        raise Misconfigured(
            f"this staging area was used with ledger {before.ledger} for {source!r}, and connection usage_ledger leads "
            f"to ledger {ledger.ledger_id}, which would bill again what the other one delivered. {_mend(source)}"
        )
    if ledger.holder_of(before.fence) != before.holder:
        raise Misconfigured(
            f"the ledger is older than what was read with it for {source!r} (up to extraction {before.extraction}): it "
            f"was restored from a backup, and would bill again what it has forgotten. {_mend(source)}"
        )


def _mend(source: str) -> str:
    return (
        "Bring the right ledger back, or enter what the billing site holds into this one: "
        f"`usage-billing ledger adopt {source} --from <first day> --to <day after the last>`"
    )


def _path(source: str) -> str:
    return f"{source}/ledger.json"
