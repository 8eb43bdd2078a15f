"""The state of each stage in a real Redis server, which this test starts on a free port."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import WorkflowStatus
from stageflow_actors.testing import run

redis = pytest.importorskip("redis", reason="the package redis is not installed")

from external_state import Order, SaveState, main, orders, read_state  # noqa: E402 - needs redis

SECONDS = 20


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        client.flushdb()
        yield client


def test_each_stage_leaves_its_state_in_the_store(redis_url: str, client: Any, tmp_path: Path) -> None:
    paid, declined = main(redis_url, str(tmp_path / "data"))
    assert (paid.status, declined.status) == (WorkflowStatus.completed, WorkflowStatus.compensated)

    state = read_state(client, "orders", paid.instance_id)
    assert state["context"] == {"order_id": "ORDER-1", "total": 99.5, "reserved": True, "paid": True}
    assert (state["stage:reserve"]["status"], state["stage:reserve"]["result"]) == ("completed", {"shelf": 7})
    assert (state["stage:pay"]["status"], state["stage:pay"]["result"]) == ("completed", "receipt for 99.5")

    state = read_state(client, "orders", declined.instance_id)
    assert state["stage:pay"]["error"] == "ValueError: the card was declined"
    assert state["stage:reserve"]["status"] == "compensated"
    assert state["context"]["reserved"] is False


def test_the_example_runs_as_its_docstring_describes(redis_url: str, client: Any, tmp_path: Path) -> None:
    example = Path(main.__code__.co_filename)
    done = subprocess.run(
        [sys.executable, str(example), redis_url], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert "ORDER-1: completed" in done.stdout
    assert 'stage:pay: {"status":"failed"' in done.stdout


def test_a_store_that_is_away_fails_no_order_unless_it_has_to(
    caplog: pytest.LogCaptureFixture, redis_url: str, client: Any
) -> None:
    away = "redis://127.0.0.1:1/0"
    assert run(orders, Order("ORDER-3", 10), interceptors=[SaveState(away)]).status == WorkflowStatus.completed
    assert "could not be saved" in caplog.text
    strict = run(orders, Order("ORDER-4", 10), interceptors=[SaveState(away, strict=True)])
    assert strict.status == WorkflowStatus.failed
    assert strict.error is not None
    assert strict.error.startswith("ConnectionError")
