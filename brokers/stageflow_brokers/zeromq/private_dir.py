"""Check that only this user can access a directory, for both sides of a socket. It must never change the directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["is_protected", "privacy_problem"]


def privacy_problem(directory: Path) -> str:
    """Return why other users may have access to `directory`; an empty text if only this user has.

    Raises `OSError` if the directory cannot be read.
    """
    found = directory.lstat()
    if stat.S_ISLNK(found.st_mode):
        return "it is a symbolic link, not a directory"
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a directory"
    if found.st_uid != os.geteuid():
        return f"it belongs to user id {found.st_uid}, but this process has user id {os.geteuid()}"
    if stat.S_IMODE(found.st_mode) & 0o077:
        return f"other users have access to it (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def is_protected(directory: str) -> bool:
    """Return True if other users cannot rename, remove or replace what this user creates in the directory."""
    found = os.stat(directory)
    if found.st_uid not in (0, os.geteuid()):
        return False
    return not found.st_mode & 0o022 or bool(found.st_mode & stat.S_ISVTX)
