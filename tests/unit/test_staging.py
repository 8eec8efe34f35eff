"""Tables between stages: what was handed over is what is read, or nothing is."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from usage_billing.errors import Misconfigured
from usage_billing.records import Staged
from usage_billing.staging import Spill, Staging, write_durably


def part(*values):
    """Return a part with one column."""
    return pa.table({"n": pa.array(values, pa.int64())})


@pytest.fixture
def staging(tmp_path):
    """Stage below a temporary folder."""
    return Staging(tmp_path)


def files(folder: Path):
    """Return all files below a folder by name."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_reference_survives_an_xcom_and_finds_the_same_rows(staging):
    """A task hands over a few words of JSON, and the next one reads the same parts in the same order."""
    staged = Staged.from_json(staging.write("run", "events", [part(1, 2), part(3)]).to_json())
    assert staged.rows == 3
    assert [table["n"].to_pylist() for table in staging.read(staged)] == [[1, 2], [3]]


def test_a_task_that_runs_twice_writes_the_same_files(staging, tmp_path):
    """The second attempt of a task changes nothing that another task may be reading."""
    first, before = staging.write("run", "events", [part(1), part(2)]), files(tmp_path)
    assert staging.write("run", "events", [part(1), part(2)]) == first
    assert files(tmp_path) == before


def test_another_attempt_with_other_rows_leaves_the_first_alone(staging):
    """Two extractions into one folder keep apart, because their names are their content."""
    first = staging.write("run", "events", [part(1)])
    staging.write("run", "events", [part(2)])
    assert next(staging.read(first))["n"].to_pylist() == [1]


def test_a_table_without_rows_keeps_its_columns(staging):
    """An empty quarantine can still be read, and empty parts between others take no file."""
    empty = staging.write("run", "events", [part(), part()])
    assert [table.schema.names for table in staging.read(empty)] == [["n"]]
    assert len(list(staging.read(staging.write("run", "events", [part(), part(1), part()])))) == 1


def test_a_part_that_was_altered_stops_the_run(staging, tmp_path):
    """Nobody bills from a file that somebody edited."""
    staged = staging.write("run", "events", [part(1)])
    (path,) = tmp_path.rglob("*.parquet")
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(Misconfigured, match="altered after it was written; clear the run from extract on"):
        list(staging.read(staged))


def test_a_missing_part_says_what_to_do(staging, tmp_path):
    """A worker with another staging folder, or a cleaned one, gets the setting's name."""
    staged = staging.write("run", "events", [part(1)])
    for path in tmp_path.rglob("*.parquet"):
        path.unlink()
    with pytest.raises(Misconfigured, match="staging_path"):
        list(staging.read(staged))


def test_a_manifest_of_another_table_is_not_read(staging):
    """A reference whose digest does not fit is refused before any part of it is read."""
    staged = staging.write("run", "events", [part(1)])
    with pytest.raises(Misconfigured, match="not the table that was handed over"):
        list(staging.read(Staged(staged.manifest, staged.rows, "0" * 64)))


def test_spilled_rows_come_back_by_partition_in_the_order_they_came():
    """What was set aside in several steps is read partition by partition, and the disk is clean afterwards."""
    with Spill() as spill:
        spill.add(part(10, 21, 11), np.array([0, 2, 0]))
        spill.add(part(), np.array([], dtype=int))
        spill.add(part(22, 12), np.array([2, 0]))
        assert {number: spill.read(number)["n"].to_pylist() for number in spill.numbers()} == {
            0: [10, 11, 12],
            2: [21, 22],
        }
        folder = Path(spill._folder.name)
        assert folder.exists()
    assert not folder.exists()


def test_a_twin_never_rewrites_a_file_that_is_there_whole_but_mends_one_that_was_cut_short(staging, tmp_path):
    """A reader beside a twin sees whole files; what a crash left half written is written again."""
    first = staging.write("run", "events", [part(1), part(2)])
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    staging.write("run", "events", [part(1), part(2)])
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    cut = next(path for path in stamps if path.suffix == ".parquet")
    cut.write_bytes(cut.read_bytes()[:-5])
    staging.write("run", "events", [part(1), part(2)])
    assert sum(table.num_rows for table in staging.read(first)) == 2


def test_what_is_remembered_is_whole_and_leaves_no_draft(staging, tmp_path):
    """A second value takes the place of the first, and nothing else stays in the folder."""
    staging.remember("calls/ledger.json", {"fence": 1})
    staging.remember("calls/ledger.json", {"fence": 2})
    assert staging.recall("calls/ledger.json") == {"fence": 2}
    assert list(files(tmp_path)) == ["ledger.json"]


def test_what_is_written_durably_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    """The file and its folder are both synced: a power cut leaves the old content or the new, under its name."""
    synced = []
    sync = os.fsync

    def noted(number):
        synced.append((Path(f"/proc/self/fd/{number}").readlink(), (tmp_path / "a" / "b").exists()))
        sync(number)

    monkeypatch.setattr(os, "fsync", noted)
    write_durably(tmp_path, "a/b", b"content")
    (draft, named_before), (folder, named_after) = synced
    assert (draft.parent, named_before) == (tmp_path / "a", False)
    assert (folder, named_after) == (tmp_path / "a", True)
    assert (tmp_path / "a" / "b").read_bytes() == b"content"
