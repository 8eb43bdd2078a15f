"""`LogLevels`: the program's logging set-up in shared memory, for the loggers of its other processes.

The program writes the levels of its loggers; node and workers apply them and follow later changes, so that a record
that no logger accepts costs no more than in the program. Reading costs one comparison unless something has changed.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
from typing import Any

import msgspec
from msgspec import Struct

__all__ = ["OWN_LOGGERS", "LogLevels", "LogSetup", "describe_handlers", "read_setup"]

OWN_LOGGERS = ("stageflow_actors", "stageflow_brokers")
"""The loggers of this product, for which `Config.log_level` holds."""

TABLE_BYTES = 1 << 20
"""Size of the shared memory; only the used pages exist."""

DEFAULT_LEVEL = logging.WARNING
"""The level of the root logger before it is configured, and the default of `Config.log_level`."""

_HEAD = struct.Struct("<QI")  # generation (odd during a write), length


class LogSetup(Struct, array_like=True):
    """The logging set-up of a program.

    - `root`: the level of the root logger; `levels`: those of other loggers that have one
    - `disable`: as set by `logging.disable`
    - `captures_warnings`: True after `logging.captureWarnings(True)`
    - `handlers`: a description of each handler, by which a worker recognises that the program has the same one
    """

    root: int
    levels: dict[str, int]
    disable: int = 0
    captures_warnings: bool = False
    handlers: list[str] = []

    def level_of(self, logger: logging.Logger) -> int:
        """Return the level that the logger has under this set-up."""
        name = logger.name
        while name and name != "root":
            level = self.levels.get(name)
            if level:
                return level
            name = name.rpartition(".")[0]
        return self.root


def read_setup(log_level: str) -> LogSetup:
    """Return the set-up of this process's logging.

    `log_level` is that of `Config`: it holds for the product's own loggers unless it is the default, and for all
    loggers of a program that has not configured logging.
    """
    root = logging.root
    own = logging.getLevelName(log_level)
    configured = bool(root.handlers) or root.level != DEFAULT_LEVEL
    levels = {logger.name: logger.level for logger in _loggers() if logger.level}
    if own != DEFAULT_LEVEL:
        for name in OWN_LOGGERS:
            levels.setdefault(name, own)
    return LogSetup(
        root.level if configured else own,
        levels,
        root.manager.disable,
        getattr(logging, "_warnings_showwarning", None) is not None,
        sorted({text for texts in describe_handlers().values() for text in texts}),
    )


def _loggers() -> list[logging.Logger]:
    known: list[Any] = list(logging.root.manager.loggerDict.values())
    return [one for one in known if isinstance(one, logging.Logger)]


def describe_handlers() -> dict[logging.Logger, dict[str, logging.Handler]]:
    """Return each logger's handlers by their description: logger, type, destination, format and level."""
    found: dict[logging.Logger, dict[str, logging.Handler]] = {}
    for logger in [logging.root, *_loggers()]:
        for handler in list(logger.handlers):
            formatter = handler.formatter
            text = "|".join(
                [
                    logger.name,
                    f"{type(handler).__module__}.{type(handler).__qualname__}",
                    _destination(handler),
                    str(getattr(formatter, "_fmt", formatter and type(formatter).__qualname__)),
                    str(handler.level),
                ]
            )
            found.setdefault(logger, {})[text] = handler
    return found


def _destination(handler: logging.Handler) -> str:
    name = getattr(handler, "baseFilename", None)
    if name is None:
        name = getattr(getattr(handler, "stream", None), "name", "")
    return name if isinstance(name, str) else ""


class LogLevels:
    """The shared memory with the set-up. One process writes, with `publish`; the others call `apply`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, TABLE_BYTES)
        self._generation = 0
        self._applied: LogSetup | None = None

    @classmethod
    def create(cls) -> LogLevels:
        """Create the shared memory; other processes attach to its descriptor `fd`."""
        fd = os.memfd_create("stageflow-log")
        os.ftruncate(fd, TABLE_BYTES)
        return cls(fd)

    def close(self) -> None:
        """Close memory and descriptor. Idempotent."""
        self.close_fd()
        self._memory.close()

    def close_fd(self) -> None:
        """Close the descriptor; the memory stays. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def publish(self, setup: LogSetup) -> None:
        """Write a set-up. One that is too large is written without the levels of single loggers."""
        data = msgspec.msgpack.encode(setup)
        if len(data) > TABLE_BYTES - _HEAD.size:
            data = msgspec.msgpack.encode(LogSetup(setup.root, {}, setup.disable, setup.captures_warnings))
        generation = self._generation
        _HEAD.pack_into(self._memory, 0, generation + 1, len(data))
        self._memory[_HEAD.size : _HEAD.size + len(data)] = data
        _HEAD.pack_into(self._memory, 0, generation + 2, len(data))
        self._generation = generation + 2

    def read(self) -> LogSetup | None:
        """Return the set-up; None if it is just being written."""
        generation, length = _HEAD.unpack_from(self._memory, 0)
        data = self._memory[_HEAD.size : _HEAD.size + length]
        if generation % 2 or not generation or _HEAD.unpack_from(self._memory, 0)[0] != generation:
            return None
        self._generation = generation
        return msgspec.msgpack.decode(data, type=LogSetup)

    def follow(self) -> None:
        """Apply what has changed since the last call. Cheap without a change."""
        if _HEAD.unpack_from(self._memory, 0)[0] != self._generation:
            self.apply()

    def apply(self) -> None:
        """Apply the set-up to the loggers of this process.

        Levels that have not changed in the program since the last call keep the value that this process has set.
        """
        setup = self.read()
        if setup is None:
            return
        before = LogSetup(-1, {}) if self._applied is None else self._applied
        root = logging.root
        if setup.root != before.root:
            root.setLevel(setup.root)
        for name, level in setup.levels.items():
            if before.levels.get(name) != level:
                logging.getLogger(name).setLevel(level)
        for name in before.levels.keys() - setup.levels.keys():
            logging.getLogger(name).setLevel(logging.NOTSET)
        if setup.disable != before.disable:
            logging.disable(setup.disable)
        if setup.captures_warnings != before.captures_warnings:
            logging.captureWarnings(setup.captures_warnings)
        self._applied = setup

    def current(self) -> dict[str, int]:
        """Return the levels of the loggers of this process, to be restored."""
        return {logger.name: logger.level for logger in [logging.root, *_loggers()]}

    def restore(self, levels: dict[str, int]) -> None:
        """Restore levels; loggers that are new have those of the program."""
        known = {} if self._applied is None else self._applied.levels
        for logger in [logging.root, *_loggers()]:
            level = levels.get(logger.name, known.get(logger.name, logging.NOTSET))
            if logger.level != level:
                logger.setLevel(level)

    def remove_duplicates(self) -> None:
        """Detach handlers that the program has too: it receives each record, and handles it there.

        Importing a module of the user in a worker may add them, as importing it in the program did. Loggers that the
        import has disabled are enabled again: the program's loggers decide.
        """
        known = set() if self._applied is None else set(self._applied.handlers)
        for logger, handlers in describe_handlers().items():
            for text, handler in handlers.items():
                if text in known:
                    logger.removeHandler(handler)
        for logger in _loggers():
            logger.disabled = False
