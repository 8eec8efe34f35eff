"""Usage totals: exact, one per identity, the same however the rows were cut."""

import json
from datetime import timedelta
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stage_helpers import DAYS, START, make_source, read, rows, stage
from usage_billing.aggregate import aggregate
from usage_billing.errors import Misconfigured
from usage_billing.records import Period
from usage_billing.staging import Staging
from usage_billing.uniqueness import identity

SITE = "maxio:us:acme"
MONEY = pa.decimal128(38, 2)
# Accounts x1 and x2 are two names of one subscription.
SUBSCRIPTIONS = {"x1": "7", "x2": "7", "y": "8", "z": "9"}
TARGETS = pa.table(
    {
        "account": list(SUBSCRIPTIONS),
        "subscription": list(SUBSCRIPTIONS.values()),
        "component": ["calls"] * 4,
        "price_point": ["", "", "", "gold"],
        "address": [json.dumps({"line": name}) for name in SUBSCRIPTIONS],
        "open_from": pa.array([START, None, None, None], pa.timestamp("us", "UTC")),
    }
)


@pytest.fixture
def staging(tmp_path):
    """Stage below a temporary folder."""
    return Staging(tmp_path)


@pytest.fixture
def total(staging):
    """Aggregate parts and return the totals as a table."""

    def run(*parts, periods=DAYS, **source):
        targets = stage(staging, TARGETS, name="targets")
        accepted = stage(staging, *parts, name="accepted")
        return read(staging, aggregate(accepted, targets, make_source(**source), SITE, periods, staging, "run"))

    return run


def money(*values, **columns):
    """Return rows whose quantities are money."""
    return rows(*((*row[:3], Decimal(row[3]), *row[4:]) for row in values), quantity=MONEY, **columns)


def quantities(table):
    """Return quantities by account and day of the month."""
    return {(row["account"], row["period_start"].day): row["quantity"] for row in table.to_pylist()}


def test_a_total_says_what_is_billed_to_whom_and_for_when(total):
    """One row carries the identity, the address, the period and the exact quantity."""
    (row,) = total(money(("a", 1, "x2", "0.10"), ("b", 23.9, "x1", "0.20"))).to_pylist()
    named = (SITE, "calls", "7", "calls", "", "{}", "2026-10-01T00:00:00Z", "2026-10-02T00:00:00Z")
    assert row == {
        "identity": identity(named),
        "account": "x1",
        "subscription": "7",
        "component": "calls",
        "price_point": "",
        "address": '{"line": "x1"}',
        "open_from": START,
        "dimensions": "{}",
        "period_start": START,
        "period_end": START + timedelta(days=1),
        "events": 2,
        "quantity": Decimal("0.30"),
    }


def test_midnight_belongs_to_the_new_day(total):
    """Usage on a period's edge is billed in the period that it begins."""
    midnight = START + timedelta(days=1)
    part = money(("a", midnight - timedelta(microseconds=1), "y", "1"), ("b", midnight, "y", "2"), ("c", 71, "y", "4"))
    assert quantities(total(part)) == {("y", 1): 1, ("y", 2): 2, ("y", 3): 4}


def test_dimensions_split_the_total_and_null_is_one_of_them(total):
    """A missing dimension is JSON null, apart from the text null; the order of the declaration does not matter."""
    part = money(
        ("a", 1, "y", "1", "eu", None),
        ("b", 1, "y", "2", "eu", "null"),
        ("c", 1, "y", "4", "eu", None),
        ("d", 1, "y", "8", None, None),
        dimensions=["tier", "region"],
    )
    found = {row["dimensions"]: row["quantity"] for row in total(part, dimensions=["tier", "region"]).to_pylist()}
    assert found == {
        '{"region":null,"tier":"eu"}': 5,
        '{"region":"null","tier":"eu"}': 2,
        '{"region":null,"tier":null}': 8,
    }
    assert total(part, dimensions=["region", "tier"])["identity"].equals(
        total(part, dimensions=["tier", "region"])["identity"]
    )


def test_sums_beyond_64_bits_are_exact(total):
    """Thirty of the largest quantities that validation accepts overflow a machine integer, not a total."""
    largest = "9999999999999999.99"
    part = money(*((f"e{number}", 1, "y", largest) for number in range(30)))
    for parts in ([part], [part.slice(0, 7), part.slice(7)]):
        assert quantities(total(*parts)) == {("y", 1): 30 * Decimal(largest)}


def test_corrections_in_the_data_are_subtracted(total):
    """A negative row lowers its total, and a total of zero is still a total."""
    assert quantities(total(money(("a", 1, "y", "1.10"), ("b", 2, "y", "-1.10")))) == {("y", 1): 0}


