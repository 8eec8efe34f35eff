"""The validation result of one validation as a page: all parts together, and whatever is in a row stays text."""

from datetime import UTC, datetime
from decimal import Decimal
from html.parser import HTMLParser

import pytest

from stage_helpers import DAYS, Remembered, known, make_source, rows, stage
from usage_billing.data_docs import SHOWN, OwnVerdict, ValidationResult, Verdict
from usage_billing.errors import Misconfigured, NeedsDecision
from usage_billing.records import Target
from usage_billing.staging import Staging
from usage_billing.validate import ValidationStopped, validate

NOW = datetime(2026, 11, 3, tzinfo=UTC)
HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> $x ${y} $$z & \"'"


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Take down an element."""
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        """Take down a text."""
        self.texts.append(data)


def in_set(**kwargs):
    """Return the rule that a region is one of a few."""
    meta = {"reason": kwargs.pop("reason", "a region that we do not bill")}
    arguments = {"column": "region", "value_set": ["eu", "us"], **kwargs}
    return {"type": "expect_column_values_to_be_in_set", "kwargs": arguments, "meta": meta}


def not_negative():
    """Return the rule that a quantity is not negative; it is compared by its rank."""
    kwargs = {"column": "quantity", "min_value": 0}
    return {"type": "expect_column_values_to_be_between", "kwargs": kwargs, "meta": {"reason": "negative"}}


def row_count(least):
    """Return a rule about the reading as a whole."""
    return {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": least}}


@pytest.fixture
def judged(tmp_path):
    """Validate parts by a suite; return what was found, and what stopped it."""

    def run(*parts, suite=(), resolve=known, **settings):
        staging, result = Staging(tmp_path), ValidationResult()
        source = make_source(expectations=tuple(suite), **settings)
        extracted, stopped = stage(staging, *parts), None
        try:
            validate(extracted, source, DAYS, resolve, staging, "run", Remembered(), result=result)
        except (Misconfigured, NeedsDecision) as error:
            stopped = error
        return result, stopped

    return run


def some_rows():
    """Return six sound rows, and one for each of: a region, a quantity, an event that is there twice, all of it."""
    sound = [(f"e{number}", 1, "a", Decimal(number)) for number in range(6)]
    return [*sound, ("odd", 1, "a", Decimal(-5)), ("e1", 2, "a", Decimal(1)), ("worse", 1, "a", Decimal("-0.25"))]


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_a_rule_is_told_once_of_all_parts(judged, size):
    """However many parts there are, a rule has judged all rows, and its unexpected values are those of the rows."""
    every = some_rows()
    parts = [rows(*every[start : start + size]) for start in range(0, len(every), size)]
    result, stopped = judged(*parts, suite=[row_count(1), not_negative()])

    assert stopped is None
    assert result.rows == {"read": 9, "accepted": 6, "quarantined": 3}
    whole, negative = result.verdicts.values()
    assert (whole.ran, whole.success, whole.judged, whole.observed) == (True, True, None, "9")
    assert (negative.judged, negative.unexpected, negative.success) == (9, 2, False)
    assert sorted(negative.examples) == ["-0.25", "-5"]
    own = {verdict.label: verdict.rows for verdict in result.own}
    assert own["expect_event_id_to_be_unique"] == 1
    assert {own[label] for label in own if label != "expect_event_id_to_be_unique"} == {0}

    page = Page(result.page("calls", "a run, try 2", NOW))
    assert "Validations / calls / usage.sql / a run, try 2 /" in page.text
    assert "Status: Failed" in page.text
    assert "negative (expectations.1 (expect_column_values_to_be_between on quantity))" in page.text
    assert "2 unexpected values found. ≈22.22% of 9 total rows." in page.text
    assert "Unexpected Value Count -5 1 -0.25 1" in page.text
    assert "Quarantined, by reason Reason Rows Event ids, for example negative 2 odd, worse" in page.text
    assert "duplicate event id is quarantined 1" in page.text


def test_all_as_expected_is_told_as_that(judged):
    """A run whose every rule holds."""
    result, stopped = judged(rows(*some_rows()[:6]), suite=[row_count(1), not_negative()])
    assert stopped is None
    page = Page(result.page("calls", "a run", NOW))
    assert "Status: Succeeded" in page.text
    assert "Evaluated Expectations 2 Successful Expectations 2" in page.text
    assert "Quarantined, by reason" not in page.text
    assert "stopped" not in page.text
    assert "The run goes on with the accepted rows Rows read 6 accepted 6 quarantined 0" in page.text


def test_without_a_suite_the_own_rules_are_told(judged):
    """No expectations.yaml: the rules that are always on, and no verdict that nobody asked for."""
    result, _ = judged(rows(*some_rows()))
    page = Page(result.page("calls", "a run", NOW))
    assert "Evaluated Expectations 0" in page.text
    assert "expect_event_id_to_be_unique duplicate event id is quarantined 1" in page.text


def test_a_run_that_its_rows_stop_has_a_page_that_says_why(judged):
    """The limit of quarantined rows: all rules have run, and the page tells what stopped the run."""
    result, stopped = judged(rows(*some_rows()), suite=[not_negative()], quarantine={"max_share": 1, "max_rows": 2})
    assert isinstance(stopped, ValidationStopped)
    page = Page(result.page("calls", "a run", NOW))
    assert "The run was stopped Why 3 of 9 rows are quarantined, more than quarantine.max_rows = 2" in page.text


def test_an_account_that_nobody_knows_counts_for_its_rule(judged):
    """The site's words differ by account; its rule has all of them."""
    result, _ = judged(
        rows(("x", 1, "gone", 1), ("y", 1, "left", 1), ("z", 1, "a", 1)),
        resolve=known_but_two,
    )
    own = {verdict.label: verdict.rows for verdict in result.own}
    assert own["expect_account_to_be_known"] == 2
    assert sum(own.values()) == 2


