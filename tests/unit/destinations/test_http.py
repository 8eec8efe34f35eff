"""What replies and broken connections mean: the table of outcomes row by row, and real sockets that misbehave."""

import ipaddress
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import requests
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from unit.destinations.scripted import Script, hang_up, reply, reset, server, silence
from usage_billing.destinations.http import Effect, HttpClient, Outcome, Transport, segment
from usage_billing.destinations.settings import Timeouts, is_loopback, url_faults
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused, UsageBillingError

KEY = "a-key-that-nobody-may-see"
READ, WRITE, BULK = Effect.READ, Effect.WRITE, Effect.BULK


ONCE = Transport(patience_seconds=0)
"""The network, where nothing is asked twice."""


def client(
    url: str, *outcomes: Outcome, wait: float = 10, connect: float = 10, transport: Transport = ONCE, most: int = 4
) -> HttpClient:
    """Return a client of a site at `url` that gives up after `wait` seconds, with `most` connections."""
    waits = Timeouts(connect=connect, read=wait, write=wait)
    more = {"timeouts": waits, "outcomes": outcomes, "concurrency": most, "transport": transport}
    return HttpClient("maxio:us:acme", url, (KEY, "x"), **more)  # type: ignore[arg-type]


def cut_short(connection: socket.socket) -> None:
    """Promise fifty bytes, send one and hang up."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{")


class Clock:
    """Time that passes only where somebody waits; `pauses` are the waits, in seconds."""

    def __init__(self, patience: float = 60.0, chance: float = 1.0) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.transport = Transport(
            wait=self.wait, clock=lambda: self.now, chance=lambda: chance, patience_seconds=patience
        )

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        self.pauses.append(seconds)


def call(made: HttpClient, effect: Effect) -> object:
    """Make one call with an effect."""
    return made.read("ask", "/path") if effect is READ else made.write("create usage", "/path", "{}", effect)


def raised(effect: Effect, *scripts: Script, outcomes: tuple[Outcome, ...] = (), wait: float = 10) -> UsageBillingError:
    """Return the error that a call ends in when the server plays a script."""
    with server(*scripts) as url, pytest.raises(UsageBillingError) as told:
        call(client(url, *outcomes, wait=wait), effect)
    assert KEY not in str(told.value) + repr(told.value)
    return told.value


@pytest.mark.parametrize(
    ("status", "on_read", "on_write", "on_bulk"),
    [
        (301, Misconfigured, Misconfigured, Misconfigured),
        (302, Misconfigured, InDoubt, InDoubt),
        (400, Misconfigured, Refused, InDoubt),
        (401, Misconfigured, Misconfigured, Misconfigured),
        (403, Misconfigured, Misconfigured, Misconfigured),
        (407, Misconfigured, Misconfigured, Misconfigured),
        (408, NotApplied, InDoubt, InDoubt),
        (409, Misconfigured, InDoubt, InDoubt),
        (413, Misconfigured, Refused, InDoubt),
        (422, Misconfigured, Refused, InDoubt),
        (429, NotApplied, NotApplied, InDoubt),
        (500, NotApplied, InDoubt, InDoubt),
        (502, NotApplied, InDoubt, InDoubt),
        (503, NotApplied, InDoubt, InDoubt),
        (600, NotApplied, InDoubt, InDoubt),
    ],
)
def test_each_status_means_what_the_table_says(
    status: int, on_read: type[Exception], on_write: type[Exception], on_bulk: type[Exception]
) -> None:
    """A status means one thing for a question, another for a write, a third where part of a bulk may be in."""
    for effect, expected in ((READ, on_read), (WRITE, on_write), (BULK, on_bulk)):
        error = raised(effect, reply(status, '{"errors":["Quantity: is odd."]}'))
        assert type(error) is expected
        assert "maxio:us:acme" in str(error)
        assert f"HTTP {status}: Quantity: is odd." in str(error)


def test_a_missing_thing_is_an_answer_to_a_question_and_a_refusal_of_a_write() -> None:
    """404 says definitely that there is none."""
    with server(reply(404, "<!DOCTYPE html>")) as url:
        assert client(url).read("ask", "/path") is None
    assert type(raised(WRITE, reply(404))) is Refused


def test_a_sites_own_rows_come_first() -> None:
    """A 422 with the site-wide words is no refusal of the record; other words still are."""
    row = Outcome((422,), Misconfigured, words="Has Ended", mend="call sales")

    assert type(raised(WRITE, reply(422, '{"errors":["Your trial has ended."]}'), outcomes=(row,))) is Misconfigured
    assert type(raised(WRITE, reply(422, '{"errors":["Memo: too long."]}'), outcomes=(row,))) is Refused


@pytest.mark.parametrize(
    "body",
    ["", "<html><body>login</body></html>", '{"usage": {"id"', "NaN,"],
    ids=["empty", "a page of HTML", "cut short", "no JSON"],
)
def test_success_that_cannot_be_read_is_a_doubt(body: str) -> None:
    """A 200 without the documented body may come from something in between, or hide what was done."""
    assert type(raised(WRITE, reply(200, body))) is InDoubt
    assert type(raised(BULK, reply(201, body))) is InDoubt
    assert type(raised(READ, reply(200, body))) is NotApplied


def test_success_without_a_documented_body_is_success_unless_it_is_a_page() -> None:
    """An events host answers 201 and nothing; a portal that wants a login answers with a page."""
    with server(reply(201), reply(200, "ok"), reply(200, " <html>log in</html>")) as url:
        made = client(url)
        made.write_blind("record an event", "/path", "{}")
        made.write_blind("record an event", "/path", "{}")
        with pytest.raises(InDoubt, match="page of HTML"):
            made.write_blind("record an event", "/path", "{}")


@pytest.mark.parametrize(
    "script",
    [
        silence,
        reset,
        hang_up,
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"),
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"),
        lambda connection: connection.sendall(b"HTTP/1."),
    ],
    ids=["hang", "reset", "closed at once", "cut in the body", "cut in a chunk", "cut in the status"],
)
def test_a_reply_that_never_came_is_a_doubt_for_a_write_only(script: Script) -> None:
    """The request left: a write may have been carried out, a question may be asked again."""
    assert type(raised(WRITE, script, wait=0.3)) is InDoubt
    assert type(raised(BULK, script, wait=0.3)) is InDoubt
    assert type(raised(READ, script, wait=0.3)) is NotApplied


def test_nothing_is_tried_twice_and_no_redirect_is_followed() -> None:
    """Only one request reaches the site, whatever becomes of it: the second script is never played."""
    played: list[str] = []

    def note(connection: socket.socket) -> None:
        played.append("once")
        reply(307, "", "Location: /elsewhere")(connection)

    with server(note) as url, pytest.raises(Misconfigured, match="redirects are not followed"):
        client(url).write("create usage", "/path", "{}")
    assert played == ["once"]


def test_a_question_is_asked_again_after_pauses_that_grow(caplog: pytest.LogCaptureFixture) -> None:
    """A read changes nothing: throttled, failed, reset or cut short, it is asked again, and the log says for what."""
    clock = Clock()
    caplog.set_level(logging.WARNING)
    with server(reply(429, "slow down"), reset, reply(503), cut_short, hang_up, reply(200, "{}")) as url:
        assert client(url, transport=clock.transport).read("ask", "/path") == {}

    assert clock.pauses == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert len(caplog.messages) == 5
    assert caplog.messages[0] == "maxio:us:acme: ask: HTTP 429: slow down; it is asked again in 0.5 s"
    assert KEY not in caplog.text


def test_those_who_wait_do_not_ask_in_step() -> None:
    """Chance takes up to half of each pause away."""
    clock = Clock(chance=0.5)
    with server(reply(429), reply(429), reply(200, "{}")) as url:
        client(url, transport=clock.transport).read("ask", "/path")

    assert clock.pauses == [0.375, 0.75]


def test_patience_ends_with_the_words_of_the_last_try() -> None:
    """The last pause is as long as what is left, and no pause is longer than thirty seconds."""
    clock = Clock(patience=100)
    tries = [reply(429, f"try {number}") for number in range(10)]
    with server(*tries) as url, pytest.raises(NotApplied, match="HTTP 429: try 9") as told:
        client(url, transport=clock.transport).read("ask", "/path")

    assert told.value.throttled
    assert clock.pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 8.5]


def test_a_site_is_not_asked_before_it_wants_to_be() -> None:
    """Retry-After is the least to wait; a wait that is longer than what is left ends it at once."""
    clock = Clock()
    script = [reply(429, "", "Retry-After: 20"), reply(503, "", "Retry-After: 0"), reply(429, "", "Retry-After: 40")]
    with server(*script) as url, pytest.raises(NotApplied) as told:
        client(url, transport=clock.transport).read("ask", "/path")

    assert clock.pauses == [20.0, 1.0]
    assert told.value.retry_after_seconds == 40.0


def test_time_that_the_site_takes_counts_for_patience_too() -> None:
    """A question that hangs for all of it is not asked again."""
    with server(silence) as url, pytest.raises(NotApplied, match="no reply in time"):
        client(url, wait=0.3, transport=Transport(patience_seconds=0.2)).read("ask", "/path")


def test_patience_is_with_the_site_and_not_with_each_question() -> None:
    """A thousand questions to a site that is away take a minute, not a thousand; one answer, and there is patience."""
    clock = Clock(patience=0.75)
    away = [reply(503)] * 5
    with server(*away, reply(200, "{}"), reply(503), reply(200, "{}")) as url:
        made = client(url, transport=clock.transport)
        for _ in range(3):
            with pytest.raises(NotApplied):
                made.read("ask", "/path")
        assert clock.pauses == [0.5, 0.25]
        assert made.read("ask", "/path") == {}
        assert made.read("ask", "/path") == {}
    assert clock.pauses == [0.5, 0.25, 0.5]


@pytest.mark.parametrize(("status", "means"), [(401, Misconfigured), (422, Misconfigured), (404, None)])
def test_what_waiting_cannot_mend_is_told_at_once(status: int, means: type[Exception] | None) -> None:
    """Credentials, a question that the site does not take, and a definite no are no reasons to ask again."""
    clock = Clock()
    with server(reply(status)) as url:
        ended: object = None
        try:
            ended = client(url, transport=clock.transport).read("ask", "/path")
        except UsageBillingError as error:
            ended = type(error)
    assert ended is means
    assert clock.pauses == []


@pytest.mark.parametrize("script", [reply(429), reply(503), hang_up])
def test_a_write_is_never_repeated(script: Script) -> None:
    """Whatever patience there is, the second script is for the second call."""
    clock = Clock()
    with server(script, reply(201, '{"id": 1}')) as url:
        made = client(url, transport=clock.transport)
        with pytest.raises((NotApplied, InDoubt)):
            made.write("create usage", "/path", "{}")
        assert made.write("create usage", "/path", "{}") == {"id": 1}
    assert clock.pauses == []


@contextmanager
def dead_ends(count: int) -> Iterator[list[tuple[str, int]]]:
    """Give addresses that swallow every packet: listeners whose queue is full."""
    with ExitStack() as stack:
        addresses: list[tuple[str, int]] = []
        for _ in range(count):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            addresses.append(listener.getsockname())
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(addresses[-1])
        yield addresses


def lead_to(monkeypatch: pytest.MonkeyPatch, addresses: list[tuple[str, int]], look_up_seconds: float = 0) -> None:
    """Have every name lead to these addresses, after a while."""

    def found(*_: object, **__: object) -> list[object]:
        time.sleep(look_up_seconds)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found)


def port_of(url: str) -> tuple[str, int]:
    """Return where a server listens."""
    return "127.0.0.1", int(url.rpartition(":")[2])


@pytest.mark.parametrize("effect", [WRITE, BULK])
def test_a_write_does_not_leave_later_than_it_may_take_to_connect(
    monkeypatch: pytest.MonkeyPatch, effect: Effect
) -> None:
    """Each dead address of a name takes the whole timeout; when the living one is reached, it is too late to send."""
    got: list[bytes] = []
    with dead_ends(2) as dead, server(heard(got)) as url:
        lead_to(monkeypatch, [*dead, port_of(url)])
        with pytest.raises(NotApplied, match=r"connecting took too long\); nothing was sent"):
            call(client(url, connect=0.2), effect)
    assert got == [b""], "the site got a body"


def test_a_name_that_is_looked_up_for_long_is_too_late_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timeout covers the look-up of a name."""
    got: list[bytes] = []
    with server(heard(got)) as url:
        lead_to(monkeypatch, [port_of(url)], look_up_seconds=0.4)
        with pytest.raises(NotApplied, match=r"connecting took too long\); nothing was sent"):
            call(client(url, connect=0.2), WRITE)
    assert got == [b""], "the site got a body"


