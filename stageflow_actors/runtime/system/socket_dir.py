"""The socket directory: the private place of the broker's socket, which belongs to one data directory.

It lies below `$XDG_RUNTIME_DIR` or the directory for temporary files; where neither can be written, in the data
directory. This module must not open a socket.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from stageflow_actors.runtime.system.data_dir import DataDirUnusable
from stageflow_brokers.zeromq.private_dir import is_protected, privacy_problem
from stageflow_brokers.zeromq.socket_path import DIRECTORY_PREFIX, MAX_PATH_BYTES, directory_of, places, socket_exists

__all__ = ["is_reachable", "live_runtime_dir", "remove_runtime_dir", "runtime_dir", "runtime_path"]

_MAX_SOCKET_NAME_BYTES = 24
"""Longest name of a socket in the socket directory."""

_IN_DATA_DIR = "sockets"
"""Name of the socket directory in a data directory."""


def runtime_dir(data_dir: Path) -> Path:
    """Return the private socket directory (mode 0700) of `data_dir`; create it if it is missing.

    It is always the same for the same data directory and environment. Raises `DataDirUnusable` if other users have
    access to it.
    """
    path = runtime_path(data_dir)
    try:
        path.mkdir(mode=0o700)
        path.chmod(0o700)  # independent of the umask
    except FileExistsError:
        pass
    except OSError as error:
        raise DataDirUnusable(f"the socket directory {path} cannot be created: {error.strerror}", path=path) from error
    reason = privacy_problem(path)
    if reason:
        raise DataDirUnusable(
            f"the socket directory {path} is not private: {reason}; remove it, or set XDG_RUNTIME_DIR to a private "
            "directory",
            path=path,
        )
    return path


def runtime_path(data_dir: Path) -> Path:
    """Return the path of `runtime_dir`, which need not exist.

    The path of a Unix socket has a limit, so directories with short names are preferred. In the data directory, which
    may lie deep, the broker reaches its socket by a short name (`stageflow_brokers.zeromq.socket_path`).
    """
    # The name contains the user id: in a shared /tmp, two users may each have a /data in their container.
    digest = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:16]
    name = f"{DIRECTORY_PREFIX}{os.geteuid()}-{digest}"
    max_bytes = MAX_PATH_BYTES - _MAX_SOCKET_NAME_BYTES - len(name) - 2
    for candidate in (os.environ.get("XDG_RUNTIME_DIR", ""), _temporary_dir(), "/tmp"):
        fits = candidate and len(os.fsencode(candidate)) <= max_bytes
        if fits and os.access(candidate, os.W_OK | os.X_OK) and is_protected(candidate):
            return Path(candidate) / name
    return data_dir.absolute() / _IN_DATA_DIR


def is_reachable(address: str) -> bool:
    """Return True if a socket of the broker of `address` exists for this process."""
    return any(map(socket_exists, places(address)))


def live_runtime_dir(address: str) -> Path:
    """Return the directory in which the broker of `address` listens now, or that of `address` if none has its socket.

    The directory of the address may have been removed; see `stageflow_brokers.zeromq.socket_path.places`.
    """
    return directory_of(next(filter(socket_exists, places(address)), address))


def _temporary_dir() -> str:
    """Return the directory for temporary files; empty if there is none that can be written."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return ""


def remove_runtime_dir(path: Path) -> None:
    """Remove a directory that `runtime_dir` created, with its sockets.

    Only after the whole cluster has stopped.
    """
    if path.name.startswith(DIRECTORY_PREFIX) or path.name == _IN_DATA_DIR:
        shutil.rmtree(path, ignore_errors=True)
