"""`connect`: opens a connection to the broker at an address.

Only this module and the composition root may import the ZeroMQ client.
"""

from __future__ import annotations

from pathlib import Path

from stageflow_actors.runtime.messaging.errors import translate_error
from stageflow_actors.runtime.system.data_dir import DataDirUnusable
from stageflow_brokers import api as port
from stageflow_brokers.api import Broker, Listener
from stageflow_brokers.errors import SocketNotPrivate
from stageflow_brokers.zeromq.client import ZmqClient

__all__ = ["connect"]


def connect(address: str, listener: Listener, *, role: str, name: str, peer: int = 0) -> Broker:
    """Return a connection to the broker at `address`; it reconnects automatically.

    Raises `DataDirUnusable` if other users have access to the directory of the broker's socket, `BrokerUnavailable` if
    too few file descriptors or threads are left.
    """
    try:
        return ZmqClient(address, listener, role=role, name=name, peer=peer)
    except SocketNotPrivate as error:
        raise DataDirUnusable(str(error), path=Path(error.path)) from None
    except port.BrokerUnavailable as error:
        raise translate_error(error) from None
