"""The network between a process and the sandbox: an adapter for `requests` that loses, delays and spoils.

It does what networks, proxies and busy sites do: a connection is refused, a request or its reply is lost, a request is
carried out long after the client gave up, an error page hides a success. It never doubles a request: TCP does not.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from email.utils import format_datetime
from typing import Any

import requests
import urllib3
from requests.adapters import BaseAdapter
from requests.structures import CaseInsensitiveDict

from usage_billing.destinations.http import Transport
from usage_billing.sandbox import ConnectionBroken, DirectReply, DirectSandbox, NoWholeReply, ReplyCutShort
from usage_billing.testing.clockwork import Clockwork, Process
from usage_billing.testing.effects import Surroundings, VirtualStop

Json = dict[str, Any]

_HTML = b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"
_WRITE_FATES = (
    "refused",
    "lost",
    "reply lost",
    "reply lost",
    "error",
    "error",
    "error after all",
    "cut short",
    "page",
    "empty",
    "throttled",
)
_UNIQUENESS = re.compile(rb'^{"uniqueness_token":"([0-9a-f]{64})"')
_READ_FATES = ("refused", "lost", "error", "cut short", "page", "empty", "throttled")


class Flight:
    """A request that writes, from the moment it leaves until it was carried out or can no longer be."""

    def __init__(self, process: str, method: str, url: str, headers: Json, body: bytes) -> None:
        self.process = process
        self.method = method
        self.url = url
        self.headers = headers
        self.body = body


class Network:
    """All connections of a history: what is in the air, and who watches it.

    `watch` is called with each writing request before it leaves; `settle_after` is how long after its claim a request
    may still be carried out, and `cut_off` how long after it reached the site: the two limits that the package names.
    """

    def __init__(
        self,
        sandbox: DirectSandbox,
        around: Surroundings,
        settle_after: timedelta,
        cut_off: timedelta,
        watch: Callable[["Flight"], None],
    ) -> None:
        self.sandbox = sandbox
        self.around = around
        self.settle_after = settle_after
        self.cut_off = cut_off
        self.air: list[Flight] = []
        self.writes = 0
        self.on_the_way: Callable[[Flight, str], None] = lambda _flight, _name: None
        """Told of each writing request that is about to reach the site, and of its name in the draws."""
        self._watch = watch
        self._storm_until: datetime | None = None
        self._spent: dict[bytes, datetime] = {}

    @property
    def clockwork(self) -> Clockwork:
        """The clock that the sandbox follows."""
        return self.around.clockwork

    def transport(self, process: Process) -> Transport:
        """Return what stands for network and time in one process: it waits where anything can happen to it."""

        def clock() -> float:
            return self.clockwork.now.timestamp()

        return Transport(
            adapter=lambda: _Adapter(self, process),
            wait=VirtualStop(process, self.around).wait,
            clock=clock,
            chance=self.around.chance.stream(f"asks again:{process.name}"),
        )

    def ask(self, flight: Flight) -> DirectReply:
        """Carry a request out at the site, now."""
        self.sandbox.move_clock(max(self.clockwork.now, self.sandbox.now()))
        return self.sandbox.request(flight.method, flight.url, flight.headers, flight.body)

    def leaves(self, flight: Flight) -> None:
        """Note a writing request that is about to leave."""
        self._watch(flight)
        self.writes += 1
        self.air.append(flight)
        self.around.story.counts["writing requests"] += 1

    def lands(self, flight: Flight) -> DirectReply | None:
        """Carry a writing request out, and tell the reply; None where the site itself gave none."""
        self.air.remove(flight)
        try:
            return self.ask(flight)
        except NoWholeReply:
            return None

    def spend_token(self, flight: Flight) -> None:
        """Let Maxio's 60-minute token be used up by a request that came to nothing; its next one is a conflict."""
        if token := _UNIQUENESS.search(flight.body):
            self._spent[token.group(1)] = self.clockwork.now + timedelta(minutes=60)

    def conflicts(self, flight: Flight) -> bool:
        """Say whether the site refuses a request for a token that came to nothing before."""
        token = _UNIQUENESS.search(flight.body)
        return token is not None and self._spent.get(token.group(1), self.clockwork.now) > self.clockwork.now

    def storm(self, name: str) -> bool:
        """Say whether the site turns everybody away right now."""
        now = self.clockwork.now
        if self._storm_until is not None and now < self._storm_until:
            return True
        if self.around.chance.strikes(f"storm:{name}", self.around.faults.storm):
            self._storm_until = now + timedelta(seconds=self.around.chance.seconds(f"storm/for:{name}", 1, 400))
            return True
        return False

    def latest_landing(self, process: Process) -> float:
        """Return in how many seconds, at the latest, a request that leaves now is carried out, if it ever is.

        The site's cut-off is one limit. The other is that nobody may ask about a delivery before all of its requests
        have landed: the claim's age, the way to the socket and the ledger's two clock errors have eaten into that time.
        """
        latest = self.cut_off.total_seconds()
        if process.claimed_at is not None:
            claim_ends = process.claimed_at + self.settle_after - timedelta(seconds=12)
            latest = min(latest, (claim_ends - self.clockwork.now).total_seconds())
        return max(latest, 0.0)


