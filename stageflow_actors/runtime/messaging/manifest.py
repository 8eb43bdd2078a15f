"""`ClusterManifest`: the plans, names and limits of a cluster, for clients in other processes. No code.

The node keeps it in the broker as a fact, so that a client which reaches the broker knows what it may submit.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct, structs

from stageflow_actors.core.plan import Naming, WorkflowPlan

__all__ = ["MANIFEST_FACT", "ClusterManifest", "read_manifest", "write_manifest"]

MANIFEST_FACT = "served"


class ClusterManifest(Struct):
    """One cluster as its clients see it. The environment of workers is left out of the plans: it may hold secrets."""

    plans: list[WorkflowPlan]
    naming: Naming
    max_message_bytes: int

    @property
    def names(self) -> str:
        """The workflows for an error message: `orders (version 1, 2), refunds (version 1)`."""
        versions: dict[str, list[int]] = {}
        for plan in self.plans:
            versions.setdefault(plan.id, []).append(plan.version)
        return (
            ", ".join(f"{name} (version {', '.join(map(str, sorted(found)))})" for name, found in versions.items())
            or "none"
        )


def write_manifest(served: ClusterManifest) -> str:
    """As the fact is kept."""
    plans = [
        structs.replace(plan, stages=[structs.replace(stage, env={}) for stage in plan.stages]) for plan in served.plans
    ]
    return msgspec.json.encode(structs.replace(served, plans=plans)).decode()


def read_manifest(fact: str | None) -> ClusterManifest | None:
    """What the fact says; None where there is none yet, or one of another release."""
    if fact is None:
        return None
    try:
        return msgspec.json.decode(fact, type=ClusterManifest)
    except msgspec.MsgspecError:
        return None
