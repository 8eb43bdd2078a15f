"""What the handlers of these tests do: as the context tells them, leaving a line in a file that is only appended to.

The oracle never asks the system under test alone. Workers find the file by the environment that they inherit, and
this module by the program's `sys.path`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stageflow_actors import StageContext

VARIABLE = "STAGEFLOW_LANGUAGE_EFFECTS"


def note(*words: object) -> None:
    """Append one line; a worker that dies right after has still written it."""
    line = "\t".join(str(word) for word in words) + "\n"
    fd = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def noted(*beginning: object) -> list[tuple[str, ...]]:
    """The lines that begin with these words, without them, in the order they were written."""
    path = Path(os.environ[VARIABLE])
    wanted = tuple(str(word) for word in beginning)
    lines = [tuple(line.split("\t")) for line in path.read_text().splitlines()] if path.exists() else []
    return [line[len(wanted) :] for line in lines if line[: len(wanted)] == wanted]


def wait_for_file(path: str) -> None:
    """A handler at work until the test lets it go on."""
    while not os.path.exists(path):
        time.sleep(0.005)


def misbehave(what: str) -> None:
    """Fail in the way that is asked for."""
    if what == "raise":
        raise ValueError("boom failed")
    if what == "die":
        os._exit(5)
    if what == "hang":
        time.sleep(60)
    if what.startswith("/"):
        wait_for_file(what)
    if what.startswith("raise after "):
        wait_for_file(what.removeprefix("raise after "))
        raise ValueError("boom failed")


def trouble(context: dict[str, Any], name: str, attempt: int) -> str:
    """What is to befall this attempt: `context["fail"][name]` says so for each attempt, or for one after the other."""
    plan = context.get("fail", {}).get(name, "")
    if isinstance(plan, str):
        return plan
    return plan[attempt - 1] if attempt <= len(plan) else ""


def does(name: str, result: Any = None) -> Callable[..., Any]:
    """A handler that notes its call, sets the fields that the context says, and may fail."""

    def handle(context: dict[str, Any], ctx: StageContext) -> Any:
        note(ctx.instance_id, "did", name, ctx.attempt)
        context.update(context.get("set", {}).get(name, {}))
        misbehave(trouble(context, name, ctx.attempt))
        return {"by": name} if result is None else result

    return handle


def undoes(name: str) -> Callable[..., Any]:
    """Its compensation: notes what it is given, and may fail."""

    def compensate(context: dict[str, Any], ctx: StageContext) -> None:
        note(ctx.instance_id, "undid", name, ctx.attempt)
        context.setdefault("undone", []).append(name)
        misbehave(trouble(context, f"undo-{name}", ctx.attempt))

    return compensate


def done(instance_id: str) -> list[str]:
    """The stages that an instance has called, in order, each attempt."""
    return [words[0] for words in noted(instance_id, "did")]


def undone(instance_id: str) -> list[str]:
    """The compensations that an instance has called, in order, each attempt."""
    return [words[0] for words in noted(instance_id, "undid")]
