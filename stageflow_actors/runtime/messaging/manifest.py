"""`ClusterManifest`: the plans, names and limits of a cluster, for clients in other processes.

The node stores it in the broker as a fact, so that every client of the broker knows which workflows it can submit. It
must not contain code.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct, structs

from stageflow_actors.core.plan import Naming, WorkflowPlan

__all__ = ["MANIFEST_FACT", "ClusterManifest", "read_manifest", "write_manifest"]

MANIFEST_FACT = "served"
"""Name of the fact in the broker."""


class ClusterManifest(Struct):
    """One cluster as its clients see it.

    Its plans do not contain the environment of workers, which may hold secrets.
    """

    plans: list[WorkflowPlan]
    naming: Naming
    max_message_bytes: int

    @property
    def names(self) -> str:
        """The workflows, for an error message: `orders (version 1, 2), refunds (version 1)`."""
        versions: dict[str, list[int]] = {}
        for plan in self.plans:
            versions.setdefault(plan.id, []).append(plan.version)
        return (
            ", ".join(f"{name} (version {', '.join(map(str, sorted(found)))})" for name, found in versions.items())
            or "none"
        )


def write_manifest(manifest: ClusterManifest) -> str:
    """Return the value of the fact."""
    plans = [
        structs.replace(plan, stages=[structs.replace(stage, env={}) for stage in plan.stages])
        for plan in manifest.plans
    ]
    return msgspec.json.encode(structs.replace(manifest, plans=plans)).decode()


def read_manifest(fact: str | None) -> ClusterManifest | None:
    """Return the manifest in a fact; None if there is no fact, or another release wrote it."""
    if fact is None:
        return None
    try:
        return msgspec.json.decode(fact, type=ClusterManifest)
    except msgspec.MsgspecError:
        return None
