"""World files: what is shipped, and what a person is told who writes a wrong one."""

from pathlib import Path

import pytest

from usage_billing.sandbox import WorldError, load_worlds

SMALL = """
site: chargeover:tiny
now: 2026-10-20T12:00:00Z
zone: UTC
public_key: p
private_key: q
billing_period: {start: 2026-10-01, end: 2026-11-01}
items: [{item_id: 1, external_key: voip, name: V, units: minute, metered: true, amount: 0.05}]
customers: [{count: 3, customer_id: 5, external_key: "c{n}", company: "C {n}"}]
packages: [{count: 3, package_id: 7, external_key: "p{n:02d}", customer: "c{n}", lines: [{id: 20, item: voip}]}]
"""


def _write(folder: Path, text: str, name: str = "tiny.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_shipped_worlds_load_together() -> None:
    """The three shipped worlds agree about the clock and load as one sandbox."""
    worlds = load_worlds([Path(__file__).parents[3] / "include" / "sandbox" / "worlds"])
    assert [world.site for world in worlds] == ["maxio:us:acme", "maxio:us:orbit", "chargeover:telco"]


def test_counted_entries_unfold(tmp_path: Path) -> None:
    """`count` makes several entries with consecutive ids, numbered names and lines of their own."""
    world = load_worlds([_write(tmp_path, SMALL)])[0]
    assert [(p.package_id, p.external_key, p.customer, p.lines[0].id) for p in world.packages] == [
        (7, "p01", "c1", 20),
        (8, "p02", "c2", 21),
        (9, "p03", "c3", 22),
    ]


def test_price_keeps_its_spelling(tmp_path: Path) -> None:
    """A price that YAML reads as a float is the decimal that the author wrote."""
    world = load_worlds([_write(tmp_path, SMALL)])[0]
    assert str(world.items[0].amount) == "0.05"


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    """A file with several mistakes gives one line for each, with its key."""
    text = SMALL.replace("zone: UTC", "zone: Mars/Base").replace("public_key: p\n", "colour: red\n")
    with pytest.raises(WorldError) as caught:
        load_worlds([_write(tmp_path, text)])
    told = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 3
    assert "tiny.yaml: zone: no such time zone: Mars/Base" in told
    assert "public_key" in told
    assert "colour" in told


def test_dangling_names_and_switches_are_faults(tmp_path: Path) -> None:
    """Names that lead nowhere, ids given twice and unknown switches are found when the world is loaded."""
    text = (
        SMALL.replace("item: voip}]", "item: fax}, {id: 20, item: voip}]") + "switches: {mood: good, cycle_by: moon}\n"
    )
    with pytest.raises(WorldError) as caught:
        load_worlds([_write(tmp_path, text)])
    told = "\n".join(caught.value.faults)
    for part in ("no item fax", "line id 20 is given twice", "unknown switch 'mood'", "does not know 'moon'"):
        assert part in told


def test_worlds_must_agree_about_the_clock(tmp_path: Path) -> None:
    """One sandbox has one clock, so two worlds with different presents cannot share it."""
    other = SMALL.replace("tiny", "other").replace("12:00:00Z", "13:00:00Z")
    with pytest.raises(WorldError, match="one sandbox has one clock"):
        load_worlds([_write(tmp_path, SMALL), _write(tmp_path, other, "other.yaml")])


def test_yaml_spellings_of_switch_values(tmp_path: Path) -> None:
    """YAML's `no` and bare numbers mean the switch values that are spelled so."""
    path = Path(__file__).parents[3] / "include" / "sandbox" / "worlds" / "acme.yaml"
    switches = "switches: {token_spent_by_4xx: no, memo_limit: 255, unknown_stream: 404, events_delay_seconds: 0.5}\n"
    world = load_worlds([_write(tmp_path, path.read_text(encoding="utf-8") + switches, "acme.yaml")])[0]
    assert world.switches["token_spent_by_4xx"] is False
