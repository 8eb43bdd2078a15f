"""A user's script as a file, `python -c`, a notebook, a prompt, and under `if __name__`."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

SAGA = """
from __future__ import annotations
import sys
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from stageflow_actors import Retry, Runtime, StageContext, Workflow

class Kind(Enum):
    GIFT = "gift"

@dataclass
class Order:
    order_id: str
    total: Decimal
    lines: list[Line] = field(default_factory=list)
    kind: Kind | None = None
    reserved: bool = False

@dataclass
class Line:
    sku: str
    price: Decimal = Decimal(1)

orders = Workflow("orders", context=Order)

@orders.stage(retry=Retry.fixed(3, 0))
def reserve(order: Order) -> None:
    order.reserved = True

@reserve.compensation
def release(order: Order, ctx: StageContext) -> None:
    order.reserved = False

orders.add_stage(lambda order: order.lines.append(Line("GIFT", order.total / 2)), id="wrap")

@orders.stage
def pay(order: Order, ctx: StageContext, *, limits) -> dict[str, str]:
    assert isinstance(order.lines[-1].price, Decimal)
    if order.total > limits["most"]:
        raise ValueError("too much")
    return {"paid": str(order.total)}

def limits():
    return {"most": 100}
"""

USE = """
with Runtime(orders, data_dir=DATA, services={"limits": limits}) as runtime:
    good = runtime.execute(orders, Order("a", Decimal("9.90"), kind=Kind.GIFT), timeout=20)
    bad = runtime.execute(orders, {"order_id": "b", "total": "500"}, timeout=20)
print(good.status, good.context)
print(bad.status, bad.error, bad.context.reserved, [c.stage_id for c in bad.compensations])
print(Order is type(good.context), good.stages[2].data)
"""

EXPECTED = """\
completed Order(order_id='a', total=Decimal('9.90'), lines=[Line(sku='GIFT', price=Decimal('4.95'))], \
kind=<Kind.GIFT: 'gift'>, reserved=True)
compensated ValueError: too much False ['reserve']
True {'paid': '9.90'}
"""

REPORTED = re.compile(
    r"^\S+ \S+ (WARNING stageflow_actors\.worker: instance \S+ of workflow 'orders': attempt 1 of stage 'pay' failed: "
    r"ValueError: too much\nTraceback .*?^ValueError: too much|ERROR stageflow_actors\.node: instance [^\n]*)\n",
    re.MULTILINE | re.DOTALL,
)
"""The records of the attempt that fails, and of its instance."""


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs python with arguments; checks that it ends well, and that stderr has nothing but the expected failure."""

    def python(*arguments: str, stdin: str | None = None, quiet: bool = True) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert not quiet or REPORTED.sub("", done.stderr) == ""
        return done.stdout

    return python


def indented(text: str) -> str:
    return textwrap.indent(text, "    ")


def test_from_a_file(run: Any, tmp_path: Path) -> None:
    script = tmp_path / "saga.py"
    script.write_text(SAGA + '\nDATA = "data"\nif __name__ == "__main__":\n' + indented(USE))
    assert run(str(script)) == EXPECTED
    assert (tmp_path / "data").is_dir()


def test_from_a_file_without_a_main_guard(run: Any, tmp_path: Path) -> None:
    script = tmp_path / "saga.py"
    script.write_text(SAGA + '\nDATA = "data"\n' + USE)
    assert run(str(script)) == EXPECTED, "`__main__` is not run again in workers"


def test_from_the_command_line(run: Any) -> None:
    assert run("-c", SAGA + '\nDATA = "data"\n' + USE) == EXPECTED


def test_as_a_module_of_a_package(run: Any, tmp_path: Path) -> None:
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "saga.py").write_text(SAGA)
    (package / "__main__.py").write_text(
        "from shop.saga import *\nfrom shop.saga import limits\n"
        'DATA = "data"\nif __name__ == "__main__":\n' + indented(USE)
    )
    assert run("-m", "shop") == EXPECTED


def test_in_a_notebook_cell_by_cell(run: Any) -> None:
    """Each cell is compiled and run in the one namespace of `__main__`, which has no file."""
    notebook = f"""
import __main__
__main__.__dict__.pop("__file__", None)
for number, cell in enumerate([{SAGA!r}, "DATA = 'data'", {USE!r}]):
    exec(compile(cell, f"<cell {{number}}>", "exec"), __main__.__dict__)
"""
    assert run("-c", notebook) == EXPECTED


def test_in_a_fresh_main_as_interactive_shells_make_it(run: Any) -> None:
    script = f"""
import sys, types
sys.modules["__main__"] = fresh = types.ModuleType("__main__")
fresh.DATA = "data"
exec({SAGA + USE!r}, fresh.__dict__)
"""
    assert run("-c", script) == EXPECTED


