"""Each process of a cluster is killed while its program lives: it is started again, and work continues."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from programs import STAGEFLOW

from stageflow_actors import JournalCorrupt, Runtime, StageFlowError, Workflow
from stageflow_actors.errors import BrokerUnavailable
from stageflow_actors.runtime.system.restart_limit import RestartLimit

Row = dict[str, Any]

steady: Workflow[Row] = Workflow("steady")


@steady.stage(actors=5)
def work(context: Row) -> None:
    with open(context["log"], "a") as file:
        file.write(f"begin {context['n']} {os.getpid()}\n")
    time.sleep(context["seconds"])
    with open(context["log"], "a") as file:
        file.write(f"end {context['n']}\n")


@steady.stage
def after(context: Row) -> None:
    with open(context["log"], "a") as file:
        file.write(f"after {context['n']}\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def runtime(data: Path) -> Iterator[Runtime]:
    runtime = Runtime(steady, data_dir=data).start()
    yield runtime
    runtime.stop(grace=0.0)


def states(runtime: Runtime) -> dict[str, str]:
    found = {queue.name: queue.state for queue in runtime.queues("stageflow.steady.")}
    return {"work": found["stageflow.steady.stage0"], "after": found["stageflow.steady.stage1"]}


def settlements(data: Path) -> dict[tuple[str, str], int]:
    command = [*STAGEFLOW, "journal", "stats", "--data", str(data), "--output", "json"]
    report = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return {(row["instance"], row["stage"]): row["count"] for row in report["settlements"]}


def test_a_broker_killed_in_the_middle_costs_no_message_and_runs_no_handler_twice(
    runtime: Runtime, data: Path, cluster: Any, effects: Any, eventually: Callable[..., Any]
) -> None:
    rows = [{"log": effects.path, "n": n, "seconds": 1.0 if n < 2 else 0.0} for n in range(20)]
    instances = runtime.submit_many(steady, rows)
    # Three workers are idle then: a broker that had lost its leases could deliver the messages to them.
    eventually(lambda: len(effects("begin")) == 20 and len(effects("after")) == 18, "only the long ones in work")
    before = cluster(data=data)
    busy = [psutil.Process(int(pid)) for n, pid in effects("begin") if int(n) < 2]
    for worker in busy:
        worker.suspend()
    before.brokers[0].kill()
    eventually(
        lambda: states(runtime) == {"work": "closed", "after": "open"}, "the queue of those who are silent closed"
    )
    for worker in busy:
        worker.resume()
    for instance in instances:
        assert instance.result(timeout=10).success
    assert sorted(int(n) for n, _ in effects("begin")) == list(range(20)), "workers keep what they hold"
    assert sorted(int(n) for (n,) in effects("after")) == list(range(20))
    counted = settlements(data)
    assert {counted[instance.id, stage] for instance in instances for stage in ("work", "after")} == {1}
    assert {p.pid for p in cluster(data=data).workers} == {p.pid for p in before.workers}


@pytest.mark.parametrize("kind", ["zygotes", "nodes", "brokers"])
def test_whatever_is_killed_is_started_again_and_everything_completes(
    runtime: Runtime, cluster: Any, effects: Any, eventually: Callable[..., Any], kind: str
) -> None:
    rows = [{"log": effects.path, "n": n, "seconds": 0.05} for n in range(12)]
    instances = runtime.submit_many(steady, rows)
    eventually(lambda: len(effects("end")) >= 2, "some work")
    victim: psutil.Process = getattr(cluster(), kind)[0]
    victim.kill()
    for instance in instances:
        result = instance.result(timeout=60)
        assert result.success
        assert {stage.attempts for stage in result.stages} == {1}, "none of their doing"
    assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
    assert {int(n) for (n,) in effects("after")} == set(range(12))
    assert len(effects("begin")) <= 12 + 5 + 5, "at most what was in work, or done and not yet handed on, runs again"


def test_restarts_leave_no_descriptors_behind(
    runtime: Runtime, cluster: Any, effects: Any, eventually: Callable[..., Any]
) -> None:
    def round_of_kills(kinds: tuple[str, ...]) -> None:
        for kind in kinds:
            victim = getattr(cluster(), kind)[0]
            victim.kill()
            eventually(lambda kind=kind, old=victim.pid: [p for p in getattr(cluster(), kind) if p.pid != old], kind)
            row = {"log": effects.path, "n": 0, "seconds": 0.0}
            assert runtime.execute(steady, row, timeout=60).success

    def settled_fds(process: psutil.Process) -> int:
        counts = [process.num_fds() for _ in range(50)]
        return min(counts)

    round_of_kills(("brokers", "zygotes", "workers"))
    node = cluster().nodes[0]
    before = settled_fds(node)
    for _ in range(2):
        round_of_kills(("brokers", "zygotes", "workers"))
    eventually(lambda: settled_fds(node) <= before, f"the node's descriptors are {before} again")
    program = psutil.Process()
    round_of_kills(("nodes",))
    before = settled_fds(program)
    round_of_kills(("nodes",))
    eventually(lambda: settled_fds(program) <= before, f"the program's descriptors are {before} again")


def test_a_cluster_that_cannot_be_kept_notifies_every_waiting_caller(
    cluster: Any, effects: Any, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    runtime = Runtime(steady, data_dir=tmp_path / "data").start()
    row = {"log": effects.path, "n": 0, "seconds": 60.0}
    assert runtime.execute(steady, {**row, "seconds": 0.0}, timeout=10).success
    waiting = runtime.submit(steady, row)
    alive = cluster(data=tmp_path / "data")
    segment = sorted((tmp_path / "data" / "journal").glob("*.journal"))[0]
    with segment.open("r+b") as file:
        file.seek(560)  # within the first batch
        damaged = bytes(byte ^ 0xFF for byte in file.read(8))
        file.seek(560)
        file.write(damaged)
    alive.brokers[0].kill()
    with pytest.raises(JournalCorrupt) as caught:
        waiting.result(timeout=10)
    assert caught.value.file is not None
    assert caught.value.offset is not None
    with pytest.raises(StageFlowError):
        runtime.submit(steady, row)
    assert alive.end_within(3.0) == []
    began = time.monotonic()
    runtime.stop()
    assert time.monotonic() - began < 2


def test_what_ends_again_and_again_is_given_up_with_an_error_that_names_it() -> None:
    now = [0.0]
    intensity = RestartLimit("node process", max_restarts=3, period_seconds=10.0, clock=lambda: now[0])
    for _ in range(20):
        now[0] += 4.0
        intensity.record()
    now[0] += 20.0
    for _ in range(3):
        intensity.record()
    with pytest.raises(BrokerUnavailable, match="node process ended 4 times within 10 s"):
        intensity.record()


LOOPS = """
import os, sys
from pathlib import Path
from stageflow_actors import Retry, Runtime, Workflow

