"""`map` and `map_unordered`: any number of contexts, a bounded number in flight, and no input run twice."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import (
    Config,
    InstanceConflict,
    InstanceNotFound,
    InvalidContext,
    PayloadTooLarge,
    Runtime,
    StageContext,
    Workflow,
)
from stageflow_actors.runtime.client import map_iterator
from stageflow_actors.runtime.client.map_iterator import SLOW_PULL_SECONDS


@dataclass
class Job:
    name: str
    n: int = 0
    fail: bool = False
    gate: str = ""

    def validate(self) -> None:
        if self.n < 0:
            raise ValueError(f"n is {self.n}")


def work(job: Job, ctx: StageContext) -> int:
    while job.gate and not os.path.exists(job.gate):
        time.sleep(0.002)
    note("ran", job.name)
    if job.fail and not os.path.exists(f"/proc/self/environ-{job.name}") and not Path(job.gate or ".").is_file():
        raise ValueError("not today")
    return job.n * 2


def quick(context: dict[str, Any]) -> None:
    pass


def flaky(context: dict[str, Any], ctx: StageContext) -> int:
    """Fail until the named file exists."""
    note("flaky", context["name"])
    if context["fail"] and not os.path.exists(context["mended"]):
        raise ConnectionError("down")
    return 1


jobs = Workflow("jobs", context=Job).add_stage(work)
quicks = Workflow("quicks").add_stage(quick).add_stage(quick, id="again")
flakies = Workflow("flakies").add_stage(flaky)


@pytest.fixture(scope="module")
def runtime(serve: Any) -> Runtime:
    return serve(jobs, quicks, flakies, config=Config(max_message_bytes=100_000))


def test_map_yields_results_in_the_order_of_the_input(runtime: Runtime, tmp_path: Path) -> None:
    results = list(runtime.map(jobs, [Job(f"o{n}", n) for n in range(500)]))
    assert [r.context.n for r in results] == list(range(500))
    assert [r.stages[0].data for r in results] == [2 * n for n in range(500)]
    assert list(runtime.map(jobs, [])) == []


def test_map_unordered_yields_each_result_once_as_it_comes(runtime: Runtime, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    contexts = [{"n": n} for n in range(300)]
    seen = [r.context["n"] for r in runtime.map_unordered(quicks, contexts)]
    assert sorted(seen) == list(range(300))

    slow = runtime.submit(jobs, Job("first", gate=str(gate)), instance_id="held-up")
    results = runtime.map_unordered(jobs, [Job("first", gate=str(gate)), Job("x")], key=lambda job: "held-up")
    with pytest.raises(InstanceConflict):
        next(results)
    gate.touch()
    assert next(results) == slow.result(timeout=20)
    assert list(results) == []


def test_20_000_contexts_keep_a_bounded_number_in_flight(runtime: Runtime) -> None:
    pulled = 0

    def contexts() -> Iterator[dict[str, int]]:
        nonlocal pulled
        for n in range(20_000):
            pulled += 1
            yield {"n": n}

    most = 0
    for given, result in enumerate(runtime.map(quicks, contexts())):
        assert result.context["n"] == given
        most = max(most, pulled - given)
    assert given == 19_999
    assert most <= 16_100


def test_an_input_without_end_is_taken_as_far_as_it_is_asked_for(runtime: Runtime) -> None:
    results = runtime.map(quicks, ({"n": n} for n in count()))
    assert [next(results).context["n"] for _ in range(50)] == list(range(50))
    results.close()  # type: ignore[attr-defined]
    unordered = runtime.map_unordered(quicks, ({"n": n} for n in count()))
    assert len({next(unordered).context["n"] for _ in range(50)}) == 50
    del results, unordered
    runtime.drain(timeout=30)


def test_results_are_given_while_a_slow_input_ponders(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input gives its next item only when the result of the one before has been seen."""
    # The wait for a result has to be long enough for a machine that is busy.
    monkeypatch.setattr(map_iterator, "RESULT_WAIT_SHARE", 20.0)
    monkeypatch.setattr(map_iterator, "MAX_RESULT_WAIT_SECONDS", 20.0)
    seen = threading.Event()

    def contexts() -> Iterator[dict[str, int]]:
        yield {"n": 0}
        began = time.monotonic()
        while time.monotonic() - began < 1:
            pass
        yield {"n": 1}
        assert seen.wait(10), "the second result was kept back until the input went on"
        yield {"n": 2}

    results = runtime.map(quicks, contexts())
    assert next(results).context["n"] == 0
    assert next(results).context["n"] == 1
    seen.set()
    assert next(results).context["n"] == 2
    assert list(results) == []


@pytest.mark.parametrize("key", ["name", lambda job: f"k-{job.name}"])
def test_a_keyed_map_run_again_yields_stored_results_and_runs_nothing(runtime: Runtime, key: Any) -> None:
    prefix = "field" if key == "name" else "function"
    contexts = [Job(f"{prefix}-{n}", n) for n in range(200)]
    first = list(runtime.map(jobs, contexts, key=key))
    again = list(runtime.map(jobs, iter(contexts), key=key))
    assert again == first
    assert {r.instance_id for r in runtime.map_unordered(jobs, contexts, key=key)} == {r.instance_id for r in first}
    assert first[7].instance_id == (f"{prefix}-7" if key == "name" else f"k-{prefix}-7")
    assert all(len(noted("ran", job.name)) == 1 for job in contexts)


