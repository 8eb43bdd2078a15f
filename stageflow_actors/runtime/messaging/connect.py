"""Which broker carries the messages: the one place outside the composition root that knows of ZeroMQ."""

from __future__ import annotations

from pathlib import Path

from stageflow_actors.runtime.system.data_dir import DataDirUnusable
from stageflow_brokers.api import Broker, Listener
from stageflow_brokers.errors import SocketNotPrivate
from stageflow_brokers.zeromq.client import ZmqClient

__all__ = ["connect"]


def connect(address: str, listener: Listener, *, role: str, name: str, peer: int = 0) -> Broker:
    """A connection to the broker at `address`, which keeps itself up.

    Raises `DataDirUnusable` if others than this user have access to where the broker listens.
    """
    try:
        return ZmqClient(address, listener, role=role, name=name, peer=peer)
    except SocketNotPrivate as error:
        raise DataDirUnusable(str(error), path=Path(error.path)) from None
