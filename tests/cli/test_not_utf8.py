"""Text that is not UTF-8 is refused by the command line and by clients; file names may be any bytes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import STAGEFLOW, Command, Stageflow

from stageflow_actors.runtime.client.client import Client
from stageflow_actors.runtime.client.offline_client import open_client

FLOW = "from stageflow_actors import Workflow\nflow = Workflow('flow').add_stage(lambda order: 'ok', id='one')\n"

BAD = "\udcff"
"""What Python makes of the byte 0xff among the arguments."""


@pytest.fixture
def run(tmp_path: Path) -> Command:
    """Runs a command as a program of its own, with a stdout that takes nothing but UTF-8."""

    def start(*words: object, cwd: Path = tmp_path, env: dict[str, str] | None = None) -> Any:
        clean = {name: value for name, value in os.environ.items() if name != "STAGEFLOW_DATA"}
        return subprocess.run(
            [*STAGEFLOW, *map(str, words)],
            cwd=cwd,
            env={**clean, "PYTHONIOENCODING": "utf-8:strict", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=90,
            check=False,
        )

    return start


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("queue", "pause", BAD), "NAME"),
        (("queue", "resume", BAD), "NAME"),
        (("queue", "purge", BAD, "--yes"), "NAME"),
        (("queue", "list", "--prefix", BAD), "--prefix"),
        (("instances", "show", BAD), "ID"),
        (("instances", "cancel", BAD), "ID"),
        (("instances", "cancel", "i1", "--reason", f"because {BAD}"), "--reason"),
        (("instances", "list", "--workflow", BAD), "--workflow"),
        (("instances", "signal", "i1", BAD), "NAME"),
        (("start", "orders", "--id", BAD), "--id"),
        (("start", "orders", "--json", BAD), "--json"),
        (("dlq", "requeue", "1", BAD), "ID"),
        (("scale", "orders", BAD, "1"), "STAGE"),
    ],
    ids=lambda value: "_".join(value[:2]) if isinstance(value, tuple) else None,
)
def test_an_argument_that_is_not_utf8_is_wrong_usage(
    stageflow: Stageflow, filled: Any, arguments: tuple[str, ...], names: str
) -> None:
    filled.start("i1", {})
    data = filled.close()
    code, out, err = stageflow(*arguments, "--data", data)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert names in err
    assert "not valid UTF-8" in err


def test_the_bytes_themselves_are_refused_in_one_line(command: Command) -> None:
    ran = command("queue", "pause", BAD)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("queue", "list"),
        ("queue", "pause", "stageflow.orders.stage0"),
        ("instances", "cancel", "i1"),
        ("stats",),
        ("journal", "verify"),
        ("journal", "compact"),
        ("doctor",),
        ("doctor", "--output", "json"),
    ],
    ids=" ".join,
)
def test_a_data_directory_may_have_any_name(filled: Any, tmp_path: Path, run: Command, words: tuple[str, ...]) -> None:
    filled.start("i1", {})
    filled.close().rename(tmp_path / f"any{BAD}")
    ran = run(*words, "--data", f"any{BAD}")
    assert (ran.returncode, "Traceback" in ran.stderr) == (0, False), ran.stderr
    if "json" in words:
        assert json.loads(ran.stdout)["data"] == str(tmp_path / f"any{BAD}"), "the very name, for programs"


def test_a_damaged_journal_is_reported_in_one_line_whatever_its_directory_is_called(
    filled: Any, tmp_path: Path, run: Command
) -> None:
    for number in range(3):
        filled.start(f"i{number}", {})
    place = tmp_path / f"any{BAD}"
    filled.close().rename(place)
    (segment,) = (place / "journal").glob("*.journal")
    content = bytearray(segment.read_bytes())
    content[content.index(b"i0")] ^= 1
    segment.write_bytes(content)
    (tmp_path / "flows.py").write_text(FLOW)
    for words in (("run", "flows.py:flow", "--input", "-"), ("queue", "list"), ("queue", "pause", "q")):
        ran = run(*words, "--data", place)
        assert (ran.returncode, len(ran.stderr.splitlines())) == (1, 1), ran.stderr
        assert "offset" in ran.stderr


def test_directories_modules_orders_and_results_may_have_any_name(tmp_path: Path, run: Command) -> None:
    home = tmp_path / f"home{BAD}"
    home.mkdir()
    (home / "flows.py").write_text(FLOW)
    (home / f"orders{BAD}.jsonl").write_text('{"id": "A-1"}\n')
    words = ["run", home / "flows.py:flow", "--input", f"orders{BAD}.jsonl", "--results", f"out{BAD}.jsonl"]
    for state in ("1 done", "1 skipped"):
        ran = run(*words, "--data", f"data{BAD}", cwd=home)
        assert (ran.returncode, state in ran.stderr) == (0, True), ran.stderr
    result = json.loads((home / f"out{BAD}.jsonl").read_text())
    assert result["instance_id"] == r"orders\udcff.jsonl:1", "an id is text, and the same in each run"


def test_a_table_is_printed_whatever_characters_the_terminal_knows(filled: Any, run: Command) -> None:
    filled.start("Ünïcode→", {})
    ran = run("instances", "list", "--data", filled.close(), env={"PYTHONIOENCODING": "latin-1:strict"})
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.pause("\ud800"),
        lambda client: client.resume("\ud800"),
        lambda client: client.queues("\ud800"),
        lambda client: client.instance("\ud800"),
        lambda client: client.instance("i1").cancel("\ud800"),
        lambda client: client.instance("i1").signal("\ud800"),
    ],
    ids=["pause", "resume", "queues", "instance", "cancel", "signal"],
)
def test_a_client_refuses_text_that_cannot_be_sent(filled: Any, call: Callable[[Client], object]) -> None:
    filled.start("i1", {})
    with open_client(filled.close()) as client:
        with pytest.raises(ValueError, match="lone surrogate") as caught:
            call(client)
        assert not isinstance(caught.value, UnicodeError)
        assert client.instance("i1").status().value == "pending", "the connection is as good as before"
