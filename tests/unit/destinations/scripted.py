"""A server that plays scripts: whole replies, broken ones, and silence. It is no billing site, only a socket."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Script = Callable[[socket.socket], None]


def reply(status: int, body: str = "", *headers: str) -> Script:
    """Return a script that answers with a whole reply."""
    lines = [f"HTTP/1.1 {status} Any", f"Content-Length: {len(body.encode())}", "Connection: close", *headers, "", body]
    return lambda connection: connection.sendall("\r\n".join(lines).encode())


def reset(connection: socket.socket) -> None:
    """Break the connection off with a reset instead of an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


def hang_up(connection: socket.socket) -> None:
    """End the connection without a word."""
    connection.shutdown(socket.SHUT_WR)


def silence(connection: socket.socket) -> None:
    """Say nothing until the client gives up."""
    connection.settimeout(5)
    connection.recv(1)


@contextmanager
def server(*scripts: Script, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """Run a server that reads a request per connection and plays one script after the other; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)

        def serve() -> None:
            for script in scripts:
                connection, _ = listener.accept()
                with connection:
                    try:
                        wrapped = context.wrap_socket(connection, server_side=True) if context else connection
                        wrapped.settimeout(5)
                        wrapped.recv(65536)
                        script(wrapped)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"{'https' if context else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(6)
