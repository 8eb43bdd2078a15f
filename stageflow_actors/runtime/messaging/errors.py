"""What a broker refuses, in the words of those who asked: its errors know of frames and queues, ours of workflows."""

from __future__ import annotations

from stageflow_actors.errors import BrokerUnavailable, PayloadTooLarge, QueueFull, StageFlowError
from stageflow_brokers import api as port

__all__ = ["translate_error"]


def translate_error(error: BaseException) -> StageFlowError:
    """The error of ours that says what `error` of a broker says."""
    text = str(error)
    if isinstance(error, port.QueueFull):
        return QueueFull(text, queue=error.queue or None, limit=error.limit)
    if isinstance(error, port.PayloadTooLarge):
        return PayloadTooLarge(text, size=error.size, limit=error.limit)
    if isinstance(error, port.BrokerUnavailable):
        return BrokerUnavailable(text)
    if isinstance(error, port.StorageFull):
        return QueueFull(text)
    return StageFlowError(text)
