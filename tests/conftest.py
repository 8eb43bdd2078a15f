"""Shared setup: import paths, hypothesis without deadlines, and `eventually`.

Generated examples have no deadline, because a busy machine is no failure.
"""

from __future__ import annotations

import signal
import sys
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

from polling import wait_until  # noqa: E402 - found by the line above


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    """`eventually(condition, what)` waits for the condition and returns its value."""
    return wait_until
