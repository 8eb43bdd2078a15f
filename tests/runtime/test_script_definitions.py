"""A script's definitions in workers: whatever refers to `__main__` by name works as after an import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

FORMS = """
from __future__ import annotations
import copy, dataclasses, enum, functools, inspect, logging, multiprocessing, os, pickle, sys, threading, typing
import collections, concurrent.futures
from dataclasses import KW_ONLY, dataclass, field
from typing import Generic, NamedTuple, NewType, ParamSpec, TypedDict, TypeVar, Protocol
import msgspec
from stageflow_actors import Runtime, Workflow, StageContext, WorkflowDefinitionError

with open("runs", "a") as f: f.write(__name__ + "\\n")

UserId = NewType("UserId", int)
P = ParamSpec("P"); T = TypeVar("T"); B = TypeVar("B", bound="Order")
LOG = logging.getLogger("forms")
STDERR = sys.stderr
COUNTS = collections.Counter()
class Color(enum.Enum):
    RED = 1
    GREEN = 2
class Flag(enum.Flag):
    A = 1
    B = 2
class Named(enum.Enum):
    X = object()
    def __reduce_ex__(self, proto): return getattr, (type(self), self.name)
class ByName(enum.Enum):
    ONE = 1
    __reduce_ex__ = enum.pickle_by_global_name if hasattr(enum, "pickle_by_global_name") else enum.Enum.__reduce_ex__
ONE = ByName.ONE
class _Missing:
    def __reduce__(self): return "MISSING"
MISSING = _Missing()
SENTINEL = object()
class Stateful:
    def __init__(self, n): self.n = n
    def __reduce__(self): return "SINGLE"
SINGLE = Stateful(5)

@functools.cache
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
@functools.lru_cache(maxsize=7, typed=True)
def even(n): return True if n == 0 else odd(n - 1)
@functools.lru_cache
def odd(n): return False if n == 0 else even(n - 1)

def traced(f: typing.Callable[P, T]) -> typing.Callable[P, T]:
    @functools.wraps(f)
    def inner(*a, **k): return f(*a, **k)
    return inner

@traced
def decorated(x): return x * 2

@functools.singledispatch
def kind(x): return "any"
@kind.register
def _(x: int): return "int"
@kind.register(list)
def _l(x): return "list of " + ",".join(kind(i) for i in x)

@dataclass
class Line:
    sku: str
    price: float = 1.0
    tags: list[str] = field(default_factory=list)

@dataclass(order=True)
class Order:
    id: str
    _: KW_ONLY
    lines: list[Line] = field(default_factory=list)
    color: Color = Color.RED
    def total(self): return sum(l.price for l in self.lines)
    @functools.cached_property
    def shout(self): return self.id.upper()
    @functools.lru_cache
    def memo(self): return 1
    __hash__ = object.__hash__
    class Inner:
        z = 3

@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: int = 0
class Pair(NamedTuple):
    a: int
    b: str = "b"
class Movie(TypedDict, total=False):
    title: str
class Base:
    registry = {}
    def __init_subclass__(cls, *, tag, **k):
        super().__init_subclass__(**k); Base.registry[tag] = cls
class Sub(Base, tag="sub"):
    def hi(self): return super().__class__.__name__
class Box(Generic[T]):
    def __init__(self, v: T): self.v = v
class Part(msgspec.Struct):
    n: int
    m: int = 2
class Proto(Protocol):
    def hi(self) -> str: ...
class Unreferenced:
    v = 7
class Dispatch:
    @functools.singledispatchmethod
    def go(self, x): return "any"
    @go.register
    def _(self, x: int): return "int"
class Meta(type):
    def __call__(cls, *a): return super().__call__(*a)
class WithMeta(metaclass=Meta): pass
def square(x): return x * x
def counterpair():
    n = 0
    def inc():
        nonlocal n
        n += 1
        return n
    def get(): return n
    return inc, get
inc, get = counterpair()
CALLS = 0
def count():
    global CALLS
    CALLS += 1
    return CALLS

class Planet(enum.Enum):
    EARTH = (1.0, 2.0)
    def __init__(self, mass, radius): self.mass = mass; self.radius = radius
class Num(enum.IntEnum):
    A = enum.auto()
    @property
    def nice(self): return self.name.lower()
class Cat(msgspec.Struct, tag="cat"): n: int
class Dog(msgspec.Struct, tag="dog"): n: int
class Crate(msgspec.Struct, Generic[T]): v: T
class MetaFlag(type):
    def __new__(m, name, bases, ns, *, flag=False): c = super().__new__(m, name, bases, ns); c.flag = flag; return c
    def __init__(c, name, bases, ns, *, flag=False): super().__init__(name, bases, ns)
