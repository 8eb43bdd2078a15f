"""The contract of `stageflow_brokers.api`, as one suite of pytest tests that every broker passes.

Subclass `BrokerContract` in a test module whose fixtures `hub` and `supervised_hub` give running, empty brokers::

    class TestMyBroker(BrokerContract):
        pass

`hub` has no supervisor and accepts messages of at most `MAX_MESSAGE_BYTES` bytes; `supervised_hub` expects a
supervisor. No test sleeps or depends on the internals of a broker.
"""

from __future__ import annotations

from stageflow_brokers.testing.contract_admin import MAX_MESSAGE_BYTES, AdminContract
from stageflow_brokers.testing.contract_delivery import DeliveryContract
from stageflow_brokers.testing.contract_gathers import GatherContract
from stageflow_brokers.testing.contract_groups import GroupContract
from stageflow_brokers.testing.contract_recall import RecallContract
from stageflow_brokers.testing.contract_restarts import RestartContract
from stageflow_brokers.testing.contract_settlement import SettlementContract
from stageflow_brokers.testing.contract_supervision import SupervisionContract
from stageflow_brokers.testing.harness import TIMEOUT_SECONDS, Hub, Peer, Received

__all__ = ["MAX_MESSAGE_BYTES", "TIMEOUT_SECONDS", "BrokerContract", "Hub", "Peer", "Received"]


class BrokerContract(
    DeliveryContract,
    SettlementContract,
    GroupContract,
    GatherContract,
    RestartContract,
    RecallContract,
    SupervisionContract,
    AdminContract,
):
    """All parts of the contract."""
