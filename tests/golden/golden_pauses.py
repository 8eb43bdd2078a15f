"""The workflows of the instances in `data-paused-by-pool.tar.xz`; their code must stay as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from stageflow_actors import Workflow


def bank() -> object:
    """Return the service; it cannot be made until the file that the environment names exists."""
    if not Path(os.environ["GOLDEN_GATE"]).exists():
        raise ConnectionError("no route to bank")
    return object()


def pay(order: dict[str, Any], *, bank: object) -> str:
    return f"paid {order['number']}"


def pack(order: dict[str, Any]) -> str:
    return f"packed {order['number']}"


given_up = Workflow("given-up").add_stage(pay, id="pay", actors=2)
confirmed = Workflow("confirmed").add_stage(pay, id="pay")
held = Workflow("held").add_stage(pack, id="pack")
