"""Start a broker process and wait until it reports that it is ready."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["COMMAND", "start_broker"]

COMMAND = (sys.executable, "-m", "stageflow_brokers.zeromq.process")


def start_broker(
    options: dict[str, Any], *arguments: str, command: Sequence[str] = COMMAND, **popen: Any
) -> subprocess.Popen[Any]:
    """Return the running process. Raises RuntimeError if it does not report that it is ready.

    `options` are those of `stageflow_brokers.zeromq.process`, `arguments` follow on the command line, `popen` goes to
    `subprocess.Popen`.
    """
    reading, writing = os.pipe()
    words = [*command, json.dumps({**options, "ready_fd": writing}), *arguments]
    process = subprocess.Popen(words, pass_fds=[writing], **popen)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        report = json.loads(pipe.readline() or "{}")
    if not report.get("ready"):
        process.kill()
        process.communicate()  # without it the end of the object is a ResourceWarning in the middle of something else
        raise RuntimeError(f"the broker did not start: {report}")
    return process
