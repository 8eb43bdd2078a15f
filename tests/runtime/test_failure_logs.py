"""What a program's log and its results say of failures in real workers."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_fixtures import Serve, serve

from stageflow_actors import Config, InstanceParked, Retry, Runtime, Stage, StageContext, Workflow
from stageflow_actors.core.tracebacks.table import MAX_TRACEBACK_BYTES

__all__ = ["serve"]

Row = dict[str, Any]


def deep_helper(row: Row) -> Any:
    return row["custmer"]


def fails(row: Row) -> None:
    deep_helper(row)


def fails_once(row: Row, ctx: StageContext) -> None:
    if ctx.attempt == 1:
        raise ConnectionError("bank closed")


def fine(row: Row) -> None:
    return None


def undo_fails(row: Row) -> None:
    raise LookupError("nothing to undo")


async def wait_too_long(row: Row) -> None:
    await slow_answer()


async def slow_answer() -> None:
    await asyncio.sleep(60)


async def wait_in_a_plain_stage(row: Row) -> None:
    await slow_answer()


def crash(row: Row) -> None:
    ctypes.string_at(0)


class LongError(Exception):
    def __str__(self) -> str:
        return "x" * 10_000_000


def long_error(row: Row) -> None:
    raise LongError from ValueError("y" * 1_000_000)


plain: Workflow[Row] = Workflow("plain").add_stage(fine, compensation=undo_fails).add_stage(fails)
shaky: Workflow[Row] = Workflow("shaky").add_stage(fails_once, retry=Retry.fixed(3, 0.01)).add_stage(fine)
parks: Workflow[Row] = Workflow("parks", on_failure="park").add_stage(fine).add_stage(fails)
late: Workflow[Row] = Workflow("late").add_stage(Stage(wait_too_long, timeout=0.3, concurrency=2))
late_alone: Workflow[Row] = Workflow("late-alone").add_stage(Stage(wait_in_a_plain_stage, timeout=0.3))
crashes: Workflow[Row] = Workflow("crashes").add_stage(crash, retry=Retry.fixed(1, 0))
long: Workflow[Row] = Workflow("long").add_stage(long_error)
storm: Workflow[Row] = Workflow("storm").add_stage(fails, actors=2)


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def of(self, instance_id: str, level: int) -> list[logging.LogRecord]:
        return [r for r in self.records if getattr(r, "instance_id", "") == instance_id and r.levelno == level]


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    kept = Kept()
    logger = logging.getLogger("stageflow_actors")
    logger.addHandler(kept)
    yield kept
    logger.removeHandler(kept)


@pytest.fixture(scope="module")
def cluster(kept: Kept, serve: Serve) -> Runtime:
    return serve(plain, shaky, parks, late, late_alone, crashes, long, config=Config(max_stage_retries=2))


def test_each_failed_attempt_is_a_warning_and_the_failed_instance_an_error(
    cluster: Runtime, kept: Kept, eventually: Callable[..., Any]
) -> None:
    result = cluster.execute(plain, {}, timeout=60)
    assert result.status == "compensation_failed"
    error = eventually(lambda: kept.of(result.instance_id, logging.ERROR), "the failed instance")[0]
    stage, undo = kept.of(result.instance_id, logging.WARNING)
    assert stage.name.startswith("stageflow_actors.")
    text = (
        f"instance {result.instance_id!r} of workflow 'plain': attempt 1 of stage 'fails' failed: KeyError: 'custmer'"
    )
    assert stage.getMessage() == text
    assert (stage.__dict__["workflow_id"], stage.__dict__["stage_id"], stage.__dict__["attempt"]) == (
        "plain",
        "fails",
        1,
    )
    assert "in deep_helper" in str(stage.exc_text)
    assert "stageflow_actors/runtime" not in str(stage.exc_text)
    assert "the compensation of stage 'fine' failed: LookupError" in undo.getMessage()
    assert "in undo_fails" in str(undo.exc_text)
    assert "has ended compensation_failed at stage 'fails': KeyError: 'custmer'" in error.getMessage()
    assert not error.exc_text
    assert stage.exc_text == result.stage("fails").traceback
    assert undo.exc_text == result.compensations[0].traceback


def test_an_attempt_that_is_tried_again_says_when_and_its_traceback_stays_with_the_stage(
    cluster: Runtime, kept: Kept, eventually: Callable[..., Any]
) -> None:
    result = cluster.execute(shaky, {}, timeout=60)
    assert result.success
    (record,) = eventually(lambda: kept.of(result.instance_id, logging.WARNING), "the failed attempt")
    assert "attempt 1 of stage 'fails-once' failed (the next follows in 0.01 s): ConnectionError" in record.getMessage()
    assert record.exc_text == result.stage("fails-once").traceback
    assert not kept.of(result.instance_id, logging.ERROR)
    assert eventually(lambda: cluster.instance(result.instance_id).result(30).stage("fails-once").traceback, "history")


def test_a_parked_instance_is_one_error_that_names_its_dead_letter(
    cluster: Runtime, kept: Kept, eventually: Callable[..., Any]
) -> None:
    instance = cluster.submit(parks, {"n": 1})
    with pytest.raises(InstanceParked):
        instance.result(60)
    (record,) = eventually(lambda: kept.of(instance.id, logging.ERROR), "the dead letter")
    text = record.getMessage()
    assert text.startswith(
        f"dead letter in dlq.stageflow.parks.stage1: stage 'fails' failed for instance {instance.id!r}"
    )
    assert text.endswith("KeyError: 'custmer'")
    assert (record.__dict__["workflow_id"], record.__dict__["stage_id"]) == ("parks", "fails")
    assert not record.exc_text


def test_a_timeout_shows_where_the_coroutine_waited(cluster: Runtime) -> None:
    for flow in (late, late_alone):
        result = cluster.execute(flow, {}, timeout=60)
        assert str(result.error).startswith("StageTimeout")
        text = str(result.stages[0].traceback)
        assert "in slow_answer\n    await asyncio.sleep(60)" in text
        assert "ran longer than its timeout" in text.splitlines()[-1]


def test_a_crash_in_c_shows_the_frames_that_led_there(cluster: Runtime) -> None:
    result = cluster.execute(crashes, {}, timeout=60)
    assert str(result.error).startswith("WorkerDied")
    text = str(result.stages[0].traceback)
    assert "Segmentation fault" in text
    assert "in crash\n" in text + "\n"
    assert "stageflow_actors/runtime" not in text


def test_an_error_of_ten_megabytes_fails_the_stage_and_nothing_else(cluster: Runtime) -> None:
    result = cluster.execute(long, {}, timeout=60)
    assert result.status == "failed"
    assert len(str(result.error)) < 3_000
    assert len(str(result.stages[0].traceback).encode()) <= MAX_TRACEBACK_BYTES
    assert "in long_error" in str(result.stages[0].traceback)


def test_a_storm_of_failures_is_logged_ten_times_a_second_and_counted(kept: Kept, tmp_path: Path) -> None:
    kept.records.clear()
    began = time.monotonic()
    with Runtime(storm, data_dir=tmp_path / "data") as runtime:
        failed = [one for one in runtime.map_unordered(storm, [{"n": n} for n in range(400)]) if not one.success]
    seconds = time.monotonic() - began
    assert len(failed) == 400
    records = [record for record in kept.records if record.levelno == logging.WARNING]
    attempts = [record for record in records if record.__dict__.get("failed_attempts") == 1]
    counts = [record for record in records if record.__dict__.get("failed_attempts", 0) > 1]
    assert 10 <= len(attempts) <= 10 * (seconds + 1)
    assert all("more attempts of stage 'fails' of workflow 'storm' have failed" in r.getMessage() for r in counts)
    assert len(attempts) + sum(record.__dict__["failed_attempts"] for record in counts) == 400
