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
    """One unsettled behaviour: its default and its choices (none: a number of seconds, 0 or more)."""

    default: str
    choices: tuple[str, ...]
    meaning: str

    def accepts(self, value: str) -> bool:
        """Say whether the value is one of the choices, or a number where the switch takes a number."""
        if self.choices:
            return value in self.choices
        try:
            number = Decimal(value)
        except InvalidOperation:
            return False
        return number.is_finite() and number >= 0

    def as_dict(self) -> dict[str, str | list[str]]:
        """Return the switch as JSON, for people to read."""
        return {"default": self.default, "choices": self.describe(), "meaning": self.meaning}

    def describe(self) -> list[str]:
        """Return the choices as people read them."""
        return list(self.choices) or ["<seconds>"]


MAXIO = {
    "access": Switch(
        "open",
        ("open", "account_canceled", "trial_ended", "data_clearing", "site_deleted"),
        "site-wide 422 that hits every request of the main API",
    ),
    "uniqueness_token": Switch("honoured", ("honoured", "ignored"), "the 60-minute token on POST and PUT"),
    "token_spent_by_4xx": Switch("yes", ("yes", "no"), "whether a refused request uses its token up"),
    "fraction_not_allowed": Switch("truncate", ("truncate", "refuse"), "5.5 on a whole-number component"),
    "bad_quantity": Switch("refuse", ("refuse", "zero"), "quantity missing, null, text or 0"),
    "quantity_type": Switch("as_documented", ("as_documented", "int", "string"), "quantity in replies"),
    "not_found_body": Switch("json", ("json", "empty", "html"), "body of a 404"),
    "throttle_reply": Switch("text", ("text", "json_retry_after"), "body and headers of a 429"),
    "usage_on_ended_subscription": Switch("refuse", ("refuse", "accept"), "accepted usage is never billed"),
    "usage_list_order": Switch("descending", ("descending", "ascending"), "order of ids in the usage list"),
    "negative_at_floor": Switch("as_sent", ("as_sent", "clipped"), "quantity stored when a deduction hits the floor"),
    "omitted_price_point": Switch("default", ("default", "locked_in"), "price point of a usage that names none"),
    "memo_limit": Switch("none", ("none", "255"), "longest memo; longer ones are refused"),
    "bulk_with_bad_event": Switch("refuse_all", ("refuse_all", "store_valid"), "a malformed event in a bulk request"),
    "long_event_token": Switch("refuse", ("refuse", "truncate"), "event token over 64 characters"),
    "unknown_stream": Switch("404", ("404", "accept"), "accepted events of an unknown stream are never billed"),
    "unknown_subscription_in_event": Switch("accept", ("accept", "refuse"), "accepted events are never billed"),
    "late_event": Switch("never_billed", ("never_billed", "next_period"), "timestamp in an invoiced period"),
    "events_delay_seconds": Switch("0", (), "how long new events stay invisible to reads"),
}

CHARGEOVER = {
    "duplicate_external_key": Switch("refuse", ("refuse", "accept", "overwrite"), "second usage with one key"),
    "negative_usage": Switch("accept", ("accept", "refuse"), "usage_value below 0"),
    "bulk_atomicity": Switch(
        "atomic", ("atomic", "stop_at_first_error", "skip_bad_silently"), "one bad record in a bulk upload"
    ),
    "late_usage": Switch("never_billed", ("never_billed", "next_invoice"), "usage for an invoiced cycle"),
    "cycle_by": Switch("from", ("from", "to"), "which end of a record assigns it to a cycle"),
    "throttle_retry_after": Switch("absent", ("absent", "present"), "Retry-After on a 429"),
    "limit_above_max": Switch("clamp", ("clamp", "refuse"), "limit over 500"),
    "times_out": Switch("naive", ("naive", "iso"), "times in replies, in the account's zone"),
    "usage_read_delay_seconds": Switch("0", (), "how long new usage stays invisible to reads"),
    "usage_on_bad_line": Switch("refuse", ("refuse", "accept"), "unknown, unmetered, cancelled or replaced line"),
    "usage_of_replaced_line": Switch("billed", ("billed", "dropped"), "usage stored before an upgrade"),
}


class SwitchBoard:
    """The switches of one site: known names with their present values."""

    def __init__(self, known: Mapping[str, Switch], initial: Mapping[str, object]) -> None:
        """Start from the defaults and the world's own settings; `UnknownSwitch` tells every fault."""
        self._known = known
        self._values = {name: switch.default for name, switch in known.items()}
        self.update(initial)

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def seconds(self, name: str) -> float:
        """Return a switch that holds a duration."""
        return float(self._values[name])

    def update(self, wanted: Mapping[str, object]) -> None:
        """Turn several switches at once, or none of them; `UnknownSwitch` tells every fault."""
        spelled = {name: spell(value) for name, value in wanted.items()}
        faults = [fault for name, value in spelled.items() if (fault := self._fault(name, value))]
        if faults:
            raise UnknownSwitch(faults, {name: switch.describe() for name, switch in self._known.items()})
        self._values.update(spelled)

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
