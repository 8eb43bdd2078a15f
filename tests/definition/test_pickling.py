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
