"""Signals that the program ignores, blocks, handles or awaits: its cluster does not inherit them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import pytest
from own_programs import Ended

WORK = """
import subprocess

def dies(job):
    if not os.path.exists("died"):
        open("died", "w").close()
        os._exit(4)
    return "again"

def runs_a_program(job):
    return subprocess.run(["sh", "-c", "exit 7"]).returncode

def looks(job):
    signals = subprocess.run(["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"], capture_output=True, text=True)
    return [int(line.split()[1], 16) for line in signals.stdout.splitlines()]

def is_interrupted(job):
    class Late(Exception): pass
    def ring(*_): raise Late
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        signal.pause()
    except Late:
        return "rang"

stages = Workflow("stages")
for stage in (dies, runs_a_program, looks, is_interrupted):
    stages.add_stage(stage)

def main():
    with Runtime(stages, data_dir="data") as rt:
        print([stage.data for stage in rt.execute(stages, {}, timeout=100).stages])
        node = rt.node_pid
        os.kill(node, signal.SIGKILL)
        print([stage.data for stage in rt.execute(stages, {}, timeout=100).stages][1:], rt.node_pid != node)
    print("left")
"""

PROGRAMS = {
    "ignored and blocked": """
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1})
        """,
    "a handler that takes the exits of all children": """
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        def take(*_):
            try:
                while os.waitpid(-1, os.WNOHANG)[0]: pass
            except ChildProcessError: pass
        signal.signal(signal.SIGCHLD, take)
        """,
}


@pytest.mark.parametrize("signals", PROGRAMS)
def test_a_cluster_works_whatever_signals_its_program_ignores_or_blocks(
    signals: str, run_program: Callable[..., Ended]
) -> None:
    ended = run_program(f"{textwrap.dedent(PROGRAMS[signals])}{WORK}\nmain()\n")
    assert ended.lines == ["['again', 7, [0, 0], 'rang']", "[7, [0, 0], 'rang'] True", "left"], ended
    assert ended.status == 0


def test_a_node_that_has_just_died_does_not_end_a_program_with_the_default_action_of_sigpipe(
    run_program: Callable[..., Ended],
) -> None:
    ended = run_program(
        """
        import socket
        from stageflow_actors.runtime.ipc.control_channel import Channel, Scale
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        ours, theirs = socket.socketpair()
        theirs.close()
        try:
            Channel(ours).send(Scale("queue", 1))
        except OSError as error:
            print(type(error).__name__)
        """
    )
    assert ended.lines == ["BrokenPipeError"], ended


def test_a_program_that_awaits_a_signal_receives_it(run_program: Callable[..., Ended]) -> None:
    """No thread of the runtime takes a signal that the program has blocked after the start."""
    ended = run_program(
        """
        with Runtime(flow, data_dir="data") as rt:
            remove = rt.on_event(lambda event: None)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            os.kill(os.getpid(), signal.SIGTERM)
            print(signal.sigwait({signal.SIGTERM}).name, rt.execute(flow, {"n": 1}, timeout=100).stages[0].data)
        """
    )
    assert ended.lines == ["SIGTERM 1"], ended
