"""Options that a class declares as attributes: of a stage by its handler class, of a workflow by its own class.

Only plain data counts: functions, methods, properties and other descriptors are the class's own affair.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import FrameType, MemberDescriptorType
from typing import Any

from stageflow_actors.definition.guesses import closest

__all__ = ["attribute_options", "user_frame_level", "warn_misspelt"]

SURE_CUTOFF = 0.86
"""The likeness at which an attribute counts as misspelt: `concurency` does, and `currency` does not."""

_ABSENT = object()
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def attribute_options(owner: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the plain data among the attributes `names` of a class or object; None counts as absent."""
    found = {name: _plain_attribute(owner, name) for name in names}
    return {name: value for name, value in found.items() if value is not _ABSENT and value is not None}


def warn_misspelt(owner: Any, what: str, names: Collection[str], beside: Collection[str] = ()) -> None:
    """Warn of plain attributes whose names are almost those of options; those in `beside` are known."""
    for name in _attribute_names(owner):
        if name in names or name in beside or name.startswith("_") or name.isupper():
            continue
        meant = closest(name, names, SURE_CUTOFF)
        if meant is not None and _plain_attribute(owner, name) is not _ABSENT:
            kind = owner if isinstance(owner, type) else type(owner)
            warnings.warn(
                f"{what}: {kind.__name__} has the attribute {name!r}, which is no option and has no effect: "
                f"write {meant!r} if the option is meant, or let the name begin with '_'",
                stacklevel=user_frame_level(),
            )


def user_frame_level() -> int:
    """Return the `stacklevel` at which the caller's caller is code outside of this package."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level


def _plain_attribute(owner: Any, name: str) -> Any:
    """Return the attribute, or `_ABSENT` if it is missing or no plain data."""
    value = inspect.getattr_static(owner, name, _ABSENT)
    if isinstance(value, MemberDescriptorType):
        value = _ABSENT if isinstance(owner, type) else getattr(owner, name, _ABSENT)
    if isinstance(value, (staticmethod, classmethod)) or hasattr(type(value), "__get__"):
        return _ABSENT
    if getattr(type(value), "is_decorator", False):  # `@flow.stage` has left it there
        return _ABSENT
    return value


def _attribute_names(owner: Any) -> Iterator[str]:
    kind = owner if isinstance(owner, type) else type(owner)
    names: dict[str, None] = {}
    for each in kind.__mro__[:-1]:
        names.update(dict.fromkeys(vars(each)))
    if owner is not kind:
        names.update(dict.fromkeys(getattr(owner, "__dict__", ())))
    return iter(names)
