"""Who may come to the socket, and whose socket a client has come to: this user, and nobody else.

The broker asks no password: whoever can open its socket may publish, settle what he holds, and administer. So the
directory in which the socket lies is the door. It must belong to this user and be closed to all others, on the broker's
side before it binds and on the client's before it says a word. This module must never change what it finds.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from stageflow_brokers.errors import SocketNotPrivate
from stageflow_brokers.zeromq.private_dir import why_not_private

__all__ = ["check_address", "check_listener"]

_IPC = "ipc://"
_CREDENTIALS = struct.Struct("3i")


def check_address(address: str, *, missing_ok: bool = False) -> None:
    """Raises `SocketNotPrivate` unless `address` is a socket in a directory of this user's alone.

    With `missing_ok` there may be nothing yet: the broker may come later. What is there then is looked at then.
    """
    name = address.removeprefix(_IPC)
    if name == address or not name or name[0] == "@":
        raise SocketNotPrivate(
            f"{address!r} has no door that others are kept out by: a broker listens at ipc://DIRECTORY/NAME only",
            path=address,
        )
    directory = Path(name).parent
    try:
        reason = why_not_private(directory)
    except OSError as error:
        if missing_ok:
            return
        raise SocketNotPrivate(
            f"the sockets' directory {directory} cannot be looked at: {error.strerror}; make it, with mode 0700",
            path=directory,
        ) from None
    if not reason:
        return
    raise SocketNotPrivate(
        f"the sockets' directory {directory} is not private: {reason}; work as the user who started the broker, or "
        "have it listen in a directory with mode 0700",
        path=directory,
    )


def check_listener(descriptor: int) -> None:
    """Raises `SocketNotPrivate` if another user's process listens at the other end of this connected socket: that its
    directory is ours when we look says nothing of a connection made a moment before. One that has gone is nobody's.
    """
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family != socket.AF_UNIX:
                return
            told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return
    process, user, _ = _CREDENTIALS.unpack(told)
    if user != os.geteuid():
        raise SocketNotPrivate(
            f"process {process} of the user with id {user} listens there, and this is user {os.geteuid()}",
            path=f"/proc/{process}",
        )
