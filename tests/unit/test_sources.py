"""A billing source's folder: read whole, or refused with every fault at once."""

import re
from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest

from usage_billing.errors import Misconfigured
from usage_billing.records import EVER, Edition, Period
from usage_billing.sources import DestinationSettings, as_of, load_source, source_names

SOURCE = """\
name: calls
description: Calls per account and day.
warehouse: warehouse
schedule: "0 0 * * *"
timezone: America/New_York
period: day
bill_from: 2026-10-01
columns: {event_id: id, time: at, account: who, quantity: calls}
meter: {function: sum, decimals: 2}
dimensions: [region]
destination: {name: site, connection: site_acme, stream: calls}
"""
SQL = "SELECT id, at, who, calls, region FROM calls WHERE at >= :window_start AND at < :window_end\n"
SUITE = """\
name: calls
expectations:
  - type: expect_column_values_to_not_be_null
    kwargs: {column: account}
    meta: {reason: "nobody called"}
"""


class SiteSettings(DestinationSettings):
    name: Literal["site"]
    stream: str


@pytest.fixture
def load(tmp_path):
    """Write the three files, any of them replaced, and load the source."""

    def write_and_load(source=SOURCE, sql=SQL, suite=SUITE, arrivals=None):
        folder = tmp_path / "calls"
        folder.mkdir(exist_ok=True)
        files = {"source.yaml": source, "usage.sql": sql, "expectations.yaml": suite, "arrivals.sql": arrivals}
        for name, text in files.items():
            if text is not None:
                (folder / name).write_text(text, encoding="utf-8")
        return load_source(folder, {"site": SiteSettings}.get)

    return write_and_load


def faults(load, **files):
    """Return the faults that loading tells, line by line."""
    with pytest.raises(Misconfigured) as error:
        load(**files)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


def test_a_sound_source_is_read_whole(load):
    """The three files become one object, the destination's own keys included."""
    source = load()
    assert (source.name, source.settings.dimensions, source.destination.stream) == ("calls", ("region",), "calls")
    assert source.settings.timezone.key == "America/New_York"
    assert source.expectations[0]["meta"] == {"reason": "nobody called"}
    assert source.sql == SQL


def test_five_kinds_of_mistakes_give_five_errors(load):
    """A person mends a source in one round: each fault names its file and key."""
    broken = SOURCE.replace("day\n", "days\n").replace("New_York", "New_Yrok").replace("stream:", "steam:")
    found = faults(
        load, source=broken, sql="SELECT 1 WHERE a >= :window_start", suite="name: calls\nexpectations: [{kwargs: {}}]"
    )
    assert [line.split(": ")[0] for line in found] == [
        "source.yaml",
        "source.yaml",
        "source.yaml",
        "source.yaml",
        "usage.sql",
        "expectations.yaml",
    ]
    told = "\n".join(found)
    assert "timezone: 'America/New_Yrok' is no IANA time zone; did you mean 'America/New_York'?" in told
    assert "period: " in told
    assert "destination.steam: unknown key; did you mean 'stream'?" in told
    assert "destination.stream: is required; add it" in told
    assert "does not use :window_end" in told
    assert "expectations.0: must have a `type`" in told


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("decimals: 2", "decimals: 12", "meter.decimals"),
        ("function: sum", "function: count", "count gives whole numbers"),
        (", quantity: calls", "", "meter sum needs columns.quantity"),
        ("[region]", "[quantity]", "dimensions may not be called quantity"),
        ('"0 0 * * *"', "daily", "no cron expression"),
        ("name: site,", "name: sight,", "'sight' is no destination of this package"),
        ("2026-10-01", "soon", "bill_from"),
        ("name: calls", "name: other", "name"),
        ("period: day", "period: interval\nlookback: 2", "no earlier usage periods to read"),
    ],
)
def test_each_setting_tells_its_own_fault(load, old, new, told):
    """A value that cannot work is named together with its key."""
    (found,) = faults(load, source=SOURCE.replace(old, new, 1))
    assert told in found


def test_a_misspelt_bind_is_not_a_silent_other_window(load):
    """A bind that is not one of the two would read other rows than the run compares."""
    (found,) = faults(load, sql=SQL + "AND until < :window_stop -- and :nothing here")
    assert "unknown bind :window_stop" in found


def test_casts_and_escaped_colons_are_no_binds(load):
    """PostgreSQL's casts and a plain colon in a text may stand in the SQL."""
    assert load(sql=SQL + r"AND at::date = '10\:30'").sql.endswith("'10\\:30'")


def test_a_missing_file_is_told_with_the_rest(load):
    """A folder with one file of three gets the other two named."""
    found = faults(load, sql=None, suite=None)
    assert [line.split(":")[0] for line in found] == ["usage.sql", "expectations.yaml"]


