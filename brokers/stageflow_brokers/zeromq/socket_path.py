"""Paths of the broker's socket: the places where it may be, and a name that is short enough for the kernel.

The directory of the socket can vanish during the life of a cluster: a session manager removes `/run/user/UID` at
logout, and cleaners empty `/tmp`. The broker then makes the directory again, or, where it has no permission to, one of
the same name in `/tmp`; a connection that was lost looks in the same places. This module must not open a socket.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "DIRECTORY_PREFIX",
    "IPC",
    "MAX_PATH_BYTES",
    "ShortAddress",
    "directory_of",
    "places",
    "remake_directory",
    "socket_exists",
]

IPC = "ipc://"

MAX_PATH_BYTES = 107
"""Limit of Linux for the path of a Unix socket (unix(7)): `sun_path` has 108 bytes with the final zero."""

DIRECTORY_PREFIX = "stageflow-"
"""Start of the name of a socket directory outside a data directory."""

_SECOND_BASE = Path("/tmp")


def directory_of(address: str) -> Path:
    """Return the directory of the socket at `address`."""
    return Path(address.removeprefix(IPC)).parent


def places(address: str) -> tuple[str, ...]:
    """Return the addresses at which the broker of `address` may listen, the preferred one first."""
    path = Path(address.removeprefix(IPC))
    directory = path.parent
    if not directory.name.startswith(DIRECTORY_PREFIX) or directory.parent == _SECOND_BASE:
        return (address,)
    return address, f"{IPC}{_SECOND_BASE / directory.name / path.name}"


def socket_exists(address: str) -> bool:
    """Return True if there is a file at the path of the address."""
    return os.path.lexists(address.removeprefix(IPC))


def remake_directory(address: str) -> None:
    """Create the directory of the socket, with mode 0700, if it is missing. Raises `OSError` if it cannot be created.

    Its parent is never created: the data directory in which it may lie could have been removed.
    """
    directory = directory_of(address)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        return
    directory.chmod(0o700)  # independent of the umask


def _is_short_text(path: str) -> bool:
    try:
        return len(path.encode()) <= MAX_PATH_BYTES
    except UnicodeEncodeError:
        return False


class ShortAddress:
    """An address as ZeroMQ can use it.

    A socket whose path is too long, or not valid UTF-8, is reached through a descriptor of its directory. `text` is
    that address, until `close`. Raises `OSError` if such a directory is missing.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.text = address
        self._descriptor = -1
        path = address.removeprefix(IPC)
        if not _is_short_text(path):
            directory, name = os.path.split(path)
            self._descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self.text = f"{IPC}/proc/self/fd/{self._descriptor}/{name}"

    def is_current(self) -> bool:
        """Return True unless the directory of a long path has been replaced by another one."""
        if self._descriptor < 0:
            return True
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(directory_of(self.address)))
        except OSError:
            return False

    def close(self) -> None:
        """Close the descriptor; ZeroMQ must not use the address any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
