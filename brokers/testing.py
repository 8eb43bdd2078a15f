"""The contract of `brokers.api`, as one suite of pytest tests that every broker passes.

Subclass `BrokerContract` in a test module whose fixtures `hub` and `supervised_hub` give running, empty brokers::

    class TestMyBroker(BrokerContract):
        pass

`hub` has no supervisor and takes messages of at most `LARGEST` bytes; `supervised_hub` waits for one. Nothing here
sleeps or knows how a broker works inside.
"""

from __future__ import annotations

from brokers.contract.delivery import DeliveryContract
from brokers.contract.gathering import GatherContract
from brokers.contract.grouping import GroupContract
from brokers.contract.harness import PATIENCE, Hub, Peer, Received
from brokers.contract.operation import LARGEST, OperationContract
from brokers.contract.oversight import OversightContract
from brokers.contract.rerunning import RerunContract
from brokers.contract.settlement import SettlementContract

__all__ = ["LARGEST", "PATIENCE", "BrokerContract", "Hub", "Peer", "Received"]


class BrokerContract(
    DeliveryContract,
    SettlementContract,
    GroupContract,
    GatherContract,
    RerunContract,
    OversightContract,
    OperationContract,
):
    """All of it."""
