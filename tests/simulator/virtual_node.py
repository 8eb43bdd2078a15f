"""The node process of a simulated cluster with its workers: production parts without processes.

A worker is the production mailbox, actor and executors; its handlers run in a thread that returns control whenever time
has to pass, so that the worker can be killed there. The node has the production coordinator and pools, and a fake
zygote. This module decides nothing about messages or instances: it only carries, delays and kills.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from pykka import messages
from virtual_broker import VirtualBroker, VirtualClient
from virtual_deaths import Deaths
from virtual_starts import UNLOADABLE, Starts
from worker_parts import make_executor

from stageflow_actors.core.plan import Naming, WorkflowPlan
from stageflow_actors.core.tracebacks.references import find_references, with_tracebacks
from stageflow_actors.errors import StageFlowError
from stageflow_actors.history.errors import HistoryUnavailable
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.runtime.ipc.exit_codes import EXIT_RECYCLED
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec, WorkerPayload
from stageflow_actors.runtime.ipc.slots import Slot, SlotTable
from stageflow_actors.runtime.node import pool as pool_module
from stageflow_actors.runtime.node.coordinator import Coordinator, Flush
from stageflow_actors.runtime.node.main import _NodeListener
from stageflow_actors.runtime.node.pool import Cancelled, Pool, Tick
from stageflow_actors.runtime.node.pool_context import PoolContext
from stageflow_actors.runtime.node.supervisor import IDLE_TICK_INTERVAL, queue_options
from stageflow_actors.runtime.worker import main as worker_module
from stageflow_actors.runtime.worker.mailbox import Mailbox
from stageflow_actors.runtime.zygote.handle import Exited, Spawned
from stageflow_brokers.api import DeliveryItem

NAMING = Naming()
TICK = 0.02
LIMIT = 1 << 20
KNOWN_SECONDS = 0.05
"""Time after which the broker should know of a worker that could not start, unless something has happened."""


class Killed(BaseException):
    """The process of this thread is gone. Nothing may handle it."""


class History:
    """What is durable of ended instances. It may be `full`; a row that says otherwise than before is a crime."""

    def __init__(self) -> None:
        self.rows: dict[str, HistoryRow] = {}
        self.crimes: list[str] = []
        self.full = False
        self.written = 0
        self._tracebacks: dict[bytes, bytes] = {}

    def write(self, rows: list[HistoryRow], tracebacks: Mapping[bytes, bytes]) -> None:
        """As `HistoryWriter.write`; rows are kept as `HistoryReader` returns them."""
        if self.full:
            raise HistoryUnavailable(Path("history"), "the disk is full")
        self._tracebacks.update(tracebacks)
        for written in rows:
            row = written
            if find_references(row.outcome):
                row = row._replace(outcome=with_tracebacks(row.outcome, self._tracebacks))
            known = self.rows.get(row.instance_id)
            if known is not None and known.epoch == row.epoch and known.outcome != row.outcome:
                self.crimes.append(f"{row.instance_id} has ended twice: {known.status}, then {row.status}")
            self.rows[row.instance_id] = row
        self.written += len(rows)


class _PausingSlot(Slot):
    """The slot of a worker whose handlers take virtual time: some before, some after what they do."""

    __slots__ = ("worker",)

    worker: VirtualWorker

    def begin(self, message_id: int, timeout_ns: int, now_ns: int) -> None:
        """As a slot, and time passes."""
        super().begin(message_id, timeout_ns, int(self.worker.world.now * 1e9))
        self.worker.at, self.worker.busy = message_id, True
        self.worker.note_begin()
        self.worker.suffer()
        self.worker.work_a_while()

    def set_timeout(self, timeout_ns: int, now_ns: int) -> None:
        """As a slot; what is between handlers takes no time."""
        super().set_timeout(timeout_ns, int(self.worker.world.now * 1e9))

    def end(self) -> None:
        """Time passes, then as a slot."""
        self.worker.work_a_while()
        super().end()
        self.worker.busy = False


class _WatchedMailbox(Mailbox):
    """A mailbox; the books of deaths and of waits are shown what comes into it."""

    def __init__(self, queue: str, node: VirtualNode, paused: Sequence[int]) -> None:
        super().__init__(queue, paused)
        self.priority_of: dict[int, int] = {}
        self.group_of: dict[int, str] = {}
        self._node = node

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        """As a mailbox."""
        self.group_of.update((item.id, item.group) for item in items)
        self.priority_of.update((item.id, item.extra.priority if item.extra is not None else 0) for item in items)
        self._node.deaths.delivered(items)
        self._node.broker.given(queue, items)
        waits, client = self._node.broker.accounts.waits, self.broker
        if waits is not None and isinstance(client, VirtualClient):
            waits.delivered(queue, items, bodies, client.link.said_at)
        super().on_deliveries(queue, items, bodies)


class _WatchedListener(_NodeListener):
    """The node's listener; the book of deaths is shown what is reported to it."""

    def __init__(self, deaths: Deaths) -> None:
        super().__init__()
        self._deaths = deaths

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        """As the node's."""
        self._deaths.reported(items)
        super().on_deliveries(queue, items, bodies)