def test_a_write_that_waits_for_a_connection_for_too_long_does_not_leave() -> None:
    """All connections are taken by slow requests: when one is free again, the claim is too old."""
    slow = threading.Event()
    got: list[bytes] = []

    def hold(connection: socket.socket) -> None:
        slow.set()
        time.sleep(0.6)
        reply(200, "{}")(connection)

    with server(hold, heard(got)) as url:
        made = client(url, connect=0.2, most=1)
        other = threading.Thread(target=made.read, args=("ask", "/path"))
        other.start()
        assert slow.wait(5)
        with pytest.raises(NotApplied, match=r"connecting took too long\); nothing was sent"):
            made.write("create usage", "/path", "{}")
        other.join()
    assert got == [b""], "the site got a body"


def heard(got: list[bytes]) -> Script:
    """Return a script that notes what comes after the headers, and hangs up."""

    def play(connection: socket.socket) -> None:
        got.append(connection.recv(65536))

    return play


GZIP = "Content-Encoding: gzip"


@pytest.mark.parametrize("effect", Effect)
@pytest.mark.parametrize(
    "script",
    [reply(200, "{" * 100_000, GZIP), cut_short, reset, hang_up],
    ids=["no gzip", "short", "reset", "closed"],
)
def test_a_broken_reply_leaves_its_connection_to_the_next_request(effect: Effect, script: Script) -> None:
    """Where one connection is all there is, the fourth request still gets it."""
    with server(script, script, script, reply(200, "{}")) as url:
        made = client(url, most=1)
        for _ in range(3):
            with pytest.raises(UsageBillingError):
                call(made, effect)
        assert call(made, effect) == {}


