"""The user's mapping of accounts to names at the site: whatever type a warehouse has for a name, as in usage.sql."""

from dataclasses import dataclass, replace

import duckdb
import pytest

from stage_helpers import make_source
from usage_billing.accounts import Accounts
from usage_billing.errors import Misconfigured


@dataclass
class Duck:
    """A warehouse without tables."""

    placeholder: str = "?"
    conn_type: str = "duckdb"

    def get_conn(self):
        """Open it."""
        return duckdb.connect()


def mapped(query, account):
    """Return what a mapping says of an account."""
    return Accounts(replace(make_source(), accounts_sql=query), Duck).leading([account])[account]


@pytest.mark.parametrize(
    ("kind", "spelled"),
    [
        ("'x1'::VARCHAR", "x1"),
        ("'x1'::ENUM('x1', 'x2')", "x1"),
        ("42::BIGINT", "42"),
        ("42::DECIMAL(18, 0)", "42"),
        ("DATE '2026-10-05'", "2026-10-05"),
        ("true", "true"),
    ],
)
def test_whatever_has_one_spelling_is_a_name_on_either_side(kind, spelled):
    """The names that usage.sql may return for an account are those that accounts.sql may lead from, and to."""
    assert mapped(f"SELECT {kind} AS account, 'there' AS target", spelled) == ("there", "")
    assert mapped(f"SELECT 'here' AS account, {kind} AS target", "here") == (spelled, "")


@pytest.mark.parametrize("kind", ["1.5::DOUBLE", "1.50::DECIMAL(9, 2)", "TIMESTAMP '2026-10-05 12:00:00'"])
def test_what_has_several_spellings_is_refused_with_the_mend(kind):
    """A float, a scaled decimal, a time: each name may be written in more than one way. Both faults at once."""
    with pytest.raises(Misconfigured) as told:
        mapped(f"SELECT {kind} AS account, {kind} AS target", "x")
    assert "accounts.sql of" in str(told.value)
    assert str(told.value).count("has no one spelling as text; cast it to text in accounts.sql") == 2
