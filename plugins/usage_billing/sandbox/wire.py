"""Requests and replies as the sandbox's handlers see them, and the routes between.

Handlers are plain functions from a `Call` to a `Reply`; the transport, threads and faults stay outside, in `app`.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qsl, unquote

_NUMBER_MARK = re.compile(r'"\\u0000([-+0-9.E]+)\\u0000"')


class BadJson(ValueError):
    """The body is not JSON."""


@dataclass(frozen=True)
class Call:
    """One request: decoded path segments after the site's own prefix, query pairs in order, body as sent."""

    method: str
    segments: tuple[str, ...]
    query: tuple[tuple[str, str], ...] = ()
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def param(self, name: str) -> str | None:
        """Return the last value of a query parameter, or None."""
        values = [value for key, value in self.query if key == name]
        return values[-1] if values else None

    def csv(self, name: str) -> list[str]:
        """Return a list parameter, sent as `a,b` or as repeated `name[]`."""
        values = [value for key, value in self.query if key in (name, f"{name}[]")]
        return [part for value in values for part in value.split(",") if part]

    def json(self) -> Any:
        """Return the body with exact numbers; `BadJson` when it is none."""
        try:
            return json.loads(self.body, parse_float=Decimal, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise BadJson(str(error)) from error

    def basic_auth(self) -> tuple[str, str] | None:
        """Return user name and password of HTTP Basic, or None."""
        scheme, _, encoded = self.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        return user, password


@dataclass(frozen=True)
class Reply:
    """One answer, ready to be written."""

    status: int
    body: bytes = b""
    media_type: str = "application/json; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Route:
    """A documented endpoint: `pattern` is its path, with `{names}` for what the handler is given."""

    method: str
    pattern: str
    name: str
    handler: Callable[..., Reply]
    writing: bool = False

    def match(self, call: Call) -> dict[str, str] | None:
        """Return the path's parameters when the call is for this route."""
        parts = self.pattern.strip("/").split("/")
        if call.method != self.method or len(parts) != len(call.segments):
            return None
        params: dict[str, str] = {}
        for part, segment in zip(parts, call.segments, strict=True):
            if part.startswith("{"):
                params[part[1:-1]] = segment
            elif part != segment:
                return None
        return params


def find_route(routes: Sequence[Route], call: Call) -> tuple[Route, dict[str, str]] | None:
    """Return the first route that the call is for, with the path's parameters."""
    for route in routes:
        params = route.match(call)
        if params is not None:
            return route, params
    return None


def json_reply(value: object, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Reply:
    """Answer with JSON; a `Decimal` becomes a number literal with every digit it has."""
    return Reply(status, dump_json(value).encode(), headers=headers)


def text_reply(text: str, status: int, media_type: str = "text/plain; charset=utf-8") -> Reply:
    """Answer with text."""
    return Reply(status, text.encode(), media_type)


def dump_json(value: object) -> str:
    """Write JSON with exact numbers."""
    text = _ENCODER.encode(value)
    return _NUMBER_MARK.sub(r"\1", text) if "\\u0000" in text else text


def plain(number: Decimal) -> str:
    """Return a decimal as people write it: no exponent, no trailing zeros, no negative zero."""
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def split_target(raw_path: bytes, query_string: bytes) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return decoded path segments and query pairs; an encoded slash stays inside its segment."""
    path = raw_path.decode("latin-1").partition("?")[0]
    segments = tuple(unquote(part) for part in path.strip("/").split("/") if part)
    return segments, tuple(parse_qsl(query_string.decode("latin-1"), keep_blank_values=True))


def _mark_number(value: object) -> str:
    # The standard encoder would write a Decimal as a float and lose digits, so it is marked here and bared after.
    if isinstance(value, Decimal):
        return f"\x00{plain(value)}\x00"
    raise TypeError(f"{type(value).__name__} has no JSON form")


_ENCODER = json.JSONEncoder(default=_mark_number, separators=(",", ":"))


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")