NEVER_LEFT = [
    requests.ConnectTimeout(
        urllib3.exceptions.MaxRetryError(None, "/", urllib3.exceptions.ConnectTimeoutError(None, "late"))  # type: ignore[arg-type]
    ),
    requests.ConnectionError(
        urllib3.exceptions.MaxRetryError(None, "/", urllib3.exceptions.NameResolutionError("host", None, OSError()))  # type: ignore[arg-type]
    ),
    requests.ConnectionError(
        urllib3.exceptions.MaxRetryError(None, "/", urllib3.exceptions.NewConnectionError(None, "refused"))  # type: ignore[arg-type]
    ),
    requests.exceptions.ProxyError("no way through"),
]


@pytest.mark.parametrize("failure", NEVER_LEFT, ids=["connect timeout", "name", "refused", "proxy"])
@pytest.mark.parametrize("effect", Effect)
def test_what_never_left_may_be_sent_again(failure: requests.RequestException, effect: Effect) -> None:
    """No byte of the request can have arrived."""
    error = client("https://billing.example.com")._failed(failure, "create usage", effect)

    assert type(error) is NotApplied
    assert "nothing was sent" in str(error)


def test_a_refused_connection_never_left() -> None:
    """Nobody listens at the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(NotApplied, match=r"connection refused\); nothing was sent"):
        client(f"http://127.0.0.1:{port}").write("create usage", "/path", "{}")


def every_failure() -> list[type[requests.RequestException]]:
    """Return every class of error that requests has for a request."""
    waiting, found = [requests.RequestException], []
    while waiting:
        kind = waiting.pop()
        found.append(kind)
        waiting += kind.__subclasses__()
    return sorted(set(found), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", every_failure(), ids=lambda kind: kind.__name__)
def test_every_error_of_requests_is_mapped(kind: type[requests.RequestException]) -> None:
    """A write is in doubt unless the error says that nothing can have left; none escapes, and none tells its text."""
    failure = kind.__new__(kind)
    Exception.__init__(failure, f"secret {KEY}")

    error = client("https://billing.example.com")._failed(failure, "create usage", WRITE)

    harmless = issubclass(kind, ValueError | requests.ConnectTimeout | requests.exceptions.ProxyError)
    assert type(error) in ((NotApplied, Misconfigured) if harmless else (InDoubt,))
    assert KEY not in str(error)


def certificate(folder: Path) -> ssl.SSLContext:
    """Return a server's side of TLS with a certificate that nobody vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    shape = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "site.pem").write_bytes(key.private_bytes(*shape) + made.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "site.pem")
    return context


