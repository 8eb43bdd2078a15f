"""The messages that the supervisor sends to a pool, apart from the zygote's reports.

Values only: nothing here decides anything.
"""

from __future__ import annotations

from msgspec import Struct

from stageflow_actors.runtime.ipc.pool_spec import PoolSpec
from stageflow_actors.runtime.zygote.handle import ZygoteHandle

__all__ = ["Cancelled", "ReplaceSpec", "ScaleTo", "ShutDown", "Tick", "ZygoteLost"]


class Tick:
    """Time has passed: check timeouts, memory limits and unreported exits."""


class ScaleTo(Struct, frozen=True):
    """Change the number of actors of a queue."""

    queue: str
    actors: int


class ReplaceSpec(Struct, frozen=True):
    """Replace the specification of a queue's pool: another version has been registered."""

    spec: PoolSpec


class ShutDown(Struct, frozen=True):
    """Start no more workers. End the idle ones, as at the end of a Python program, and kill those that run a message.

    With `kill`, kill all of them now.
    """

    kill: bool


class Cancelled(Struct, frozen=True):
    """The instance of this message has been cancelled while the worker `peer` held the message."""

    peer: int
    message_id: int


class ZygoteLost(Struct, frozen=True):
    """This zygote has died, and with it every worker that it forked. Its successor has been started."""

    zygote: ZygoteHandle
