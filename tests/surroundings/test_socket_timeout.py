"""`socket.setdefaulttimeout`, as scripts that talk HTTP call it, in the program or in its workers."""

from __future__ import annotations

from collections.abc import Callable

from own_programs import Ended


def test_a_default_socket_timeout_has_no_effect_on_a_cluster(run_program: Callable[..., Ended]) -> None:
    """The node is idle for longer than the time, then restarted; a stop ends."""
    ended = run_program(
        """
        import socket
        socket.setdefaulttimeout(0.05)
        def sets(job):
            socket.setdefaulttimeout(0.01)
            time.sleep(0.1)
            return job["n"]
        flow = Workflow("flow").add_stage(sets, env={"A": "b"})
        def initialize():
            socket.setdefaulttimeout(0.02)
        with Runtime(flow, data_dir="data", initializer=initialize) as rt, Runtime.connect("data") as client:
            print([rt.execute(flow, {"n": n}, timeout=100).stages[0].data for n in range(2)])
            rt.scale(flow, "sets", 2)
            os.kill(rt.node_pid, signal.SIGKILL)
            print(client.execute("flow", {"n": 3}, timeout=100).stages[0].data)
        print("left")
        """
    )
    assert ended.lines == ["[0, 1]", "3", "left"], ended
    assert ended.errors.count("stageflow:") <= 1, "only the restart of the node is announced"
