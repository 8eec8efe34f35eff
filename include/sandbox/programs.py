"""Programs that the demo starts, and surely ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"

# Runs as `python -c` and then becomes the program. On Linux the kernel interrupts the program when the demo itself is
# killed outright; otherwise a killed demo would leave a whole Airflow behind.
_LAUNCH = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGINT)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the demo is gone already")
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ProgramFailed(Exception):
    """A program ended, or ended wrongly, while it was needed; the message says which, and shows its last lines."""


class Interrupted(Exception):
    """Somebody asked the demo to end: Ctrl-C, SIGTERM, or a closed terminal."""


@dataclass(frozen=True)
class Program:
    """A program that runs in the background, with the file that takes its output."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def must_run(self) -> None:
        """Raise `ProgramFailed` if it has ended."""
        status = self.process.poll()
        if status is not None:
            raise ProgramFailed(
                f"{self.name} ended with status {status}; its output: {self.log}\n{last_lines(self.log)}"
            )


@contextmanager
def running(
    name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, patience_seconds: float = 15
) -> Iterator[Program]:
    """Start `command` in a session of its own, and end it on the way out.

    A session of its own keeps Ctrl-C from reaching it directly: the demo ends its programs in order. It is asked by
    SIGINT, since `airflow standalone` leaves its children behind on SIGTERM; what is left of the session after
    `patience_seconds` is killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(os.getpid()), *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Program(name, process, log)
    finally:
        _end(process, patience_seconds)


def run(name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, timeout_seconds: float) -> None:
    """Run `command` to its end; raise `ProgramFailed` if it fails or takes longer than `timeout_seconds`."""
    with running(name, command, environment, log, patience_seconds=5) as program:
        wait_for([program], timeout_seconds)


def wait_for(programs: Sequence[Program], timeout_seconds: float) -> None:
    """Wait until all have ended well; raise `ProgramFailed` for the first that did not."""
    deadline = time.monotonic() + timeout_seconds
    for program in programs:
        try:
            status = program.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise ProgramFailed(
                f"{program.name} took longer than {timeout_seconds:.0f} s\n{last_lines(program.log)}"
            ) from None
        if status != 0:
            program.must_run()


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `Interrupted`; ignore more of them: ending takes seconds."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, _frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    before = [signal.signal(each, interrupt) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback address that nobody uses at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


def is_free(port: int) -> bool:
    """Whether a server could take `port` now."""
    with socket.socket() as probe:
        # As servers do: a port in TIME_WAIT after the last run counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def last_lines(path: Path, count: int = 15) -> str:
    """The end of a log file, indented."""
    if not path.exists():
        return "    (no output)"
    lines = path.read_text(errors="replace").splitlines()[-count:]
    return "\n".join(f"    {line}" for line in lines)


def _end(process: subprocess.Popen[bytes], patience_seconds: float) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _kill_session(process.pid)


def _kill_session(session: int) -> None:
    """Kill what is left of the session: its processes need not share one process group."""
    for pid in _all_pids():
        try:
            if os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            # It ended meanwhile, or it is somebody else's, who never is in our session.
            continue


def _all_pids() -> list[int]:
    # A small container has /proc but often no `ps`; macOS has it the other way round.
    if Path("/proc/self").exists():
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    listing = subprocess.run(["ps", "-A", "-o", "pid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid in listing.split()]
