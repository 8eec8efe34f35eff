"""What became of each rule in one validation, as a page of Great Expectations' Data Docs.

The page is Great Expectations' own (its renderers, its sections), of all parts of an extraction together, with what
its suite does not know: the rows by reason, the package's own rules, and the rules that did not run. It stands alone:
it loads nothing from elsewhere and runs no script, so it can be read where there is no internet, and what a customer
wrote into a row stays text (Great Expectations puts unexpected values into its pages as they are).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from html import escape
from pathlib import Path
from typing import Any

SHOWN = 20
"""How many unexpected values of a rule are shown."""


@dataclass
class Verdict:
    """What became of one rule of the suite, over all parts of an extraction.

    ``kwargs`` are as declared; ``judged`` and ``unexpected`` count rows, where it is about rows; ``examples`` are
    unexpected values; ``observed`` is what a rule about the whole saw; ``fault`` says why it could not run.
    """

    label: str
    kind: str
    kwargs: Mapping[str, Any]
    reason: str
    stops: bool = False
    ran: bool = False
    success: bool = True
    judged: int | None = None
    unexpected: int = 0
    examples: list[str] = field(default_factory=list)
    observed: str = ""
    fault: str = ""

    def of_rows(self, judged: int, unexpected: int, examples: Iterable[object]) -> None:
        """Take in what the rule found in one part."""
        self.ran, self.judged = True, (self.judged or 0) + judged
        self.unexpected += unexpected
        self.success = not self.unexpected
        shown = zip(examples, range(SHOWN - len(self.examples)), strict=False)
        self.examples.extend("null" if value is None else str(value) for value, _ in shown)

    def of_the_whole(self, *, success: bool, observed: str) -> None:
        """Take in what the rule found in the whole reading."""
        self.ran, self.success, self.observed = True, success, observed


@dataclass(frozen=True)
class OwnVerdict:
    """What became of one of the package's own rules: `rows` failed it, None as long as none was judged."""

    label: str
    reason: str
    stops: bool
    rows: int | None = None


class ValidationResult:
    """What one validation found, filled while it goes on; whatever stops it, `page` shows what is known by then."""

    def __init__(self) -> None:
        self.verdicts: dict[int, Verdict] = {}
        """The rules of the suite, by their number in its file."""
        self.own: Sequence[OwnVerdict] = ()
        self.rows: dict[str, int] = {}
        """How many rows there are: ``read``, and once they are judged, ``accepted`` and ``quarantined``."""
        self.reasons: Mapping[str, int] = {}
        self.examples: Mapping[str, Sequence[str]] = {}
        self.stops: Sequence[str] = ()
        """Why the run was stopped, a line each."""

    def page(self, title: str, run: str, began: datetime) -> str:
        """Return the page as HTML; `title` names the billing source, `run` says which of its runs this is."""
        # Great Expectations takes seconds to import; where a suite was judged, it is there with the rules that we add.
        from great_expectations.render.renderer.page_renderer import ValidationResultsPageRenderer  # noqa: PLC0415
        from great_expectations.render.view import DefaultJinjaPageView  # noqa: PLC0415

        document = ValidationResultsPageRenderer(run_info_at_end=True).render(self._of_the_suite(title, run, began))
        document.sections[1:1] = self._beside_the_suite()
        view = DefaultJinjaPageView(custom_views_directory=str(Path(__file__).parent))
        page: str = view.render(document, template="standalone_page.j2")
        return page

    def _of_the_suite(self, title: str, run: str, began: datetime) -> Any:
        from great_expectations import __version__  # noqa: PLC0415
        from great_expectations.core.expectation_validation_result import (  # noqa: PLC0415
            ExpectationSuiteValidationResult,
        )
        from great_expectations.core.run_identifier import RunIdentifier  # noqa: PLC0415

        results = [_result(verdict) for verdict in self.verdicts.values() if verdict.ran or verdict.fault]
        good = sum(result.success for result in results)
        statistics = {
            "evaluated_expectations": len(results),
            "successful_expectations": good,
            "unsuccessful_expectations": len(results) - good,
            "success_percent": 100 * good / len(results) if results else None,
        }
        meta = {
            "great_expectations_version": __version__,
            "run_id": RunIdentifier(run_name=escape(run), run_time=began),
            "batch_spec": {"data_asset_name": "usage.sql"},
        }
        return ExpectationSuiteValidationResult(
            success=not self.stops and good == len(results) == len(self.verdicts),
            results=results,
            suite_name=escape(title),
            statistics=statistics,
            meta=meta,
        )

    def _beside_the_suite(self) -> list[Any]:
        from great_expectations.render import RenderedSectionContent  # noqa: PLC0415

        goes_on = "accepted" in self.rows and not self.stops
        header = "The run goes on with the accepted rows" if goes_on else "Rows"
        whole = [_table(header, ["", "Rows"], [[name, count] for name, count in self.rows.items()])]
        if self.stops:
            whole.append(_table("The run was stopped", ["Why"], [[line] for line in self.stops]))
        if self.reasons:
            ordered = sorted(self.reasons.items(), key=lambda entry: (-entry[1], entry[0]))
            lines = [[reason, count, ", ".join(self.examples.get(reason, ()))] for reason, count in ordered]
            whole.append(_table("Quarantined, by reason", ["Reason", "Rows", "Event ids, for example"], lines))
        own = [
            [
                rule.label,
                rule.reason or "the words of the billing site",
                "stops the run" if rule.stops else "is quarantined",
                "not judged" if rule.rows is None else rule.rows,
            ]
            for rule in self.own
        ]
        always_on = _table("Always on", ["Rule", "Reason", "A row that fails it", "Rows that failed it"], own)
        sections = [
            RenderedSectionContent(section_name="Rows", content_blocks=whole),
            RenderedSectionContent(section_name="Own rules", content_blocks=[always_on]),
        ]
        missing = [verdict for verdict in self.verdicts.values() if not (verdict.ran or verdict.fault)]
        if missing:
            lines = [[verdict.label, verdict.reason] for verdict in missing]
            block = _table("Did not run: something else stopped the run before", ["Rule", "Reason"], lines)
            sections.append(RenderedSectionContent(section_name="Did not run", content_blocks=[block]))
        return sections


