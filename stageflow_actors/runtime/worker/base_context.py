"""`BaseContext`: the `contextvars` context of which each message gets a copy of its own.

A variable that user code sets while it handles one message is not visible to the next one. This holds for the context
of `decimal` too: it is one mutable object behind a variable, which a copy of the variables alone would share.
"""

from __future__ import annotations

import contextvars
import decimal
from collections.abc import Callable

__all__ = ["BaseContext"]


class BaseContext:
    """The context of the thread that creates it, as it is at that time.

    Attributes:
        copy: Returns a copy for one message. It is a builtin where nothing but the variables has to be copied, because
            it is called for each message.
    """

    __slots__ = ("_context", "_decimal", "copy")

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        found = [value for variable, value in self._context.items() if _is_decimal_context(variable, value)]
        self.copy: Callable[[], contextvars.Context] = self._context.copy
        if found:
            self._decimal: decimal.Context = found[0].copy()
            self.copy = self._copy_with_decimal

    def _copy_with_decimal(self) -> contextvars.Context:
        copied = self._context.copy()
        copied.run(decimal.setcontext, self._decimal.copy())
        return copied


def _is_decimal_context(variable: contextvars.ContextVar[object], value: object) -> bool:
    return variable.name == "decimal_context" and isinstance(value, decimal.Context)
