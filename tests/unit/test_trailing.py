"""What a reading has of each usage period, in parts of any size, and what is remembered of it."""

from collections import Counter
from datetime import timedelta
from decimal import Decimal

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_helpers import DAYS, START, Remembered, make_source, rows, stage
from usage_billing.ledger import Ledger
from usage_billing.ledger.leases import kept
from usage_billing.records import Measured, Reading
from usage_billing.staging import Staging
from usage_billing.trailing import Measures, keep_columns, remember, seen

HOURS = st.lists(st.one_of(st.none(), st.integers(-30, 100)), max_size=40)


def plain(staged, staging):
    """Return what was staged of a reading as a list of rows, quantities as decimals."""
    found = [row for part in staging.read(staged) for row in part.to_pylist()]
    return [
        (row["rows"], row["rows_quarantined"], None if row["quantity"] is None else Decimal(row["quantity"]))
        for row in found
    ]


@settings(max_examples=40, deadline=None)
@given(hours=HOURS, size=st.integers(1, 9), bad=st.sets(st.integers(0, 39)))
def test_any_rows_in_any_parts_are_counted_as_one_by_one(tmp_path_factory, hours, size, bad):
    """Rows, quarantined rows, exact sums and the latest time of each day equal those of a slow count."""
    staging, source = Staging(tmp_path_factory.mktemp("staging")), make_source()
    every = [(f"e{place}", hour, "x", Decimal(place) / 100) for place, hour in enumerate(hours)]
    kind = pa.decimal128(38, 2)
    parts = [rows(*every[at : at + size], quantity=kind) for at in range(0, len(every), size)]
    extracted = stage(staging, *(parts or [rows(quantity=kind)]))
    sound = [row for place, row in enumerate(every) if place not in bad and row[1] is not None and 0 <= row[1] < 72]
    cut = [rows(*sound[at : at + size], quantity=kind) for at in range(0, len(sound), size)]
    accepted = stage(staging, *(cut or [rows(quantity=kind)]), name="accepted")

    measures = Measures(extracted, source, DAYS, Remembered(), staging, "run")
    measures.add_accepted(accepted, staging)

    read = Counter(hour // 24 for hour in hours if hour is not None)
    good = Counter(row[1] // 24 for row in sound)
    sums = [sum((row[3] for row in sound if row[1] // 24 == day), Decimal(0)) for day in range(3)]
    assert plain(measures.staged(staging, "run"), staging) == [
        (read[day], read[day] - good[day], sums[day]) for day in range(3)
    ]
    latest = [max((hour for hour in hours if hour is not None and hour // 24 == day), default=None) for day in range(3)]
    frame = measures.by_period(9)
    assert frame["latest"].tolist() == [None if hour is None else START + timedelta(hours=hour) for hour in latest]
    assert frame["rows"].tolist() == [read[day] for day in range(3)]
    assert frame["quantity"].tolist() == sums


def test_a_meter_that_is_no_sum_adds_nothing_up(tmp_path):
    """Neither peaks nor counts are sums; without a quantity there is nothing to add."""
    staging = Staging(tmp_path)
    for function in ("max", "count"):
        source = make_source(meter={"function": function})
        extracted = stage(staging, rows(("a", 1, "x", 1)))
        accepted = stage(staging, rows(("a", 1, "x", 1)).drop_columns("quantity"), name="accepted")
        measures = Measures(extracted, source, DAYS, Remembered(), staging, "run")
        measures.add_accepted(accepted, staging)
        assert plain(measures.staged(staging, "run"), staging) == [(1, 0, None), (0, 0, None), (0, 0, None)]


def test_sums_beyond_sixty_four_bits_stay_exact(tmp_path):
    """Twenty times the largest quantity that a row may have."""
    staging, source = Staging(tmp_path), make_source()
    largest = Decimal("9999999999999999.99")
    parts = [rows(*((f"e{n}", 1, "x", largest) for n in range(10)), quantity=pa.decimal128(38, 2))] * 2
    extracted = stage(staging, *parts)
    measures = Measures(extracted, source, DAYS, Remembered(), staging, "run")
    measures.add_accepted(extracted, staging)
    assert plain(measures.staged(staging, "run"), staging)[0] == (20, 0, Decimal("199999999999999999.80"))


def test_a_reading_that_goes_on_is_remembered(tmp_path):
    """By the ledger, whole; a column without a value today keeps the type that it had."""
    staging, source = Staging(tmp_path), make_source()
    Ledger.create(url := f"sqlite:///{tmp_path}/ledger.sqlite")
    ledger = Ledger.connect(url)
    ledger.register("calls", "maxio:us:acme", {})
    for number, table in enumerate(
        [rows(("a", 1, "x", "1.5"), ("b", 30, "x", "2")), rows(("a", 1, "x", None))], start=1
    ):
        with kept(ledger, "extract:calls", timedelta(minutes=1)) as held:
            ledger.begin_extraction(held.lease, "calls", DAYS[0], DAYS[0])
        folder, columns = f"run{number}", {}
        extracted = stage(staging, *seen([table], columns))
        keep_columns(columns, staging, folder)
        measures = Measures(extracted, source, DAYS, ledger, staging, folder)
        if number == 1:
            as_billed = rows(("a", 1, "x", Decimal("1.50")), ("b", 30, "x", Decimal(2)), quantity=pa.decimal128(38, 2))
            measures.add_accepted(stage(staging, as_billed, name="accepted"), staging)
        remember("calls", Reading(number, 1), measures.staged(staging, folder), staging, folder, ledger)
        if number == 1:
            found = ledger.measured_before("calls", DAYS[2].start, 9)
            assert found == [Measured(DAYS[1], 1, 0, Decimal(2)), Measured(DAYS[0], 1, 0, Decimal("1.50"))]
    assert ledger.measured_before("calls", DAYS[2].start, 9) == [Measured(DAYS[0], 1, 0, None)]
    assert ledger.columns_read("calls")["quantity"] == "string"
    ledger.close()
