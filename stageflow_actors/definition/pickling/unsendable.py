"""Finds the object that keeps code from being sent to workers, and says by which names the code refers to it.

The search runs only after pickling has failed. It descends from an object to the part of it that cannot be sent, until
no part is left to blame. It must never change the objects it looks at.
"""

from __future__ import annotations

import contextvars
import functools
import re
import weakref
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from stageflow_actors.definition.pickling.code_pickler import check_sendable, referenced_names
from stageflow_actors.definition.pickling.importable import is_importable_class

__all__ = ["Unsendable", "find_unsendable", "is_of_runtime"]

MAX_DEPTH = 60

_ROLES = (
    (r"^.*\.services\['([^']*)'\](\[0\])?", r"service '\1'"),
    (r"^.*\.compensations\['([^']*)'\]\.(function|spec)(\.\w+)?", r"the compensation of '\1'"),
    (r"^.*\.interceptors\[(\d+)\]", r"interceptor \1"),
    (r"^.*\.parts\['([^']*)'\](\.function)?", r"\1"),
    (r"^.*\.stage\.handler(\.function)?", r""),
    (r"^.*\.stage\.spec(\.\w+)?", r""),
    (r"^.*\.stage\.(\w+)", r"\1"),
    (r"^.*\.retry", r"retry"),
    (r"^.*\.context", r"the context type"),
)
"""Names for the places of code in what a worker is sent."""

_RUNTIME_CLASSES = frozenset({"Client", "Instance"})


class Unsendable:
    """One object that cannot be sent.

    `steps` lead to it from the code: whether the label is a name of its own, and the label. `holders` are the objects
    on that way, the code first and the unsendable object last.
    """

    def __init__(self, steps: list[tuple[bool, str]], holders: list[Any], error: Exception) -> None:
        self.holders = holders
        self._steps = steps
        self._error = error

    def describe(self) -> str:
        """Return the sentence: which object, of which type, why, and what to do."""
        # The global is what the author knows; the object that it holds explains why.
        last = max((number for number, (is_name, _) in enumerate(self._steps, 1) if is_name), default=len(self._steps))
        inner = "".join(label for _, label in self._steps[last:]).lstrip(".")
        subject, culprit = self.holders[last], self.holders[-1]
        names = _names(self._steps[:last])
        chain = " -> ".join(names) or "the handler"
        shown = f"`{chain}`" if chain.isidentifier() else chain
        holds = f", which holds {_type_name(culprit)} in `{inner}`," if inner and subject is not culprit else ""
        advice = _advice(subject, culprit, names)
        return f"{shown} ({_type_name(subject)}){holds} cannot be sent to worker processes: {self._error}. {advice}"


def find_unsendable(root: Any, is_sendable: Callable[[Any], Exception | None]) -> Unsendable | None:
    """Return the object below `root` that cannot be sent; None if each of its parts can.

    `is_sendable` returns the error that pickling an object ends with, or None.
    """
    error = is_sendable(root)
    if error is None:
        return None
    steps: list[tuple[bool, str]] = []
    holders = [root]
    seen = {id(root)}
    while len(holders) < MAX_DEPTH and not _is_refused_by_its_type(holders[-1]):
        for is_name, label, part in _parts(holders[-1]):
            if id(part) in seen or isinstance(part, (str, int, float, bytes, bool, type(None))):
                continue
            failure = is_sendable(part)
            if failure is not None:
                seen.add(id(part))
                error = failure
                holders.append(part)
                steps.append((is_name, label))
                break
        else:
            break
    return Unsendable(steps, holders, error)


def _is_refused_by_its_type(value: Any) -> bool:
    """Return True if an object is refused as such, whatever its parts are."""
    try:
        check_sendable(value)
    except TypeError:
        return True
    return False


def _names(steps: list[tuple[bool, str]]) -> list[str]:
    """Return the names of the way: globals each of their own, attributes and items behind what they belong to."""
    names: list[str] = [""]
    for is_name, label in steps:
        if is_name:
            names.append(label)
        else:
            names[-1] += label
    for pattern, role in _ROLES:
        replaced, count = re.subn(pattern, role, names[0])
        if count:
            names[0] = replaced
            break
    else:
        names[0] = names[0].lstrip(".")
    if names[0].startswith("."):
        names[0] = f"the handler{names[0]}"
    return [name for name in names if name]


