"""Which broker carries the messages: the one place outside the composition root that knows of ZeroMQ."""

from __future__ import annotations

from brokers.api import Broker, Listener
from brokers.zeromq.client import ZmqClient

__all__ = ["connect"]


def connect(address: str, listener: Listener, *, role: str, name: str, peer: int = 0) -> Broker:
    """A connection to the broker at `address`, which keeps itself up."""
    return ZmqClient(address, listener, role=role, name=name, peer=peer)
