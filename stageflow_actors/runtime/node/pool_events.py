"""What a pool is told by the supervisor, beside what the zygote reports. Values; nothing here decides anything."""

from __future__ import annotations

from msgspec import Struct

from stageflow_actors.runtime.ipc.pool_spec import PoolSpec
from stageflow_actors.runtime.zygote.handle import ZygoteHandle

__all__ = ["Cancelled", "ReplaceSpec", "Retire", "ScaleTo", "Tick", "ZygoteLost"]


class Tick:
    """Time has passed."""


class ScaleTo(Struct, frozen=True):
    """So many actors for a queue from now on."""

    queue: str
    actors: int


class ReplaceSpec(Struct, frozen=True):
    """The pool of a queue runs something else from now on: another version has been registered."""

    spec: PoolSpec


class Retire(Struct, frozen=True):
    """Start nothing more. `kill`: end the workers now."""

    kill: bool


class Cancelled(Struct, frozen=True):
    """The instance of this message has been cancelled while the worker `peer` runs it."""

    peer: int
    message_id: int


class ZygoteLost(Struct, frozen=True):
    """This zygote is gone, and with it every worker that it forked; there is another one by now."""

    zygote: ZygoteHandle
