"""`CodePickler`: pickles code of the program so that it works in a worker as after an import.

cloudpickle decides what travels by value. This pickler adds: one namespace per module (see `namespaces`), objects that
pickle by name (caches, `NewType`, `ParamSpec`, a `__reduce__` that returns a string), sentinels by reference, closures
that share variables, and names in annotations that are strings. It refuses what would lose its meaning in another
process. Nothing is pickled here that the caller does not refer to.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import inspect
import io
import itertools
import pickle
import sys
import typing
import weakref
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from stageflow_actors.definition.pickling import rebuild
from stageflow_actors.definition.pickling.importable import (
    ReferenceIndex,
    is_by_value,
    is_importable_class,
    is_stateless,
    resolve,
)
from stageflow_actors.definition.pickling.namespaces import LATER, RUN_ID, attribute_of, open_namespace
from stageflow_actors.definition.pickling.struct_classes import StructMeta, reduce_struct

__all__ = ["CodePickler", "DefinitionPickler", "Namespace", "check_sendable", "referenced_names"]

_HEAP_TYPE = 1 << 9
"""`Py_TPFLAGS_HEAPTYPE`: classes written in Python have it."""

_MODULE_ATTRIBUTES = ("__file__", "__doc__", "__package__")

_serials = itertools.count()
_tokens: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_strong_tokens: dict[int, tuple[Any, str]] = {}

_CACHE_TYPE: Any = type(functools.cache(lambda: None))
_DISPATCH_CODE = functools.singledispatch(lambda value: None).__code__  # type: ignore[attr-defined]
_TYPING_KINDS: tuple[Any, ...] = tuple(
    getattr(typing, name) for name in ("TypeVar", "ParamSpec", "TypeVarTuple", "TypeAliasType") if hasattr(typing, name)
)


def token_of(value: Any) -> str:
    """Return a name for an object of this process, the same at each dump."""
    try:
        token = _tokens.get(value)
        if token is None:
            token = _tokens[value] = f"{RUN_ID}:{next(_serials)}"
        return token
    except TypeError:  # it cannot be hashed, or has no weak references
        return _strong_tokens.setdefault(id(value), (value, f"{RUN_ID}:{next(_serials)}"))[1]


class Namespace:
    """The globals of a module that a worker cannot import."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __reduce__(self) -> tuple[Any, ...]:
        found = vars(sys.modules[self._module])
        attributes = {name: found[name] for name in _MODULE_ATTRIBUTES if isinstance(found.get(name), str)}
        return open_namespace, (self._module, {**attributes, "__name__": self._module}, RUN_ID)


class CodePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles one object. `references` are objects to pickle by reference: module, attribute, class name, by id."""

    def __init__(
        self,
        buffer: io.BytesIO,
        references: dict[int, tuple[str, str, str]] | None = None,
        index: ReferenceIndex | None = None,
    ) -> None:
        super().__init__(buffer)
        self._references = references or {}
        self._index = index or ReferenceIndex()
        self._checked_modules = {"__main__"}
        self._by_value: list[ModuleType] = []
        self._namespaces: dict[str, Namespace] = {}

    def release(self) -> None:
        """Unregister the modules that were pickled by value: other code may pickle them by name."""
        for module in self._by_value:
            cloudpickle.unregister_pickle_by_value(module)
        self._by_value.clear()

    def namespace(self, module: str) -> Namespace:
        """Return the globals of a module that is sent by value."""
        return self._namespaces.setdefault(module, Namespace(module))

    def reducer_override(self, obj: Any) -> Any:
        """Return how to rebuild an object; NotImplemented for the default of pickle and cloudpickle."""
        found = self._references.get(id(obj))
        if found is not None:
            return attribute_of, found
        kind = type(obj)
        if kind is FunctionType:
            self._check_module(obj.__module__)
            return self._reduce_function(obj)
        if issubclass(kind, type):
            if obj.__flags__ & _HEAP_TYPE:
                self._check_module(obj.__module__)
            return self._reduce_class(obj)
        if isinstance(obj, ModuleType):
            self._check_module(obj.__name__)
            return self._reduce_module(obj)
        if kind is CellType:
            return _reduce_cell(obj)
        if kind is CodeType:
            return _reduce_code(obj)
        if kind is _CACHE_TYPE or kind in _TYPING_KINDS or kind is typing.NewType:
            return self._reduce_named(obj)
        if kind is functools.cached_property:
            return functools.cached_property, (obj.func,), {"__doc__": obj.__doc__, "attrname": obj.attrname}
        check_sendable(obj)
        if kind in self.dispatch_table:
            return super().reducer_override(obj)
        if any(getattr(kind, name) is not getattr(object, name) for name in ("__reduce__", "__reduce_ex__")):
            return self._reduce_by_its_own(obj)
        if is_stateless(obj):
            return self._reduce_stateless(obj)
        return super().reducer_override(obj)

    # functions, classes, modules

    def _reduce_function(self, function: FunctionType) -> Any:
        if function.__code__ is _DISPATCH_CODE and not self._is_importable(function):
            return self._reduce_dispatcher(function)
        reduced = super().reducer_override(function)
        module: Any = function.__globals__.get("__name__")
        if reduced is NotImplemented or not is_by_value(module):
            return reduced
        if getattr(sys.modules.get(module), "__dict__", None) is not function.__globals__:
            return reduced
        state, slots = cloudpickle.cloudpickle._function_getstate(function)
        values = slots.pop("__globals__")
        slots.pop("__closure__")
        for name, value in _names_of_annotations(function.__annotations__.values(), function.__globals__):
            values.setdefault(name, value)
        where = self._where(function, function.__module__, function.__qualname__)
        token = token_of(function) if where else None
        namespace = self.namespace(module)
        made = (token, where, function.__code__, namespace, function.__name__, function.__closure__)
        return (
            rebuild.make_function,
            made,
            (token, state, slots, self._globals(values)),
            None,
            None,
            rebuild.fill_function,
        )

    def _globals(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the globals that are sent with a function."""
        return values

    def _reduce_class(self, kind: type[Any]) -> Any:
        if is_importable_class(kind):
            return super().reducer_override(kind)
        if "__msgspec_cache__" in kind.__dict__:
            # The cache that msgspec keeps on a dataclass cannot be pickled. Existing codecs keep their own
            # reference, and the next codec makes the cache again.
            delattr(kind, "__msgspec_cache__")
        reduced = reduce_struct(kind) if isinstance(kind, StructMeta) else super().reducer_override(kind)
        if reduced is NotImplemented or len(reduced) < 6:
            return reduced
        make, arguments, state, _, _, fill = reduced
        if "__slots__" in kind.__dict__ and not isinstance(kind, StructMeta) and not issubclass(kind, tuple):
            arguments, state = _with_slots(kind, arguments, state)
        where = self._where(kind, kind.__module__, kind.__qualname__)
        outer = None
        values: dict[str, Any] = {}
        if is_by_value(kind.__module__) and kind.__module__ in sys.modules:
            if "." in kind.__qualname__ and resolve(kind.__module__, kind.__qualname__) is kind:
                outer = resolve(kind.__module__, kind.__qualname__.partition(".")[0])
            names = vars(sys.modules[kind.__module__])
            annotations = [text for text in inspect.get_annotations(kind).values() if isinstance(text, str)]
            values = dict(_names_of_annotations(annotations, names))
        members = _members_of(kind) if issubclass(kind, enum.Enum) else {}
        namespace = self.namespace(kind.__module__) if values else None
        token = token_of(kind)
        return (
            rebuild.make_class,
            (token, where, kind.__qualname__, make, arguments),
            (token, fill, state, outer, members, namespace, self._globals(values)),
            None,
            None,
            rebuild.fill_class,
        )

    def _reduce_module(self, module: ModuleType) -> Any:
        name = module.__name__
        if name == "__main__" or not is_by_value(name) or sys.modules.get(name) is not module:
            return super().reducer_override(module)
        values = {key: value for key, value in vars(module).items() if not key.startswith("__")}
        return rebuild.open_module, (self.namespace(name),), values, None, None, rebuild.fill_module

    def _reduce_dispatcher(self, function: Any) -> Any:
        """`functools.singledispatch`: its cache holds weak references, its registry is what counts."""
        base = function.registry[object]
        others = [(kind, each) for kind, each in function.registry.items() if kind is not object]
        where = self._where(function, function.__module__, function.__qualname__)
        token = token_of(function)
        return rebuild.make_dispatcher, (token, where, base), (token, others), None, None, rebuild.fill_dispatcher

    # objects

    def _reduce_named(self, obj: Any) -> Any:
        """Caches and type variables, which pickle by name only."""
        name = getattr(obj, "__qualname__", obj.__name__)
        self._check_module(getattr(obj, "__module__", None))
        if self._is_importable(obj, name):
            return super().reducer_override(obj)
        where = self._where(obj, obj.__module__, name)
        token = token_of(obj)
        state: dict[str, Any] = {"__module__": obj.__module__}
        arguments: tuple[Any, ...]
        if type(obj) is _CACHE_TYPE:
            options = obj.cache_parameters()
            arguments = ("cache", obj.__wrapped__, options["maxsize"], options["typed"])
            own = {*functools.WRAPPER_ASSIGNMENTS, "__wrapped__", "cache_parameters"}
            state.update((key, value) for key, value in vars(obj).items() if key not in own)
        elif type(obj) is typing.NewType:
            arguments = ("NewType", name, obj.__supertype__)
        elif type(obj) is getattr(typing, "TypeVarTuple", None):
            arguments = ("TypeVarTuple", name)
        elif type(obj) is getattr(typing, "TypeAliasType", None):
            arguments = ("TypeAliasType", name, obj.__value__, obj.__type_params__)
        else:
            arguments = (
                type(obj).__name__,
                name,
                getattr(obj, "__constraints__", ()),
                obj.__bound__,
                obj.__covariant__,
                obj.__contravariant__,
            )
        return rebuild.make_named, (token, where, *arguments), (token, state), None, None, rebuild.fill_object

    def _reduce_by_its_own(self, obj: Any) -> Any:
        reduced = obj.__reduce_ex__(self.proto)
        if not isinstance(reduced, str):
            return reduced
        module = getattr(obj, "__module__", None) or pickle.whichmodule(obj, reduced)  # type: ignore[attr-defined]
        self._check_module(module)
        if not is_by_value(module):
            return reduced
        if isinstance(obj, enum.Enum):
            return getattr, (type(obj), obj._name_)
        token, where = token_of(obj), self._where(obj, module, reduced)
        arguments = obj.__getnewargs__() if hasattr(obj, "__getnewargs__") else ()
        state = object.__getstate__(obj)
        made = (token, where, copyreg.__newobj__, (type(obj), *arguments))  # type: ignore[attr-defined]
        return rebuild.make_object, made, (token, state), None, None, rebuild.fill_object

    def _reduce_stateless(self, obj: Any) -> Any:
        self._check_module(type(obj).__module__)
        found = self._index.find(obj)
        if found is not None:
            return attribute_of, found
        make, arguments = obj.__reduce_ex__(self.proto)[:2]
        return rebuild.make_object, (token_of(obj), None, make, arguments)

    # names

    def _where(self, obj: Any, module: Any, qualname: str) -> tuple[Namespace, str] | None:
        """Return the namespace and the name by which an object is a global of a module that is sent by value."""
        if not is_by_value(module) or "." in qualname or resolve(module, qualname) is not obj:
            return None
        return self.namespace(module), qualname

    def _is_importable(self, obj: Any, name: str | None = None) -> bool:
        module = getattr(obj, "__module__", None)
        self._check_module(module)
        return not is_by_value(module) and resolve(module, name or obj.__qualname__) is obj

    def _check_module(self, name: Any) -> None:
        """Register a module to be pickled by value if a child process cannot import it."""
        module = sys.modules.get(name) if isinstance(name, str) else None
        if module is None or name in self._checked_modules:
            return
        self._checked_modules.add(name)
        if not self._index.is_importable(name) and name not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(module)
            self._by_value.append(module)


