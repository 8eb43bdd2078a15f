"""What handlers did, told by themselves: one short line each in a file that is only ever appended to.

The oracle of these tests never asks the system under test alone. Workers find the file by the environment that they
inherit from the program.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "STAGEFLOW_TEST_EFFECTS"


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