class WithFlag(metaclass=MetaFlag, flag=True): pass
class Private:
    __slots__ = ("__p",)
    def __init__(self): self.__p = 1
    def get(self): return self.__p
class Counting:
    def __init__(self, f): functools.update_wrapper(self, f); self.f = f; self.n = 0
    def __call__(self, *a): self.n += 1; return self.f(*a)
@Counting
def counted(x): return x + 1
class Registry(dict):
    def add(self, f): self[f.__name__] = f; return f
REGISTRY = Registry()
@REGISTRY.add
def first(): return 1
@REGISTRY.add
def second(): return REGISTRY["first"]() + 1
SHARED = [1]; HOLDS = {"shared": SHARED}

def check_all(order):
    out = {}
    def ck(name, f):
        try: out[name] = f()
        except BaseException as e: out[name] = f"{type(e).__name__}: {e}"
    rt = lambda v: pickle.loads(pickle.dumps(v))
    ck("fib", lambda: fib(20) == 6765 and fib.cache_info().hits > 0)
    ck("fibpickle", lambda: rt(fib) is fib)
    ck("even", lambda: even(6) is True and even.cache_parameters() == {"maxsize": 7, "typed": True})
    ck("newtype", lambda: rt(UserId) is UserId and UserId.__supertype__ is int and UserId.__module__ == __name__)
    ck("paramspec", lambda: rt(P) is P and rt(T) is T)
    ck("boundtv", lambda: rt(B) is B)
    ck("enum", lambda: rt(Color.RED) is Color.RED and Color(2) is Color.GREEN)
    ck("flag", lambda: rt(Flag.A | Flag.B) == Flag.A | Flag.B)
    ck("byname", lambda: rt(ByName.ONE) is ByName.ONE)
    ck("named", lambda: rt(Named.X) is Named.X)
    ck("missing", lambda: rt(MISSING) is MISSING and copy.deepcopy(MISSING) is MISSING)
    ck("single", lambda: rt(SINGLE) is SINGLE and SINGLE.n == 5)
    ck("sentinel", lambda: (lambda x=SENTINEL: x is SENTINEL)())
    ck("decorated", lambda: decorated(4) == 8 and decorated.__wrapped__(4) == 8 and rt(decorated) is decorated)
    ck("kind", lambda: [kind(1), kind("a"), kind([1, "x"])] == ["int", "any", "list of int,any"])
    fs = dataclasses.fields(Order)
    ck("dc", lambda: fs[0].default is dataclasses.MISSING and [f.kw_only for f in fs] == [False, True, True])
    ck("replace", lambda: dataclasses.replace(Line("a"), price=2.0).price == 2.0)
    ck("dcrequired", lambda: _raises(TypeError, Order))
    ck("subclass", lambda: dataclass(type("Bigger", (Line,), {"__annotations__": {"z": int}, "z": 0}))("a").z == 0)
    ck("pickledc", lambda: rt(Order("a", lines=[Line("x")])) == Order("a", lines=[Line("x")]))
    ck("hints", lambda: typing.get_type_hints(Order)["lines"] == list[Line])
    ck("fhints", lambda: typing.get_type_hints(annotated) == {"o": Order, "return": dict[str, Point]})
    ck("cachedprop", lambda: Order("a").shout == "A")
    ck("memo", lambda: Order("a").memo() == 1)
    ck("inner", lambda: rt(Order.Inner) is Order.Inner and Order.Inner.z == 3)
    ck("point", lambda: rt(Point(1)) == Point(1) and "__dict__" not in dir(Point(1)))
    ck("pair", lambda: rt(Pair(1)) == Pair(1) and Pair._field_defaults == {"b": "b"})
    ck("movie", lambda: Movie(title="a") == {"title": "a"} and Movie.__total__ is False and typing.is_typeddict(Movie))
    ck("sub", lambda: Base.registry["sub"] is Sub and isinstance(rt(Sub()), Sub))
    ck("box", lambda: rt(Box(1)).v == 1 and Box[int](2).v == 2)
    invalid = msgspec.ValidationError
    ck("part", lambda: rt(Part(1)) == Part(1) and _raises(invalid, lambda: msgspec.convert({}, Part)))
    ck("msgdc", lambda: _raises(invalid, lambda: msgspec.convert({}, Line)))
    ck("unset", lambda: MSG_UNSET is msgspec.UNSET and NODEF is msgspec.NODEFAULT)
    ck("ellipsis", lambda: (ELL is Ellipsis) and (NI is NotImplemented) and EMPTY is inspect.Parameter.empty)
    ck("mdispatch", lambda: Dispatch().go(1) == "int" and Dispatch().go("") == "any")
    ck("meta", lambda: type(rt(WithMeta())) is WithMeta)
    ck("source", lambda: "sku: str" in inspect.getsource(Line))
    ck("file", lambda: os.path.basename(sys.modules["__main__"].__file__) == os.path.basename(__file__) == "forms.py")
    ck("planet", lambda: Planet.EARTH.mass == 1.0 and Planet((1.0, 2.0)) is Planet.EARTH and Num.A.nice == "a")
    ck("tagged", lambda: msgspec.convert({"type": "dog", "n": 1}, typing.Union[Cat, Dog]) == Dog(1))
    ck("crate", lambda: msgspec.convert({"v": 1}, Crate[int]).v == 1)
    ck("metaflag", lambda: WithFlag.flag is True and type(WithFlag) is MetaFlag)
    ck("private", lambda: Private().get() == 1 and _raises(AttributeError, lambda: setattr(Private(), "q", 1)))
    ck("counted", lambda: counted(1) == 2 and counted.n == 1 and counted.__name__ == "counted")
    ck("registry", lambda: REGISTRY["second"]() == 2 and REGISTRY["first"] is first and HOLDS["shared"] is SHARED)
    ck("closure", lambda: [inc(), inc(), get()] == [1, 2, 2])
    ck("global", lambda: [count(), count(), CALLS, sys.modules[__name__].CALLS] == [1, 2, 2, 2])
    ck("log", lambda: LOG is logging.getLogger("forms") and STDERR is sys.stderr)
    ck("counts", lambda: COUNTS.update("aab") or COUNTS == {"a": 2, "b": 1})
    ck("fork", lambda: multiprocessing.get_context("fork").Pool(1).map(square, [3]) == [9])
    if __name__ != "__main__": return {k: v for k, v in out.items() if v is not True}, len(out)
    ck("lazy", lambda: getattr(sys.modules["__main__"], "Unref" + "erenced").v == 7)
    ck("lazyfn", lambda: getattr(sys.modules["__main__"], "lazy_" + "user")() == [7, 6765, True])
    ck("main", lambda: [__name__, sys.modules["__main__"].__name__, __package__ or None] == ["__main__"] * 2 + [None])
    ck("spawn", lambda: multiprocessing.get_context("spawn").Pool(1).map(square, [3]) == [9])
    ck("forkserver", lambda: multiprocessing.get_context("forkserver").Pool(1).map(square, [3]) == [9])
    spawn = multiprocessing.get_context("spawn")
    ck("ppe", lambda: concurrent.futures.ProcessPoolExecutor(1, spawn).submit(price, Line("x", 4.0)).result() == 4.0)
    return {k: v for k, v in out.items() if v is not True}, len(out)
