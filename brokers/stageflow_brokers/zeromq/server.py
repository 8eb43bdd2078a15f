"""The broker on a ROUTER socket: one thread, one loop, no decision of its own.

Drain what has arrived, give it to the engine, send what the engine lets go. The machine is told of a peer that cannot
be reached; a frame of the wrong shape is counted and dropped. Must never send anything that the engine did not return.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import zmq

from stageflow_brokers.core.wire import MAX_FRAME
from stageflow_brokers.engine.engine import Engine, Frame, Outgoing
from stageflow_brokers.failpoints import failpoint
from stageflow_brokers.zeromq.access import check_address

__all__ = ["Server"]

DRAINED_FRAMES = 512
"""Most frames taken in one round: one commit for all of them, yet a round stays well under a second."""

UNREAD_FRAMES = 100_000
"""A peer that leaves more frames unread is cut off, however small they are; the machine looks at their bytes."""

UNTAKEN_FRAMES = 1_000
"""How many frames of one peer wait here; what it sends beyond them waits on its own side."""

IDLE = 0.5
"""Seconds that a round may wait when nothing is due."""

MOST_DESCRIPTORS = 10_000

HANDSHAKE = 5_000
"""Milliseconds for somebody who connects to say what protocol it speaks."""

PROBE = 5.0
"""Seconds between words to everybody: a socket tells of a peer that has gone only when something is sent to it."""


class Server:
    """Serves `engine` at `address` until `stopping()` says so, which is asked again when `wakeup` can be read.

    While `most_descriptors` are taken nobody else is let in, and whoever comes has to come again: each connection takes
    one, and the transport does not survive the want of one. Raises `SocketNotPrivate` if others than this user could
    come to that address.
    """

    def __init__(
        self, engine: Engine, address: str, *, wakeup: int = -1, most_descriptors: int = MOST_DESCRIPTORS
    ) -> None:
        check_address(address)
        self._engine = engine
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.setsockopt(zmq.SNDHWM, UNREAD_FRAMES)
        self._router.setsockopt(zmq.RCVHWM, UNTAKEN_FRAMES)
        self._router.setsockopt(zmq.LINGER, 200)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        self._most = most_descriptors
        self._porter = self._context.socket(zmq.REP)
        self._porter.bind("inproc://zeromq.zap.01")
        self._router.setsockopt_string(zmq.ZAP_DOMAIN, "stageflow")
        self._router.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE)
        self._router.bind(address)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._porter, zmq.POLLIN)
        if wakeup >= 0:
            self._poller.register(wakeup, zmq.POLLIN)
        self._probe_due = 0.0
        self._more = False
        self._cut_off: set[int] = set()

    def run(self, stopping: Callable[[], bool]) -> None:
        """The loop. Raises `JournalFailed` when the journal has failed: end the process then."""
        engine = self._engine
        while not stopping():
            ready = self._poller.poll(0 if self._more else int(engine.next_timeout(IDLE) * 1000 + 0.999))
            if any(socket is self._porter for socket, _ in ready):
                self._mind_the_door()
            frames = self._drain()
            self._send(engine.round(frames, more=self._more))
            if frames:
                failpoint("broker.dispatched")
            if (now := time.monotonic()) >= self._probe_due:
                self._probe_due = now + PROBE
                engine.machine.probe_peers()
                for peer in self._cut_off:
                    # It hears that it was cut off as soon as it hears anything again.
                    engine.machine.outbox.add_stranger_notice(peer, "hello", None)

    def _mind_the_door(self) -> None:
        """Let in who asks for it, while there is room."""
        room = self._most - len(os.listdir("/proc/self/fd"))
        while True:
            try:
                version, request, *_ = self._porter.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # Whoever is told no does not try again by itself: who did would take a descriptor each time.
            status = b"200" if room > 0 else b"400"
            self._porter.send_multipart([version, request, status, b"", b"", b""])

    def close(self) -> None:
        """Let go of the socket."""
        self._router.close()
        self._porter.close()
        self._context.term()

    def _drain(self) -> list[Frame]:
        frames: list[Frame] = []
        receive = self._router.recv_multipart
        room = self._engine.round_bytes
        self._more = True
        for _ in range(DRAINED_FRAMES):
            try:
                parts = receive(zmq.NOBLOCK)
            except zmq.Again:
                self._more = False
                break
            if len(parts) != 4 or len(parts[0]) != 8 or len(parts[1]) != 1 or not any(parts[0]):
                self._engine.machine.malformed_frames += 1
                continue
            frames.append((int.from_bytes(parts[0], "big"), parts[1], parts[2], parts[3]))
            room -= len(parts[2]) + len(parts[3])
            if room < 0:
                break
        return frames

    def _send(self, outgoing: list[Outgoing]) -> None:
        for peer, header, blob in outgoing:
            try:
                self._router.send_multipart([peer.to_bytes(8, "big"), header, blob], zmq.NOBLOCK, len(blob) < 65536)
                if self._cut_off:
                    self._cut_off.discard(peer)
            except zmq.ZMQError as error:
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._engine.machine.disconnect(peer)
                if error.errno == zmq.EAGAIN:
                    self._cut_off.add(peer)
                else:
                    self._cut_off.discard(peer)
