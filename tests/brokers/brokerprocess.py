"""A real broker process on a real journal, to be connected to, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from brokers.api import Listener
from brokers.zeromq.client import ZmqClient


class BrokerProcess:
    """`python -m brokers.zeromq.process` in a directory of its own; with so many `descriptors` if that is given."""

    def __init__(self, directory: Path, *, descriptors: int = 0, **options: Any) -> None:
        self.descriptors = descriptors
        self.journal = directory / "journal"
        self.options = {
            "address": f"ipc://{directory}/broker",
            "journal": str(self.journal),
            "supervised": False,
            **options,
        }
        self.clients: list[ZmqClient] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.report: dict[str, Any] = {}
        self.start()

    def start(self) -> None:
        reading, writing = os.pipe()
        argument = json.dumps({**self.options, "ready_fd": writing})
        command = [sys.executable, "-m", "brokers.zeromq.process", argument]
        if self.descriptors:
            command = ["sh", "-c", f'ulimit -n {self.descriptors} && exec "$@"', "sh", *command]
        self.process = subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.PIPE)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            self.report = json.loads(pipe.readline() or "{}")
        assert self.report.get("ready"), self.report

    def connect(self, listener: Listener, *, role: str = "client", name: str = "", peer: int = 0) -> ZmqClient:
        client = ZmqClient(self.options["address"], listener, role=role, name=name, peer=peer)
        self.clients.append(client)
        return client

    def end(self, signum: int = signal.SIGTERM) -> int:
        """Send a signal and see the process end; its exit status."""
        assert self.process is not None
        self.process.send_signal(signum)
        _, said = self.process.communicate(timeout=20)
        assert b"Traceback" not in said, said.decode()
        return self.process.returncode

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def close(self) -> None:
        for client in self.clients:
            client.close(timeout=0.2)
        if self.process is not None and self.process.returncode is None:
            assert self.end() == 0
