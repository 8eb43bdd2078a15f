"""Which work is done at which kind of place: one table, for workers and for the in-process runner."""

from __future__ import annotations

from stageflow_actors.core.plan import BRANCH, ENDPOINT, ITEM, MAP, PARALLEL, SIGNAL, STAGE
from stageflow_actors.runtime.choice_work import ChoiceWork
from stageflow_actors.runtime.endpoint_work import EndpointWork
from stageflow_actors.runtime.join_work import JoinWork
from stageflow_actors.runtime.map_work import ItemWork, MapWork
from stageflow_actors.runtime.signal_work import SignalWork
from stageflow_actors.runtime.stage_work import StageWork
from stageflow_actors.runtime.work import Work

__all__ = ["WORKS"]

WORKS: dict[str, type[Work]] = {
    STAGE: StageWork,
    PARALLEL: JoinWork,
    BRANCH: ChoiceWork,
    MAP: MapWork,
    ITEM: ItemWork,
    SIGNAL: SignalWork,
    ENDPOINT: EndpointWork,
}
