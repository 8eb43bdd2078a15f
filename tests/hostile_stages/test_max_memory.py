"""A worker above the `max_memory` of its stage is ended, and the message in work is charged."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from stageflow_actors import Runtime, Stage, Workflow, WorkflowDefinitionError
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.runtime.ipc.pool_spec import endpoint_spec, merge_pools, pool_specs
from stageflow_actors.runtime.node.memory_limits import memory_above

Row = dict[str, Any]
Handler = Callable[[Row], Any]

LIMIT = 200_000_000
PIECE = 20_000_000

kept: list[bytes] = []


def swell(context: Row) -> None:
    """Much more memory, little by little; gives up at last, for the machine's sake."""
    for _ in range(50):
        kept.append(os.urandom(1) * PIECE)
        time.sleep(0.01)
    raise ValueError("nobody stops this")


def swell_once(context: Row) -> int:
    if not Path(context["mark"]).exists():
        Path(context["mark"]).touch()
        swell(context)
    return os.getpid()


def have_a_child_swell(context: Row) -> None:
    code = f"x = [b'x' * {PIECE} for _ in range(20)]; import time; time.sleep(60)"
    subprocess.run([sys.executable, "-c", code], check=True)


def share_with_children(context: Row) -> int:
    """Four processes that look as if each of them had what they all share."""
    kept.append(b"x" * 100_000_000)
    pipe, theirs = os.pipe()
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            os.close(theirs)
            os.read(pipe, 1)
            os._exit(0)
        children.append(pid)
    rss = sum(psutil.Process(pid).memory_info().rss for pid in [os.getpid(), *children])
    time.sleep(0.5)  # several looks
    os.close(theirs)
    for pid in children:
        os.waitpid(pid, 0)
    return rss


def swell_afterwards(context: Row) -> int:
    """Does its work in no time, and uses much when it has long been done."""
    threading.Timer(0.3, lambda: kept.append(b"x" * 2 * LIMIT)).start()
    return os.getpid()


def swell_or_wait(context: Row) -> None:
    if context["n"] == 2:
        swell(context)
    time.sleep(0.2)


def tell_score(context: Row) -> int:
    return int(Path("/proc/self/oom_score_adj").read_text())


def tell_who(context: Row) -> int:
    return os.getpid()


def workflow_of(handler: Handler, **options: Any) -> Workflow[Row]:
    return Workflow(handler.__name__.replace("_", "-")).add_stage(Stage(handler, id="bomb", **options))


HANDLERS = [swell, swell_once, have_a_child_swell, share_with_children, swell_afterwards]
bombs = {handler: workflow_of(handler, max_memory=LIMIT) for handler in HANDLERS}
crowd = workflow_of(swell_or_wait, max_memory=LIMIT, concurrency=3)
cramped = workflow_of(tell_who, max_memory=5_000_000)
scored = workflow_of(tell_score)
others_work: Workflow[Row] = Workflow("others").add_stage(tell_who)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    data = tmp_path_factory.mktemp("data")
    runtime = Runtime(*bombs.values(), crowd, scored, others_work, data_dir=data).start()
    yield runtime
    runtime.stop(grace=0.0)


@pytest.fixture(scope="module")
def others(runtime: Runtime, others_of: Callable[..., Any]) -> Iterator[Any]:
    others = others_of(runtime, others_work)
    yield others
    others.stop()


@pytest.mark.parametrize("handler", [swell, have_a_child_swell], ids=lambda handler: handler.__name__)
def test_a_worker_that_uses_too_much_with_its_children_is_killed_and_its_message_charged(
    runtime: Runtime, others: Any, handler: Handler
) -> None:
    with others.go_on():
        result = runtime.execute(bombs[handler], {}, timeout=60)
    assert result.status == "failed"
    assert result.stages[0].attempts == 3
    assert result.error is not None
    said = re.fullmatch(
        r"WorkerDied: the worker was killed while running stage 'bomb': "
        r"it used (\d+) MB of memory, more than max_memory=200000000",
        result.error,
    )
    assert said, result.error
    assert int(said[1]) > 200


