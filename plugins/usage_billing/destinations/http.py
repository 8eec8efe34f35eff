"""HTTP toward billing sites: one pooled session per thread, timeouts always, and one table of outcomes.

The only file that knows what a status code or a broken connection means in general; a destination adds what is special
to its site as further `Outcome` rows. What a failure means depends on the `Effect` of the call: a read that failed did
nothing, a write whose reply was lost may have been carried out.
"""

import email.utils
import json
import re
import ssl
import threading
from base64 import b64encode
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Any
from urllib.parse import quote

import requests
import urllib3
from requests.adapters import HTTPAdapter

from usage_billing import __version__
from usage_billing.destinations.settings import Timeouts, is_loopback, url_faults
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused, UsageBillingError

_WORDS_LENGTH = 300
_LONGEST_CHAIN = 30


class Effect(StrEnum):
    """What a call can do to the site's books, which decides what its failure means."""

    READ = "read"
    WRITE = "write"
    """Applied as a whole or not at all, by documentation or because each record is protected by a token."""
    BULK = "bulk"
    """Several records, and no document says whether a refused request was carried out in part."""


@dataclass(frozen=True)
class Outcome:
    """A row of the table: replies with one of `statuses`, to calls with one of `effects`, whose text holds `words`."""

    statuses: Collection[int]
    means: type[UsageBillingError]
    effects: Collection[Effect] = tuple(Effect)
    words: str = ""
    mend: str = ""

    def fits(self, status: int, effect: Effect, text: str) -> bool:
        """Say whether this row speaks of the reply."""
        return status in self.statuses and effect in self.effects and self.words.lower() in text.lower()


_CHANGING = (Effect.WRITE, Effect.BULK)

OUTCOMES: tuple[Outcome, ...] = (
    Outcome((401,), Misconfigured, mend="the site does not know these credentials: mend the connection"),
    Outcome((403,), Misconfigured, mend="these credentials may not do this: give the key the right to"),
    Outcome((407,), Misconfigured, mend="the proxy wants credentials of its own: mend HTTPS_PROXY"),
    Outcome(
        range(300, 400), Misconfigured, mend="redirects are not followed with credentials: set the site's own address"
    ),
    Outcome((429,), NotApplied, (Effect.READ, Effect.WRITE)),
    Outcome((408, 425), NotApplied, (Effect.READ,)),
    Outcome((408, 409, 425), InDoubt, _CHANGING),
    Outcome(range(400, 500), Misconfigured, (Effect.READ,), mend="the site does not take this question as it stands"),
    Outcome(range(400, 500), Refused, (Effect.WRITE,)),
    Outcome(range(400, 500), InDoubt, (Effect.BULK,)),
    Outcome(range(500, 600), NotApplied, (Effect.READ,)),
)
"""What a reply other than success means, first match wins. What no row speaks of may have been applied."""

_NO_HANDSHAKE = ("WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL", "UNKNOWN_PROTOCOL", "HTTP_REQUEST")
"""OpenSSL's reasons that only a handshake can give, so no request had left."""


