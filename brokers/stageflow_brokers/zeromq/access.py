"""Access checks: only processes of this user may connect to the broker, and clients only to a broker of this user.

The broker has no passwords: a process that can open its socket may publish, settle and administer. Access is therefore
controlled by the directory of the socket, which must belong to this user and be closed to all others. The broker checks
it before it binds, and a client before it sends a frame. This module must never change the directory.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from stageflow_brokers.errors import SocketNotPrivate
from stageflow_brokers.zeromq.private_dir import privacy_problem

__all__ = ["check_address", "check_listener"]

_IPC = "ipc://"
_CREDENTIALS = struct.Struct("3i")


def check_address(address: str, *, missing_ok: bool = False) -> None:
    """Raise `SocketNotPrivate` unless `address` is a socket in a directory that only this user can access.

    With `missing_ok` the directory may not exist yet, because the broker may start later; check it again then.
    """
    name = address.removeprefix(_IPC)
    if name == address or not name or name[0] == "@":
        raise SocketNotPrivate(
            f"{address!r} is not in a private directory: a broker listens only at ipc://DIRECTORY/NAME",
            path=address,
        )
    directory = Path(name).parent
    try:
        reason = privacy_problem(directory)
    except OSError as error:
        if missing_ok:
            return
        raise SocketNotPrivate(
            f"the sockets' directory {directory} cannot be checked: {error.strerror}; create it with mode 0700",
            path=directory,
        ) from None
    if not reason:
        return
    raise SocketNotPrivate(
        f"the sockets' directory {directory} is not private: {reason}; run as the user that started the broker, or "
        "let the broker listen in a directory with mode 0700",
        path=directory,
    )


def check_listener(descriptor: int) -> None:
    """Raise `SocketNotPrivate` if a process of another user listens at the other end of this connected socket.

    A check of the directory is not enough: the connection may be older than the check. A socket that is closed already
    passes.
    """
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family != socket.AF_UNIX:
                return
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return
    process, user, _ = _CREDENTIALS.unpack(credentials)
    if user != os.geteuid():
        raise SocketNotPrivate(
            f"process {process} of user id {user} listens at the socket, but this process has user id {os.geteuid()}",
            path=f"/proc/{process}",
        )
