"""The broker on a ROUTER socket: one thread, one loop, no decision of its own.

Drain what has arrived, give it to the engine, send what the engine lets go. A peer that cannot be reached is told to the
machine; a frame of the wrong shape is counted and dropped. Must never send anything that the engine did not return.
"""

from __future__ import annotations

from collections.abc import Callable

import zmq

from brokers.engine import Engine, Frame, Outgoing

__all__ = ["MAX_FRAME", "Server"]

DRAINED = 512
"""Most frames taken in one round: one commit for all of them, yet a round stays well under a second."""

MAX_FRAME = 256 << 20
"""Largest part of a message that the socket takes, in bytes."""

IDLE = 0.5
"""Seconds that a round may wait when nothing is due."""


class Server:
    """Serves `engine` at `address` until `stopping()` says so."""

    def __init__(self, engine: Engine, address: str) -> None:
        self._engine = engine
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.SNDHWM, 0)
        self._router.setsockopt(zmq.RCVHWM, 0)
        self._router.setsockopt(zmq.LINGER, 200)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        self._router.bind(address)
        self.misshapen = 0

    def run(self, stopping: Callable[[], bool]) -> None:
        """The loop. Raises `JournalFailed` when the journal has failed: end the process then."""
        router = self._router
        engine = self._engine
        while not stopping():
            router.poll(int(engine.patience(IDLE) * 1000 + 0.999))
            self._send(engine.round(self._drain()))

    def close(self) -> None:
        """Let go of the socket."""
        self._router.close()
        self._context.term()

    def _drain(self) -> list[Frame]:
        frames: list[Frame] = []
        receive = self._router.recv_multipart
        for _ in range(DRAINED):
            try:
                parts = receive(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(parts) != 4 or len(parts[0]) != 8 or len(parts[1]) != 1:
                self.misshapen += 1
                continue
            frames.append((int.from_bytes(parts[0], "big"), parts[1], parts[2], parts[3]))
        return frames

    def _send(self, outgoing: list[Outgoing]) -> None:
        for peer, header, blob in outgoing:
            try:
                self._router.send_multipart([peer.to_bytes(8, "big"), header, blob], zmq.NOBLOCK, len(blob) < 65536)
            except zmq.ZMQError as error:
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._engine.machine.disconnect(peer)
