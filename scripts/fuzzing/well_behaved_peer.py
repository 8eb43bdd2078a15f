"""Well-behaved peers, and the judge of their work while others attack.

Groups are published into `work`, worked on there and in `more`, and end in `fin`; the body names each worker. Some
messages are held for a while with a step, some are released or fail once. The judge counts.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from stageflow_brokers.api import (
    FLAG_CLOSE_GROUP,
    FLAG_START,
    FLAG_WATCH,
    RETRY,
    TERMINAL,
    DeliveryItem,
    Listener,
    SettleItem,
    Target,
)
from stageflow_brokers.testing.harness import Answers
from stageflow_brokers.zeromq.client import ZmqClient

__all__ = ["QUEUES", "Judge", "WellBehavedPeers"]

QUEUES = ("work", "more", "fin")
IN_FLIGHT = 300
HOLD_SECONDS = 0.002
"""Seconds that a worker holds its messages, so that there is something to steal."""
TIMEOUT_SECONDS = 120.0

Connect = Callable[..., ZmqClient]


class Judge:
    """The published groups, their ends, and each violation."""

    def __init__(self) -> None:
        self.published: dict[str, bytes] = {}
        self.ended: Counter[str] = Counter()
        self.pushed: Counter[str] = Counter()
        self.wrongs: list[str] = []
        self.news = threading.Condition()

    @property
    def open(self) -> int:
        """The number of published groups that have not ended."""
        return len(self.published) - len(self.ended)

    def publish(self, group: str, body: bytes) -> None:
        """Record the start of a group."""
        with self.news:
            self.published[group] = body

    def end(self, group: str, body: bytes) -> None:
        """Record that a group has reached `fin`."""
        with self.news:
            self.ended[group] += 1
            if self.ended[group] > 1:
                self.wrong(f"group {group} ended {self.ended[group]} times")
            self._compare(group, body)
            self.news.notify_all()

    def push(self, group: str, body: bytes) -> None:
        """Record that the publisher was notified of the end."""
        with self.news:
            self.pushed[group] += 1
            if self.pushed[group] > 1:
                self.wrong(f"the end of {group} was sent {self.pushed[group]} times")
            self._compare(group, body)
            self.news.notify_all()

    def _compare(self, group: str, body: bytes) -> None:
        if body != self.published.get(group, b"") + b"|work|more":
            self.wrong(f"the body of {group} is not that of its workers: {body[:80]!r}")

    def wrong(self, what: str) -> None:
        """Record a violation."""
        if len(self.wrongs) < 50:
            self.wrongs.append(what)

    def finish(self) -> None:
        """Check that each group has ended and its publisher was notified. Call it when nothing is under way."""
        for group in self.published:
            if not self.ended[group]:
                self.wrong(f"group {group} was lost")
            elif not self.pushed[group]:
                self.wrong(f"the end of {group} was never sent")
        for group in self.ended.keys() - self.published.keys():
            self.wrong(f"group {group} ended and was never published")


class _Peer(Listener):
    """A connection that must never be refused, disconnected or deprived of a lease."""

    def __init__(self, judge: Judge, name: str) -> None:
        self.judge = judge
        self.name = name
        self.client: Any = None
        self.leaving = False

    def on_notice(self, word: str, detail: Any) -> None:
        if word in ("malformed", "refused", "gone", "retire", "parked"):
            self.judge.wrong(f"{self.name} received {word}: {detail!r}")

    def on_stale(self, ids: list[int]) -> None:
        self.judge.wrong(f"{self.name} has lost {ids} to another peer")

    def on_lost(self, ids: list[int]) -> None:
        self.judge.wrong(f"{self.name} must drop {ids}")

    def on_closed(self, reason: str) -> None:
        if not self.leaving:
            self.judge.wrong(f"the connection of {self.name} has ended: {reason}")

    def close(self) -> None:
        self.leaving = True
        self.client.close(2.0)


class _Publisher(_Peer):
    def on_pushes(self, pushes: list[tuple[str, str, bytes]]) -> None:
        for group, _, body in pushes:
            self.judge.push(group, body)


class _Collector(_Peer):
    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        for item, body in zip(items, bodies, strict=True):
            self.judge.end(item.group, body)
        self.client.settle([], [], [(item.id, item.lease, FLAG_CLOSE_GROUP, item.group) for item in items], [], [])


class _Worker(_Peer):
    """Holds each delivery for a moment, then settles it in one of several ways."""

    def __init__(self, judge: Judge, queue: str, target: Target, held: Any, seed: int) -> None:
        super().__init__(judge, f"worker of {queue}")
        self._queue = queue
        self._target = target
        self._shared = held
        self._chance = random.Random(seed)
        self._next = seed % 8
        self._lock = threading.Lock()
        self._inbox: list[tuple[DeliveryItem, bytes]] = []
        self._holding: dict[int, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)

    def start(self) -> None:
        self.client.consume(self._queue, 64)
        self._thread.start()

    def holding(self) -> list[tuple[int, int]]:
        with self._lock:
            return list(self._holding.items())

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        with self._lock:
            for item, body in zip(items, bodies, strict=True):
                self._inbox.append((item, body))
                self._holding[item.id] = item.lease
                place = 2 * (self._next % (len(self._shared) // 2))
                self._shared[place], self._shared[place + 1] = item.id, item.lease
                self._next += 1

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        super().close()

    def _work(self) -> None:
        while not self._ended.wait(HOLD_SECONDS):
            with self._lock:
                taken, self._inbox = self._inbox, []
            moves, others, bodies, back = [], [], [], []
            for item, body in taken:
                if item.extra is None and self._chance.random() < 0.02:
                    self.client.checkpoint(item.id, item.lease, "step", b"mine")
                match self._chance.randrange(50):
                    case 0 if item.extra is None:
                        others.append(SettleItem([(item.id, item.lease)], RETRY, [], 0.0, b"once more"))
                    case 1:
                        back.append((item.id, item.lease))
                    case _:
                        if item.extra is not None and item.extra.steps not in (None, {"step": b"mine"}):
                            self.judge.wrong(f"another peer recorded a step of {item.group}: {item.extra.steps}")
                        bodies.append(body + b"|" + self._queue.encode())
                        moves.append((item.id, item.lease, 0, len(bodies[-1]), item.group))
            with self._lock:
                for item, _ in taken:
                    self._holding.pop(item.id, None)
            if moves or others:
                self.client.settle([self._target], moves, [], others, bodies)
            if back:
                self.client.release(back, self._queue, -1)


class WellBehavedPeers:
    """A publisher, two workers per queue and a collector, at work until `stop`."""

    def __init__(self, address: str, held: Any, seed: int) -> None:
        self.judge = Judge()
        self._publisher = _Publisher(self.judge, "publisher")
        self._collector = _Collector(self.judge, "collector")
        more, fin = Target("more", "more"), Target("fin", "end", TERMINAL)
        self._workers = [
            _Worker(self.judge, queue, target, held, seed + number)
            for number, (queue, target) in enumerate((("work", more), ("work", more), ("more", fin), ("more", fin)))
        ]
        peers: list[_Peer] = [self._publisher, self._collector, *self._workers]
        for peer in peers:
            peer.client = ZmqClient(address, peer, name=peer.name)
        self.peers = [peer.client.peer for peer in peers]
        self._peers = peers
        self._collector.client.consume("fin", 1_000)
        for worker in self._workers:
            worker.start()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._publish, name="publisher", daemon=True)
        self._thread.start()

    @property
    def ask(self) -> Answers:
        """Performs an operation of a well-behaved peer and waits for its answer."""
        return Answers(self._publisher.client.admin, TIMEOUT_SECONDS)

    def tidy(self) -> None:
        """Purge the messages of the attackers: no worker consumes them, so they would stay."""
        for queue in self.ask.stats("")["queues"]:
            name = queue["name"]
            if name not in QUEUES:
                self.ask.purge(name, [])
                if queue["dead"]:
                    self.ask.purge("dlq." + name, [])

    def stop(self) -> None:
        """Stop publishing, wait for all ends, and judge."""
        self._stopping.set()
        self._thread.join()
        judge = self.judge
        deadline = time.monotonic() + TIMEOUT_SECONDS
        with judge.news:
            while (judge.open or len(judge.pushed) < len(judge.published)) and time.monotonic() < deadline:
                judge.news.wait(0.2)
        judge.finish()

    def close(self) -> None:
        """Close the connections."""
        for peer in self._peers:
            peer.close()

    def _publish(self) -> None:
        judge = self.judge
        number = 0
        while not self._stopping.is_set():
            with judge.news:
                while judge.open >= IN_FLIGHT and not self._stopping.is_set():
                    judge.news.wait(0.2)
            items, bodies = [], []
            for _ in range(20):
                group = f"good-{number}"
                number += 1
                body = group.encode() + os.urandom(8)
                judge.publish(group, body)
                items.append((0, len(body), group, 1, FLAG_START | FLAG_WATCH))
                bodies.append(body)
            answer = self._publisher.client.publish([Target("work", "new")], items, bodies).result(TIMEOUT_SECONDS)
            if answer.refused:
                judge.wrong(f"valid groups were refused: {answer.refused[:3]}")
