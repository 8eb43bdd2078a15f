"""Each construct in the index of `examples/constructs.md` has an example, and each example does what it shows."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import Runtime, Workflow, WorkflowResult
from stageflow_actors.testing import run

PAGE = (Path(__file__).resolve().parents[2] / "examples" / "constructs.md").read_text("utf-8")
CONSTRUCTS = PAGE.partition("\n## Testing a workflow\n")[0]  # the block behind it is a program of its own
INDEX = re.findall(r"^\| \[(.+?)\]\(#.+?\) \| [^|]+ \|$", CONSTRUCTS, re.MULTILINE)
PRELUDE = re.findall(r"^```python\n(.*?)^```$", CONSTRUCTS, re.DOTALL | re.MULTILINE)[0]
EXAMPLES = dict(
    re.findall(r"^### ([^\n]+)\n(?:(?!^#)[^\n]*\n)*?```python\n(.*?)^```$", CONSTRUCTS, re.DOTALL | re.MULTILINE)
)


class Example:
    """One example, read as a program of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        # As a script: what is defined here travels to workers by value.
        self.names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(PRELUDE, "constructs.md", "exec"), self.names)
        self.names["runtime"] = Runtime(self.flow, data_dir=folder / "data")
        self._name = name

    def read(self, **replacements: str) -> Workflow[Any]:
        """Execute it, with some words replaced by others."""
        code = EXAMPLES[self._name]
        for word, other in replacements.items():
            code = code.replace(word.replace("_", "."), other)
        exec(compile(code, f"constructs.md: {self._name}", "exec"), self.names)
        return self.flow

    @property
    def flow(self) -> Workflow[Any]:
        return self.names["flow"]  # type: ignore[no-any-return]

    def run(self, context: Any, **options: Any) -> WorkflowResult[Any]:
        """In this process."""
        return run(self.read(), context, **options)

    def serve(self, context: Any) -> WorkflowResult[Any]:
        """In worker processes."""
        self.read()
        with self.names["runtime"] as runtime:
            result: WorkflowResult[Any] = runtime.execute(self.flow, context, timeout=30)
            return result


@pytest.fixture
def example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Example:
    monkeypatch.chdir(tmp_path)  # where a runtime keeps its data that is not told where
    return Example(name, tmp_path)


def test_each_construct_of_the_index_has_an_example_and_each_example_is_in_the_index() -> None:
    assert list(EXAMPLES) == INDEX
    assert len(INDEX) >= 30
    assert sorted(INDEX) == sorted([*IN_PROCESS, *SERVED, *OTHERS])


def test_each_construct_has_one_block() -> None:
    assert CONSTRUCTS.count("```python") == 1 + len(EXAMPLES)