class DefinitionPickler(CodePickler):
    """Pickles one definition of `__main__`; others that it refers to are sent as their names (`names`, by id)."""

    def __init__(self, buffer: io.BytesIO, root: Any, names: dict[int, str], index: ReferenceIndex) -> None:
        super().__init__(buffer, index=index)
        self._root = root
        self._names = names

    def persistent_id(self, obj: Any) -> str | None:
        """Return the name of another definition; None for all other objects."""
        return None if obj is self._root else self._names.get(id(obj))

    def _globals(self, values: dict[str, Any]) -> dict[str, Any]:
        # Looked up when the function is called, and therefore made after it: two caches may call each other.
        return {name: LATER if id(value) in self._names else value for name, value in values.items()}


def referenced_names(function: FunctionType) -> dict[str, Any]:
    """Return the globals that a function refers to, by name."""
    found = cloudpickle.cloudpickle._extract_code_globals(function.__code__)
    return {name: function.__globals__[name] for name in found if name in function.__globals__}


def check_sendable(obj: Any) -> None:
    """Raise `TypeError` for objects that can be pickled but would lose their meaning in another process."""
    if isinstance(obj, io.IOBase) and not isinstance(obj, (io.StringIO, io.BytesIO)):
        raise TypeError(f"an open file ({type(obj).__name__}) belongs to the process that opened it")
    if isinstance(obj, (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.ref)):
        raise TypeError(f"a {type(obj).__name__} refers to objects of the process that made it")


