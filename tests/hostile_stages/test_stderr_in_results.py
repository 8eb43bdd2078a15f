"""The text of a death: the last stderr of the worker, and whether the kernel's OOM killer ended it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from stageflow_actors.core.failures import describe_error, last_lines
from stageflow_actors.runtime.node.memory_limits import OomKills, count_oom_kills
from stageflow_actors.runtime.system.processes import describe_exit

DUMP = b"""\
long before: Fatal Python error: of somebody's log
working on 7
Fatal Python error: Segmentation fault

Current thread 0x00007f0a (most recent call first):
  File "/usr/lib/python3.11/ctypes/__init__.py", line 519 in string_at
  File "/srv/orders/stages.py", line 8 in charge
  File "/usr/lib/stageflow_actors/definition/handler.py", line 97 in <lambda>
  File "/usr/lib/stageflow_actors/runtime/worker/executors/base.py", line 189 in __call__
  File "/usr/lib/a.py", line 1 in one
  File "/usr/lib/b.py", line 2 in two
  File "/usr/lib/c.py", line 3 in three

Extension modules: msgspec._core, zmq.backend.cython._zmq (total: 2)
"""


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (b"", ""),
        (b"\n \n", ""),
        (b"one\ntwo\n\nthree", "one\ntwo\nthree"),
        (b"".join(b"%d\n" % n for n in range(9)), "4\n5\n6\n7\n8"),
        (b"x" * 10_000, "x" * 200),
        (b"10 %\r20 %\r30 %", "10 %\n20 %\n30 %"),
        (b"\x1b[31mred\x1b[0m \x00\x07bell", "red bell"),
        (b"half a \xc3", "half a \\xc3"),
        ("späte Einsicht".encode(), "späte Einsicht"),
        (
            DUMP,
            (
                "Fatal Python error: Segmentation fault\n"
                '  File "/usr/lib/python3.11/ctypes/__init__.py", line 519 in string_at\n'
                '  File "/srv/orders/stages.py", line 8 in charge\n'
                '  File "/usr/lib/a.py", line 1 in one\n'
                '  File "/usr/lib/b.py", line 2 in two'
            ),
        ),
    ],
)
def test_the_last_lines_of_a_worker_are_kept_and_of_a_crash_those_nearest_to_it(written: bytes, told: str) -> None:
    assert last_lines(written) == told


def test_an_error_whose_text_exits_the_process_is_reported_like_any_other() -> None:
    class Leaving(Exception):
        def __str__(self) -> str:
            raise SystemExit

    assert describe_error(Leaving()) == "Leaving: (str() failed)"


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.events": "low 0\noom 3\noom_kill 2\n"}, 2),
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/a\n1:cpu:/\n0::/\n",
                "sys/fs/cgroup/memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n",
            },
            5,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.events": "oom_kill 1\n"}, 1),
        ({"proc/self/cgroup": "nonsense\n", "proc/vmstat": "nr_free_pages 7\noom_kill 4\n"}, 4),
        ({"proc/self/cgroup": "0::/gone\n", "proc/vmstat": "oom_kill 4\n"}, 4),
        ({}, None),
        ({"proc/vmstat": "nr_free_pages 7\n"}, None),
    ],
)
def test_the_kernel_is_asked_where_it_counts_for_this_group_of_processes(
    tmp_path: Path, files: dict[str, str], count: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert count_oom_kills(tmp_path) == count


def test_each_process_that_the_kernel_has_counted_is_claimed_once() -> None:
    counted: list[int | None] = [7]
    kills = OomKills(lambda: counted[0])
    assert kills.claim() is False
    counted[0] = 9
    assert [kills.claim() for _ in range(3)] == [True, True, False]
    counted[0] = None
    assert kills.claim() is None


def test_a_kill_is_attributed_to_memory_only_if_the_kernel_reports_it() -> None:
    assert describe_exit(-signal.SIGKILL) == "killed by SIGKILL (out of memory, or killed by a person)"
    assert "out of memory" in describe_exit(-signal.SIGKILL, out_of_memory=True)
    assert "out of memory" not in describe_exit(-signal.SIGKILL, out_of_memory=False)
    assert describe_exit(-signal.SIGSEGV, out_of_memory=True) == "killed by SIGSEGV (segmentation fault)"
