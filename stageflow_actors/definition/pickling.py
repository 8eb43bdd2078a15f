"""Pickling of definitions, from the parent to its child processes, by cloudpickle.

cloudpickle pickles classes of `__main__` by value, with three gaps that matter for contexts: annotations that are
strings (`from __future__ import annotations`) lose the module that defines their names, a msgspec Struct loses its
fields, and a dataclass for which a codec exists is rejected. `dumps` and `loads` close these gaps, and also pickle by
value what lies in a module that a child cannot import by name. Only a child process loads the bytes, and only those
that its parent dumped: never bytes from a socket or a file.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
import pickle
import sys
import typing
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import msgspec

from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["dumps", "export_types", "import_types", "loads", "reachable_types"]

_StructMeta: Any = type(msgspec.Struct)


def dumps(value: Any, contexts: tuple[type[Any], ...] = ()) -> bytes:
    """Return `value` as bytes for `loads` in a child process; `contexts` are the context types in it.

    Raises `WorkflowDefinitionError` if something cannot be pickled.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        pickler.dump((value, [(kind, export_types(kind)) for kind in contexts if kind is not dict]))
    except WorkflowDefinitionError:
        raise
    except Exception as error:
        raise WorkflowDefinitionError(
            f"the definition cannot be sent to worker processes: {error}. A handler must not hold locks, "
            "connections or open files: make those services (Runtime(services=...))"
        ) from error
    finally:
        pickler.release()
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """Return the value that the parent passed to `dumps`."""
    value, contexts = pickle.loads(data)
    for kind, types in contexts:
        import_types(kind, types)
    return value