def test_a_message_that_used_too_much_once_completes_in_a_new_worker(
    runtime: Runtime, others: Any, tmp_path: Path
) -> None:
    with others.go_on():
        result = runtime.execute(bombs[swell_once], {"mark": str(tmp_path / "mark")}, timeout=60)
    assert result.success, result.error
    assert result.stages[0].attempts == 2


def test_of_messages_in_work_at_once_the_one_that_uses_too_much_fails_and_the_others_complete(
    runtime: Runtime, others: Any
) -> None:
    with others.go_on():
        results = list(runtime.map(crowd, [{"n": n} for n in range(6)]))
    assert [result.success for result in results] == [True, True, False, True, True, True]
    assert "more than max_memory" in str(results[2].error)


def test_every_kind_of_pool_is_given_the_limit_of_its_stage() -> None:
    bomb = Stage(tell_who, id="bomb", max_memory=LIMIT)
    everywhere: Workflow[Row] = Workflow("everywhere").add_parallel("both", [bomb, Stage(swell, id="free")])
    everywhere.add_branch("way", lambda context: "a", {"a": [Stage(tell_who, id="arm", max_memory=LIMIT)]})
    everywhere.add_map("each", swell, over=lambda context: [1], max_memory=LIMIT)
    specs = pool_specs(everywhere, compile_plan(everywhere, Naming()), {})
    limits = {spec.stage_id: spec.max_memory for spec in merge_pools(specs)}
    assert {name for name, limit in limits.items() if limit == LIMIT} == {"bomb", "arm", "each[item]"}
    assert set(limits.values()) == {0, LIMIT}
    assert endpoint_spec(bomb, Naming(), {}).max_memory == LIMIT


def test_what_a_worker_and_its_forks_share_counts_once(runtime: Runtime) -> None:
    result = runtime.execute(bombs[share_with_children], {}, timeout=60)
    assert result.success, result.error
    assert result.stages[0].attempts == 1
    assert result.stages[0].data > 1.5 * LIMIT, "the sum of their RSS says too much"


def test_a_worker_that_uses_too_much_when_idle_is_replaced_and_no_message_charged(
    runtime: Runtime, eventually: Callable[..., Any]
) -> None:
    first = runtime.execute(bombs[swell_afterwards], {}, timeout=60).stages[0].data
    eventually(lambda: not psutil.pid_exists(first), "the end of the worker")
    result = runtime.execute(bombs[swell_afterwards], {}, timeout=60)
    assert result.success
    assert result.stages[0].attempts == 1
    assert result.stages[0].data != first


def test_a_limit_that_no_worker_can_keep_is_the_reason_why_its_workers_cannot_start(
    tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    runtime = Runtime(cramped, data_dir=tmp_path / "data").start()
    try:
        instance = runtime.submit(cramped, {})
        why = "it used more than max_memory=5000000"
        eventually(lambda: runtime.queues("stageflow.tell-who.stage0")[0].reason.startswith(why), "the reason")
        assert why in (instance.waiting_for() or "")
    finally:
        runtime.stop(grace=0.0)


def test_when_memory_runs_out_the_kernel_would_rather_end_a_worker_than_the_node_or_the_broker(
    runtime: Runtime,
) -> None:
    node = psutil.Process(runtime.node_pid)
    kept_up = [Path(f"/proc/{process.pid}/oom_score_adj").read_text() for process in (node, *node.children())]
    worker = runtime.execute(scored, {}, timeout=20).stages[0].data
    assert worker > max(map(int, kept_up)) or worker == 1000


def test_memory_over_reports_sizes_and_skips_processes_that_have_exited() -> None:
    assert memory_above(os.getpid(), 1 << 40) == 0
    assert memory_above(os.getpid(), 1 << 20) > 1 << 20
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert memory_above(ended.pid, 1) == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (0, "integer from 1"),
        (1.5e9, "a number of bytes such as 2_000_000_000"),
        ("1G", "a number of bytes"),
        (512, "max_memory=512_000_000"),
    ],
)
def test_a_limit_that_is_no_number_of_bytes_is_refused(given: Any, words: str) -> None:
    with pytest.raises(WorkflowDefinitionError, match=f"max_memory of stage 'tell-who'.*{words}"):
        Stage(tell_who, max_memory=given)
