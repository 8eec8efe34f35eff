"""The bench at a small size: its figures are of the right kind, and what the sites billed is what was owed."""

import importlib
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "include" / "sandbox"
STAGES = ["extract", "validate", "aggregate", "plan", "deliver", "reconcile"]
ROWS = 5_000


@pytest.fixture(name="bench")
def _bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench")


@pytest.fixture(name="outcome")
def _outcome(bench: ModuleType, tmp_path: Path):
    """Thirty days of telephone calls, in batches so small that there are several."""
    return bench.Bench(tmp_path).run(bench.Case("voip_minutes", ROWS, 2_000))


def test_the_bench_bills_what_is_owed_and_tells_what_it_took(
    bench: ModuleType, outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stage took time, memory and rows, only the last two and validate asked the site, and the bill is right."""
    assert [cost.stage for cost in outcome.stages] == STAGES
    assert all(cost.wall_seconds > 0 and cost.cpu_seconds > 0 and cost.rows > 0 for cost in outcome.stages)
    # A process with pandas and Arrow in it has more than 50 MB; one that kept the unit wrong would have a thousandfold.
    assert all(50 < cost.peak_mib < 5_000 for cost in outcome.stages)
    assert 50 < outcome.start_mib <= outcome.road.peak_mib
    requests = {cost.stage: cost.requests for cost in outcome.stages}
    assert requests["extract"] == requests["aggregate"] == requests["plan"] == 0
    assert min(requests["validate"], requests["deliver"], requests["reconcile"]) > 0
    assert outcome.road.rows == pytest.approx(ROWS, rel=0.1)
    assert outcome.owed == outcome.billed > 0
    assert outcome.difference == 0
    assert bench.exit_code([outcome]) == 0
    table = bench.report(outcome)
    assert all(stage in table for stage in [*STAGES, "whole road"])
    assert table.endswith("difference 0")
    assert capsys.readouterr().err == ""


def test_a_bill_that_differs_fails_the_bench(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """One outcome with a difference among sound ones is told by name, and the exit code is 1."""
    cost = bench.Cost("extract", ROWS, 1.0, 1.0, 300.0, 0)
    sound = bench.Outcome(bench.Case("api_calls", ROWS, 100), 290.0, (cost,), Decimal(5), Decimal(5), Decimal(0))
    wrong = replace(sound, case=bench.Case("voip_minutes", ROWS, 100), billed=Decimal(6), difference=Decimal(1))
    assert bench.exit_code([sound, wrong]) == 1
    said = capsys.readouterr().err
    assert "voip_minutes" in said
    assert "api_calls" not in said


def test_batch_sizes_stand_side_by_side(bench: ModuleType) -> None:
    """The memory table has a column for each batch size and a line for each stage."""
    cost = bench.Cost("extract", ROWS, 1.0, 1.0, 300.0, 0)
    small = bench.Outcome(bench.Case("api_calls", ROWS, 1_000), 290.0, (cost,), Decimal(5), Decimal(5), Decimal(0))
    large = replace(small, case=bench.Case("api_calls", ROWS, 4_000), stages=(replace(cost, peak_mib=400.0),))
    head, *lines = bench.memory_report([small, large]).splitlines()[2:]
    assert head.split("  ")[-2:] == ["batches of 1,000", "batches of 4,000"]
    assert [line.split()[-2:] for line in lines] == [["290", "290"], ["300", "400"], ["300", "400"], ["10", "110"]]


def test_too_few_rows_are_turned_down(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Below the least number the planted bad rows would stop the run: the command says so at once."""
    with pytest.raises(SystemExit):
        bench.main(["--rows", "100"])
    assert "at least 5000" in capsys.readouterr().err


@pytest.mark.parametrize("accounts", [50, 6_000])
def test_ten_expectations_name_the_rows_that_rules_written_by_hand_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], accounts: int
) -> None:
    """Few accounts or many, in several parts: each rule names the same rows both ways, and the ratio is told."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench_suite = importlib.import_module("bench_suite")
    sizes = ["--rows", "6000", "--batch-rows", "2500", "--accounts", str(accounts), "--rounds", "1"]
    assert bench_suite.main(sizes) == 0
    *_, head, ours, theirs, ratio = capsys.readouterr().out.splitlines()
    assert head == "ten expectations, 6,000 rows"
    assert [line.split()[0] for line in (ours, theirs, ratio)] == ["suite", "by", "ratio"]
    assert float(ratio.split()[1]) > 0


def test_a_rule_that_names_other_rows_fails_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast suite that lets bad rows pass is worth nothing."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench_suite = importlib.import_module("bench_suite")
    rules = bench_suite.suite()
    rules[0] = {**rules[0], "kwargs": {"column": "plan"}}
    monkeypatch.setattr(bench_suite, "suite", lambda: rules)
    with pytest.raises(AssertionError, match="rule 0: the suite names"):
        bench_suite.compare(list(bench_suite.parts(3_000, 3_000, 50)), rounds=1)
