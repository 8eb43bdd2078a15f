"""The contract of `stageflow_brokers.api`, as one suite of pytest tests that every broker passes.

Subclass `BrokerContract` in a test module whose fixtures `hub` and `supervised_hub` give running, empty brokers::

    class TestMyBroker(BrokerContract):
        pass

`hub` has no supervisor and takes messages of at most `LARGEST` bytes; `supervised_hub` waits for one. Nothing here
sleeps or knows how a broker works inside.
"""

from __future__ import annotations

from stageflow_brokers.testing.contract_admin import LARGEST, AdminContract
from stageflow_brokers.testing.contract_delivery import DeliveryContract
from stageflow_brokers.testing.contract_gathers import GatherContract
from stageflow_brokers.testing.contract_groups import GroupContract
from stageflow_brokers.testing.contract_restarts import RestartContract
from stageflow_brokers.testing.contract_settlement import SettlementContract
from stageflow_brokers.testing.contract_supervision import SupervisionContract
from stageflow_brokers.testing.harness import PATIENCE, Hub, Peer, Received

__all__ = ["LARGEST", "PATIENCE", "BrokerContract", "Hub", "Peer", "Received"]


class BrokerContract(
    DeliveryContract,
    SettlementContract,
    GroupContract,
    GatherContract,
    RestartContract,
    SupervisionContract,
    AdminContract,
):
    """All of it."""
