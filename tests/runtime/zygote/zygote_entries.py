"""Entry points of the workers of these tests. The payload is a JSON list: a function name, then its arguments."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time

from stageflow_actors.runtime.ipc.slots import Slot


def entry(payload: bytes, slot: Slot | None) -> int | None:
    name, *arguments = json.loads(payload)
    if slot is not None:
        slot.begin(1_000 + len(arguments), 0, time.monotonic_ns())
    result: int | None = globals()[name](*arguments)
    return result


def leave(code: int) -> int:
    return code


def size(fd: int, text: str) -> None:
    os.write(fd, f"{len(text)}\n".encode())


def system_exit(code: object) -> None:
    sys.exit(code)  # type: ignore[arg-type]


def fail() -> None:
    raise ValueError("this worker fails")


def segfault() -> None:
    ctypes.string_at(0)


def environment(fd: int, name: str) -> None:
    told = {
        "value": os.environ.get(name),
        "cwd": os.getcwd(),
        "path": sys.path[:1],
        "session": os.getsid(0) == os.getpid(),
        "argv": sys.argv[1:],
        "threads": len(os.listdir("/proc/self/task")),
    }
    os.write(fd, json.dumps(told).encode() + b"\n")


def descriptors(fd: int) -> None:
    told = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            told[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            pass  # the descriptor of the listing itself
    os.write(fd, json.dumps(told).encode() + b"\n")


def imported(fd: int) -> None:
    zmq = sys.modules.get("zmq")
    told = [zmq is not None, zmq is not None and zmq.Context._instance is None, "cloudpickle" in sys.modules]
    os.write(fd, json.dumps(told).encode() + b"\n")


def now(fd: int) -> None:
    os.write(fd, b"%d\n" % time.monotonic_ns())


def wait_for_byte(ready_fd: int, go_fd: int) -> int:
    os.write(ready_fd, b"%d\n" % os.getpid())
    return os.read(go_fd, 1)[0]


def hang(fd: int) -> None:
    os.write(fd, b"%d\n" % os.getpid())
    while True:
        time.sleep(3600)


def hang_with_children(fd: int) -> None:
    start_children(fd)
    while True:
        time.sleep(3600)


def leave_children(fd: int) -> int:
    start_children(fd)
    return 4


def start_children(fd: int) -> None:
    """One child in the worker's process group, one in a group of its own in the same session."""
    same = subprocess.Popen(["sleep", "3600"])
    own = subprocess.Popen(["sleep", "3600"], process_group=0)
    os.write(fd, f"{os.getpid()} {same.pid} {own.pid}\n".encode())
