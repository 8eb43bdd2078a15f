"""The registry of executors: one table for workers and the in-process test runner."""

from __future__ import annotations

from stageflow_actors.core.plan import BRANCH, ENDPOINT, ITEM, MAP, PARALLEL, SIGNAL, STAGE
from stageflow_actors.runtime.choice_work import BranchExecutor
from stageflow_actors.runtime.endpoint_work import EndpointExecutor
from stageflow_actors.runtime.join_work import JoinExecutor
from stageflow_actors.runtime.map_work import ItemExecutor, MapExecutor
from stageflow_actors.runtime.signal_work import SignalExecutor
from stageflow_actors.runtime.stage_work import StageExecutor
from stageflow_actors.runtime.work import Executor

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
