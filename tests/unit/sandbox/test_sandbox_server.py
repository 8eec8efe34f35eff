"""The running process: books that outlive it, how it ends, where it listens."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from usage_billing.sandbox import Sandbox
from usage_billing.sandbox.server import NotLoopback, serve

ACME = "maxio:us:acme"
KEY = ("sandbox-acme-key", "x")
WORLDS = Path(__file__).parents[3] / "include" / "sandbox" / "worlds"
PLUGINS = Path(__file__).parents[3] / "plugins"
COMMAND = (
    "import sys; from pathlib import Path; from usage_billing.sandbox.server import serve; "
    "serve(Path(sys.argv[1]), Path(sys.argv[2]), 0, port_file=Path(sys.argv[3]))"
)


def _use(base: str, quantity: int, **more: object) -> int:
    url = f"{base}/subscriptions/acct-0001/components/handle:api-calls/usages.json"
    return requests.post(url, json={"usage": {"quantity": quantity}, **more}, auth=KEY, timeout=10).status_code


def test_books_and_clock_survive_a_restart(tmp_path: Path) -> None:
    """Usage, balances, tokens, switches, invoices and the clock are there when the sandbox starts again."""
    books = tmp_path / "books.sqlite"
    with Sandbox([WORLDS], books) as first:
        _use(first.maxio_url("acme"), 5)
        first.move_clock("2026-11-02T00:00:00Z")
        _use(first.maxio_url("acme"), 7, uniqueness_token="t")
        first.switch(ACME, not_found_body="empty")
        before = first.billed(ACME)
    with Sandbox([WORLDS], books) as second:
        assert second.billed(ACME) == before
        assert (before[0].invoiced, before[0].open) == (5, 7)
        assert second.now().isoformat() == "2026-11-02T00:00:00+00:00"
        assert _use(second.maxio_url("acme"), 7, uniqueness_token="t") == 409
        assert requests.get(f"{second.maxio_url('acme')}/nothing", auth=KEY, timeout=10).content == b""
        second.reset()
        assert second.billed(ACME) == []


def test_the_same_sandbox_keeps_its_port_over_a_restart(tmp_path: Path) -> None:
    """A block entered again listens where it did, so that a client meets the restarted site."""
    sandbox = Sandbox([WORLDS], tmp_path / "books.sqlite")
    with sandbox:
        url = sandbox.maxio_url("acme")
        assert _use(url, 5) == 200
    with pytest.raises(requests.ConnectionError):
        _use(url, 5)
    with sandbox:
        assert _use(url, 5) == 200
        assert sandbox.billed(ACME)[0].billed == 10


@contextmanager
def _process(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port_file = folder / "port"
    port_file.unlink(missing_ok=True)
    arguments = [sys.executable, "-c", COMMAND, str(WORLDS), str(folder / "books.sqlite"), str(port_file)]
    process = subprocess.Popen(  # noqa: S603 - its own interpreter and text.
        arguments, env={**os.environ, "PYTHONPATH": str(PLUGINS)}
    )
    try:
        deadline = time.monotonic() + 20
        while not port_file.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        yield process, f"http://127.0.0.1:{port_file.read_text(encoding='utf-8').strip()}"
    finally:
        process.kill()
        process.wait(10)


def test_committed_usage_survives_sigkill(tmp_path: Path) -> None:
    """Whatever was answered is in the books, also when the process is killed the next moment."""
    with _process(tmp_path) as (process, url):
        for _ in range(20):
            assert _use(f"{url}/maxio/acme", 1) == 200
        process.kill()
        process.wait(10)
    with _process(tmp_path) as (_, url):
        assert requests.get(f"{url}/_sandbox/billed", timeout=10).json()["rows"][0]["billed"] == "20"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_within_a_second_even_while_a_request_hangs(tmp_path: Path, number: int) -> None:
    """A stop does not wait for requests that hang; the process ends cleanly."""
    with _process(tmp_path) as (process, url):
        fault = {"site": ACME, "fault": "hang", "seconds": 60}
        requests.post(f"{url}/_sandbox/faults", json=fault, timeout=10)
        with pytest.raises(requests.ReadTimeout):
            requests.post(
                f"{url}/maxio/acme/subscriptions/acct-0001/components/61001/usages.json", json={}, auth=KEY, timeout=0.1
            )
        started = time.monotonic()
        process.send_signal(number)
        assert process.wait(10) == 0
        assert time.monotonic() - started < 1


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.com"])  # noqa: S104 - refused, never bound.
def test_listens_on_loopback_only(tmp_path: Path, host: str) -> None:
    """The sandbox has no real credentials, so it refuses every address that others could reach."""
    with pytest.raises(NotLoopback):
        serve(WORLDS, tmp_path / "books.sqlite", 0, host=host)


def test_books_belong_to_one_process(tmp_path: Path) -> None:
    """A second sandbox over the same books is refused instead of mixing them up."""
    with Sandbox([WORLDS], tmp_path / "books.sqlite"), pytest.raises(OSError, match="in use"):
        Sandbox([WORLDS], tmp_path / "books.sqlite").__enter__()


def test_broken_http_does_not_stop_the_server() -> None:
    """Bytes that are no HTTP are refused, and the next request is served."""
    with Sandbox([WORLDS]) as sandbox:
        port = int(sandbox.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            assert b"400" in connection.recv(200)
        assert _use(sandbox.maxio_url("acme"), 1) == 200


def test_speed_of_bulk_events(tmp_path: Path) -> None:
    """A bulk request of 1,000 events with tokens stays quick; the bound leaves room for slow machines."""
    events = [
        {"chargify": {"uniqueness_token": f"t{n}"}, "account_id": f"orbit-{n % 10 + 1:02d}", "units": 1}
        for n in range(1000)
    ]
    with Sandbox([WORLDS], tmp_path / "books.sqlite") as sandbox:
        url = f"{sandbox.events_url}/orbit/events/platform-events/bulk.json"
        started = time.monotonic()
        assert requests.post(url, json=events, auth=("sandbox-orbit-key", "x"), timeout=10).status_code == 201
        assert time.monotonic() - started < 1