def test_an_unknown_certificate_stops_before_anything_is_sent(tmp_path: Path) -> None:
    """TLS is verified always: a certificate that nobody vouches for is for a person to look at."""
    words = "certificate cannot be verified; nothing was sent"
    with server(reply(200, "{}"), context=certificate(tmp_path)) as url, pytest.raises(Misconfigured, match=words):
        client(url).write("create usage", "/path", "{}")


def test_an_address_without_tls_stops_before_anything_is_sent() -> None:
    """TLS toward a port that speaks plain http fails in the handshake: no request had left."""
    with server(reply(400, "what?")) as url, pytest.raises(Misconfigured, match="no TLS"):
        client(url.replace("http://", "https://")).write("create usage", "/path", "{}")


@pytest.mark.parametrize(
    ("given", "expected"),
    [("120", 120.0), ("soon", None), ("", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)
def test_a_throttled_call_says_how_long_to_wait(given: str, expected: float | None) -> None:
    """Retry-After is told as seconds where the site sends it, as a number or as a date; all else is ignored."""
    error = raised(WRITE, reply(429, "Your request was denied", *([f"Retry-After: {given}"] if given else [])))

    assert isinstance(error, NotApplied)
    assert error.throttled
    assert error.retry_after_seconds == expected
    assert "Your request was denied" in str(error)


def test_the_sites_words_are_cut_and_never_hold_a_credential() -> None:
    """A site that echoes the key in its error does not bring it into our log; a flood of words is cut."""
    error = raised(WRITE, reply(422, f'{{"errors":["{KEY} is odd", "{"long " * 200}"]}}'))

    assert "*** is odd" in str(error)
    assert len(str(error)) < 400


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"errors":["one","two"]}', "one; two"),
        ('{"errors":{"memo":["too long"],"quantity":"odd"}}', "memo: too long; quantity: odd"),
        ('{"errors":{"segments":{"0":{"price":["odd"]}}}}', "segments.0.price: odd"),
        ('{"errors":"one"}', "one"),
        ('{"error":"one"}', "one"),
        ('{"errors":[{"component_id":1,"message":"odd"}]}', "component_id: 1; message: odd"),
        (
            '{"code":400,"status":"Error","message":"Malformed WHERE clause.","response":false}',
            "Malformed WHERE clause.",
        ),
        ("HTTP Basic: Access denied.\n", "HTTP Basic: Access denied."),
        ("<!DOCTYPE html><html>...</html>", "a page of HTML"),
    ],
)
def test_every_documented_shape_of_error_is_read(body: str, words: str) -> None:
    """Each way in which the two sites say what is wrong ends up as words in one line."""
    assert str(raised(WRITE, reply(422, body))).endswith(f"HTTP 422: {words}")