def test_broken_yaml_is_told_as_such(load):
    """A tab or an unclosed bracket is a fault of the file, not a traceback."""
    (found,) = faults(load, source=SOURCE.replace("[region]", "[region"))
    assert found.startswith("source.yaml: is not YAML")


def test_nothing_before_bill_from_is_compared(load):
    """A run that spans the beginning compares only periods that start at or after it, in the billing zone."""
    source = load()
    assert source.bill_from == datetime(2026, 10, 1, 4, tzinfo=UTC)
    (period,) = source.periods(Period(datetime(2026, 9, 28, 4, tzinfo=UTC), datetime(2026, 10, 2, 4, tzinfo=UTC)))
    assert period.start == source.bill_from


def test_the_definition_holds_what_names_the_bill_and_nothing_else(load):
    """Another connection or more threads may be set at any time; another stream may not."""
    other = load(source=SOURCE.replace("site_acme", "site_acme_2, threads: 9, grace: 1d"))
    assert other.definition() == load().definition()
    assert load(source=SOURCE.replace("stream: calls", "stream: other")).definition() != load().definition()


def test_sources_are_found_by_their_yaml(load, tmp_path):
    """A folder without source.yaml is no source, and a missing folder is told with its setting."""
    load()
    (tmp_path / "notes").mkdir()
    assert source_names(tmp_path) == ["calls"]
    with pytest.raises(Misconfigured, match="SOURCES_FOLDER"):
        source_names(tmp_path / "nowhere")


@pytest.mark.parametrize(("period", "day"), [("week", "2026-10-01"), ("month", "2026-10-15")])
def test_a_beginning_inside_a_period_is_refused(load, period, day):
    """The rest of the week or month in which billing began would never be owed, and nobody would notice."""
    source = SOURCE.replace("period: day", f"period: {period}").replace("bill_from: 2026-10-01", f"bill_from: {day}")
    (fault,) = faults(load, source=source)
    assert f"take the first day of a {period}" in fault


BY_ARRIVAL = SOURCE.replace("quantity: calls}", "quantity: calls, arrival: seen}") + "incremental: arrival\n"
ARRIVALS = "SELECT at, seen FROM calls WHERE seen > :after\n"


def test_a_source_by_arrival_has_a_second_query(load):
    """The overlap is a span of time or a number of ids, and names nothing of what is billed."""
    source = load(source=BY_ARRIVAL, arrivals=ARRIVALS)
    assert source.arrivals_sql == ARRIVALS
    assert source.settings.arrival_overlap == timedelta(hours=1)
    assert load(source=BY_ARRIVAL + "arrival_overlap: 500\n", arrivals=ARRIVALS).settings.arrival_overlap == 500
    assert load(source=BY_ARRIVAL + "arrival_overlap: 5m\n", arrivals=ARRIVALS).definition() == source.definition()


def test_the_definition_of_a_source_does_not_hang_on_how_it_is_read(load):
    """A source may be changed from interval to arrival under its history."""
    before = load().definition()
    assert load(source=BY_ARRIVAL, arrivals=ARRIVALS).definition() == before


@pytest.mark.parametrize(
    ("source", "arrivals", "told"),
    [
        (
            BY_ARRIVAL,
            None,
            "arrivals.sql: is missing; it selects time and arrival of the rows that arrived after :after",
        ),
        (BY_ARRIVAL, "SELECT at, seen FROM calls", "arrivals.sql: does not use :after"),
        (BY_ARRIVAL, ARRIVALS + "AND at < :window_end", "arrivals.sql: unknown bind :window_end"),
        (SOURCE, ARRIVALS, "arrivals.sql: is there, but source.yaml does not say incremental: arrival"),
        (
            SOURCE + "incremental: arrival\n",
            ARRIVALS,
            "source.yaml: incremental is arrival, and columns.arrival is missing",
        ),
        (BY_ARRIVAL.replace("period: day", "period: interval"), ARRIVALS, "only a run's own interval is one"),
        (
            BY_ARRIVAL + "arrival_overlap: an hour\n",
            ARRIVALS,
            "source.yaml: arrival_overlap: 'an hour' is neither a span",
        ),
        (BY_ARRIVAL + "arrival_overlap: -1\n", ARRIVALS, "source.yaml: arrival_overlap: -1 is neither a span of time"),
        (BY_ARRIVAL + "rescan: 0\n", ARRIVALS, "source.yaml: rescan: "),
    ],
)
def test_faults_of_a_source_by_arrival_are_told(load, source, arrivals, told):
    """Half of it is never taken for the whole."""
    assert told in "\n".join(faults(load, source=source, arrivals=arrivals))