ELL = Ellipsis; NI = NotImplemented; EMPTY = inspect._empty; MSG_UNSET = msgspec.UNSET; NODEF = msgspec.NODEFAULT
def price(line): return line.price
def annotated(o: Order) -> dict[str, Point]: return {}
def lazy_user(): return [Unreferenced.v, fib(20), lazy_other()]
def lazy_other(): return lazy_user is not None
def _raises(kind, f):
    try: f()
    except kind: return True
    return False

flow = Workflow("flow", context=Order)
@flow.stage
def all_forms(o: Order, ctx: StageContext) -> list:
    return list(check_all(o))
"""

RUN = """
with Runtime(flow, data_dir="data") as runtime:
    result = runtime.execute(flow, Order("a", lines=[Line("z")]), timeout=60)
    print(repr(result.stages[0].data or str(result.error)))
"""


def run(directory: Path, *arguments: str) -> str:
    """Return the output of a program, which must end well and write nothing to stderr."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=90, check=False, cwd=directory
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.parametrize("way", ["script", "notebook", "module that cannot be imported"])
def test_definitions_work_as_after_an_import(way: str, tmp_path: Path) -> None:
    failures: dict[str, str]
    expected: set[str]
    if way == "script":
        script = tmp_path / "forms.py"
        script.write_text(FORMS + "if __name__ == '__main__':" + RUN.replace("\n", "\n    "))
        out = run(tmp_path, str(script))
        expected = set()
    else:
        name = "__main__" if way == "notebook" else "hidden"
        text = f"""
import sys, types
sys.modules[{name!r}] = fresh = types.ModuleType({name!r})
exec(compile({FORMS!r}, "<cell 1>", "exec"), fresh.__dict__)
exec(compile({RUN!r}, "<cell 2>", "exec"), fresh.__dict__)
"""
        out = run(tmp_path, "-c", text)
        expected = {"source", "file"}  # there is no file
        if way != "notebook":
            expected.add("byname")  # of a script, workers also have definitions that the stage does not refer to
    failures, count = ast.literal_eval(out)
    assert {name: why for name, why in failures.items() if name not in expected} == {}
    assert count > 45
    runs = (tmp_path / "runs").read_text().split()
    assert len(runs) == 1, "the script is run once, by the user"
