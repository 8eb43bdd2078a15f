"""`Known`: a workflow as whoever starts it knows it, and what a start of it is made of. It sends nothing."""

from __future__ import annotations

import os
import random
import time
from typing import Any

from msgspec import Raw

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.envelope import EMPTY_TRAIL, Envelope, encode
from stageflow_actors.core.plan import (
    BEGIN,
    BRANCH,
    COORDINATOR,
    MAP,
    STAGE,
    WorkflowPlan,
)
from stageflow_actors.core.schema import ShapedCodec
from stageflow_actors.errors import (
    InvalidContext,
    PayloadTooLarge,
)
from stageflow_brokers.api import FLAG_CHECK, FLAG_START, FLAG_WATCH, PublishItem, Target

__all__ = ["Known", "Prepared", "new_instance_id"]


def new_instance_id() -> str:
    """32 hex digits: 8 of the time in seconds, so that the history's index grows at its end, and 24 random ones."""
    return f"{int(time.time()) & 0xFFFFFFFF:08x}{_chance.getrandbits(96):024x}"


_chance = random.Random(os.urandom(32))
"""Seeded by the system, and again in each forked child: two processes must not make the same ids."""
os.register_at_fork(after_in_child=lambda: _chance.seed(os.urandom(32)))


class Prepared:
    """A context that was accepted: the id, the encoded context, its digest where the id was chosen by a user."""

    __slots__ = ("check", "data", "digest", "epoch", "id", "seen")

    def __init__(self, id: str, data: bytes, digest: bytes | None, epoch: int = 1) -> None:
        self.id = id
        self.data = data
        self.digest = digest
        self.epoch = epoch
        self.seen = 0
        """How much had left the broker when the history was last looked into for this id."""
        self.check = digest is not None
        """Whether an instance of that id may have finished: always so where a user chose the id, and where the broker
        says so of a start that was sent again."""


class Known:
    """A workflow as a client uses it."""

    __slots__ = ("codec", "first", "order", "plan", "target", "ttl")

    def __init__(self, plan: WorkflowPlan, context: type[Any]) -> None:
        self.plan = plan
        unseen = context is dict and plan.shape is not None  # it has a class, and that is not at hand
        self.codec: ContextCodec[Any] = ShapedCodec(plan.shape) if unseen else ContextCodec(context)
        self.order = plan.order
        first = plan.stages[0]
        plain = first.kind in (STAGE, BRANCH, MAP) and not plan.timeout
        self.first = first.id
        self.ttl = first.ttl
        self.target = Target(first.queue, first.id) if plain else Target(COORDINATOR, BEGIN)

    def prepare(self, context: Any, instance_id: Any = None) -> Prepared:
        """Accept a context for an instance of this id, or of a new one. Raises `InvalidContext`."""
        data = self.codec.prepare(context)
        if instance_id is None:
            return Prepared(new_instance_id(), data, None)
        if not isinstance(instance_id, str) or not instance_id or len(instance_id) > 256 or not _encodes(instance_id):
            raise InvalidContext(f"an instance id is a string of 1 to 256 characters, not {instance_id!r}")
        return Prepared(instance_id, data, self.codec.digest(data, self.plan.id))

    def body(self, prepared: Prepared, now: float, limit: int) -> bytes:
        """The message that starts it. Raises `PayloadTooLarge` for one of more than `limit` bytes."""
        plan = self.plan
        body = encode(
            Envelope(
                plan.id,
                plan.version,
                self.first,
                Raw(prepared.data),
                EMPTY_TRAIL,
                now,
                digest=prepared.digest,
            )
        )
        if len(body) > limit:
            raise PayloadTooLarge(
                f"the context is {len(body)} bytes as a message, over max_message_bytes={limit}; "
                "keep large data in files and pass their names",
                size=len(body),
                limit=limit,
            )
        return body

    def item(self, prepared: Prepared, size: int, priority: int = 0) -> PublishItem | tuple[Any, ...]:
        """How a body of `size` bytes is published to start it, and to be told how it ends."""
        if not prepared.check:
            return (0, size, prepared.id, prepared.epoch, FLAG_START | FLAG_WATCH, priority, 0.0, self.ttl)
        flags = FLAG_START | FLAG_WATCH | FLAG_CHECK
        return (0, size, prepared.id, prepared.epoch, flags, priority, 0.0, self.ttl, prepared.digest, prepared.seen)


def _encodes(text: str) -> bool:
    """Whether the text is Unicode that can travel: no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