def _reduce_code(code: CodeType) -> Any:
    """Keep the file name, which tracebacks and `inspect` need; cloudpickle replaces it by a constant."""
    make, arguments = cloudpickle.cloudpickle._code_reduce(code)
    # Compared as text only: under `-bb`, comparing bytes with text is an error.
    return make, tuple(
        code.co_filename if isinstance(each, str) and each == "<dynamic-code>" else each for each in arguments
    )


def _reduce_cell(cell: CellType) -> Any:
    try:
        content: tuple[Any, ...] = (cell.cell_contents,)
    except ValueError:
        content = ()
    return rebuild.make_cell, (), content, None, None, rebuild.fill_cell


def _members_of(kind: type[enum.Enum]) -> dict[str, dict[str, Any]]:
    """Return the attributes that `__init__` or `__new__` of an enum has set on its members."""
    own = ("_value_", "_name_", "_sort_order_", "__objclass__")
    found = {name: {k: v for k, v in vars(each).items() if k not in own} for name, each in kind.__members__.items()}
    return {name: attributes for name, attributes in found.items() if attributes}


def _with_slots(kind: type[Any], arguments: tuple[Any, ...], state: Any) -> tuple[tuple[Any, ...], Any]:
    """Return what cloudpickle makes of a class, with its slots: without them its objects take any attribute."""
    constructor, name, bases, options, *rest = arguments
    slots = kind.__dict__["__slots__"]
    options = {**options, "__slots__": (slots,) if isinstance(slots, str) else tuple(slots)}
    attributes, more = state
    attributes = {key: value for key, value in attributes.items() if not isinstance(value, MemberDescriptorType)}
    return (constructor, name, bases, options, *rest), (attributes, more)


def _names_of_annotations(annotations: Any, names: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the types that annotations written as strings name."""
    for annotation in annotations:
        if not isinstance(annotation, str):
            continue
        try:
            found = set(_code_names(compile(annotation, "<annotation>", "eval")))
        except (SyntaxError, ValueError):
            continue
        for name in found & names.keys():
            value = names[name]
            if isinstance(value, (type, ModuleType)) or type(value).__module__ in ("typing", "types"):
                yield name, value


def _code_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _code_names(const)
        elif isinstance(const, str) and const.isidentifier():
            yield const  # a quoted name within the annotation
