"""Records that handlers log reach the program's loggers: levels, filters, attributes, order, and what is dropped."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cluster_fixtures import Serve, serve
from programs import Launch, launch

from stageflow_actors import Retry, Runtime, StageContext, Workflow
from stageflow_actors.runtime.client import output
from stageflow_actors.runtime.ipc.log_levels import LogLevels, LogSetup, describe_handlers
from stageflow_brokers.log_sender import DROPPED, FRAME_LENGTH_BYTES, MAX_RECORD_BYTES, LogSender, encode_record

__all__ = ["launch", "serve"]

Row = dict[str, Any]

log = logging.getLogger("shop")
quiet = logging.getLogger("shop.quiet")
apart = logging.getLogger("apart")


class Odd:
    def __repr__(self) -> str:
        return "<odd>"


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def log_forms(row: Row) -> list[bool]:
    log.info("paid %s of %d", "EUR", 7, extra={"plain": {"a": [1, 2.5, None]}, "odd": Odd(), "worse": Unprintable()})
    log.info("too many arguments %s", 1, 2)
    log.info("half a pair \ud800")
    log.info("long %s", "x" * 500_000)
    try:
        raise ValueError("no money")
    except ValueError:
        log.exception("refused", stack_info=True)
    apart.warning("not propagated")
    quiet.warning("not wanted")
    log.debug("not wanted either")
    return [log.isEnabledFor(logging.DEBUG), quiet.isEnabledFor(logging.WARNING)]


def log_plainly(row: Row) -> None:
    log.info("plain")
    threading_is_used = threading.Thread(target=log.info, args=("own thread",))
    threading_is_used.start()
    threading_is_used.join()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(log.info, "pool").result()


def log_in_a_lane(row: Row) -> None:
    log.info("lane")


async def log_async(row: Row) -> None:
    await asyncio.sleep(0.001)
    log.info("async")
    await asyncio.to_thread(log.info, "to_thread")


def log_and_retry(row: Row, ctx: StageContext) -> None:
    ctx.logger.warning("try")
    if ctx.attempt == 1:
        raise OSError("again")


def log_item(number: int) -> int:
    log.info("item")
    return number


def is_wanted(row: Row) -> bool:
    log.info("predicate")
    return True


def fail(row: Row) -> None:
    raise ValueError("compensate")


def undo(row: Row) -> None:
    log.info("undone")


def answer(command: Any) -> str:
    log.info("answered")
    return "yes"


def ask(row: Row, ctx: StageContext) -> Any:
    return ctx.request("answers", {})


def log_many(row: Row) -> None:
    for number in range(row["records"]):
        log.info("record %d", number)


def log_enabled(row: Row) -> bool:
    return log.isEnabledFor(logging.DEBUG)


forms: Workflow[Row] = Workflow("forms").add_stage(log_forms)
kinds: Workflow[Row] = (
    Workflow("kinds")
    .add_stage(log_plainly, when=is_wanted)
    .add_stage(log_in_a_lane, concurrency=2)
    .add_stage(log_async, concurrency=2)
    .add_stage(log_and_retry, retry=Retry.fixed(2, 0.01))
    .add_map("items", log_item, over=lambda row: [1, 2])
    .add_stage(ask)
)
undone: Workflow[Row] = Workflow("undone").add_stage(lambda row: None, id="first", compensation=undo).add_stage(fail)
many: Workflow[Row] = Workflow("many").add_stage(log_many)
enabled: Workflow[Row] = Workflow("enabled").add_stage(log_enabled)


class Kept(logging.Handler):
    """Keeps all records, and waits at `gate` before each if it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.gate: threading.Event | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.gate is not None:
            self.gate.wait()
        self.records.append(record)

    def by_message(self, instance_id: str) -> dict[str, logging.LogRecord]:
        return {r.getMessage(): r for r in self.records if getattr(r, "instance_id", None) == instance_id}


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    kept = Kept()
    for logger in (log, apart):
        logger.addHandler(kept)
    log.setLevel(logging.INFO)
    quiet.setLevel(logging.ERROR)
    apart.propagate = False
    yield kept
    for logger in (log, apart):
        logger.removeHandler(kept)
    for logger in (log, quiet):
        logger.setLevel(logging.NOTSET)
    apart.propagate = True


@pytest.fixture(scope="module")
def cluster(kept: Kept, serve: Serve) -> Runtime:
    return serve(forms, kinds, undone, many, enabled, endpoints={"answers": answer})