def test_numbers_are_exact() -> None:
    """A reply's decimals keep every digit."""
    with server(reply(200, '{"quantity": 12345678901234567.123456}')) as url:
        assert client(url).read("ask", "/path") == {"quantity": Decimal("12345678901234567.123456")}


def test_a_proxy_of_the_environment_is_used_except_toward_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Companies set their proxy in the environment: the outside goes through it, a sandbox beside us does not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, dead)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)

    with pytest.raises(NotApplied, match="the proxy does not let us through"):
        client("https://billing.example.com").write("create usage", "/path", "{}")
    with server(reply(200, "{}")) as url:
        assert client(url).read("ask", "/path") == {}


def test_each_thread_has_a_session_of_its_own() -> None:
    """A session is not made for several threads; within one it is kept, so that connections are reused."""
    made = client("http://127.0.0.1:9")
    seen: list[requests.Session] = []
    other = threading.Thread(target=lambda: seen.append(made._session()))
    other.start()
    other.join()

    assert made._session() is made._session()
    assert made._session() is not seen[0]


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("http://billing.example.com", "plain http"),
        ("ftp://billing.example.com", "no web address"),
        ("billing.example.com", "no web address"),
        ("https://", "no web address"),
        ("https://host:port", "no web address"),
        ("https://me:hush@billing.example.com", "holds credentials"),
        ("https://billing.example.com/?a=b", "must end with the path"),
    ],
)
def test_an_address_to_which_no_credential_may_go(url: str, fault: str) -> None:
    """The client itself refuses it, says why, and does not repeat a password that stands in it."""
    assert re.search(fault, "; ".join(url_faults("host", url)))
    with pytest.raises(Misconfigured, match=fault) as told:
        client(url)
    assert "hush" not in str(told.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8080/x", True),
        ("http://localhost", True),
        ("http://[::1]:80", True),
        ("http://127.0.0.1.example.com", False),
        ("http://localhost.example.com", False),
        ("http://10.0.0.1", False),
    ],
)
def test_only_this_machine_is_loopback(url: str, expected: bool) -> None:
    """A name that merely looks like this machine is not."""
    assert is_loopback(url) is expected


def test_a_segment_cannot_leave_its_place_in_a_path() -> None:
    """Slashes, dots, colons and question marks stay inside."""
    assert segment("handle:a/../b?c#d") == "handle%3Aa%2F..%2Fb%3Fc%23d"