class _Adapter(BaseAdapter):
    """The connections of one process."""

    def __init__(self, network: Network, process: Process) -> None:
        super().__init__()
        self._network = network
        self._around = network.around
        self._process = process

    def close(self) -> None:
        """Nothing is open."""

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,  # noqa: ARG002, FBT001, FBT002
        timeout: Any = None,
        verify: Any = True,  # noqa: ARG002, FBT002
        cert: Any = None,  # noqa: ARG002
        proxies: Any = None,  # noqa: ARG002
    ) -> requests.Response:
        """Send one request; what comes back, if anything, is for chance to say."""
        method, url = str(request.method), str(request.url)
        what = f"{method} {url.partition('://')[2].partition('/')[2].partition('?')[0]}"
        name = self._around.switch(self._process, what)
        body = request.body if isinstance(request.body, bytes) else b""
        flight = Flight(self._process.name, method, url, dict(request.headers), body)
        self._around.story.counts["requests"] += 1
        if method == "GET" or url.endswith("/renewals/preview.json"):  # A question that is posted.
            return self._read(flight, name, what, request)
        return self._write(flight, name, what, request, timeout[1])

    # --- reads -------------------------------------------------------------------------------------------------------

    def _read(self, flight: Flight, name: str, what: str, request: requests.PreparedRequest) -> requests.Response:
        chance, faults = self._around.chance, self._around.faults
        fate = "fine"
        if self._network.storm(name):
            fate = "throttled"
        elif chance.strikes(f"read:{name}", faults.read):
            fate = chance.pick(f"read/fate:{name}", _READ_FATES)
        if fate in ("refused", "lost"):
            self._tell(what, fate)
            raise _refused(flight.url) if fate == "refused" else _reset()
        self._pause(name, 1)
        try:
            reply = self._network.ask(flight)
        except (ConnectionBroken, ReplyCutShort):
            reply = DirectReply(500, {}, b"")
        return self._spoilt(reply, fate, name, what, request)

    # --- writes ------------------------------------------------------------------------------------------------------

    def _write(
        self, flight: Flight, name: str, what: str, request: requests.PreparedRequest, patience: float
    ) -> requests.Response:
        network, around = self._network, self._around
        self._process.checked = False
        fate = self._fate_of_write(flight, name)
        if fate == "refused":
            self._tell(what, fate)
            raise _refused(flight.url)
        latest = network.latest_landing(self._process)
        network.leaves(flight)
        if fate == "late":
            self._late(flight, name, what, latest * around.chance.share(f"late/by:{name}"), patience)
        self._on_the_way(flight, name, what, latest)
        if self._comes_to_nothing(fate, name):
            network.air.remove(flight)
            return self._unheard(fate, name, what, request)
        reply = self._in_part(flight, name) if fate == "in part" else network.lands(flight)
        around.power_cut(name)
        self._process.breathe()
        around.crash(self._process, f"landed:{name}", f"after {what} was carried out")
        self._pause(f"{name}/back", 1)
        if fate == "reply lost" or reply is None:
            self._tell(what, "carried out, its reply lost")
            raise _reset()
        return self._spoilt(reply, fate, name, what, request)

    def _fate_of_write(self, flight: Flight, name: str) -> str:
        chance, faults = self._around.chance, self._around.faults
        if self._network.storm(name):
            return "throttled"
        if self._network.conflicts(flight):
            return "conflict"
        if self._around.outside.lands_after or chance.strikes(f"late:{name}", faults.late):
            return "late"
        if not chance.strikes(f"write:{name}", faults.write):
            return "fine"
        fates = (*_WRITE_FATES, "in part", "in part") if flight.url.endswith("/_bulk") else _WRITE_FATES
        fate = chance.pick(f"write/fate:{name}", fates)
        if fate == "error" and chance.odds(f"spends:{name}", 0.8):
            self._network.spend_token(flight)
        return fate

    def _comes_to_nothing(self, fate: str, name: str) -> bool:
        """Say whether the site does nothing with the request; a proxy's page tells neither."""
        nothing = fate in ("lost", "error", "throttled", "conflict")
        return nothing or (fate == "page" and self._around.chance.odds(f"page:{name}", 0.5))

    def _unheard(self, fate: str, name: str, what: str, request: requests.PreparedRequest) -> requests.Response:
        """Return what comes back of a request that the site did nothing with."""
        if fate == "lost":
            self._tell(what, "lost on the way there")
            raise _reset()
        return self._spoilt(DirectReply(500, {}, b""), fate, name, what, request)

    def _on_the_way(self, flight: Flight, name: str, what: str, latest: float) -> None:
        try:
            self._pause(name, min(1.0, latest))
            self._network.on_the_way(flight, name)
            self._around.crash(self._process, f"under way:{name}", f"while {what} is under way")
        except BaseException:
            # The process is gone, its request is not.
            self._goes_on(flight, name, latest)
            raise

    def _late(self, flight: Flight, name: str, what: str, lands_in: float, patience: float) -> None:
        """Raise what a client sees of a broken connection, or at its timeout; the site goes on, and lands it later."""
        chance, network, outside = self._around.chance, self._network, self._around.outside
        gives_up = chance.odds(f"late/timeout:{name}", 0.5)
        if outside.lands_after:
            lands_in, outside.lands_after, gives_up = outside.lands_after, 0.0, True
        network.clockwork.after(lands_in, lambda: self._lands_alone(flight, name))
        share = chance.share(f"late/breaks:{name}")
        network.clockwork.pause(patience if gives_up else min(patience, lands_in) * share)
        self._process.breathe()
        self._tell(what, f"{'no reply in time' if gives_up else 'broke off'}, lands {lands_in:.1f} s after it left")
        raise requests.ReadTimeout("read timed out") if gives_up else _reset()

    def _goes_on(self, flight: Flight, name: str, latest: float) -> None:
        """Leave a request to itself: lost on the way, or carried out some time."""
        chance, network = self._around.chance, self._network
        if chance.odds(f"alone/lost:{name}", 0.3):
            network.air.remove(flight)
        else:
            lands_in = latest * chance.share(f"alone/by:{name}") ** 3
            network.clockwork.after(lands_in, lambda: self._lands_alone(flight, name))

    def _lands_alone(self, flight: Flight, name: str) -> None:
        reply = self._network.lands(flight)
        said = "no reply" if reply is None else f"HTTP {reply.status}"
        self._around.tell("the site", f"carries out {name}", said)

    def _in_part(self, flight: Flight, name: str) -> DirectReply:
        """Let a batch reach the site in part: each of the others is answered by itself, some after all carried out."""
        chance, network = self._around.chance, self._network
        items = json.loads(flight.body)
        fates = [chance.pick(f"part/{n}:{name}", ("fine", "429", "500", "500 after all")) for n in range(len(items))]
        passed = [item for item, fate in zip(items, fates, strict=True) if fate in ("fine", "500 after all")]
        network.air.remove(flight)
        answers: list[Json] = []
        if passed:
            part = Flight(flight.process, flight.method, flight.url, flight.headers, json.dumps(passed).encode())
            reply = network.ask(part)
            if reply.status != requests.codes.ok:
                return reply
            answers = json.loads(reply.body)["response"]["_bulk"]
        rest = iter(answers)
        told: list[Json] = []
        for fate in fates:
            answer = next(rest) if fate in ("fine", "500 after all") else {}
            code = 429 if fate == "429" else 500
            trouble = {"code": code, "status": "Error", "message": "Try again later.", "response": False}
            told.append(answer if fate == "fine" else trouble)
        body = json.dumps({"code": 200, "status": "OK", "message": "", "response": {"_bulk": told}}).encode()
        return DirectReply(200, {"content-type": "application/json"}, body)

    # --- what both share ---------------------------------------------------------------------------------------------

    def _pause(self, name: str, longest: float) -> None:
        self._network.clockwork.pause(longest * self._around.chance.share(f"way:{name}"))
        self._process.breathe()

    def _tell(self, what: str, outcome: str) -> None:
        self._around.tell(self._process, what, outcome)

    def _spoilt(
        self, reply: DirectReply, fate: str, name: str, what: str, request: requests.PreparedRequest
    ) -> requests.Response:
        """Return the reply as it arrives, or raise what a reply that was cut short raises."""
        if fate == "cut short" and self._around.chance.odds(f"cut:{name}", 0.5):
            self._tell(what, f"HTTP {reply.status}, cut short")
            raise requests.exceptions.ChunkedEncodingError("the reply was cut short")
        status, headers, body = self._as_it_arrives(reply, fate, name)
        self._tell(what, f"HTTP {status}" + ("" if fate == "fine" else f" ({fate}; the site: {reply.status})"))
        headers.setdefault("date", format_datetime(self._network.clockwork.now, usegmt=True))
        answer = requests.Response()
        answer.status_code = status
        answer.headers = CaseInsensitiveDict(headers)
        answer._content = body  # noqa: SLF001 - there is no socket to read it from.
        answer.request = request
        answer.url = str(request.url)
        answer.encoding = "utf-8"
        return answer

    def _as_it_arrives(self, reply: DirectReply, fate: str, name: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of a reply after what happened to it on the way back."""
        if fate == "cut short":
            return reply.status, dict(reply.headers), reply.body[: len(reply.body) // 2]
        if fate in ("error", "error after all"):
            return self._around.chance.pick(f"error:{name}", (500, 502, 503, 504)), {}, b"error"
        if fate == "throttled":
            return 429, self._retry_after(name), b"Too many requests"
        if fate == "conflict":
            return 409, {}, b"Conflict"
        if fate == "page":
            return 200, {"content-type": "text/html"}, _HTML
        return reply.status, dict(reply.headers), b"" if fate == "empty" else reply.body

    def _retry_after(self, name: str) -> dict[str, str]:
        if not self._around.chance.odds(f"retry-after:{name}", 0.5):
            return {}
        return {"retry-after": str(self._around.chance.number(f"retry-after/of:{name}", 0, 120))}


def _refused(url: str) -> requests.ConnectionError:
    gone = urllib3.exceptions.NewConnectionError(None, "connection refused")  # type: ignore[arg-type]
    return requests.ConnectionError(urllib3.exceptions.MaxRetryError(None, url, gone))  # type: ignore[arg-type]


def _reset() -> requests.ConnectionError:
    return requests.ConnectionError(
        urllib3.exceptions.ProtocolError("Connection aborted.", ConnectionResetError(104, "Connection reset by peer"))
    )
