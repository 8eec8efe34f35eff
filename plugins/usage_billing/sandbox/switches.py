"""The behaviours that no public document settles, each a named switch with its known values.

The defaults are the likeliest reading of the public documentation of the two billing APIs; a client is sound when it
passes with every value. Switches belong to a site, not to a request.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation


class UnknownSwitch(ValueError):
    """A switch or a value that does not exist; `known` lists those that do."""

    def __init__(self, faults: list[str], known: dict[str, list[str]]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults
        self.known = known


@dataclass(frozen=True)
class Switch:
    """One unsettled behaviour: its default and its choices.

    Without choices it takes seconds, 0 or more; or a span such as `0-10`, of which every record has its own share.
    """

    default: str
    choices: tuple[str, ...]
    meaning: str

    def accepts(self, value: str) -> bool:
        """Say whether the value is one of the choices, or a duration where the switch takes one."""
        if self.choices:
            return value in self.choices
        try:
            shortest, longest = _span(value)
        except (InvalidOperation, ValueError):
            return False
        return shortest.is_finite() and longest.is_finite() and 0 <= shortest <= longest

    def as_dict(self) -> dict[str, str | list[str]]:
        """Return the switch as JSON, for people to read."""
        return {"default": self.default, "choices": self.describe(), "meaning": self.meaning}

    def describe(self) -> list[str]:
        """Return the choices as people read them."""
        return list(self.choices) or ["<seconds>"]


# Requests in a second, where a site limits them.
RATES = ("2", "20", "200")

MAXIO = {
    "access": Switch(
        "open",
        ("open", "account_canceled", "trial_ended", "data_clearing", "site_deleted"),
        "site-wide 422 that hits every request of the main API",
    ),
    "uniqueness_token": Switch("honoured", ("honoured", "ignored"), "the 60-minute token on POST and PUT"),
    "token_scope": Switch("site", ("site", "path"), "where a token may be used once: on the site, or on each path"),
    "token_spent_by_4xx": Switch("yes", ("yes", "no"), "whether a refused request uses its token up"),
    "in_flight_twin": Switch(
        "refuse", ("refuse", "accept"), "second request with a token while the first one is not answered yet"
    ),
    "fraction_not_allowed": Switch("truncate", ("truncate", "refuse"), "5.5 on a whole-number component"),
    "bad_quantity": Switch("refuse", ("refuse", "zero"), "quantity missing, null, text or 0"),
    "quantity_type": Switch(
        "as_documented",
        ("as_documented", "text_in_lists", "int", "string"),
        "quantity in replies: text for fractional components, there in lists only, numbers, or text",
    ),
    "not_found_body": Switch("json", ("json", "empty", "html"), "body of a 404"),
    "throttle_reply": Switch("text", ("text", "json_retry_after"), "body and headers of a 429"),
    "usage_on_ended_subscription": Switch("refuse", ("refuse", "accept"), "accepted usage is never billed"),
    "assessment_delay_seconds": Switch("0", (), "how long after its end a period is assessed; in life up to 1200"),
    "usage_before_assessment": Switch(
        "closing_period", ("closing_period", "new_period"), "usage between a period's end and its assessment"
    ),
    "trial_usage": Switch("first_paid_renewal", ("first_paid_renewal", "dropped"), "usage recorded during a trial"),
    "usage_id": Switch(
        "at_commit",
        ("at_commit", "at_arrival"),
        "when a usage takes its id: as it is stored, or as its request arrives",
    ),
    "usage_list_order": Switch("descending", ("descending", "ascending"), "order of ids in the usage list"),
    "usage_list_created_at": Switch(
        "ignored", ("ignored", "day"), "the older filter of the usage list: not there any more, or for one day"
    ),
    "xml_empty_list": Switch(
        "named", ("named", "nil_classes"), "the root of a list without rows, in XML: of its kind, or of no class"
    ),
    "usage_list_of_events_component": Switch(
        "empty", ("empty", "404", "422"), "usage list of an events-based component"
    ),
    "negative_at_floor": Switch("as_sent", ("as_sent", "clipped"), "quantity stored when a deduction hits the floor"),
    "negative_on_prepaid": Switch(
        "overage_first", ("overage_first", "allocation_first"), "what a deduction from prepaid usage reduces first"
    ),
    "omitted_price_point": Switch("default", ("default", "locked_in"), "price point of a usage that names none"),
    "memo_limit": Switch("none", ("none", "255"), "longest memo, in characters"),
    "long_memo": Switch("refuse", ("refuse", "truncate"), "a memo over the limit"),
    "bulk_with_bad_event": Switch(
        "refuse_all",
        ("refuse_all", "store_valid", "store_valid_and_refuse"),
        "a malformed event in a bulk request: nothing is stored, or the sound ones, with 201 or with 422",
    ),
    "empty_bulk": Switch("201", ("201", "422"), "a bulk request without events"),
    "bulk_without_array": Switch("422", ("422", "400"), "a bulk request whose body is no array"),
    "long_event_token": Switch("refuse", ("refuse", "truncate"), "event token over 64 characters"),
    "unknown_stream": Switch("404", ("404", "accept"), "accepted events of an unknown stream are never billed"),
    "unknown_subscription_in_event": Switch("accept", ("accept", "refuse"), "accepted events are never billed"),
    "event_age_limit": Switch(
        "none",
        ("none", "refuse", "ignore"),
        "an event of more than 31 days ago: taken, refused, or taken and never billed",
    ),
    "late_event": Switch("never_billed", ("never_billed", "next_period"), "timestamp in an invoiced period"),
    "metric_below_zero": Switch("as_computed", ("as_computed", "zero"), "what a metric below 0 bills: itself, or 0"),
    "preview_shows_unused": Switch(
        "yes", ("yes", "no"), "whether the preview of a renewal has a line for an activated component without usage"
    ),
    "events_delay_seconds": Switch("0", (), "how long new events and site events stay invisible to reads"),
    "component_list_delay_seconds": Switch("0", (), "how far balances in the site-wide component list lag behind"),
    "eu_events_host": Switch(
        "shared", ("shared", "separate"), "whether sites of the region eu take events on the common host or their own"
    ),
    "events_size_limit": Switch("1_mb", ("1_mb", "64_kb", "none"), "largest body on the events host; above it, 413"),
    "events_rate_limit": Switch("none", ("none", *RATES), "requests the events host takes in a second; above it, 429"),
}

CHARGEOVER = {
    "duplicate_external_key": Switch("refuse", ("refuse", "accept", "overwrite"), "second usage with one key"),
    "negative_usage": Switch("accept", ("accept", "refuse"), "usage_value below 0"),
    "zero_usage": Switch("accept", ("accept", "refuse"), "usage_value 0"),
    "precise_usage": Switch(
        "exact", ("exact", "round", "refuse"), "usage_value with more than 4 decimals: kept, rounded to 4, refused"
    ),
    "usage_edit": Switch("refuse", ("refuse", "accept"), "PUT and DELETE on a usage record"),
    "bulk_atomicity": Switch(
        "atomic", ("atomic", "stop_at_first_error", "skip_bad_silently"), "one bad record in a bulk upload"
    ),
    "batch_atomicity": Switch(
        "each", ("each", "atomic"), "one bad record in a batch: answered for itself, or the whole batch is refused"
    ),
    "bulk_keys": Switch("both", ("both", "dotted", "nested"), "spelling of customer and item keys in a bulk upload"),
    "bulk_reply": Switch("last_id", ("last_id", "result_true"), "response of a bulk upload"),
    "late_usage": Switch("never_billed", ("never_billed", "next_invoice"), "usage for an invoiced cycle"),
    "cycle_by": Switch("from", ("from", "to"), "which end of a record assigns it to a cycle"),
    "missing_times": Switch("now", ("now", "today", "refuse"), "usage without from or to"),
    "offset_in_times": Switch("honoured", ("honoured", "ignored"), "from and to with an offset"),
    "times_out": Switch(
        "naive",
        ("naive", "iso", "iso_honolulu"),
        "times in replies: naive or with an offset, in the account's zone; or, with an offset, in Honolulu's",
    ),
    "undefined_types": Switch(
        "refuse", ("refuse", "as_add", "never_billed"), "the usage types pia, pas and dlt, which nothing explains"
    ),
    "usage_options": Switch("ignore", ("ignore", "refuse"), "usage with options, whose contents nothing explains"),
    "rate_limit": Switch("none", ("none", *RATES), "requests the account takes in a second; above it, 429"),
    "throttle_body": Switch("envelope", ("envelope", "text", "empty"), "body of a 429"),
    "throttle_retry_after": Switch("absent", ("absent", "present"), "Retry-After on a 429"),
    "limit_above_max": Switch("clamp", ("clamp", "refuse"), "limit over 500"),
    "usage_read_delay_seconds": Switch("0", (), "how long new usage stays invisible to reads"),
    "usage_on_bad_line": Switch("refuse", ("refuse", "accept"), "unknown, unmetered, cancelled or replaced line"),
    "usage_of_replaced_line": Switch("billed", ("billed", "dropped"), "usage stored before an upgrade"),
    "error_texts": Switch("telling", ("telling", "generic"), "text of duplicate-key, missing-field and 429 errors"),
    "details": Switch("empty_object", ("empty_object", "null", "absent"), "the envelope's details"),
    "signature_skew_seconds": Switch("300", ("300", "none"), "how far a signed request's time may be off"),
    "signature_nonce": Switch("once", ("once", "any"), "whether a signed request may bring a nonce again"),
    "external_key_length": Switch("255", ("255", "64", "none"), "longest external_key of a usage record"),
    "long_external_key": Switch("refuse", ("refuse", "truncate"), "an external_key over the limit"),
    "external_key_characters": Switch("any", ("any", "word"), "other than letters, digits, dot, dash, underscore: 400"),
    "external_key_case": Switch("sensitive", ("sensitive", "insensitive"), "whether k and K are one external_key"),
}


class SwitchBoard:
    """The switches of one site: known names with their present values."""

    def __init__(self, known: Mapping[str, Switch], initial: Mapping[str, object]) -> None:
        """Start from the defaults and the world's own settings; `UnknownSwitch` tells every fault."""
        self._known = known
        self._values = {name: switch.default for name, switch in known.items()}
        self.consulted: set[str] = set()
        """Which switches made a difference to what was done, or could have, since they were last turned."""
        self.update(initial)

    def __getitem__(self, name: str) -> str:
        self.consulted.add(name)
        return self._values[name]

    def seconds(self, name: str) -> tuple[float, float]:
        """Return a switch that holds a duration, as its shortest and its longest."""
        shortest, longest = _span(self[name])
        return float(shortest), float(longest)

    def update(self, wanted: Mapping[str, object]) -> None:
        """Turn several switches at once, or none of them; `UnknownSwitch` tells every fault."""
        spelled = {name: spell(value) for name, value in wanted.items()}
        faults = [fault for name, value in spelled.items() if (fault := self._fault(name, value))]
        if faults:
            raise UnknownSwitch(faults, {name: switch.describe() for name, switch in self._known.items()})
        self._values.update(spelled)
        self.consulted -= spelled.keys()

    def as_dict(self) -> dict[str, str]:
        """Return every switch with its present value."""
        return dict(self._values)

    def _fault(self, name: str, value: str) -> str | None:
        switch = self._known.get(name)
        if switch is None:
            return f"unknown switch {name!r}"
        if not switch.accepts(value):
            return f"switch {name!r} does not know {value!r}, only {', '.join(switch.describe())}"
        return None


def spell(value: object) -> str:
    """Return the value as a switch spells it; YAML and JSON turn `yes` and `404` into other types."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _span(text: str) -> tuple[Decimal, Decimal]:
    shortest, _, longest = text.partition("-")
    return Decimal(shortest), Decimal(longest or shortest)
