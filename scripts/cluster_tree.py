"""The processes of a cluster by kind, as the tree below its node shows them. Looks, and does nothing to them."""

from __future__ import annotations

import psutil

__all__ = ["BELOW_A_PROGRAM", "add_node"]

Found = dict[str, list[psutil.Process]]

BELOW_A_PROGRAM = ("node", "broker", "zygote", "worker")
"""The kinds."""


def add_node(node: psutil.Process, found: Found) -> None:
    """Put a node, and what is below it, into `found`. Raises `psutil.Error` where a process ends meanwhile; what was
    seen before is in `found` then."""
    for kind in BELOW_A_PROGRAM:
        found.setdefault(kind, [])
    found["node"].append(node)
    for child in node.children():
        if any("stageflow_brokers.zeromq.process" in word for word in child.cmdline()):
            found["broker"].append(child)
        else:
            found["zygote"].append(child)
            found["worker"] += child.children()
