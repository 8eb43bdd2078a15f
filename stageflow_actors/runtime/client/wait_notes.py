"""`describe_waits`: what several instances wait for, for calls that wait for many of them.

It asks the broker about a few of them only, and never raises because the broker does not answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from stageflow_actors.errors import StageFlowError
from stageflow_actors.runtime.client.session import Session

__all__ = ["NOTE_SECONDS", "REASON_SECONDS", "describe_waits"]

NOTE_SECONDS = 5.0
"""Time after which a call that waits says what it waits for."""
REASON_SECONDS = 1.0
"""Longest wait for the broker's answer."""
MAX_ASKED = 20
"""Most instances that the broker is asked about."""
MAX_REASONS = 3


def describe_waits(session: Session, ids: Iterable[str]) -> tuple[str, bool]:
    """Return what the first of these instances wait for, and True if one of them waits for more than its turn.

    The text is empty if they are all at work.
    """
    try:
        found = session.wait_reasons(list(islice(ids, MAX_ASKED)), REASON_SECONDS)
    except StageFlowError:
        return "", False
    waiting: dict[str, list[str]] = {}
    is_held = False
    for instance_id, reason in found.items():
        if reason is not None:
            waiting.setdefault(reason.text, []).append(instance_id)
            is_held = is_held or not reason.is_progressing
    texts = []
    for text, those in list(waiting.items())[:MAX_REASONS]:
        who = f"{those[0]} waits" if len(those) == 1 else f"{those[0]} and {len(those) - 1} more wait"
        texts.append(f"{who} for: {text}")
    return "; ".join(texts), is_held
