"""Messages between program and node over their socket pair: msgpack with a length prefix.

The node must never unpickle the code in these messages. No other process can reach the socket: the node inherits its
descriptor from the program.
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
from stageflow_actors.runtime.system.source_files import SourceFile

__all__ = ["Channel", "NodeConfig", "Register", "Report", "Scale", "Stop"]

_LENGTH = struct.Struct("<I")


class NodeConfig(Struct, tag="start"):
    """The first message to a node.

    `lock_fd` is the inherited lock of the data directory, `output_fd` the connection for output and log records,
    `levels_fd` the shared memory of `LogLevels`; -1 for none. Paths are bytes, as in the operating system: a file name
    need not be valid text.
    """

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
    interpreter_flags: list[str] = []
    worker_stop_timeout: float = 5.0
    initializer: bytes = b""
    start_timeout: float = 120.0
    sources: list[SourceFile] = []
    output_fd: int = -1
    levels_fd: int = -1


class Register(Struct, tag="register"):
    """Add workflows to a running node, which answers with the same `number`."""

    plans: list[WorkflowPlan]
    pools: list[PoolSpec]
    number: int = 0
    sources: list[SourceFile] = []


class Scale(Struct, tag="scale"):
    """Set the number of actors of a queue."""

    queue: str
    actors: int


class Stop(Struct, tag="stop"):
    """Stop the node.

    `grace`: seconds for running stages (None: until they end); `kill`: do not wait at all.
    """

    grace: float | None = None
    kill: bool = False


class Report(Struct, tag="report"):
    """A message from the node.

    `word` is `ready`, `failed`, `loaded` (the code of a request, or of the start), `scaled` (by a client in another
    process), `notice` or `stopped`; `kind` is the class name of an error, `fields` its attributes.
    """

    word: str
    text: str = ""
    kind: str = ""
    fields: dict[str, Any] = {}

    def __post_init__(self) -> None:
        # The text may contain a file name that is not valid text, which msgpack would refuse.
        self.text = self.text.encode(errors="backslashreplace").decode()


Command = NodeConfig | Register | Scale | Stop

_commands = msgspec.msgpack.Decoder(NodeConfig | Register | Scale | Stop | Report)


class Channel:
    """One end of the socket pair. `send` from any thread, `receive` from one."""

    def __init__(self, connection: socket.socket) -> None:
        # After `socket.setdefaulttimeout` in the program, sockets are made non-blocking, in both processes.
        connection.setblocking(True)
        self.connection = connection
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self.connection.fileno()

    def send(self, message: Command | Report) -> None:
        """Send a message. Raises `OSError` if the other side has closed."""
        data = msgspec.msgpack.encode(message)
        with self._lock:
            # SIGPIPE would end a program that has given it its default action.
            self.connection.sendall(_LENGTH.pack(len(data)) + data, socket.MSG_NOSIGNAL)

    def receive(self) -> Command | Report | None:
        """Wait for the next message and return it; None if the other side has closed."""
        head = self._read(_LENGTH.size)
        if head is None:
            return None
        data = self._read(_LENGTH.unpack(head)[0])
        return None if data is None else _commands.decode(data)

    def close(self) -> None:
        """Close this end; a `receive` that waits in another thread returns None."""
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
