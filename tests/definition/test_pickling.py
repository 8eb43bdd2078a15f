"""Definitions of a program's `__main__` keep their types in a child process."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors.definition.pickling import dumps, export_types, loads
from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.errors import WorkflowDefinitionError

PARENT = """
from __future__ import annotations
import subprocess, sys
from dataclasses import dataclass, field
from datetime import datetime, UTC
from decimal import Decimal
from enum import Enum
from typing import Annotated, ClassVar, Optional
import msgspec
from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.definition.pickling import dumps
from stageflow_actors.definition.workflow import Workflow

class Color(Enum):
    red = 1

@dataclass
class Line:
    price: Decimal
    color: Color = Color.red
    sub: list[Line] = field(default_factory=list)

class Base(msgspec.Struct):
    sku: str

class Part(Base, rename="camel", kw_only=True, omit_defaults=True):
    unit_weight: Annotated[Decimal, "kg"]
    known: ClassVar[dict] = {}
    sizes: list[int] = []
    mother: Optional[Part] = None
    bulk: bool = False

    def __post_init__(self):
        self.bulk = self.unit_weight > 100 or isinstance(self.mother, Part)

    def heavier(self):
        return Part(sku=self.sku, unit_weight=self.unit_weight + 1)

    @property
    def label(self):
        return f"{self.sku}!"

@dataclass
class Order:
    placed: datetime
    lines: dict[str, Line]
    part: Part
    parts: list[Part] = field(default_factory=list)

    def validate(self):
        assert isinstance(self.part, Part)

orders = Workflow("orders", context=Order)
parts = Workflow("parts", context=Part)

@orders.stage
def price(order: Order):
    order.part = order.part.heavier()
    order.lines["b"] = Line(Decimal(2), sub=[Line(Decimal(3))])

@price.compensation
def unprice(order: Order):
    return Color.red

parts.add_stage(lambda part: Part(sku=part.label, unit_weight=part.unit_weight, mother=part))

order = Order(datetime(2026, 1, 1, tzinfo=UTC), {"a": Line(Decimal("1.5"))}, Part(sku="p", unit_weight=Decimal(5)))
codec = ContextCodec(Order)
data = codec.prepare(order)
part = ContextCodec(Part).prepare(order.part)
shipped = dumps((orders, parts), contexts=(Order, Part))
sent = len(shipped).to_bytes(4, "big") + len(data).to_bytes(4, "big") + shipped + data + part
child = subprocess.run([sys.executable, "-c", CHILD], input=sent, stdout=subprocess.PIPE, check=True).stdout
cut = int.from_bytes(child[:4], "big")
back = codec.decode(child[4:4 + cut])
assert back.part == Part(sku="p", unit_weight=Decimal(6)), back
assert back.lines == {"a": Line(Decimal("1.5")), "b": Line(Decimal(2), sub=[Line(Decimal(3))])}, back
assert back.placed == order.placed
made = ContextCodec(Part).decode(child[4 + cut:])
assert made == Part(sku="p!", unit_weight=Decimal(5), mother=order.part), made
print("arrived")
"""

CHILD = """
import sys
from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.definition.pickling import loads
from stageflow_actors.errors import InvalidContext

sent = sys.stdin.buffer.read()
cut = 8 + int.from_bytes(sent[:4], "big")
orders, parts = loads(sent[8:cut])
data, part = sent[cut:cut + int.from_bytes(sent[4:8], "big")], sent[cut + int.from_bytes(sent[4:8], "big"):]
codec = ContextCodec(orders.context)
order = codec.decode(data)
order.validate()
orders.stages[0].spec.bind({})(order, None)
assert orders.stages[0].compensation.spec.bind({})(order, None).name == "red"
answer = codec.encode(order)
try:
    codec.prepare({"placed": "yesterday", "lines": {}, "part": {"sku": "p", "unitWeight": 1}})
except InvalidContext as error:
    assert error.field == "placed", error
else:
    raise SystemExit("a wrong field was taken")
parts_codec = ContextCodec(parts.context)
made = parts.stages[0].spec.bind({})(parts_codec.decode(part), None)
assert type(made) is parts.context and made.bulk and made.sizes == [] and not parts_codec.decode(part).bulk
sys.stdout.buffer.write(len(answer).to_bytes(4, "big") + answer + parts_codec.encode(made))
"""


@pytest.mark.parametrize("way", ["file", "command"])
def test_types_of_main_with_string_annotations_arrive_whole(way: str, tmp_path: Path) -> None:
    program = PARENT.replace("import subprocess, sys", f"import subprocess, sys\nCHILD = {CHILD!r}", 1)
    if way == "file":
        script = tmp_path / "program.py"
        script.write_text(program)
        command = [sys.executable, str(script)]
    else:
        command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("arrived", 0), done.stderr


def test_resolved_types_need_no_export() -> None:
    assert export_types(dict) == {}


def test_a_handler_that_holds_a_lock_is_refused_with_advice() -> None:
    lock = threading.Lock()

    def handler(order: Any) -> None:
        with lock:
            pass

    with pytest.raises(WorkflowDefinitionError, match=r"cannot be sent to worker processes: .*lock.*services"):
        dumps(Workflow("w").add_stage(handler))


def test_a_dict_workflow_needs_no_types() -> None:
    workflow = loads(dumps(Workflow("w").add_stage(lambda order: order["a"]), contexts=(dict,)))
    assert workflow.stages[0].spec.bind({})({"a": 5}, None) == 5


UNSENDABLE = """
import contextvars, functools, io, socket, sqlite3, sys, threading, weakref
from stageflow_actors import Runtime, Workflow, WorkflowDefinitionError
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.definition.services import inspect_services
from stageflow_actors.runtime.ipc.pool_spec import pool_specs

