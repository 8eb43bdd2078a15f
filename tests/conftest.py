"""Shared setup: import paths, hypothesis without deadlines, and `eventually`.

Generated examples have no deadline, because a busy machine is no failure.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would every program that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "fixtures"), str(HERE.parent / "scripts")]

settings.register_profile("stageflow", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("stageflow")

PATIENCE = 20.0
"""Seconds after which something that should happen at once is given up on."""


def wait_until(condition: Callable[[], Any], what: str = "the condition", patience: float = PATIENCE) -> Any:
    """The first true value of `condition`; fails when it takes too long."""
    deadline = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true within {patience:g} s; it is {value!r}"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    """`eventually(condition, what)` waits until the condition holds and gives its value."""
    return wait_until
