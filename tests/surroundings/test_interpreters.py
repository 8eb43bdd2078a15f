"""Programs without a usable interpreter, frozen ones, and those whose threads gevent or eventlet has replaced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from own_programs import Ended

USES = """
def use():
    with Runtime(flow, data_dir="data") as rt:
        return rt.execute(flow, {"n": 1}, timeout=100).stages[0].data

def attempt(call):
    try:
        print(call(), flush=True)
    except StageFlowError as error:
        print(error, flush=True)
"""

NOWHERE = """
sys.executable = sys._base_executable = ""
sys.prefix = sys.base_prefix = sys.exec_prefix = sys.base_exec_prefix = os.environ["PATH"] = "/no"
"""


def test_an_interpreter_is_found_where_an_embedding_program_has_none_or_its_own_name(
    run_program: Callable[..., Ended],
) -> None:
    """The program in `sys.executable` must not be started in place of an interpreter."""
    ended = run_program(
        USES
        + """
app = os.path.abspath("app")
with open(app, "w") as file:
    file.write("#!/bin/sh\\ntouch started\\nexec sleep 60\\n")
os.chmod(app, 0o755)
os.symlink(app, "python3")
for given in (None, "/nowhere/python3", app):
    sys.executable = given
    attempt(use)
print(os.path.exists("started"))
"""
    )
    assert ended.lines == ["1", "1", "1", "False"], ended


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("sys.frozen = True", "a frozen program (PyInstaller, cx_Freeze, Nuitka …) has no Python interpreter"),
        ("__compiled__ = ()", "a frozen program (PyInstaller, cx_Freeze, Nuitka …) has no Python interpreter"),
        (
            NOWHERE,
            "sys.executable is '', which is no interpreter of Python",
        ),
    ],
)
def test_a_program_without_an_interpreter_is_refused_in_words(
    run_program: Callable[..., Ended], code: str, words: str
) -> None:
    ended = run_program(f"{USES}\n{code}\nattempt(use)\n")
    assert words in ended.lines[0], ended
    assert len(ended.lines) == 1


PATCHED = {
    "gevent": """
    import types
    monkey = types.ModuleType("gevent.monkey")
    monkey.is_module_patched = lambda name: name in ("threading", "socket", "time")
    sys.modules["gevent.monkey"] = monkey
    """,
    "eventlet": """
    import types
    patcher = types.ModuleType("eventlet.patcher")
    patcher.is_monkey_patched = lambda name: name in ("thread", "socket", "time")
    sys.modules["eventlet.patcher"] = patcher
    """,
}
"""What these libraries answer after `patch_all()` and `monkey_patch()`; they are no dependency of the tests."""


@pytest.mark.parametrize("library", PATCHED)
def test_threads_that_a_library_has_replaced_are_refused_by_its_name(
    run_program: Callable[..., Ended], library: str
) -> None:
    """In the program, in a client, and in workers whose initializer patches: each of them would wait forever."""
    body = PATCHED[library]
    ended = run_program(
        USES
        + f"""
def patch():
    {body}

def connect():
    with Runtime.connect("data") as client:
        return client.execute("flow", {{"n": 2}}, timeout=100)

def patched_workers():
    with Runtime(flow, data_dir="data", initializer=patch) as rt:
        instance = rt.submit(flow, {{"n": 1}})
        time.sleep(0.5)
        rt.stop(grace=0)

patched_workers()
patch()
attempt(use)
attempt(connect)
"""
    )
    words = f"{library} has patched threading, socket, time in this process, and StageFlow needs threads"
    assert [words in line for line in ended.lines] == [True, True], ended
    assert words in ended.errors
