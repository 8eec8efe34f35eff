"""Running the sandbox: as a command until it is told to stop, and as a context manager in tests.

It listens on loopback addresses only: it is a billing site without real credentials.
"""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import SandboxApp, create_app


class NotLoopback(ValueError):
    """The sandbox was asked to listen where other machines could reach it."""


class DroppableHttp(H11Protocol):
    """HTTP whose connections the application may drop without a reply: `scope["state"]["drop"]()`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Put the means to drop this connection where its requests find it."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "drop": transport.abort}


class SandboxServer(uvicorn.Server):
    """A server that tells when it is ready, and on SIGINT or SIGTERM ends at once with exit code 0."""

    def __init__(self, app: SandboxApp, on_ready: Callable[[], None]) -> None:
        # Requests that still run at the end are cut off: what they committed stays, and their reply is lost.
        super().__init__(
            uvicorn.Config(
                app,
                http=DroppableHttp,
                lifespan="on",
                log_level="critical",
                access_log=False,
                date_header=False,
                timeout_graceful_shutdown=0,
                # A pooled connection that the server closed while it was idle would look like a lost reply.
                timeout_keep_alive=300,
            )
        )
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, then say so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGINT and SIGTERM; unlike the original, do not raise the signal again afterwards."""
        try:
            before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            # Signals belong to the main thread; in a test's thread the context manager stops the server.
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket (port 0: any free one); `NotLoopback` for every other kind of address."""
    if not _is_loopback(host):
        raise NotLoopback(f"the sandbox listens on loopback addresses only, not on {host}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(256)
    except OSError:
        listener.close()
        raise
    return listener


def serve(
    worlds: Path | Sequence[Path],
    books: Path | None,
    port: int,
    host: str = "127.0.0.1",
    port_file: Path | None = None,
) -> None:
    """Run the sandbox until SIGINT or SIGTERM; it then ends within a second.

    `port_file` receives the port once requests are answered. Raises `NotLoopback`, or `WorldError` with every fault.
    """
    listener = listen(host, port)
    try:
        app = create_app([worlds] if isinstance(worlds, Path) else list(worlds), books)
    except BaseException:
        listener.close()
        raise
    number: Any = listener.getsockname()[1]

    def ready() -> None:
        if port_file is not None:
            _write_whole(port_file, f"{number}\n")

    SandboxServer(app, ready).run(sockets=[listener])


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _write_whole(path: Path, text: str) -> None:
    # Whoever waits for the file must never read half of it.
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