def export_types(context_type: type[Any]) -> dict[str, dict[str, Any]]:
    """Return the resolved annotations of the classes reachable from `context_type`, by class and field.

    Only classes with annotations that are strings are included. Raises `WorkflowDefinitionError` if a name cannot be
    resolved.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind in reachable_types(context_type):
        for owner in kind.__mro__:
            own = inspect.get_annotations(owner)
            if any(isinstance(annotation, str) for annotation in own.values()):
                hints = _hints(owner)
                found[_key(owner)] = {name: hints[name] for name in own}
    return found


def import_types(context_type: type[Any], types: dict[str, dict[str, Any]]) -> None:
    """Set the annotations that `export_types` resolved on the classes reachable from `context_type`."""
    todo: list[Any] = [context_type]
    seen: set[int] = set()
    while todo:
        kind = todo.pop()
        if id(kind) in seen:
            continue
        seen.add(id(kind))
        for owner in getattr(kind, "__mro__", ()):
            resolved = types.get(_key(owner))
            if resolved is not None:
                owner.__annotations__ = {**inspect.get_annotations(owner), **resolved}
            todo.extend(_classes_in(inspect.get_annotations(owner).values()))


def reachable_types(context_type: type[Any]) -> list[type[Any]]:
    """Return the classes with annotated fields that a context can hold, the context type first."""
    found: dict[int, type[Any]] = {}
    todo: list[Any] = [context_type]
    while todo:
        kind = todo.pop()
        if id(kind) in found:
            continue
        if not _has_fields(kind):
            continue
        found[id(kind)] = kind
        todo.extend(_classes_in(_hints(kind).values()))
    return list(found.values())


def _has_fields(kind: type[Any]) -> bool:
    return (
        dataclasses.is_dataclass(kind)
        or issubclass(kind, msgspec.Struct)
        or typing.is_typeddict(kind)
        or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
        or hasattr(kind, "__attrs_attrs__")
    )


def _hints(kind: type[Any]) -> dict[str, Any]:
    module = sys.modules.get(kind.__module__)
    names = {kind.__name__: kind}
    try:
        return typing.get_type_hints(kind, {**vars(module), **names} if module else names, names, include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise WorkflowDefinitionError(
            f"the annotations of {kind.__qualname__} cannot be resolved: {error}. "
            "Define the types that it names at the top level of its module"
        ) from error


def _classes_in(annotations: Any) -> Iterator[type[Any]]:
    for annotation in annotations:
        arguments = typing.get_args(annotation)
        if arguments:
            yield from _classes_in(arguments)
        elif isinstance(annotation, type) and annotation.__module__ != "builtins":
            yield annotation


def _key(kind: type[Any]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer)
        self._importable_modules: dict[str, bool] = {"__main__": True}
        self._by_value: list[ModuleType] = []

    def release(self) -> None:
        """Unregister the modules that were pickled by value: other code may pickle them by name."""
        for module in self._by_value:
            cloudpickle.unregister_pickle_by_value(module)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType) or (isinstance(obj, type) and obj.__flags__ & _HEAP_TYPE):
            self._check_module(obj.__module__)
        elif isinstance(obj, ModuleType):
            self._check_module(obj.__name__)
        if isinstance(obj, type) and not _is_importable_class(obj):
            if "__msgspec_cache__" in obj.__dict__:
                # The cache that msgspec keeps on a dataclass cannot be pickled. Existing codecs keep their own
                # reference, and the next codec makes the cache again.
                delattr(obj, "__msgspec_cache__")
            if isinstance(obj, _StructMeta):
                return _reduce_struct(obj)
        return super().reducer_override(obj)

    def _check_module(self, name: Any) -> None:
        """Register a module to be pickled by value if a child process cannot import it."""
        module = sys.modules.get(name) if isinstance(name, str) else None
        if module is None or name in self._importable_modules:
            return
        self._importable_modules[name] = _is_importable_module(name, module)
        if not self._importable_modules[name] and name not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(module)
            self._by_value.append(module)


_HEAP_TYPE = 1 << 9
"""`Py_TPFLAGS_HEAPTYPE`: classes written in Python have it."""


def _is_importable_module(name: str, module: ModuleType) -> bool:
    """Return True if `import name` finds this module in a process with the same import path."""
    path: Any = None
    spec = None
    parts = name.split(".")
    try:
        for count in range(1, len(parts) + 1):
            part = ".".join(parts[:count])
            found = (finder.find_spec(part, path) for finder in sys.meta_path)
            spec = next((each for each in found if each is not None), None)
            if spec is None:
                return False
            path = spec.submodule_search_locations
        file = getattr(module, "__file__", None)
        if file is None or spec is None or spec.origin is None or not spec.has_location:
            return True
        return bool(os.path.realpath(file) == os.path.realpath(spec.origin))
    except Exception:  # noqa: BLE001 - finders are foreign code; after an error the module is pickled by name
        return True


def _is_importable_class(kind: type[Any]) -> bool:
    """Return True if a child process finds the class by its name."""
    by_value = {"__main__", *cloudpickle.list_registry_pickle_by_value()}
    if any(kind.__module__ == name or kind.__module__.startswith(f"{name}.") for name in by_value):
        return False
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


_SET_BY_MSGSPEC = frozenset({"__slots__", "__dict__", "__weakref__", "__module__", "__qualname__", "__annotations__"})
_CONFIG = (
    "frozen",
    "eq",
    "order",
    "array_like",
    "gc",
    "repr_omit_defaults",
    "omit_defaults",
    "forbid_unknown_fields",
    "weakref",
    "dict",
    "cache_hash",
    "tag",
    "tag_field",
)


def _reduce_struct(kind: Any) -> tuple[Any, ...]:
    """Make the class from names and defaults first, then set the parts that may refer to the class."""
    own = inspect.get_annotations(kind)
    infos = {info.name: info for info in msgspec.structs.fields(kind)}
    parameters = inspect.signature(kind).parameters
    fields = [name for name in own if name in infos]
    defaults = {name: infos[name].default for name in fields if infos[name].default is not msgspec.NODEFAULT}
    factories = {
        name: infos[name].default_factory for name in fields if infos[name].default_factory is not msgspec.NODEFAULT
    }
    config = {name: getattr(kind.__struct_config__, name) for name in _CONFIG}
    config["kw_only"] = bool(fields) and all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in fields)
    renamed = {name: infos[name].encode_name for name in fields if infos[name].encode_name != name}
    if renamed:
        config["rename"] = renamed
    state = {
        name: value
        for name, value in kind.__dict__.items()
        if name not in _SET_BY_MSGSPEC and name not in fields and name != "__post_init__"
    }
    state["__annotations__"] = own
    post_init = kind.__dict__.get("__post_init__")
    arguments = (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
        kind.__bases__,
        fields,
        defaults,
        list(factories),
        config,
        post_init is not None,
    )
    return _make_struct, arguments, (state, factories, post_init), None, None, _fill_struct


def _make_struct(
    name: str,
    qualname: str,
    module: str,
    bases: tuple[type[Any], ...],
    fields: list[str],
    defaults: dict[str, Any],
    factories: list[str],
    config: dict[str, Any],
    has_post_init: bool,
) -> Any:
    later = {name: _LateBound() for name in factories}
    namespace: dict[str, Any] = {
        "__module__": module,
        "__qualname__": qualname,
        "__annotations__": dict.fromkeys(fields, Any),
        **defaults,
        **{name: msgspec.field(default_factory=function) for name, function in later.items()},
    }
    if has_post_init:
        late_post_init = later["__post_init__"] = _LateBound()
        namespace["__post_init__"] = lambda self: late_post_init(self)
    kind = _StructMeta(name, bases, namespace, **config)
    kind._stageflow_later = later
    return kind


def _fill_struct(kind: Any, rest: tuple[dict[str, Any], dict[str, Any], Any]) -> None:
    state, factories, post_init = rest
    later = kind._stageflow_later
    del kind._stageflow_later
    for name, factory in factories.items():
        later[name].function = factory
    if post_init is not None:
        later["__post_init__"].function = post_init
    for name, value in state.items():
        setattr(kind, name, value)


class _LateBound:
    """Stands for a function that msgspec needs when a class is made, and that may refer to the class."""

    __slots__ = ("function",)

    function: Any

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)
