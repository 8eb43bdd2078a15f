"""Surroundings in which a cluster or a client cannot work: they are refused by name.

Without the refusal a call would wait forever, or a cluster that runs would count as dead.
"""

from __future__ import annotations

import os
import sys

from stageflow_actors.errors import StageFlowError

__all__ = ["check_process_table", "check_threads"]

_PATCHED_MODULES = ("threading", "thread", "socket", "select", "subprocess", "os", "queue", "time", "signal")


def check_threads() -> None:
    """Raise `StageFlowError` if gevent or eventlet has replaced what threads and sockets of this process do."""
    for library, module, question in (
        ("gevent", "gevent.monkey", "is_module_patched"),
        ("eventlet", "eventlet.patcher", "is_monkey_patched"),
    ):
        is_patched = getattr(sys.modules.get(module), question, None)
        patched = [] if is_patched is None else [name for name in _PATCHED_MODULES if is_patched(name)]
        if patched:
            names = ", ".join(dict.fromkeys("threading" if name == "thread" else name for name in patched))
            raise StageFlowError(
                f"{library} has patched {names} in this process, and StageFlow needs threads of the operating system: "
                "use it in another process, which is not patched (a script, `stageflow start`)"
            )


def check_process_table() -> None:
    """Raise `StageFlowError` if /proc does not show the processes that this process can start and end."""
    try:
        shown = os.readlink("/proc/self")
    except OSError:
        shown = ""
    if shown == str(os.getpid()):
        return
    if os.path.exists("/proc/stat"):
        what = "/proc shows the processes of another PID namespace"
    else:
        what = "/proc is not mounted"
    raise StageFlowError(
        f"{what}, and StageFlow reads there which processes run: mount it (`mount -t proc proc /proc`, or "
        "`unshare --mount-proc`), or start the container without hiding it"
    )
