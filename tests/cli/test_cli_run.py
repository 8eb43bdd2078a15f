"""`stageflow run`, as a program with real processes below it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from programs import STAGEFLOW, Command

from stageflow_actors.runtime.system.data_dir import DataDir

FLOWS = """
import os, time
from dataclasses import dataclass
from stageflow_actors import Runtime, StageFlowError, Workflow


@dataclass
class Order:
    order_id: str
    amount: int
    receipt: str = ""

    def validate(self):
        if self.amount < 0:
            raise ValueError("amount is negative")


def log(text):
    with open("effects.log", "a") as file:
        file.write(text + "\\n")


orders = Workflow("orders", context=Order)


@orders.stage
def reserve(order: Order) -> None:
    log(f"reserve {order.order_id}")
    if os.path.exists("slow"):
        time.sleep(0.01)


@reserve.compensation
def release(order: Order) -> None:
    log(f"release {order.order_id}")


@orders.stage
def pay(order: Order) -> None:
    if order.amount > 1000 and not os.path.exists("rich"):
        raise ValueError("card declined")
    order.receipt = f"receipt {order.order_id}"


class Bank:
    name = "the bank"


served = Workflow("served", on_failure="park")


@served.stage
def ask(context: dict, *, bank: Bank) -> None:
    if context["n"] == 2:
        raise ValueError("no")
    context["from"] = bank.name


class Unbuilt:
    def __init__(self):
        if not os.path.exists("built"):
            raise OSError("the ledger is away")


blocked = Workflow("blocked")


@blocked.stage
def easy(context: dict) -> None:
    pass


@blocked.stage
def hard(context: dict, *, ledger: Unbuilt) -> None:
    pass


class Odd(Runtime):
    def map_unordered(self, *arguments, **options):
        yield from super().map_unordered(*arguments, **options)
        raise StageFlowError("something odd became of one instance")


other = Workflow("other")
other.add_stage(lambda context: None, id="nothing")

