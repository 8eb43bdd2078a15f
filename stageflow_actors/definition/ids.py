"""Ids of workflows, stages and endpoints. They are parts of the names of queues."""

from __future__ import annotations

import re

from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["check_id"]

_ID = re.compile(r"[A-Za-z0-9._-]+")
MAX_ID_LENGTH = 200


def check_id(value: object, what: str) -> str:
    """Return `value` if it is a valid id; raise `WorkflowDefinitionError` otherwise."""
    if not isinstance(value, str):
        raise WorkflowDefinitionError(f"the id of {what} must be a string, not {value!r}")
    if not value:
        raise WorkflowDefinitionError(f"the id of {what} is empty: choose a name such as 'reserve-inventory'")
    if len(value) > MAX_ID_LENGTH:
        raise WorkflowDefinitionError(
            f"the id of {what} has {len(value)} characters, the limit is {MAX_ID_LENGTH}: {value[:60]!r}…"
        )
    if not _ID.fullmatch(value):
        raise WorkflowDefinitionError(
            f"the id {value!r} of {what} is malformed: use letters (a-z, A-Z), digits, '-', '_' and '.' "
            "(id=... sets one)"
        )
    return value
