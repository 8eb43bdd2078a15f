"""Start, leave, stop and start again: what a stop waits for, what resumes, and which files remain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from effect_log import note, noted

from stageflow_actors import (
    BrokerUnavailable,
    Config,
    JournalLocked,
    Runtime,
    StageContext,
    StageFlowError,
    Workflow,
    WorkflowDefinitionError,
)


def gated(context: dict[str, Any], ctx: StageContext) -> str:
    note("began", ctx.instance_id)
    while not os.path.exists(context["gate"]):
        time.sleep(0.003)
    note("ended", ctx.instance_id)
    return "through"


def last(context: dict[str, Any], ctx: StageContext) -> None:
    note("last", ctx.instance_id)


def parks(context: dict[str, Any]) -> None:
    raise ValueError("parked")


def flow(name: str = "flow") -> Workflow[dict[str, Any]]:
    return Workflow(name).add_stage(gated, actors=2).add_stage(last)


parking = Workflow("parking", on_failure="park").add_stage(parks)


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Any:
    before = children()
    yield
    assert children() <= before, "a process of a cluster outlived its runtime"


def test_leaving_normally_waits_for_what_was_submitted(data_dir: Path, gate: Path) -> None:
    with Runtime(flow(), parking, data_dir=data_dir) as runtime:
        instances = runtime.submit_many("flow", [{"gate": str(gate)}] * 5)
        parked = runtime.submit(parking, {})
        threading.Timer(0.2, gate.touch).start()
    assert all(instance.done() for instance in instances)
    assert all(instance.result().success for instance in instances)
    with pytest.raises(StageFlowError):
        parked.result(timeout=0)
    assert not (data_dir / "cluster.json").exists()


def test_leaving_by_an_exception_waits_for_stages_in_work_and_the_rest_resumes(
    data_dir: Path, gate: Path, capfd: pytest.CaptureFixture[str], eventually: Any
) -> None:
    class Stop(Exception):
        pass

    ids = [f"rest-{n}" for n in range(6)]
    with pytest.raises(Stop), Runtime(flow(), data_dir=data_dir) as runtime:
        runtime.submit_many("flow", [{"gate": str(gate)}] * 6, instance_ids=ids)
        eventually(lambda: len(noted("began", "rest-0")) + len(noted("began", "rest-1")) == 2, "two in work")
        threading.Timer(0.2, gate.touch).start()
        raise Stop
    assert len([id for id in ids if noted("ended", id)]) == 2, "stages in work are let finish"
    assert not [id for id in ids if noted("last", id)], "and nothing new is begun"
    capfd.readouterr()

    with Runtime(flow(), data_dir=data_dir) as runtime:
        assert all(runtime.instance(id).result(timeout=20).success for id in ids)
    printed = capfd.readouterr()
    assert "resuming 6 instances of flow" in printed.err
    assert printed.out == ""
    assert [len(noted("began", id)) for id in ids] == [1] * 6, "what was done is not done again"
    assert [len(noted("last", id)) for id in ids] == [1] * 6

    with Runtime(flow(), data_dir=data_dir) as runtime:
        assert runtime.execute("flow", {"gate": str(gate)}, instance_id="rest-0", timeout=20).success
    assert "resuming" not in capfd.readouterr().err


def test_stopping_with_no_grace_kills_stages_in_work_and_they_resume_uncharged(
    data_dir: Path, gate: Path, eventually: Any
) -> None:
    runtime = Runtime(flow(), data_dir=data_dir, config=Config(max_stage_retries=1)).start()
    instance = runtime.submit("flow", {"gate": str(gate)}, instance_id="killed")
    eventually(lambda: noted("began", "killed"), "the stage to begin")
    began = time.monotonic()
    runtime.stop(grace=0)
    assert time.monotonic() - began < 5
    with pytest.raises(BrokerUnavailable, match="start"):
        instance.result(timeout=1)
    gate.touch()
    with runtime:
        result = runtime.instance("killed").result(timeout=20)
        assert result.success
        assert result.stages[0].attempts == 1, "a stop is neither a death nor an attempt"
        assert instance.result(timeout=20) == result, "the old handle works again"
    assert len(noted("began", "killed")) == 2


def test_stop_may_drain_first(data_dir: Path, gate: Path) -> None:
    runtime = Runtime(flow(), data_dir=data_dir).start()
    instances = runtime.submit_many("flow", [{"gate": str(gate)}] * 3)
    threading.Timer(0.1, gate.touch).start()
    runtime.stop(drain=True)
    assert all(instance.result(timeout=0).success for instance in instances)


def test_stopping_twice_or_before_a_start_does_nothing(data_dir: Path) -> None:
    runtime = Runtime(flow(), data_dir=data_dir)
    runtime.stop()
    with runtime:
        runtime.stop()
        runtime.stop()
    runtime.stop(drain=True, grace=1)


def test_starting_twice_is_a_clear_error_and_starting_again_after_a_stop_is_not(data_dir: Path, gate: Path) -> None:
    gate.touch()
    runtime = Runtime(flow(), data_dir=data_dir).start()
    with pytest.raises(StageFlowError, match="running already"):
        runtime.start()
    assert runtime.execute("flow", {"gate": str(gate)}, timeout=20).success
    runtime.stop()
    with runtime:
        assert runtime.execute("flow", {"gate": str(gate)}, timeout=20).success


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.submit("flow", {}),
        lambda r: r.submit_many("flow", [{}]),
        lambda r: r.execute("flow", {}, timeout=1),
        lambda r: next(r.map("flow", [{}])),
        lambda r: r.instance("x"),
        lambda r: r.instances(),
        lambda r: r.queues(),
        lambda r: r.stats(),
        lambda r: r.pause("q"),
        lambda r: r.scale("flow", "last", 2),
    ],
)
@pytest.mark.parametrize("stopped", [False, True])
def test_calls_on_a_runtime_that_does_not_run_are_clear_errors(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, call: Any, stopped: bool
) -> None:
    runtime = request.getfixturevalue("stopped_runtime") if stopped else Runtime(flow(), data_dir="never-made")
    with pytest.raises(BrokerUnavailable, match=r"start\(\)"):
        call(runtime)
    assert not os.path.exists("never-made")


@pytest.fixture(scope="module")
def stopped_runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    runtime = Runtime(flow(), data_dir=tmp_path_factory.mktemp("stopped"))
    runtime.start()
    runtime.stop()
    return runtime


def test_a_waiting_thread_is_notified_when_the_runtime_stops(data_dir: Path, gate: Path, eventually: Any) -> None:
    runtime = Runtime(flow(), data_dir=data_dir).start()
    instance = runtime.submit("flow", {"gate": str(gate)}, instance_id="told")
    results = runtime.map("flow", [{"gate": str(gate)}] * 2)
    errors: list[BaseException] = []

    def wait(what: Any) -> None:
        try:
            what()
        except BaseException as error:
            errors.append(error)

    waits = [instance.result, lambda: next(results), lambda: list(runtime.as_completed([instance])), runtime.drain]
    threads = [threading.Thread(target=wait, args=(what,)) for what in waits]
    for thread in threads:
        thread.start()
    eventually(lambda: noted("began", "told"), "the stage to begin")
    runtime.stop(grace=0)
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert all(isinstance(error, BrokerUnavailable) for error in errors), errors
    assert len(errors) >= 3, "drain may find that there is nothing to wait for any more"


def test_a_second_runtime_on_the_same_directory_is_refused_with_advice(
    data_dir: Path, gate: Path, tmp_path: Path
) -> None:
    gate.touch()
    with Runtime(flow(), data_dir=data_dir) as runtime:
        with pytest.raises(JournalLocked, match=r"Runtime\.connect") as locked:
            Runtime(flow("other"), data_dir=data_dir).start()
        assert locked.value.pid == os.getpid()
        link = tmp_path / "link"
        link.symlink_to(data_dir)
        with pytest.raises(JournalLocked):
            Runtime(flow("other"), data_dir=link).start()
        script = f"""
        from stageflow_actors import Runtime, Workflow
        Runtime(Workflow("w").add_stage(lambda context: None), data_dir={str(data_dir)!r}).start()
        """
        other = _python(script)
        assert other.returncode == 1
        assert "JournalLocked" in other.stderr
        assert f"pid {os.getpid()}" in other.stderr
        assert "Runtime.connect" in other.stderr
        assert other.stdout == ""
        assert runtime.execute("flow", {"gate": str(gate)}, timeout=20).success, "and the first goes on undisturbed"


def test_a_start_that_fails_leaves_nothing_and_may_be_tried_again(data_dir: Path, gate: Path) -> None:
    gate.touch()
    workflow = Workflow("w").add_stage(lambda context, *, mailer: None)
    broken = Runtime(workflow, data_dir=data_dir)
    for _ in range(2):
        with pytest.raises(WorkflowDefinitionError, match="'mailer'"):
            broken.start()
    with Runtime(flow(), data_dir=data_dir) as runtime:
        assert runtime.execute("flow", {"gate": str(gate)}, timeout=20).success


def test_a_runtime_without_workflows_is_an_error_with_that_reason(data_dir: Path) -> None:
    with pytest.raises(WorkflowDefinitionError, match="no workflows"):
        Runtime(data_dir=data_dir).start()
    assert not data_dir.exists()


def test_two_that_would_share_a_queue_are_refused(data_dir: Path) -> None:
    undone = Workflow("stage0").add_stage(gated, compensation=lambda context: None)
    with pytest.raises(WorkflowDefinitionError, match=r"'stageflow\.compensation\.stage0'"):
        Runtime(undone, flow("compensation"), data_dir=data_dir).start()
    greedy = Config(compensation_queue_prefix="stageflow.")
    finished = Workflow("finished").add_stage(gated, compensation=lambda context: None)
    with pytest.raises(WorkflowDefinitionError, match=r"'stageflow\.finished'"):
        Runtime(finished, data_dir=data_dir, config=greedy).start()
    assert not data_dir.exists()


def test_a_workflow_refused_while_running_changes_nothing(data_dir: Path, gate: Path) -> None:
    gate.touch()
    runtime = Runtime(flow(), data_dir=data_dir)
    with runtime:
        for bad in (Workflow("w").add_stage(lambda context, *, mailer: None), Workflow("empty"), flow()):
            with pytest.raises(WorkflowDefinitionError):
                runtime.register(bad)
        assert runtime.execute("flow", {"gate": str(gate)}, timeout=20).success
        runtime.register(Workflow("second").add_stage(last))
        assert runtime.execute("second", {}, timeout=20).success
    with runtime:
        assert runtime.execute("second", {}, timeout=20).success


@pytest.mark.parametrize("grace", [-1, "soon", float("nan")])
def test_grace_is_a_duration(data_dir: Path, grace: Any) -> None:
    with pytest.raises(ValueError, match="grace"):
        Runtime(flow(), data_dir=data_dir).stop(grace=grace)


def test_a_data_directory_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StageFlowError, match="file"):
        Runtime(flow(), data_dir=tmp_path / "file").start()
    with pytest.raises(StageFlowError, match="file"):
        Runtime(flow(), data_dir=tmp_path / "file" / "below").start()


def test_finished_instances_are_remembered_over_restarts(data_dir: Path, gate: Path) -> None:
    gate.touch()
    with Runtime(flow(), data_dir=data_dir) as runtime:
        before = list(runtime.map("flow", [{"gate": str(gate), "k": f"kept-{n}"} for n in range(50)], key="k"))
    with Runtime(flow(), data_dir=data_dir) as runtime:
        after = list(runtime.map("flow", [{"gate": str(gate), "k": f"kept-{n}"} for n in range(50)], key="k"))
        assert after == before
        assert runtime.instance("kept-7").result(timeout=0) == before[7]
        assert len(runtime.instances("completed", limit=1000)) == 50
    assert all(len(noted("began", f"kept-{n}")) == 1 for n in range(50))


def test_a_deep_data_directory_and_a_relative_one_work(tmp_path: Path, gate: Path, monkeypatch: Any) -> None:
    gate.touch()
    deep = tmp_path.joinpath(*["quite-a-long-name-for-a-directory"] * 6)
    with Runtime(flow(), data_dir=deep) as runtime:
        assert runtime.execute("flow", {"gate": str(gate)}, timeout=20).success
    monkeypatch.chdir(tmp_path)
    with Runtime(flow(), data_dir="relative") as runtime:
        monkeypatch.chdir("/")
        assert runtime.execute("flow", {"gate": str(gate)}, timeout=20).success
    assert (tmp_path / "relative" / "history.db").exists()


INTERRUPTED = """
import os, signal, sys, time
from stageflow_actors import Runtime, Workflow

