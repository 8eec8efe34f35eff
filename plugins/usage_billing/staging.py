"""Tables between stages: Parquet parts named by their content, and a manifest that lists them.

A part is never rewritten, so a task that runs twice, or elsewhere the second time, cannot change what another has read.
The folder may be any path object with ``/``, ``open``, ``mkdir`` and ``exists``: `pathlib.Path`, or Airflow's
``ObjectStoragePath`` for a bucket.
"""

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, Self
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from usage_billing.errors import Misconfigured
from usage_billing.records import Staged


class Folder(Protocol):
    """What staging needs of a path object."""

    def __truediv__(self, name: str, /) -> Any: ...


class Staging:
    """The staging area of one installation: writes tables part by part, and checks each digest when it reads them."""

    def __init__(self, root: Folder) -> None:
        self._root = root

    def write(self, folder: str, name: str, parts: Iterable[pa.Table]) -> Staged:
        """Write `parts` below `folder` and return a reference to the whole.

        Memory holds one part at a time. Empty parts are left out, unless there is no other to carry the schema.
        """
        listed: list[dict[str, Any]] = []
        schema: pa.Schema | None = None
        for part in parts:
            schema = part.schema
            if part.num_rows:
                listed.append(self._write_part(folder, name, part))
        if not listed and schema is not None:
            listed.append(self._write_part(folder, name, schema.empty_table()))
        digest = sha256("".join(part["digest"] for part in listed).encode()).hexdigest()
        rows = sum(part["rows"] for part in listed)
        manifest = f"{folder}/{name}-{digest[:16]}.json"
        self._write_bytes(manifest, json.dumps({"rows": rows, "digest": digest, "parts": listed}, indent=1).encode())
        return Staged(manifest=manifest, rows=rows, digest=digest)

    def read(self, staged: Staged, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the parts of a staged table in order, with all columns or only some.

        Raises:
            Misconfigured: the manifest or a part is missing, or is not what was written.
        """
        listed = json.loads(self._read_bytes(staged.manifest))
        if listed["digest"] != staged.digest:
            raise Misconfigured(
                f"staging: {staged.manifest} is not the table that was handed over; clear the run from extract on"
            )
        for part in listed["parts"]:
            content = self._read_bytes(part["path"])
            if sha256(content).hexdigest() != part["digest"]:
                raise Misconfigured(
                    f"staging: {part['path']} was altered after it was written; clear the run from extract on"
                )
            yield pq.read_table(pa.BufferReader(content), columns=columns)

    def recall(self, path: str) -> dict[str, Any] | None:
        """Return the values that `remember` wrote at `path`, or None if it never did.

        Raises:
            Misconfigured: something else is there.
        """
        content = self.kept(path)
        if content is None:
            return None
        try:
            values: dict[str, Any] = json.loads(content)
        except ValueError as broken:
            raise Misconfigured(f"staging: {path} below {self._root} is not what was written there") from broken
        return values

    def remember(self, path: str, values: Mapping[str, Any]) -> None:
        """Write a few JSON values at `path`, in place of those before; a reader never sees half of them.

        Writers of one path take turns by a lease: the file's own name keeps nobody out.
        """
        self.keep(path, json.dumps(dict(values), indent=1).encode())

    def keep(self, path: str, content: bytes) -> None:
        """Write a document at `path`, in place of the one before; a reader never sees half of it."""
        write_durably(self._root, path, content)

    def kept(self, path: str) -> bytes | None:
        """Return the document that `keep` wrote at `path`, None if there is none, or none any more."""
        return self._read_bytes(path) if (self._root / path).exists() else None

    def _write_part(self, folder: str, name: str, part: pa.Table) -> dict[str, Any]:
        buffer = io.BytesIO()
        pq.write_table(part, buffer, compression="zstd", compression_level=1)
        content = buffer.getvalue()
        digest = sha256(content).hexdigest()
        path = f"{folder}/{name}-{digest[:16]}.parquet"
        self._write_bytes(path, content)
        return {"path": path, "rows": part.num_rows, "digest": digest}

    def _write_bytes(self, path: str, content: bytes) -> None:
        folder, _, _ = path.rpartition("/")
        (self._root / folder).mkdir(parents=True, exist_ok=True)
        # The name is the content's digest. A file of that length is there whole: rewriting it would let a twin that
        # reads it meanwhile see half of it; what a crash cut short is written again.
        file_path = self._root / path
        if file_path.exists() and file_path.stat().st_size == len(content):
            return
        with file_path.open("wb") as file:
            file.write(content)

    def _read_bytes(self, path: str) -> bytes:
        try:
            with (self._root / path).open("rb") as file:
                content: bytes = file.read()
        except FileNotFoundError as missing:
            raise Misconfigured(
                f"staging: {path} is missing below {self._root}; every worker needs the same staging_path "
                "(section [usage_billing]); if it was cleaned, clear the run from extract on"
            ) from missing
        return content


def write_durably(root: Folder, path: str, content: bytes) -> None:
    """Write `content` at `path` below `root`, in place of what was there; a reader never sees half of it.

    It gets its name when it is whole, and is on the disk when this returns: what the ledger says of a file must hold
    after a power cut. A bucket confirms no write that it could lose.
    """
    folder, _, _ = path.rpartition("/")
    (root / folder).mkdir(parents=True, exist_ok=True)
    draft = root / f"{path}.{uuid4().hex}.new"
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        if _is_local(draft):
            os.fsync(file.fileno())
    draft.replace(root / path)
    if _is_local(draft):
        # The name stands in the folder, which is a file of its own.
        number = os.open(str(getattr(root / folder, "path", root / folder)), os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _is_local(path: Any) -> bool:
    return isinstance(path, Path) or getattr(path, "protocol", "") in {"file", "local"}


class Spill:
    """Rows set aside on this machine's disk in numbered partitions, so that each can be worked on by itself.

    A context manager: its files go when it ends. All rows of one spill have one schema.
    """

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="usage-billing-")
        self._numbers: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, table: pa.Table, partition: np.ndarray) -> None:
        """Set the rows of `table` aside, each in the partition whose number stands in `partition`."""
        order = np.argsort(partition, kind="stable")
        numbers, starts = np.unique(partition[order], return_index=True)
        ordered = table.take(pa.array(order))
        ends = [*starts, len(order)][1:]
        for number, start, end in zip(numbers.tolist(), starts, ends, strict=True):
            self._append(number, ordered.slice(start, end - start))

    def numbers(self) -> list[int]:
        """Return the numbers of the partitions that hold rows, ascending."""
        return sorted(self._numbers)

    def read(self, number: int) -> pa.Table:
        """Return a partition's rows in the order in which they were added."""
        tables = []
        with pa.OSFile(self._path(number)) as file:
            size = file.size()
            while file.tell() < size:
                tables.append(pa.ipc.open_stream(file).read_all())
        return pa.concat_tables(tables)

    def _append(self, number: int, table: pa.Table) -> None:
        # A stream per call and no file kept open: there may be more partitions than a process may open files.
        with Path(self._path(number)).open("ab") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        self._numbers.add(number)

    def _path(self, number: int) -> str:
        return str(Path(self._folder.name) / f"{number}.arrows")


def array_of(table: pa.Table, name: str) -> pa.Array:
    """Return a column as one array, without a copy where it is one already."""
    column = table.column(name)
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
