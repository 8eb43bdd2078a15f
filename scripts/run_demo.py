"""The demo: orders run, everything is killed half-way, the same command runs again, and the shop is audited.

Started by `scripts/demo`. It judges only by the shop's own books and by the results file, kills only the processes it
started and their descendants, and leaves nothing behind, whether it ends well, badly or by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
EXAMPLE = EXAMPLES / "order_processing.py"
LOOK_EVERY = 0.05  # seconds between two looks at the shop
GRACE = 5.0  # seconds for a run to end after a Ctrl-C, and for a process to be gone after a SIGKILL
GIVE_UP_AFTER = 300.0  # seconds that a run may take; it takes about ten


class DemoFailed(Exception):
    """The demo did not go as expected; the message is for the terminal."""


def print_step(text: str) -> None:
    print(f"\n── {text}", file=sys.stderr, flush=True)


def descendants(root: int) -> list[psutil.Process]:
    """Return the process `root` and its descendants, or nothing if it has ended."""
    try:
        program = psutil.Process(root)
        return [program, *program.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def has_ended(process: psutil.Process) -> bool:
    """Return True if the process has ended. A zombie has: in a container nothing may reap it."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def still_alive(processes: list[psutil.Process], grace: float) -> list[psutil.Process]:
    """Return the processes that have not ended within `grace` seconds."""
    deadline = time.monotonic() + grace
    while alive := [process for process in processes if not has_ended(process)]:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.01)
    return alive


def kill_all(root: int) -> int:
    """Send SIGKILL to a program and its descendants. Return the number of processes.

    They are stopped first, so that none starts another one or finishes its work while the others are found.
    """
    victims: dict[int, psutil.Process] = {}
    while found := [process for process in descendants(root) if process.pid not in victims]:
        for process in found:
            victims[process.pid] = process
            with suppress(psutil.NoSuchProcess):
                process.suspend()
    for process in victims.values():
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if alive := still_alive(list(victims.values()), GRACE):
        raise DemoFailed(f"processes that survived a SIGKILL: {', '.join(str(process.pid) for process in alive)}")
    return len(victims)


@contextmanager
def started(command: list[str], environment: dict[str, str], grace: float = GRACE) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program; none of its processes is left afterwards."""
    with subprocess.Popen(command, env=environment) as program:
        try:
            yield program
        except KeyboardInterrupt:
            # The terminal has sent the program a Ctrl-C as well: it gets a moment to end. Its processes
            # are listed before, because orphans cannot be distinguished from other processes.
            for process in still_alive(descendants(program.pid), grace):
                kill_all(process.pid)
            raise
        finally:
            if program.poll() is None:
                kill_all(program.pid)


def wait(program: subprocess.Popen[bytes], until: Callable[[], bool] = lambda: False) -> int | None:
    """Wait for the program to end and return its exit code, or None if `until` becomes true before."""
    looks = 0
    while not until():
        try:
            return program.wait(timeout=LOOK_EVERY)
        except subprocess.TimeoutExpired:
            looks += 1
            if looks * LOOK_EVERY > GIVE_UP_AFTER:
                raise DemoFailed(f"the run took more than {GIVE_UP_AFTER:.0f} s") from None
    return None


def confirmed(shop: Path) -> int:
    """Return the number of orders whose last stage is in the books of the shop."""
    with closing(sqlite3.connect(shop, timeout=10)) as db:
        (count,) = db.execute("SELECT count(*) FROM confirmations").fetchone()
    return int(count)


def demo(folder: Path, orders: Path) -> int:
    """Run the demo. Return the exit code of the audit."""
    shop, results = folder / "shop.db", folder / "results.jsonl"
    # The sockets of a killed run remain, and are deleted with the folder.
    environment = dict(os.environ, SHOP_DB=str(shop), XDG_RUNTIME_DIR=str(folder))
    environment.pop("STAGEFLOW_DATA", None)
    stageflow = str(Path(sys.executable).with_name("stageflow"))
    run = [stageflow, "run", f"{EXAMPLE}:runtime", "--input", str(orders), "--key", "order_id"]
    run += ["--results", str(results), "--data", str(folder / "data")]
    total = sum(1 for line in orders.read_text("utf-8").splitlines() if line.strip())

    print_step(f"A shop, and {total:,} orders for it")
    subprocess.run([sys.executable, str(EXAMPLE), "init"], env=environment, check=True)

    print_step(f"stageflow run {EXAMPLE.relative_to(EXAMPLES.parent)}:runtime --input {orders.name} --key order_id …")
    with started(run, environment) as program:
        code = wait(program, until=lambda: confirmed(shop) >= total * 2 // 5)
        if code is not None:
            raise DemoFailed(f"the run ended (exit code {code}) before it could be killed")
        through = confirmed(shop)
        killed = kill_all(program.pid)
    print_step(f"{through:,} orders were done when all {killed} processes got a SIGKILL. The same command again:")

    with started(run, environment) as program:
        code = wait(program)
    # 1 means that some orders did not complete: some cards are declined.
    if code not in (0, 1):
        raise DemoFailed(f"the second run failed with exit code {code}")

    print_step("And the audit:")
    audit = [sys.executable, str(EXAMPLE), "audit", "--input", str(orders), "--results", str(results)]
    code = subprocess.run(audit, env=environment, check=False).returncode
    print_step("The shop balances." if code == 0 else "The shop does NOT balance.")
    return code


def interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--input", type=Path, default=EXAMPLES / "orders.jsonl", help="another file of orders")
    parser.add_argument("--keep", action="store_true", help="keep the folder with shop, journal and results")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    folder = Path(tempfile.mkdtemp(prefix="stageflow-demo-"))
    try:
        code = demo(folder, options.input)
    except DemoFailed as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        code = 1
    except subprocess.CalledProcessError as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        code = 130
    finally:
        if options.keep:
            print(f"Everything is kept in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
