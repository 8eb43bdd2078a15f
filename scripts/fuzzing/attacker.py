"""An attacking process: raw DEALER sockets, some of which never read."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import msgspec
import zmq

from fuzzing.frames import Frames
from stageflow_brokers.core import wire
from stageflow_brokers.errors import ProtocolError

__all__ = ["ANSWERS", "SHARED_LEASES", "attack"]

ANSWERS = ("malformed", "stale", "refused", "error", "items", "resend", "hello")
"""Kinds of notices and answers to attackers that are counted."""

SHARED_LEASES = 64
"""Number of leases of well-behaved peers that are shared with the attackers."""

SOCKETS = 4
FRAMES_PER_SOCKET = 4_000
"""Frames after which a socket is closed without a goodbye and another one opened."""
FRAMES_PER_HELLO = 60
"""Frames between hellos, which bring a socket back into step."""


class _Attacker:
    """One socket and the state of its session."""

    def __init__(self, context: zmq.Context[Any], address: str, frames: Frames, *, reads: bool, number: int) -> None:
        self.frames = frames
        self.reads = reads
        self.answers: Counter[str] = Counter()
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, (1 << 62 | number).to_bytes(8, "big"))
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 100)
        self.socket.connect(address)
        self.send(frames.hello())

    def send(self, parts: list[bytes]) -> None:
        self.socket.send_multipart(parts)

    def listen(self) -> None:
        """Read the answers and follow the session."""
        while True:
            try:
                header = self.socket.recv_multipart(zmq.NOBLOCK)[0]
            except zmq.Again:
                return
            out = wire.decode_broker_frame(header)
            for word, _ in out.notices:
                self.answers[word] += 1
            for _, raw in out.results:
                answer = msgspec.msgpack.decode(raw)
                if isinstance(answer, dict):
                    self.answers.update(kind for kind in ("stale", "refused", "error", "items") if kind in answer)
            self.frames.epoch = out.broker_epoch
            if out.acked > 0:
                self.frames.frame = max(self.frames.frame, out.acked)


def attack(address: str, seed: int, count: int, held: Any, peers: list[int], sent: Any, answers: Any) -> None:
    """Send `count` frames.

    `held`: shared ids and leases of well-behaved peers, alternating; `sent` counts the frames; `answers` counts the
    answers by ANSWERS.
    """
    chance = random.Random(seed)
    context: zmq.Context[Any] = zmq.Context()

    def someones() -> tuple[int, int]:
        place = 2 * chance.randrange(SHARED_LEASES)
        return held[place], held[place + 1]

    born = 0

    def another() -> _Attacker:
        nonlocal born
        born += 1
        frames = Frames(random.Random(chance.random()), someones, peers)
        # The epoch of the broker is public: it answers each hello with it.
        return _Attacker(context, address, frames, reads=born % SOCKETS != 0, number=seed % 10_000 * 1_000_000 + born)

    def leave(attacker: _Attacker) -> None:
        attacker.listen()
        attacker.socket.close()
        with answers.get_lock():
            for place, kind in enumerate(ANSWERS):
                answers[place] += attacker.answers[kind]

    attackers = [another() for _ in range(SOCKETS)]
    for number in range(count):
        place = number % SOCKETS
        attacker = attackers[place]
        if number // SOCKETS % FRAMES_PER_SOCKET == FRAMES_PER_SOCKET - 1:
            leave(attacker)
            attacker = attackers[place] = another()
        elif number // SOCKETS % FRAMES_PER_HELLO == FRAMES_PER_HELLO - 1:
            attacker.send(attacker.frames.hello())
        try:
            attacker.send(attacker.frames.next())
        except (OverflowError, ProtocolError):
            continue
        if attacker.reads:
            attacker.listen()
        if number % 100 == 99:
            with sent.get_lock():
                sent.value += 100
    with sent.get_lock():
        sent.value += count % 100
    time.sleep(0.2)  # what is under way arrives before the sockets close
    for attacker in attackers:
        leave(attacker)
    context.term()
