"""The broker on a ROUTER socket: one thread and one loop, without decisions.

The loop receives frames, passes them to the engine, and sends the frames that the engine returns. It notifies the
machine of unreachable peers, and counts and drops malformed frames. It must never send a frame that the engine did not
return.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import zmq

from stageflow_brokers.core.wire import MAX_FRAME
from stageflow_brokers.engine.engine import Engine, Frame, Outgoing
from stageflow_brokers.failpoints import failpoint
from stageflow_brokers.zeromq.listening_socket import ListeningSocket

__all__ = ["Server"]

MAX_ROUND_FRAMES = 512
"""The most frames received in one round: one commit covers all of them, and a round still takes well under a second."""

MAX_UNREAD_FRAMES = 100_000
"""A peer that leaves more frames unread is disconnected, however small they are. The machine limits their bytes."""

MAX_QUEUED_FRAMES = 1_000
"""Frames of one peer that wait in the socket of the broker. Further ones wait in the socket of the peer."""

IDLE_SECONDS = 0.5
"""The longest wait of a round when no timer is due."""

DEFAULT_MAX_DESCRIPTORS = 10_000
"""The broker accepts no connection while the process has this many descriptors open."""

HANDSHAKE_TIMEOUT_MS = 5_000
"""Milliseconds in which a new connection must complete the ZeroMQ handshake."""

PROBE_INTERVAL_SECONDS = 5.0
"""Seconds between probes of all peers: a socket reports that a peer has gone only when a frame is sent to it."""


class Server:
    """Runs `engine` behind a ROUTER socket. Raises `SocketNotPrivate` if other users could connect to the address.

    Args:
        engine: The engine.
        address: Address to listen at, ipc://DIRECTORY/NAME; see `socket_path.places`.
        wakeup: A descriptor that becomes readable when `run` should check `stopping`. Default: none.
        max_descriptors: While the process has as many descriptors open, new connections are rejected and must try
            again: each connection uses one, and ZeroMQ aborts the process when none is left.
    """

    def __init__(
        self, engine: Engine, address: str, *, wakeup: int = -1, max_descriptors: int = DEFAULT_MAX_DESCRIPTORS
    ) -> None:
        self._engine = engine
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.setsockopt(zmq.SNDHWM, MAX_UNREAD_FRAMES)
        self._router.setsockopt(zmq.RCVHWM, MAX_QUEUED_FRAMES)
        self._router.setsockopt(zmq.LINGER, 200)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        self._max_descriptors = max_descriptors
        self._zap_socket = self._context.socket(zmq.REP)
        self._zap_socket.bind("inproc://zeromq.zap.01")
        self._router.setsockopt_string(zmq.ZAP_DOMAIN, "stageflow")
        self._router.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
        try:
            self._listening = ListeningSocket(self._router, address)
        except BaseException:
            self._router.close(0)
            self._zap_socket.close(0)
            self._context.term()
            raise
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._zap_socket, zmq.POLLIN)
        if wakeup >= 0:
            self._poller.register(wakeup, zmq.POLLIN)
        self._probe_due = 0.0
        self._more = False
        self._disconnected: set[int] = set()

    def run(self, stopping: Callable[[], bool]) -> None:
        """Run until `stopping()` is true. Raises `JournalFailed` if the journal has failed: end the process then."""
        engine = self._engine
        while not stopping():
            ready = self._poller.poll(0 if self._more else int(engine.next_timeout(IDLE_SECONDS) * 1000 + 0.999))
            if any(socket is self._zap_socket for socket, _ in ready):
                self._answer_connection_requests()
            frames = self._receive()
            self._send(engine.round(frames, more=self._more))
            if frames:
                failpoint("broker.dispatched")
            now = time.monotonic()
            self._listening.check(now)
            if now >= self._probe_due:
                self._probe_due = now + PROBE_INTERVAL_SECONDS
                engine.machine.probe_peers()
                for peer in self._disconnected:
                    # The peer learns that it was disconnected with the first frame it reads again.
                    engine.machine.outbox.add_stranger_notice(peer, "hello", None)

    def _answer_connection_requests(self) -> None:
        """Accept new connections while descriptors are left (ZeroMQ asks by its authentication protocol, ZAP)."""
        free = self._max_descriptors - len(os.listdir("/proc/self/fd"))
        while True:
            try:
                version, request, *_ = self._zap_socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # After status 400 a client's ZeroMQ does not reconnect on its own: each attempt would use a descriptor.
            status = b"200" if free > 0 else b"400"
            self._zap_socket.send_multipart([version, request, status, b"", b"", b""])

    def close(self) -> None:
        """Close the socket."""
        self._router.close()
        self._zap_socket.close()
        self._context.term()
        self._listening.close()

    def _receive(self) -> list[Frame]:
        frames: list[Frame] = []
        receive = self._router.recv_multipart
        remaining_bytes = self._engine.round_bytes
        self._more = True
        for _ in range(MAX_ROUND_FRAMES):
            try:
                parts = receive(zmq.NOBLOCK)
            except zmq.Again:
                self._more = False
                break
            if len(parts) != 4 or len(parts[0]) != 8 or len(parts[1]) != 1 or not any(parts[0]):
                self._engine.machine.malformed_frames += 1
                continue
            frames.append((int.from_bytes(parts[0], "big"), parts[1], parts[2], parts[3]))
            remaining_bytes -= len(parts[2]) + len(parts[3])
            if remaining_bytes < 0:
                break
        return frames

    def _send(self, outgoing: list[Outgoing]) -> None:
        for peer, header, blob in outgoing:
            try:
                self._router.send_multipart([peer.to_bytes(8, "big"), header, blob], zmq.NOBLOCK, len(blob) < 65536)
                if self._disconnected:
                    self._disconnected.discard(peer)
            except zmq.ZMQError as error:
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._engine.machine.disconnect(peer)
                if error.errno == zmq.EAGAIN:
                    self._disconnected.add(peer)
                else:
                    self._disconnected.discard(peer)