data, mended = sys.argv[1], Path(sys.argv[2])

def make_shop():
    if not mended.exists():
        raise OSError("the shop's server does not answer")
    return "shop"

crashing, unloadable, well = Workflow("crashing"), Workflow("unloadable"), Workflow("well")

@crashing.stage(actors=2, retry=Retry.fixed(1, 0))
def crash(context):
    os.abort()

@unloadable.stage(actors=2)
def buy(context, *, shop):
    return shop

@well.stage
def fine(context):
    pass

with Runtime(crashing, unloadable, well, data_dir=data, services={"shop": make_shop}) as runtime:
    looping = runtime.submit_many(crashing, [{"n": n} for n in range(20)])
    buying = runtime.submit(unloadable, {})
    while runtime.queues("stageflow.unloadable.stage0")[0].state != "failing":
        assert runtime.execute(well, {}, timeout=20).success
    print({str(one.result(timeout=60).status) for one in looping})
    print({queue.state for queue in runtime.queues("stageflow.crashing.stage0")})
    mended.touch()
    print(buying.result(timeout=60).status)
"""


def test_a_crash_loop_ends_in_failures_and_a_pool_that_cannot_start_waits_and_neither_is_paused(
    launch: Any, tmp_path: Path
) -> None:
    program = launch(LOOPS, tmp_path / "data", tmp_path / "mended")
    out, err = program.communicate(timeout=120)
    assert program.returncode == 0, err
    assert out.splitlines() == ["{'failed'}", "{'open'}", "completed"]
    assert err.count("OSError: the shop's server does not answer") == 2, "a warning and its traceback"
    assert "paused" not in err


FORKED = """
import multiprocessing, os, signal, sys
from stageflow_actors import Runtime, Workflow

work = Workflow("work")

@work.stage
def one(context):
    pass

with Runtime(work, data_dir=sys.argv[1]) as runtime:
    assert runtime.execute(work, {}, timeout=10).success
    pool = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
    pool.start()
    os.kill(runtime.node_pid, signal.SIGKILL)
    assert runtime.execute(work, {}, timeout=10).success
    pool.kill()
print("done")
"""


def test_a_process_that_the_program_has_forked_does_not_keep_its_node_from_being_started_again(
    launch: Any, tmp_path: Path
) -> None:
    out, err = launch(FORKED, tmp_path / "data").communicate(timeout=30)
    assert out == "done\n", err
