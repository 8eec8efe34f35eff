"""HTTP toward billing sites: one pool of connections, timeouts always, and one table of outcomes.

The only file that knows what a status code or a broken connection means in general; a destination adds what is special
to its site as further `Outcome` rows. What a failure means depends on the `Effect` of the call: a read that failed did
nothing, a write whose reply was lost may have been carried out.
"""

import codecs
import email.utils
import logging
import random
import re
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from typing import Any
from urllib.parse import quote

import requests
import urllib3
from requests.adapters import BaseAdapter, HTTPAdapter
from requests.auth import AuthBase

from usage_billing import __version__
from usage_billing.destinations.exact import exact_json
from usage_billing.destinations.settings import Timeouts, is_loopback, url_faults
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused, UsageBillingError

log = logging.getLogger(__name__)

_WORDS_LENGTH = 300
_LONGEST_CHAIN = 30
_LONGEST_PAUSE = 86_400.0
"""No site means longer than a day; a number without end would be no time to wait at all."""
_FIRST_WAIT, _LONGEST_WAIT, _MOST_DOUBLINGS = 0.5, 30.0, 6
"""How long to wait, in seconds, before a question is asked again: twice as long each time, but for chance."""


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
_NO_REDIRECTS = "redirects are not followed with credentials: set the site's own address"

OUTCOMES: tuple[Outcome, ...] = (
    Outcome((401,), Misconfigured, mend="the site does not know these credentials: mend the connection"),
    Outcome((403,), Misconfigured, mend="these credentials may not do this: give the key the right to"),
    Outcome((407,), Misconfigured, mend="the proxy wants credentials of its own: mend HTTPS_PROXY"),
    Outcome((301, 307, 308), Misconfigured, mend=_NO_REDIRECTS),
    # Any other redirect may come after the work was done: 303 says so, and 302 is sent in its place.
    Outcome(range(300, 400), InDoubt, _CHANGING, mend=_NO_REDIRECTS),
    Outcome(range(300, 400), Misconfigured, (Effect.READ,), mend=_NO_REDIRECTS),
    Outcome((429,), NotApplied, (Effect.READ, Effect.WRITE)),
    # 460 and 499 are a load balancer's words for a client that hung up, after the request was passed on.
    Outcome((408, 425, 460, 499), NotApplied, (Effect.READ,)),
    Outcome((408, 409, 425, 460, 499), InDoubt, _CHANGING),
    Outcome(range(400, 500), Misconfigured, (Effect.READ,), mend="the site does not take this question as it stands"),
    Outcome(range(400, 500), Refused, (Effect.WRITE,)),
    Outcome(range(400, 500), InDoubt, (Effect.BULK,)),
    Outcome(range(1000), NotApplied, (Effect.READ,)),
    Outcome(range(1000), InDoubt, _CHANGING),
)
"""What a reply other than success means, first match wins: what no document speaks of may have been applied."""

_ANSWERS = (requests.codes.ok,)
"""What says that a question was answered: part of an answer (206), or one to come (202), is no answer."""
_TAKEN = (requests.codes.ok, requests.codes.created, requests.codes.accepted, requests.codes.no_content)
"""What says that a body was taken, where success has no documented body."""

_TROUBLE = re.compile(r"error|fail|refus|reject|invalid|denied|unavailable|exception|not accepted")
_WELL = re.compile(r"success|ok|accepted|valid")
_NOTHING = ("false", "0", "none", "no")
"""What says, under a name that speaks of errors, that there were none."""
_MOST_LEAVES = 10_000

_NO_TLS = ("WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL", "UNKNOWN_PROTOCOL", "HTTP_REQUEST")
"""OpenSSL's reasons for a handshake with something that speaks no TLS."""


@dataclass(frozen=True)
class Form:
    """How a site writes what it says: the media type, and what a text of it says; `read` raises a `ValueError`."""

    name: str
    media_type: str
    read: Callable[[bytes], Any]


JSON = Form("JSON", "application/json", exact_json)