@pytest.mark.parametrize(("function", "expected"), [("count", 4), ("max", Decimal("5.00")), ("last", Decimal("-3.00"))])
def test_each_meter_measures_its_own(total, function, expected):
    """Count counts rows, maximum takes the largest, last takes the latest by time and then by event id."""
    part = money(("a", 1, "y", "5"), ("b", 9, "y", "2"), ("d", 9, "y", "-3"), ("c", 9, "y", "4"))
    part = part.drop_columns("quantity") if function == "count" else part
    meter = {"function": function, "decimals": 0 if function == "count" else 2}
    for parts in ([part], [part.slice(2), part.slice(0, 2)]):
        (row,) = total(*parts, meter=meter).to_pylist()
        assert (row["quantity"], row["events"]) == (expected, 4)


def test_distinct_values_are_counted_once_across_parts(total):
    """A user who called in two parts is one user."""
    users = rows(("a", 1, "y", "ann"), ("b", 2, "y", "bob"), ("c", 3, "y", "ann"), ("d", 25, "y", "ann"))
    table = total(users.slice(0, 2), users.slice(2), meter={"function": "unique"})
    assert quantities(table) == {("y", 1): 2, ("y", 2): 1}
    assert sorted(table["events"].to_pylist()) == [1, 3]


def test_nothing_accepted_is_no_total(total):
    """An empty period gives an empty table with all columns: what vanished is for the plan to see."""
    table = total(money())
    assert table.num_rows == 0
    assert table.schema.field("quantity").type == MONEY
    assert table.column_names[:2] == ["identity", "account"]


def test_a_row_outside_the_periods_stops_the_run(total):
    """Usage that no period takes is never lost in silence, nor is usage without a target."""
    gap = (DAYS[0], DAYS[2])
    with pytest.raises(Misconfigured, match="no target or no usage period"):
        total(money(("a", 30, "y", "1")), periods=gap)
    with pytest.raises(Misconfigured, match="no target or no usage period"):
        total(money(("a", 1, "nobody", "1")))


def test_parts_are_sorted_by_identity_throughout(staging):
    """Each part's rows lie between its first and last identity, and parts do not overlap."""
    hours = tuple(Period(START + timedelta(hours=hour), START + timedelta(hours=hour + 1)) for hour in range(72))
    part = money(*((f"e{hour}-{name}", hour, name, "1") for hour in range(72) for name in ("x1", "y", "z")))
    targets, accepted = (
        stage(staging, TARGETS, name="targets"),
        stage(staging, part.slice(0, 100), part.slice(100), name="accepted"),
    )
    found = {}
    for batch_rows in (10, 100, 1000):
        staged = aggregate(accepted, targets, make_source(batch_rows=batch_rows), SITE, hours, staging, "run")
        parts = list(staging.read(staged))
        assert [table.num_rows for table in parts] == [min(batch_rows, 216 - at) for at in range(0, 216, batch_rows)]
        names = [name for table in parts for name in table["identity"].to_pylist()]
        assert names == sorted(set(names))
        found[batch_rows] = pa.concat_tables(parts)
    assert found[10].equals(found[100])
    assert found[10].equals(found[1000])


EVENT = st.tuples(
    st.integers(0, 71),
    st.sampled_from(sorted(SUBSCRIPTIONS)),
    st.one_of(st.integers(-300, 300), st.integers(-(10**37), 10**37)),
    st.sampled_from(["eu", "us", "", None]),
)


