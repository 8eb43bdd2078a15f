"""Text that is none is refused at the door, by the command line and by clients alike; files may have any name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors.runtime.at_rest import steered
from stageflow_actors.runtime.client import Client

Said = tuple[int, str, str]

BAD = "\udcff"
"""What Python makes of the byte 0xff among the arguments."""


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
    stageflow: Callable[..., Said], filled: Any, arguments: tuple[str, ...], names: str
) -> None:
    filled.start("i1", {})
    data = filled.close()
    code, out, err = stageflow(*arguments, "--data", data)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert names in err
    assert "not valid UTF-8" in err


def test_the_bytes_themselves_are_refused_in_one_line(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    ran = command("queue", "pause", BAD)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert len(ran.stderr.splitlines()) == 1


def test_a_data_directory_may_have_any_name(
    command: Callable[..., subprocess.CompletedProcess[str]], filled: Any, tmp_path: Path
) -> None:
    filled.start("i1", {})
    place = tmp_path / f"any{BAD}"
    filled.close().rename(place)
    ran = command("queue", "list", "--data", place)
    assert ran.returncode == 0, ran.stderr
    assert "stageflow.orders.stage0" in ran.stdout


def test_files_of_orders_and_results_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "flows.py").write_text(
        "from stageflow_actors import Workflow\nflow = Workflow('flow').add_stage(lambda order: 'ok', id='one')\n"
    )
    (tmp_path / f"orders{BAD}.jsonl").write_text('{"id": "A-1"}\n')
    line = "import sys; from stageflow_actors.cli.main import main; sys.exit(main())"
    words = ["run", "flows.py:flow", "--input", f"orders{BAD}.jsonl", "--key", "id", "--results", f"out{BAD}.jsonl"]
    ran = subprocess.run(
        [sys.executable, "-c", line, *words, "--data", "data"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "STAGEFLOW_DATA"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / f"out{BAD}.jsonl").read_text().count("\n") == 1


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
    with steered(filled.close()) as client:
        with pytest.raises(ValueError, match="lone surrogate") as caught:
            call(client)
        assert not isinstance(caught.value, UnicodeError)
        assert client.instance("i1").status().value == "pending", "the connection is as good as before"