class _NodeClient(VirtualClient):
    """The node's connection; it enters the deaths that the broker knows."""

    deaths: Deaths

    def _query(self, name: str, /, *args: Any) -> Future[Any]:
        """As any."""
        answer = super()._query(name, *args)
        if name == "resume":
            self.broker.paused.pop(args[0], None)
        elif name == "dead":
            answer.add_done_callback(lambda done: self._known(done, args[0]))
        return answer

    def _known(self, done: Future[Any], peer: int) -> None:
        if done.exception() is None:
            self.deaths.confirmed(peer, self.broker.accounts.deaths_of)


class VirtualWorker:
    """One worker process."""

    def __init__(self, node: VirtualNode, worker_id: str, pid: int, payload: bytes, slot: int) -> None:
        given = msgspec.msgpack.decode(payload, type=WorkerPayload)
        self.world = node.world
        self.id, self.pid, self.queue = worker_id, pid, given.queue
        self.dead = self.busy = self.sentenced = False
        self.at = 0
        self.frozen_until = 0.0
        self._node = node
        self._idle = True
        self._message: Any = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._broken: BaseException | None = None
        table = node.pool_context.slots
        pausing = _PausingSlot(table[slot]._cells, table, slot)
        pausing.worker = self
        self.mailbox = _WatchedMailbox(given.queue, node, node.broker.pause_flags.flag(given.pause_flag))
        work = make_executor(given, pausing, self.mailbox, asyncio.Runner())
        self.actor: Any = worker_module._actor_for(work, given.lanes)(work, self.mailbox, given, pausing)
        self.mailbox.actor = self.actor
        self.client = VirtualClient(
            node.broker, self.mailbox, peer=given.peer, role="worker", name=worker_id, wait=self._wait_for
        )
        self.client.on_heard = self._heard
        self.mailbox.broker = self.client
        self.client.consume(given.queue, self.actor.min_prefetch)
        pausing.mark_ready()
        node.starts.started(given.queue)
        self._thread = threading.Thread(target=self._live, name=worker_id, daemon=True)
        self._thread.start()

    def freeze(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        self.frozen_until = self.client.link.frozen_until = self.world.now + seconds

    def die(self, status: int) -> None:
        """Its process ends here and now; the node hears of it."""
        if self.dead:
            return
        self.dead = True
        self._node.broker.shares.disturb()
        if status < 0 and self.at and not self.sentenced and not self._node.dead:
            self._node.deaths.died(self.client.peer, self.at, self.mailbox.group_of[self.at], busy=self.busy)
        self.client.close()
        self._go.release()
        self._back.acquire()
        self._thread.join()
        self._node.lost(self, status)

    def note_begin(self) -> None:
        """It begins a message; what it does once more for the same one is no beginning."""
        mailbox, id = self.mailbox, self.at
        if id in mailbox.priority_of:
            self._node.broker.shares.begins(self.queue, id, mailbox.priority_of.pop(id))

    def note_handler(self) -> None:
        """Its user code runs."""
        self._node.broker.shares.handles(self.queue, self.at)

    def suffer(self) -> None:
        """What it has begun may be its end, if not at once."""
        cursed, at = self._node.deaths.cursed, self.at
        curse = next((name for name in (self.mailbox.group_of[at], self.queue) if cursed[name] > 0), None)
        if curse is not None:
            cursed[curse] -= 1
            self.world.soon(0.004, lambda: self.die(-9) if self.busy and self.at == at else None)

    # in the worker's own thread

    def _live(self) -> None:
        while True:
            self._go.acquire()
            if self.dead:
                break
            try:
                if isinstance(self._message, messages._ActorStop):
                    self.actor.actor_stopped.set()
                else:
                    self.actor.on_receive(self._message)
            except Killed:
                break
            except BaseException as error:  # reported in the other thread
                self._broken = error
            self._idle = True
            self._back.release()
        self._back.release()

    def work_a_while(self) -> None:
        """Time passes in the middle of a handler: mostly little, sometimes more."""
        chance = self.world.random
        self._pass(chance.expovariate(400) if chance.random() < 0.9 else chance.random() * 0.3)

    def _pass(self, seconds: float | None) -> None:
        if self.dead:
            raise Killed
        if seconds is not None:
            self.world.after(seconds, self._hand_over)
        self._back.release()
        self._go.acquire()
        if self.dead:
            raise Killed

    def _wait_for(self, future: Future[Any]) -> None:
        if not future.done():
            future.add_done_callback(lambda done: self.world.after(0.0, self._hand_over))
            self._pass(None)

    # in the world's thread

    def _hand_over(self) -> None:
        if self.dead:
            return
        if self.world.now < self.frozen_until:
            self.world.after(self.frozen_until - self.world.now, self._hand_over)
            return
        self._go.release()
        self._back.acquire()
        if self._broken is not None:
            raise self._broken
        self._heard()

    def _heard(self) -> None:
        """There may be something to do."""
        if self.dead or not self._idle:
            return
        if self.actor.actor_stopped.is_set():
            if not self.client.unconfirmed:
                self.world.after(0.0, lambda: self.die(EXIT_RECYCLED))
        elif not self.actor.actor_inbox.empty():
            self._idle = False
            self._message = self.actor.actor_inbox.get().message
            self.world.soon(0.0005, self._hand_over)


class _Zygote:
    """Starts workers as a zygote does, soon."""

    def __init__(self, node: VirtualNode) -> None:
        self._node = node

    def spawn(self, worker_id: str, payload: bytes, slot: int, *how: Any, **more: Any) -> None:
        """As `ZygoteHandle.spawn`; of a process that is none nothing else matters."""
        node = self._node
        queue = worker_id.rpartition("#")[0]
        node.starts.requested(queue, len(node.pools[queue]._workers) - 1 if queue in node.pools else 0)
        node.world.soon(0.02, lambda: node.born(worker_id, payload, slot))


class _Ref:
    """Stands where an actor's reference is expected."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        self.tell = tell


def _fail(error: StageFlowError) -> NoReturn:
    raise error


class VirtualNode:
    """The node process with its workers. `die` ends them all; its caller ends the broker."""

    def __init__(
        self,
        broker: VirtualBroker,
        history: History,
        specs: Sequence[PoolSpec],
        plans: list[WorkflowPlan],
        deaths: Deaths,
        starts: Starts,
        new_pid: Callable[[], int],
    ) -> None:
        self.world, self.broker = broker.world, broker
        self.deaths, self.starts = deaths, starts
        self.dead = False
        self.workers: dict[int, VirtualWorker] = {}
        self.notices: list[str] = []
        self._new_pid = new_pid
        self._untold: dict[int, int] = {}
        self._ticks = 0
        self._listener = _WatchedListener(deaths)
        self.client = _NodeClient(broker, self._listener, peer=new_pid(), role="supervisor", name="node")
        self.client.deaths = deaths
        zygote: Any = _Zygote(self)
        self.pool_context = PoolContext(
            slots=SlotTable.create(256),
            zygote=lambda: zygote,
            broker=self.client,
            address="",
            naming=NAMING,
            max_message_bytes=LIMIT,
            log_level="ERROR",
            notify=self.notices.append,
            pauses=broker.pause_flags,
        )
        writer: Any = history
        self.coordinator = Coordinator(self.client, writer, NAMING, plans, None, _fail)
        self._listener.coordinator = _Ref(lambda message: self._soon(lambda: self.coordinator.on_receive(message)))
        self._listener.supervisor = _Ref(lambda message: self._soon(lambda: self._cancelled(message)))
        self._listener.pool_context = self.pool_context
        self._listener.broker = self.client
        self.client.consume(NAMING.finished, 4_000)
        self.client.consume(NAMING.coordinator, 500)
        self.client.admin.declare(queue_options(specs, NAMING, deaths.most))
        self.pools: dict[str, Pool] = {}
        self.pools.update((spec.queue, Pool(spec, self.pool_context)) for spec in specs)
        for pool in self.pools.values():
            pool.on_start()
        self.client.admin.set_workers([])
        self._tick()

    def born(self, worker_id: str, payload: bytes, slot: int) -> None:
        """The zygote has forked."""
        if self.dead:
            return
        pid, queue = self._new_pid(), worker_id.rpartition("#")[0]
        fails = self.starts.fails(queue)
        if not fails:
            self.workers[pid] = VirtualWorker(self, worker_id, pid, payload, slot)
        self._tell(worker_id, Spawned(worker_id, pid, os.open(os.devnull, os.O_RDONLY)))
        if fails:
            self.world.after(0.005, lambda: self._stillborn(queue, worker_id, pid))

    def _stillborn(self, queue: str, worker_id: str, pid: int) -> None:
        """A worker has ended that could not start."""
        if not self.dead:
            self.starts.failed(queue)
            self._tell(worker_id, Exited(worker_id, pid, UNLOADABLE))
            self.world.after(KNOWN_SECONDS, lambda: self._check_failing(queue))

    def _check_failing(self, queue: str) -> None:
        """Check what the broker knows, if it has heard all that this node has said."""
        engine = self.broker.engine
        alone = all(worker.queue != queue for worker in self.workers.values())
        if not self.dead and engine is not None and alone and not self.client.unconfirmed:
            starts = engine.machine.state.queue(queue).starts
            self.starts.check(queue, starts is not None and starts[0])

    def lost(self, worker: VirtualWorker, status: int) -> None:
        """A worker has ended."""
        del self.workers[worker.pid]
        self._untold[worker.pid] = worker.client.peer
        if not self.dead:
            self.world.soon(0.005, lambda: self._tell(worker.id, Exited(worker.id, worker.pid, status)))

    def kill(self, pid: int) -> None:
        """What a pool does to a worker. Nobody is charged with that, nor where it had died just before."""
        if pid in self.workers:
            self.workers[pid].sentenced = True
        elif pid in self._untold:
            self.deaths.doubt(self._untold[pid])
        self.world.soon(0.001, lambda: self.workers[pid].die(-9) if pid in self.workers else None)

    def die(self) -> None:
        """The node is gone, and all of its workers with it."""
        self.dead = True
        self.starts.forget()
        for peer in self._untold.values():
            self.deaths.doubt(peer)
        self.client.close()
        for worker in list(self.workers.values()):
            worker.die(-9)
        for pool in self.pools.values():
            for each in pool._workers.values():
                if each.pidfd >= 0:
                    os.close(each.pidfd)
        self.pool_context.slots.close()

    def _soon(self, action: Callable[[], None]) -> None:
        self.world.soon(0.001, lambda: None if self.dead else action())

    def _tell(self, worker_id: str, message: Any) -> None:
        if not self.dead:
            self.pools[worker_id.rpartition("#")[0]].on_receive(message)

    def _cancelled(self, message: Cancelled) -> None:
        queue = self.pool_context.live.get(message.peer)
        if queue in self.pools:
            self.pools[queue].on_receive(message)

    def _tick(self) -> None:
        if self.dead:
            return
        tick = Tick()
        self._ticks += 1
        idle_too = self._ticks % IDLE_TICK_INTERVAL == 0
        for queue, pool in self.pools.items():
            while not pool.actor_inbox.empty():
                pool.on_receive(pool.actor_inbox.get().message)
            if idle_too or self.pool_context.is_active(queue):
                pool.on_receive(tick)
        self.coordinator.on_receive(Flush())
        self.world.after(TICK, self._tick)


__all__ = ["LIMIT", "NAMING", "History", "VirtualNode", "pool_module"]
