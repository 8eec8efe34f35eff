"""What a connection must say about a billing site, checked at once: the part that every site shares."""

import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from datetime import timedelta
from typing import ClassVar
from urllib.parse import urlsplit

from usage_billing.errors import Misconfigured


@dataclass(frozen=True)
class Timeouts:
    """How long to wait, in seconds, for a connection, for the reply to a read, and for the reply to a write."""

    connect: float = 10
    read: float = 60
    write: float = 60


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """How to reach one billing site; a subclass adds its credentials and what names the site.

    `base_url` is the site's address, where it is not the one that its name gives. `settle_after_seconds` is how long
    after a request the site may still apply it; shorter than the subclass's `shortest_settling` is for loopback only.
    `subject` names the settings in an error, which also tells the `known_faults` that their reader found.

    Raises:
        Misconfigured: with every fault at once.
    """

    shortest_settling: ClassVar[int]
    why_not_shorter: ClassVar[str]

    base_url: str = ""
    concurrency: int = 4
    settle_after_seconds: int = -1
    timeouts: Timeouts = field(default_factory=Timeouts)
    subject: InitVar[str] = "settings of a billing site"
    known_faults: InitVar[Sequence[str]] = ()

    def __post_init__(self, subject: str, known_faults: Sequence[str]) -> None:
        if self.settle_after_seconds == -1:
            self._set("settle_after_seconds", self.shortest_settling)
        self._set("base_url", str(self.base_url or "").rstrip("/"))
        self._normalise()
        if faults := [*known_faults, *self._faults(), *self._pace_faults()]:
            raise Misconfigured.all_at_once(subject, faults)
        self._set("base_url", self.base_url or self._own_address())
        self._set("concurrency", int(self.concurrency))
        self._set("settle_after_seconds", int(self.settle_after_seconds))

    @property
    def site(self) -> str:
        """The canonical name of the site; it does not depend on the address through which it is reached."""
        raise NotImplementedError

    @property
    def settle_after(self) -> timedelta:
        """How long after a request was sent the site may still apply it."""
        return timedelta(seconds=self.settle_after_seconds)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _normalise(self) -> None:
        """Bring the subclass's own fields into their one form."""

    def _own_address(self) -> str:
        """Return the address that the site's name gives."""
        raise NotImplementedError

    def _faults(self) -> Iterator[str]:
        """Yield what is wrong with the subclass's own fields."""
        raise NotImplementedError

    def _pace_faults(self) -> Iterator[str]:
        if whole_number(self.concurrency, 1) is None:
            yield f"concurrency: {self.concurrency!r} is no whole number of 1 or more"
        seconds = whole_number(self.settle_after_seconds, 0)
        if seconds is None:
            yield f"settle_after_seconds: {self.settle_after_seconds!r} is no whole number"
        elif seconds < self.shortest_settling and not is_loopback(self.base_url):
            yield (
                f"settle_after_seconds: {seconds} is shorter than {self.shortest_settling}: {self.why_not_shorter}; "
                "shorter is for loopback addresses only"
            )


def is_loopback(url: str) -> bool:
    """Say whether a URL leads to this very machine; a name other than ``localhost`` is not looked up."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def whole_number(value: object, least: int) -> int | None:
    """Return a setting as a whole number of at least `least`, also from its text; None if it is no such number."""
    text = str(value).strip()
    number = int(text) if text.isascii() and text.isdigit() else None
    return number if number is not None and number >= least else None


def url_faults(field: str, url: str) -> Iterator[str]:
    """Yield what is wrong with a site's address: plain http only to loopback, and nothing but scheme, host and path."""
    shown = f"{field}: {_without_credentials(url)!r}"
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known:
        yield f"{shown} is no web address; write it like https://billing.example.com"
        return
    if parts.scheme == "http" and not is_loopback(url):
        yield f"{shown} is plain http, which is for loopback addresses only; use https"
    if parts.username or parts.password:
        yield f"{shown} holds credentials; put them into the connection's own fields"
    if parts.query or parts.fragment:
        yield f"{shown} must end with the path: no ? and no #"


def _without_credentials(url: str) -> str:
    """Return a URL as it may be shown; it may be so broken that only its look tells where the password is."""
    return re.sub(r"//[^/]*@", "//***@", url).partition("?")[0]
