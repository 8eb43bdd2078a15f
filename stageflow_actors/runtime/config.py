"""`Config`: the settings of a cluster, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from stageflow_actors.core.plan import DLQ_PREFIX
from stageflow_actors.definition.duration import optional_seconds
from stageflow_actors.errors import StageFlowError

__all__ = ["Config"]

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a cluster.

    Queues are named `{stage_queue_prefix}{workflow}.stage{index}` and `{compensation_queue_prefix}{workflow}`.
    `max_stage_retries`: worker deaths one message may cause before it is a dead letter. `stage_message_ttl`: how long
    a message may wait in a stage's queue. `durability`: `fsync` survives the machine, `write` any process, `memory`
    nothing. `history_retention`: how long finished instances are kept (None: for ever), which is also how long their
    ids stay taken. `max_message_bytes`: largest context with results; `max_queue_length`: most messages that may wait
    at a first stage; `max_stage_concurrency`: most messages in work at once in one stage. Durations are seconds or
    `timedelta`. Raises `ValueError` naming the setting.
    """

    stage_queue_prefix: str = "stageflow."
    compensation_queue_prefix: str = "stageflow.compensation."
    max_stage_concurrency: int | None = None
    stage_message_ttl: float | timedelta | None = None
    max_stage_retries: int = 3
    durability: Literal["fsync", "write", "memory"] = "fsync"
    history_retention: float | timedelta | None = None
    max_message_bytes: int = 16 << 20
    max_queue_length: int | None = None
    log_level: str = "WARNING"

    def __post_init__(self) -> None:
        for name in ("stage_queue_prefix", "compensation_queue_prefix"):
            value = getattr(self, name)
            if not isinstance(value, str) or not 0 < len(value) <= 200 or value.startswith(DLQ_PREFIX):
                raise ValueError(f"Config.{name} must be a string such as 'stageflow.', not {value!r}")
        for name in ("max_stage_retries", "max_message_bytes", "max_queue_length", "max_stage_concurrency"):
            value = getattr(self, name)
            if value is None and name.startswith(("max_queue", "max_stage_c")):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Config.{name} must be a whole number from 1, not {value!r}")
        if self.durability not in ("fsync", "write", "memory"):
            raise ValueError(f"Config.durability must be 'fsync', 'write' or 'memory', not {self.durability!r}")
        if not isinstance(self.log_level, str) or self.log_level.upper() not in _LEVELS:
            raise ValueError(f"Config.log_level must be one of {', '.join(_LEVELS)}, not {self.log_level!r}")
        for name in ("stage_message_ttl", "history_retention"):
            try:
                optional_seconds(getattr(self, name), f"Config.{name}")
            except StageFlowError as error:
                raise ValueError(str(error)) from None

    @property
    def ttl_seconds(self) -> float:
        """`stage_message_ttl` in seconds, 0 for none."""
        return optional_seconds(self.stage_message_ttl, "stage_message_ttl") or 0.0

    @property
    def retention_seconds(self) -> float | None:
        """`history_retention` in seconds."""
        return optional_seconds(self.history_retention, "history_retention")
