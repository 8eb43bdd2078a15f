"""`Config`: the settings of a cluster, validated by the constructor."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from stageflow_actors.core.plan import DLQ_PREFIX
from stageflow_actors.definition.duration import optional_seconds, seconds
from stageflow_actors.definition.guesses import adapts
from stageflow_actors.errors import StageFlowError

__all__ = ["Config"]

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a cluster. Durations are seconds or `timedelta`.

    Args:
        stage_queue_prefix: Stage queues are named `{stage_queue_prefix}{workflow}.stage{index}`. Default: `stageflow.`.
        compensation_queue_prefix: Compensation queues are named `{compensation_queue_prefix}{workflow}`. Default:
            `stageflow.compensation.`.
        max_stage_concurrency: Most messages in work at once in one stage, from 1; None (the default) for no limit.
        stage_message_ttl: How long a message may wait in a stage's queue before the stage fails; None (the default) for
            no limit.
        max_stage_retries: Limit of worker deaths (not of retries): with so many deaths a message becomes a dead letter,
            whatever its retry policy. From 1. Default: 3.
        durability: `fsync` (the default) survives a crash of the machine, `write` a crash of any process, `memory`
            nothing.
        history_retention: How long finished instances are kept, and their ids stay taken; None (the default) for no
            limit.
        max_message_bytes: Largest context with its results, in bytes, from 1. Default: 16 MiB.
        max_queue_length: Most messages that may wait at a first stage before `QueueFull`, from 1; None (the default)
            for no limit.
        worker_stop_timeout: Time in which a worker that holds no message has to end when it is stopped, scaled down or
            recycled: its services are closed, `atexit` functions run, and processes that its handlers started end. It
            is killed afterwards. 0 kills it at once. Default: 5.
        start_timeout: How long `start()` and `register()` wait for workers to load their code, greater than 0; after
            that they return. A pool of which no worker has started in this time is `failing`, with the step that has
            not ended as its reason. Default: 120 seconds.
        log_level: Least level of the records of StageFlow's own loggers, and of all loggers of a program that has not
            configured logging: `DEBUG`, `INFO`, `WARNING`, `ERROR` or `CRITICAL`. Default: `WARNING`, or what the
            program's logging is configured to.

    Raises:
        ValueError: If a setting is out of range; the message names the setting.

    Example:
        >>> from datetime import timedelta
        >>> from stageflow_actors import Config
        >>> config = Config(durability="write", history_retention=timedelta(days=30))
        >>> config.retention_seconds
        2592000.0
        >>> try:
        ...     Config(durability="disk")
        ... except ValueError as error:
        ...     print(error)
        Config.durability must be 'fsync', 'write' or 'memory', not 'disk'
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
    worker_stop_timeout: float | timedelta = 5.0
    start_timeout: float | timedelta = 120

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
        try:
            seconds(self.worker_stop_timeout, "Config.worker_stop_timeout")
            seconds(self.start_timeout, "Config.start_timeout", zero=False)
        except StageFlowError as error:
            raise ValueError(str(error)) from None

    @property
    def worker_stop_seconds(self) -> float:
        """`worker_stop_timeout` in seconds."""
        return seconds(self.worker_stop_timeout, "worker_stop_timeout")

    @property
    def ttl_seconds(self) -> float:
        """`stage_message_ttl` in seconds; 0 for no limit.

        Example:
            >>> from datetime import timedelta
            >>> from stageflow_actors import Config
            >>> Config(stage_message_ttl=timedelta(minutes=1)).ttl_seconds, Config().ttl_seconds
            (60.0, 0.0)
        """
        return optional_seconds(self.stage_message_ttl, "stage_message_ttl") or 0.0

    @property
    def retention_seconds(self) -> float | None:
        """`history_retention` in seconds; None for no limit."""
        return optional_seconds(self.history_retention, "history_retention")

    @property
    def start_timeout_seconds(self) -> float:
        """`start_timeout` in seconds."""
        return seconds(self.start_timeout, "start_timeout")


Config.__init__ = adapts("Config(durability='write', max_queue_length=100_000, ...)")(  # type: ignore[method-assign]
    Config.__init__
)
