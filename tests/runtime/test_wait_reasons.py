"""`waiting_for`: what an instance waits for, from what the broker says of it and of its queues."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import Retry, Runtime, StageContext, Workflow
from stageflow_actors.cli.main import main as stageflow
from stageflow_actors.core.plan import Naming
from stageflow_actors.runtime.client.attach import attach
from stageflow_actors.runtime.client.offline_client import OfflineClient
from stageflow_actors.runtime.client.wait_reason import wait_reason

NAMING = Naming()
NOW = 1_700_000_000.0
QUEUE = "stageflow.flow.stage0"


def message(state: str = "ready", label: str = "pay", queue: str = QUEUE, **fields: Any) -> dict[str, Any]:
    plain = {"id": 7, "evidence": False, "reason": None, "failure": None, "due": 0.0}
    return {**plain, "state": state, "label": label, "queue": queue, **fields}


def gather(key: str, *, need: int | None = 1, arrived: int = 0, due: float = 0.0) -> dict[str, Any]:
    return {"key": key, "need": need, "arrived": arrived, "due": due}


def queue(name: str = QUEUE, **fields: Any) -> Any:
    plain = {"ready": 1, "consumers": 2, "busy": 1, "state": "open", "breaker": "", "reason": ""}
    return {"name": name, **plain, "next_start_at": 0.0, "starting": "", **fields}


def reason(*parts: dict[str, Any], queues: Any = (), live: bool = True, ended: str = "") -> str | None:
    messages = [part for part in parts if "state" in part]
    group = {
        "ended": ended,
        "heads": [],
        "messages": messages,
        "gathers": [part for part in parts if "need" in part],
    }
    found = wait_reason(group, queues or [queue()], NAMING, NOW, live=live)
    return None if found is None else found.text


SINGLE: list[tuple[str, list[dict[str, Any]], list[Any], str | None]] = [
    ("at work", [message("leased")], [], None),
    ("its turn", [message()], [], "its turn at stage 'pay': 1 message waiting, 1 of 2 workers at work"),
    (
        "paused",
        [message()],
        [queue(state="paused")],
        f"queue {QUEUE}, which is paused: `stageflow queue resume {QUEUE}`",
    ),
    (
        "failing",
        [message()],
        [queue(state="failing", consumers=0, reason="no money", next_start_at=NOW + 2)],
        f"the workers of stage 'pay' cannot start: no money; next try in 2.0 s (queue {QUEUE})",
    ),
    (
        "failing and paused",
        [message()],
        [queue(state="paused", consumers=0, reason="no money")],
        f"queue {QUEUE}, which is paused: `stageflow queue resume {QUEUE}` resumes it; the workers of stage 'pay' can",
    ),
    (
        "starting",
        [message()],
        [queue(consumers=0, starting="the load of its code has not ended since 12:00:00")],
        "the workers of stage 'pay' are starting: the load of its code has not ended since 12:00:00",
    ),
    ("breaker", [message()], [queue(breaker="open")], "the breaker of stage 'pay', which is open"),
    ("no worker", [message()], [queue(consumers=0)], f"a worker of stage 'pay': none consumes queue {QUEUE}"),
    ("closed", [message()], [queue(state="closed")], f"queue {QUEUE}, which is closed until its workers"),
    ("retry", [message("delayed", due=NOW + 5)], [], "the next attempt of stage 'pay', due at "),
    ("delay", [message("delayed", ":resume", NAMING.coordinator, due=NOW + 90)], [], "the end of its delay, due at "),
    ("compensation", [message(label="compensate:pay")], [queue(state="paused")], f"queue {QUEUE}, which is paused"),
    ("parked", [message("dead")], [], f"a person: it is parked, its message 7 is in dlq.{QUEUE}"),
    ("evidence", [message("dead", evidence=True)], [], None),
    ("signal", [gather("signal:approval")], [], "signal 'approval'"),
    ("signal with a limit", [gather("signal:approval", due=NOW + 60)], [], "signal 'approval' (at the latest due at "),
    ("timeout only", [gather(":timeout", due=NOW + 60)], [], None),
    ("early signal", [gather("signal:approval", need=None, arrived=1)], [], None),
    (
        "endpoint that nobody serves",
        [message(label="stok", queue="stageflow.endpoint.stok"), gather("reply:stok:1")],
        [queue("stageflow.endpoint.stok", consumers=0)],
        "endpoint 'stok', which no running node serves",
    ),
    (
        "endpoint at work",
        [message("leased", "stock", "stageflow.endpoint.stock"), gather("reply:stock:1", due=NOW + 9)],
        [],
        None,
    ),
    ("reply alone", [gather("reply:stock:1")], [], "the reply of endpoint 'stock'"),
    ("branches at work", [message("leased"), gather("checks", need=3, arrived=1)], [], None),
    (
        "a branch that waits beside one at work",
        [message("leased", "a"), message(label="b", queue="b"), gather("checks", need=3, arrived=1)],
        [queue("b", state="failing", consumers=0, reason="no money")],
        "the workers of stage 'b' cannot start: no money",
    ),
    (
        "branches that have left",
        [gather("checks", need=3, arrived=1)],
        [],
        "'checks', of which 1 of 3 parts have arriv",
    ),
]


@pytest.mark.parametrize(("parts", "queues", "expected"), [c[1:] for c in SINGLE], ids=[c[0] for c in SINGLE])
def test_what_an_instance_waits_for_is_one_sentence(
    parts: list[dict[str, Any]], queues: list[Any], expected: str | None
) -> None:
    text = reason(*parts, queues=queues)
    assert text is None if expected is None else (text or "").startswith(expected), text


def test_at_rest_everything_that_is_ready_waits_for_a_cluster() -> None:
    assert reason(message(), live=False) == "a cluster: none runs on its data directory"
    assert reason(gather("signal:approval"), live=False) == "signal 'approval'"


def test_one_that_has_ended_waits_for_nothing() -> None:
    assert reason(message(), ended=":finished") is None


def test_the_items_of_a_map_are_one_reason_and_many_reasons_are_limited() -> None:
    items = [message(label="pick[item]", queue="q") for _ in range(1_000)]
    stopped = queue("q", state="failing", consumers=0, reason="no money")
    assert reason(*items, queues=[stopped]) == "the workers of stage 'pick' cannot start: no money (queue q)"
    many = [message(label=f"s{n}", queue=f"q{n}") for n in range(5)]
    text = reason(*many, queues=[queue(f"q{n}", state="paused") for n in range(5)]) or ""
    assert text.count("which is paused") == 3
    assert text.endswith("; and 2 more")


def nothing(context: dict[str, Any]) -> None: ...


def late(context: dict[str, Any], ctx: StageContext) -> None:
    if ctx.attempt == 1:
        raise OSError("not yet")


def ask(context: dict[str, Any], ctx: StageContext) -> Any:
    return ctx.request("stok", {})


def wrong(context: dict[str, Any]) -> None:
    raise ValueError("wrong")


signed = Workflow("signed").add_signal("approval", timeout=3600).add_stage(nothing, id="n")
cooled = Workflow("cooled").add_delay("cool-off", 3600).add_stage(nothing, id="n")
retried = Workflow("retried").add_stage(late, id="late", retry=Retry.fixed(2, 3600))
wronged = Workflow("wronged", on_failure="park").add_stage(wrong, id="wrong")


def test_real_instances_say_what_they_wait_for_also_when_the_cluster_has_stopped(
    tmp_path: Path, eventually: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    expected = {
        "signed": "signal 'approval' (at the latest due at ",
        "cooled": "the end of its delay, due at ",
        "retried": "the next attempt of stage 'late', due at ",
        "wronged": "a person: it is parked, its message ",
    }
    runtime = Runtime(signed, cooled, retried, wronged, data_dir=data).start()
    try:
        for name, beginning in expected.items():
            instance = runtime.submit(name, {}, instance_id=name)
            eventually(lambda i=instance, b=beginning: (i.waiting_for() or "").startswith(b), beginning)
        assert "after OSError: not yet" in (runtime.instance("retried").waiting_for() or "")
    finally:
        runtime.stop()
    with attach(data) as attached:
        client = OfflineClient(attached)
        assert (client.instance("signed").waiting_for() or "").startswith(expected["signed"])
        assert client.instance("retried").waiting_for() == "a cluster: none runs on its data directory"
    capsys.readouterr()
    assert stageflow(["instances", "show", "retried", "--data", str(data)]) == 0
    assert "waits for     a cluster: none runs on its data directory" in capsys.readouterr().out


def slow(context: dict[str, Any]) -> None:
    while not os.path.exists(context["gate"]):
        pass


def test_leaving_a_runtime_says_now_and_then_what_it_waits_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    monkeypatch.setattr("stageflow_actors.runtime.client.client.DRAIN_NOTE_SECONDS", 0.1)
    notices: list[str] = []
    queue = "stageflow.wronged.stage0"
    runtime = Runtime(wronged, data_dir=tmp_path)

    def note(text: str) -> None:
        notices.append(text)
        if runtime._local.node is not None:
            runtime.resume(queue)

    monkeypatch.setattr("stageflow_actors.runtime.runtime._print_notice", note)
    with runtime:
        runtime.pause(queue)
        runtime.submit(wronged, {}, instance_id="order-1")
    (first, *_) = [text for text in notices if text.startswith("waiting for")]
    assert first.startswith(f"waiting for 1 instance to end: order-1 waits for: queue {queue}, which is paused")
