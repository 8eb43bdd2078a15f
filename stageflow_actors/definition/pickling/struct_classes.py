"""Pickling of msgspec Structs by value: the fields of such a class cannot be set after the class is made."""

from __future__ import annotations

import inspect
import types
from typing import Any

import msgspec

__all__ = ["StructMeta", "reduce_struct"]

StructMeta: Any = type(msgspec.Struct)

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


def reduce_struct(kind: Any) -> tuple[Any, ...]:
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
        kind.__dict__.get("__orig_bases__", kind.__bases__),  # with the parameters of a generic class
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
    resolved = types.resolve_bases(bases)
    if resolved is not bases:
        namespace["__orig_bases__"] = bases
    kind = StructMeta(name, resolved, namespace, **config)
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