class HttpClient:
    """Sends one site's requests and turns every failure into one of our errors. Safe to share between threads.

    Example::

        client = HttpClient("maxio:us:acme", "https://acme.chargify.com", ("key", "x"))
        found = client.read("read the site", "/site.json")
    """

    def __init__(
        self,
        site: str,
        base_url: str,
        credentials: tuple[str, str],
        *,
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - frozen.
        outcomes: Collection[Outcome] = (),
        concurrency: int = 4,
    ) -> None:
        """Prepare; nothing is opened before the first request. `outcomes` are asked before the general ones.

        Raises:
            Misconfigured: the address is none to which credentials may go.
        """
        if faults := list(url_faults("address", base_url)):
            raise Misconfigured.all_at_once(site, faults)
        self.site = site
        self._base_url = base_url
        self._credentials = credentials
        self._timeouts = timeouts
        self._outcomes = (*outcomes, *OUTCOMES)
        self._threads = threading.local()
        # An Airflow pool keeps the site's limit across machines; this keeps one process from exceeding it by itself.
        self._slots = threading.BoundedSemaphore(concurrency)
        pair = b64encode(":".join(credentials).encode()).decode()
        # One character, such as Maxio's password "x", is no secret and stands in many a word.
        self._secrets = tuple(secret for secret in (*credentials, pair) if len(secret) > 1)

    def read(self, call: str, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON of a read, or None if the site definitely has no such thing (404).

        Raises:
            Misconfigured: the site or our question is not what it has to be.
            NotApplied: the site could not be asked, or its answer cannot be read.
        """
        reply = self._send("GET", call, path, Effect.READ, params=params)
        if reply.status_code == requests.codes.not_found:
            return None
        self._raise_for_failure(reply, call, Effect.READ)
        found = self._json(reply, call, Effect.READ)
        if found is None:
            # A null is not the definite word that a 404 is.
            raise NotApplied(self._text(call, reply.status_code, "answered with null"))
        return found

    def write(self, call: str, path: str, body: str, effect: Effect = Effect.WRITE) -> Any:
        """Post a JSON text and return the reply's JSON.

        Raises:
            Misconfigured, NotApplied, Refused, InDoubt: as `OUTCOMES` says; a reply that cannot be read is `InDoubt`.
        """
        reply = self._send("POST", call, path, effect, body=body)
        self._raise_for_failure(reply, call, effect)
        return self._json(reply, call, effect)

    def write_blind(self, call: str, path: str, body: str) -> None:
        """Post a JSON text where success has no documented body; errors as for `write`.

        A page of HTML is still no success: it comes from something between us and the site.
        """
        reply = self._send("POST", call, path, Effect.WRITE, body=body)
        self._raise_for_failure(reply, call, Effect.WRITE)
        if _is_html(reply):
            raise InDoubt(self._text(call, reply.status_code, "answered with a page of HTML"))

    def _send(
        self,
        method: str,
        call: str,
        path: str,
        effect: Effect,
        *,
        params: Mapping[str, Any] | None = None,
        body: str | None = None,
    ) -> requests.Response:
        wait = self._timeouts.read if effect is Effect.READ else self._timeouts.write
        try:
            with self._slots:
                return self._session().request(
                    method,
                    self._base_url + path,
                    params=params,
                    data=None if body is None else body.encode(),
                    headers=None if body is None else {"Content-Type": "application/json"},
                    timeout=(self._timeouts.connect, wait),
                    allow_redirects=False,
                )
        except requests.RequestException as failure:
            # Without the chain: urllib3's texts hold the whole address, and a proxy's may hold its password.
            raise self._failed(failure, call, effect) from None

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._threads, "session", None)
        if session is None:
            session = requests.Session()
            session.auth = self._credentials
            session.headers.update({"Accept": "application/json", "User-Agent": f"usage-billing/{__version__}"})
            # Companies set their proxy and their certificate authority in the environment, so it is trusted, except
            # toward this very machine, where a proxy could only be in the way. The explicit credentials above keep
            # .netrc out, and no variable of the environment can turn verification off.
            session.trust_env = not is_loopback(self._base_url)
            adapter = HTTPAdapter(max_retries=0, pool_connections=2, pool_maxsize=1)
            session.mount("https://", adapter)
            session.mount("http://", adapter)
            self._threads.session = session
        return session

    def _failed(self, failure: requests.RequestException, call: str, effect: Effect) -> UsageBillingError:
        """Return what a request without a reply means: did it leave?"""
        where = f"{self.site}: {call}"
        chain = list(_chain(failure))
        if any(isinstance(link, ssl.SSLCertVerificationError) for link in chain):
            return Misconfigured(f"{where}: the site's TLS certificate cannot be verified; nothing was sent")
        if any(isinstance(link, ssl.SSLError) and link.reason in _NO_HANDSHAKE for link in chain):
            return Misconfigured(f"{where}: there is no TLS at the site's address; nothing was sent")
        if isinstance(failure, ValueError):
            # InvalidURL, MissingSchema and their kin are found before anything is opened.
            return Misconfigured(f"{where}: the address cannot be used ({type(failure).__name__})")
        if _never_left(failure, chain):
            return NotApplied(f"{where}: the site cannot be reached ({_why(chain)}); nothing was sent")
        what = "no reply in time" if isinstance(failure, requests.Timeout) else "the connection broke off"
        if effect is Effect.READ:
            return NotApplied(f"{where}: {what} ({_why(chain)})")
        return InDoubt(f"{where}: {what} ({_why(chain)}); the request may have been carried out")

    def _raise_for_failure(self, reply: requests.Response, call: str, effect: Effect) -> None:
        status = reply.status_code
        if requests.codes.ok <= status < requests.codes.multiple_choices:
            return
        words = self._words(reply)
        row = next((row for row in self._outcomes if row.fits(status, effect, words)), None)
        text = self._text(call, status, words, row.mend if row else "")
        if row is None or row.means is InDoubt:
            raise InDoubt(text)
        if row.means is NotApplied:
            throttled = status == requests.codes.too_many_requests
            raise NotApplied(text, retry_after_seconds=_retry_after(reply), throttled=throttled)
        raise row.means(text)

    def _json(self, reply: requests.Response, call: str, effect: Effect) -> Any:
        try:
            return json.loads(reply.content, parse_float=Decimal)
        except (ValueError, InvalidOperation):
            what = "answered with a page of HTML" if _is_html(reply) else "answered with what is no JSON"
            means = NotApplied if effect is Effect.READ else InDoubt
            raise means(self._text(call, reply.status_code, what)) from None

    def _text(self, call: str, status: int, words: str, mend: str = "") -> str:
        said = f"{self.site}: {call}: HTTP {status}" + (f": {words}" if words else "")
        return f"{said}; {mend}" if mend else said

    def _words(self, reply: requests.Response) -> str:
        """Return the site's own words without our credentials, should it echo them."""
        text = "; ".join(_sayings(reply))
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())[:_WORDS_LENGTH]


