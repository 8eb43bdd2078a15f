"""What program and node say to each other over their socket pair: length-prefixed msgpack, parent and child only.

The node never opens the code in it. Must not be reachable by anybody but the parent: it is an inherited descriptor.
"""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

import msgspec
from msgspec import Struct

from stageflow_actors.core.plan import Naming, WorkflowPlan
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec

__all__ = ["Channel", "NodeConfig", "Register", "Report", "Scale", "Stop"]

_LENGTH = struct.Struct("<I")


class NodeConfig(Struct, tag="start"):
    """The first word to a node. `lock_fd` is the inherited lock of the data directory. Paths are bytes, as the system
    has them: not every name of a file is text."""

    data_dir: bytes
    lock_fd: int
    program: int
    naming: Naming
    plans: list[WorkflowPlan]
    pools: list[PoolSpec]
    durability: str
    max_deaths: int
    max_message_bytes: int
    retention: float | None
    log_level: str
    cwd: bytes
    sys_path: list[bytes]


class Register(Struct, tag="register"):
    """Another workflow on a running node, which answers with `number`."""

    plans: list[WorkflowPlan]
    pools: list[PoolSpec]
    number: int = 0


class Scale(Struct, tag="scale"):
    """The number of actors of a queue from now on."""

    queue: str
    actors: int


class Stop(Struct, tag="stop"):
    """End. `grace`: seconds that stages in work get (None: until they are done); `kill`: do not wait for anything."""

    grace: float | None = None
    kill: bool = False


class Report(Struct, tag="report"):
    """From the node. `kind` names an error's type; `word` is `ready`, `failed`, `registered`, `scaled` (by a client in
    another process), `notice` or `stopped`."""

    word: str
    text: str = ""
    kind: str = ""
    fields: dict[str, Any] = {}

    def __post_init__(self) -> None:
        # It may name a file, and not every name of one can be sent as text.
        self.text = self.text.encode(errors="backslashreplace").decode()


Command = NodeConfig | Register | Scale | Stop

_commands = msgspec.msgpack.Decoder(NodeConfig | Register | Scale | Stop | Report)


class Channel:
    """One end of the socket pair. `send` from any thread, `receive` from one."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """To be polled."""
        return self.connection.fileno()

    def send(self, message: Command | Report) -> None:
        """Raises `OSError` when the other side is gone."""
        data = msgspec.msgpack.encode(message)
        with self._lock:
            self.connection.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> Command | Report | None:
        """The next message, waiting for it; None when the other side is gone."""
        head = self._read(_LENGTH.size)
        if head is None:
            return None
        data = self._read(_LENGTH.unpack(head)[0])
        return None if data is None else _commands.decode(data)

    def close(self) -> None:
        """Let go of it; a `receive` in another thread returns None."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.connection.close()

    def _read(self, size: int) -> bytes | None:
        chunks = []
        while size:
            try:
                chunk = self.connection.recv(min(size, 1 << 20))
            except (ConnectionError, OSError):
                return None
            if not chunk:
                return None
            chunks.append(chunk)
            size -= len(chunk)
        return b"".join(chunks)
