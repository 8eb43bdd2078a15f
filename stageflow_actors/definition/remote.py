"""`RemoteCall`: the handler of a remote stage, which sends a request to an endpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stageflow_actors.definition.callables import check_function, with_ctx
from stageflow_actors.definition.ids import check_id

__all__ = ["RemoteCall"]


class RemoteCall:
    """Sends `command(context)` to an endpoint and passes the reply to `on_reply(context, reply)`.

    `timeout` is in seconds; None stands for the default limit of `StageContext.request`.
    """

    __slots__ = ("_command", "command", "endpoint", "on_reply", "timeout")

    def __init__(
        self,
        endpoint: str,
        command: Callable[[Any], Any],
        on_reply: Callable[[Any, Any], Any] | None,
        timeout: float | None,
        what: str,
    ) -> None:
        self.endpoint = check_id(endpoint, f"the endpoint of {what}")
        self.command: Callable[[Any], Any] = check_function(command, f"command of {what}")
        self.on_reply: Callable[[Any, Any], Any] | None = None
        if on_reply is not None:
            self.on_reply = check_function(on_reply, f"on_reply of {what}", ("context", "reply"))
        self.timeout = timeout
        self._command: Callable[..., Any] | None = None

    def execute(self, context: Any, ctx: Any) -> Any:
        """Return the request; the stage continues when the reply has arrived."""
        if self._command is None:
            self._command = with_ctx(self.command, 1)
        return ctx.request(self.endpoint, self._command(context, ctx), timeout=self.timeout)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in RemoteCall.__slots__ if name != "_command"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._command = None
