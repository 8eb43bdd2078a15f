"""No data from a socket or a disk is unpickled: checked in the code, and by sending pickles everywhere."""

from __future__ import annotations

import ast
import os
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import msgspec
import pytest
from broker_process import BrokerProcess

import stageflow_actors
import stageflow_brokers
from stageflow_actors import Config, Runtime, StageFlowError, Workflow
from stageflow_actors.core import envelope as envelopes
from stageflow_actors.core.failures import read_failure
from stageflow_actors.history.reader import HistoryReader
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.history.writer import HistoryWriter
from stageflow_actors.runtime.system.data_dir import DataDir
from stageflow_brokers.api import (
    DEAD_LETTER,
    FLAG_START,
    TERMINAL,
    Arrival,
    BrokerError,
    GatherOpen,
    Listener,
    SettleItem,
    Target,
)
from stageflow_brokers.core import records, wire
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.errors import JournalError
from stageflow_brokers.journal.format import Record
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.testing.contract import Peer
from stageflow_brokers.types import PublishItem
from stageflow_brokers.zeromq.client import ZmqClient

PATIENCE = 30.0
ROOT = Path(stageflow_actors.__file__).resolve().parents[1]


class Bomb:
    """Whoever unpickles one leaves a mark on the disk."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """Where a bomb that goes off leaves its mark; there is none in the end."""
    place = tmp_path / "unpickled"
    yield place
    assert not place.exists(), "something was unpickled"


@pytest.fixture
def bombs(mark: Path) -> list[bytes]:
    """The same bomb in every protocol of pickle, and from cloudpickle."""
    made = [pickle.dumps(Bomb(mark), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    return [*made, cloudpickle.dumps(Bomb(mark))]


def test_a_bomb_does_go_off(mark: Path, bombs: list[bytes]) -> None:
    for bomb in bombs:
        pickle.loads(bomb)
        mark.rmdir()


# what the code may do

LOADERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
UNPICKLING = {"recv_pyobj", "recv_serialized", "allow_pickle", "Unpickler", "enc_hook_pickle"}
PICKLING = "stageflow_actors.definition.pickling"
ALLOWED = {
    PICKLING: {"pickle"},
    f"{PICKLING}.code_pickler": {"pickle", "cloudpickle"},
    f"{PICKLING}.definitions": {"pickle"},
    f"{PICKLING}.importable": {"cloudpickle"},
    f"{PICKLING}.namespaces": {"pickle"},
}
"""Modules that may import one: definitions on their way from parent to child process."""
WRITES_ONLY = {"stageflow_actors.core.exact_types": {"marshal"}}
"""Modules that may import one to write with it, as a check of types, and never to read."""
UNPACKERS = {"stageflow_actors.runtime.worker.main"}
"""Modules that may call `pickling.loads`: the worker, on what its parent gave it at its birth."""


@cache
def modules() -> list[tuple[str, ast.Module]]:
    """All modules of both packages, parsed."""
    found = []
    for package in (stageflow_actors, stageflow_brokers):
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            found.append((".".join(parts).removesuffix(".__init__"), ast.parse(path.read_text())))
    return found


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of all imports, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.module or "", alias.name


def names(tree: ast.Module) -> set[str]:
    """All that is called by name or attribute."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found | {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}


def test_only_the_shipping_of_definitions_knows_pickle_and_only_the_worker_unpacks() -> None:
    seen = 0
    for name, tree in modules():
        seen += 1
        found = {module.split(".")[0] for module, _ in imported(tree)} & LOADERS
        assert found <= ALLOWED.get(name, set()) | WRITES_ONLY.get(name, set()), f"{name} imports {found}"
        if name in WRITES_ONLY:
            assert not names(tree) & {"load", "loads"}, f"{name} reads"
        unpickling = names(tree) & UNPICKLING - ({"Unpickler"} if name == f"{PICKLING}.namespaces" else set())
        assert not unpickling, f"{name} uses {unpickling}"
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"eval", "exec", "__import__"}, f"{name} calls {called}"
        shipped = {what for module, what in imported(tree) if module == PICKLING}
        assert "*" not in shipped
        if name not in UNPACKERS | {PICKLING}:
            assert "loads" not in shipped, f"{name} unpacks definitions"
            assert (PICKLING.rpartition(".")[0], "pickling") not in set(imported(tree)), name
    assert seen > 100


