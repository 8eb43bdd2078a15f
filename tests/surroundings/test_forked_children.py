"""A forked child of the program: each call names `Runtime.connect`, and nothing that it does reaches the cluster."""

from __future__ import annotations

from collections.abc import Callable

from own_programs import Ended

EVERY_CALL = """
import asyncio, threading

def calls(rt, done, live, results):
    return {
        "submit": lambda: rt.submit(flow, {"n": 7}),
        "submit_many": lambda: rt.submit_many(flow, [{"n": 7}]),
        "execute": lambda: rt.execute(flow, {"n": 7}),
        "map": lambda: next(rt.map(flow, [{"n": 7}])),
        "a map that is running": lambda: next(results),
        "as_completed": lambda: next(rt.as_completed([done])),
        "instance": lambda: rt.instance(done.id),
        "instances": lambda: rt.instances(),
        "queues": lambda: rt.queues(),
        "stats": lambda: rt.stats(),
        "finished_count": lambda: rt.finished_count(),
        "pause": lambda: rt.pause("stageflow.flow.stage0"),
        "resume": lambda: rt.resume("stageflow.flow.stage0"),
        "scale": lambda: rt.scale(flow, "one", 2),
        "on_event": lambda: rt.on_event(print),
        "drain": lambda: rt.drain(),
        "result": lambda: done.result(),
        "result of a live one": lambda: live.result(),
        "status": lambda: done.status(),
        "done": lambda: live.done(),
        "progress": lambda: live.progress(),
        "history": lambda: done.history(),
        "cancel": lambda: live.cancel(),
        "retry": lambda: live.retry(),
        "restart": lambda: done.restart(),
        "signal": lambda: live.signal("go"),
        "await": lambda: asyncio.run(wait(done)),
    }

async def wait(instance):
    return await instance

def fork(work):
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    threading.Timer(100, os._exit, [9]).start()
    try:
        work()
        sys.stdout.flush()
    except BaseException as error:
        print("CHILD", type(error).__name__, error, flush=True)
        os._exit(8)
    os._exit(0)

def refuse_all(named):
    for name, call in named.items():
        try:
            call()
        except BrokerUnavailable as error:
            if "Runtime.connect(" not in str(error):
                print(name, "says", error)
        else:
            print(name, "did not raise")

waits = Workflow("waits").add_signal("go")
"""


def test_each_call_of_a_forked_child_raises_and_names_connect(run_program: Callable[..., Ended]) -> None:
    ended = run_program(
        EVERY_CALL
        + """
def in_child():
    own = {
        "start": rt.start, "stop": rt.stop, "register": lambda: rt.register(Workflow("more").add_stage(print, id="p")),
        "endpoint": lambda: rt.endpoint("more", print), "node_pid": lambda: rt.node_pid,
    }
    refuse_all({**calls(rt, done, live, results), **own})
    refuse_all(calls(client, client.instance_of_parent, client.live_of_parent, of_client))
    with Runtime.connect("data") as mine:
        print("connected", mine.execute("flow", {"n": 8}, timeout=100).stages[0].data)

with Runtime(flow, waits, data_dir="data") as rt, Runtime.connect("data") as client:
    done, live = rt.submit(flow, {"n": 1}), rt.submit(waits, {}, instance_id="live")
    done.result(timeout=100)
    results = rt.map(flow, ({"n": n} for n in range(50)))
    next(results)
    of_client = client.map("flow", ({"n": n} for n in range(50)))
    next(of_client)
    client.instance_of_parent, client.live_of_parent = client.instance(done.id), client.instance("live")
    print("child", fork(in_child))
    print("parent", rt.execute(flow, {"n": 2}, timeout=100).stages[0].data, len(list(results)), len(list(of_client)))
"""
    )
    assert ended.lines == ["connected 8", "child 0", "parent 2 49 49"], ended


def test_nothing_that_a_forked_child_leaves_behind_reaches_the_cluster(run_program: Callable[..., Ended]) -> None:
    """It leaves the block, runs atexit, collects garbage, or ends in the middle of a map."""
    ended = run_program(
        EVERY_CALL
        + """
import atexit, gc

def leave():
    rt.__exit__(None, None, None)
    client.__exit__(None, None, None)

def leave_with_error():
    rt.__exit__(ValueError, ValueError("x"), None)

def drop():
    global results, done, live
    results.close()
    results = done = live = None
    gc.collect()

def close():
    rt.close()
    client.close()

def end():
    atexit.register(rt.close)
    results.close()
    sys.exit(0)  # out of both blocks, then atexit and the finalization of the interpreter

with Runtime(flow, waits, data_dir="data") as rt, Runtime.connect("data") as client:
    done, live = rt.submit(flow, {"n": 1}), rt.submit(waits, {})
    done.result(timeout=100)
    results = rt.map(flow, ({"n": n} for n in range(50)))
    next(results)
    for work in (leave, leave_with_error, drop, close):
        print(work.__name__, fork(work))
    node = rt.node_pid
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        end()
    print("end", os.waitpid(pid, 0)[1])
    of_client = client.execute("flow", {"n": 3}, timeout=100)
    print("parent", len(list(results)), of_client.stages[0].data, rt.node_pid == node)
"""
    )
    expected = ["leave 0", "leave_with_error 0", "drop 0", "close 0", "end 0", "parent 49 3 True"]
    assert ended.lines == expected, ended
    assert ended.errors == ""


def test_processes_of_a_fork_pool_are_refused_at_once_and_the_pool_goes_on(run_program: Callable[..., Ended]) -> None:
    ended = run_program(
        """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

def use(n):
    try:
        rt.submit(flow, {"n": n})
    except StageFlowError as error:
        return "Runtime.connect" in str(error)

def connect(n):
    with Runtime.connect("data") as client:
        return client.execute("flow", {"n": n}, timeout=100).stages[0].data

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    with Runtime(flow, data_dir="data") as rt:
        with context.Pool(2) as pool:
            print(pool.map(use, range(4)))
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            print(list(pool.map(connect, range(4))))
        print(rt.execute(flow, {"n": 5}, timeout=100).stages[0].data)
"""
    )
    assert ended.lines == ["[True, True, True, True]", "[0, 1, 2, 3]", "5"], ended


def test_a_runtime_that_was_not_running_at_the_fork_starts_in_the_child(run_program: Callable[..., Ended]) -> None:
    """As under gunicorn with `--preload`: the module makes the runtime, and a forked server starts it."""
    ended = run_program(
        """
rt = Runtime(flow, data_dir="data")
pid = os.fork()
if pid == 0:
    with rt:
        print(rt.execute(flow, {"n": 3}, timeout=100).stages[0].data)
    sys.exit(0)
print(os.waitpid(pid, 0)[1])
with rt:
    print(rt.execute(flow, {"n": 4}, timeout=100).stages[0].data)
"""
    )
    assert ended.lines == ["3", "0", "4"], ended