def oracle(function, events):
    """Return the totals by (subscription, day, dimension) as a person would add them up."""
    groups = {}
    for name, (hour, account, cents, tier) in events:
        groups.setdefault((SUBSCRIPTIONS[account], hour // 24 + 1, tier), []).append((hour, name, cents, account))
    measure = {
        "sum": lambda group: Decimal(sum(cents for _, _, cents, _ in group)),
        "max": lambda group: Decimal(max(cents for _, _, cents, _ in group)),
        "last": lambda group: Decimal(max(group)[2]),
        "count": lambda group: Decimal(len(group)),
        "unique": lambda group: Decimal(len({cents for _, _, cents, _ in group})),
    }[function]
    return {key: (measure(group), len(group), min(account for *_, account in group)) for key, group in groups.items()}


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    events=st.lists(EVENT, max_size=30),
    function=st.sampled_from(["sum", "max", "last", "count", "unique"]),
    batch_rows=st.sampled_from([1, 2, 3, 7, 100]),
    part_rows=st.integers(1, 31),
    shuffled=st.randoms(use_true_random=False),
)
def test_totals_do_not_depend_on_parts_order_or_ranges(
    tmp_path_factory, events, function, batch_rows, part_rows, shuffled
):
    """Any rows in any order and parts, in memory or by ranges on disk, add up as a person would add them."""
    named = [(f"e{number:02}", event) for number, event in enumerate(events)]
    mixed = shuffled.sample(named, len(named))
    staging = Staging(tmp_path_factory.mktemp("staging"))
    kind = pa.string() if function == "unique" else pa.decimal128(38, 0)
    values = [
        (name, hour, account, str(cents) if function == "unique" else Decimal(cents), tier)
        for name, (hour, account, cents, tier) in mixed
    ]
    parts = [
        rows(*values[at : at + part_rows], quantity=kind, dimensions=["tier"])
        for at in range(0, max(len(values), 1), part_rows)
    ]
    source = make_source(batch_rows=batch_rows, meter={"function": function}, dimensions=["tier"])
    targets, accepted = stage(staging, TARGETS, name="targets"), stage(staging, *parts, name="accepted")
    table = read(staging, aggregate(accepted, targets, source, SITE, DAYS, staging, "run"))
    found = {
        (row["subscription"], row["period_start"].day, json.loads(row["dimensions"])["tier"]): (
            row["quantity"],
            row["events"],
            row["account"],
        )
        for row in table.to_pylist()
    }
    assert found == oracle(function, named)
    assert table["identity"].to_pylist() == sorted(table["identity"].to_pylist())


def places(account, *led, decision):
    """Return the places of an account that led to some subscriptions, a day each, and what was decided about them."""
    return [
        {
            "number": number,
            "account": account,
            "subscription": subscription,
            "component": "calls",
            "price_point": "",
            "address": json.dumps({"line": f"{account} of {subscription}"}),
            "since": START + timedelta(days=number) if number else None,
            "decision": decision if number else "",
        }
        for number, subscription in enumerate(led)
    ]


def moves(staging, *accounts):
    """Stage the places of accounts that moved."""
    kinds = {"number": pa.int64(), "since": pa.timestamp("us", "UTC")}
    listed = [row for account in accounts for row in account]
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in listed[0]])
    return stage(staging, pa.Table.from_pylist(listed, schema=schema), name="moves")


USED = [("a", 1, "y", "1.00"), ("b", 25, "y", "2.00"), ("c", 26, "x2", "4.00"), ("d", 49, "y", "8.00")]


@pytest.mark.parametrize(
    ("decision", "owed"),
    [
        ("", {("8", 1): "1.00", ("8", 2): "2.00", ("7", 2): "4.00", ("8", 3): "8.00"}),
        ("move", {("8", 1): "1.00", ("8", 2): "2.00", ("7", 2): "4.00", ("8", 3): "8.00"}),
        ("from_now", {("9", 1): "1.00", ("7", 2): "6.00", ("8", 3): "8.00"}),
    ],
)
@pytest.mark.parametrize("batch_rows", [1, 1000])
def test_what_was_used_before_a_move_counts_where_it_was_decided(staging, decision, owed, batch_rows):
    """Account y led to subscription 9, a day later to 7, and leads to 8 by now."""
    accepted, targets = stage(staging, money(*USED), name="accepted"), stage(staging, TARGETS, name="targets")
    source = make_source(batch_rows=batch_rows)
    led = moves(staging, places("y", "9", "7", "8", decision=decision), places("gone", "7", "8", decision=decision))
    table = read(staging, aggregate(accepted, targets, source, SITE, DAYS, staging, "run", led))
    found = {(row["subscription"], row["period_start"].day): row for row in table.to_pylist()}
    assert {key: str(row["quantity"]) for key, row in found.items()} == owed
    for (subscription, _), row in found.items():
        span = f"{row['period_start']:%Y-%m-%dT%H:%M:%SZ}", f"{row['period_end']:%Y-%m-%dT%H:%M:%SZ}"
        assert row["identity"] == identity((SITE, source.name, subscription, "calls", "", "{}", *span))
    # A total is reached as the account is that leads there today; where none does, as it was.
    shared = found["7", 2]
    assert (shared["account"], json.loads(shared["address"])) == ("x2", {"line": "x2"})
    if decision == "from_now":
        alone = found["9", 1]
        assert (alone["account"], json.loads(alone["address"])) == ("y", {"line": "y of 9"})
        assert alone["open_from"] is None


def test_only_the_periods_that_begin_before_a_move_count_where_the_account_led_then(staging):
    """A gap between the periods moves nothing, and neither do periods that all lie after it."""
    targets, led = stage(staging, TARGETS, name="targets"), moves(staging, places("y", "9", "8", decision="from_now"))
    for periods, owed in ((DAYS[::2], [("8", "8.00"), ("9", "1.00")]), (DAYS[2:], [("8", "8.00")])):
        rows_of = [USED[3]] if len(periods) == 1 else [USED[0], USED[3]]
        accepted = stage(staging, money(*rows_of), name="accepted")
        table = read(staging, aggregate(accepted, targets, make_source(), SITE, periods, staging, "run", led))
        assert sorted((row["subscription"], str(row["quantity"])) for row in table.to_pylist()) == owed
