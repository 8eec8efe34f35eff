"""Playing a story of `include/sandbox` in real Airflow to its end, as a person would start it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[1]


def play(program: str, state: Path, seconds: float, *arguments: str) -> tuple[dict[str, Any], str]:
    """Play a story to its end, free of what pytest has set: its verdict, and what it said."""
    theirs = ("AIRFLOW", "PYTEST")
    story = subprocess.Popen(  # noqa: S603 - Our own program.
        [sys.executable, f"include/sandbox/{program}.py", "--state", str(state), *arguments],
        cwd=CHECKOUT,
        env={name: value for name, value in os.environ.items() if not name.startswith(theirs)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = story.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(story.pid, signal.SIGTERM)
        said, _ = story.communicate(timeout=60)
        pytest.fail(f"the story did not end:\n{said}")
    assert story.returncode == 0, said
    return json.loads((state / "demo" / f"{program}.json").read_text()), said