@dataclass(frozen=True)
class Transport:
    """What stands for network and time: the real ones, or those of a simulation.

    `adapter` makes what takes the place of the network, once for each client. A question that the site could not be
    asked is asked again for `patience_seconds`; `wait` lets so many seconds pass, `clock` tells how many have passed,
    and `chance` gives numbers in ``[0, 1)`` that keep those who wait out of step.
    """

    adapter: Callable[[], BaseAdapter] | None = None
    wait: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random  # noqa: S311
    patience_seconds: float = 60.0


class _NoReply(Exception):
    """A request failed; `left` says whether the site can have got it whole, None where that cannot be told."""

    def __init__(self, cause: Exception, *, left: bool | None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.left = left


class _TooLate(Exception):
    """The connection stood only after the time for it was over."""


class _Body:
    """The body of a request, which knows whether it was asked for, and lets nobody ask after `deadline`.

    It is asked for when the connection stands and the headers are out. Until then the site has nothing that it could
    carry out, whatever went wrong. No exception tells this much: urllib3 calls a reset after the request a fault of the
    proxy, where there is one, and plain bytes amid a TLS connection look as they do in its handshake.
    """

    def __init__(self, content: bytes, deadline: float) -> None:
        self.left = False
        self._content = content
        self._deadline = deadline

    def __iter__(self) -> Iterator[bytes]:
        if time.monotonic() > self._deadline:
            raise _TooLate
        self.left = True
        yield self._content


class _Network(HTTPAdapter):
    """The real network, shared by all threads: repeats nothing by itself, and tells of a failure what had left.

    It keeps at most `connections` open, idle ones too: who needs one more waits for it. A write whose connection
    stands later than `connect` seconds after it was wanted does not leave. The timeout alone would not do: it is for
    each address of a name, and neither for the look-up of the name nor for the wait.
    """

    def __init__(self, connections: int, connect: float) -> None:
        super().__init__(max_retries=0, pool_connections=2, pool_maxsize=connections, pool_block=True)
        self._connect = connect

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        """Send a request and read its reply to the end.

        Raises:
            _NoReply: it failed before the whole reply was in.
        """
        deadline = time.monotonic() + self._connect
        body = _Body(request.body, deadline) if isinstance(request.body, bytes) else None
        if body is not None:
            request.body = body  # type: ignore[assignment]  # An iterable is as good; the length is in the headers.
        try:
            return _whole(super().send(request, *args, **kwargs))
        except _TooLate:
            raise _NoReply(requests.ConnectTimeout(), left=False) from None
        except _FAILURES as failure:
            raise _NoReply(failure, left=None if body is None else body.left) from None


def _whole(reply: requests.Response) -> requests.Response:
    """Read a reply to its end; its connection is free for the next request then, also where the reply is broken."""
    try:
        reply.content  # noqa: B018 - it is read here, and kept.
    finally:
        reply.close()
    return reply


_FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
"""All that a request may fail with: not everything that its layers raise is wrapped by the layer above."""


class _Session(requests.Session):
    """A session that does not even look where a redirect leads: a broken address there would hide the reply."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return None: there is nothing to follow."""


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
        transport: Transport = Transport(),
        auth: AuthBase | None = None,
    ) -> None:
        """Prepare; nothing is opened before the first request. `outcomes` are asked before the general ones.

        The `credentials` go with each request as they are (HTTP Basic), unless `auth` does something else with them.

        Raises:
            Misconfigured: the address is none to which credentials may go.
        """
        faults = list(url_faults("address", base_url))
        if not all(part.isascii() for part in credentials):
            faults.append("credentials: hold a character that no key has")
        if faults:
            raise Misconfigured.all_at_once(site, faults)
        self.site = site
        self._base_url = base_url
        self._auth = auth or credentials
        self._timeouts = timeouts
        self._outcomes = tuple(outcomes)
        self._threads = threading.local()
        self._transport = transport
        self._waited_in_vain = False
        # An Airflow pool keeps the site's limit across machines; this keeps one process from exceeding it by itself.
        self._adapter = transport.adapter() if transport.adapter else _Network(concurrency, timeouts.connect)
        pair = b64encode(":".join(credentials).encode()).decode()
        # One character, such as Maxio's password "x", is no secret and stands in many a word.
        secrets = (secret for secret in (*credentials, pair) if len(secret) > 1)
        # One may be a part of another, and must not be cut out of it.
        self._secrets = sorted(secrets, key=len, reverse=True)

    def read(
        self,
        call: str,
        path: str,
        params: Mapping[str, Any] | None = None,
        body: str | None = None,
        also: Collection[Outcome] = (),
        form: Form = JSON,
    ) -> Any:
        """Return what a read says, or None if the site definitely has no such thing (404).

        A `body` is for a question that the site wants posted; it changes nothing there all the same. `also` are rows of
        the table for this question alone.

        A read changes nothing, so it is tried again as long as the transport has patience: after a growing pause, and
        not before the site wants to be asked again. Patience is with the site, not with each question: once it has
        ended, questions are asked once, until one is answered.

        Raises:
            Misconfigured: the site or our question is not what it has to be.
            NotApplied: the site could not be asked, or its answer cannot be read; the error is that of the last try.
        """
        transport, pauses = self._transport, 0
        until = transport.clock() + (0.0 if self._waited_in_vain else transport.patience_seconds)
        while True:
            try:
                found = self._ask(call, path, params, body, also, form)
            except NotApplied as error:
                pause = self._pause(error, pauses, until - transport.clock())
                if pause is None:
                    self._waited_in_vain = True
                    raise
                log.warning("%s; it is asked again in %.1f s", error, pause)
            else:
                self._waited_in_vain = False
                return found
            transport.wait(pause)
            pauses += 1

    def _pause(self, error: NotApplied, pauses: int, left: float) -> float | None:
        """Return how long to wait before a question is asked again, None where patience does not last so long."""
        asked_for = error.retry_after_seconds or 0.0
        if left <= 0 or asked_for > left:
            return None
        longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(pauses, _MOST_DOUBLINGS))
        return max(asked_for, min(left, longest * (1 + self._transport.chance()) / 2))

    def _ask(
        self,
        call: str,
        path: str,
        params: Mapping[str, Any] | None,
        body: str | None,
        also: Collection[Outcome],
        form: Form,
    ) -> Any:
        method = "GET" if body is None else "POST"
        reply = self._send(method, call, path, Effect.READ, params=params, body=body, form=form)
        if reply.status_code == requests.codes.not_found:
            return None
        self._raise_for_failure(reply, call, Effect.READ, also)
        found = self._said(reply, call, Effect.READ, form)
        if found is None:
            # A null is not the definite word that a 404 is.
            raise NotApplied(self._text(call, reply.status_code, "answered with null"))
        return found

    def shown(self, words: object) -> str:
        """Return words of the site as they may be shown: in one line, cut, and without our credentials."""
        text = str(words)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())[:_WORDS_LENGTH]

    def write(self, call: str, path: str, body: str, effect: Effect = Effect.WRITE, form: Form = JSON) -> Any:
        """Post a text of some form and return what the reply says.

        Raises:
            Misconfigured, NotApplied, Refused, InDoubt: as `OUTCOMES` says; a reply that cannot be read is `InDoubt`.
        """
        reply = self._send("POST", call, path, effect, body=body, form=form)
        self._raise_for_failure(reply, call, effect)
        return self._said(reply, call, effect, form)

    def write_blind(self, call: str, path: str, body: str, effect: Effect = Effect.WRITE) -> None:
        """Post a JSON text where success has no documented body; errors as for `write`.

        A page, a reply that was cut short, and one that speaks of errors are still no success.
        """
        reply = self._send("POST", call, path, effect, body=body)
        self._raise_for_failure(reply, call, effect)
        if odd := _oddity(reply):
            raise InDoubt(self._text(call, reply.status_code, odd))

    def _send(
        self,
        method: str,
        call: str,
        path: str,
        effect: Effect,
        *,
        params: Mapping[str, Any] | None = None,
        body: str | None = None,
        form: Form = JSON,
    ) -> requests.Response:
        kinds = {"Accept": form.media_type} | ({} if body is None else {"Content-Type": form.media_type})
        wait = self._timeouts.read if effect is Effect.READ else self._timeouts.write
        try:
            reply = self._session().request(
                method,
                self._base_url + path,
                params=params,
                data=None if body is None else body.encode(),
                headers=kinds,
                timeout=(self._timeouts.connect, wait),
                allow_redirects=False,
            )
        except _NoReply as failure:
            # Without the chain: urllib3's texts hold the whole address, and a proxy's may hold its password.
            raise self._failed(failure.cause, call, effect, left=failure.left) from None
        except _FAILURES as failure:
            raise self._failed(failure, call, effect) from None
        self._threads.server_time = _moment(reply.headers.get("Date", ""))
        return reply

    @property
    def server_time(self) -> datetime | None:
        """The site's own time, to the second, as its last reply to this thread said; None where it said none."""
        return getattr(self._threads, "server_time", None)

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._threads, "session", None)
        if session is None:
            session = _Session()
            session.auth = self._auth
            session.headers.update({"User-Agent": f"usage-billing/{__version__}"})
            # Companies set their proxy and their certificate authority in the environment, so it is trusted, except
            # toward this very machine, where a proxy could only be in the way. The explicit credentials above keep
            # .netrc out, and no variable of the environment can turn verification off.
            session.trust_env = not is_loopback(self._base_url)
            session.mount("https://", self._adapter)
            session.mount("http://", self._adapter)
            self._threads.session = session
        return session

    def _failed(self, failure: Exception, call: str, effect: Effect, *, left: bool | None = None) -> UsageBillingError:
        """Return what a request without a reply means: did it leave? `left` is the adapter's word, if it knows."""
        where = f"{self.site}: {call}"
        chain = list(_chain(failure))
        if not left and (fault := _fault_of_ours(failure, chain)):
            return Misconfigured(f"{where}: {fault}; nothing was sent")
        if left is False or (left is None and _never_left(failure, chain)):
            return NotApplied(f"{where}: the site cannot be reached ({_why(chain)}); nothing was sent")
        what = "no reply in time" if isinstance(failure, requests.Timeout) else "the connection broke off"
        why = _why([link for link in chain if not isinstance(link, requests.exceptions.ProxyError)])
        if effect is Effect.READ:
            return NotApplied(f"{where}: {what} ({why})")
        return InDoubt(f"{where}: {what} ({why}); the request may have been carried out")

    def _raise_for_failure(
        self, reply: requests.Response, call: str, effect: Effect, also: Collection[Outcome] = ()
    ) -> None:
        status = reply.status_code
        if _is_success(status, effect):
            return
        words = self.shown("; ".join(_sayings(reply)))
        rows = (*self._outcomes, *also, *OUTCOMES)
        row = next(row for row in rows if row.fits(status, effect, words))
        text = self._text(call, status, words, row.mend)
        throttled = status == requests.codes.too_many_requests
        if row.means is NotApplied:
            raise NotApplied(text, retry_after_seconds=_retry_after(reply), throttled=throttled)
        if row.means is InDoubt:
            # What the same reply would say of one record alone: of several it says so much, and not of which.
            alone = next(row for row in rows if row.fits(status, Effect.WRITE, words))
            refused = alone.means is Refused
            raise InDoubt(text, refused=refused, throttled=throttled, retry_after_seconds=_retry_after(reply))
        raise row.means(text)

    def _said(self, reply: requests.Response, call: str, effect: Effect, form: Form) -> Any:
        try:
            return form.read(reply.content)
        except ValueError:
            what = "answered with a page of HTML" if _is_html(reply) else f"answered with what is no {form.name}"
            means = NotApplied if effect is Effect.READ else InDoubt
            raise means(self._text(call, reply.status_code, what)) from None

    def _text(self, call: str, status: int, words: str, mend: str = "") -> str:
        said = f"{self.site}: {call}: HTTP {status}" + (f": {words}" if words else "")
        return f"{said}; {mend}" if mend else said