def _result(verdict: Verdict) -> Any:
    """Return a verdict as Great Expectations' own result of a rule."""
    from great_expectations.core.expectation_validation_result import ExpectationValidationResult  # noqa: PLC0415
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration  # noqa: PLC0415

    said = f"{verdict.reason} ({verdict.label}{', stops the run' if verdict.stops else ''})"
    # A description is a template, and put into the page as it is.
    configuration = ExpectationConfiguration(
        type=verdict.kind,
        kwargs={name: _drawn(value) for name, value in verdict.kwargs.items()},
        description=escape(said).replace("$", "&#36;"),
    )
    raised = {"raised_exception": bool(verdict.fault), "exception_message": verdict.fault, "exception_traceback": ""}
    return ExpectationValidationResult(
        success=verdict.success and not verdict.fault,
        expectation_config=configuration,
        result={} if verdict.fault else _found(verdict),
        exception_info=raised,
    )


def _found(verdict: Verdict) -> dict[str, Any]:
    if verdict.judged is None:
        return {"observed_value": escape(verdict.observed) or "as expected"}
    found: dict[str, Any] = {
        "element_count": verdict.judged,
        "unexpected_count": verdict.unexpected,
        "unexpected_percent": 100 * verdict.unexpected / verdict.judged if verdict.judged else 0.0,
    }
    if verdict.examples:
        counted = Counter(escape(value) for value in verdict.examples)
        found["partial_unexpected_list"] = list(counted)
        found["partial_unexpected_counts"] = [{"value": value, "count": count} for value, count in counted.items()]
    return found


def _drawn(value: object) -> object:
    """Return an argument as Great Expectations takes it; what is shown is the reason, with all its digits."""
    return float(value) if isinstance(value, Decimal) else value


def _table(header: str, columns: Sequence[str], lines: Iterable[Sequence[object]]) -> Any:
    from great_expectations.render import RenderedTableContent  # noqa: PLC0415

    return RenderedTableContent(
        header=escape(header),
        header_row=[escape(name) for name in columns],
        table=[[f"{cell:,}" if isinstance(cell, int) else escape(str(cell)) for cell in line] for line in lines],
        styling={"classes": ["col-12"], "body": {"classes": ["table", "table-sm"]}},
    )