def known_but_two(names):
    """Resolve accounts; the site says something of its own of each that it does not know."""
    return [Target(name, unknown="" if name == "a" else f"{name} is no customer") for name in names]


def test_rules_that_were_not_reached_never_count_as_passed(judged):
    """A reading that is not as expected: no row was judged, and the page says which rules did not run."""
    result, stopped = judged(rows(*some_rows()), suite=[row_count(100), not_negative()])
    assert isinstance(stopped, NeedsDecision)
    page = Page(result.page("calls", "a run", NOW))
    assert "Status: Failed" in page.text
    assert "Evaluated Expectations 1 Successful Expectations 0" in page.text
    assert "Did not run: something else stopped the run before Rule Reason expectations.1" in page.text
    assert "duplicate event id is quarantined not judged" in page.text
    assert "accepted" not in page.text


def test_a_rule_that_fails_without_naming_rows_is_told_as_failed(judged):
    """It ran, and stops the run: it is not among those that did not run."""
    rule = {"type": "expect_column_values_to_be_of_type", "kwargs": {"column": "account", "type_": "int64"}}
    result, stopped = judged(rows(*some_rows()), suite=[rule])
    assert isinstance(stopped, NeedsDecision)
    assert (result.verdicts[0].ran, result.verdicts[0].success) == (True, False)
    assert "Did not run" not in Page(result.page("calls", "a run", NOW)).text


def test_no_page_says_passed_of_a_rule_that_has_not_run():
    """One rule that held, and one that nobody ran."""
    result = ValidationResult()
    result.verdicts = {0: Verdict("a", "expect_table_row_count_to_equal", {"value": 1}, "one row")}
    assert "Status: Failed" in Page(result.page("calls", "a run", NOW)).text


def test_what_customers_write_into_rows_stays_text():
    """Values, reasons, faults and names with markup, and with what a template would replace."""
    result = ValidationResult()
    held = Verdict("0", "expect_column_values_to_be_in_set", {"column": "region", "value_set": [HOSTILE]}, HOSTILE)
    held.of_rows(10, 2, [HOSTILE, HOSTILE])
    whole = Verdict("1", "expect_table_row_count_to_equal", {"value": 1}, HOSTILE)
    whole.of_the_whole(success=False, observed=HOSTILE)
    broken = Verdict("2", "expect_column_values_to_not_be_null", {"column": "x"}, HOSTILE, fault=HOSTILE)
    left = Verdict("3", "expect_column_values_to_not_be_null", {"column": "x"}, HOSTILE)
    result.verdicts = dict(enumerate((held, whole, broken, left)))
    result.own = [OwnVerdict(HOSTILE, HOSTILE, stops=True)]
    result.rows = {"read": 10, "accepted": 8, "quarantined": 2}
    result.reasons, result.examples, result.stops = {HOSTILE: 2}, {HOSTILE: (HOSTILE,)}, [HOSTILE]

    text = result.page("calls", HOSTILE, NOW)
    page = Page(text)
    names = {name for name, _ in page.elements}
    assert not names & {"script", "img", "iframe", "object", "embed", "link", "form", "base", "svg"}
    attributes = {key for _, found in page.elements for key in found}
    assert not [key for key in attributes if key.startswith("on") or key == "src"]
    addresses = [found["href"] or "" for name, found in page.elements if name == "a" and "href" in found]
    assert addresses
    assert not [address for address in addresses if "//" in address or ":" in address.partition("#")[0]]
    # Every place has it as it was written: rule 0's reason and value, 1's reason and observation, 2's and 3's reason,
    # 2's fault, the own rule twice, by reason twice, what stopped; and the run in the title, its heading and below.
    assert page.text.count(" ".join(HOSTILE.split())) >= 14
    assert "&amp;lt;" not in text
    assert "http" not in text


def test_only_so_many_unexpected_values_are_shown():
    """A rule that a million rows fail keeps a few."""
    verdict = Verdict("0", "expect_column_values_to_be_in_set", {"column": "region", "value_set": ["eu"]}, "no")
    for _ in range(3):
        verdict.of_rows(1000, 15, [f"value {number}" for number in range(15)])
    assert len(verdict.examples) == SHOWN
    result = ValidationResult()
    result.verdicts = {0: verdict}
    page = Page(result.page("calls", "a run", NOW))
    assert "45 unexpected values found. 1.5% of 3000 total rows." in page.text
    # Not all of them are there, so none is counted.
    assert "Sampled Unexpected Values value 0" in page.text


def test_what_is_missing_is_called_null(judged):
    """Not what pandas makes of it."""
    rule = {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "account"}}
    result, _ = judged(rows(("x", 1, None, 1), ("y", 1, "a", 1)), suite=[rule])
    assert result.verdicts[0].examples == ["null"]


def test_numbers_are_shown_as_they_were_written(judged):
    """A bound with more digits than a float has."""
    bound = "0.12345678901234567891"
    rule = {"type": "expect_column_values_to_be_between", "kwargs": {"column": "quantity", "max_value": bound}}
    result, _ = judged(rows(*some_rows()[:6]), suite=[rule])
    page = Page(result.page("calls", "a run", NOW))
    assert f"quantity: values to be between (max_value {bound})" in page.text