def test_records_are_formatted_data_that_the_programs_loggers_want(
    cluster: Runtime, kept: Kept, eventually: Callable[..., Any]
) -> None:
    result = cluster.execute(forms, {"n": 1}, timeout=30)
    assert result.stages[0].data == [False, False], "debug records, and those of a quiet logger, are not even made"
    eventually(lambda: "not propagated" in kept.by_message(result.instance_id), "the last record")
    records = kept.by_message(result.instance_id)
    paid = records["paid EUR of 7"]
    assert (paid.msg, paid.args, paid.levelname, paid.name) == ("paid EUR of 7", (), "INFO", "shop")
    assert (paid.funcName, Path(paid.pathname).name) == ("log_forms", "test_logs.py")
    assert paid.process != os.getpid()
    assert paid.__dict__["plain"] == {"a": [1, 2.5, None]}
    assert paid.__dict__["odd"] == "<odd>"
    assert paid.__dict__["worse"] == "<Unprintable: repr() failed with RuntimeError>"
    refused = records["refused"]
    assert refused.exc_info is None
    assert str(refused.exc_text).endswith("ValueError: no money")
    assert "log_forms" in str(refused.stack_info)
    assert "half a pair \\ud800" in records
    long = next(text for text in records if text.startswith("long"))
    assert 10_000 < len(long) < 30_000
    assert long.endswith("characters cut)")
    assert not {"not wanted", "not wanted either", "too many arguments"} & set(records)


def test_each_record_made_in_a_stage_names_workflow_instance_stage_and_attempt(
    cluster: Runtime, kept: Kept, eventually: Callable[..., Any]
) -> None:
    kept.records.clear()
    id = cluster.execute(kinds, {}, timeout=30).instance_id
    eventually(lambda: any(r.getMessage() == "answered" for r in kept.records), "the last record")
    found = {(r.getMessage(), r.__dict__["stage_id"], r.__dict__["attempt"]) for r in kept.by_message(id).values()}
    assert found >= {
        ("predicate", "log-plainly", 1),
        ("plain", "log-plainly", 1),
        ("own thread", "log-plainly", 1),
        ("pool", "log-plainly", 1),
        ("lane", "log-in-a-lane", 1),
        ("async", "log-async", 1),
        ("to_thread", "log-async", 1),
        ("item", "items", 1),
    }
    assert {r.__dict__["workflow_id"] for r in kept.by_message(id).values()} == {"kinds"}
    failed = cluster.execute(undone, {}, timeout=30)
    eventually(lambda: "undone" in kept.by_message(failed.instance_id), "the record of a compensation")
    record = kept.by_message(failed.instance_id)["undone"]
    assert (record.__dict__["stage_id"], record.__dict__["attempt"]) == ("first", 1)


def test_each_attempt_has_its_number(
    cluster: Runtime, caplog: pytest.LogCaptureFixture, eventually: Callable[..., Any]
) -> None:
    with caplog.at_level(logging.WARNING):
        cluster.execute(kinds, {}, timeout=30)
        eventually(lambda: len([r for r in caplog.records if r.getMessage() == "try"]) == 2, "both records")
    tries = [r for r in caplog.records if r.getMessage() == "try"]
    assert [(r.name, r.__dict__["attempt"]) for r in tries] == [
        ("stageflow.kinds.log-and-retry", 1),
        ("stageflow.kinds.log-and-retry", 2),
    ]


