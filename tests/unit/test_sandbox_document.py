"""The page on the sandbox says what the sandbox does."""

import re
from pathlib import Path

import pytest

from usage_billing.sandbox.faults import KINDS, Fault
from usage_billing.sandbox.switches import CHARGEOVER, MAXIO, Switch
from usage_billing.testing.scenes import UNDRAWN

DOCUMENT = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text(encoding="utf-8")


def _rows(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading."""
    section = DOCUMENT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(("heading", "switches"), [("Maxio", MAXIO), ("ChargeOver", CHARGEOVER)])
def test_every_switch_is_in_the_table_as_it_is(heading: str, switches: dict[str, Switch]) -> None:
    """Each switch has one row, with its default and exactly its other choices, in the same order."""
    told = {
        name.strip("`"): (default.strip("`"), re.findall(r"`([^`]+)`", others))
        for _, _, name, default, others in _rows(heading)
    }
    known = {
        name: (switch.default, [choice for choice in switch.describe() if choice != switch.default])
        for name, switch in switches.items()
    }
    assert told == known
    assert len(_rows(heading)) == len(switches)


@pytest.mark.parametrize(("heading", "questions", "elsewhere"), [("Maxio", 24, set()), ("ChargeOver", 18, {14, 18})])
def test_every_question_has_a_switch_or_is_not_built_yet(heading: str, questions: int, elsewhere: set[int]) -> None:
    """No open question is passed over: it has a switch, or stands in the list of what is not there."""
    asked = {int(number) for number, *_ in _rows(heading) if number.isdecimal()}
    assert asked | elsewhere == set(range(1, questions + 1))
    missing = DOCUMENT.partition("## Not built yet")[2]
    assert all(f"{number}" in missing for number in elsewhere)


def test_every_fault_is_in_the_table_with_its_habit() -> None:
    """Each fault has a row, and the row says rightly whether the request is carried out at once."""
    told = {row[0].strip("`"): row[2] for row in _rows("Faults")}
    assert set(told) == set(KINDS)
    for kind, carried_out in told.items():
        if carried_out in ("yes", "no"):
            assert Fault("maxio:us:acme", kind).takes_effect == (carried_out == "yes"), kind


NEVER_MET = {
    "negative_on_prepaid": "nothing is sent to prepaid components",
    "component_list_delay_seconds": "no balance is taken from the site-wide list",
    "limit_above_max": "no more than the documented page is asked for",
    "undefined_types": "these types are not sent",
    "usage_options": "no options are sent",
}
"""Switches that neither a history nor a story of the client turns, and why nothing it does could meet them."""


def test_every_switch_is_turned_against_the_client() -> None:
    """The simulator draws it, or a story turns it; the few that nothing sent could meet are named with the reason."""
    tests = Path(__file__).parents[1]
    stories = [path for folder in ("contract", "integration") for path in sorted((tests / folder).glob("test_*.py"))]
    words = "\n".join(path.read_text(encoding="utf-8") for path in stories if "official_sdk" not in path.name)
    known = {**MAXIO, **CHARGEOVER}
    turned = {name for name in known if name not in UNDRAWN or re.search(rf"\b{name}\b", words)}
    assert known.keys() - turned <= NEVER_MET.keys()
