"""Stages that ask something else: an endpoint, or a server over HTTP. Handlers like any other, made by the workflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stageflow_actors.definition.stage import check_id
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["RemoteCall"]


class RemoteCall:
    """Sends `command(context)` to an endpoint; its reply is taken in by `on_reply(context, reply)`.

    `timeout` is how many seconds the reply may take, None for as long as a request may by default.
    """

    __slots__ = ("command", "endpoint", "on_reply", "timeout")

    def __init__(
        self,
        endpoint: str,
        command: Callable[[Any], Any],
        on_reply: Callable[[Any, Any], Any] | None,
        timeout: float | None,
        what: str,
    ) -> None:
        self.endpoint = check_id(endpoint, f"the endpoint of {what}")
        if not callable(command):
            raise WorkflowDefinitionError(f"command of {what} must be a function of the context, not {command!r}")
        if on_reply is not None and not callable(on_reply):
            raise WorkflowDefinitionError(
                f"on_reply of {what} must be a function of (context, reply), not {on_reply!r}"
            )
        self.command = command
        self.on_reply = on_reply
        self.timeout = timeout

    def execute(self, context: Any, ctx: Any) -> Any:
        """Ask; the stage goes on when the reply is there."""
        return ctx.request(self.endpoint, self.command(context), timeout=self.timeout)
