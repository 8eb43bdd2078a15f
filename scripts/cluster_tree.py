"""The processes of a cluster by kind, from the process tree below its node. Read-only."""

from __future__ import annotations

import psutil

__all__ = ["BELOW_A_PROGRAM", "add_node"]

Found = dict[str, list[psutil.Process]]

BELOW_A_PROGRAM = ("node", "broker", "zygote", "worker")
"""The kinds."""


def add_node(node: psutil.Process, found: Found) -> None:
    """Add a node and its descendants to `found`.

    Raises `psutil.Error` if a process ends in between; those found before are in `found`.
    """
    for kind in BELOW_A_PROGRAM:
        found.setdefault(kind, [])
    found["node"].append(node)
    for child in node.children():
        if any("stageflow_brokers.zeromq.process" in word for word in child.cmdline()):
            found["broker"].append(child)
        else:
            found["zygote"].append(child)
            found["worker"] += child.children()
