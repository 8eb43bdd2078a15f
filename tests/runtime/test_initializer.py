"""The initializer: each worker calls it first, and what it sets holds for services and handlers."""

from __future__ import annotations

import contextvars
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import Compensation, Runtime, Stage, StageContext, Workflow, WorkflowDefinitionError

TENANT: contextvars.ContextVar[str] = contextvars.ContextVar("TENANT", default="none")
SETTINGS: dict[str, str] = {}


def set_up() -> None:
    note("set up", os.getpid())
    SETTINGS["key"] = "secret"
    TENANT.set("acme")
    random.seed(7)


def bank() -> str:
    note("made", os.getpid())
    return SETTINGS["key"]


def pay(order: dict[str, Any], bank: str) -> list[Any]:
    return [bank, SETTINGS["key"], random.Random(7).random() == random.random(), os.getpid()]


def undo(order: dict[str, Any]) -> None:
    note("undone", SETTINGS["key"])


async def fail(order: dict[str, Any]) -> None:
    note("async", SETTINGS["key"])
    raise ValueError(SETTINGS["key"])


def ask(order: dict[str, Any], ctx: StageContext) -> Any:
    return ctx.request("stock", 1)


def answered(order: dict[str, Any], ctx: StageContext) -> Any:
    return ctx.payload


def stock(command: Any) -> str:
    return SETTINGS["key"]


def test_each_worker_calls_it_first(serve: Any, eventually: Any) -> None:
    flow = Workflow("flow").add_stage(pay, compensation=Compensation(undo)).add_stage(fail)
    requests = Workflow("requests").add_stage(ask).add_stage(answered)
    runtime: Runtime = serve(flow, requests, endpoints={"stock": stock}, services={"bank": bank}, initializer=set_up)
    result = runtime.execute(flow, {}, timeout=60)
    assert (result.status, result.error) == ("compensated", "ValueError: secret")
    assert result.stages[0].data[:3] == ["secret", "secret", True]
    assert noted("undone") == noted("async") == [("secret",)]
    assert runtime.execute(requests, {}, timeout=60).stages[1].data == "secret"
    late = Workflow("late").add_stage(Stage(pay, id="s"))
    runtime.register(late)
    assert runtime.execute(late, {}, timeout=60).stages[0].data[1] == "secret"
    pid = str(result.stages[0].data[3])
    assert [words for words in noted() if words[-1] == pid] == [("set up", pid), ("made", pid)]
    assert eventually(lambda: len(set(noted("set up"))) == len(noted("set up")) == 7, "once in each worker") is True


SCRIPT = """
import decimal, random
from stageflow_actors import Runtime, Workflow

client = None
CACHE = {}

class Client:
    def __init__(self, key): self.key = key

def set_up():
    global client
    client = Client("secret")
    CACHE["a"] = 1
    decimal.getcontext().prec = 5

def pay(order):
    return [client.key, CACHE, isinstance(client, Client), str(decimal.Decimal(1) / 3)]

async def pay_async(order):
    return pay(order)[:3]

if __name__ == "__main__":
    flow = Workflow("flow").add_stage(pay).add_stage(pay_async)
    with Runtime(flow, data_dir="data", initializer=set_up) as runtime:
        for stage in runtime.execute(flow, {}).stages:
            print(stage.data)
    print(client)
"""


def test_what_it_sets_in_a_script_is_what_its_handlers_see(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    seen = "['secret', {'a': 1}, True"
    assert done.stdout == f"{seen}, '0.33333']\n{seen}]\nNone\n", done.stderr


def test_one_that_raises_keeps_its_workers_from_starting_and_start_returns(
    serve: Any, caplog: pytest.LogCaptureFixture, eventually: Any
) -> None:
    flow = Workflow("flow").add_stage(stock)
    runtime: Runtime = serve(flow, initializer=raises)
    instance = runtime.submit(flow, {})
    with pytest.raises(TimeoutError):
        instance.result(timeout=0.5)
    eventually(lambda: "cannot start: the initializer failed: ConnectionError: no key" in caplog.text, "the warning")
    runtime.stop(grace=0)


def raises() -> None:
    raise ConnectionError("no key")


def test_one_that_cannot_be_sent_is_refused_by_start(tmp_path: Path) -> None:
    lock = threading.Lock()
    runtime = Runtime(Workflow("flow").add_stage(stock), data_dir=tmp_path / "data", initializer=lambda: lock.acquire())
    with pytest.raises(WorkflowDefinitionError, match=r"^the initializer: .*lock.* cannot be sent"):
        runtime.start()
    assert not (tmp_path / "data").exists()
