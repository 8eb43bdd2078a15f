"""`translate_error`: errors of the broker become errors of `stageflow_actors.errors`.

No error may be classified by its text: only its type decides.
"""

from __future__ import annotations

from stageflow_actors.errors import BrokerUnavailable, PayloadTooLarge, QueueFull, StageFlowError
from stageflow_brokers import api as port

__all__ = ["translate_error"]


def translate_error(error: BaseException) -> StageFlowError:
    """Return the `StageFlowError` that corresponds to an error of the broker, with the same text."""
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