def test_a_source_by_interval_has_no_periods_of_its_own_to_rescan(load):
    """Only its runs know where one ends."""
    source = load(source=SOURCE.replace("period: day", "period: interval"))
    with pytest.raises(Misconfigured, match="cannot be rescanned"):
        source.recent_periods(datetime(2026, 10, 5, tzinfo=UTC))


def neighbour(tmp_path, name, text):
    """Write another source's folder beside."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "source.yaml").write_text(text, encoding="utf-8")


def test_a_renamed_source_keeps_the_name_that_the_ledger_knows(load):
    """Its folder's name is for people; identities, tokens and the ledger have the old one for ever."""
    source = load(SOURCE + "formerly: voice\n")
    assert (source.name, source.title) == ("voice", "calls (formerly voice)")
    assert source.definition()["name"] == "voice"


@pytest.mark.parametrize("written", ["formerly: voice", "formerly: 'voice'  # until 2026", 'formerly: "voice"'])
def test_two_folders_never_go_on_with_one_history(load, tmp_path, written):
    """Each would take back what the other bills, and neither would tell."""
    neighbour(tmp_path, "others", SOURCE.replace("name: calls", "name: others") + written + "\n")
    (fault,) = faults(load, source=SOURCE + "formerly: voice\n")
    assert "source 'others' says formerly: voice" in fault
    assert load(SOURCE).name == "calls"


def test_the_name_of_before_is_free_for_nobody(load, tmp_path):
    """Neither may its old folder stay, nor may a new source take the name, while its history goes on elsewhere."""
    neighbour(tmp_path, "voice", SOURCE)
    (fault,) = faults(load, source=SOURCE + "formerly: voice\n")
    assert "'voice' is still a source of its own" in fault
    neighbour(tmp_path, "spoken", "formerly: calls\n")
    (fault,) = faults(load)
    assert "source 'spoken' says formerly: calls" in fault


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("period: day", "period: month\neffective_from: 2026-11-05", "effective_from 2026-11-05 is inside a month"),
        ("period: day", "period: week\neffective_from: 2026-11-05", "take the first day of a week"),
        ("2026-10-01", "2026-10-05\neffective_from: 2026-10-05", ""),
        ("period: day", "period: month\neffective_from: 2026-09-01", ""),
    ],
)
def test_a_definition_begins_with_a_usage_period(load, old, new, told):
    """A day inside one would leave usage that neither definition bills whole."""
    text = SOURCE.replace(old, new, 1)
    if not told:
        assert load(source=text).since is None  # Nothing of before is owed.
        return
    (found,) = faults(load, source=text)
    assert told in found


def test_bill_from_is_judged_with_the_definition_that_it_belongs_to(load):
    """A month may begin long after a first day in mid-month, which the definition of then has to bear."""
    source = load(
        source=SOURCE.replace("period: day", "period: month\neffective_from: 2026-11-01").replace("10-01", "10-05")
    )
    assert source.since == datetime(2026, 11, 1, 4, tzinfo=UTC)


@pytest.mark.parametrize(
    ("schedule", "period", "day", "told"),
    [
        ("0 0 1 * *", "day", "2026-11-15", "take 2026-11-01 or 2026-12-01"),
        ("0 0 * * 1", "hour", "2026-11-05", "take 2026-11-02 or 2026-11-09"),
        ("0 0 * * 1", "interval", "2026-11-05", "take 2026-11-02 or 2026-11-09"),
        ("30 2 * * *", "hour", "2026-11-05", "let the schedule tick at midnight"),
        ("30 2 * * *", "day", "2026-11-05", ""),
        ("0 0 * * *", "month", "2026-11-01", ""),
        ("0 0 1 * *", "month", "2026-11-01", ""),
    ],
)
def test_a_run_of_the_schedule_never_lies_in_two_definitions(load, schedule, period, day, told):
    """The source's own run would stop at the change: the file says so before, and which days work."""
    text = SOURCE.replace("0 0 * * *", schedule).replace("period: day", f"period: {period}\neffective_from: {day}")
    if not told:
        assert load(source=text).since is not None
        return
    (found,) = faults(load, source=text)
    assert f"effective_from {day} is inside the run of 2026-11-" in found
    assert told in found


def edition(source, **changes):
    """Return how a source was until November, with these changes of its definition."""
    definition = source.definition() | changes
    settings = {"name": "site", "connection": "site_of_then", "stream": "old", "threads": 2}
    return Edition(7, Period(EVER.start, datetime(2026, 11, 1, tzinfo=UTC)), "site:then", definition, settings)