def segment(value: object) -> str:
    """Return a value as one segment of a path, with everything encoded that could leave it."""
    return quote(str(value), safe="")


def _chain(failure: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what it was made of: requests and urllib3 nest causes as arguments and as `reason`."""
    waiting: list[object] = [failure]
    seen: list[BaseException] = []
    while waiting and len(seen) < _LONGEST_CHAIN:
        link = waiting.pop(0)
        if isinstance(link, BaseException) and not any(link is other for other in seen):
            seen.append(link)
            yield link
            waiting += [*link.args, getattr(link, "reason", None), link.__cause__, link.__context__]


def _never_left(failure: requests.RequestException, chain: list[BaseException]) -> bool:
    """Say whether not one byte of the request can have reached the site."""
    if isinstance(failure, requests.ConnectTimeout | requests.exceptions.ProxyError):
        # urllib3 tells of a proxy only while it is being connected to, before the request.
        return True
    refused = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
    return any(isinstance(link, refused) for link in chain)


def _why(chain: list[BaseException]) -> str:
    """Return the innermost cause in a few words of ours."""
    if any(isinstance(link, urllib3.exceptions.NameResolutionError) for link in chain):
        return "its name cannot be resolved"
    for kind, words in _CAUSES:
        if any(isinstance(link, kind) for link in chain):
            return words
    return type(chain[0]).__name__


_CAUSES: tuple[tuple[type[BaseException], str], ...] = (
    (requests.exceptions.ProxyError, "the proxy does not let us through"),
    (requests.ConnectTimeout, "connecting took too long"),
    (ConnectionRefusedError, "connection refused"),
    (requests.ReadTimeout, "the read timeout passed"),
    (urllib3.exceptions.ReadTimeoutError, "the read timeout passed"),
    (ConnectionResetError, "connection reset"),
    (urllib3.exceptions.IncompleteRead, "the reply was cut short"),
    (urllib3.exceptions.ProtocolError, "closed without a full reply"),
    (ssl.SSLError, "TLS failed"),
)


def _sayings(reply: requests.Response) -> list[str]:
    """Return the site's messages out of any of the documented shapes of an error body."""
    if _is_html(reply):
        return ["a page of HTML"]
    try:
        said = json.loads(reply.content, parse_float=str)
    except ValueError:
        return [reply.content[: 4 * _WORDS_LENGTH].decode("utf-8", "replace").strip()]
    if isinstance(said, dict):
        said = next((said[key] for key in ("errors", "error", "message") if said.get(key)), said)
    return list(_leaves(said))


def _leaves(said: object, key: str = "") -> Iterator[str]:
    if isinstance(said, dict):
        for name, value in said.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(said, list):
        for value in said:
            yield from _leaves(value, key)
    elif said not in (None, ""):
        yield f"{key}: {said}" if key else str(said)


def _is_html(reply: requests.Response) -> bool:
    return re.match(rb"\s*<(!doctype|html|head|body)", reply.content, re.IGNORECASE) is not None


def _retry_after(reply: requests.Response) -> float | None:
    """Return the wait that the site asks for, in seconds; the header holds seconds or a date (RFC 9110)."""
    given = reply.headers.get("Retry-After", "").strip()
    if given.isascii() and given.isdigit():
        return float(given)
    try:
        moment = email.utils.parsedate_to_datetime(given)
    except ValueError:
        return None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max((aware - datetime.now(UTC)).total_seconds(), 0.0)