def test_annotations_that_cannot_be_resolved_are_an_error_with_that_reason(run: Any) -> None:
    """In a namespace that is no module, a name in a string cannot be resolved."""
    script = f"""
try:
    exec({SAGA + USE!r}, {{"__name__": "__main__", "DATA": "data"}})
except Exception as error:
    print(type(error).__name__, error)
"""
    out = run("-c", script)
    assert out.startswith("WorkflowDefinitionError the annotations of Order cannot be resolved: name 'Decimal'")
    assert "top level of its module" in out


def test_typed_into_a_prompt(run: Any) -> None:
    """As `python -i < script`: each statement on its own, blocks closed by an empty line."""
    lines: list[str] = []
    for line in (SAGA + '\nDATA = "data"\n' + USE).splitlines():
        starts = bool(line) and not line[0].isspace() and not line.startswith("@")
        if starts and lines and lines[-1].startswith(" "):
            lines.append("")
        if line.startswith("@") and lines and lines[-1].startswith(" "):
            lines.append("")
        if line.strip():
            lines.append(line)
    lines = [f"_ = {line}" if line.startswith("orders.add_stage") else line for line in lines]
    assert run("-i", "-q", stdin="\n".join(lines) + "\n\nexit()\n", quiet=False) == EXPECTED


def test_without_typed_context_and_with_lambdas_only(run: Any) -> None:
    script = """
    from stageflow_actors import Runtime, Workflow
    flow = Workflow("flow").add_stage(lambda c: c.update(n=c["n"] + 1)).add_stage(lambda c: c["n"] * 2)
    with Runtime(flow, data_dir="data") as runtime:
        for result in runtime.map(flow, ({"n": n} for n in range(3))):
            print(result.context["n"], result.stages[-1].data)
    """
    assert run("-c", textwrap.dedent(script)) == "1 2\n2 4\n3 6\n"


def test_struct_context_defined_in_main(run: Any) -> None:
    script = """
    from __future__ import annotations
    import msgspec
    from stageflow_actors import Runtime, Workflow
    class Tag(msgspec.Struct, frozen=True):
        name: str
    class Job(msgspec.Struct):
        tags: list[Tag]
        seen: set[int] = msgspec.field(default_factory=set)
        def validate(self):
            if not self.tags:
                raise ValueError("no tags")
    flow = Workflow("flow", context=Job)
    @flow.stage
    def see(job: Job):
        job.seen.add(len(job.tags))
        job.tags.append(Tag("new"))
    with Runtime(flow, data_dir="data") as runtime:
        print(runtime.execute(flow, Job([Tag("a")]), timeout=20).context)
        try:
            runtime.submit(flow, Job([]))
        except Exception as error:
            print(type(error).__name__, error)
    """
    expected = "Job(tags=[Tag(name='a'), Tag(name='new')], seen={1})\nInvalidContext no tags\n"
    assert run("-c", textwrap.dedent(script)) == expected


def test_what_handlers_print_is_theirs_and_the_runtime_prints_nothing(run: Any) -> None:
    script = """
    from stageflow_actors import Runtime, Workflow
    flow = Workflow("flow").add_stage(lambda c: print("from the stage", flush=True), id="talks")
    with Runtime(flow, data_dir="data") as runtime:
        runtime.execute(flow, {}, timeout=20)
    """
    assert run("-c", textwrap.dedent(script)) == "from the stage\n"


def test_functions_redefined_between_runs_of_a_notebook_take_effect(run: Any) -> None:
    script = """
    from stageflow_actors import Runtime, Workflow
    for answer in (1, 2):
        flow = Workflow("flow").add_stage(lambda c: answer, id="only")
        with Runtime(flow, data_dir="data") as runtime:
            print(runtime.execute(flow, {}, timeout=20).stages[0].data)
    """
    assert run("-c", textwrap.dedent(script)) == "1\n2\n"


def test_a_notebook_cell_that_runs_again_while_the_runtime_runs_is_reported(run: Any) -> None:
    script = """
    from dataclasses import dataclass
    from stageflow_actors import Runtime, Workflow
    def cell():
        @dataclass
        class Order:
            name: str
        return Order, Workflow("flow", context=Order).add_stage(lambda order: order.name, id="only")
    Order, flow = cell()
    with Runtime(flow, data_dir="data") as runtime:
        Order, flow = cell()
        try:
            runtime.execute(flow, Order("a"), timeout=20)
        except Exception as error:
            print(type(error).__name__, error)
    """
    out = run("-c", textwrap.dedent(script))
    assert out.startswith("StageFlowError workflow 'flow' was registered here with another class as its context")


def test_a_program_that_reads_its_stdin_does_not_share_it(run: Any) -> None:
    script = """
    import sys
    from stageflow_actors import Runtime, Workflow
    flow = Workflow("flow").add_stage(lambda c: sys.stdin.read(), id="reads")
    with Runtime(flow, data_dir="data") as runtime:
        print(repr(runtime.execute(flow, {}, timeout=20).stages[0].data), sys.stdin.read())
    """
    assert run("-c", textwrap.dedent(script), stdin="for the program\n") == "'' for the program\n\n"