def test_an_edition_names_what_it_named_and_is_read_as_the_source_is_today(load):
    """Period, zone, meter and stream are of then; the query, the limits and the threads are of today."""
    today = load(source=SOURCE.replace("period: day", "period: month\neffective_from: 2026-11-01\nlookback: 2"))
    then = as_of(
        today,
        edition(today, period="day", timezone="UTC", dimensions=[], destination={"name": "site", "stream": "old"}),
        "site_of_then",
        {"site": SiteSettings}.get,
    )
    assert (then.settings.period, then.settings.timezone.key, then.settings.dimensions) == ("day", "UTC", ())
    assert (then.destination.stream, then.destination.connection, then.destination.threads) == (
        "old",
        "site_of_then",
        4,
    )
    assert (then.sql, then.settings.lookback, then.edition) == (today.sql, 2, 7)
    last = Period(datetime(2026, 10, 31, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC))
    assert then.periods(Period(last.start, datetime(2026, 11, 9, tzinfo=UTC)))[-1] == last


def test_settings_of_today_that_do_not_go_with_an_edition_are_told_as_its_faults(load):
    """A first day in mid-month goes with days; if it was a month then, the message says of when it speaks."""
    today = load(source=SOURCE.replace("10-01", "10-05"))
    with pytest.raises(Misconfigured, match=r"as it was defined until 2026-11-01 00:00 UTC(.|\n)*inside a month"):
        as_of(today, edition(today, period="month"), "site_of_then", {"site": SiteSettings}.get)


def test_an_edition_by_the_runs_own_interval_bears_a_source_that_goes_by_arrival(load):
    """What looks for other periods has nothing to find there, and is left out."""
    today = load(source=BY_ARRIVAL, arrivals=ARRIVALS)
    then = as_of(today, edition(today, period="interval"), "site_acme", {"site": SiteSettings}.get)
    assert (then.settings.incremental, then.settings.columns.arrival) == ("interval", None)


@pytest.mark.parametrize(
    ("schedule", "grace", "renewal", "since"),
    [
        ("0 0 * * *", "", "2026-11-01 04:00", "2026-10-31 04:00"),
        ("0 6 * * *", "", "2026-11-01 04:00", "2026-10-31 10:00"),
        ("0 0 * * *", "", "2026-11-02 05:00", "2026-11-01 04:00"),  # 25 hours: New York's clocks go back.
        ("0 6 * * 1-5", "", "2026-11-02 05:00", "2026-10-30 10:00"),
        ("0 0 1 * *", "", "2026-12-01 05:00", "2026-11-01 04:00"),
        ("0 0 * * *", ", grace: 36h", "2026-11-01 04:00", "2026-10-30 16:00"),
        ("0 0 * * *", ", grace: 0h", "2026-11-01 04:00", ""),
        ("0 0 * * *", "", "2026-11-01 04:02", "2026-10-31 04:00"),  # The run of midnight could send nothing any more.
        ("0 0 * * *", "", "2026-11-01 04:03", "2026-11-01 04:00"),
    ],
)
def test_what_ended_in_the_data_interval_of_a_renewal_passes_it(load, schedule, grace, renewal, since):
    """No run of the schedule could have billed it sooner; a source may say how long before it, or that nothing does."""
    text = SOURCE.replace("stream: calls", f"stream: calls{grace}")
    source = load(source=re.sub("schedule: .*", f'schedule: "{schedule}"', text))
    found = source.passes_from(datetime.fromisoformat(f"{renewal}+00:00"), timedelta(seconds=150))
    assert found == (datetime.fromisoformat(f"{since}+00:00") if since else None)


@pytest.mark.parametrize("grace", ["0m", "36h", "90m", "2d"])
def test_a_span_of_time_is_kept_as_it_is_read(load, grace):
    """The ledger keeps the section of the destination as JSON, from which an edition is read again."""
    destination = load(source=SOURCE.replace("stream: calls", f"stream: calls, grace: {grace}")).destination
    assert SiteSettings.model_validate(destination.model_dump(mode="json")) == destination


def test_what_is_wrong_about_the_meta_of_a_rule_is_told_at_once(load):
    """When the files are read, so that the DAG tells it and not the first run; each with its place and its mend."""
    wrong = (
        "  - {type: expect_column_to_exist, meta: {severity: warn, reason: no}}\n"
        "  - {type: expect_column_to_exist, meta: {reasons: a}}\n"
    )
    neither = "is neither quarantine (the rows that fail) nor stop (the run)"
    assert faults(load, suite=SUITE + wrong) == [
        "expectations.yaml: expectations.1: meta.reason: False is no text; write why in quotes, or leave it out",
        f"expectations.yaml: expectations.1: meta.severity: 'warn' {neither}",
        "expectations.yaml: expectations.2: meta: unknown key reasons; known keys: reason, severity",
    ]
