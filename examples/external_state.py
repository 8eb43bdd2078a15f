"""Each stage's state in a store of your own, here Redis: an interceptor writes it down, anybody may read it.

    python examples/external_state.py redis://localhost:6379/0

The journal stays the truth about what happens next; what is saved is a copy for dashboards, support desks and other
services. It is written before the stage's transition is settled, under keys that a second attempt writes again: a crash
in between leaves nothing that the next attempt does not put right. Needs the package `redis`.
"""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import redis

from stageflow_actors import Runtime, StageCall, Workflow, WorkflowResult

__all__ = ["SaveState", "main", "orders", "read_state"]

logger = logging.getLogger("external_state")


class SaveState:
    """Saves what each stage made of the context, what it returned, and how often it was tried.

    One hash per instance, `{prefix}:{workflow}:{instance}`: the field `context`, and one for each stage, which says how
    its compensation went once there was one. Fields are JSON. `strict`: a store that cannot be reached fails the stage,
    instead of a line in the log.
    """

    def __init__(self, url: str, *, prefix: str = "stageflow", strict: bool = False) -> None:
        self.url = url
        self.prefix = prefix
        self.strict = strict
        self._client: redis.Redis | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Travels to the workers without its connection: each makes its own.
        return _made, (self.url, self.prefix, self.strict)

    def around_stage(self, call: StageCall, next: Callable[[StageCall], Any]) -> Any:
        """Called in the worker around each attempt of each stage."""
        return self._around(call, next, "completed")

    def around_compensation(self, call: StageCall, next: Callable[[StageCall], Any]) -> Any:
        """Called in the worker around each attempt of each compensation."""
        return self._around(call, next, "compensated")

    def _around(self, call: StageCall, next: Callable[[StageCall], Any], status: str) -> Any:
        try:
            value = next(call)
        except Exception as error:
            self._save(call, "failed", None, error)
            raise
        if inspect.isawaitable(value):  # an async handler has only begun
            return self._awaited(call, value, status)
        self._save(call, status, value)
        return value

    async def _awaited(self, call: StageCall, awaitable: Awaitable[Any], status: str) -> Any:
        try:
            value = await awaitable
        except Exception as error:
            self._save(call, "failed", None, error)
            raise
        self._save(call, status, value)
        return value

    def _save(self, call: StageCall, status: str, value: Any, error: Exception | None = None) -> None:
        if call.kind in ("item", "endpoint"):
            return  # what they are given is no state of the instance
        stage = {
            "status": status,
            "attempt": call.attempt,
            "result": value,
            "error": None if error is None else f"{type(error).__name__}: {error}",
            "saved_at": time.time(),
        }
        fields: dict[Any, Any] = {f"stage:{call.stage_id}": _json(stage)}
        if error is None:
            fields["context"] = _json(call.context)
        try:
            self._connection().hset(f"{self.prefix}:{call.workflow_id}:{call.instance_id}", mapping=fields)
        except redis.RedisError:
            if self.strict:
                raise
            logger.exception("the state of %s could not be saved", call.instance_id)

    def _connection(self) -> redis.Redis:
        if self._client is None:
            self._client = redis.Redis.from_url(self.url, socket_timeout=5, decode_responses=True)
        return self._client


def _made(url: str, prefix: str, strict: bool) -> SaveState:
    return SaveState(url, prefix=prefix, strict=strict)


def _json(value: Any) -> str:
    return msgspec.json.encode(value, enc_hook=repr).decode()


def read_state(client: redis.Redis, workflow_id: str, instance_id: str, *, prefix: str = "stageflow") -> dict[str, Any]:
    """What is saved of one instance, by field; empty when nothing is."""
    saved: Any = client.hgetall(f"{prefix}:{workflow_id}:{instance_id}")
    return {field: msgspec.json.decode(value) for field, value in saved.items()}


# a workflow whose state is worth looking at


@dataclass
class Order:
    """One order on its way through the shop."""

    order_id: str
    total: float
    reserved: bool = False
    paid: bool = False


orders = Workflow("orders", context=Order)


@orders.stage
def reserve(order: Order) -> dict[str, int]:
    """Take it from the shelf."""
    order.reserved = True
    return {"shelf": 7}


@reserve.compensation
def put_back(order: Order) -> None:
    """Put it back on the shelf."""
    order.reserved = False


@orders.stage
async def pay(order: Order) -> str:
    """Charge the card, which does not cover everything."""
    if order.total > 1_000:
        raise ValueError("the card was declined")
    order.paid = True
    return f"receipt for {order.total:g}"


def main(url: str, data_dir: str = "stageflow-data") -> list[WorkflowResult[Order]]:
    """Run two orders, and show what others see of them."""
    with Runtime(orders, data_dir=data_dir, interceptors=[SaveState(url)]) as runtime:
        results = list(runtime.map(orders, [Order("ORDER-1", 99.5), Order("ORDER-2", 2_500.0)], key="order_id"))
    with redis.Redis.from_url(url, decode_responses=True) as client:
        for result in results:
            print(f"{result.instance_id}: {result.status.value}")
            for field, value in sorted(read_state(client, "orders", result.instance_id).items()):
                print(f"  {field}: {msgspec.json.encode(value).decode()}")
    return results


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379/0")