def segment(value: object) -> str:
    """Return a value as one segment of a path, with everything encoded that could leave it."""
    return quote(str(value), safe="")


def record_number(value: object) -> str | None:
    """Return a site's own id of a record as text, or None if it is none; a number today, perhaps text tomorrow."""
    known = isinstance(value, int | str) and not isinstance(value, bool)
    return str(value).strip() or None if known else None


def _is_success(status: int, effect: Effect) -> bool:
    if effect is Effect.READ:
        return status in _ANSWERS
    return bool(requests.codes.ok <= status < requests.codes.multiple_choices)


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


def _fault_of_ours(failure: Exception, chain: list[BaseException]) -> str:
    """Return what is wrong on this side or with the address, so that a person has to mend it; else an empty text."""
    if any(isinstance(link, ssl.SSLCertVerificationError) for link in chain):
        return "the site's TLS certificate cannot be verified"
    if any(isinstance(link, ssl.SSLError) and link.reason in _NO_TLS for link in chain):
        return "there is no TLS at the site's address"
    if isinstance(failure, ValueError):
        # InvalidURL, MissingSchema and their kin are found before anything is opened.
        return f"the address cannot be used ({type(failure).__name__})"
    if type(failure) is OSError:
        return "there are no certificates where REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE says"
    return ""


