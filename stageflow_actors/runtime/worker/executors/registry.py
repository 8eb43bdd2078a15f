"""The registry of executors: one table for workers and the in-process test runner."""

from __future__ import annotations

from stageflow_actors.core.plan import BRANCH, ENDPOINT, ITEM, MAP, PARALLEL, SIGNAL, STAGE
from stageflow_actors.runtime.worker.executors.base import Executor
from stageflow_actors.runtime.worker.executors.branch import BranchExecutor
from stageflow_actors.runtime.worker.executors.endpoint import EndpointExecutor
from stageflow_actors.runtime.worker.executors.join import JoinExecutor
from stageflow_actors.runtime.worker.executors.map import ItemExecutor, MapExecutor
from stageflow_actors.runtime.worker.executors.signal import SignalExecutor
from stageflow_actors.runtime.worker.executors.stage import StageExecutor

__all__ = ["EXECUTORS"]

EXECUTORS: dict[str, type[Executor]] = {
    STAGE: StageExecutor,
    PARALLEL: JoinExecutor,
    BRANCH: BranchExecutor,
    MAP: MapExecutor,
    ITEM: ItemExecutor,
    SIGNAL: SignalExecutor,
    ENDPOINT: EndpointExecutor,
}
"""The executor for each kind of place in a plan."""
