"""`Sandbox`: a real server on a free loopback port for the length of a `with` block."""

import http.client
import json
import threading
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .app import create_app
from .desk import Desk, SandboxRefused
from .server import SandboxServer, listen
from .world import World

_START_SECONDS = 10


class Sandbox(Desk):
    """Runs worlds (files, folders or loaded ones) in a thread of this process, with books in memory or in a file.

    Leaving the block stops the server; entering again with the same books goes on where it stopped.
    """

    def __init__(self, worlds: Sequence[Path | str | World], books: Path | str | None = None) -> None:
        self._worlds = [Path(world) if isinstance(world, str) else world for world in worlds]
        self._books = Path(books) if books is not None else None
        self._port = 0

    def __enter__(self) -> Self:
        ready = threading.Event()
        listener = listen("127.0.0.1", self._port)
        try:
            self._server = SandboxServer(create_app(self._worlds, self._books), ready.set)
        except BaseException:
            listener.close()
            raise
        # The port stays the same when the block is entered again: clients keep their URLs over a restart.
        self._port = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="sandbox", daemon=True)
        self._thread.start()
        if not ready.wait(_START_SECONDS):
            raise RuntimeError("the sandbox did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()

    @property
    def url(self) -> str:
        """Return the root of every URL."""
        return f"http://127.0.0.1:{self._port}"

    def control(self, method: str, path: str, body: object = None) -> Any:
        """Send one control request and return its JSON; `SandboxRefused` when it is refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, f"/_sandbox/{path}", content)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status >= 400:
            raise SandboxRefused(text)
        return json.loads(text, parse_float=Decimal)