IN_PROCESS: dict[str, tuple[Any, Callable[[WorkflowResult[Any]], object], object]] = {
    "stage": ({"name": "cat"}, lambda result: result.stages[0].data, "cat at 200 px"),
    "typed context": ({"total": 2.5}, lambda result: (result.context.total, result.stages[0].data), (2.5, 5.0)),
    "values": ({"pieces": 2}, lambda result: result.stages[1].data, Decimal("19.80")),
    "code of a script": ({"amount": 21}, lambda result: result.stages[0].data, 42.0),
    "replace": ({"id": 1, "dirty": 2}, lambda result: result.context, {"id": 1, "clean": True}),
    "class handler": (
        {"parts": 0},
        lambda result: (result.status.value, result.context["reserved"]),
        ("compensated", False),
    ),
    "workflow class": ({"name": "Ada"}, lambda result: result.stages[0].data, "Hello, Ada!"),
    "async handler": ({}, lambda result: result.status.value, "completed"),
    "blocking handler": ({}, lambda result: result.status.value, "completed"),
    "retry": ({"total": 8}, lambda result: (result.stages[0].attempts, result.stages[0].data), (2, 8.0)),
    "steps": ({"id": 7}, lambda result: result.stages[0].data, "label for 7"),
    "compensation": (
        {"parts": 0},
        lambda result: (result.status.value, result.context["reserved"]),
        ("compensated", False),
    ),
    "optional stage": (
        {},
        lambda result: (result.status.value, result.stages[0].status.value),
        ("completed", "failed"),
    ),
    "after": (
        {},
        lambda result: [stage.status.value for stage in result.stages],
        ["failed", "skipped"],
    ),
    "conditional stage": ({"total": 100}, lambda result: result.context["total"], 90),
    "branch": ({"country": "FR"}, lambda result: [s.data for s in result.stages if s.data], ["else", "by ship"]),
    "parallel": ({}, lambda result: result.context, {"stock": 1, "credit": 1}),
    "map": ({"numbers": [2, "x", 8]}, lambda result: result.context["halves"], [1, None, 4]),
    "delay": ({}, lambda result: result.status.value, "completed"),
    "ttl": ({}, lambda result: result.status.value, "completed"),
    "park": ({"parts": 0}, lambda result: result.status.value, "parked"),
    "workflow timeout": ({}, lambda result: result.status.value, "completed"),
    "version": ({}, lambda result: result.status.value, "completed"),
    "progress": ({"pages": 3}, lambda result: result.status.value, "completed"),
    "max_memory": ({"seconds": 2}, lambda result: result.context["frames"], 48),
}

SERVED: dict[str, tuple[Any, Callable[[WorkflowResult[Any]], object], object]] = {
    "timeout": (
        {},
        lambda result: result.error,
        "StageTimeout: stage 'slow' ran longer than its timeout of 0.2 s",
    ),
    "request and reply": ({"sku": "TEA"}, lambda result: result.context["pieces"], 7),
    "remote stage": ({"sku": "TEA"}, lambda result: result.context["pieces"], 7),
    "interceptor": ({}, lambda result: result.stages[0].data, "work: done"),
    "initializer": ({}, lambda result: result.stages[0].data, random.Random(7).random()),
    "max_stage_concurrency": ({"text": "abc"}, lambda result: result.stages[0].data, 3),
}

PRINTING = {
    "priority": "completed",
    "cancel": "cancelled",
    "run again": "completed",
    "restart": "{'runs': 2}",
    "history": "['submitted', 'completed pack', 'completed approval', 'ended: completed']",
    "pause and resume": "completed",
    "drain": "[True, True]",
    "prefixes": "['shop.flow.stage0', 'undo.flow']",
}

OTHERS = (
    "services",
    "service with an end",
    "compensation class",
    "signal",
    "HTTP stage",
    "breaker",
    "cancelled",
    "events",
    "external persistence",
    *PRINTING,
)


@pytest.mark.parametrize("name", IN_PROCESS)
def test_an_example_does_what_it_is_there_for(name: str, example: Example) -> None:
    context, look, expected = IN_PROCESS[name]
    assert look(example.run(context)) == expected


@pytest.mark.parametrize("name", SERVED)
def test_an_example_does_what_it_is_there_for_in_worker_processes(name: str, example: Example) -> None:
    context, look, expected = SERVED[name]
    assert look(example.serve(context)) == expected


class Bank:
    def charge(self, total: int) -> str:
        return f"charged {total}"


@pytest.mark.parametrize("name", ["services"])
def test_a_service_is_handed_in(name: str, example: Example) -> None:
    assert example.run({"total": 5}, services={"bank": Bank}).stages[0].data == "charged 5"


@pytest.mark.parametrize("name", ["service with an end"])
def test_a_service_is_closed_at_the_end(name: str, example: Example, tmp_path: Path) -> None:
    services = {"path": str(tmp_path / "ledger.csv")}
    example.read()
    services["ledger"] = example.names["ledger"]
    assert run(example.flow, {"id": 1, "total": 5}, services=services).success
    with Runtime(example.flow, data_dir=tmp_path / "data", services=services) as runtime:
        assert runtime.execute(example.flow, {"id": 2, "total": 7}, timeout=30).success
    assert (tmp_path / "ledger.csv").read_text() == "1,5\n2,7\n"