def test_what_is_unpacked_came_from_the_parent_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one function that unpickles is called in the worker's birth, before it connects to anything."""
    tree = dict(modules())["stageflow_actors.runtime.worker.main"]
    callers = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(call, ast.Call) and getattr(call.func, "id", "") == "loads" for call in ast.walk(node))
    ]
    assert callers
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name in callers:
            lines = [
                call.lineno
                for call in ast.walk(function)
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "connect"
            ]
            assert lines == [], f"{function.name} both unpacks and connects"


def test_the_brokers_process_never_even_loads_cloudpickle() -> None:
    code = "import sys, stageflow_brokers.zeromq.process; print('cloudpickle' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == "False\n"


# what a broker is given


def test_a_broker_unpickles_no_body_header_name_step_failure_fact_or_query(
    tmp_path: Path, mark: Path, bombs: list[bytes]
) -> None:
    broker = BrokerProcess(tmp_path)
    peer = Peer(broker, name=bombs[0].decode())
    for number, bomb in enumerate(bombs):
        group, text = f"g{number}", bomb.decode("latin-1")
        peer.start("q", group, bomb, digest=bomb, watch=True)
        peer.publish(text, bomb)
        peer.broker.consume("q", 1)
        (held,) = peer.receive()
        peer.broker.checkpoint(*held.lease, text, bomb).result(PATIENCE)
        assert peer.ask.report_progress(*held.lease, bomb) is None
        assert peer.ask.set_fact(text, text) == text
        peer.ask.notify_supervisor("word", [bomb, {"x": bomb}])
        gathers = [GatherOpen(text, 2, 0, len(bomb), group, 1)], [Arrival(text, text, len(bomb), group, 1)]
        peer.drop(held)
        peer.broker.settle(
            [Target("r", text)], [], [], [SettleItem([held.lease], DEAD_LETTER, [], 0.0, bomb, *gathers)], [bomb, bomb]
        )
        peer.publish(text, bomb, group=group, epoch=1, label=text)
        ends = [PublishItem(0, len(bomb), f"end{number}", 1, FLAG_START)]
        peer.broker.publish([Target("fin", text, TERMINAL)], ends, [bomb]).result(PATIENCE)
        # Not a frame at all, in each place of one.
        for op in (
            wire.HELLO,
            wire.PUBLISH,
            wire.SETTLE,
            wire.CHECKPOINT,
            wire.RELEASE,
            wire.QUERY,
            wire.MARK_READ,
            b"?",
        ):
            with peer.broker._lock:
                peer.broker._transmit(op, bomb, bomb)
        for query in ("peek", "inspect", "declare", "dead", "roster", "replace", "restart", "unknown"):
            with pytest.raises(BrokerError):
                peer.query(query, bomb, bomb)
        assert peer.ask.inspect([group])[group]["messages"]
        assert peer.ask.peek("dlq.q", 0, 10)
    broker.clients[0].close()
    # What lies on the disk is read by another process.
    assert broker.end() == 0
    assert any(bombs[-1] in file.read_bytes() for file in broker.journal.glob("*.journal"))
    broker.start()
    again = Peer(broker)
    assert again.ask.stats("")["messages"] > len(bombs)
    assert set(again.ask.inspect(["g0", "g3"])) == {"g0", "g3"}
    broker.clients[1].close()
    assert broker.end() == 0


@pytest.mark.parametrize("kind", sorted(records.NAMES))
def test_no_record_of_a_journal_is_unpickled(kind: int, tmp_path: Path, mark: Path, bombs: list[bytes]) -> None:
    for number, bomb in enumerate((bombs[0], bombs[-1])):
        place = tmp_path / f"journal{number}"
        journal = Journal.open(place, replay=lambda batch: None)
        journal.commit([Record(kind, 1, 1, bomb, bomb)], 1.0)
        journal.close()
        with pytest.raises((JournalError, BrokerError, msgspec.MsgspecError, ValueError)):
            Engine(journal_dir=place).close()


# what the runtime reads


