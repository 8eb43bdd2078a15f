"""The state of each stage in another store, here Redis, written by an interceptor.

    python examples/external_state.py redis://localhost:6379/0

The journal decides what happens next; the saved state is a copy for dashboards, support desks and other services. It is
written before the stage's transition is settled, under keys that a second attempt overwrites, so that the next attempt
corrects the copy after a crash in between. Needs the package `redis`.
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
    """Save the context, the result and the attempt of each stage.

    There is one hash per instance, `{prefix}:{workflow}:{instance}`, with a field `context` and one field per stage; a
    compensation overwrites the field of its stage. Fields are JSON. With `strict`, an unreachable store fails the
    stage; without it, the error is logged.
    """

    def __init__(self, url: str, *, prefix: str = "stageflow", strict: bool = False) -> None:
        self.url = url
        self.prefix = prefix
        self.strict = strict
        self._client: redis.Redis | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Sent to the workers without its connection: each worker opens its own.
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
        if inspect.isawaitable(value):  # an async handler has only started
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
            return  # items and commands are not the state of the instance
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
    """Return the saved fields of one instance; empty if there are none."""
    saved: Any = client.hgetall(f"{prefix}:{workflow_id}:{instance_id}")
    return {field: msgspec.json.decode(value) for field, value in saved.items()}


# the workflow


@dataclass
class Order:
    """The context of one order."""

    order_id: str
    total: float
    reserved: bool = False
    paid: bool = False


orders = Workflow("orders", context=Order)


@orders.stage
def reserve(order: Order) -> dict[str, int]:
    """Take the goods from the shelf."""
    order.reserved = True
    return {"shelf": 7}


@reserve.compensation
def put_back(order: Order) -> None:
    """Put the goods back on the shelf."""
    order.reserved = False


@orders.stage
async def pay(order: Order) -> str:
    """Charge the card; it is declined above 1,000."""
    if order.total > 1_000:
        raise ValueError("the card was declined")
    order.paid = True
    return f"receipt for {order.total:g}"


def main(url: str, data_dir: str = "stageflow-data") -> list[WorkflowResult[Order]]:
    """Run two orders, and print their state as saved in Redis."""
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