def _never_left(failure: Exception, chain: list[BaseException]) -> bool:
    """Say whether an adapter's exception itself says that not one byte of the request can have reached the site."""
    if isinstance(failure, requests.ConnectTimeout | requests.exceptions.ProxyError):
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
        said = exact_json(reply.content)
    except ValueError:
        return [reply.content.decode("utf-8", "replace").strip()]
    if isinstance(said, dict):
        said = next((said[key] for key in ("errors", "error", "message") if said.get(key)), said)
    return list(islice(_leaves(said), _WORDS_LENGTH))


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


def _oddity(reply: requests.Response) -> str:
    """Return what makes a reply without a documented body no success, or an empty text."""
    if reply.status_code not in _TAKEN:
        return "no documented success"
    text = reply.content.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"<"):
        return "answered with a page of HTML" if _is_html(reply) else "answered with markup"
    try:
        said = exact_json(text)
    except ValueError:
        if text.startswith((b"{", b"[")):
            return "the reply was cut short"
        said = text.decode("utf-8", "replace")
    return "success, but an error inside" if _speaks_of_errors(said) else ""


def _speaks_of_errors(said: object) -> bool:
    """Say whether anything in a body, however deep, tells of a failure: a name that is not empty, a word, a no."""
    try:
        leaves = list(islice(_leaves(said), _MOST_LEAVES))
    except RecursionError:
        return True
    for leaf in leaves:
        *names, value = leaf.lower().split(": ", 1)
        if any(_TROUBLE.search(name) for name in names) and value not in _NOTHING:
            return True
        if _TROUBLE.search(value) or (value == "false" and any(_WELL.search(name) for name in names)):
            return True
    return False


def _retry_after(reply: requests.Response) -> float | None:
    """Return the wait that the site asks for, in seconds; the header holds seconds or a date (RFC 9110)."""
    given = reply.headers.get("Retry-After", "").strip()
    if given.isascii() and given.isdigit():
        return min(float(given), _LONGEST_PAUSE)
    moment = _moment(given)
    if moment is None:
        return None
    return min(max((moment - datetime.now(UTC)).total_seconds(), 0.0), _LONGEST_PAUSE)


def _moment(given: str) -> datetime | None:
    """Return the time that a header holds (RFC 9110), None where it holds none."""
    try:
        moment = email.utils.parsedate_to_datetime(given)
    except (ValueError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
