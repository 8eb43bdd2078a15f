"""The contract of `stageflow_brokers.api`, as one suite of pytest tests that every broker passes.

Subclass `BrokerContract` in a test module whose fixtures `hub` and `supervised_hub` give running, empty brokers::

    class TestMyBroker(BrokerContract):
        pass

`hub` has no supervisor and takes messages of at most `LARGEST` bytes; `supervised_hub` waits for one. Nothing here
sleeps or knows how a broker works inside.
"""

from __future__ import annotations

from stageflow_brokers.contract.delivery import DeliveryContract
from stageflow_brokers.contract.gathering import GatherContract
from stageflow_brokers.contract.grouping import GroupContract
from stageflow_brokers.contract.harness import PATIENCE, Hub, Peer, Received
from stageflow_brokers.contract.operation import LARGEST, OperationContract
from stageflow_brokers.contract.oversight import OversightContract
from stageflow_brokers.contract.rerunning import RerunContract
from stageflow_brokers.contract.settlement import SettlementContract

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