LOCK = threading.Lock()
EVENT = threading.Event()
LOCAL = threading.local()
VAR = contextvars.ContextVar("VAR", default=1)
DB = sqlite3.connect(":memory:")
FILE = open(__file__)
GEN = (n for n in range(3))
SOCK = socket.socket()
WEAK = weakref.WeakValueDictionary()
CONFIG = {"db": [DB]}
RUNTIME = Runtime(Workflow("w").add_stage(lambda j: 1, id="x"))

def helper(j):
    return LOCK.locked()

@functools.cache
def cached():
    return LOCK

def local():
    connection = DB
    return lambda j: connection

class Holder:
    lock = LOCK
    def execute(self, j): pass

class Charge:
    def __init__(self): self.connection = DB
    def execute(self, j): pass

def service():
    return DB

def uses(j, *, db): pass

stages = [
    lambda j: LOCK, lambda j: EVENT, lambda j: LOCAL, lambda j: VAR, lambda j: DB, lambda j: FILE, lambda j: GEN,
    lambda j: SOCK, lambda j: WEAK, lambda j: CONFIG, lambda j: RUNTIME, lambda j: helper(j), lambda j: cached(),
    local(), Holder, Charge(), uses,
]
for stage in stages:
    flow = Workflow("flow").add_stage(lambda j: 1, id="fine").add_stage(stage, id="bad")
    try:
        pool_specs(flow, compile_plan(flow, Naming("s.", "c.")), inspect_services({"db": service}))
        print("sent")
    except WorkflowDefinitionError as error:
        print(error)

# What a module that workers import has, they find there; the standard streams and loggers by name.
from importable import CLIENT, EMPTY, TABLE_LOCK, _private_lock, local_handler
import logging
LOG, OUT = logging.getLogger("a.b"), sys.stdout
sent = [local_handler(), lambda j: _private_lock, lambda j: TABLE_LOCK]
sent += [lambda j: CLIENT, lambda j: (LOG, OUT), lambda j, empty=EMPTY: empty is EMPTY]
for stage in sent:
    flow = Workflow("flow").add_stage(stage, id="good")
    pool_specs(flow, compile_plan(flow, Naming("s.", "c.")), {})
    print("sent")
"""

REFUSALS = """\
`LOCK` (_thread.lock) cannot be sent
`EVENT` (threading.Event), which holds _thread.lock in `_cond._lock`, cannot be sent
`LOCAL` (_thread._local) cannot be sent
`VAR` (_contextvars.ContextVar) cannot be sent
`DB` (sqlite3.Connection) cannot be sent
`FILE` (_io.TextIOWrapper) cannot be sent
`GEN` (generator) cannot be sent
`SOCK` (socket.socket) cannot be sent
`WEAK` (weakref.WeakValueDictionary) cannot be sent
`CONFIG` (dict), which holds sqlite3.Connection in `['db'][0]`, cannot be sent
`RUNTIME` (stageflow_actors.runtime.runtime.Runtime)
helper -> LOCK (_thread.lock) cannot be sent
cached -> LOCK (_thread.lock) cannot be sent
`connection` (sqlite3.Connection) cannot be sent
the handler.lock (_thread.lock) cannot be sent
the handler.connection (sqlite3.Connection) cannot be sent
service 'db' -> DB (sqlite3.Connection) cannot be sent
"""


def test_what_cannot_be_sent_is_named_with_its_stage_and_the_way_to_it(tmp_path: Path) -> None:
    (tmp_path / "importable.py").write_text(
        "import threading\nTABLE_LOCK = threading.Lock()\n_private_lock = threading.Lock()\nEMPTY = object()\n"
        "def local_handler():\n    return lambda j: _private_lock.locked()\n"
        "class Client:\n    def __init__(self): self.lock = threading.Lock()\nCLIENT = Client()\n"
    )
    script = tmp_path / "program.py"
    script.write_text(UNSENDABLE)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60)
    lines = done.stdout.splitlines()
    expected = REFUSALS.splitlines()
    for line, text in zip(lines, expected, strict=False):
        assert line.startswith(f"stage 'bad' of workflow 'flow': {text}"), done.stderr
    assert lines[len(expected) :] == ["sent"] * 6, done.stderr
    assert "Runtime.connect(data_dir)" in lines[expected.index(next(t for t in expected if "RUNTIME" in t))]
    assert 'services={"lock": factory}' in lines[0]


class _Refuses:
    def __reduce__(self) -> Any:
        raise LookupError("no such shop")


def test_an_object_that_cannot_be_sent_is_reported_without_the_traceback_of_the_pickler() -> None:
    with pytest.raises(WorkflowDefinitionError, match=r"_thread\.lock") as caught:
        dumps(threading.Lock(), what="stage 'pay'")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_an_error_of_the_users_reduce_keeps_its_traceback() -> None:
    with pytest.raises(WorkflowDefinitionError, match="no such shop") as caught:
        dumps(_Refuses(), what="stage 'pay'")
    assert isinstance(caught.value.__cause__, LookupError)