@pytest.mark.parametrize(
    "read",
    [
        envelopes.decode_envelope,
        envelopes.decode_outcome,
        envelopes.decode_trail,
        envelopes.decode_reply,
        envelopes.decode_command,
        envelopes.decode_item_end,
        read_failure,
    ],
)
def test_nothing_that_travels_with_a_message_is_unpickled(
    read: Callable[[bytes], Any], mark: Path, bombs: list[bytes]
) -> None:
    for bomb in bombs:
        for data in (bomb, msgspec.msgpack.encode(bomb), msgspec.msgpack.encode([bomb] * 12)):
            try:
                read(data)
            except (StageFlowError, msgspec.MsgspecError, ValueError, AttributeError, TypeError):
                pass


def test_no_row_of_a_history_and_no_record_of_a_cluster_is_unpickled(
    tmp_path: Path, mark: Path, bombs: list[bytes]
) -> None:
    path = tmp_path / "history.db"
    data = DataDir(tmp_path / "data")
    with HistoryWriter.open(path, create=True) as writer:
        writer.write(
            [
                HistoryRow(f"i{n}", 1, "w", 1, "completed", 0.0, 1.0, None, bomb.decode("latin-1"), bomb, bomb)
                for n, bomb in enumerate(bombs)
            ]
        )
    with HistoryReader.open(path) as reader:
        assert len(reader.get_many([f"i{n}" for n in range(len(bombs))])) == len(bombs)
        assert reader.list()
        assert reader.check() == []
    with sqlite3.connect(path) as database:
        kinds = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")]
    database.close()
    assert kinds == []
    for bomb in bombs:
        data.cluster.write_bytes(bomb)
        assert data.read_cluster() is None


def work(context: dict[str, Any]) -> None:
    context["worked"] = True


class _Ears(Listener):
    pass


def test_a_cluster_at_work_unpickles_nothing_that_comes_to_its_queues(
    tmp_path: Path, mark: Path, bombs: list[bytes], eventually: Callable[..., Any]
) -> None:
    victim = Workflow("victim").add_stage(work).add_signal("go", timeout=60)
    data = tmp_path / "data"
    with Runtime(victim, data_dir=data, config=Config(durability="write", log_level="CRITICAL")) as runtime:
        waiting = runtime.submit(victim, {"bomb": bombs[-1]}, instance_id="waiting")
        record = DataDir(data, create=False).read_cluster()
        assert record is not None
        assert record.address is not None
        client = ZmqClient(record.address, _Ears(), name="stranger")
        queues = [queue.name for queue in runtime.queues()]
        assert any(name.startswith("stageflow.victim") for name in queues)
        for number, bomb in enumerate((bombs[0], bombs[2], bombs[-1], msgspec.msgpack.encode(bombs[-1]))):
            for queue in queues:
                for group in ("", f"planted-{number}-{queue}"):
                    targets = [Target(queue, "planted")]
                    item = (0, len(bomb), group, 1 if group else 0, FLAG_START if group else 0)
                    assert client.publish(targets, [item], [bomb]).result(PATIENCE).refused == []
            client.publish([], [], [bomb], arrivals=[Arrival(f"signal:other{number}", "s", len(bomb), "waiting")])
            client.admin.notify_supervisor("scale", [bomb, bomb]).result(PATIENCE)
            client.admin.set_fact(f"planted{number}", bomb.decode("latin-1")).result(PATIENCE)
        # The cluster goes on as if nothing had been.
        waiting.signal("go")
        assert waiting.result(PATIENCE).success
        after = runtime.submit(victim, {})
        after.signal("go")
        assert after.result(PATIENCE).success
        assert not mark.exists()
        client.close()
        # What was planted lies where it can be looked at, in the queue that it came to.
        served = [name for name in queues if "victim.stage0" in name or "finished" in name or "coordinator" in name]
        assert len(served) == 3

        def parked() -> dict[str, tuple[int, int, int]]:
            return {q.name: (q.ready, q.leased, q.dead) for q in runtime.queues() if q.name in served}

        eventually(lambda: parked() == dict.fromkeys(served, (0, 0, 8)), "all that was planted parked")
        runtime.stop(grace=1.0)