@pytest.mark.parametrize("name", ["compensation class"])
def test_a_compensation_class_gets_its_services(name: str, example: Example) -> None:
    refunded: list[int] = []

    class Till:
        def refund(self, total: int) -> None:
            refunded.append(total)
            if len(refunded) == 1:
                raise OSError("the till is locked")

    assert example.run({"total": 5}, services={"bank": Till}).status == "compensated"
    assert refunded == [5, 5]


@pytest.mark.parametrize("name", ["signal"])
def test_a_signal_is_taken_in_or_given_up(name: str, tmp_path: Path) -> None:
    said = Example(name, tmp_path).run({}, signals={"approval": {"by": "Ida"}}).context
    silent = Example(name, tmp_path).run({}).context
    assert (said, silent) == ({"by": "Ida"}, {"by": None})


@pytest.fixture
def pay_example() -> Iterator[str]:
    """The address of a server that charges at the second request."""
    asked: list[str] = []

    class Pay(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            amount = json.loads(self.rfile.read(int(self.headers["content-length"])))["amount"]
            asked.append(self.path)
            body = json.dumps({"id": f"{self.path} {amount}"}).encode()
            self.send_response(200 if len(asked) > 1 else 503)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Pay) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["HTTP stage"])
def test_a_server_is_asked_again_until_it_is_well(name: str, example: Example, pay_example: str) -> None:
    flow = example.read(**{"https://pay_example": pay_example})
    result = run(flow, {"id": "A/1", "total": 5})
    assert (result.stages[0].attempts, result.context["charge"]) == (2, "/orders/A%2F1/charges 5")


@pytest.mark.parametrize("name", ["breaker"])
def test_a_stage_that_keeps_failing_is_left_alone(name: str, example: Example) -> None:
    flow = example.read()
    with example.names["runtime"] as runtime:
        instance = runtime.submit(flow, {})
        while [queue.breaker for queue in runtime.queues("stageflow.flow.stage0")] != ["open"]:
            assert not instance.done()
        assert instance.cancel().value == "cancelled"


@pytest.mark.parametrize("name", ["cancelled"])
def test_a_stage_can_return_early_when_its_instance_is_cancelled(name: str, example: Example, eventually: Any) -> None:
    flow = example.read()
    with example.names["runtime"] as runtime:
        instance = runtime.submit(flow, {})
        eventually(lambda: [queue.busy for queue in runtime.queues("stageflow.flow.stage0")] == [1], "it is in work")
        assert instance.cancel().value == "cancelled"


@pytest.mark.parametrize("name", ["events"])
def test_what_happens_is_in_the_history(name: str, example: Example, eventually: Any) -> None:
    flow = example.read()
    with example.names["runtime"] as runtime:
        runtime.execute(flow, {"id": 7}, timeout=30)
        eventually(lambda: len(example.names["received"]) == 2, "both events to be told")
    assert example.names["received"] == ["StageCompleted", "WorkflowCompleted"]


@pytest.mark.parametrize("name", ["external persistence"])
def test_the_state_of_each_stage_is_in_the_store(name: str, example: Example, redis_url: str) -> None:
    import redis

    flow = example.read(**{"redis://localhost:6379/0": redis_url})
    with example.names["runtime"] as runtime:
        instance_id = runtime.execute(flow, {"id": 7}, timeout=30).instance_id
    with redis.Redis.from_url(redis_url, decode_responses=True) as store:
        assert store.hgetall(instance_id) == {"pay": '{"id": 7, "paid": true}'}


@pytest.mark.parametrize("name", PRINTING)
def test_an_example_that_prints_shows_how_it_ended(
    name: str, example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    example.read()
    assert capsys.readouterr().out == f"{PRINTING[name]}\n"
