"""The workflows of the instances in `data-0.1.tar.xz`; their code must stay as it is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stageflow_actors import Retry, StageContext, Workflow


@dataclass
class Parcel:
    """One parcel; `trouble` chooses how it ends."""

    number: int
    trouble: str = ""
    weights: list[int] = field(default_factory=list)
    sent: bool = False


def is_mended() -> bool:
    """Return True once the program may go on: the environment names a file that exists."""
    return Path(os.environ["GOLDEN_GATE"]).exists()


parcels = Workflow("parcels", context=Parcel)


@parcels.stage
def pack(parcel: Parcel, ctx: StageContext) -> dict[str, Any]:
    ctx.step("label", lambda: f"label-{parcel.number}")
    parcel.weights.append(parcel.number)
    return {"label": ctx.get_step_result("label")}


@pack.compensation
def unpack(parcel: Parcel) -> None:
    parcel.weights.clear()


@parcels.stage(retry=Retry.fixed(1000, 0.5, retry_on=OSError))
def send(parcel: Parcel, ctx: StageContext) -> str:
    if parcel.trouble == "lost":
        raise ValueError("the parcel is lost")
    if parcel.trouble == "held" and not is_mended():
        ctx.step("asked", lambda: parcel.number)
        raise OSError("customs are closed")
    parcel.sent = True
    return f"sent-{parcel.number}"


def note_receipt(parcel: Parcel, payload: Any) -> None:
    parcel.sent = bool(payload)


def count(parcel: Parcel) -> int:
    return len(parcel.weights)


signed = (
    Workflow("signed-parcels", context=Parcel)
    .add_stage(count)
    .add_signal("receipt", timeout=1_000_000_000, on_signal=note_receipt)
    .add_stage(count, id="recount")
)

parked = Workflow("parked-parcels", context=Parcel, on_failure="park")


@parked.stage
def weigh(parcel: Parcel) -> int:
    if parcel.trouble == "heavy" and not is_mended():
        raise ValueError("too heavy")
    return parcel.number
