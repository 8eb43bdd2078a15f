"""`Asking`: one connection to the broker and one reader of the history, as every client has them.

What has left the broker is looked up in the history. What a question means is not decided here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from stageflow_actors.core.plan import (
    Naming,
)
from stageflow_actors.errors import (
    BrokerUnavailable,
    StageFlowError,
)
from stageflow_actors.history.reader import HistoryReader
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.runtime.client.waiters import Waiter, Waiters
from stageflow_actors.runtime.messaging.connect import connect
from stageflow_actors.runtime.messaging.errors import translate_error
from stageflow_brokers import api as port
from stageflow_brokers.api import Broker, BrokerAdmin, Listener
from stageflow_brokers.failpoints import failpoint

__all__ = ["ANSWER_SECONDS", "STOPPED", "Asking", "Ends", "no_text"]

T = TypeVar("T")

ANSWER_SECONDS = 60.0
"""How long a call waits for the broker, restarts of it included."""

STOPPED = (
    "this runtime has been stopped; what was unfinished resumes when a runtime is started on its data directory again"
)

CATCH_UP_SECONDS = 1.0


def no_text(error: UnicodeEncodeError) -> ValueError:
    """The error of who was given a str with a lone surrogate in the place of a name, an id or a reason."""
    return ValueError(
        f"{error.object!r} cannot be stored or sent: it has a lone surrogate, as bytes that are not UTF-8 leave one"
    )


class Ends(Listener):
    """What the connection tells a client. `connected` is called for each broker that says welcome."""

    def __init__(self, waiters: Waiters, connected: Callable[[], None]) -> None:
        self._waiters = waiters
        self._connected = connected

    def on_connected(self, broker_epoch: int) -> None:
        self._connected()

    def on_pushes(self, pushes: list[tuple[str, str, bytes]]) -> None:
        failpoint("client.told")
        self._waiters.ended(pushes)

    def on_notice(self, word: str, detail: Any) -> None:
        if word == "gone":
            self._waiters.left(detail)
        elif word == "parked":
            self._waiters.parked(detail)

    def watching(self) -> list[str]:
        return list(self._waiters.by_id)


class Asking:
    """The part of a client that talks: everything is asked again of a broker that was started anew meanwhile."""

    def __init__(self) -> None:
        self._broker: Broker | None = None
        self._history: HistoryReader | None = None
        self._history_path: Path | None = None
        self._address = ""
        self._naming = Naming()
        self._seen = 0
        self._waiters = Waiters()
        self._dead: StageFlowError | None = None

    def _attach(self, address: str, name: str) -> None:
        self._address = address
        self._broker = connect(address, Ends(self._waiters, self._connected), role="client", name=name)

    def _connected(self) -> None:
        """A broker has said welcome; on the connection's thread."""

    def _detach(self, why: str = STOPPED) -> None:
        if self._broker is not None:
            self._broker.close(timeout=1.0)
            self._broker = None
        self._waiters.break_off(BrokerUnavailable(why), forget=True)
        if self._history is not None:
            self._history.close()
            self._history = None

    def _port(self) -> Broker:
        if self._broker is None:
            raise BrokerUnavailable("this runtime is not running: call start(), or use it in a `with` block")
        return self._broker

    def _ask(self, operation: Callable[[BrokerAdmin], Future[T]]) -> T:
        """Perform an operation of the broker and return its answer.

        Raises `ValueError` for text that cannot be sent; nothing is sent then.
        """
        try:
            future = operation(self._port().admin)
        except port.BrokerError as error:
            raise translate_error(error) from None
        except UnicodeEncodeError as error:
            raise no_text(error) from None
        return self._await(future)

    def _await(self, future: Future[T], timeout: float = ANSWER_SECONDS, check: Callable[[], None] | None = None) -> T:
        deadline = time.monotonic() + timeout
        poll = 0.5 if check is None else 0.05
        while True:
            try:
                return future.result(poll)
            except TimeoutError:
                (check or self._check_alive)()
                if time.monotonic() > deadline:
                    raise BrokerUnavailable(f"the broker has not answered within {timeout:g} s") from None
            except port.BrokerError as error:
                raise translate_error(error) from None

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._dead

    def _fail(self, error: StageFlowError) -> None:
        """The cluster cannot be kept: whoever waits is told."""
        self._dead = error
        self._waiters.break_off(error, forget=False)

    def _watch(self, instance_id: str, waiter: Waiter) -> None:
        """Have `waiter` told how an instance ends, whoever started it."""
        self._waiters.add(instance_id, waiter)
        try:
            self._ask(lambda admin: admin.watch([instance_id]))
        except BaseException:
            self._waiters.remove(instance_id, waiter)
            raise

    # rows and groups

    def _let_history_catch_up(self) -> None:
        """Wait, a second at most, until what has ended by now is written: it follows some milliseconds behind."""
        deadline = time.monotonic() + CATCH_UP_SECONDS
        due = None
        while True:
            queues = self._ask(lambda admin: admin.stats(self._naming.finished))["queues"]
            if not queues:
                return
            queue = queues[0]
            if due is None:
                due = queue["settled"] + queue["ready"] + queue["leased"]
            if not queue["ready"] + queue["leased"] or queue["settled"] >= due or time.monotonic() > deadline:
                return
            time.sleep(0.005)

    def _reader(self) -> HistoryReader | None:
        if self._history is None and self._history_path is not None and self._history_path.exists():
            self._history = HistoryReader.open(self._history_path)
        return self._history

    def _row(self, instance_id: str) -> HistoryRow | None:
        reader = self._reader()
        return None if reader is None else reader.get(instance_id)

    def _lookup(self, ids: list[str]) -> dict[str, Any]:
        answer = self._ask(lambda admin: admin.lookup(ids))
        self._seen = max(self._seen, (answer["epoch"] << 40) + answer["left_seq"])
        groups: dict[str, Any] = answer["groups"]
        return groups
