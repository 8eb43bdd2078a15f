"""Exit codes by which a parent decides what follows the end of a child.

Constants only. The values are those of `sysexits.h` where it has one that fits.
"""

from __future__ import annotations

__all__ = [
    "EXIT_CUT_OFF",
    "EXIT_DAMAGED",
    "EXIT_NODE_FAILED",
    "EXIT_RECYCLED",
    "EXIT_UNHANDLED",
    "EXIT_UNLOADABLE",
]

EXIT_CUT_OFF = 69
"""A worker lost its connection to the broker permanently (`EX_UNAVAILABLE`)."""

EXIT_UNHANDLED = 70
"""The entry function of a worker raised, or its actor stopped in the middle of a message (`EX_SOFTWARE`)."""

EXIT_DAMAGED = 71
"""A handler closed a standard descriptor of its worker, whose process can no longer be relied on (`EX_OSERR`)."""

EXIT_NODE_FAILED = 71
"""A thread of the node failed that the node cannot do without; the node is restarted (`EX_OSERR`)."""

EXIT_UNLOADABLE = 78
"""The code of a worker could not be loaded, or its services could not be made (`EX_CONFIG`)."""

EXIT_RECYCLED = 99
"""A worker finished the work it was started for. Neither Python nor a handler ends a process with this code."""