runtime = Runtime(served, services={"bank": Bank}, data_dir="own-data")
both = Runtime(orders, other)
idle = Runtime()
needy = Runtime(blocked, services={"ledger": Unbuilt})
odd = Odd(orders)
number = 5
"""


@pytest.fixture(autouse=True)
def flows(tmp_path: Path) -> None:
    (tmp_path / "flows.py").write_text(FLOWS)


def write(path: Path, count: int, **amounts: int) -> None:
    lines = [{"order_id": f"o{n}", "amount": amounts.get(f"o{n}", n)} for n in range(1, count + 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def results(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["instance_id"]: line for line in lines}
    assert len(found) == len(lines), "an instance is in the results twice"
    return found


def effects(tmp_path: Path) -> list[str]:
    path = tmp_path / "effects.log"
    return path.read_text().splitlines() if path.exists() else []


def until(condition: Callable[[], bool], program: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert program.poll() is None, "the program ended before"
        assert time.monotonic() < deadline, "it did not happen within 60 s"
        time.sleep(0.005)


RUN = ("run", "flows.py:orders", "--input", "orders.jsonl", "--key", "order_id", "--data", "data")


def test_every_line_becomes_an_instance_and_bad_ones_are_reported_by_number(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", 20, o5=5000)
    lines = (tmp_path / "orders.jsonl").read_text().splitlines()
    lines[16] = '{"order_id": "o17", "amount": '
    lines[17] = '{"order_id": "o18", "amount": -1}'
    lines[18] = '{"order_id": "o19", "amount": "many"}'
    (tmp_path / "orders.jsonl").write_text("\n".join(lines))
    done = command(*RUN, "--results", "out.jsonl")
    assert (done.returncode, done.stdout) == (1, "")
    said = done.stderr.splitlines()
    assert any(line.startswith("orders.jsonl line 17: not valid JSON") for line in said)
    assert "orders.jsonl line 18: amount is negative" in said
    assert "orders.jsonl line 19: context.amount must be int, not str" in said
    assert "orders: 17 done, 3 refused" in said[-1]
    assert "16 completed, 1 compensated" in said[-1]
    found = results(tmp_path / "out.jsonl")
    assert len(found) == 17
    assert set(found["o5"]) == {"instance_id", "status", "error", "context"}
    assert (found["o5"]["status"], found["o5"]["error"]) == ("compensated", "ValueError: card declined")
    assert found["o5"]["context"]["amount"] == 5000
    assert found["o20"]["context"]["receipt"] == "receipt o20"


def test_run_again_it_skips_what_is_done_and_the_results_are_complete(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", 5)
    first = command(*RUN)
    assert (first.returncode, "5 done" in first.stderr) == (0, True)
    write(tmp_path / "orders.jsonl", 8)
    second = command(*RUN, "--results", "out.jsonl", "--output", "json")
    assert second.returncode == 0
    summary = json.loads(second.stdout)
    assert (summary["done"], summary["skipped"], summary["statuses"]) == (3, 5, {"completed": 8})
    assert set(results(tmp_path / "out.jsonl")) == {f"o{n}" for n in range(1, 9)}
    assert sorted(effects(tmp_path)) == sorted(f"reserve o{n}" for n in range(1, 9))
    # The same id with another input is another instance, and refused.
    write(tmp_path / "orders.jsonl", 8, o2=77)
    third = command(*RUN)
    assert third.returncode == 1
    assert any(
        line.startswith("orders.jsonl line 2: ") and "another input" in line for line in third.stderr.splitlines()
    )


def test_what_failed_is_run_again_when_asked(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", 3, o2=5000)
    assert command(*RUN).returncode == 1
    (tmp_path / "rich").touch()
    assert command(*RUN).returncode == 1
    again = command(*RUN, "--retry-failed", "--results", "out.jsonl")
    assert again.returncode == 0
    assert "1 done, 2 skipped" in again.stderr.splitlines()[-1]
    assert {line["status"] for line in results(tmp_path / "out.jsonl").values()} == {"completed"}


def test_a_runtime_brings_its_services_and_its_directory(command: Command, tmp_path: Path) -> None:
    rows = '{"n": 1}\n{"n": 2}\n{"n": 3}\n'
    done = command("run", "flows:runtime", "--input", "-", "--results", "-", input=rows)
    assert done.returncode == 1
    found = {line["instance_id"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert {name: line["status"] for name, line in found.items()} == {
        "stdin:1": "completed",
        "stdin:2": "parked",
        "stdin:3": "completed",
    }
    assert found["stdin:1"]["context"] == {"n": 1, "from": "the bank"}
    assert found["stdin:2"]["error"] == "ValueError: no"
    assert (tmp_path / "own-data" / "journal").is_dir()
    assert "no" in command("dlq", "list", "--data", "own-data").stdout


def test_csv_is_read_as_what_the_fields_need(command: Command, tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_text("order_id,amount\na,5\nb,much\nc,7\n")
    run = ("run", "flows.py:orders", "--input", "orders.csv", "--key", "order_id", "--results", "out.jsonl")
    done = command(*run)
    assert done.returncode == 1
    assert "orders.csv line 3: context.amount must be int, not str" in done.stderr
    assert {name: line["context"]["amount"] for name, line in results(tmp_path / "out.jsonl").items()} == {
        "a": 5,
        "c": 7,
    }
    assert (tmp_path / "stageflow-data").is_dir()


def test_one_workflow_of_several_has_to_be_named(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", 2)
    run = ("run", "flows.py:both", "--input", "orders.jsonl", "--data", "data")
    done = command(*run)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "(orders, other)" in done.stderr
    assert command(*run, "--workflow", "nope").returncode == 2
    assert not (tmp_path / "data").exists()
    assert "other: 2 done" in command(*run, "--workflow", "other").stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("nowhere:orders", "--input", "orders.jsonl"), "no module 'nowhere'"),
        (("nowhere.py:orders", "--input", "orders.jsonl"), "no file"),
        (("flows.py:nothing", "--input", "orders.jsonl"), "flows.py:orders (Workflow)"),
        (("flows.py:number", "--input", "orders.jsonl"), "is an int"),
        (("flows.py:orders", "--input", "nowhere.jsonl"), "nowhere.jsonl"),
        (("flows.py:orders", "--input", "orders.jsonl", "--results", "no/such/out.jsonl"), "no/such/out.jsonl"),
        (("flows.py:orders",), "--input"),
        ((".:orders", "--input", "orders.jsonl"), "'.' is not a module"),
        (("flows.py:idle", "--input", "orders.jsonl"), "flows.py:idle has no workflows"),
        (("flows.py:orders", "--input", "orders.jsonl", "--workflow", "nope"), "no workflow 'nope'; it has orders"),
        (("flows.py:orders", "--input", "orders.jsonl", "--key", ""), "--key is empty"),
        (("flows.py:orders", "--input", "orders.jsonl", "--data", ""), "the name is empty: name a directory"),
        (("flows.py:orders", "--input", "orders.jsonl", "--data", ".", "--fresh"), "--fresh would rename"),
        (("flows.py:orders", "--input", "wide.jsonl"), "wide.jsonl is UTF-16: convert it to UTF-8"),
        (("flows.py:orders", "--input", "twice.csv"), "names the column 'n' more than once"),
        (("flows.py:orders", "--input", "orders.jsonl", "--results", "./orders.jsonl"), "overwrite the input"),
        (("flows.py:orders", "--input", "orders.jsonl", "--results", "link.jsonl"), "overwrite the input"),
        (("flows.py:orders", "--input", "old.jsonl.part", "--results", "old.jsonl"), "overwrite the input"),
    ],
)
def test_a_wrong_command_is_one_line_and_starts_nothing(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], word: str
) -> None:
    write(tmp_path / "orders.jsonl", 2)
    write(tmp_path / "old.jsonl.part", 2)
    (tmp_path / "link.jsonl").symlink_to("orders.jsonl")
    (tmp_path / "wide.jsonl").write_text("{}\n{}\n", encoding="utf-16")
    (tmp_path / "twice.csv").write_text("n,n\n1,2\n")
    done = command("run", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert word in done.stderr
    assert not (tmp_path / "stageflow-data").exists()
    assert [path.name for path in tmp_path.glob("*.part")] == ["old.jsonl.part"]
    assert not (tmp_path / "journal").exists()
    for path in (tmp_path / "orders.jsonl", tmp_path / "old.jsonl.part"):
        assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("redirection", "what"), [("--input - <&-", "input"), ("--input /dev/null --results - >&-", "output")]
)
def test_a_standard_stream_that_is_closed_is_one_line(tmp_path: Path, redirection: str, what: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$@" run flows.py:orders {redirection}', "sh", *STAGEFLOW],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"standard {what}, and it is closed" in done.stderr
    assert not (tmp_path / "stageflow-data").exists()


def test_input_from_a_pipe_by_name_is_all_read(command: Command, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"order_id": f"o{n}", "amount": n}) + "\n" for n in range(1, 6))
    done = command(*RUN[:3], "/dev/stdin", *RUN[4:], input=rows)
    assert done.returncode == 0
    assert "orders: 5 done" in done.stderr
    assert sorted(effects(tmp_path)) == [f"reserve o{n}" for n in range(1, 6)]


def test_an_input_without_lines_is_reported_as_empty(command: Command, tmp_path: Path) -> None:
    (tmp_path / "orders.jsonl").write_text("\n")
    done = command(*RUN)
    assert done.returncode == 0
    assert "no lines in orders.jsonl" in done.stderr.splitlines()


def test_a_run_whose_workers_cannot_start_goes_on_and_says_why_it_waits(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    said: list[str] = []
    with start(tmp_path, "run", "flows.py:needy", "--input", "some.jsonl", "--data", "data") as program:
        assert program.stderr is not None
        for line in program.stderr:
            said.append(line)
            if "no result for 5 s" in line:
                (tmp_path / "built").touch()
    assert program.returncode == 0, said
    waits = next(line for line in said if "no result for 5 s" in line)
    assert "more wait for: the workers of stage 'hard' cannot start: service 'ledger' cannot be made: OSErr" in waits
    assert sum("the ledger is away" in line for line in said) <= 4, "the warning, its traceback, and that line"


def test_an_error_of_no_known_line_ends_the_run_in_one_line_and_keeps_the_results(
    command: Command, tmp_path: Path
) -> None:
    write(tmp_path / "orders.jsonl", 3)
    (tmp_path / "out.jsonl").write_text("of an earlier run\n")
    done = command("run", "flows.py:odd", *RUN[2:], "--results", "out.jsonl")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert done.stderr.splitlines()[-2:] == [
        "the results so far are in out.jsonl.part; out.jsonl is unchanged",
        "stageflow: something odd became of one instance",
    ]
    assert (tmp_path / "out.jsonl").read_text() == "of an earlier run\n"
    assert len(results(tmp_path / "out.jsonl.part")) == 3


def test_a_directory_in_use_is_refused_and_left_as_it_is(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", 2)
    held = DataDir(tmp_path / "data")
    held.acquire(os.getpid())
    try:
        for options in ((), ("--fresh",)):
            done = command(*RUN, *options)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1)
            assert str(os.getpid()) in done.stderr
        assert [path.name for path in tmp_path.glob("data*")] == ["data"]
    finally:
        held.release()


def test_fresh_sets_the_old_directory_aside(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", 2)
    command(*RUN)
    done = command(*RUN, "--fresh")
    assert done.returncode == 0
    assert "2 done in" in done.stderr
    aside = [path for path in tmp_path.glob("data.old-*") if (path / "journal").is_dir()]
    assert len(aside) == 1
    assert command("instances", "show", "o1", "--data", aside[0]).returncode == 0
    assert len(effects(tmp_path)) == 4


def test_what_a_start_that_failed_has_left_is_set_aside_as_well(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", 1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "lock").touch()
    assert command(*RUN, "--fresh").returncode == 0


@pytest.mark.parametrize(
    "words", [(*RUN, "--results"), ("instances", "export", "--data", "data")], ids=["run", "export"]
)
def test_a_pipe_or_a_device_is_written_to_and_not_replaced_by_a_file(
    command: Command, tmp_path: Path, words: tuple[str, ...]
) -> None:
    write(tmp_path / "orders.jsonl", 3)
    command(*RUN)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        done = command(*words, "pipe")
        read = os.read(reader, 1 << 16)
    finally:
        os.close(reader)
    assert done.returncode == 0, done.stderr
    assert len(read.splitlines()) == 3
    assert pipe.is_fifo()
    assert not (tmp_path / "pipe.part").exists()


def test_results_through_a_link_are_in_the_file_behind_it(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", 1)
    (tmp_path / "out.jsonl").symlink_to("real.jsonl")
    assert command(*RUN, "--results", "out.jsonl").returncode == 0
    assert (tmp_path / "out.jsonl").is_symlink()
    assert list(results(tmp_path / "real.jsonl")) == ["o1"]


def test_a_line_that_is_no_utf8_is_reported_as_such(command: Command, tmp_path: Path) -> None:
    (tmp_path / "orders.jsonl").write_bytes(b'{"order_id": "o1", "amount": 1}\n{"order_id": "\xe9"}\n')
    done = command(*RUN)
    assert done.returncode == 1
    assert "orders.jsonl line 2: not valid UTF-8: byte 0xe9 at column 15" in done.stderr


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*STAGEFLOW, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_explains_how_to_continue_and_does(
    command: Command, tmp_path: Path, which: signal.Signals
) -> None:
    write(tmp_path / "orders.jsonl", 400)
    (tmp_path / "out.jsonl").write_text("of an earlier run\n")
    (tmp_path / "slow").touch()
    with start(tmp_path, *RUN, "--results", "out.jsonl") as program:
        until(lambda: len(effects(tmp_path)) >= 40, program)
        program.send_signal(which)
        _, said = program.communicate(timeout=30)
    assert program.returncode == 130
    assert "run the same command again to resume" in said
    assert "Traceback" not in said
    assert "the results so far are in out.jsonl.part; out.jsonl is unchanged" in said
    assert (tmp_path / "out.jsonl").read_text() == "of an earlier run\n"
    assert 0 < len(results(tmp_path / "out.jsonl.part")) < 400
    (tmp_path / "slow").unlink()
    done = command(*RUN, "--results", "out.jsonl")
    assert done.returncode == 0
    assert len(results(tmp_path / "out.jsonl")) == 400
    assert not (tmp_path / "out.jsonl.part").exists()
    # It ended the stages in work, so none had to be run twice.
    assert sorted(effects(tmp_path)) == sorted(f"reserve o{n}" for n in range(1, 401))


def test_a_killed_run_leaves_the_earlier_results_and_goes_on(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", 300)
    (tmp_path / "out.jsonl").write_text("of an earlier run\n")
    (tmp_path / "slow").touch()
    with start(tmp_path, *RUN, "--results", "out.jsonl") as program:
        until(lambda: len(effects(tmp_path)) >= 40, program)
        children = psutil.Process(program.pid).children(recursive=True)
        program.kill()
        program.communicate()
        assert psutil.wait_procs(children, timeout=10)[1] == []
    assert (tmp_path / "out.jsonl").read_text() == "of an earlier run\n"
    (tmp_path / "slow").unlink()
    done = command(*RUN, "--results", "out.jsonl")
    assert done.returncode == 0
    assert "resuming" in done.stderr
    assert len(results(tmp_path / "out.jsonl")) == 300
    assert not (tmp_path / "out.jsonl.part").exists()
    stats = json.loads(command("journal", "stats", "--data", "data", "--output", "json").stdout)
    assert {row["count"] for row in stats["settlements"]} == {1}
    assert len(stats["settlements"]) == 600


def test_a_running_cluster_can_be_looked_at(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", 2_000)
    (tmp_path / "slow").touch()
    with start(tmp_path, *RUN) as program:
        until(lambda: len(effects(tmp_path)) >= 20, program)
        queues = json.loads(command("queue", "list", "--data", "data", "--output", "json").stdout)
        actors = {queue["name"]: queue["actors"] for queue in queues}
        assert actors["stageflow.orders.stage0"] == actors["stageflow.orders.stage1"] == 1
        assert sum(queue["ready"] for queue in queues) > 0
        live = json.loads(command("instances", "list", "--data", "data", "--limit", "5", "--output", "json").stdout)
        assert {row["workflow"] for row in live} == {"orders"}
        pending = command("instances", "show", "o2000", "--data", "data", "--output", "json")
        assert json.loads(pending.stdout)["status"] == "pending"
        assert json.loads(command("stats", "--data", "data", "--output", "json").stdout)["running"] is True
        assert command("journal", "verify", "--data", "data").returncode == 0
        assert command("journal", "stats", "--data", "data").returncode == 0
        assert command("queue", "pause", "stageflow.orders.stage1", "--data", "data").returncode == 0
        paused = json.loads(command("stats", "--data", "data", "--output", "json").stdout)["paused"]
        assert paused == ["stageflow.orders.stage1"]
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=30)
    assert program.returncode == 130
