"""`WorkflowRef`: a workflow as a client knows it, and `StartRequest`: the parts of a start. Nothing here sends."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from typing import Any

from msgspec import Raw

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.envelope import EMPTY_TRAIL, Envelope, encode
from stageflow_actors.core.plan import BEGIN, COORDINATOR, WorkflowPlan
from stageflow_actors.core.schema import SchemaCodec
from stageflow_actors.errors import (
    InvalidContext,
    PayloadTooLarge,
)
from stageflow_brokers.api import FLAG_CHECK, FLAG_START, FLAG_WATCH, PublishItem, Target

__all__ = ["StartRequest", "WorkflowRef", "new_instance_id"]


def new_instance_id() -> str:
    """Return 32 hex digits: 8 of the time in seconds, so that the history's index grows at its end, and 24 random."""
    return f"{int(time.time()) & 0xFFFFFFFF:08x}{_random.getrandbits(96):024x}"


_random = random.Random(os.urandom(32))
"""Seeded by the system, and again in each forked child: two processes must not make the same ids."""
os.register_at_fork(after_in_child=lambda: _random.seed(os.urandom(32)))

MAX_INSTANCE_ID_CHARACTERS = 256


class StartRequest:
    """A valid context and the id of its instance; with a digest if a user chose the id."""

    __slots__ = ("check", "data", "digest", "epoch", "history_sequence", "id")

    def __init__(self, id: str, data: bytes, digest: bytes | None, epoch: int = 1) -> None:
        self.id = id
        self.data = data
        self.digest = digest
        self.epoch = epoch
        self.history_sequence = 0
        """How many instances had left the broker when the history was last searched for this id."""
        self.check = digest is not None
        """True if an instance of that id may have finished: a user chose the id, or the broker has refused the start
        with `look-again`."""


class WorkflowRef:
    """A workflow as a client uses it: its plan, the codec of its contexts, and the target of a start."""

    __slots__ = ("codec", "first", "layout", "plan", "target", "ttl")

    def __init__(self, plan: WorkflowPlan, context: type[Any], result_types: Mapping[str, Any] | None = None) -> None:
        self.plan = plan
        without_class = context is dict and plan.shape is not None  # the class exists only in the cluster's program
        self.codec: ContextCodec[Any] = (
            SchemaCodec(plan.shape) if without_class else ContextCodec(context, result_types)
        )
        self.layout = plan.layout
        first = plan.stages[0]
        direct = first.takes_plain_message and not plan.timeout
        self.first = first.id
        self.ttl = first.ttl
        self.target = Target(first.queue, first.id) if direct else Target(COORDINATOR, BEGIN)

    def prepare(self, context: Any, instance_id: Any = None) -> StartRequest:
        """Check and encode a context for an instance of this id, or of a new id. Raises `InvalidContext`."""
        data = self.codec.prepare(context)
        if instance_id is None:
            return StartRequest(new_instance_id(), data, None)
        if not isinstance(instance_id, str) or not instance_id or not _is_valid_id(instance_id):
            raise InvalidContext(
                f"an instance id is a string of 1 to {MAX_INSTANCE_ID_CHARACTERS} characters, not {instance_id!r}"
            )
        return StartRequest(instance_id, data, self.codec.digest(data, self.plan.id))

    def is_earlier_digest(self, request: StartRequest, digest: bytes) -> bool:
        """Return True if an earlier release may have written `digest` for the input of this request."""
        return digest in self.codec.earlier_digests(request.data, self.plan.id)

    def body(self, request: StartRequest, now: float, limit: int) -> bytes:
        """Return the message that starts an instance. Raises `PayloadTooLarge` for more than `limit` bytes."""
        plan = self.plan
        body = encode(
            Envelope(
                plan.id,
                plan.version,
                self.first,
                Raw(request.data),
                EMPTY_TRAIL,
                now,
                digest=request.digest,
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

    def item(self, request: StartRequest, size: int, priority: int = 0) -> PublishItem | tuple[Any, ...]:
        """Return the item that publishes a start with a body of `size` bytes, and watches the instance."""
        if not request.check:
            return (0, size, request.id, request.epoch, FLAG_START | FLAG_WATCH, priority, 0.0, self.ttl)
        flags = FLAG_START | FLAG_WATCH | FLAG_CHECK
        return (
            0,
            size,
            request.id,
            request.epoch,
            flags,
            priority,
            0.0,
            self.ttl,
            request.digest,
            request.history_sequence,
        )


def _is_valid_id(text: str) -> bool:
    """Return True if the length is allowed and the text can be encoded: it has no lone surrogate."""
    if len(text) > MAX_INSTANCE_ID_CHARACTERS:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