def _parts(holder: Any) -> Iterator[tuple[bool, str, Any]]:
    """Yield the parts of an object: whether the label is a name of its own, the label, the part."""
    if isinstance(holder, FunctionType):
        for name, value in referenced_names(holder).items():
            yield True, name, value
        for name, cell in zip(holder.__code__.co_freevars, holder.__closure__ or (), strict=False):
            try:
                yield True, name, cell.cell_contents
            except ValueError:
                continue
        arguments = holder.__code__.co_varnames[: holder.__code__.co_argcount]
        defaults = holder.__defaults__ or ()
        for name, value in zip(arguments[len(arguments) - len(defaults) :], defaults, strict=False):
            yield True, name, value
        for name, value in (holder.__kwdefaults__ or {}).items():
            yield True, name, value
        for name, value in vars(holder).items():
            yield False, "" if name == "__wrapped__" else f".{name}", value
        for name, value in holder.__annotations__.items():
            yield False, f".__annotations__[{name!r}]", value
    elif isinstance(holder, type):
        if not is_importable_class(holder):
            for name, value in list(vars(holder).items()):
                if name not in ("__dict__", "__weakref__", "__doc__"):
                    yield False, f".{name}", value
            for base in holder.__bases__:
                yield True, base.__name__, base
    elif isinstance(holder, dict):
        for key, value in list(holder.items()):
            yield False, f"[{key!r}]", value
    elif isinstance(holder, (list, tuple)):
        for number, value in enumerate(holder):
            yield False, f"[{number}]", value
    elif isinstance(holder, (set, frozenset)):
        for value in holder:
            yield False, "", value
    elif isinstance(holder, CellType):
        yield False, "", holder.cell_contents
    elif isinstance(holder, MethodType):
        yield False, "", holder.__self__
        yield False, "", holder.__func__
    elif isinstance(holder, (staticmethod, classmethod)):
        yield False, "", holder.__func__
    elif isinstance(holder, property):
        for function in (holder.fget, holder.fset, holder.fdel):
            yield False, "", function
    elif isinstance(holder, functools.partial):
        yield False, "", holder.func
        yield False, ".args", holder.args
        yield False, ".keywords", holder.keywords
    elif hasattr(holder, "cache_parameters") or isinstance(holder, functools.cached_property):
        yield False, "", getattr(holder, "__wrapped__", None) or getattr(holder, "func", None)
    else:
        yield from _state_parts(holder)


def _state_parts(holder: Any) -> Iterator[tuple[bool, str, Any]]:
    try:
        reduced = holder.__reduce_ex__(4)
    except Exception:  # noqa: BLE001 - the object itself is what cannot be sent
        return
    if isinstance(reduced, str) or len(reduced) < 2:
        return
    state = reduced[2] if len(reduced) > 2 else None
    for each in state if isinstance(state, tuple) else (state,):
        if isinstance(each, dict):
            for name, value in each.items():
                yield False, f".{name}", value
        elif each is not None:
            yield False, "", each
    for value in reduced[1]:
        yield False, "", value


def _type_name(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    name = kind.__qualname__
    return name if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{name}"


def is_of_runtime(value: Any) -> bool:
    """Return True if an object belongs to a running cluster: a Runtime, a Client, an Instance."""
    return any(
        base.__name__ in _RUNTIME_CLASSES and base.__module__.startswith("stageflow_actors.runtime.client")
        for base in type(value).__mro__
    )


def _advice(subject: Any, culprit: Any, names: list[str]) -> str:
    kind = _type_name(subject)
    name = re.sub(r"\W.*", "", names[-1]).lower() if names and re.match(r"[A-Za-z_]", names[-1]) else ""
    name = "connection" if not name or names[-1].startswith(("service", "the ", "interceptor")) else name
    factory = f'a service factory, Runtime(services={{"{name}": factory}}), and take the parameter `{name}`'
    if isinstance(subject, (FunctionType, type)):
        return "Move what it needs into a module that workers can import"
    if is_of_runtime(subject):
        return "A running cluster stays with its program: use Runtime.connect(data_dir) in the handler"
    service = re.match(r"service '([^']*)'", names[0]) if len(names) == 1 else None
    if service is not None:
        return (
            f'Give a factory in place of the value, Runtime(services={{"{service[1]}": factory}}): each worker that '
            "needs the service calls it"
        )
    if isinstance(culprit, contextvars.ContextVar):
        return (
            "Its value belongs to this process: pass the value in the context, or define the variable in a module "
            "that workers can import"
        )
    if hasattr(culprit, "gi_frame") or hasattr(culprit, "cr_frame") or hasattr(culprit, "ag_frame"):
        return "Make a list of it, or call the generator function in the handler"
    if "lock" in kind.lower() or kind.startswith("threading."):
        return (
            "It would lock nothing across processes, and a worker of concurrency=1 handles one message at a time: "
            f"remove it, make it in {factory}, or define it in a module that workers can import"
        )
    if hasattr(culprit, "fileno") and hasattr(culprit, "read"):
        return f"Open the file in the handler, by its path, or in {factory}"
    if isinstance(culprit, (weakref.ref, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)):
        return f"Use a dict, or make it in {factory}"
    return f"Make it in {factory}, or define it in a module that workers can import"