def test_a_keyed_map_goes_on_with_the_rest(runtime: Runtime) -> None:
    contexts = [Job(f"rest-{n}", n) for n in range(100)]
    results = runtime.map(jobs, contexts[:50], key="name")
    assert [next(results).context.n for _ in range(10)] == list(range(10))
    del results
    assert [r.context.n for r in runtime.map(jobs, contexts, key="name")] == list(range(100))
    assert all(len(noted("ran", job.name)) == 1 for job in contexts)


def test_a_keyed_map_joins_instances_that_still_run(runtime: Runtime, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    contexts = [Job(f"join-{n}", n, gate=str(gate)) for n in range(5)]
    iterators = [runtime.map(jobs, contexts, key="name") for _ in range(3)]
    found: list[Any] = []
    threads = [threading.Thread(target=lambda i=i: found.append(list(i))) for i in iterators]
    for thread in threads:
        thread.start()
    gate.touch()
    for thread in threads:
        thread.join(20)
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert [r.context.n for r in found[0]] == list(range(5))
    assert all(len(noted("ran", job.name)) == 1 for job in contexts)


def test_the_same_key_with_another_input_is_a_conflict_in_its_place(runtime: Runtime) -> None:
    runtime.execute(jobs, Job("old", 1), instance_id="old", timeout=20)
    results = runtime.map(jobs, [Job("new-a"), Job("old", 2), Job("new-b")], key="name")
    assert next(results).context.name == "new-a"
    with pytest.raises(InstanceConflict, match="'old'"):
        next(results)
    assert next(results).context.name == "new-b"
    with pytest.raises(StopIteration):
        next(results)


def test_a_key_that_comes_twice_runs_once_and_yields_twice(runtime: Runtime) -> None:
    contexts = [Job("twice", 1), Job("once", 2), Job("twice", 1), Job("twice", 3), Job("twice", 1)]
    results = runtime.map(jobs, contexts, key="name")
    given: list[Any] = []
    while True:
        try:
            given.append(next(results))
        except StopIteration:
            break
        except InstanceConflict as conflict:
            given.append(str(conflict)[:16])
    assert [g if isinstance(g, str) else g.context.n for g in given] == [1, 2, 1, "instance 'twice'", 1]
    assert len(noted("ran", "twice")) == 1
    many = list(runtime.map(jobs, [Job("legion", 1)] * 500, key="name"))
    assert len(many) == 500
    assert len(noted("ran", "legion")) == 1


def test_a_key_may_be_a_number_but_not_nothing(runtime: Runtime) -> None:
    results = runtime.map(quicks, [{"id": 7001}, {"id": None}, {}, {"id": ""}, {"id": 7002}], key="id")
    assert next(results).instance_id == "7001"
    for words in ("None", "context.id is missing", "instance id"):
        with pytest.raises(InvalidContext, match=words):
            next(results)
    assert next(results).instance_id == "7002"


def test_a_key_function_that_raises_is_that_contexts_error(runtime: Runtime) -> None:
    results = runtime.map(quicks, [{"id": 5}, {"id": 0}, {"id": 4}], key=lambda context: f"div-{20 // context['id']}")
    assert next(results).instance_id == "div-4"
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert next(results).instance_id == "div-5"


def test_retry_failed_runs_again_what_failed_and_nothing_else(runtime: Runtime, tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    contexts = [{"name": f"flaky-{n}", "fail": n % 3 == 0, "mended": str(mended)} for n in range(30)]
    first = list(runtime.map(flakies, contexts, key="name"))
    assert [r.success for r in first] == [n % 3 != 0 for n in range(30)]
    assert list(runtime.map(flakies, contexts, key="name")) == first, "what failed is finished too"
    still = list(runtime.map(flakies, contexts, key="name", retry_failed=True))
    assert [r.success for r in still] == [n % 3 != 0 for n in range(30)]
    mended.touch()
    mixed = list(runtime.map(flakies, [*contexts, contexts[0]], key="name", retry_failed=True))
    assert all(r.success for r in mixed)
    assert list(runtime.map(flakies, contexts, key="name", retry_failed=True)) == mixed[:30]
    assert [len(noted("flaky", c["name"])) for c in contexts] == [3 if n % 3 == 0 else 1 for n in range(30)]
    assert runtime.instance("flaky-0").status() == "completed"


def test_retry_failed_runs_a_key_that_comes_twice_once(runtime: Runtime, tmp_path: Path) -> None:
    context = {"name": "hopeless", "fail": True, "mended": str(tmp_path / "never")}
    runtime.execute(flakies, context, instance_id="hopeless", timeout=20)
    others = [{"name": f"between-{n}", "fail": False, "mended": ""} for n in range(500)]
    results = list(runtime.map(flakies, [context, *others, context], key="name", retry_failed=True))
    assert [results[0].success, results[-1].success] == [False, False]
    assert len(noted("flaky", "hopeless")) == 2


def test_retry_failed_does_not_run_again_what_has_failed_again_under_a_key_that_comes_later(
    runtime: Runtime, tmp_path: Path, eventually: Any
) -> None:
    context = {"name": "late", "fail": True, "mended": str(tmp_path / "never")}
    first = runtime.execute(flakies, context, instance_id="late", timeout=20)

    def contexts() -> Iterator[dict[str, Any]]:
        yield context
        has_ended_again = False
        for number in count():
            # Each pull is so slow that the iterator sends what it has, and looks at what has arrived.
            began = time.perf_counter()
            eventually(lambda began=began: time.perf_counter() - began > SLOW_PULL_SECONDS, "a slow pull")
            yield {"name": f"beside-{number}", "fail": False, "mended": ""}
            if has_ended_again:  # and the iterator has seen it
                break
            has_ended_again = runtime.instance("late").result(timeout=20).finished_at > first.finished_at
            if has_ended_again:  # and has left the broker, where it would be joined
                eventually(lambda: not runtime._session.lookup(["late"]), "its leaving")
            assert number < 2_000, "it has not ended again"
        yield context

    results = [each for each in runtime.map(flakies, contexts(), key="name", retry_failed=True) if not each.success]
    assert [each.instance_id for each in results] == ["late", "late"]
    assert len(noted("flaky", "late")) == 2


def test_a_refused_context_raises_in_its_place_and_the_iterator_goes_on(runtime: Runtime) -> None:
    contexts: list[Any] = [
        Job("a"),
        Job("b", -1),
        {"name": 5},
        {"name": "c", "n": 3},
        Job("d" * 200_000),
        "not a context",
        Job("e"),
    ]
    results = runtime.map(jobs, contexts)
    assert next(results).context.name == "a"
    for words in ("n is -1", "context.name must be str, not int"):
        with pytest.raises(InvalidContext, match=words):
            next(results)
    assert next(results).context == Job("c", 3)
    with pytest.raises(PayloadTooLarge, match="max_message_bytes=100000"):
        next(results)
    with pytest.raises(InvalidContext, match="must be Job"):
        next(results)
    assert next(results).context.name == "e"
    with pytest.raises(StopIteration):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_refused_contexts_do_not_hold_up_the_others_unordered(runtime: Runtime) -> None:
    results = runtime.map_unordered(jobs, [Job(f"u{n}", n if n % 2 else -n - 1) for n in range(200)])
    completed, refused = 0, 0
    while True:
        try:
            completed += next(results).success
        except StopIteration:
            break
        except InvalidContext:
            refused += 1
    assert (completed, refused) == (100, 100)


def test_an_error_of_the_input_itself_comes_after_what_it_gave(runtime: Runtime) -> None:
    def contexts() -> Iterator[Job]:
        yield Job("given-1")
        yield Job("given-2")
        raise OSError("the disk of the input is gone")

    results = runtime.map(jobs, contexts())
    assert [next(results).context.name for _ in range(2)] == ["given-1", "given-2"]
    with pytest.raises(OSError, match="disk of the input"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_an_interrupt_in_the_input_loses_nothing_that_it_gave(runtime: Runtime) -> None:
    def contexts() -> Iterator[Job]:
        yield Job("before", 1)
        raise KeyboardInterrupt

    results = runtime.map(jobs, contexts(), key="name")
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert [r.context.n for r in results] == [1]


def test_map_refuses_what_is_no_input(runtime: Runtime) -> None:
    with pytest.raises(TypeError):
        runtime.map(jobs, 5)  # type: ignore[arg-type]


def test_nothing_is_started_before_the_first_result_is_asked_for(runtime: Runtime) -> None:
    results = runtime.map(jobs, [Job("lazy")], key="name")
    with pytest.raises(InstanceNotFound):
        runtime.instance("lazy")
    assert next(results).success


def test_a_program_that_drops_an_iterator_still_waits_for_what_it_started(runtime: Runtime, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    results = runtime.map_unordered(jobs, [Job("q")] + [Job(f"drop-{n}", gate=str(gate)) for n in range(3)])
    assert next(results).success
    del results
    with pytest.raises(TimeoutError, match=r"^3 instances"):
        runtime.drain(timeout=0.05)
    gate.touch()
    runtime.drain(timeout=20)
    assert all(len(noted("ran", f"drop-{n}")) == 1 for n in range(3))


def test_progress_goes_to_stderr_and_never_to_stdout(runtime: Runtime, capfd: pytest.CaptureFixture[str]) -> None:
    assert sum(r.success for r in runtime.map(quicks, [{"n": n} for n in range(20)], progress=True)) == 20
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "20/20" in printed.err


def test_a_queue_shorter_than_a_batch_takes_all_in_time(serve: Any) -> None:
    runtime = serve(quicks, config=Config(max_queue_length=7))
    results = list(runtime.map(quicks, [{"n": n} for n in range(250)]))
    assert [r.context["n"] for r in results] == list(range(250))