def work(context, ctx):
    with open(context["log"], "a") as log:
        log.write(f"began {ctx.instance_id}\\n")
    while not os.path.exists(context["gate"]):
        time.sleep(0.005)
    with open(context["log"], "a") as log:
        log.write(f"ended {ctx.instance_id}\\n")

if __name__ == "__main__":
    data, log, gate = sys.argv[1:]
    with Runtime(Workflow("w").add_stage(work), data_dir=data) as runtime:
        runtime.submit_many("w", [{"log": log, "gate": gate}] * 3, instance_ids=["a", "b", "c"])
        print("submitted", flush=True)
        for instance in "abc":
            runtime.instance(instance).result()
    print("left", flush=True)
"""


@pytest.fixture
def interrupted(tmp_path: Path, data_dir: Path, gate: Path, eventually: Any) -> Any:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    log = tmp_path / "log"
    arguments = [sys.executable, str(script), str(data_dir), str(log), str(gate)]
    program = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        eventually(lambda: log.exists() and "began a" in log.read_text(), "the first stage to begin")
        yield program, log
    finally:
        if program.poll() is None:
            program.kill()
        program.communicate(timeout=10)


def test_ctrl_c_waits_for_the_stages_in_work_only(interrupted: Any, gate: Path, data_dir: Path) -> None:
    program, log = interrupted
    os.killpg(program.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.3)
    gate.touch()
    out, err = program.communicate(timeout=10)
    assert out == "submitted\n"
    assert "KeyboardInterrupt" in err
    assert log.read_text() == "began a\nended a\n"
    assert not (data_dir / "cluster.json").exists()


def test_a_ctrl_c_at_the_very_beginning_of_a_stop_kills_the_cluster(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(runtime: Runtime) -> None:
        raise KeyboardInterrupt

    workflow: Workflow[Any] = Workflow("interrupted").add_stage(print, id="show")
    runtime = Runtime(workflow, data_dir=data_dir).start()
    assert runtime._local.node is not None
    node = runtime._local.node.pid
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Runtime, "_place", property(interrupt))  # what the stop does before it reaches the node
        runtime.stop()
    assert not psutil.pid_exists(node)
    with Runtime(workflow, data_dir=data_dir):
        pass


def test_a_second_ctrl_c_kills_what_is_in_work(interrupted: Any, eventually: Any) -> None:
    program, log = interrupted
    cluster = [process.pid for process in psutil.Process(program.pid).children(recursive=True)]
    os.killpg(program.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.3)
    os.killpg(program.pid, signal.SIGINT)
    program.communicate(timeout=10)
    assert program.returncode != 0
    assert log.read_text() == "began a\n"
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in cluster), "the cluster to be gone", timeout=3)


def _python(script: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
