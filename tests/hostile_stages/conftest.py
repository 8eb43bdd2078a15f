"""The load that hostile stages are measured against: other stages that work at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cluster_fixtures import serve
from programs import launch

from stageflow_actors import Runtime, Workflow

__all__ = ["launch", "others_of", "serve"]

SLOWDOWN = 4
"""A hostile stage may slow the others down to this part of their usual rate: it takes their CPU time."""

STANDSTILL_SECONDS = 2.0
"""Seconds for which the load may stand still on a busy machine, or while a process that all need starts again.

It must not show overall."""

MEASURED_SECONDS = 0.5
"""Seconds over which the rate without disturbance is measured."""


class Others:
    """Somebody who has work done by `workflow`, one instance after the other, all the time."""

    def __init__(self, runtime: Runtime, workflow: Workflow[Any]) -> None:
        self._runtime = runtime
        self._workflow = workflow
        self._stopping = threading.Event()
        self._failed: list[object] = []
        self.completed = 0
        self._beside = (0.0, 0)
        self._thread = threading.Thread(target=self._work, name="others")
        self._thread.start()
        self.undisturbed = self._measure()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    @contextmanager
    def go_on(self) -> Iterator[None]:
        """What is done within takes no more from them than the machine's time."""
        began, before = time.monotonic(), self.completed
        yield
        seconds, done = time.monotonic() - began, self.completed - before
        assert not self._failed, f"another stage's instance ended like this: {self._failed[0]}"
        self._beside = (self._beside[0] + seconds, self._beside[1] + done)
        self._compare(seconds, done, STANDSTILL_SECONDS)
        self._await_one()

    def all_in_all(self) -> None:
        """What was done within all of that is comparable to what is done without."""
        self._compare(*self._beside, 0.0)

    def _compare(self, seconds: float, done: int, blip: float) -> None:
        counted = max(0.0, seconds - blip) / SLOWDOWN
        if done < self.undisturbed * counted:
            # Somebody else on this machine may be at work now who was not when we began.
            self.undisturbed = min(self.undisturbed, self._measure())
        usual = self.undisturbed * seconds
        assert done >= self.undisturbed * counted, f"{done} instances in {seconds:.2f} s, where {usual:.0f} are usual"

    def _measure(self) -> float:
        self._await_one()
        began, before = time.monotonic(), self.completed
        self._stopping.wait(MEASURED_SECONDS)
        return (self.completed - before) / (time.monotonic() - began)

    def _await_one(self) -> None:
        before, deadline = self.completed, time.monotonic() + 20
        while self.completed == before:
            assert time.monotonic() < deadline, "the other stages do nothing at all"
            self._stopping.wait(0.005)

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                result = self._runtime.execute(self._workflow, {}, timeout=20)
            except Exception as error:
                self._failed.append(error)
                return
            if result.success:
                self.completed += 1
            else:
                self._failed.append(result)


@pytest.fixture(scope="session")
def others_of() -> Callable[..., Others]:
    """`others_of(runtime, workflow)`: see `Others`."""
    return Others
