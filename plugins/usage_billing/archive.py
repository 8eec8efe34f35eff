"""The archive: every event that was sent as such, in the words in which it was sent, for as long as it may be compared.

The ledger keeps one row for a chunk of events; the events themselves are here, outside staging, which may be cleaned. A
chunk is a Parquet file named by its content and never rewritten. Which events of a usage period are still to be sent is
told by these files alone, long after the site has forgotten its tokens: a file that is gone would bill them again.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from usage_billing.errors import Misconfigured
from usage_billing.staging import Folder, write_durably

EVENTS = pa.schema(
    [
        *((name, pa.string()) for name in ("token", "event_id", "account", "subscription")),
        ("time", pa.timestamp("us", "UTC")),
        *((name, pa.string()) for name in ("quantity", "body")),
    ]
)
"""The columns of a chunk. `account` is what names the subscription in the event, `quantity` is plain decimal text (or
the counted value), and `body` the exact JSON text that is sent. Where that is dated in a later billing period than the
event's own, a column `original` has the text that it would be at its own time, and `time` is the later one."""


@dataclass(frozen=True, slots=True)
class Archived:
    """Where a chunk of events is kept, below the archive, with its digest and its number of events."""

    path: str
    digest: str
    rows: int

    @classmethod
    def at(cls, address: Mapping[str, Any]) -> Self:
        """Return what a delivery's address says of its chunk."""
        return cls(address["archive"], address["digest"], address["rows"])


class Archive:
    """The archive of one installation."""

    def __init__(self, root: Folder) -> None:
        self._root = root

    def aside(self, root: Folder) -> "Archive":
        """Return an archive that reads what is kept here and writes below `root` alone: for a plan that only looks."""
        return _Aside(root, self)

    def write(self, folder: str, events: pa.Table) -> Archived:
        """Keep `events` (columns of `EVENTS`) below `folder`, and return where they are; the same again writes nothing.

        What stands there in its place, cut short or altered, is mended by that.
        """
        buffer = io.BytesIO()
        moved = "original" in events.column_names and events.column("original").null_count < len(events)
        names = [*EVENTS.names, "original"] if moved else EVENTS.names
        # In one piece: how a table lies in memory must not show in the file, and so in its name.
        pq.write_table(events.select(names).combine_chunks(), buffer, compression="zstd", compression_level=1)
        content = buffer.getvalue()
        digest = sha256(content).hexdigest()
        path = f"{folder}/{digest}.parquet"
        if self._content(path) != content:
            write_durably(self._root, path, content)
        return Archived(path, digest, events.num_rows)

    def read(self, kept: Archived) -> pa.Table:
        """Return the events of a chunk.

        Raises:
            Misconfigured: the file is missing, or is not the one that was written.
        """
        content = self._content(kept.path)
        if content is None:
            raise Misconfigured(self._damaged(kept, "is missing"))
        if sha256(content).hexdigest() != kept.digest:
            raise Misconfigured(self._damaged(kept, "was altered after it was written"))
        return pq.read_table(pa.BufferReader(content))

    def _content(self, path: str) -> bytes | None:
        try:
            with (self._root / path).open("rb") as file:
                content: bytes = file.read()
        except FileNotFoundError:
            return None
        return content

    def _damaged(self, kept: Archived, what: str) -> str:
        return (
            f"archive: {kept.path} {what} below {self._root}; it tells which {kept.rows} events were sent, and without "
            "it they could be billed again, so nothing more is sent: restore it from a backup. Every worker needs the "
            "same archive_path (section [usage_billing])"
        )


class _Aside(Archive):
    """What a dry run would keep, in a place of its own, before what is kept already."""

    def __init__(self, root: Folder, kept: Archive) -> None:
        super().__init__(root)
        self._kept = kept

    def read(self, kept: Archived) -> pa.Table:
        return self._kept.read(kept) if self._content(kept.path) is None else super().read(kept)