def test_two_thousand_records_of_one_stage_reach_a_file_in_order_within_two_seconds(
    cluster: Runtime, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    def run(path: Path) -> float:
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(instance_id)s %(message)s"))
        handler.addFilter(lambda record: record.getMessage() != "record 7")
        log.addHandler(handler)
        began = time.monotonic()
        try:
            id = cluster.execute(many, {"records": 2000}, timeout=30).instance_id
            eventually(lambda: path.read_text().count("\n") == 1999, "all records")
        finally:
            log.removeHandler(handler)
            handler.close()
        seconds = time.monotonic() - began
        assert path.read_text().splitlines() == [f"{id} record {n}" for n in range(2000) if n != 7]
        return seconds

    # Others may be at work on this machine: one of three runs has to be in time.
    assert any(run(tmp_path / f"log{n}") < 2 for n in range(3))


def test_a_stalled_handler_of_the_program_holds_up_no_stage_and_dropped_records_are_counted(
    cluster: Runtime,
    kept: Kept,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    eventually: Callable[..., Any],
) -> None:
    def dropped() -> int:
        return sum(record.__dict__.get("dropped", 0) for record in caplog.records)

    kept.records.clear()
    records = cluster._local.node._output._records  # type: ignore[union-attr]
    monkeypatch.setattr(records, "_most", 500)
    kept.gate = threading.Event()
    try:
        with caplog.at_level(logging.WARNING):
            cluster.execute(many, {"records": 5000}, timeout=30)  # ends although no record is handled
            kept.gate.set()
            eventually(lambda: len(kept.records) + dropped() >= 5000, "all records, handled or counted")
    finally:
        kept.gate.set()
        kept.gate = None
    assert len(kept.records) + dropped() == 5000
    assert dropped() >= 4000
    warning = next(record for record in caplog.records if "dropped" in record.__dict__)
    assert (warning.name, warning.levelname) == ("stageflow_actors", "WARNING")
    assert "log records (the latest of logger 'shop' in stage 'log-many' of workflow 'many') were dropped" in (
        warning.getMessage()
    )
    numbers = [int(record.getMessage().split()[1]) for record in kept.records]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 4999, "the oldest ones are dropped"


def test_workers_follow_a_change_of_the_programs_levels(
    cluster: Runtime, kept: Kept, eventually: Callable[..., Any]
) -> None:
    def is_enabled() -> Any:
        return cluster.execute(enabled, {}, timeout=30).stages[0].data

    assert is_enabled() is False
    log.setLevel(logging.DEBUG)
    try:
        eventually(is_enabled, "a debug record that is wanted")
    finally:
        log.setLevel(logging.INFO)
    eventually(lambda: not is_enabled(), "one that is not wanted")


def test_the_relay_goes_on_with_a_new_node(cluster: Runtime, kept: Kept, eventually: Callable[..., Any]) -> None:
    old = cluster.node_pid
    os.kill(old, signal.SIGKILL)
    eventually(lambda: cluster.node_pid != old, "another node")
    id = cluster.execute(many, {"records": 3}, timeout=60).instance_id
    eventually(lambda: set(kept.by_message(id)) == {"record 0", "record 1", "record 2"}, "its records")


MODULE = """
import logging, logging.config, os
if os.environ.get("CONFIG") == "dict":
    logging.config.dictConfig({
        "version": 1,
        "formatters": {"app": {"format": "APP %(message)s"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": "app.log", "formatter": "app"}},
        "root": {"level": "INFO", "handlers": ["file"]},
    })
else:
    logging.basicConfig(filename="app.log", level=logging.INFO, format="APP %(message)s")
    own = logging.FileHandler(f"own-{os.getpid()}.log")
    logging.getLogger("app").addHandler(own)
log = logging.getLogger("app")

def handle(order):
    log.info("handled %s", order["id"])
    log.debug("not wanted")
"""

CONFIGURED = """
from stageflow_actors import Runtime, Workflow
import module
flow = Workflow("flow").add_stage(module.handle)
if __name__ == "__main__":
    with Runtime(flow, data_dir="data") as runtime:
        runtime.execute(flow, {"id": 7}, timeout=20)
"""


@pytest.mark.parametrize("config", ["basic", "dict"])
def test_a_set_up_made_by_the_users_module_holds_and_writes_each_record_once(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    (tmp_path / "module.py").write_text(MODULE)
    monkeypatch.setenv("CONFIG", config)
    program = launch(CONFIGURED)
    _, errors = program.communicate(timeout=30)
    assert program.returncode == 0, errors
    assert (tmp_path / "app.log").read_text() == "APP handled 7\n"
    if config == "basic":
        own = {file.name: file.read_text() for file in tmp_path.glob("own-*.log")}
        assert f"own-{program.pid}.log" in own, "the program's handler"
        assert sorted(own.values(), key=len)[-2:] == ["handled 7\n"] * 2, "and the worker's own, which is another file"


UNCONFIGURED = """
import logging, sys
from stageflow_actors import Config, Runtime, Workflow
def handle(order):
    logging.getLogger("app").info("an info")
    logging.getLogger("app").warning("a warning")
flow = Workflow("flow").add_stage(handle)
if __name__ == "__main__":
    with Runtime(flow, data_dir="data", config=Config(log_level=sys.argv[1])) as runtime:
        runtime.execute(flow, {"id": 7}, timeout=20)
"""


@pytest.mark.parametrize(("level", "expected"), [("WARNING", ["a warning"]), ("INFO", ["an info", "a warning"])])
def test_without_any_configuration_records_are_written_to_stderr(
    launch: Launch, level: str, expected: list[str]
) -> None:
    program = launch(UNCONFIGURED, level)
    said, errors = program.communicate(timeout=30)
    assert said == ""
    assert [line.partition(" app: ")[2] for line in errors.splitlines() if " app: " in line] == expected


def record_of(message: str, **extra: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "app", "msg": message, "levelno": 20, **extra})


def test_a_record_of_any_size_is_sent_in_bounds() -> None:
    whole = msgspec.msgpack.decode(encode_record(record_of("m", answer=1 << 70, raw=b"\0", names=("a", 1))))
    assert (whole["answer"], whole["raw"], whole["names"]) == (str(1 << 70), b"\0", ["a", 1])
    huge = {f"name{n}": "v" * 10_000 for n in range(1000)}
    data = encode_record(record_of("ä" * 1_000_000, exc_text="t" * 1_000_000, **huge))
    assert len(data) < MAX_RECORD_BYTES
    assert msgspec.msgpack.decode(data)["exc_text"].endswith("ttt")


def test_a_collector_that_does_not_read_costs_the_sender_one_short_wait() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sender = LogSender(theirs)
    began = time.monotonic()
    for number in range(20_000):
        sender.send(record_of(f"record {number}"))
    assert time.monotonic() - began < 5
    ours.setblocking(False)

    def read() -> list[dict[str, Any]]:
        found = []
        try:
            while True:
                found.append(msgspec.msgpack.decode(ours.recv(1 << 20)[FRAME_LENGTH_BYTES:]))
        except BlockingIOError:
            return found

    first = read()
    sender.send(record_of("after"))
    dropped, last = read()
    assert last["msg"] == "after"
    assert len(first) + dropped[DROPPED] == 20_000
    assert dropped["name"] == "app"
    theirs.close()
    sender.send(record_of("without a collector"))
    ours.close()


def test_levels_that_a_worker_has_set_hold_until_the_program_changes_its_own() -> None:
    program = LogLevels.create()
    worker = LogLevels(os.dup(program.fd))
    mine, other = logging.getLogger("levels.mine"), logging.getLogger("levels.other")
    root = logging.getLogger().level
    program.publish(LogSetup(root, {"levels.mine": 10, "levels.other": 20}))
    worker.apply()
    assert (mine.level, other.level) == (10, 20)
    mine.setLevel(40)
    worker.follow()
    program.publish(LogSetup(root, {"levels.mine": 10, "levels.other": 30}))
    worker.follow()
    assert (mine.level, other.level) == (40, 30)
    program.publish(LogSetup(root, {"levels.mine": 10}))
    worker.apply()
    assert (mine.level, other.level) == (40, 0)
    before = worker.current()
    mine.setLevel(50)
    logging.getLogger("levels.new").setLevel(50)
    worker.restore(before)
    assert (mine.level, logging.getLogger("levels.new").level) == (40, 0)
    program.close()
    worker.close()


def test_handlers_that_the_program_has_too_are_removed_and_others_stay(tmp_path: Path) -> None:
    logger = logging.getLogger("duplicates")
    same = logging.FileHandler(tmp_path / "same.log")
    logger.addHandler(same)
    program = LogLevels.create()
    program.publish(output.read_setup("WARNING"))
    worker = LogLevels(os.dup(program.fd))
    worker.apply()
    another = logging.FileHandler(tmp_path / "another.log")
    logger.addHandler(another)
    kept = {one: list(one.handlers) for one in describe_handlers()}
    try:
        worker.remove_duplicates()
        assert logger.handlers == [another]
    finally:
        for one, handlers in kept.items():
            one.handlers = handlers
        for handler in (same, another):
            logger.removeHandler(handler)
            handler.close()
        program.close()
        worker.close()


def configure_worker(folder: str, twice: bool) -> None:
    name = "shared" if twice else f"worker-{os.getpid()}"
    handler = logging.FileHandler(f"{folder}/{name}.log")
    handler.setFormatter(logging.Formatter("%(name)s %(stage_id)s %(message)s", defaults={"stage_id": None}))
    logging.getLogger("shop").addHandler(handler)


@pytest.mark.parametrize("twice", [False, True], ids=["for workers only", "in the program too"])
def test_what_the_initializer_configures_holds_beside_the_programs_logging(
    tmp_path: Path, kept: Kept, twice: bool
) -> None:
    set_up = partial(configure_worker, str(tmp_path), twice)
    before = list(log.handlers)
    if twice:
        set_up()
    try:
        with Runtime(many, data_dir=tmp_path / "data", initializer=set_up) as runtime:
            id = runtime.execute(many, {"records": 2}, timeout=30).instance_id
        # The end of the block waits for all output.
        assert set(kept.by_message(id)) == {"record 0", "record 1"}
        files = {file.name: file.read_text() for file in tmp_path.glob("*.log")}
        assert list(files.values()) == ["shop log-many record 0\nshop log-many record 1\n"]
        assert ("shared.log" in files) == twice
    finally:
        for handler in set(log.handlers) - set(before):
            log.removeHandler(handler)
            handler.close()
