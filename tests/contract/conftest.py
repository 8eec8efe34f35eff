"""What the contract tests share: the sandbox's worlds, as their files describe them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from usage_billing.sandbox import Sandbox

WORLDS = Path(__file__).parents[2] / "include" / "sandbox" / "worlds"


@pytest.fixture(scope="module")
def running() -> Iterator[Sandbox]:
    """Run every world once for the whole module."""
    with Sandbox([WORLDS]) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running: Sandbox) -> Sandbox:
    """Give each test the worlds as their files describe them."""
    running.clear_faults()
    running.reset()
    running.reset_requests()
    return running
