"""Whether a directory is this user's alone: asked on both sides of a socket. Looks, and never changes anything."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["why_not_private"]


def why_not_private(directory: Path) -> str:
    """Why others may have access to what lies in `directory`; empty if it is a directory of this user's alone.

    Raises `OSError` if it cannot be looked at.
    """
    found = directory.lstat()
    if stat.S_ISLNK(found.st_mode):
        return "it is a symbolic link, not a directory"
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a directory"
    if found.st_uid != os.geteuid():
        return f"it belongs to the user with id {found.st_uid}, and this is {os.geteuid()}"
    if stat.S_IMODE(found.st_mode) & 0o077:
        return f"others have access to it (mode {stat.S_IMODE(found.st_mode):o})"
    return ""
